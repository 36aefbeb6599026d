"""The figures about what shapes hold as data: memory by its parts, what fits by length, the width of each block."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from bench.report import quantities
from bench.report.hardware import common, titled
from bench.report.series import SERIES_LIMIT, Builder, Style, make
from bench.report.summaries import Grid, Group, Setting, Summary
from bench.report.values import Axis, Bar, Chart, Panel, Part, Point, Series


def memory_parts(grid: Grid, style: Style) -> Chart | None:
    """What the measured peak is made of, at the largest batch that most subjects share."""
    panels: dict[Setting, Panel] = {}
    for setting, groups in grid.groups.items():
        kept = [[c for c in group.cells if _parts(grid, c)] for group in groups.values()]
        batch = common(kept, largest=True)
        bars = [
            _bar(grid, style, cell) for cells in kept for cell in cells if cell.cell.batch == batch
        ][:SERIES_LIMIT]  # fmt: skip
        if bars:
            panels[setting] = Panel(f"batch {batch:,}", bars=tuple(bars))
    return titled(
        grid, panels, name="memory-parts", title="What memory is made of", form="bars",
        x=Axis("Peak memory", "bytes", linear=True), y=Axis("", "text"),
        reading="Weights and KV cache follow from the shape. Workspace is the rest of the measured peak: activations, "
        "temporaries, and what the allocator and libraries hold.",
    )  # fmt: skip


def oom_map(grid: Grid, style: Style) -> Chart | None:
    """The largest batch over the length of prompt and output, for each budget: searched ends only."""
    families: dict[Setting, dict[str, list[tuple[int, Group]]]] = {}
    for setting, groups in grid.groups.items():
        family = msgspec.structs.replace(setting, prompt=0, output=0, timing="")
        for subject, group in groups.items():
            found = group.frontier
            if found is not None and found.confirmed and found.largest_batch:
                curves = families.setdefault(family, {})
                curves.setdefault(subject, []).append((setting.prompt + setting.output, group))
    panels: dict[Setting, Panel] = {}
    for family, subjects in families.items():
        series = tuple(_ends_of_memory(group, style) for group in subjects.values())
        if any(len(one.points) > 1 for one in series):
            panels[family] = Panel("", series[:SERIES_LIMIT])
    lengths = {point.x for panel in panels.values() for one in panel.series for point in one.points}
    return titled(
        grid, panels, name="oom-map", title="What fits: batch against length", form="lines",
        x=Axis("Prompt and new tokens of a sequence", "integer", tuple(sorted(lengths))),
        y=Axis("Largest batch that fits", "integer"),
        reading="What lies on or below a subject's curve fits into the budget, what lies above does not. Each mark was "
        "searched to the batch and tried twice from both sides.",
    )  # fmt: skip


def layer_widths(grid: Grid, style: Style) -> Chart | None:
    """Neurons and KV heads of each block, of plans whose blocks are not all alike."""
    uneven = [s for s, shape in grid.shapes.items() if len(set(shape.blocks)) > 1 and s in style.colours]
    used = [setting for setting, groups in grid.groups.items() if any(s in groups for s in uneven)][:1]
    panels = [
        Panel(title, tuple(_widths(grid, style, s, used[0], size) for s in grid.subjects if s in uneven)[:SERIES_LIMIT])
        for title, size in (("FFN neurons", "neurons"), ("KV heads", "kv_heads")) if used
    ]  # fmt: skip
    if not panels:
        return None
    return make(
        grid, panels, used, "", name="layer-widths", title="Width of each block", form="lines",
        x=Axis("Block", "integer", linear=True), y=Axis("Of the dense model's", "share", linear=True),
        reading="What a plan left of each block, from the first to the last; zero where a module was removed whole.",
    )  # fmt: skip


CHARTS: tuple[Builder, ...] = (memory_parts, oom_map, layer_widths)


def _parts(grid: Grid, cell: Summary) -> tuple[Part, ...]:
    """Return weights, KV cache and the rest of a measured peak; nothing where a part is not known or the rest is below
    zero, which says that the peak does not hold all of the weights."""
    shape, peak = grid.shapes.get(cell.cell.subject), cell.peak_bytes
    if shape is None or peak is None or cell.row.simulated:
        return ()
    weights = shape.weight_bytes(cell.cell.dtype)
    tokens = cell.cell.batch * (cell.cell.prompt + cell.cell.output - 1)
    cache = tokens * shape.kv_bytes_per_token(cell.cell.dtype)
    rest = peak - weights - cache
    if rest < 0:
        return ()
    return (Part("weights", "cool-1", weights), Part("KV cache", "warm-3", cache), Part("workspace", "other-3", rest))


def _bar(grid: Grid, style: Style, cell: Summary) -> Bar:
    subject = cell.cell.subject
    return Bar(
        subject, style.labels[subject], cell.setting.runtime, cell.setting.simulated, _parts(grid, cell),
        quantities.text(cell.peak_bytes, "bytes"),
    )  # fmt: skip


def _ends_of_memory(members: Sequence[tuple[int, Group]], style: Style) -> Series:
    group = members[0][1]
    found = {length: one.frontier for length, one in members}
    points = tuple(
        Point(length, end.largest_batch, end.largest_batch)
        for length, end in sorted(found.items()) if end is not None and end.largest_batch
    )  # fmt: skip
    return Series(
        group.subject, style.labels[group.subject], style.colours[group.subject], group.setting.runtime,
        group.setting.simulated, points,
    )  # fmt: skip


def _widths(grid: Grid, style: Style, subject: str, setting: Setting, size: str) -> Series:
    """Return the widths of each block as shares of the dense model's widest; of its own widest without a dense one."""
    shape = grid.shapes[subject]
    whole = grid.shapes.get(grid.baseline.get(subject, subject), shape)
    most = max(getattr(block, size) for block in (*whole.blocks, *shape.blocks)) or 1
    points = tuple(Point(place, getattr(block, size) / most, 0) for place, block in enumerate(shape.blocks, 1))
    return Series(subject, style.labels[subject], style.colours[subject], setting.runtime, setting.simulated, points)
