"""The tables of a study as data: perplexities, tasks, costs, scores of blocks, and what the models write. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

from bench.report import evaluations, quantities
from bench.report.studies import claims
from bench.report.studies.held import Held, subject
from bench.report.studies.importance import Importance, importances
from bench.report.studies.outcomes import final, is_quantised, mean, outcomes, seven, spread
from bench.report.values import Column, Table, Value
from shortllama.evaluation.results import Quality
from shortllama.evaluation.tasks import TASKS
from shortllama.studies import summary
from shortllama.study import NONE


def tables(held: Held, builders: Sequence[Builder]) -> tuple[Table, ...]:
    """Return every table that the study holds something for, in the order of `builders`."""
    made = (build(held) for build in builders)
    return tuple(table for table in made if table is not None)


def perplexities(held: Held) -> Table | None:
    """Each method, ratio, calibration and recipe, seeds together: dense, pruned, retrained, and the gap closed."""
    columns = (
        Column("method", "Method"), Column("ratio", "Ratio", "share"), Column("removed", "Parameters removed", "share"),
        Column("calibration", "Calibration"), Column("recipe", "Retrained"), Column("seeds", "Seeds", "integer"),
        Column("text", "Perplexity on"), Column("dense", "Dense", "number"), Column("pruned", "Pruned", "number"),
        Column("pruned_range", "Range", "number", interval=True), Column("retrained", "Retrained", "number"),
        Column("retrained_range", "Range", "number", interval=True), Column("closed", "Gap closed", "share"),
        Column("closed_range", "Range", "share", interval=True), Column("digest", "Digest"),
    )  # fmt: skip
    rows: list[tuple[Value, ...]] = []
    for text in held.texts:
        base = None if held.dense is None else held.dense.perplexity.get(text)
        for one in (*final(outcomes(held)), *outcomes(held, quantised=True)):
            before, after, shares = one.before(text), one.after(text), one.closed(text, held.dense)
            shares = [] if is_quantised(one.first) else shares  # no retraining of its own closed it
            if before:
                digests = dict.fromkeys(row.before.perplexity[text].digest for row in one.rows
                                        if text in row.before.perplexity)  # fmt: skip
                rows.append((
                    one.label, one.ratio, one.removed, one.calibration or None, _recipe(one.recipe), len(one.rows),
                    text, base and base.perplexity, mean(before), spread(before), mean(after) if after else None,
                    spread(after), mean(shares) if shares else None, spread(shares), ", ".join(digests),
                ))  # fmt: skip
    caption = "Means and ranges over seeds. Gap closed: 100\u00a0% is the dense model, 0\u00a0% the pruned one."
    return _table("study-perplexities", "What pruning costs", columns, rows, held, caption, {"digest"})


def tasks(held: Held) -> Table | None:
    """Each model with its accuracies, and what choosing and generating lost beside the nats that were lost."""
    if not held.tasks:
        return None
    columns = (
        Column("model", "Model"), Column("recipe", "Retrained"),
        *(Column(f"accuracy_{name}", name, "accuracy") for name in held.tasks),
        Column("average_of_seven", "Average of seven", "accuracy"), Column("choosing_lost", "Choosing lost", "share"),
        Column("generating_lost", "Generating lost", "share"), Column("nats_lost", "Nats a token lost", "number"),
        *(Column(f"{name}_standard_error", f"{name}, standard error", "accuracy") for name in held.tasks),
        Column("protocol", "Protocol"),
    )  # fmt: skip
    lost = summary.losses(held.rows, held.dense) if _losses_known(held) else ()
    told = {(one.subject, one.recipe): (one.choosing, one.generating, one.nats) for one in lost}
    rows: list[tuple[Value, ...]] = []
    if held.dense is not None:
        rows.append(_task_row(held.model, None, held.dense, held, (None, None, None)))
    for row in held.rows:
        losses = told.get((row.subject, row.recipe), (None, None, None))
        rows.append(_task_row(subject(row), _recipe(row.recipe), row.result, held, losses))
    caption = (
        "Lost: the share of the dense model's lead over guessing that is gone, over tasks where it has one; choosing "
        "is the mean over tasks with choices, generating over those whose word has to be written. An average is given "
        "where all seven of the paper's tasks were evaluated."
    )
    detail = {f"{name}_standard_error" for name in held.tasks} | {"protocol"}
    return _table("study-tasks", "Zero-shot accuracy", columns, rows, held, caption, detail)


def _losses_known(held: Held) -> bool:
    return set(held.tasks) <= TASKS.keys()


def _task_row(
    name: str, recipe: str | None, quality: Quality, held: Held, losses: tuple[float | None, ...]
) -> tuple[Value, ...]:
    known = quality.zero_shot.tasks if quality.zero_shot else {}
    found = [known.get(task) for task in held.tasks]
    return (
        quantities.inert(name), recipe, *(one and one.value for one in found), seven(quality), *losses,
        *(one and one.standard_error for one in found),
        "; ".join([f"{task}: {one.protocol}" for task, one in known.items()]),
    )  # fmt: skip


def costs(held: Held) -> Table | None:
    """Seconds, memory and tokens of scoring and retraining, means over seeds, with the paper's own in the caption."""
    parts = ("scoring", "between", "retraining")
    titles = {"scoring": "Scoring", "between": "Retraining between", "retraining": "Retraining"}
    columns = (
        Column("method", "Method"), Column("ratio", "Ratio", "share"), Column("calibration", "Calibration"),
        Column("recipe", "Retrained"), Column("seeds", "Seeds", "integer"),
        *(
            column for part in parts for column in (
                Column(f"{part}_s", titles[part], "s"), Column(f"{part}_peak_bytes", "Peak memory", "bytes"),
                Column(f"{part}_tokens", "Tokens", "integer"),
            )
        ),
    )  # fmt: skip
    rows: list[tuple[Value, ...]] = []
    for one in final(outcomes(held)):
        spent: list[Value] = []
        for part in parts:
            known = [row.costs[part] for row in one.rows if part in row.costs]
            peaks = [cost.peak_bytes for cost in known if cost.peak_bytes is not None]
            spent += [mean(cost.wall_s for cost in known), max(peaks, default=None),
                      mean(cost.tokens for cost in known)] if known else [None, None, None]  # fmt: skip
        rows.append((one.label, one.ratio, one.calibration or None, _recipe(one.recipe), len(one.rows), *spent))
    caption = (
        f"Without loading. Memory is what was held beyond the model, at its highest. The paper (section 3.3, appendix "
        f"D) reports 1 to 2 hours for pruning 7B and 13B models, and for LoRA about 2 hours and 22 GB (7B, 20\u00a0% "
        f"removed) and 3 hours and 35 GB (13B, 21\u00a0%), all on one A100; here {held.model} was pruned, of "
        f"{quantities.count(held.parameters)} parameters, so these are not comparable."
    )
    return _table("study-costs", "What scoring and retraining cost", columns, rows, held, quantities.inert(caption))


