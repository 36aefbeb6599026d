"""What the core's commands show: costs, plans and scores as plain documents, and the same as tables for people.

Documents are what --json prints. Numbers keep SI base units until the last moment; rich is imported only to draw.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import UNSET

from shortllama.difference import ANY_SIZE, Difference, SetDifference
from shortllama.indices import count_indices, format_indices
from shortllama.plans import BlockKeep, Plan, shape_of
from shortllama.scores import Cost, Scores
from shortllama.shape import BlockShape, ModelShape

if TYPE_CHECKING:
    from shortllama.exporting import Export
    from shortllama.retraining.named import Told
    from shortllama.retraining.record import Record
    from shortllama.verification import Report

# Context at which a decode step is priced: the paper's prompt of 12 tokens and half of its 128 new ones.
CONTEXT = 76
# Wide enough that no cell wraps when the output goes to a file or a pipe.
PIPE_WIDTH = 200


def count(value: float) -> str:
    """Return a number of parameters or operations with four digits: 6.738 B."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3f} {unit}"
    return f"{value:g}"


def size(value: float) -> str:
    """Return bytes in binary units: 12.55 GiB."""
    for power, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if abs(value) >= 1 << power:
            return f"{value / (1 << power):.2f} {unit}"
    return f"{value:.0f} B"


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str | None = None) -> None:
    """Print a table on stdout; columns whose name ends in a space are aligned left, the others right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    drawn = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", pad_edge=False)
    for name in columns:
        drawn.add_column(name.strip(), justify="left" if name.endswith(" ") else "right", overflow="fold")
    for row in rows:
        drawn.add_row(*map(str, row))
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    console.print(drawn)


# -- shapes -----------------------------------------------------------------------------------------------------------


def shape_document(name: str, shape: ModelShape, dtype: str) -> dict[str, Any]:
    """Return a shape with its costs in bytes and FLOPs; the decode step is at batch 1 and CONTEXT cached tokens."""
    return {
        "name": name,
        "family": shape.family,
        "digest": shape.digest(),
        "dtype": dtype,
        "parameters": shape.parameters,
        "weight_bytes": shape.weight_bytes(dtype),
        "kv_bytes_per_token": shape.kv_bytes_per_token(dtype),
        "decode_step": {
            "batch": 1,
            "context": CONTEXT,
            "bytes": shape.decode_bytes(1, CONTEXT, dtype),
            "flops": shape.decode_flops(1, CONTEXT),
        },
        "vocabulary": shape.vocabulary,
        "hidden": shape.hidden,
        "head_dim": shape.head_dim,
        "tied": shape.tied,
        "uniform": shape.is_uniform,
        "alignments": shape.alignments(),
        "blocks": [msgspec.to_builtins(block) for block in shape.blocks],
    }


def show_shapes(named: Iterable[tuple[str, ModelShape]], dtype: str) -> None:
    """Print one line a shape."""
    rows = (
        (
            name,
            count(shape.parameters),
            len(shape.blocks),
            _range(b.query_heads for b in shape.blocks),
            _range(b.kv_heads for b in shape.blocks),
            _range(b.neurons for b in shape.blocks),
            size(shape.weight_bytes(dtype)),
            size(shape.kv_bytes_per_token(dtype)),
        )
        for name, shape in named
    )
    columns = ("name ", "parameters", "blocks", "heads", "KV heads", "neurons", f"weights {dtype}", "KV a token")
    table(columns, rows)


def show_shape(name: str, shape: ModelShape, dtype: str) -> None:
    """Print one shape with its costs and, run by run, its blocks."""
    aligned = ", ".join(f"{key} {min(powers)}" for key, powers in shape.alignments().items() if powers)
    facts = {
        "family": shape.family,
        "parameters": f"{count(shape.parameters)} ({shape.parameters:,})",
        f"weights, {dtype}": size(shape.weight_bytes(dtype)),
        f"KV cache a token, {dtype}": size(shape.kv_bytes_per_token(dtype)),
        f"decode step at {CONTEXT} tokens": f"{size(shape.decode_bytes(1, CONTEXT, dtype))} moved, "
        f"{count(shape.decode_flops(1, CONTEXT))}FLOP",
        "vocabulary x hidden": f"{shape.vocabulary} x {shape.hidden}" + (", tied" if shape.tied else ""),
        "head size": shape.head_dim,
        "divisible by (powers of two)": aligned,
        "digest": shape.digest(),
    }
    table((f"{name} ", " "), [(f"{key} ", value) for key, value in facts.items()])
    rows = _by_run((index, _sizes(shape, block)) for index, block in enumerate(shape.blocks))
    table(("blocks ", "heads", "KV heads", "neurons", "parameters each"), rows)


def _range(values: Iterable[int]) -> str:
    seen = list(values)
    low, high = min(seen, default=0), max(seen, default=0)
    return str(low) if low == high else f"{low}-{high}"


def _sizes(shape: ModelShape, block: BlockShape) -> tuple[str, ...]:
    return str(block.query_heads), str(block.kv_heads), str(block.neurons), count(shape.block_parameters(block))


# -- plans ------------------------------------------------------------------------------------------------------------


def show_plan(plan: Plan, base: ModelShape | None) -> None:
    """Print what a plan keeps and, where the base shape is at hand, the parameters before and after."""
    facts: dict[str, object] = {
        "base": f"{plan.base.model}@{plan.base.shape_digest}",
        "method": plan.method + (" (blind: shapes and random weights only)" if plan.blind else ""),
        "target": f"{plan.target.kind} {plan.target.value}",
        "blocks kept": f"{plan.achieved.blocks}: {format_indices(keep.index for keep in plan.keep)}",
        "parameters removed": f"{100 * plan.achieved.parameters:.2f} %",
    }
    if base is not None:
        facts["blocks removed"] = (
            format_indices(set(range(len(base.blocks))) - {keep.index for keep in plan.keep}) or "none"
        )
        facts["parameters"] = f"{count(base.parameters)} -> {count(shape_of(plan, base).parameters)}"
    if plan.compensation:
        facts["bias compensation"] = plan.compensation
    facts["digest"] = plan.digest()
    table(("plan ", " "), [(key, value) for key, value in facts.items()])
    cut = [keep for keep in plan.keep if not keep.is_whole]
    if cut:
        inside = any(keep.queries is not UNSET for keep in cut)
        columns = ("blocks ", "KV groups kept ", *(("query heads kept ",) if inside else ()), "neurons kept")
        table(columns, _by_run((keep.index, _kept(keep, inside)) for keep in cut))


def _kept(keep: BlockKeep, inside: bool) -> tuple[str, ...]:
    """What is kept of KV groups, query heads (where some plans cut `inside` groups) and neurons, as cells."""
    groups = "all" if keep.kv_groups is None else keep.kv_groups or "none"
    queries = ("those of its groups" if keep.queries is UNSET else keep.queries,) if inside else ()
    neurons = "all" if keep.neurons is None else f"{count_indices(keep.neurons, ANY_SIZE):,}"
    return groups, *queries, neurons


def _by_run(rows: Iterable[tuple[int, tuple[str, ...]]]) -> list[tuple[str, ...]]:
    """One row for each run of rows with equal cells, under the index set of its blocks."""
    return [(format_indices(index for index, _ in run), *cells) for cells, run in groupby(rows, key=lambda row: row[1])]


def show_before_after(base: ModelShape, after: ModelShape, dtype: str = "float16") -> None:
    """Print what pruning changes, before anything is written."""
    rows = [
        ("parameters", count(base.parameters), count(after.parameters), _change(base.parameters, after.parameters)),
        _row("weights", base.weight_bytes(dtype), after.weight_bytes(dtype)),
        _row("KV cache a token", base.kv_bytes_per_token(dtype), after.kv_bytes_per_token(dtype)),
        ("blocks", len(base.blocks), len(after.blocks), _change(len(base.blocks), len(after.blocks))),
        ("query heads", _range(b.query_heads for b in base.blocks), _range(b.query_heads for b in after.blocks), ""),
        ("KV heads", _range(b.kv_heads for b in base.blocks), _range(b.kv_heads for b in after.blocks), ""),
        ("neurons", _range(b.neurons for b in base.blocks), _range(b.neurons for b in after.blocks), ""),
    ]
    table((f"{dtype} ", "before", "after", "change"), rows)


def _row(name: str, before: int, after: int) -> tuple[str, str, str, str]:
    return name, size(before), size(after), _change(before, after)


def _change(before: int, after: int) -> str:
    return f"{100 * (after / before - 1):+.2f} %" if before != after else ""


def show_difference(both: tuple[Plan, Plan], names: tuple[str, str], found: Difference) -> None:
    """Print which blocks, groups and neurons only one of two plans keeps."""
    rows = [
        (name, plan.method, plan.achieved.blocks, f"{100 * plan.achieved.parameters:.2f} %", only or "none")
        for name, plan, only in zip(names, both, (found.blocks.only_a, found.blocks.only_b), strict=True)
    ]
    table(("plan ", "method ", "blocks", "removed", "blocks only here "), rows)
    if found.inside:
        groups = _by_run(_only(one.index, "KV groups", one.kv_groups) for one in found.inside if one.kv_groups)
        queries = _by_run(_only(one.index, "query heads", one.queries) for one in found.inside if one.queries)
        neurons = _by_run(_only(one.index, "neurons", one.neurons) for one in found.inside if one.neurons)
        table(("blocks ", "part ", f"only {names[0]} ", f"only {names[1]} "), [*groups, *queries, *neurons])


def _only(index: int, part: str, sets: SetDifference) -> tuple[int, tuple[str, ...]]:
    return index, (part, sets.only_a or "none", sets.only_b or "none")


# -- scores -----------------------------------------------------------------------------------------------------------


def show_scores(scores: Scores) -> None:
    """Print one line a block, the least important first where the criterion ranks blocks."""
    title = f"{scores.criterion}: higher = keep"
    if scores.blocks is not None:
        ranked = sorted(enumerate(scores.blocks), key=lambda pair: pair[1])
        rows = [(rank, index, f"{value:.6g}") for rank, (index, value) in enumerate(ranked, 1)]
        table(("goes as number", "block", "score"), rows, title=title)
    if scores.attention is not None and scores.mlp is not None:
        pairs = zip(scores.attention, scores.mlp, strict=True)
        cells = [[("none" if value is None else f"{value:.6g}") for value in pair] for pair in pairs]
        rows = [(index, *pair) for index, pair in enumerate(cells)]
        table(("block", "attention", "FFN"), rows, title=title)
    if scores.order is not None:
        steps = (scores.details or {}).get("steps", [])
        rows = [(rank, step["removed"], f"{step['score']:.6g}") for rank, step in enumerate(steps, 1)]
        table(("goes as number", "part ", "score then"), rows, title="scored again after each removal")
    heads = scores.query_heads or None
    for name, lists in (("KV groups", scores.kv_groups), ("query heads", heads), ("neurons", scores.neurons)):
        if lists is not None:
            rows = [
                (index, len(values), f"{min(values):.4g}", f"{sum(values) / len(values):.4g}", f"{max(values):.4g}")
                for index, values in enumerate(lists)
                if values
            ]
            table(("block", name, "least", "mean", "most"), rows, title=title)
    if scores.cost is not None:
        show_costs({"scoring": scores.cost})


def show_costs(costs: Mapping[str, Cost]) -> None:
    """Print what each kind of work took; what could not be measured says why."""
    rows = [
        (
            name,
            f"{cost.wall_s:.3g}",
            cost.reasons.get("peak_bytes", "unknown") if cost.peak_bytes is None else size(cost.peak_bytes),
            f"{cost.tokens:,}" if cost.tokens else "none",
            "not counted" if cost.block_passes is None else f"{cost.block_passes:g}",
            _circumstances(cost),
        )
        for name, cost in costs.items()
    ]
    table(("cost ", "seconds", "peak memory beside the model", "tokens", "block passes", " "), rows)


def _circumstances(cost: Cost) -> str:
    said = [f"one pass for {', '.join(cost.shared)}"] if cost.shared else []
    return "; ".join([*said, *([f"in {cost.runs} runs"] if cost.runs > 1 else [])])


def show_export(folder: str, record: Export) -> None:
    """Print what an export is and what its form costs beside the folder it was made from."""
    before, after = record.source_parameters, record.parameters
    rows = [
        ("parameters", count(before), count(after), _change(before, after)),
        _row("KV cache a token", record.source_kv_bytes_per_token, record.kv_bytes_per_token),
    ]
    reader = "llama.cpp" if record.form == "gguf" else "stock transformers"
    title = f"{folder}: {', '.join(record.weights)}, {record.dtype}, for {reader} as {record.architecture}"
    table(("", "before", "after", "change"), rows, title=title)


def show_report(report: Report) -> None:
    """Print what verification of a folder saw."""
    loads = f"loads in stock transformers as {report.loaded_as}" if report.loaded_as else "loads with shortllama only"
    rows = [("ok" if check.passed else "FAILED", check.name, check.seen) for check in report.checks]
    table(("", "check ", "seen "), rows, title=f"{report.folder}: {count(report.parameters)} parameters, {loads}")
    fits = [(fit.engine, "yes" if fit.can else "no", fit.why) for fit in report.engines]
    if fits:
        table(("engine ", "takes it ", "how, or why not "), fits)


# -- retraining -------------------------------------------------------------------------------------------------------


def tell_retraining(told: Told, say: Callable[[str], None]) -> None:
    """Say what each stage will learn from and hold in memory, before it starts."""
    for number, (stage, data, need) in enumerate(zip(told.recipe.stages, told.data, told.estimates, strict=True), 1):
        skipped = f", {data.skipped} skipped (their prompts fill {stage.length} tokens)" if data.skipped else ""
        say(
            f"stage {number} of {told.recipe.name}: {data.examples - data.held_out} {data.kind} examples of "
            f"{data.source}, {data.held_out} held out{skipped}; "
            f"{stage.steps_over(data.examples - data.held_out)} steps of {stage.batch}, in {stage.dtype}"
        )
        teacher = f", teacher {size(need.teacher)}" if need.teacher else ""
        say(
            f"memory: about {size(need.total)} (weights {size(need.weights)}, gradients and optimizer "
            f"{size(need.training)}, kept for backward {size(need.kept)}, logits {size(need.logits)}{teacher}; not all "
            f"at once) beside the process itself; {size(told.free)} are free"
        )
        if need.total > told.free:
            say("note: that may not fit; lower --micro-batch or --length, or give --checkpointing")


def show_retraining(record: Record) -> None:
    """Print what a checkpoint was retrained on, one row a stage."""
    rows = []
    for done in record.stages:
        learned = f"{done.held_out[0].nll:.4f} -> {done.held_out[-1].nll:.4f}" if done.held_out else "-"
        refused = sum(loss is None for loss in done.losses)
        peak = "-" if done.cost.peak_bytes is None else size(done.cost.peak_bytes)
        rows.append(
            (
                done.recipe,
                f"{done.data.source} ({done.data.kind}, {done.data.examples:,})",
                f"{len(done.losses):,}" + (f" ({refused} refused)" if refused else ""),
                f"{done.cost.tokens:,}",
                count(done.trained_parameters),
                learned,
                f"{done.cost.wall_s:,.0f} s",
                peak,
            )
        )
    columns = ("retrained ", "data ", "steps", "tokens", "trained", "held-out loss", "time", "peak memory")
    table(columns, rows)
