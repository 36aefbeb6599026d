"""Writing a depth-pruned checkpoint of 2 GiB in shards, against reading and writing as many bytes, and its memory.

With --benchmark-disable the same at 1/32 of the size, to see that what is written is right.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from time import perf_counter

import pytest

from shortllama import checkpoint, configs, files, layout, sources, tensorfile
from shortllama.plans import BlockKeep, Plan, Target, make_plan, write_plan
from shortllama.shape import ModelShape
from shortllama.tensorfile import Planned

from .conftest import ratio

ROOT = Path(__file__).parents[2]
GONE = (7, 12, 13, 18, 19, 20)
KEEP = tuple(BlockKeep(index) for index in range(24) if index not in GONE)
DTYPE = "bfloat16"

MOST_OF_A_COPY = 1.5
MOST_MEMORY = 400 << 20
PAIRS = 5
# The source, the result and the copy that it is compared with, and some air.
ROOM = 6 << 30


def shape_of(scale: int) -> ModelShape:
    """24 blocks; of 2.0 GiB in 16 bits at scale 1."""
    return ModelShape.uniform(
        vocabulary=32_000 // scale, hidden=2048, head_dim=64, blocks=24, query_heads=32 // scale or 1,
        kv_heads=4 // scale or 1, neurons=5120 // scale, tied=True,
    )  # fmt: skip


def noise(size: int, block: bytes) -> Iterator[bytes]:
    for start in range(0, size, len(block)):
        yield block[: size - start]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[Path]:
    """A folder of random bytes in shards."""
    root = tmp_path_factory.mktemp("large")
    if shutil.disk_usage(root).free < ROOM:
        pytest.skip(f"{ROOM >> 30} GiB of disk are needed")
    folder = root / "model"
    folder.mkdir()
    scale = 32 if pytestconfig.getoption("benchmark_disable") else 1
    shape, block = shape_of(scale), os.urandom(16 << 20)
    planned = [
        Planned(name, tensorfile.NAMES[DTYPE], size, partial(noise, 2 * math.prod(size), block))
        for name, size in layout.tensors(shape).items()
    ]
    tensorfile.write_folder(folder, planned, (500 << 20) // scale)
    (folder / "config.json").write_bytes(files.encode_json(configs.finished(configs.config_of(shape), DTYPE)))
    yield folder
    shutil.rmtree(root)


@pytest.fixture(scope="module")
def plan(source: Path) -> Plan:
    shape = sources.from_folder("large", source).shape
    return make_plan(model="large", shape=shape, method="last", target=Target("blocks", len(GONE)), keep=KEEP)


def copy(source: Path, out: Path, wanted: int) -> None:
    """Read and write `wanted` bytes in one thread, and flush them to the disk: what no writer can do without."""
    buffer = memoryview(bytearray(8 << 20))
    with out.open("wb", buffering=0) as target:
        for shard in sorted(source.glob("*.safetensors")):
            with shard.open("rb", buffering=0) as file:
                while wanted and (count := file.readinto(buffer[: min(wanted, len(buffer))])):
                    wanted -= target.write(buffer[:count])
        os.fsync(target.fileno())
    assert not wanted


def test_a_large_depth_pruned_checkpoint(benchmark, source: Path, plan: Plan, tmp_path: Path, timed: bool):
    benchmark.group = "checkpoint: depth-pruned, 2 GiB in shards"
    ours, plain = tmp_path / "pruned", tmp_path / "copy"

    def clean() -> None:
        shutil.rmtree(ours, ignore_errors=True)
        plain.unlink(missing_ok=True)

    def seconds(write) -> float:
        clean()
        start = perf_counter()
        write()
        return perf_counter() - start

    benchmark.pedantic(checkpoint.write, args=(source, plan, ours), setup=clean, rounds=1)
    before, after = tensorfile.in_folder(source), tensorfile.in_folder(ours)
    wanted = sum(one.end - one.start for one in after.values())
    for name, one in after.items():
        was = layout.slices(sources.from_folder("large", source).shape, plan.keep)[name].source
        if not timed or "norm" in name:
            assert same_bytes(one, before[was]), name
    times: dict[str, list[float]] = {"ours": [], "copy": []}
    calls = {"ours": lambda: checkpoint.write(source, plan, ours), "copy": lambda: copy(source, plain, wanted)}
    for pair in range(PAIRS if timed else 1):
        for name in list(calls) if pair % 2 else reversed(calls):
            times[name].append(round(seconds(calls[name]), 2))
    clean()
    of_a_copy = round(ratio(times["ours"], times["copy"]), 2)
    benchmark.extra_info.update(kept_bytes=wanted, of_a_copy=of_a_copy, **times)
    if timed:
        assert wanted > 1.4 * (1 << 30)
        assert of_a_copy <= MOST_OF_A_COPY, times


def same_bytes(one: tensorfile.Stored, other: tensorfile.Stored) -> bool:
    return b"".join(map(bytes, tensorfile.cut(one))) == b"".join(map(bytes, tensorfile.cut(other)))


# The peak of a bare interpreter is taken before anything of ours is imported: what is imported counts. Not by
# getrusage, whose peak a child inherits from the process that started it.
MEASURED = """
import re, sys
def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) * 1024
bare = peak()
from pathlib import Path
from shortllama import checkpoint
from shortllama.plans import read_plan
source, plan, out = map(Path, sys.argv[1:])
checkpoint.write(source, read_plan(plan), out)
print(peak() - bare)
assert "torch" not in sys.modules
"""


def test_memory_of_writing_it(benchmark, source: Path, plan: Plan, tmp_path: Path):
    benchmark.group = "checkpoint: depth-pruned, 2 GiB in shards"
    write_plan(tmp_path / "plan.json", plan)
    done = benchmark.pedantic(
        subprocess.run,
        args=([sys.executable, "-c", MEASURED, source, tmp_path / "plan.json", tmp_path / "pruned"],),
        kwargs={"capture_output": True, "text": True, "check": False, "env": {**os.environ, "PYTHONPATH": str(ROOT)}},
        rounds=1,
    )
    shutil.rmtree(tmp_path / "pruned", ignore_errors=True)
    assert done.returncode == 0, done.stderr
    benchmark.extra_info["peak_bytes"] = int(done.stdout)
    assert int(done.stdout) < MOST_MEMORY
