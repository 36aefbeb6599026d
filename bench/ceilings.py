"""The verb `ceilings`: what a device can reach, measured in a child process and kept for later runs. Torch-free."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from bench import budget, children, environment, outcomes, peaks
from bench.children import Child
from bench.environment import Machine
from bench.peaks import DECODER, HIDDEN, Answer, Ask, Ceilings, Failed, Figure, Kind, Planned, Probe
from bench.report import quantities
from shortllama import console, files, options
from shortllama.errors import InputError

TIMEOUT_S = 120.0  # for one probe: each takes under a second on a device that works
SYSFS = Path("/sys/devices/system/cpu")
Watch = Callable[[Probe, int, int], None]


def ceilings(
    device: Annotated[
        str | None, typer.Option(metavar="cpu|cuda:N", help="What to measure. Default: CUDA if there is one.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the document here, too.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Measure what this device can reach: bandwidths, cache, matrix rates, launches, and products with one token.

    Takes under a minute. The figures are kept for this machine and these libraries; later runs carry them, and reports
    judge every cell against them.
    """
    options.check_output_file(out)
    machine = real(device)
    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    if load >= cores:
        console.note(f"load {load:.1f} on {cores} cores: ceilings come out too low; end other work (shortllama doctor)")
    with _watching() as watch:
        found = measure(machine, watch)
    kept = peaks.remember(found)
    if out is not None:
        files.write_atomically(out, files.encode_json(found))
    if as_json:
        console.emit(found)
    else:
        sys.stdout.write("\n".join(lines(found)) + "\n")
    console.say(
        f"wrote {' and '.join(str(path) for path in (out, kept) if path)}; later runs here carry these ceilings"
    )


def real(device: str | None) -> Machine:
    """Return the machine that --device names. Raises InputError for a simulated one: there is nothing to examine."""
    machine = environment.machine(device)
    if machine.kind == "simulated":
        raise InputError(f"device {device!r} is not at hand, so nothing can be seen on it; give cpu or cuda:N")
    return machine


def measure(machine: Machine, watch: Watch = lambda probe, place, count: None) -> Ceilings:
    """Return the ceilings of a machine. Raises InputError where the measuring process dies or hangs."""
    start = time.perf_counter()
    threads = environment.threads()
    on_cpu = machine.kind == "cpu"
    cache = last_level_cache(SYSFS, os.sched_getaffinity(0), threads) if on_cpu else None
    ask = Ask(machine.place, threads, cache, budget.available_bytes() if on_cpu else 0)
    plan, answers = _asked(ask, environment.child_variables(threads), watch)
    figures = tuple(_short(one.figure) for one in answers if one.figure is not None)
    return Ceilings(
        environment=environment.measured(machine, threads),
        cache_bytes=plan.cache_bytes,
        figures=figures,
        reasons=reasons(plan, answers, machine.kind),
        wall_s=round(time.perf_counter() - start, 1),
    )


def _asked(ask: Ask, variables: dict[str, str], watch: Watch) -> tuple[Planned, list[Answer]]:
    """Run the child; return its plan, and its answers in order."""
    children.serve(("torch",), variables)
    plan, answers = Planned((), None), list[Answer]()
    with Child(in_child, msgspec.json.encode(ask), variables) as child:
        while not plan.probes or len(answers) < len(plan.probes):
            try:
                message = DECODER.decode(child.receive(TIMEOUT_S))
            except children.Silence:
                raise InputError(
                    f"{ask.device}: did not finish a probe within {TIMEOUT_S:g} s; is it in use?"
                ) from None
            except children.Ended as end:
                raise InputError(f"{ask.device}: the measuring process ended ({end.reason})") from None
            if isinstance(message, Failed):
                raise InputError(f"{ask.device}: cannot be measured: {message.reason}")
            if isinstance(message, Planned):
                plan = message
            else:
                answers.append(message)
            if len(answers) < len(plan.probes):
                watch(plan.probes[len(answers)], len(answers), len(plan.probes))
    return plan, answers


def in_child(job: bytes, send: Callable[[bytes], None]) -> None:
    """Entry of the child, which alone imports torch."""
    try:
        from bench.passes import ceilings as measuring

        measuring.run(msgspec.json.decode(job, type=Ask), lambda message: send(msgspec.json.encode(message)))
    except Exception as error:  # whatever it is, a user gets one line of it
        send(msgspec.json.encode(Failed(outcomes.one_line(f"{type(error).__name__}: {error}"))))


def _short(figure: Figure) -> Figure:
    """The figure in six digits, as samples are stored."""
    numbers = {name: getattr(figure, name) for name in ("value", "low", "high")}
    return msgspec.structs.replace(
        figure, **{name: None if value is None else float(f"{value:.6g}") for name, value in numbers.items()}
    )


