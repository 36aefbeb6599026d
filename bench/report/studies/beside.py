"""A study beside the paper's Tables 3 and 10, 5, 6 and 7, in their layout, and how far the orders agree. Pure.

A study of another model has numbers that do not compare with the paper's: what can be compared is which method is
better than which. A pair of rows is made by method and the nearest ratio, and each table says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from bench import paper
from bench.report import quantities, wording
from bench.report.studies.held import Held
from bench.report.studies.outcomes import Outcome, final, mean, outcomes, seven
from bench.report.studies.pairing import MODEL, Pairs, agreement, is_papers, one_recipe, pair, section, share, usual
from bench.report.values import Column, Table, Value
from shortllama import methods
from shortllama.evaluation.tasks import TASKS
from shortllama.study import NONE

_PPL = {"wikitext2_ppl": "WikiText2", "ptb_ppl": "PTB"}
_SEVEN = tuple(name for name, task in TASKS.items() if task.averaged)


class Order(msgspec.Struct, frozen=True):
    """Of `pairs` of rows that both have at one of the paper's levels ("at 20 %"), how many agree in order by `what`."""

    table: str
    level: str
    what: str
    same: int
    pairs: int

    @property
    def text(self) -> str:
        """In words."""
        are = "is" if self.same == 1 else "are"
        pairs = wording.plural(self.pairs, "pair")
        return f"{self.same} of {pairs} {are} in the paper's order {self.level}, by {self.what}"


class Beside(msgspec.Struct, frozen=True):
    """One of the paper's tables: the pairs, how its rows are told apart, and the order in each group of rows."""

    name: str
    title: str
    number: str
    columns: tuple[Column, ...]
    told: Callable[[Any, Outcome | None], tuple[Value, ...]]
    pairs: Pairs
    tasks: tuple[str, ...] = ()
    dense: tuple[Any, Held] | None = None
    level: Callable[[Any], str] = lambda row: f"at {quantities.share(share(row.pruned))}"


# -- the tables --------------------------------------------------------------------------------------------------------


def zero_shot(held: Held) -> Beside:
    """Tables 3 and 10 (and 2 and 4 in short): every method, perplexity and tasks."""
    rows = [row for row in paper.read().zero_shot if row.model == section(held)]
    cut = [row for row in rows if row.method != "dense"]

    def far(row: paper.ZeroShot, one: Outcome) -> float | None:
        return abs(share(row.pruned) - one.ratio) if row.method == one.label else None

    columns = (Column("paper_ratio", "Removed, paper", "share"), Column("method", "Method"))
    return Beside(
        "paper-zero-shot", "Zero-shot results beside the paper's Tables 3 and 10", "10", columns,
        lambda row, one: (row and share(row.pruned), row.method if row else one and one.label),
        pair(cut, [one for one in usual(held) if one.label == one.first.method], far), _SEVEN,
        next(((row, held) for row in rows if row.method == "dense"), None),
    )  # fmt: skip


def criteria(held: Held) -> Beside | None:
    """Table 5: criteria that remove whole blocks; None where no two of them meet at a ratio."""
    ours = [one for one in usual(held) if _removes_blocks(one) and one.label == one.first.method]
    if all(len([other for other in ours if other.ratio == one.ratio]) < 2 for one in ours):
        return None

    def far(row: paper.Criterion, one: Outcome) -> float | None:
        return abs(share(row.pruned) - one.ratio) if row.criterion == one.label else None

    columns = (Column("paper_ratio", "Removed, paper", "share"), Column("criterion", "Criterion"))
    return Beside(
        "paper-criteria", "Criteria beside the paper's Table 5", "5", columns,
        lambda row, one: (row and share(row.pruned), row.criterion if row else one and one.label),
        pair(paper.read().criteria, ours, far),
    )  # fmt: skip


def granularity(held: Held) -> Beside | None:
    """Table 6: whole blocks against attention and FFNs alone, by what is left; None without both."""
    ours = [one for one in usual(held) if one.is_plain and _removes_blocks(one, module=True)]
    both = {one.first.method for one in ours if one.first.unit == "module"}
    ours = [one for one in ours if one.first.method in both]
    # The paper used the perplexity criterion; where it is not among ours, the first that is stands in.
    chosen = next((name for name in ("ppl", *sorted(both)) if name in both), None)
    ours = [one for one in ours if one.first.method == chosen]
    if len({one.first.unit for one in ours}) < 2:
        return None
    whole = next(row.params_b for row in paper.read().shapes if row.name == MODEL)

    def far(row: paper.Granularity, one: Outcome) -> float | None:
        return abs(row.params_b / whole - (1 - one.removed)) if row.unit == one.first.unit else None

    columns = (Column("paper_parameters", "Parameters, paper", "parameters"), Column("unit", "Unit"),
               Column("criterion", "Criterion"))  # fmt: skip
    return Beside(
        "paper-granularity", "Blocks or modules, beside the paper's Table 6", "6", columns,
        lambda row, one: (row and row.params_b * 1e9, row.unit if row else one and one.first.unit, one and chosen),
        pair(paper.read().granularity, ours, far), level=_size,
    )  # fmt: skip


