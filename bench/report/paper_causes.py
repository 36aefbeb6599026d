"""Why numbers here differ from the paper's, as a table: device, stack, protocol, cost of a block, copies of the cache.

Each row says what the paper had, what this report has, and what follows, in numbers wherever both sides give them: the
cost of a block is fitted to the depth-pruned rows of either side alike, memory is the same model with other copies.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bench import devices, memory, paper
from bench.report import paper_tables, quantities
from bench.report.hardware import LEAST_DEPTHS, Fit, fit
from bench.report.paper_tables import Paired
from bench.report.sources import combine
from bench.report.summaries import Grid, Setting
from bench.report.values import Column, Table
from shortllama import catalogue

_DEVICES = {"h100": "H100", "rtx3090": "RTX 3090"}
_LOOPS = {
    "paper": "HF generate with its sampling", "eager": "own greedy loop, growing cache",
    "static": "own greedy loop, static cache", "compile": "own greedy loop, compiled step",
    "cudagraph": "own greedy loop, one captured graph a step", "roofline": "an analytic model",
}  # fmt: skip
_TIMINGS = {
    "careful": "median of calls, repeated until its 95\u00a0% interval is within 1\u00a0%",
    "paper": "mean of 20 calls after 10",
}  # fmt: skip
Row = tuple[str, str, str, str]


def tables(grid: Grid) -> tuple[Table, ...]:
    """Return the table, where there is anything of the paper to differ from."""
    paired = paper_tables.pair(grid)
    used = [*paired.settings]
    used += [one for members in paper_tables.memory_settings(grid, paired).values() for one in members.values()]
    if not used:
        return ()
    rows = (_device(grid, used), _stack(grid, used), _protocol(used), *_blocks(grid, paired), *_cache(grid, paired))
    columns = (Column("what", "What"), Column("paper", "In the paper"), Column("here", "Here"), Column("so", "So"))
    source = combine(
        [grid.sources[name] for name in _environments(grid, used)], simulated=any(s.simulated for s in used)
    )
    source = f"Paper: {paper_tables.REFERENCE}. Here: {source}"
    return (Table("paper-differences", "Why these differ from the paper", columns, rows, source),)


def _environments(grid: Grid, used: Iterable[Setting]) -> list[str]:
    return [name for name in dict.fromkeys(setting.environment for setting in used) if name in grid.sources]


def _device(grid: Grid, used: Sequence[Setting]) -> Row:
    names = dict.fromkeys(grid.sources[name].device.partition(" · ")[0] for name in _environments(grid, used))
    simulated = {grid.sources[s.environment].device.partition(" · ")[0] for s in used if s.simulated}
    shown = [f"{name} (simulated)" if name in simulated else name for name in names]
    ratios: list[str] = []
    for name in names:
        known = devices.match(name)
        if known is not None and not known.nominal:
            shares = [
                f"{quantities.ratio(known.bandwidth / devices.lookup(short).bandwidth)} the {theirs}'s"
                for short, theirs in _DEVICES.items()
            ]
            ratios.append(f"{known.name} reads memory at {' and '.join(shares)} rate by their datasheets")
    so = "; ".join(ratios) or "no datasheet here to compare them by"
    return "Device", "NVIDIA H100 80 GB, and RTX 3090 24 GB", ", ".join(shown), so


def _stack(grid: Grid, used: Sequence[Setting]) -> Row:
    versions = dict.fromkeys(grid.sources[name].versions for name in _environments(grid, used))
    return (
        "Stack", "torch 2.0 or 2.1, transformers 4.40; width-pruned models in older classes of their methods",
        "; ".join(filter(None, versions)) or "none: nothing ran",
        "Here one class runs every shape, so depth and width differ in shape alone; there the class differs, too",
    )  # fmt: skip


def _protocol(used: Sequence[Setting]) -> Row:
    loops = dict.fromkeys(f"{setting.runtime}: {_LOOPS.get(setting.runtime, setting.runtime)}" for setting in used)
    timings = dict.fromkeys(_TIMINGS[setting.timing] for setting in used if setting.timing in _TIMINGS)
    return (
        "Protocol", "HF generate with sampling (top-k 50, top-p 0.95); mean of 20 calls after 10",
        "; ".join([*loops, *timings]),
        "Sampling and generate add launches to every token, which only the runtime `paper` has here",
    )  # fmt: skip


# -- the cost of a block ----------------------------------------------------------------------------------------------


def _blocks(grid: Grid, paired: Paired) -> list[Row]:
    """One row a model: seconds a token over the number of blocks, on either side by the same fit."""
    found: list[Row] = []
    for model in paired.models:
        rows = [row for row in paper.read().latency if row.model == model and row.method in ("dense", "depth")]
        theirs: list[str] = []
        floors: list[str] = []
        shape = catalogue.MODELS[model]
        block = 2 * shape.block_parameters(shape.blocks[0])  # bytes in float16
        for short, name in _DEVICES.items():
            line = _line([(row.blocks, getattr(row, f"{short}_tok_s")) for row in rows])
            if line is not None:
                floor = block / devices.lookup(short).bandwidth
                theirs.append(f"{name}: {_words(line)}")
                floors.append(f"{quantities.share(floor / line.block_s)} of it on the {name}")
        ours: list[str] = []
        for setting, title in paired.settings.items():
            cells = [
                (row.blocks, cell.throughput.value)
                for row in rows
                if (cell := paper_tables.cell_at(grid, setting, paired.subjects.get(paper_tables.name_of(row)), 1))
                and cell.counts and cell.throughput
            ]  # fmt: skip
            line = _line(cells)
            if line is not None:
                ours.append(f"{title}: {_words(line)}")
        so = f"Reading a block's weights takes {' and '.join(floors)}; the rest is launching and waiting"
        what = f"Seconds a token of {paper_tables.NAMES[model]}"
        found.append((what, "; ".join(theirs), "; ".join(ours) or "fewer than three depths were measured", so))
    return found if paired.settings else []


def _line(points: Sequence[tuple[int, float | None]]) -> Fit | None:
    """Fit seconds a token; None where fewer than LEAST_DEPTHS depths are known."""
    known = [(blocks, 1 / rate) for blocks, rate in points if rate]
    if len({blocks for blocks, _ in known}) < LEAST_DEPTHS:
        return None
    return fit([blocks for blocks, _ in known], [seconds for _, seconds in known])


def _words(line: Fit) -> str:
    fixed = f"{quantities.text(line.step_s, 's')} + " if line.step_s > 0 else ""
    return f"{fixed}{quantities.text(line.block_s, 's')} a block"


# -- memory -----------------------------------------------------------------------------------------------------------


def _cache(grid: Grid, paired: Paired) -> list[Row]:
    """How many copies of the cache explain Table 9, and what the same cells take with one."""
    if not paper_tables.memory_settings(grid, paired):
        return []
    worst = 0.0
    model = paired.models[0]
    rows = [row for row in paper.read().memory if row.model in paired.models]
    for row in rows:
        if row.gib is not None:
            dense = catalogue.lookup(row.model)
            whole = row.blocks == len(dense.blocks)
            shape = dense if whole else catalogue.lookup(f"{row.model}/depth-{row.blocks}")
            size = paper_tables.predicted(shape, row.batch, row.output, memory.PAPER_KV_COPIES)
            worst = max(worst, abs(size / (row.gib * paper_tables.GIB) - 1))
    largest = max(
        (r for r in rows if r.model == model), key=lambda r: (r.gib is not None, r.batch * r.output, r.blocks)
    )
    dense = catalogue.lookup(model)
    sizes = [
        quantities.size(paper_tables.predicted(dense, largest.batch, largest.output, copies))
        for copies in paper_tables.COPIES
    ]
    cell = f"{paper_tables.NAMES[model]} at L {largest.output}, M {largest.batch}"
    return [
        (
            "Copies of the KV cache", f"{memory.PAPER_KV_COPIES}, and 0.1 GiB more: fits its cells within {worst:.1%}",
            "1, or a layer of it twice while it grows", f"{cell}: {sizes[0]} there, {sizes[1]} with one copy",
        )
    ]  # fmt: skip
