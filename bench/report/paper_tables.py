"""Tables 1, 2, 4 and 9 of Shortened LLaMA with this report's numbers beside the paper's. Pure.

They appear where subjects are shapes of the paper, by name or by their widths, and hold every row of the paper for the
models at hand: a shape that was not measured stands there with a dash. Only cells of the paper's own protocol are
compared: float16, 12 tokens in, no memory budget. Why numbers differ is said by `paper_causes`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, pstdev

import msgspec

from bench import memory, paper
from bench.report import settings
from bench.report.sources import combine
from bench.report.summaries import OOM, Grid, Setting, Summary
from bench.report.values import Column, Table, Value
from bench.timing import Estimate
from shortllama import catalogue
from shortllama.shape import BlockShape, ModelShape

DTYPE, PROMPT, OUTPUT = "float16", 12, 128  # the paper's
GIB = 1 << 30
COPIES = {memory.PAPER_KV_COPIES: "model of its stack, 3 KV copies", 1: "model of today's, 1 KV copy"}
REFERENCE = "Shortened LLaMA, arXiv 2402.02834"
NAMES = {
    "llama-7b": "LLaMA-7B", "llama-13b": "Vicuna-13B", "depth": "depth", "flap": "FLAP",
    "llm-pruner": "LLM-Pruner", "wanda-sp": "Wanda-sp",
}  # fmt: skip
NUMBERS = {"llama-7b": "2", "llama-13b": "4"}  # of the tables of latency


class Paired(msgspec.Struct, frozen=True):
    """The paper's rows and what stands for them here: `subjects` by catalogue name; `settings` under which cells of
    the paper's latency protocol were asked for, with their titles."""

    subjects: Mapping[str, str]
    settings: Mapping[Setting, str]

    @property
    def models(self) -> tuple[str, ...]:
        """The models of which at least one shape is here."""
        here = {name.partition("/")[0] for name in self.subjects}
        return tuple(model for model in NUMBERS if model in here)


def tables(grid: Grid) -> tuple[Table, ...]:
    """Return the paper's tables, as far as the results hold anything for them."""
    paired = pair(grid)
    if not paired.models:
        return ()
    made = [_shapes(grid, paired), *(_latency(grid, paired, model) for model in paired.models), _memory(grid, paired)]
    return tuple(table for table in made if table is not None)


def pair(grid: Grid) -> Paired:
    """Return what the grid holds of the paper's shapes: by name, else by equal widths of every block."""
    rows = [shape.name for shape in paper.read().shapes]
    named = {canonical(subject): subject for subject in reversed(grid.subjects)}
    found = {name: named[name] for name in rows if name in named}
    if any(shape.vocabulary == catalogue.MODELS["llama-7b"].vocabulary for shape in grid.shapes.values()):
        alike = {shape: subject for subject, shape in reversed(list(grid.shapes.items()))}
        found |= {n: alike[s] for n in rows if n not in found and (s := catalogue.lookup(n)) in alike}
    subjects = set(found.values())
    asked = [
        setting for setting, groups in grid.groups.items()
        if (setting.dtype, setting.prompt, setting.output, setting.budget) == (DTYPE, PROMPT, OUTPUT, "none")
        and any(cell.cell.batch == 1 for s, group in groups.items() if s in subjects for cell in group.cells)
    ]  # fmt: skip
    return Paired(found, settings.split(asked, grid.sources)[0])


def canonical(subject: str) -> str:
    """Return a subject as the catalogue's Table 1 names it, Vicuna being LLaMA."""
    model, slash, plan = subject.partition("/")
    return f"{catalogue.ALIASES.get(model, model)}{slash}{plan}"


def cell_at(grid: Grid, setting: Setting, subject: str | None, batch: int) -> Summary | None:
    """Return the cell of a subject at a batch, None where it was not asked for."""
    group = grid.groups.get(setting, {}).get(subject or "")
    return next((cell for cell in group.cells if cell.cell.batch == batch), None) if group else None


# -- Table 1 -----------------------------------------------------------------------------------------------------------


def _shapes(grid: Grid, paired: Paired) -> Table:
    columns = (
        Column("row", "Shape"), Column("subject", "Here as"),
        Column("paper_parameters", "Parameters, paper", "parameters"),
        Column("parameters", "here", "parameters"),
        Column("paper_blocks", "Blocks, paper", "integer"), Column("blocks", "here", "integer"),
        Column("paper_heads", "Heads, paper"), Column("heads", "here"),
        Column("paper_ffn", "FFN width, paper"), Column("ffn", "here"),
    )  # fmt: skip
    rows = [_shape_row(grid, paired, row) for row in paper.read().shapes if row.name.partition("/")[0] in paired.models]
    caption = (
        "Heads and FFN width of each block; where blocks differ, their mean ± standard deviation, and for LLM-Pruner "
        "those of the blocks that it prunes. The paper's parameters are counted from its widths. FLAP's single blocks "
        "are not published: the catalogue's have the paper's mean and come near its deviation."
    )
    return Table(
        "paper-table-1", "Table 1 of the paper: shapes", columns, tuple(rows), _source(grid, ()), caption=caption
    )


