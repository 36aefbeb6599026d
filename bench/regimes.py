"""What limits each cell, and how near it came to what its machine can do: worked out when rows are read. Pure.

Nothing of it is stored: it takes the same cell in two runtimes to tell launching, and ceilings may be measured later.

The share of a step that is launching = 1 - t_cudagraph / t_static, medians of the same decode step: both run the same
kernels over the same cache, and only one has to launch them. (Against `eager` the copies of its growing cache would
count as launching.) Above 25 % a step is launch-bound. Otherwise the larger of bytes over bandwidth and FLOPs over rate
decides, or `cache` where what a step reads fits the last-level cache, and bytes are the larger.

The profiler checks that: 1 - seconds of kernels in a step / seconds of the step is the share in which nothing ran. It
stands in the first row of each group on CUDA, and decides where the pair of rows is missing.

Without either a regime is named only where one cause can be shown to take enough of the step:
- on a CPU, the operations of a step times the measured cost of dispatching an empty one cannot overlap with work, so
  they are the least that launching takes; above 25 % the step is launch-bound;
- where bytes or FLOPs at the measured peaks take at least half of the step, they limit it.
Anything else is null, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import median

import msgspec

from bench import devices, peaks, physics, timing
from bench.cells import Cell
from bench.devices import Device
from bench.measurement import Bounds, Environment, Measurement
from bench.peaks import Peaks

GRAPH, LAUNCHED = "cudagraph", "static"
ENOUGH = 0.5  # of a step: what takes this much of it limits it, whatever the rest is


class Shares(msgspec.Struct, frozen=True):
    """A decode step against one set of peaks (0-1, above 1 where the peaks are not the device's real ones).

    `bandwidth`: algorithmic bytes / time / bandwidth (MBU; by the cache's bandwidth where the bytes fit it), `compute`:
    FLOPs / time / rate (MFU); None where that peak is not known. `cached`: which of the bandwidths it was.
    """

    bandwidth: float | None
    compute: float | None
    cached: bool = False

    @property
    def roof(self) -> float | None:
        """The share of the roof that the step reached: the larger of both; None where one is not known."""
        if self.bandwidth is None or self.compute is None:
            return None
        return max(self.bandwidth, self.compute)

    @property
    def limit(self) -> str:
        """What the roof of the step is made of."""
        if (self.compute or 0.0) > (self.bandwidth or 0.0):
            return "compute"
        return "cache" if self.cached else "bandwidth"


_UNKNOWN = Shares(None, None)


class Limits(msgspec.Struct, frozen=True):
    """What limits a cell. `regime`: launch, bandwidth, compute, cache, or None with the reason in `why`.

    `launch_share`: of the step, by its pair of rows; `idle_share`: of the step in which no kernel ran, by the profiler
    (None in runtimes that compile or capture it); `dispatch_share`: the least it can be on a CPU; `sheet` and
    `measured`: shares of the datasheet's peaks and of the machine's own ceilings.
    """

    regime: str | None = None
    why: str | None = None
    launch_share: float | None = None
    idle_share: float | None = None
    dispatch_share: float | None = None
    sheet: Shares = _UNKNOWN
    measured: Shares = _UNKNOWN


class Known(msgspec.Struct, frozen=True):
    """What is known of the machine of an environment: the row of the device table, its own ceilings."""

    kind: str
    sheet: Device | None
    peaks: Peaks | None
    simulated: bool = False


def known(environment: Environment) -> Known:
    """Return what an environment says of its machine. Raises InputError for ceilings that cannot be read."""
    facts = environment.fingerprint
    if facts.get("simulated"):
        try:
            return Known("simulated", msgspec.convert(facts.get("figures"), Device), None, simulated=True)
        except msgspec.ValidationError:
            return Known("simulated", None, None, simulated=True)
    return Known(str(facts.get("kind", "")), devices.match(str(facts.get("device", ""))), peaks.of(environment))


def joined(rows: Sequence[Measurement], environments: Mapping[str, Environment]) -> tuple[Limits | None, ...]:
    """Return what limits each row, parallel to `rows`; None for rows without times or physics.

    Rows of several runs may be given together: those of one environment explain each other.
    """
    machines = {key: known(one) for key, one in environments.items()}
    steps = _steps(rows)
    return tuple(_limits(row, steps, machines[row.environment]) for row in rows)


def launch_share(graph_s: float, launched_s: float) -> float:
    """Return the share of a launched step that is launching (0-1) from the same step's seconds as a graph."""
    return max(0.0, 1 - graph_s / launched_s)


def step_s(row: Measurement) -> float | None:
    """Return the median seconds of a decode step; where steps were not timed apart, the mean of what follows the
    prefill. None for a single token."""
    found = timing.per_token(row)
    if found is None and row.samples.prefill_s and row.cell.output > 1:
        found = (median(row.samples.call_s) - median(row.samples.prefill_s)) / (row.cell.output - 1)
    return found if found and found > 0 else None


def _steps(rows: Iterable[Measurement]) -> dict[tuple[str, Cell], float]:
    """Seconds of a decode step by environment and cell; where a cell has several rows, the median of theirs."""
    found: dict[tuple[str, Cell], list[float]] = {}
    for row in rows:
        if row.outcome == "ok" and row.cell.runtime in (GRAPH, LAUNCHED):
            step = step_s(row)
            if step:
                found.setdefault((row.environment, row.cell), []).append(step)
    return {key: median(values) for key, values in found.items()}


def _limits(row: Measurement, steps: Mapping[tuple[str, Cell], float], machine: Known) -> Limits | None:
    if row.bounds is None or row.outcome != "ok" or not row.samples.call_s:
        return None
    step = step_s(row)
    if step is None:
        return Limits(why="a single new token has no decode step")
    sheet = shares(row.bounds, step, row.cell.dtype, machine.sheet)
    measured = shares(row.bounds, step, row.cell.dtype, _roof(machine))
    share, idle = _launching(row, steps), _idle(row, step)
    least = _dispatching(row.bounds, step, machine)
    # The simulator's steps are its device's figures by construction; of anything else, ceilings are nearer the truth.
    best = sheet if machine.simulated or measured.roof is None else measured
    launches = row.cell.runtime != GRAPH and not row.simulated
    told = share if share is not None else idle
    regime, why = _regime(row.cell.runtime, told if launches else 0.0, least, best, machine)
    return Limits(regime, why, share, idle, least, sheet, measured)


def _roof(machine: Known) -> Device | None:
    """The machine's own ceilings as a device."""
    if machine.peaks is None:
        return None
    return machine.peaks.device(machine.sheet or devices.unknown("measured", 0))


def shares(bounds: Bounds, step: float, dtype: str, device: Device | None) -> Shares:
    """Return a step's shares of a device's peaks; unknown for a device whose figures are no peaks."""
    if device is None or device.nominal:
        return _UNKNOWN
    rate = device.flops.get(dtype)
    cached = bounds.decode_bytes <= device.cache_bytes
    bandwidth = device.bandwidth_for(bounds.decode_bytes)
    return Shares(
        bandwidth=bounds.decode_bytes / step / bandwidth if bandwidth else None,
        compute=bounds.decode_flops / step / rate if rate else None,
        cached=cached,
    )


def _launching(row: Measurement, steps: Mapping[tuple[str, Cell], float]) -> float | None:
    """The launch share by the pair of rows."""
    if row.cell.runtime != LAUNCHED:
        return None
    graph = steps.get((row.environment, msgspec.structs.replace(row.cell, runtime=GRAPH)))
    launched = steps.get((row.environment, row.cell))
    return launch_share(graph, launched) if graph and launched else None


def _idle(row: Measurement, step: float) -> float | None:
    """The share of a step in which no kernel ran, by the profiler."""
    assert row.bounds is not None
    return None if row.bounds.kernel_s is None else launch_share(row.bounds.kernel_s, step)


def _dispatching(bounds: Bounds, step: float, machine: Known) -> float | None:
    """The least share of a CPU's step that is dispatching operations; None on a device that works meanwhile."""
    cost = machine.peaks.launch_s.get("eager") if machine.peaks is not None and machine.kind == "cpu" else None
    if not cost or not bounds.ops_per_token:
        return None
    return min(1.0, sum(bounds.ops_per_token.values()) * cost / step)


def _regime(
    runtime: str, share: float | None, least: float | None, roof: Shares, machine: Known
) -> tuple[str | None, str | None]:
    """The regime, or why there is none."""
    launching = share if share is not None else least
    if launching is not None and launching > physics.LAUNCH_BOUND_SHARE:
        return "launch", None
    if roof.roof is None:
        if machine.peaks is not None or machine.sheet is not None:
            return None, "of the peaks of this device, the rate for this dtype or the bandwidth is not known"
        return None, "the peaks of this device are not known; shortllama ceilings measures them"
    if share is not None or roof.roof >= ENOUGH:
        return roof.limit, None
    if machine.kind == "cuda":
        how = "run the same cell in cudagraph and static" if runtime == LAUNCHED else "static tells, beside cudagraph"
        return None, f"the launch share is not known: {how}"
    return None, f"no single cause takes half of the step; {roof.limit} takes {roof.roof:.0%}"


def devices_of(environments: Iterable[Environment]) -> dict[str, Device]:
    """Return, by environment, the device that predictions are made for there: the table's row, else the machine's own
    ceilings, else the nominal row."""
    found: dict[str, Device] = {}
    for one in environments:
        machine = known(one)
        if machine.sheet is not None:
            found[one.id] = machine.sheet
        elif machine.kind == "cpu":
            nominal = devices.lookup("cpu")
            found[one.id] = machine.peaks.device(nominal) if machine.peaks else nominal
    return found