def scores(held: Held) -> Table | None:
    """The score of each block under each criterion, and the ratios at which it goes."""
    lists = importances(held)
    if not lists:
        return None
    columns = [Column("block", "Block", "integer")]
    for one in lists:
        columns.append(Column(one.name, one.name, "number"))
        columns.append(Column(f"{one.name}: removed at", "removed at"))
    count = max(len(one.values) for one in lists)
    rows = [(place + 1, *(cell for one in lists for cell in _score(one, place))) for place in range(count)]
    caption = "As the criteria gave them: higher is kept, and values of different criteria do not compare."
    return _table("block-scores", "Scores of each block", columns, rows, held, caption)


def _score(one: Importance, place: int) -> tuple[Value, Value]:
    value = one.values[place] if place < len(one.values) else None
    gone = [quantities.share(ratio) for ratio, blocks in one.gone.items() if place in blocks]
    return value, ", ".join(gone) or None


def generations(held: Held) -> Table | None:
    """What each model wrote before and after retraining."""
    return evaluations.generations(_writers(held), held.line)


def _writers(held: Held) -> Iterator[evaluations.Writer]:
    if held.dense is not None:
        yield held.model, None, held.dense
    for row in held.rows:
        yield subject(row), _recipe(NONE), row.before
        if row.after is not None:
            yield subject(row), row.recipe, row.after


def _recipe(name: str) -> str:
    return "no" if name == NONE else name


Builder: TypeAlias = Callable[[Held], Table | None]
RESULTS: tuple[Builder, ...] = (claims.table, perplexities, tasks)
DETAILS: tuple[Builder, ...] = (costs, generations, scores)


def _table(
    name: str, title: str, columns: Sequence[Column], rows: Sequence[tuple[Value, ...]], held: Held, caption: str,
    detail: set[str] | None = None,
) -> Table | None:  # fmt: skip
    """Hide the columns that hold nothing; no table without rows."""
    if not rows:
        return None
    empty = {one.key for place, one in enumerate(columns) if all(row[place] in (None, "") for row in rows)}
    return Table(
        name, title, tuple(columns), tuple(rows), held.line, hidden=frozenset(empty | (detail or set())),
        caption=caption,
    )  # fmt: skip
