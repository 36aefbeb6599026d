"""Figures that gate without statistics: equal on every run of one set of versions, so that a difference is a change.

    python -m bench.baselines             compare with the committed ones; exit code 1 where something differs
    python -m bench.baselines --update    write them anew, and show what changed

Operations of a decode step (by family and runtime: what a block adds, and the rest), parameters, bytes, largest batches
on simulated devices, and the peak of a decode on this CPU, which is good to 2 MiB. Operations depend on the versions of
torch and transformers, so they are compared only where those are the recorded ones; all else is compared anywhere.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import typer

from bench import children, devices, environment, jobs, memory, worker
from bench.cells import Cell
from bench.runtimes.protocol import Options
from bench.subjects import Subject
from shortllama import catalogue, console, files
from shortllama.errors import InputError
from shortllama.shape import ModelShape

PATH = Path(__file__).parents[1] / "reports" / "baselines" / "deterministic.json"
GRANULARITY = 2 << 20

RUNTIMES = ("paper", "eager", "static")
# What each family has that others lack; two and six blocks of it tell what a block adds.
_SIZE = {"vocabulary": 97, "hidden": 64, "head_dim": 8, "query_heads": 8, "kv_heads": 4, "neurons": 96}
FAMILIES: Mapping[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"family": "mistral"},
    "qwen2": {"family": "qwen2", "biases": ("q", "k", "v")},
    "qwen3": {"family": "qwen3", "qk_norm": True},
    "gemma2": {"family": "gemma2", "norms_per_module": 2, "tied": True},
    "gemma3_text": {"family": "gemma3_text", "norms_per_module": 2, "qk_norm": True, "tied": True},
    "phi3": {"family": "phi3"},
}
_FEW, _MANY = 2, 6

SHAPES = (
    "llama-7b", "llama-7b/depth-26", "llama-7b/wanda-sp-20", "llama-7b/llm-pruner-35", "llama-13b", "llama-3-8b",
    "qwen2.5-7b", "qwen3-8b", "mistral-7b",
)  # fmt: skip
DEVICES = ("rtx3090", "h100")
PROMPT, OUTPUT = 12, 128
# The decode whose peak is measured: its tensors outweigh pages and code, and it takes seconds.
PEAK = ModelShape.uniform(
    vocabulary=512, hidden=128, head_dim=32, blocks=6, query_heads=4, kv_heads=4, neurons=512, tied=True
)
PEAK_BATCH, PEAK_LIMIT = 256, 1 << 30


class Operations(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one decode step calls: `block` is what each block adds, `rest` what is called once."""

    block: dict[str, int]
    rest: dict[str, int]


class Costs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A shape in float16. `decode_bytes`: of a step at batch 1 in the middle of 128 tokens; `largest_batch`: by device
    and kind of cache, prompt 12, output 128, as the memory model has it."""

    parameters: int
    weight_bytes: int
    kv_bytes_per_token: int
    decode_bytes: int
    largest_batch: dict[str, int]


class Baselines(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The committed figures; `versions`: what operations depend on. Schema history: shortllama.baselines/1: first."""

    versions: dict[str, str]
    operations: dict[str, dict[str, Operations]]
    shapes: dict[str, Costs]
    peak_bytes: dict[str, int]
    schema: Literal["shortllama.baselines/1"] = "shortllama.baselines/1"


def measured() -> Baselines:
    """Return the figures of this source tree; loads torch."""
    return Baselines(versions(), {name: operations(name) for name in FAMILIES}, shapes(), peaks())


def versions() -> dict[str, str]:
    """Return the versions that operations depend on."""
    import torch
    import transformers

    return {"torch": torch.__version__.partition("+")[0], "transformers": transformers.__version__}


def operations(family: str) -> dict[str, Operations]:
    """Return the operations of a decode step of a family's tiny model, by runtime."""
    from bench import runtimes

    found: dict[str, Operations] = {}
    for runtime in RUNTIMES:
        counts: list[dict[str, int]] = []
        for blocks in (_FEW, _MANY):
            shape = ModelShape.uniform(**{**_SIZE, **FAMILIES[family], "blocks": blocks})
            options = Options("float32", "sdpa", "cpu", 0, 1)
            session = runtimes.load(runtime).open_session(Subject(family, shape, family), options)
            session.prepare(1, 6, 4)
            counts.append(session.operations() or {})
            session.close()
        found[runtime] = _by_block(*counts)
    return found