def _shape_row(grid: Grid, paired: Paired, row: paper.Shape) -> tuple[Value, ...]:
    subject = paired.subjects.get(row.name)
    shape = grid.shapes.get(subject or "")
    blocks = _compared(shape, row)
    parameters = shape.parameters if shape else grid.parameters.get(subject or "")
    return (
        _row_name(row.name), subject, round(row.params_b * 1e9), parameters,
        row.blocks, len(shape.blocks) if shape else None,
        _width(row.heads, row.heads_mean, row.heads_sd), _widths([block.query_heads for block in blocks]),
        _width(row.ffn, row.ffn_mean, row.ffn_sd), _widths([block.neurons for block in blocks]),
    )  # fmt: skip


def _compared(shape: ModelShape | None, row: paper.Shape) -> tuple[BlockShape, ...]:
    if shape is None:
        return ()
    first, end = row.pruned_blocks or (0, len(shape.blocks))
    return shape.blocks[first:end]


def _row_name(name: str) -> str:
    model, _, plan = name.partition("/")
    if not plan:
        return NAMES[model]
    method, _, number = plan.rpartition("-")
    return f"{NAMES[model]}, {number} blocks" if method == "depth" else f"{NAMES[model]}, {NAMES[method]} {number} %"


def _width(exact: int | None, mean: float | None, deviation: float | None) -> str:
    return f"{exact:,}" if exact is not None else f"{mean:,.1f} ± {deviation:,.1f}"


def _widths(values: Sequence[int]) -> str | None:
    if not values:
        return None
    return f"{values[0]:,}" if len(set(values)) == 1 else f"{fmean(values):,.1f} ± {pstdev(values):,.1f}"


# -- Tables 2 and 4 ----------------------------------------------------------------------------------------------------


def _latency(grid: Grid, paired: Paired, model: str) -> Table | None:
    if not paired.settings:
        return None
    rows = [row for row in paper.read().latency if row.model == model]
    theirs = (
        Column("h100_latency_s", "Paper, H100", "s"), Column("h100_tok_s", "tokens/s", "tokens/s"),
        Column("h100_speedup", "over dense", "ratio"), Column("rtx3090_latency_s", "Paper, RTX 3090", "s"),
        Column("rtx3090_tok_s", "tokens/s", "tokens/s"), Column("rtx3090_speedup", "over dense", "ratio"),
    )  # fmt: skip
    ours = [column for place, setting in enumerate(paired.settings, 1) for column in _columns(paired, setting, place)]
    dense = rows[0]
    made = [(*_theirs(row, dense), *_ours(grid, paired, row)) for row in rows]
    simulated = any(setting.simulated for setting in paired.settings)
    caption = (
        "The paper's rows for depth stand for both of its criteria. A speed-up is the dense row's latency over the "
        "row's own; of the paper's it is taken from tokens/s, which have one digit more."
    )
    columns = (Column("row", "Shape"), *theirs, *ours)
    empty = frozenset(
        c.key for place, c in enumerate(columns) if c.interval and all(row[place] is None for row in made)
    )
    return Table(
        f"paper-table-{NUMBERS[model]}", f"Table {NUMBERS[model]} of the paper: latency of {NAMES[model]}", columns,
        tuple(made), _source(grid, paired.settings, simulated=simulated),
        constant=f"one sequence · {PROMPT} tokens in, {OUTPUT} out · {DTYPE}", hidden=empty, caption=caption,
    )  # fmt: skip


def _columns(paired: Paired, setting: Setting, place: int) -> tuple[Column, ...]:
    return (
        Column(f"here_{place}_latency_s", f"Here, {paired.settings[setting]}", "s"),
        Column(f"here_{place}_tok_s", "tokens/s", "tokens/s"),
        Column(f"here_{place}_speedup", "over dense", "ratio"),
        Column(f"here_{place}_speedup_interval", "95 % interval", "ratio", interval=True),
    )


def _theirs(row: paper.Latency, dense: paper.Latency) -> tuple[Value, ...]:
    name = NAMES[row.model] if row.method == "dense" else f"{row.pruned.replace('%', ' %')} {NAMES[row.method]}"
    found: list[Value] = [name]
    for device in ("h100", "rtx3090"):
        latency, rate = getattr(row, f"{device}_latency_s"), getattr(row, f"{device}_tok_s")
        whole = getattr(dense, f"{device}_tok_s")
        gain = rate / whole if rate and whole and row is not dense else None
        found += ["oom", "oom", None] if latency is None else [latency, rate, gain]
    return tuple(found)


