"""The figures of a study as data: block importance, what was lost and won back, one cut against several. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import msgspec

from bench.report import quantities
from bench.report.quantities import inert
from bench.report.series import PANEL_LIMIT, SERIES_LIMIT
from bench.report.studies.held import Held
from bench.report.studies.outcomes import Outcome, comparable, final, mean, named, outcomes, several, spread
from bench.report.values import Axis, Bar, Chart, Panel, Part, Point, Series
from shortllama.plans import Plan
from shortllama.scores import Scores
from shortllama.studies.rows import Row
from shortllama.study import NONE

LOST, BACK, WORSE = ("lost", "warm-1"), ("won back by retraining", "cool-2"), ("lost by retraining", "warm-3")
_LEAST_NATS = 1e-4  # below it nothing was lost that a bar could show


def charts(held: Held) -> tuple[Chart, ...]:
    """Return every figure that the study holds something for."""
    made = (build(held) for build in (lost_and_won, block_importance, cuts))
    return tuple(chart for chart in made if chart is not None)


# -- block importance (Shortened LLaMA, Figure 4) ----------------------------------------------------------------------


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
            tuple(_importance(one, _tint(shorts.index(one.short))) for one in members[:SERIES_LIMIT]),
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
        left_out=_left_out(len(drawn), max(map(len, panels.values()))), ring="removed",
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


def _left_out(panels: int, most: int) -> str:
    parts = [f"{panels - PANEL_LIMIT} of {panels} panels"] if panels > PANEL_LIMIT else []
    parts += [f"what is beyond the first {SERIES_LIMIT} of a panel"] if most > SERIES_LIMIT else []
    return f"Not drawn: {' and '.join(parts)}; the tables have them all." if parts else ""


# -- before and after retraining ---------------------------------------------------------------------------------------


def lost_and_won(held: Held) -> Chart | None:
    """What pruning cost in nats a token, and what retraining won back, for each method, ratio and text."""
    found = final(outcomes(held))
    panels: list[Panel] = []
    most = 0
    for text in held.texts:
        for ratio in dict.fromkeys(one.ratio for one in found):
            alike = [one for one in found if one.ratio == ratio and _measured(one, text, held)]
            most = max(most, len(alike))
            bars = [_bar(one, text, held, found) for one in sorted(alike, key=lambda one: mean(one.result(text)))]
            if bars:
                panels.append(
                    Panel(inert(f"{quantities.share(ratio)} removed, on {text}"), bars=tuple(bars[:SERIES_LIMIT]))
                )
    if not panels:
        return None
    panels = _with_all_parts(panels)
    dense = held.dense
    assert dense is not None, "measured against it"
    base = "; ".join(f"{quantities.significant(dense.perplexity[t].perplexity)} on {t}" for t in dense.perplexity)
    reading = (
        "A bar is the rise in the logarithm of perplexity; beside it the perplexity pruned and, after the arrow, "
        f"retrained. The dense model's is {base}. Best result first"
    )
    words = [f"{panel.title}: {'; '.join(f'{bar.label} {bar.note}' for bar in panel.bars)}" for panel in panels]
    return Chart(
        name="perplexity-retraining", title="What pruning lost, and what retraining won back", form="bars",
        x=Axis("Nats a token above the dense model", "number", linear=True), y=Axis("", "text"),
        panels=tuple(panels[:PANEL_LIMIT]), source=held.line,
        reading=inert(f"{reading}, means over seeds." if any(len(one.rows) > 1 for one in found) else f"{reading}."),
        alternative=f"What pruning lost, and what retraining won back: {'. '.join(words[:PANEL_LIMIT])}.",
        left_out=_left_out(len(panels), most),
    )  # fmt: skip


def _measured(one: Outcome, text: str, held: Held) -> bool:
    made = [quality for row in one.rows for quality in (row.before, row.after) if quality is not None]
    return comparable(text, [held.dense, *made])


def _bar(one: Outcome, text: str, held: Held, among: Sequence[Outcome]) -> Bar:
    assert held.dense is not None
    base = math.log(held.dense.perplexity[text].perplexity)
    pruned, retrained = mean(one.before(text)), one.after(text)
    rise = math.log(pruned) - base
    left = rise if not retrained else math.log(mean(retrained)) - base
    sizes = {
        LOST: max(min(rise, left), 0.0), BACK: max(rise, 0.0) - max(left, 0.0), WORSE: max(left, 0.0) - max(rise, 0.0)
    }  # fmt: skip
    note = quantities.significant(pruned)
    note += f" → {quantities.significant(mean(retrained))}" if retrained else ""
    parts = tuple(Part(*part, value) for part, value in sizes.items() if part == LOST or value > _LEAST_NATS)
    name = named(one, among)
    return Bar(name, name, "", False, parts, note)


def _with_all_parts(panels: Sequence[Panel]) -> list[Panel]:
    """Give every bar the same parts in one order, so that a table of them has columns."""
    used = {part.label for panel in panels for bar in panel.bars for part in bar.parts}
    order = [(label, colour) for label, colour in (LOST, BACK, WORSE) if label in used]

    def whole(bar: Bar) -> Bar:
        held = {part.label: part.value for part in bar.parts}
        return msgspec.structs.replace(bar, parts=tuple(Part(*one, held.get(one[0], 0.0)) for one in order))

    return [msgspec.structs.replace(panel, bars=tuple(map(whole, panel.bars))) for panel in panels]


# -- one cut against several (Shortened LLaMA, Figure 5) ---------------------------------------------------------------


def cuts(held: Held) -> Chart | None:
    """Perplexity over what was removed, in one cut and in several, before and after the last retraining."""
    found = outcomes(held)
    panels: list[Panel] = []
    alike = dict.fromkeys((one.first.method, one.first.unit, one.calibration) for one in found if one.in_steps)
    for text in held.texts:
        for method, unit, calibration in alike:
            key = (method, unit, calibration)
            rivals = [one for one in found if (one.first.method, one.first.unit, one.calibration) == key]
            rivals = [one for one in rivals if (one.in_steps or one.is_plain) and _measured(one, text, held)]
            series = _cut_series(rivals, text, held)
            if {one.in_steps for one in rivals} == {True, False}:
                said = [f"{method}{' (modules)' if unit == 'module' else ''}"]
                said += [f"scored on {calibration}"] if len(alike) > 1 and calibration else []
                panels.append(Panel(inert(", ".join([*said, f"on {text}"])), series[:SERIES_LIMIT]))
    if not panels:
        return None
    words = [f"{p.title}: {'; '.join(f'{s.label} {_range(s)}' for s in p.series)}" for p in panels[:PANEL_LIMIT]]
    return Chart(
        name="one-shot-iterative", title="One cut against several", form="lines",
        x=Axis("Parameters removed", "share", linear=True), y=Axis("Perplexity", "number"),
        panels=tuple(panels[:PANEL_LIMIT]), source=held.line,
        reading="Lower is better. Every curve begins at the dense model. Several cuts score again after each, and "
        "may retrain between them; the last retraining is the same for all.",
        alternative=f"One cut against several: perplexity over the parameters removed. {'. '.join(words)}.",
        left_out=_left_out(len(panels), 0),
    )  # fmt: skip


def _range(series: Series) -> str:
    return f"to {quantities.significant(series.points[-1].y)} at {quantities.share(series.points[-1].x)}"


def _cut_series(rivals: Sequence[Outcome], text: str, held: Held) -> tuple[Series, ...]:
    """One series for each way and state; what is pruned is the same under every recipe."""
    if held.dense is None:
        return ()
    base = Point(0.0, held.dense.perplexity[text].perplexity, 0)
    curves: dict[tuple[str, str], dict[float, Point]] = {}
    taught = several([one for one in rivals if one.recipe != NONE], lambda one: one.recipe)
    for one in sorted(rivals, key=lambda one: (one.in_steps, one.ratio)):
        way = _way(one, rivals) if one.in_steps else "one cut"
        for state, values in (
            ("pruned", one.before(text)),
            (inert(one.recipe) if taught else "retrained", one.after(text)),
        ):
            if values:
                points = curves.setdefault((way, state), {})
                points[one.ratio] = Point(one.removed, mean(values), len(points) + 1, None, spread(values))
    return tuple(
        Series(f"{way}, {state}", f"{way}, {state}", _tint(place),
               "pruned" if state == "pruned" else "retrained", False, (base, *points.values()))
        for place, ((way, state), points) in enumerate(curves.items())
    )  # fmt: skip


def _way(one: Outcome, rivals: Sequence[Outcome]) -> str:
    """Name a way of several cuts: by their number, where no two ways have the same."""
    number = f"in {one.first.steps} steps" if one.first.steps else "block by block"
    same = {other.label for other in rivals if other.in_steps and other.first.steps == one.first.steps}
    return number if len(same) == 1 else inert(one.label.partition(" ")[2].strip("()"))


def _tint(place: int) -> str:
    return _COLOURS[place % len(_COLOURS)]


_COLOURS = (
    "cool-1",
    "cool-2",
    "warm-1",
    "warm-3",
    "other-1",
    "other-2",
    "cool-3",
    "warm-2",
    "cool-4",
    "warm-4",
    "other-3",
)
