"""Evaluations (`shortllama eval --out FILE`) as tables: values by model, and what models wrote. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from bench.report.merging import Given
from bench.report.quantities import inert
from bench.report.values import Column, Report, Table, Value
from shortllama.evaluation.results import Quality

Writer = tuple[str, str | None, Quality]  # a model, how it was retrained where a study says so, what it is worth


def added(report: Report, given: Sequence[Given]) -> Report:
    """Return a report with the tables of these evaluations, under names of their own."""
    made = [table for one in given for table in tables(one.quality, inert(f"evaluation {one.name}"))]
    names = Counter(table.name for table in report.tables)
    found: list[Table] = []
    for table in made:
        names[table.name] += 1
        number = names[table.name]
        found.append(table if number == 1 else msgspec.structs.replace(table, name=f"{table.name}-{number}"))
    return msgspec.structs.replace(report, tables=(*report.tables, *found))


def tables(quality: Mapping[str, Quality], source: str) -> tuple[Table, ...]:
    """Return the tables of these models, each where there is anything in it."""
    made = (values(quality, source), generations([(name, None, one) for name, one in quality.items()], source))
    return tuple(one for one in made if one is not None)


def values(quality: Mapping[str, Quality], source: str) -> Table | None:
    """Every perplexity and accuracy, a row a model and text or task, with its protocol."""
    columns = (
        Column("model", "Model"), Column("on", "On"), Column("perplexity", "Perplexity", "number"),
        Column("accuracy", "Accuracy", "accuracy"), Column("standard_error", "Standard error", "accuracy"),
        Column("protocol", "Protocol"), Column("digest", "Digest"),
    )  # fmt: skip
    rows: list[tuple[Value, ...]] = []
    for name, one in quality.items():
        rows += [
            (name, text, found.perplexity, None, None, found.protocol, found.digest)
            for text, found in one.perplexity.items()
        ]
        rows += [
            (name, task, None, found.value, found.standard_error, found.protocol, found.digest)
            for task, found in (one.zero_shot.tasks.items() if one.zero_shot else ())
        ]
    if not rows:
        return None
    empty = {c.key for place, c in enumerate(columns) if all(row[place] is None for row in rows)}
    return Table("evaluated", "Evaluated models", columns, tuple(rows), source, hidden=frozenset({*empty, "digest"}))


def generations(writers: Iterable[Writer], source: str) -> Table | None:
    """What each model wrote (the paper's Tables 8, 11 and 12), prompt by prompt."""
    columns = (
        Column("prompt", "Prompt"), Column("model", "Model"), Column("retrained", "Retrained"), Column("text", "Text"),
        Column("drawn", "Drawn"), Column("tokens", "Tokens", "integer"), Column("ended", "Ended"),
    )  # fmt: skip
    written = [
        (one.prompt, inert(name), recipe, one.text, _drawn(one.temperature, one.seed), one.tokens,
         "by the model" if one.ended else "at the limit")
        for name, recipe, quality in writers for one in quality.generations
    ]  # fmt: skip
    if not written:
        return None
    prompts = list(dict.fromkeys(row[0] for row in written))
    rows = tuple(sorted(dict.fromkeys(written), key=lambda row: prompts.index(row[0])))
    hidden = frozenset({"retrained"} if all(row[2] is None for row in rows) else ())
    caption = "Greedy text is each model's most likely; drawn text depends on its seed. Nobody chose among them."
    return Table("generations", "What the models write", columns, rows, source, hidden=hidden, caption=caption)


def _drawn(temperature: float, seed: int | None) -> str:
    return "greedily" if temperature == 0 else f"at temperature {temperature:g}, seed {seed}"