def calibration(held: Held) -> Beside | None:
    """Table 7: sizes of the calibration set at 20 %; None where the study has only one."""
    ours = [one for one in one_recipe(final(outcomes(held))) if one.first.calibration and one.is_plain]
    if len({one.first.calibration.samples for one in ours if one.first.calibration}) < 2:
        return None

    def far(row: paper.Calibration, one: Outcome) -> float | None:
        samples = one.first.calibration.samples if one.first.calibration else None
        return abs(0.2 - one.ratio) if (row.method, row.samples) == (one.label, samples) else None

    columns = (Column("method", "Method"), Column("samples", "Samples", "integer"))
    return Beside(
        "paper-calibration", "Size of the calibration set, beside the paper's Table 7", "7", columns,
        lambda row, one: (row.method, row.samples) if row else (
            one and one.label, one and one.first.calibration and one.first.calibration.samples),
        pair(paper.read().calibration, ours, far), level=lambda row: f"for {row.method}",
    )  # fmt: skip


BUILDERS: tuple[tuple[Callable[[Held], Beside | None], str], ...] = (
    (zero_shot, "zero-shot results (Tables 3 and 10)"),
    (criteria, "criteria (Table 5)"),
    (granularity, "blocks against modules (Table 6)"),
    (calibration, "sizes of the calibration set (Table 7)"),
)


def tables(held: Held) -> tuple[Table, ...]:
    """Return the paper's tables that the study has something for."""
    return tuple(table(one, held) for build, _ in BUILDERS if (one := build(held)) is not None)


def absent(held: Held) -> tuple[str, ...]:
    """Return what the paper compares and the study does not."""
    return tuple(what for build, what in BUILDERS if build(held) is None)


def orders(held: Held) -> tuple[Order, ...]:
    """Return how far the study and the paper agree on which is better, table by table."""
    made = [one for build, _ in BUILDERS if (one := build(held)) is not None]
    return tuple(order for one in made for order in in_order(one, held))


# -- what belongs together ---------------------------------------------------------------------------------------------


def _removes_blocks(one: Outcome, *, module: bool = False) -> bool:
    known = methods.METHODS.get(one.first.method)
    return (
        known is not None
        and known.unit == "block"
        and one.first.unit in (("block", "module") if module else ("block",))
    )


def _size(row: paper.Granularity) -> str:
    """Name the size that a row of Table 6 stands for; the file has a row of modules and one of blocks for each."""
    rows = paper.read().granularity
    place = rows.index(row)
    return f"at {rows[place - place % 2].params_b:g} B"


# -- a table -----------------------------------------------------------------------------------------------------------


def table(one: Beside, held: Held) -> Table:
    """Return the table: our numbers, the paper's beside them, and below what keeps them apart."""
    papers = [name for name in _PPL if any(hasattr(row, name) for row, _ in one.pairs)]
    columns = (
        *one.columns, Column("ratio", "Removed, here", "share"), Column("recipe", "Retrained, here"),
        *(Column(f"perplexity_{text}", f"Perplexity on {text}", "number") for text in held.texts),
        *(Column(f"paper_{name}", f"{_PPL[name]}, paper", "number") for name in papers),
        *(column for name, title in (("average", "Average of seven"), *((task, task) for task in one.tasks))
          for column in (Column(name, title, "accuracy"), Column(f"paper_{name}", f"{title}, paper", "accuracy"))),
    )  # fmt: skip
    rows: list[tuple[Value, ...]] = []
    if one.dense is not None:
        rows.append(_dense_row(one, held, papers))
    for row, ours in one.pairs:
        told = (*one.told(row, ours), ours and ours.ratio, ours and ("no" if ours.recipe == NONE else ours.recipe))
        values = _numbers(ours, held, one.tasks)
        rows.append((*told, *_interleaved(values, row, held, papers, one.tasks)))
    never = [task for task in one.tasks if task not in held.tasks]
    told = explanation(held) if one.tasks else _briefly(held)
    caption = " ".join([told, *_missing(never, one), *(f"{order.text}." for order in in_order(one, held))])
    return Table(one.name, one.title, columns, tuple(rows), held.line, caption=caption)