def reasons(plan: Planned, answers: Sequence[Answer], kind: str) -> dict[str, str]:
    """Return why kinds have no figure: what a child said, and what this kind of device cannot have."""
    measured = {one.figure.kind for one in answers if one.figure is not None}
    found: dict[str, str] = {}
    for one in answers:
        probe = plan.probes[one.index]
        if one.reason and one.figure is None:
            found.setdefault(f"{probe.kind} {probe.way} {probe.size}", one.reason)
    if "read" not in measured:
        found["read"] = "too little memory is free for tensors that the cache cannot hold"
    if plan.cache_bytes is None:
        found["cache-read"] = "the system does not say how large the last-level cache is"
    if kind == "cpu":
        found["launch graph"] = "a CPU captures no graphs"
    return found


# -- the last-level cache of a CPU ------------------------------------------------------------------------------------


def last_level_cache(root: Path, cpus: Iterable[int], threads: int) -> int | None:
    """Return the bytes of last-level cache that `threads` threads on `cpus` can use together; None where unknown.

    `root`: sysfs' folder of CPUs. Several chips or clusters have a cache each: threads reach as many as they are.
    """
    caches: dict[str, int] = {}
    for cpu in cpus:
        levels = [_cache(folder) for folder in sorted((root / f"cpu{cpu}" / "cache").glob("index*"))]
        levels = [one for one in levels if one is not None]
        if levels:
            _, shared, size = max(levels)
            caches[shared] = size
    return sum(sorted(caches.values(), reverse=True)[:threads]) or None


def _cache(folder: Path) -> tuple[int, str, int] | None:
    """Level, the CPUs that share it, and bytes of a cache that holds data."""
    try:
        kind, level, shared, size = (
            (folder / name).read_text().strip() for name in ("type", "level", "shared_cpu_list", "size")
        )
        scale = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}[size[-1]]
        return (int(level), shared, int(size[:-1]) * scale) if kind != "Instruction" else None
    except (OSError, ValueError, LookupError):
        return None


# -- showing ----------------------------------------------------------------------------------------------------------

_NAMES: dict[Kind, str] = {
    "read": "memory, reading",
    "copy": "memory, copying",
    "cache-read": "cache, reading",
    "cache-copy": "cache, copying",
    "matrix": "product of matrices",
    "launch": "one operation",
}


def lines(found: Ceilings) -> list[str]:
    """Return the ceilings for people: the best of each kind beside its interval, then products by width."""
    named = found.environment.fingerprint
    said = [f"{named.get('device')}, {named.get('threads')} threads; last-level cache {_size(found.cache_bytes)}"]
    for kind, name in _NAMES.items():
        ways = (
            dict.fromkeys(one.way for one in found.figures if one.kind == kind)
            if kind in ("matrix", "launch")
            else [None]
        )
        for way in ways:
            best = found.best(kind, way)
            if best is not None:
                said.append(f"  {name + (f', {way}' if way else ''):<28}{_rate(best):>18}  {_interval(best)}".rstrip())
    for kind, name in (("gemv-out", "outputs"), ("gemv-in", "inputs")):
        widths = [one for one in found.figures if one.kind == kind]
        top = max((one.value for one in widths), default=0.0)
        said += [f"one token times {widths[0].way} matrices, {HIDDEN} by {name}:"] if widths else []
        said += [
            f"  {one.size:>6} {name:<8}{_rate(one):>18}  {quantities.share(one.value / top)} of the best"
            for one in widths
        ]
    said += [f"{what}: {reason}" for what, reason in found.reasons.items()]
    return said


def _size(size: int | None) -> str:
    return "unknown" if size is None else quantities.size(size)


def _rate(figure: Figure) -> str:
    if figure.kind == "launch":
        return quantities.seconds(figure.value)
    unit = "FLOP/s" if figure.kind == "matrix" else "bytes/s"
    scale, prefix = next((pair for pair in ((1e12, "T"), (1e9, "G")) if figure.value >= pair[0]), (1e6, "M"))
    return f"{quantities.significant(figure.value / scale)} {prefix}{unit.replace('bytes', 'B')}"


def _interval(figure: Figure) -> str:
    if figure.low is None or figure.high is None:
        return ""
    return f"95 % interval within {(figure.high - figure.low) / (2 * figure.value):.1%} of it"


@contextmanager
def _watching() -> Generator[Watch]:
    """Yield a watcher that shows which probe is measured."""
    with console.progress() as bar:
        task = bar.add_task("starting", total=None)
        yield lambda probe, place, count: bar.update(
            task, completed=place, total=count, description=f"{probe.kind} {probe.way} {probe.size:,}"
        )
