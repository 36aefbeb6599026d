"""How much each block matters to each criterion (Shortened LLaMA, Figure 4): lists of scores, and the figure. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import msgspec

from bench.report import quantities
from bench.report.quantities import inert
from bench.report.series import PANEL_LIMIT, SERIES_LIMIT
from bench.report.studies.drawing import left_out, tint
from bench.report.studies.held import Held
from bench.report.values import Axis, Chart, Panel, Point, Series
from shortllama.plans import Plan
from shortllama.scores import Scores
from shortllama.studies.rows import Row


class Importance(msgspec.Struct, frozen=True):
    """One list of scores, one a block, higher = keep: of blocks, or of the attention or the FFNs alone.

    `name` tells it from all others, `short` from the others of its method; `gone`: by ratio, the blocks (from 0) that a
    plan took it from; `zero`: the score of something that does not matter at all.
    """

    label: str
    name: str
    short: str
    values: tuple[float | None, ...]
    gone: Mapping[float, frozenset[int]]
    zero: float = 0.0


def importances(held: Held) -> tuple[Importance, ...]:
    """Return the scores of every method that scores whole blocks or modules, each list once.

    Scores between steps are those of models that were pruned already, and are left out.
    """
    found: dict[str, dict[tuple[str, str], list[Row]]] = {}
    for row in held.rows:
        if row.pruned in held.scores and "between" not in row.costs and not row.iterative:
            found.setdefault(row.label, {}).setdefault(_drawn(row), []).append(row)
    return tuple(
        one for label, draws in found.items() for drawn, members in draws.items()
        for one in _lists(label, _told(drawn, list(draws)), members, held)
    )  # fmt: skip


def _drawn(row: Row) -> tuple[str, str]:
    return "" if row.calibration is None else row.calibration.label, "" if row.seed is None else f"seed {row.seed}"


def _told(drawn: tuple[str, str], among: Sequence[tuple[str, str]]) -> str:
    """Say of a draw what differs among its method's."""
    return ", ".join(one for place, one in enumerate(drawn) if one and len({other[place] for other in among}) > 1)


def _lists(label: str, told: str, members: Sequence[Row], held: Held) -> list[Importance]:
    scores = held.scores[members[0].pruned]
    known = {row.ratio: held.plans[row.pruned] for row in members if row.pruned in held.plans}
    parts = {"": scores.blocks, "attention": scores.attention, "FFN": scores.mlp}
    found: list[Importance] = []
    for part, values in parts.items():
        if values is not None and _wanted(scores, part):
            short = inert(", ".join(one for one in (part, told) if one))
            gone = {ratio: _gone(plan, part, len(values)) for ratio, plan in sorted(known.items())}
            name = f"{inert(label)}: {short}" if short else inert(label)
            found.append(Importance(label, name, short or inert(label), tuple(values), gone, _zero(scores, values)))
    return found


def _wanted(scores: Scores, part: str) -> bool:
    return (scores.unit == "block") == (part == "") and scores.unit in ("block", "module")


def _zero(scores: Scores, values: Sequence[float | None]) -> float:
    """Return the dense model's own perplexity for scores that are perplexities, if every one is above it."""
    dense = (scores.details or {}).get("dense") if scores.criterion == "ppl" else None
    least = min((value for value in values if value is not None), default=0.0)
    return float(dense) if isinstance(dense, int | float) and dense < least else 0.0


def _gone(plan: Plan, part: str, count: int) -> frozenset[int]:
    kept = {one.index: one for one in plan.keep}
    emptied = {"attention": lambda one: one.kv_groups == "", "FFN": lambda one: one.neurons == ""}
    return frozenset(
        index for index in range(count) if index not in kept or (part != "" and emptied[part](kept[index]))
    )


def block_importance(held: Held) -> Chart | None:
    """How much each block matters to each criterion, and which were removed."""
    lists = importances(held)
    panels: dict[str, list[Importance]] = {}
    for one in lists:
        if len({value for value in one.values if value is not None}) > 1:
            panels.setdefault(one.label, []).append(one)
    if not panels:
        return None
    shorts = list(dict.fromkeys(one.short for members in panels.values() for one in members))
    drawn = [
        Panel(
            _importance_title(label, members),
            tuple(_importance(one, tint(shorts.index(one.short))) for one in members[:SERIES_LIMIT]),
        )
        for label, members in panels.items()
    ]
    words = [f"{one.name}: least {_places(one)}{_removed(one)}" for members in panels.values() for one in members[:1]]
    return Chart(
        name="block-importance", title="Importance of each block", form="lines",
        x=Axis("Block", "integer", linear=True), y=Axis("From the least to the most important", "share", linear=True),
        panels=tuple(drawn[:PANEL_LIMIT]), source=held.line,
        reading="Each criterion on a logarithmic scale from its least important block to its most important one; a "
        "perplexity counts by its rise above the dense model's. The table has the "
        "scores.",
        alternative=f"Importance of each block, by criterion. {'. '.join(words)}.",
        left_out=left_out(len(drawn), max(map(len, panels.values()))), ring="removed",
    )  # fmt: skip


def _importance_title(label: str, members: Sequence[Importance]) -> str:
    ratios = [ratio for ratio in members[0].gone]
    return inert(f"{label}, {quantities.share(ratios[0])} removed" if ratios else label)


def _importance(one: Importance, colour: str) -> Series:
    places = [place for place, value in enumerate(one.values) if value is not None]
    heights = scaled([value - one.zero for value in one.values if value is not None])
    gone = next(iter(one.gone.values()), frozenset[int]())
    points = tuple(Point(place + 1, height, place) for place, height in zip(places, heights, strict=True))
    marked = tuple(index for index, place in enumerate(places) if place in gone)
    return Series(one.short, one.short, colour, "", False, points, changes=marked)


def scaled(values: Sequence[float]) -> list[float]:
    """Return the values from 0 (the least) to 1, by their logarithms where all are above zero."""
    drawn = [math.log(value) for value in values] if min(values) > 0 else list(values)
    low, high = min(drawn), max(drawn)
    return [(value - low) / (high - low) if high > low else 0.0 for value in drawn]


def _places(one: Importance) -> str:
    known = [(value, place) for place, value in enumerate(one.values) if value is not None]
    (_, least), (_, most) = min(known), max(known)
    return f"block {least + 1}, most block {most + 1}"


def _removed(one: Importance) -> str:
    if not one.gone:
        return ""
    ratio, gone = next(iter(one.gone.items()))
    places = ", ".join(str(place + 1) for place in sorted(gone)) or "none"
    return f", removed at {quantities.share(ratio)}: {places}"
