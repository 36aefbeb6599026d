"""The verb `recommend`: runs and limits in, the Pareto front and one choice with its reasons out. Imports no torch."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from bench import devices, memory, prediction, recommendation, store, subjects
from bench.cells import budget_bytes
from bench.quality import QUALITY
from bench.recommendation import Candidate, Constraint, Recommendation
from bench.store import Results
from bench.timing import Estimate
from shortllama import console, files
from shortllama.errors import InputError
from shortllama.evaluation.results import read_evaluation

if TYPE_CHECKING:
    from bench.report.summaries import Summary

_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(us|ms|s|)")
_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "": 1.0}


def recommend(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Runs: folders or files.", show_default=False)],
    max_latency: Annotated[
        str | None, typer.Option(metavar="TIME", help="Most for a whole call, such as 800ms or 2s.")
    ] = None,
    max_memory: Annotated[str | None, typer.Option(metavar="SIZE", help="Most peak memory, such as 24GiB.")] = None,
    max_ppl: Annotated[float | None, typer.Option(min=1.0, help="Largest perplexity; see --text.")] = None,
    min_throughput: Annotated[float | None, typer.Option(min=0.0, help="Least new tokens a second.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Only this batch size.")] = None,
    prompt: Annotated[int | None, typer.Option(min=1, help="Only this prompt length.")] = None,
    output: Annotated[int | None, typer.Option(min=1, help="Only this output length.")] = None,
    device: Annotated[
        str | None, typer.Option(help="Only this device; one that no run measured, such as rtx3090, is predicted.")
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="Which perplexity counts. Default: the first that all evaluated subjects have.")
    ] = None,
    price_per_hour: Annotated[
        float | None, typer.Option(min=0.0, help="What the device costs an hour; gives the cost of a million tokens.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also write the answer as a page, in a folder as `report` does.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> int:
    """Choose a shape for given limits: the fastest that meets all of them. Exit code 1 where none does."""
    if out is not None:
        files.check_folder(out, "index.html")
    measured = store.measured(runs)
    results = [store.read(run) for run in measured]
    found = candidates(results, perplexities(runs, text), device, price_per_hour)
    wanted = {"batch": batch, "prompt": prompt, "output": output}
    chosen = [one for one in found if all(v is None or getattr(one.cell, k) == v for k, v in wanted.items())]
    if not chosen:
        raise InputError(_nothing(found, wanted))
    limits = {
        "latency": None if max_latency is None else _seconds(max_latency),
        "memory": None if max_memory is None else budget_bytes(max_memory),
        "perplexity": max_ppl,
        "throughput": min_throughput,
    }
    constraints = [Constraint(name, limit) for name, limit in limits.items() if limit]
    answer = recommendation.recommend(chosen, constraints)
    if as_json:
        console.emit(plain(answer, constraints))
    else:
        from bench.report import reasons

        sys.stdout.write("\n".join(reasons.lines(answer, constraints)) + "\n")
    if out is not None:
        from bench.report import advice, publish

        sources = publish.sources(measured, results)
        publish.save(advice.build(answer, constraints, chosen, sources), out)
        console.say(f"wrote {out / 'index.html'}")
    return int(answer.choice is None)


# -- candidates --------------------------------------------------------------------------------------------------------


def candidates(
    results: Sequence[Results], perplexity: Mapping[str, float], device: str | None, price: float | None
) -> list[Candidate]:
    """Return the cells to choose from: those measured on `device` (None: on any), else predictions for it."""
    environments = {key: one for run in results for key, one in run.environments.items()}
    names = {key: str(one.fingerprint.get("device", "unknown device")) for key, one in environments.items()}
    from bench.report.summaries import grid

    drawn = grid([row for run in results for row in run.measurements], [], {}, {})
    cells = [cell for groups in drawn.groups.values() for group in groups.values() for cell in group.measured]
    if device is not None:
        wanted = devices.match(device) or (devices.lookup(device) if device in devices.names() else None)
        here = [cell for cell in cells if _is(names[cell.setting.environment], device, wanted)]
        if not here and wanted is None:
            known = ", ".join(sorted({names[cell.setting.environment] for cell in cells}))
            raise InputError(
                f"--device {device!r} is neither measured ({known}) nor known; see shortllama sweep --help"
            )
        if not here and wanted is not None:
            return _predicted(cells, perplexity, wanted, price)
        cells = here
    return [_measured(cell, names[cell.setting.environment], perplexity, price) for cell in cells]


def _is(name: str, asked: str, wanted: devices.Device | None) -> bool:
    known = devices.match(name)
    return name == asked or (wanted is not None and known is not None and known.short == wanted.short)


def _measured(cell: Summary, device: str, perplexity: Mapping[str, float], price: float | None) -> Candidate:
    assert cell.call_s is not None
    assert cell.throughput is not None
    kind = "simulated" if cell.row.simulated else "measured"
    cost = None if price is None else recommendation.cost(cell.throughput.value, price)
    size = cell.peak_bytes if cell.peak_bytes is not None else cell.row.memory.analytic
    known = perplexity.get(cell.cell.subject)
    return Candidate(cell.cell, f"{kind} on {device}", cell.call_s, cell.throughput, size, known, cost)


def _predicted(
    cells: Sequence[Summary], perplexity: Mapping[str, float], device: devices.Device, price: float | None
) -> list[Candidate]:
    """The same cells on a device that is not at hand, where its memory holds them; see `prediction`."""
    found: list[Candidate] = []
    for cell in {msgspec.structs.replace(one.cell, budget="none"): None for one in cells}:
        shape = subjects.resolve(cell.subject).shape
        size = memory.of_cell(shape, cell)
        if size > device.memory_bytes or cell.dtype not in device.flops:
            continue
        call = prediction.call_s(shape, cell, device)
        rate = cell.batch * cell.output / call
        cost = None if price is None else recommendation.cost(rate, price)
        latency, throughput = (Estimate(value, None, None, 0) for value in (call, rate))
        known = perplexity.get(cell.subject)
        found.append(Candidate(cell, f"predicted for {device.name}", latency, throughput, size, known, cost))
    return found


def perplexities(runs: Sequence[Path], text: str | None) -> dict[str, float]:
    """Return each evaluated subject's perplexity on one text: the one named, else the first that all of them have.

    Raises InputError for a text that no subject was evaluated on.
    """
    from bench.report import merging

    files = [store.file_of(run).parent / QUALITY for run in runs]
    given = [merging.Given(str(file.parent), read_evaluation(file).subjects) for file in files if file.exists()]
    found, notes = merging.merged(given)
    for note in notes:
        console.say(f"note: {note}")
    evaluated = {name: one.perplexity for name, one in found.items() if one.perplexity}
    texts = list(dict.fromkeys(key for one in evaluated.values() for key in one))
    if text is not None and text not in texts:
        raise InputError(f"--text {text!r}: no subject was evaluated on it; evaluated: {', '.join(texts) or 'none'}")
    shared = [key for key in texts if all(key in one for one in evaluated.values())]
    chosen = text or next(iter(shared), None)
    return {name: one[chosen].perplexity for name, one in evaluated.items() if chosen in one}


def _seconds(text: str) -> float:
    match = _DURATION.fullmatch(text.strip())
    if not match or float(match.group(1)) == 0:
        raise InputError(f"--max-latency {text!r} is not a time; write for example 800ms or 2s")
    return float(match.group(1)) * _UNITS[match.group(2)]


def _nothing(found: Sequence[Candidate], wanted: Mapping[str, int | None]) -> str:
    if not found:
        return "no cell to choose from: none was measured, or none fits the device; sweep smaller cells or subjects"
    asked = ", ".join(f"--{key} {value}" for key, value in wanted.items() if value is not None)
    there = "; ".join(
        f"{key}: {', '.join(map(str, sorted({getattr(one.cell, key) for one in found})))}"
        for key, value in wanted.items() if value is not None
    )  # fmt: skip
    return f"no cell has {asked}; the runs have {there}"


def plain(answer: Recommendation, constraints: Sequence[Constraint]) -> dict[str, Any]:
    """Return the answer as one JSON document."""
    return {"constraints": msgspec.to_builtins(constraints), **msgspec.to_builtins(answer)}
