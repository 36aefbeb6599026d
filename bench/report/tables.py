"""The tables as data: raw values in SI units with named columns. Pure; one small function a table, listed in TABLES.

Columns that hold one value throughout are said once in the caption and kept in the CSV: on a phone every column counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bench import timing
from bench.metrics import ENERGY
from bench.regimes import Limits
from bench.report.quantities import inert
from bench.report.sources import combine
from bench.report.summaries import Grid, Group, Setting, Summary
from bench.report.values import Column, Table, Value
from bench.timing import Estimate

_CONTEXT = (
    Column("label", "Subject"), Column("subject", "Full name"), Column("runtime", "Runtime"), Column("dtype", "Dtype"),
    Column("attention", "Attention"), Column("budget", "Budget"), Column("prompt", "Prompt", "integer"),
    Column("output", "Output", "integer"), Column("device", "Device"), Column("source", "Source"),
)  # fmt: skip
_ALWAYS = frozenset({"label", "runtime"})  # shown, and
_NEVER = frozenset({"subject", "source"})  # in the CSV only, whatever they hold


def tables(grid: Grid) -> tuple[Table, ...]:
    """Return every table that the results hold something for, in the order of TABLES."""
    made = (build(grid) for build in TABLES)
    return tuple(table for table in made if table is not None)


def subjects(grid: Grid) -> Table | None:
    """One row a subject and setting: what a decision needs."""
    groups = [group for by_subject in grid.groups.values() for group in by_subject.values()]
    batch = min((cell.cell.batch for group in groups for cell in group.measured), default=None)
    evaluated = list(dict.fromkeys(name for values in grid.perplexity.values() for name in values))
    columns = (
        *_CONTEXT,
        Column("parameters", "Parameters", "parameters"),
        *(Column(f"perplexity_{name}", f"Perplexity on {name}", "number") for name in evaluated),
        Column("latency_s", f"Latency, batch {batch}" if batch else "Latency", "s"),
        Column("speedup", "Speedup", "ratio"),
        Column("speedup_interval", "95 % interval", "ratio", interval=True),
        Column("throughput", "Most tokens/s", "tokens/s"),
        Column("throughput_batch", "at batch", "integer"),
        Column("fits", "Fits batch", "integer"),
        Column("fails", "Out at batch", "integer"),
    )
    rows = [_subject_row(grid, group, batch, evaluated) for group in groups]
    return (
        _table("subjects", "Subjects", columns, rows, grid, any(g.setting.simulated for g in groups)) if rows else None
    )


def _subject_row(grid: Grid, group: Group, batch: int | None, evaluated: Sequence[str]) -> tuple[Value, ...]:
    setting = group.setting
    first = next((cell for cell in group.measured if cell.cell.batch == batch), None)
    best = max(group.measured, key=lambda cell: _value(cell.throughput) or 0.0, default=None)
    quality = grid.perplexity.get(group.subject, {})
    return (
        *_context(grid, group.subject, group.setting),
        grid.parameters.get(group.subject),
        *(quality[name].perplexity if name in quality else None for name in evaluated),
        _value(first.call_s) if first else None,
        _value(first.speedup) if first else None,
        ends(first.speedup) if first else None,
        _value(best.throughput) if best else None,
        best.cell.batch if best else None,
        group.fits,
        group.fails,
        _kind(setting.simulated),
    )


def cells(grid: Grid) -> Table | None:
    """One row a measurement. `result` is the latency, or what came of the cell instead."""
    if not grid.rows:
        return None
    columns = (
        *_CONTEXT,
        Column("batch", "Batch", "integer"),
        Column("result", "Latency", "s"),
        Column("latency_s", "Latency", "s"),
        Column("latency_interval_s", "95 % interval", "s", interval=True),
        Column("throughput", "Tokens/s", "tokens/s"),
        Column("speedup", "Speedup", "ratio"),
        Column("speedup_interval", "Speed-up interval", "ratio", interval=True),
        Column("peak_bytes", "Peak memory", "bytes"),
        Column("predicted_bytes", "Predicted", "bytes"),
        Column("joules_per_token", "Energy a token", "J/token"),
        Column("outcome", "Outcome"),
        Column("remark", "Remark"),
        Column("repeats", "Repeats", "integer"),
        Column("stop", "Ended by"),
        Column("regime", "Regime"),
        Column("launch_share", "Launch share", "share"),
        Column("idle_share", "Device idle", "share"),
        Column("dispatch_share", "Dispatching at least", "share"),
        Column("of_measured_roof", "Of measured roof", "share"),
        Column("of_datasheet_roof", "Of datasheet roof", "share"),
        Column("measured_bandwidth_share", "MBU, measured", "share"),
        Column("measured_compute_share", "MFU, measured", "share"),
        Column("datasheet_bandwidth_share", "MBU, datasheet", "share"),
        Column("datasheet_compute_share", "MFU, datasheet", "share"),
        Column("regime_reason", "Why no regime"),
        Column("parameters", "Parameters", "parameters"),
        Column("session", "Session"),
        Column("environment", "Environment"),
        Column("cell_id", "Cell"),
        Column("reason", "Reason"),
    )
    detail = frozenset(
        {
            "latency_s",
            "speedup_interval",
            "repeats",
            "stop",
            "dispatch_share",
            "measured_bandwidth_share",
            "measured_compute_share",
            "datasheet_bandwidth_share",
            "datasheet_compute_share",
            "regime_reason",
            "parameters",
            "session",
            "environment",
            "cell_id",
            "reason",
        }
    )
    rows = [_cell_row(grid, row) for row in grid.rows]
    return _table("cells", "Every cell", columns, rows, grid, any(r.setting.simulated for r in grid.rows), detail)


def _cell_row(grid: Grid, summary: Summary) -> tuple[Value, ...]:
    row, cell, limits = summary.row, summary.cell, summary.limits or Limits()
    return (
        *_context(grid, cell.subject, summary.setting),
        cell.batch,
        row.outcome if summary.call_s is None else summary.call_s.value,
        _value(summary.call_s),
        ends(summary.call_s),
        _value(summary.throughput),
        _value(summary.speedup),
        ends(summary.speedup),
        summary.peak_bytes,
        row.memory.analytic,
        ENERGY.value(row),
        row.outcome,
        remark(summary),
        len(row.samples.call_s),
        row.stop,
        limits.regime,
        limits.launch_share,
        limits.idle_share,
        limits.dispatch_share,
        limits.measured.roof,
        limits.sheet.roof,
        limits.measured.bandwidth,
        limits.measured.compute,
        limits.sheet.bandwidth,
        limits.sheet.compute,
        limits.why,
        row.parameters,
        row.session.id,
        row.environment,
        row.cell_id,
        row.reason,
        _kind(row.simulated),
    )


def remark(summary: Summary) -> str | None:
    """Return what a reader must know of a cell beside its numbers, None for nothing."""
    row = summary.row
    if row.outcome == "oom-implied":
        return "a smaller batch ran out of memory"
    if row.outcome in ("skipped", "failed", "timed-out", "unstable"):
        return row.reason
    short = [f"{len(row.samples.call_s)} repeats only"] if timing.is_short(row) else []
    return ", ".join([*short, *row.telemetry.get("flags", ())]) or None


def quality(grid: Grid) -> Table | None:
    """Every perplexity with its protocol."""
    columns = (
        Column("label", "Subject"), Column("subject", "Full name"), Column("source", "Text"),
        Column("perplexity", "Perplexity", "number"), Column("nll", "Mean NLL (nats)", "number"),
        Column("tokens", "Tokens", "integer"), Column("protocol", "Protocol"), Column("digest", "Digest"),
    )  # fmt: skip
    rows = [
        (grid.labels.get(subject, inert(subject)), subject, name, one.perplexity, one.nll, one.tokens, one.protocol,
         one.digest)
        for subject, results in grid.perplexity.items() for name, one in results.items()
    ]  # fmt: skip
    if not rows:
        return None
    source = combine(list(grid.sources.values()))
    return Table("perplexities", "Perplexities", columns, tuple(rows), source, hidden=frozenset({"subject", "digest"}))


def prediction_error(grid: Grid) -> Table | None:
    """How far predictions are from what was measured: as shipped, and fitted to cells other than those predicted."""
    if not grid.predictions:
        return None
    columns = (
        Column("runtime", "Runtime"), Column("dtype", "Dtype"), Column("device", "Device"),
        Column("cells", "Cells", "integer"), Column("shipped_typical", "Shipped, half within", "ratio"),
        Column("shipped_worst", "At worst", "ratio"), Column("shipped_bias", "Predicted over measured", "ratio"),
        Column("fitted_typical", "Fitted, half within", "ratio"), Column("fitted_worst", "At worst", "ratio"),
        Column("environment", "Environment"),
    )  # fmt: skip
    rows = [
        (
            one.runtime, one.dtype, grid.sources[one.environment].device,
            max(error.cells for error in (one.shipped, one.fitted) if error),
            *((one.shipped.typical, one.shipped.worst, one.shipped.bias) if one.shipped else (None, None, None)),
            *((one.fitted.typical, one.fitted.worst) if one.fitted else (None, None)),
            one.environment,
        )
        for one in grid.predictions
    ]  # fmt: skip
    caption = (
        "Latency as predicted without this run (shipped), and by factors fitted to one half of its cells for the other "
        "half (fitted), as factors away from what was measured."
    )
    source = combine(list(grid.sources.values()))
    hidden = frozenset({"environment"} | ({"device"} if len({row[2] for row in rows}) == 1 else set()))
    return Table("prediction-error", "Prediction error", columns, tuple(rows), source, hidden=hidden, caption=caption)


TABLES: tuple[Callable[[Grid], Table | None], ...] = (subjects, cells, prediction_error, quality)


def _table(
    name: str, title: str, columns: tuple[Column, ...], rows: Sequence[tuple[Value, ...]], grid: Grid,
    simulated: bool, detail: frozenset[str] = frozenset(),
) -> Table:  # fmt: skip
    """Hide the columns that say nothing here: one value throughout (said in `constant`), or none at all."""
    columns = (*columns, Column("simulated", "Kind"))
    values = {column.key: {row[index] for row in rows} for index, column in enumerate(columns)}
    context = {column.key: column for column in _CONTEXT}
    same = [k for k in context if len(values[k]) == 1 and k not in _ALWAYS | _NEVER and values[k] != {None}]
    empty = {key for key, seen in values.items() if seen <= {None, ""}}
    hidden = detail | empty | set(same) | _NEVER
    if len(values["simulated"]) == 1 and not simulated:
        hidden |= {"simulated"}
    if len(values.get("regime", ())) == 1:
        hidden |= {"regime"}
    facts = [_constant(key, next(iter(values[key]))) for key in same if key != "device"]
    short = {grid.baseline[s] for s in grid.baseline if grid.labels[s] != inert(s)}
    facts += [f"all pruned subjects are plans of {inert(name)}" for name in short]
    constant = " · ".join(facts)
    source = combine(list(grid.sources.values()), simulated=simulated)
    return Table(name, title, columns, tuple(rows), source, constant, frozenset(hidden), _caption(grid))


def _caption(grid: Grid) -> str:
    """Say what the statistics are."""
    kinds = {setting.timing for setting in grid.groups} - {""}
    latency = {
        "careful": "the median of whole calls with its 95\u00a0% interval",
        "paper": "the mean of 20 whole calls, as the paper reports",
    }
    words = " or ".join(text for kind, text in latency.items() if kind in kinds)
    return f"Latency is {words}. Speedup is over the dense subject at the same batch." if words else ""


def _constant(key: str, value: Value) -> str:
    if key == "budget" and value == "none":
        return "no memory budget"
    return f"{value}" if key == "dtype" else f"{value} attention" if key == "attention" else f"{key} {value}"


def _context(grid: Grid, subject: str, setting: Setting) -> tuple[Value, ...]:
    source = grid.sources.get(setting.environment)
    device = source.place if source else setting.environment
    line = source.line if source else setting.environment
    return (
        grid.labels[subject], subject, setting.runtime, setting.dtype, setting.attention, setting.budget,
        setting.prompt, setting.output, device, line,
    )  # fmt: skip


def _kind(simulated: bool) -> str:
    return "simulated" if simulated else "measured"


def _value(estimate: Estimate | None) -> float | None:
    return None if estimate is None else estimate.value


def ends(estimate: Estimate | None) -> tuple[float, float] | None:
    """Return the ends of the 95 % interval, None where there is none."""
    if estimate is None or estimate.low is None or estimate.high is None:
        return None
    return estimate.low, estimate.high