def _ours(grid: Grid, paired: Paired, row: paper.Latency) -> tuple[Value, ...]:
    found: list[Value] = []
    for setting in paired.settings:
        cell = cell_at(grid, setting, paired.subjects.get(name_of(row)), 1)
        if cell is None:
            found += [None] * 4
        elif not cell.counts:
            found += [cell.row.outcome, None, None, None]
        else:
            exact = cell.row.simulated  # a virtual clock has no noise
            found += [
                *map(_value, (cell.call_s, cell.throughput, cell.speedup)),
                None if exact else _ends(cell.speedup),
            ]
    return tuple(found)


def name_of(row: paper.Latency) -> str:
    """Return the catalogue's name of a row of Tables 2 and 4."""
    if row.method == "dense":
        return row.model
    return f"{row.model}/{row.method}-{row.blocks if row.method == 'depth' else row.pruned.removesuffix('%')}"


def _value(estimate: Estimate | None) -> float | None:
    return None if estimate is None else estimate.value


def _ends(estimate: Estimate | None) -> tuple[float, float] | None:
    if estimate is None or estimate.low is None or estimate.high is None:
        return None
    return estimate.low, estimate.high


# -- Table 9 -----------------------------------------------------------------------------------------------------------


def _memory(grid: Grid, paired: Paired) -> Table | None:
    rows = [row for row in paper.read().memory if row.model in paired.models]
    places = list(dict.fromkeys((row.output, row.batch) for row in rows))
    families = memory_settings(grid, paired)
    if not families:
        return None
    titles = settings.split(list(families), grid.sources)[0]
    made: list[tuple[Value, ...]] = []
    for model, blocks in dict.fromkeys((row.model, row.blocks) for row in rows):
        given = {(r.output, r.batch): _bytes(r.gib) for r in rows if (r.model, r.blocks) == (model, blocks)}
        dense = catalogue.lookup(model)
        name = model if blocks == len(dense.blocks) else f"{model}/depth-{blocks}"
        label, shape = _row_name(name), catalogue.lookup(name)
        made.append((label, "paper, H100 80 GiB", *(given[place] for place in places)))
        for copies, whose in COPIES.items():
            made.append((label, whose, *(predicted(shape, batch, output, copies) for output, batch in places)))
        for family, members in families.items():
            cells = [_peak(grid, members.get(output), paired.subjects.get(name), batch) for output, batch in places]
            made.append((label, f"here, {titles[family]}", *cells))
    columns = tuple(Column(f"L{output}_M{batch}_bytes", f"L {output}, M {batch}", "bytes") for output, batch in places)
    simulated = any(family.simulated for family in families)
    used = [setting for members in families.values() for setting in members.values()]
    caption = (
        "L: new tokens, M: batch. Peak memory, weights included, in GiB, which the paper prints as GB. What is "
        "simulated is the memory model's own; a dash is a cell that was not asked for."
    )
    return Table(
        "paper-table-9", "Table 9 of the paper: memory", (Column("row", "Shape"), Column("whose", "Whose"), *columns),
        tuple(made), _source(grid, used, simulated=simulated), constant=f"{PROMPT} tokens in · {DTYPE}",
        caption=caption,
    )  # fmt: skip


def memory_settings(grid: Grid, paired: Paired) -> dict[Setting, dict[int, Setting]]:
    """Return the settings that hold cells of Table 9, by output length, under what they have in common."""
    outputs = {row.output for row in paper.read().memory}
    subjects = {subject for name, subject in paired.subjects.items() if "/" not in name or "/depth-" in name}
    found: dict[Setting, dict[int, Setting]] = {}
    for setting, groups in grid.groups.items():
        alike = (setting.dtype, setting.prompt, setting.budget) == (DTYPE, PROMPT, "none")
        if alike and setting.output in outputs and any(groups[s].cells for s in subjects & groups.keys()):
            family = msgspec.structs.replace(setting, output=0, timing="")
            found.setdefault(family, {})[setting.output] = setting
    return found


def predicted(shape: ModelShape, batch: int, output: int, copies: int) -> int:
    """Return the memory model's peak of one of Table 9's cells."""
    return memory.predict(shape, "paper", DTYPE, batch, PROMPT, output, copies)


def _bytes(gib: float | None) -> Value:
    return "oom" if gib is None else gib * GIB


def _peak(grid: Grid, setting: Setting | None, subject: str | None, batch: int) -> Value:
    cell = cell_at(grid, setting, subject, batch) if setting else None
    if cell is None:
        return None
    if cell.row.outcome in OOM:
        return cell.row.outcome
    return cell.row.memory.analytic if cell.row.simulated else cell.peak_bytes


def _source(grid: Grid, used: Sequence[Setting] | Mapping[Setting, str], *, simulated: bool = False) -> str:
    names = dict.fromkeys(setting.environment for setting in used) or grid.sources
    here = combine([grid.sources[name] for name in names if name in grid.sources], simulated=simulated)
    return f"Paper: {REFERENCE}. Here: {here}"