def _numbers(ours: Outcome | None, held: Held, tasks: Sequence[str]) -> list[float | None]:
    if ours is None:
        return [None] * (len(held.texts) + 1 + len(tasks))
    found = [ours.result(text) for text in held.texts]
    return [*(mean(values) if values else None for values in found), ours.seven, *(ours.accuracy(t) for t in tasks)]


def _interleaved(
    ours: Sequence[float | None], row: Any, held: Held, papers: Sequence[str], tasks: Sequence[str]
) -> list[Value]:
    """Our perplexities, the paper's; our average, the paper's; and so for every task."""
    count = len(held.texts)
    theirs = [getattr(row, name, None) for name in ("average", *tasks)]
    found: list[Value] = [*ours[:count], *(getattr(row, name, None) for name in papers)]
    for mine, their in zip(ours[count:], theirs, strict=True):
        found += [mine, None if their is None else their / 100]
    return found


def _dense_row(one: Beside, held: Held, papers: Sequence[str]) -> tuple[Value, ...]:
    assert one.dense is not None
    row, dense = one.dense[0], held.dense
    known = dense.zero_shot.tasks if dense and dense.zero_shot else {}
    ours = [
        *(dense.perplexity[t].perplexity if dense and t in dense.perplexity else None for t in held.texts),
        seven(dense) if dense else None, *(known[t].value if t in known else None for t in one.tasks),
    ]  # fmt: skip
    return (0.0, "dense", 0.0, None, *_interleaved(ours, row, held, papers, one.tasks))


def explanation(held: Held) -> str:
    """Return what keeps the study's numbers and the paper's apart."""
    dense = held.dense.perplexity if held.dense else {}
    protocol = "; ".join(f"{quantities.inert(text)}: {one.protocol}" for text, one in dense.items())
    theirs = (
        "The paper retrained by LoRA (rank 8, rate 1e-4, batches of 64, 2 epochs), calibrated on 10 samples of 128 "
        "tokens of BookCorpus and ran lm-evaluation-harness on whole data sets."
    )
    name = quantities.inert(held.model)
    if is_papers(held):
        first = "The model is the paper's; the stack, the protocol and the texts to calibrate and retrain on are not."
    else:
        first = (
            f"The models differ: {name} has {quantities.count(held.parameters)} parameters, the paper's rows are "
            f"LLaMA-7B with 6.74\u00a0B. The numbers do not compare; only their order does, as direction."
        )
    return f"{first} {theirs}{f' Perplexity here: {protocol}.' if protocol else ''}"


def _briefly(held: Held) -> str:
    """The same in a sentence, for the tables after the first."""
    if is_papers(held):
        return "The model is the paper's; stack, protocol and texts are not."
    name, size = quantities.inert(held.model), quantities.count(held.parameters)
    return f"The models differ ({name}, {size} parameters; the paper's LLaMA-7B): only orders compare, not numbers."


def _missing(never: Sequence[str], one: Beside) -> list[str]:
    gone = [row.method for row, _ in one.pairs if isinstance(row, paper.Calibration) and row.wikitext2_ppl is None]
    said = [f"Missing of the paper: {wording.join(gone)} ran out of memory there."] if gone else []
    if one.tasks and len(never) == len(one.tasks):
        said.append("None of the paper's seven tasks was evaluated here.")
    elif never:
        said.append(f"Not evaluated here: {wording.join(never, 8)}, and so no average.")
    return said


# -- order -------------------------------------------------------------------------------------------------------------


def in_order(one: Beside, held: Held) -> list[Order]:
    """Return the agreement within each level of the paper, by perplexity and by average accuracy."""
    text = next((t for t in held.texts if t.startswith("wikitext2")), next(iter(held.texts), ""))
    levels: dict[str, list[tuple[Any, Outcome]]] = {}
    for row, ours in one.pairs:
        if row is not None and ours is not None:
            levels.setdefault(one.level(row), []).append((row, ours))
    found: list[Order] = []
    for level, pairs in levels.items():
        by = {
            f"perplexity on {text}": [(_mean(ours.result(text)), row.wikitext2_ppl) for row, ours in pairs],
            "average accuracy": [(ours.seven, row.average) for row, ours in pairs],
        }
        for what, values in by.items():
            same, count = agreement([(a, b) for a, b in values if a is not None and b is not None])
            if count:
                found.append(Order(one.number, level, quantities.inert(what), same, count))
    return found


def _mean(values: Sequence[float]) -> float | None:
    return mean(values) if values else None