def _by_block(few: Mapping[str, int], many: Mapping[str, int]) -> Operations:
    """Split two counts into what a block adds and the rest; what does not divide evenly shows as a rest of both."""
    block = {name: (many[name] - few.get(name, 0)) // (_MANY - _FEW) for name in many}
    rest = {name: few.get(name, 0) - _FEW * added for name, added in block.items()}
    return Operations({n: c for n, c in block.items() if c}, {n: c for n, c in rest.items() if c})


def shapes() -> dict[str, Costs]:
    """Return the analytic figures of some catalogue shapes."""
    found: dict[str, Costs] = {}
    for name in SHAPES:
        shape = catalogue.lookup(name)
        largest = {
            f"{device} {runtime}": memory.largest_batch(
                shape, runtime, "float16", PROMPT, OUTPUT, devices.lookup(device).memory_bytes
            )
            for device in DEVICES
            for runtime in ("eager", "static")
        }
        found[name] = Costs(
            shape.parameters,
            shape.weight_bytes("float16"),
            shape.kv_bytes_per_token("float16"),
            shape.decode_bytes(1, PROMPT + OUTPUT // 2, "float16"),
            largest,
        )
    return found


def peaks() -> dict[str, int]:
    """Return the peak bytes of a decode on this CPU by runtime, each in a process of its own."""
    children.serve(children.TORCH_MODULES, environment.child_variables(1))
    return {runtime: peak(runtime) for runtime in ("eager", "static")}


def peak(runtime: str, entry: children.Entry = worker.run) -> int:
    """Return the peak bytes of one probe. Raises InputError where this system does not let peaks be read."""
    cell = Cell("peak", runtime, "float32", "sdpa", 16, 24, "none", PEAK_BATCH)
    options = Options("float32", "sdpa", "cpu", 0, 1)
    work = jobs.Job(Subject("peak", PEAK, "peak"), runtime, options, (cell,), "probe", limit_bytes=PEAK_LIMIT)
    with children.Child(entry, msgspec.json.encode(work), environment.child_variables(1)) as child:
        while True:
            message = jobs.DECODER.decode(child.receive(120))
            if isinstance(message, jobs.Broke):
                raise InputError(f"the decode whose peak is measured failed: {message.text}")
            if isinstance(message, jobs.Finished):
                if message.memory.allocated is None:
                    raise InputError(f"no peak can be read here: {message.memory.reasons.get('allocated')}")
                return message.memory.allocated


# -- comparing ---------------------------------------------------------------------------------------------------------


def differences(before: Baselines, now: Baselines) -> list[str]:
    """Return what differs, one line each, as `where: old -> new`."""
    found = list(_differing("shapes", msgspec.to_builtins(before.shapes), msgspec.to_builtins(now.shapes)))
    if before.versions == now.versions:
        old, new = msgspec.to_builtins(before.operations), msgspec.to_builtins(now.operations)
        found += _differing("operations", old, new)
    for runtime in before.peak_bytes.keys() | now.peak_bytes.keys():
        old, new = before.peak_bytes.get(runtime), now.peak_bytes.get(runtime)
        if old is None or new is None or abs(new - old) > GRANULARITY:
            found.append(f"peak_bytes {runtime}: {old} -> {new}")
    return found


def _differing(where: str, before: Any, now: Any) -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys: list[str] = sorted({*before, *now})
        for key in keys:
            yield from _differing(f"{where} {key}", before.get(key), now.get(key))
    elif before != now:
        yield f"{where}: {before} -> {now}"


def read(path: Path = PATH) -> Baselines:
    """Return the committed figures."""
    return files.decode_json(files.read_bytes(path), Baselines, str(path))


def main(
    update: Annotated[bool, typer.Option("--update", help="Write the figures anew.")] = False,
) -> int:
    """Compare deterministic figures with the committed ones. Exit code 1 where something differs."""
    now = measured()
    before = read() if PATH.exists() else None
    changed = differences(before, now) if before else ["no baselines yet"]
    for line in changed:
        sys.stdout.write(f"{line}\n")
    if before and before.versions != now.versions:
        console.say(f"operations were counted with {before.versions}, not {now.versions}: not compared")
    if update:
        PATH.parent.mkdir(parents=True, exist_ok=True)
        document = msgspec.json.format(msgspec.json.encode(now, order="sorted"), indent=1)
        files.write_atomically(PATH, document + b"\n")
        console.say(f"wrote {PATH.name}: {len(changed)} differences")
        return 0
    console.say(f"{len(changed)} differences" + ("; where they are meant, write them with --update" if changed else ""))
    return int(bool(changed))


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    sys.exit(console.run(app))
