"""The figures of a study as data: block importance, what was lost and won back, one cut against several. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from bench.report import quantities
from bench.report.quantities import inert
from bench.report.series import PANEL_LIMIT, SERIES_LIMIT
from bench.report.studies.drawing import left_out, tint
from bench.report.studies.held import Held
from bench.report.studies.importance import block_importance
from bench.report.studies.outcomes import Outcome, comparable, final, mean, named, outcomes, several, spread
from bench.report.values import Axis, Bar, Chart, Panel, Part, Point, Series
from shortllama.study import NONE

LOST, BACK, WORSE = ("lost", "warm-1"), ("won back by retraining", "cool-2"), ("lost by retraining", "warm-3")
_LEAST_NATS = 1e-4  # below it nothing was lost that a bar could show


def charts(held: Held) -> tuple[Chart, ...]:
    """Return every figure that the study holds something for."""
    made = (build(held) for build in (lost_and_won, block_importance, cuts))
    return tuple(chart for chart in made if chart is not None)


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
        left_out=left_out(len(panels), most),
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
        left_out=left_out(len(panels), 0),
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
        Series(f"{way}, {state}", f"{way}, {state}", tint(place),
               "pruned" if state == "pruned" else "retrained", False, (base, *points.values()))
        for place, ((way, state), points) in enumerate(curves.items())
    )  # fmt: skip


def _way(one: Outcome, rivals: Sequence[Outcome]) -> str:
    """Name a way of several cuts: by their number, where no two ways have the same."""
    number = f"in {one.first.steps} steps" if one.first.steps else "block by block"
    same = {other.label for other in rivals if other.in_steps and other.first.steps == one.first.steps}
    return number if len(same) == 1 else inert(one.label.partition(" ")[2].strip("()"))
