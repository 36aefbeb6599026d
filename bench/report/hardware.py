"""The figures about the machine as data: what removing parameters gains, what blocks cost, roofs, energy.

Like bench.report.series: one function a figure, None where the results hold nothing for it, one row in CHARTS.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import correlation, linear_regression, mean, median

import msgspec

from bench import regimes
from bench.report import quantities, settings
from bench.report.palette import kind
from bench.report.series import (
    PANEL_LIMIT,
    SERIES_LIMIT,
    Builder,
    Style,
    batches,
    curve,
    ends,
    line_chart,
    make,
    value_of,
)
from bench.report.summaries import Grid, Setting, Summary
from bench.report.values import Axis, Chart, Guide, Panel, Point, Series

LEAST_DEPTHS = 3  # a line through two is no fit
PLACES = 24  # marks on a curve over positions
REGIMES = {
    "launch": ("launch-bound", "warm-1"), "bandwidth": ("bandwidth-bound", "cool-1"),
    "cache": ("cache-bound", "cool-2"), "compute": ("compute-bound", "warm-2"), None: ("no single cause", "other-3"),
}  # fmt: skip


class Fit(msgspec.Struct, frozen=True):
    """Seconds of a decode step = `step_s` + blocks x `block_s`, by least squares; `r2`: None where all are equal."""

    block_s: float
    step_s: float
    r2: float | None


def fit(blocks: Sequence[int], seconds: Sequence[float]) -> Fit:
    """Return the line through these steps; takes two different numbers of blocks or more."""
    slope, intercept = linear_regression(blocks, seconds)
    r2 = correlation(blocks, seconds) ** 2 if len(set(seconds)) > 1 else None
    return Fit(slope, intercept, r2)


# -- the figures -------------------------------------------------------------------------------------------------------


def speedup_parameters(grid: Grid, style: Style) -> Chart | None:
    """What each share of removed parameters gains: whether depth beats width at equal size."""

    def removed(cell: Summary) -> float | None:
        subject = cell.cell.subject
        own, dense = grid.parameters.get(subject), grid.parameters.get(grid.baseline.get(subject, ""))
        return 1 - own / dense if own is not None and dense and own < dense else None

    def point(cell: Summary) -> Point:
        share = removed(cell)
        assert share is not None, "only kept cells are drawn"
        return Point(share, value_of(cell.speedup), cell.cell.batch, None, ends(cell.speedup))

    def keep(cell: Summary) -> bool:
        return cell.speedup is not None and removed(cell) is not None

    def guides(series: Sequence[Series]) -> tuple[Guide, ...]:
        xs = [point.x for one in series for point in one.points]
        return (Guide("", ((0.0, 1.0), (max(xs), 1.0))),)

    return _at_one_batch(
        grid, style, point, keep, guides, name="speedup-parameters", title="Speed-up against parameters removed",
        x=Axis("Parameters removed", "share", linear=True), y=Axis("Speed-up over dense", "ratio"), form="points",
        reading="Higher is better. At one place of the horizontal axis shapes are of equal size: those in "
        "cool colours lost blocks, those in warm ones width. The dashed line is the dense model.",
    )  # fmt: skip


def launch_fit(grid: Grid, style: Style) -> Chart | None:
    """The step against the number of blocks, and what each block costs by a fit: the slope and where it begins."""
    alike = _same_blocks(grid)

    def point(cell: Summary) -> Point:
        return Point(len(grid.shapes[cell.cell.subject].blocks), _step(cell), cell.cell.batch)

    def keep(cell: Summary) -> bool:
        return cell.cell.subject in alike and regimes.step_s(cell.row) is not None

    def guides(series: Sequence[Series]) -> tuple[Guide, ...]:
        xs = [int(point.x) for one in series for point in one.points]
        if len(set(xs)) < LEAST_DEPTHS:
            return ()
        line = fit(xs, [point.y for one in series for point in one.points])
        share = "" if line.r2 is None else f", R² {line.r2:.3f}"
        text = (
            f"{quantities.text(line.step_s, 's')} + {quantities.text(line.block_s, 's')} a block{share}"
            if line.step_s >= 0
            else f"{quantities.text(line.block_s, 's')} a block, no fixed cost{share}"
        )
        first = 0.0 if line.step_s >= 0 else -line.step_s / line.block_s
        return (Guide(text, tuple((x, line.step_s + line.block_s * x) for x in (first, float(max(xs))))),)

    chart = _at_one_batch(
        grid, style, point, keep, guides, name="launch-fit", title="Decode step against number of blocks",
        x=Axis("Blocks", "integer", linear=True), y=Axis("Decode step", "s", linear=True), form="points",
        reading="The dashed line is fitted to shapes whose blocks are alike. Its slope is what one block costs, "
        "reading its weights and launching its operations; where it begins is what a step costs without any block.",
    )  # fmt: skip
    return chart if chart is not None and any(panel.guides for panel in chart.panels) else None


def step_positions(grid: Grid, style: Style) -> Chart | None:
    """The time of each step over a generation, at the largest batch that most subjects share."""
    panels: dict[Setting, Panel] = {}
    for setting, groups in grid.groups.items():
        kept = [[c for c in group.measured if len(c.row.samples.step_s) > 1] for group in groups.values()]
        batch = common(kept, largest=True)
        series = tuple(
            msgspec.structs.replace(curve(group, style, placeholder), points=_positions(cell), oom=None)
            for group, cells in zip(groups.values(), kept, strict=True) for cell in cells if cell.cell.batch == batch
        )  # fmt: skip
        if series:
            panels[setting] = Panel(f"batch {batch:,}", series[:SERIES_LIMIT])
    return titled(
        grid, panels, name="step-positions", title="Time of each token over a generation", form="lines",
        x=Axis("Position of the new token", "integer", linear=True),
        y=Axis("Seconds of a decode step", "s", linear=True),
        reading="Lower is better. A curve that rises pays for a growing context; a flat one pays for weights and "
        "launches. Each mark is the median over repeats and over neighbouring positions.",
    )  # fmt: skip


def roofline(grid: Grid, style: Style) -> Chart | None:
    """Every cell under the roof of its machine, coloured by what limits it."""
    families: dict[Setting, list[Summary]] = {}
    for setting, groups in grid.groups.items():
        family = Setting(setting.environment, setting.simulated, "", setting.dtype, "", 0, 0, "", "")
        found = [c for group in groups.values() for c in group.measured if c.row.bounds and regimes.step_s(c.row)]
        families.setdefault(family, []).extend(found)
    titles, _ = settings.split([family for family, cells in families.items() if cells], grid.sources)
    panels = [
        Panel(titles[family].strip(" ·"), _by_regime(cells), guides=_roof(cells))
        for family, cells in families.items() if cells
    ]  # fmt: skip
    if sum(len(one.points) for panel in panels for one in panel.series) < 2:
        return None
    used = [family for family, cells in families.items() if cells]
    dtype = used[0].dtype if len({family.dtype for family in used}) == 1 else ""
    return make(
        grid, panels, used, dtype, name="roofline", title="Cells under the roof", form="points",
        x=Axis("FLOPs per byte", "number"), y=Axis("Achieved FLOP/s in a decode step", "FLOP/s"),
        reading="The dashed roof is what bandwidth (the slope) and arithmetic (the flat part) allow, where the "
        "machine's peaks are known. The colour says what limits a cell; a cell far below the roof "
        "spends its time on neither.",
    )  # fmt: skip


def utilisation_batch(grid: Grid, style: Style) -> Chart | None:
    """How busy the device is against batch, mean and peak side by side (the paper's Figure 2), by the counter that the
    paper used where there is a GPU."""
    counters = {"nvml_busy": "Time in which any kernel ran", "host_busy": "CPU in use"}
    for field, title in counters.items():
        words = {
            "name": "utilisation-batch", "title": "Utilisation against batch size",
            "reading": "Mean and, where rows have it, peak over a window in which the cell was called again and again. "
            "A low mean at a small batch is room that a larger one can use; one busy SM of a GPU reads as all of it.",
        }  # fmt: skip
        means = _telemetry(grid, style, field, y=Axis(title, "share", linear=True), **words)
        if means is not None:
            peaks = _telemetry(grid, style, f"{field}_max", y=means.y, **words)
            return means if peaks is None else _side_by_side({"mean": means, "peak": peaks})
    return None


def sm_batch(grid: Grid, style: Style) -> Chart | None:
    """The share of SMs busy against batch, by performance counters: one mean a window, which have no peak."""
    return _telemetry(
        grid, style, "gpm_sm", name="sm-batch", title="Share of SMs busy against batch size",
        y=Axis("Share of SMs busy", "share", linear=True),
        reading="The mean over a window in which the cell was called again and again, by performance counters. They "
        "give one mean a window, so there is no peak. A low value is room that a larger batch can use.",
    )  # fmt: skip


def energy_batch(grid: Grid, style: Style) -> Chart | None:
    """Joules a new token against batch."""
    return _telemetry(
        grid, style, "joules_per_token", name="energy-batch", title="Energy per token against batch size",
        y=Axis("Joules per new token", "J/token"),
        reading="Lower is better. Energy of the whole board over a window of generations, idle power included.",
    )  # fmt: skip


CHARTS: tuple[Builder, ...] = (
    speedup_parameters, launch_fit, roofline, step_positions, utilisation_batch, sm_batch, energy_batch,
)  # fmt: skip


# -- shared parts ------------------------------------------------------------------------------------------------------


def _at_one_batch(
    grid: Grid, style: Style, point: Callable[[Summary], Point], keep: Callable[[Summary], bool],
    guides: Callable[[Sequence[Series]], tuple[Guide, ...]], *, name: str, title: str, x: Axis, y: Axis, form: str,
    reading: str,
) -> Chart | None:  # fmt: skip
    """One panel a setting, one mark a subject, at the smallest of the batches that most subjects share."""
    panels: dict[Setting, Panel] = {}
    for setting, groups in grid.groups.items():
        kept = [[cell for cell in group.measured if keep(cell)] for group in groups.values()]
        batch = common(kept)
        series = tuple(
            msgspec.structs.replace(curve(group, style, placeholder), points=(point(cell),), oom=None)
            for group, cells in zip(groups.values(), kept, strict=True) for cell in cells if cell.cell.batch == batch
        )[:SERIES_LIMIT]  # fmt: skip
        if len(series) > 1:
            panels[setting] = Panel(f"batch {batch:,}", series, guides=guides(series))
    return titled(grid, panels, name=name, title=title, form=form, x=x, y=y, reading=reading)


def titled(
    grid: Grid, panels: dict[Setting, Panel], *, name: str, title: str, form: str, x: Axis, y: Axis, reading: str
) -> Chart | None:
    """Say of each panel what differs between settings, then what its own title says; once, where it is the same."""
    if not panels:
        return None
    titles, constant = settings.split(list(panels), grid.sources)
    own = {panel.title for panel in panels.values()}
    named = [
        msgspec.structs.replace(
            panel, title=" · ".join(t for t in (titles[setting], panel.title if len(own) > 1 else "") if t)
        )
        for setting, panel in panels.items()
    ]
    constant = " · ".join(part for part in (constant, next(iter(own)) if len(own) == 1 else "") if part)
    return make(grid, named, list(panels), constant, name=name, title=title, form=form, x=x, y=y, reading=reading)


def common(cells: Iterable[Sequence[Summary]], *, largest: bool = False) -> int:
    """Return the batch that most subjects share; of several the smallest, or the largest. 0 without cells."""
    counted = Counter(cell.cell.batch for one in cells for cell in one)
    return min(counted, key=lambda value: (-counted[value], -value if largest else value), default=0)


def placeholder(cell: Summary) -> Point:
    """Stand in for points that are replaced at once."""
    return Point(1.0, 1.0, cell.cell.batch)


def _step(cell: Summary) -> float:
    step = regimes.step_s(cell.row)
    assert step is not None, "only cells with steps are drawn"
    return step


def _same_blocks(grid: Grid) -> frozenset[str]:
    """Return subjects that differ from their dense one in the number of blocks alone, and those dense ones."""
    found: set[str] = set()
    for subject, shape in grid.shapes.items():
        dense = grid.shapes.get(grid.baseline.get(subject, subject))
        if dense is not None and len(set(dense.blocks)) == 1 and set(shape.blocks) == set(dense.blocks):
            found |= {subject} if kind(subject, subject in grid.dense) != "width" else set()
    return frozenset(found)


def _positions(cell: Summary) -> tuple[Point, ...]:
    """Return at most PLACES marks over the positions of the new tokens, the first of them after the prefill's."""
    steps, last = cell.row.samples.step_s, cell.cell.output
    width = (last - 1) / len(steps)  # of long outputs, a sample is the mean over a run of neighbours
    each = math.ceil(len(steps) / PLACES)
    numbered = list(enumerate(steps))
    runs = [numbered[first : first + each] for first in range(0, len(numbered), each)]
    return tuple(
        Point(1.5 + width * (mean(i for i, _ in run) + 0.5), median(s for _, s in run), cell.cell.batch)
        for run in runs
    )  # fmt: skip


def _by_regime(cells: Sequence[Summary]) -> tuple[Series, ...]:
    found: dict[tuple[str | None, str], list[Point]] = {}
    for cell in cells:
        bounds = cell.row.bounds
        assert bounds is not None, "only cells with physics are drawn"
        regime = cell.limits.regime if cell.limits is not None else None
        point = Point(bounds.decode_flops / bounds.decode_bytes, bounds.decode_flops / _step(cell), cell.cell.batch)
        found.setdefault((regime, cell.setting.runtime), []).append(point)
    order = list(REGIMES)
    return tuple(
        Series(name, name, colour, runtime, cells[0].row.simulated, tuple(points))
        for (regime, runtime), points in sorted(found.items(), key=lambda item: order.index(item[0][0]))
        for name, colour in (REGIMES[regime],)
    )  # fmt: skip


def _roof(cells: Sequence[Summary]) -> tuple[Guide, ...]:
    """Return the roof that the cells' shares were taken of: the machine's own ceilings, else the datasheet's."""
    for source in ("measured", "sheet"):
        for cell in cells:
            shares = getattr(cell.limits, source, None)
            if cell.row.bounds is None or shares is None or not shares.bandwidth or not shares.compute or shares.cached:
                continue
            step = _step(cell)
            bandwidth = cell.row.bounds.decode_bytes / step / shares.bandwidth
            rate = cell.row.bounds.decode_flops / step / shares.compute
            xs = [c.row.bounds.decode_flops / c.row.bounds.decode_bytes for c in cells if c.row.bounds]
            ridge = rate / bandwidth
            corners = sorted({min(*xs, ridge), ridge, max(*xs, 2 * ridge)})
            name = "measured ceilings" if source == "measured" else "datasheet peaks"
            return (Guide(name, tuple((x, min(rate, bandwidth * x)) for x in corners)),)
    return ()


def _side_by_side(charts: Mapping[str, Chart]) -> Chart:
    """Return one figure of several with the same axes: panels of one setting beside each other, named by the keys."""
    first = next(iter(charts.values()))
    titles = list(dict.fromkeys(panel.title for chart in charts.values() for panel in chart.panels))
    panels = [
        msgspec.structs.replace(panel, title=f"{panel.title} · {name}")
        for title in titles for name, chart in charts.items() for panel in chart.panels if panel.title == title
    ]  # fmt: skip
    left_out = first.left_out
    if len(panels) > PANEL_LIMIT and not left_out:
        left_out = f"Not drawn: {len(panels) - PANEL_LIMIT} of {len(panels)} panels; the tables have them all."
    said = " ".join(f"{name.capitalize()}: {chart.alternative}" for name, chart in charts.items())
    return msgspec.structs.replace(first, panels=tuple(panels[:PANEL_LIMIT]), alternative=said, left_out=left_out)


def _telemetry(grid: Grid, style: Style, field: str, *, name: str, title: str, y: Axis, reading: str) -> Chart | None:
    """Draw one field of the telemetry of cells that have it; simulated cells have no device to read."""

    def sampled(cell: Summary) -> bool:
        value = cell.row.telemetry.get(field)
        return isinstance(value, int | float) and value > 0

    groups = {
        setting: {
            subject: msgspec.structs.replace(group, cells=tuple(c for c in group.cells if sampled(c)), frontier=None)
            for subject, group in members.items()
        }
        for setting, members in grid.groups.items()
    }

    def point(cell: Summary) -> Point:
        return Point(cell.cell.batch, float(cell.row.telemetry[field]), cell.cell.batch)

    return line_chart(
        msgspec.structs.replace(grid, groups=groups), style, point, name=name, title=title,
        x=Axis("Batch size", "integer", batches(grid)), y=y, reading=reading,
    )  # fmt: skip
