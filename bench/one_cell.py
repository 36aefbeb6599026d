"""One cell, measured as a sweep measures it: what a test asks for. A model may be a name, a folder, or one in memory.

A model in memory is written as a checkpoint first and measured by a child process like any other. Measured in the
caller's own process, its times would hold the caller's threads and garbage, and its peak everything else that lives
there. Imports torch only for a model in memory.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import msgspec

from bench import environment, quality, requests, runner, runtime_rows, schedule, search, store, subjects
from bench.cells import SUITE_SCHEMA, Cell, Suite, check_suite
from bench.environment import Machine
from bench.measurement import Frontier, Measurement
from bench.requests import Request
from bench.store import Results
from bench.subjects import Subject
from shortllama import files
from shortllama.errors import InputError
from shortllama.shape import ModelShape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# A subject's name, a checkpoint's folder, a shape (random weights), or a transformers model.
Model: TypeAlias = "str | Path | ModelShape | PreTrainedModel"

DTYPES = {"cpu": "float32", "cuda": "bfloat16", "simulated": "float16"}
SHARD_BYTES = 2 << 30


class Ask(msgspec.Struct, frozen=True):
    """How to measure: the cell without its subject, on `device` (None: CUDA where there is one, else the CPU).

    `dtype` None is that of a model in memory, else float32 on a CPU and bfloat16 on CUDA. `seconds`: the budget of the
    repeats, as a suite's `cell_seconds`; `telemetry`: also call the cell for the sampler.
    """

    runtime: str = "static"
    batch: int = 1
    prompt: int = 12
    output: int = 128
    dtype: str | None = None
    attention: str = "sdpa"
    budget: str = "none"
    device: str | None = None
    seconds: float = 20.0
    seed: int = 0
    telemetry: bool = False


def measure(model: Model, ask: Ask, name: str = "model") -> Results:
    """Return the one row of a cell, with its environment.

    `name` is the subject's where the model has none: rows of equal names pair up with those of other runs. Raises
    InputError for what is not understood, and what this machine cannot do.
    """
    with tempfile.TemporaryDirectory(prefix="shortllama-") as place:
        request = _request(model, ask, name, Path(place))
        run = Path(place) / "run"
        run.mkdir()
        runner.run(_prepared(request, Path(place)), request.settings(None), run, runner.Watcher())
        return store.read(run)


def largest_batch(model: Model, ask: Ask, name: str = "model") -> Frontier:
    """Return the largest batch that fits, as `shortllama oom` finds it; `batch` and `seconds` of `ask` have no part."""
    with tempfile.TemporaryDirectory(prefix="shortllama-") as place:
        request = _request(model, msgspec.structs.replace(ask, batch=1), name, Path(place))
        run = Path(place) / "run"
        run.mkdir()
        (found,) = search.run(_prepared(request, Path(place)), request.settings(None), run, _unseen)
        return found


def the_row(results: Results) -> Measurement:
    """Return the only row."""
    (row,) = results.measurements
    return row


def _unseen(*_: object) -> None:
    """Nobody watches the search."""


def _request(model: Model, ask: Ask, name: str, place: Path) -> Request:
    machine = environment.machine(ask.device)
    subject, dtype = _subject(model, name, place / "model")
    cell = Cell(
        subject.name, ask.runtime, ask.dtype or dtype or DTYPES[machine.kind], ask.attention, ask.prompt, ask.output,
        ask.budget, ask.batch,
    )  # fmt: skip
    suite = Suite(
        schema=SUITE_SCHEMA, subjects=(cell.subject,), runtimes=(cell.runtime,), dtypes=(cell.dtype,),
        attention=(cell.attention,), batch=(cell.batch,), prompt=(cell.prompt,), output=(cell.output,),
        budgets=(cell.budget,), cell_seconds=ask.seconds, seed=ask.seed, telemetry=ask.telemetry,
    )  # fmt: skip
    _check(suite, machine)
    plan = schedule.plan(suite, machine.device, subjects={subject.name: subject})
    return Request("cell", suite, b"", machine, plan)


def _check(suite: Suite, machine: Machine) -> None:
    for name in ("batch", "prompt", "output"):
        (value,) = getattr(suite, name)
        if not isinstance(value, int) or value < 1:
            raise InputError(f"{name} {value!r} is not a number of 1 or more")
    if suite.cell_seconds <= 0:
        raise InputError(f"seconds {suite.cell_seconds!r} is no time to measure for; give more than 0")
    check_suite(suite, "the cell")
    (runtime,) = suite.runtimes
    if machine.kind == "simulated":
        if runtime not in runtime_rows.SIMULATED:
            raise InputError(
                f"device {machine.place} is simulated and runtime {runtime} needs a real one; use roofline"
            )
    elif refusal := runtime_rows.refusal(runtime, machine.kind):
        raise InputError(refusal)


def _prepared(request: Request, place: Path) -> schedule.Schedule:
    """The schedule with its subject fetched and, where its name says so, pruned."""
    quality.check_weights(request.plan)
    return requests.prepared(request, (), place)


# -- models ------------------------------------------------------------------------------------------------------------


def _subject(model: Model, name: str, folder: Path) -> tuple[Subject, str | None]:
    """The subject that `model` is, and the dtype it has in memory; None for what is not in memory."""
    if isinstance(model, str | Path):
        return subjects.resolve(str(model)), None
    if isinstance(model, ModelShape):
        return Subject(name, model, name), None
    if not hasattr(model, "named_parameters") or not hasattr(model, "config"):
        raise InputError(
            f"model {model!r:.60}: not a name, a folder, a shape or a transformers model; give the model itself, "
            "not its output or its tokenizer"
        )
    return _written(model, name, folder)


def _written(model: PreTrainedModel, name: str, folder: Path) -> tuple[Subject, str]:
    """Write a model in memory as a checkpoint without a plan."""
    from shortllama import checkpoint, configs, layout, surgery, tensorfile

    shape, dtype = surgery.shape_of(model), surgery.dtype_name(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    planned = [
        tensorfile.Planned(one, tensorfile.NAMES[dtype], size, partial(checkpoint.raw_pieces, parameters[one]))
        for one, size in layout.tensors(shape).items()
    ]
    folder.mkdir()
    tensorfile.write_folder(folder, planned, SHARD_BYTES)
    own = surgery.config_dict(model)
    config = configs.finished(configs.stock_config(own, shape) or configs.own_config(own, shape), dtype)
    (folder / "config.json").write_bytes(files.encode_json(config))
    return Subject(name, shape, name, str(folder)), dtype
