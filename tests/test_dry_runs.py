"""Predictions by a measured run: what carries over to which device, what is refused, and what a dry run then says."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from bench import calibrated, devices, dry_runs, memory, peaks, prediction, schedule, store
from bench.calibrated import Calibration
from bench.cells import Cell, Suite
from bench.environment import Machine
from bench.fitting import Error
from bench.measurement import Environment, Measurement, Samples, SessionId, environment
from bench.peaks import Peaks
from bench.prediction import Overheads
from shortllama import catalogue
from shortllama.errors import InputError

TRUTH = Overheads(0.6, 5e-4, 0.0)
H100 = environment({"simulated": False, "kind": "cuda", "device": "NVIDIA H100 80GB HBM3"}, {})
PEAKS = Peaks(1e10, 1e10, {"float16": 1e11}, {"eager": 4e-6}, 32 << 20, 1e11)
CPU = environment(
    {"simulated": False, "kind": "cpu", "device": "some CPU"}, {peaks.FACT: msgspec.to_builtins(PEAKS)}
)  # fmt: skip
ON_CPU = Machine("cpu", "cpu", "some CPU", devices.lookup("cpu"))
SUITE = Suite("shortllama.suite/1", ("llama-7b",), runtimes=("eager", "static"), batch=(1, 64))


def simulated(name: str = "rtx3090") -> Machine:
    return Machine("simulated", name, devices.lookup(name).name, devices.lookup(name))


def write(folder: Path, where: Environment, device: devices.Device, noise: float = 0.0, **more: object) -> Path:
    """A run whose cells take what TRUTH predicts on `device`."""
    folder.mkdir()
    source = random.Random(0)
    with store.Writer(folder) as writer:
        writer.write(where)
        for subject in ("llama-7b", "llama-7b/depth-26", "llama-7b/depth-21"):
            for batch in (1, 16, 256):
                cell = Cell(subject, "eager", "float16", "sdpa", 12, 32, "none", batch)
                call = prediction.call_s(catalogue.lookup(subject), cell, device, TRUTH) * math.exp(
                    source.gauss(0, noise)
                )
                row = Measurement(cell, cell.id, where.id, "ok", False, SessionId("s"), samples=Samples((call,) * 6))
                writer.write(msgspec.structs.replace(row, **more))
    return folder


def test_factors_of_one_gpu_predict_another_by_its_datasheet(tmp_path: Path) -> None:
    run = write(tmp_path / "run", H100, devices.lookup("h100"))
    found = calibrated.read(run, simulated())
    assert found.factors[("eager", "float16")].efficiency == pytest.approx(TRUTH.efficiency, rel=1e-4)
    assert found.device == devices.lookup("rtx3090")
    assert found.unseen is not None
    assert found.unseen.worst == pytest.approx(1, abs=1e-3)
    plan = schedule.plan(SUITE, found.device, factors=found.factors)
    for one in plan.planned():
        own = TRUTH if one.cell.runtime == "eager" else None
        wanted = prediction.call_s(catalogue.lookup("llama-7b"), one.cell, found.device, own)
        assert one.call_s == pytest.approx(wanted, rel=1e-4)
    said = dry_runs.lines(plan, found)[-1].replace("\u00a0", " ")
    assert said.startswith(
        "times by 9 cells measured on NVIDIA H100 80GB HBM3; on cells left out of the fit within 1.00"
    )
    assert said.endswith("static by the shipped factors")


def test_a_cpu_is_predicted_by_its_own_ceilings(tmp_path: Path) -> None:
    run = write(tmp_path / "run", CPU, PEAKS.device(devices.lookup("cpu")))
    found = calibrated.read(run, ON_CPU)
    assert (found.device.bandwidth, found.device.memory_bytes) == (1e10, ON_CPU.device.memory_bytes)
    assert found.factors[("eager", "float16")].block_s == pytest.approx(TRUTH.block_s, rel=1e-3)


def test_what_does_not_carry_over_is_refused(tmp_path: Path) -> None:
    gpu = write(tmp_path / "gpu", H100, devices.lookup("h100"))
    cpu = write(tmp_path / "cpu", CPU, PEAKS.device(devices.lookup("cpu")))
    other = environment({"simulated": False, "kind": "cuda", "device": "Tesla T4"}, {})
    unknown = write(tmp_path / "unknown", other, devices.lookup("h100"))
    scripted = write(tmp_path / "scripted", H100, devices.lookup("h100"), simulated=True)
    changed = write(tmp_path / "changed", H100, devices.lookup("h100"), subject_digest="0" * 16)
    for run, machine, words in (
        (gpu, ON_CPU, "a GPU's factors say nothing of some CPU"),
        (cpu, simulated(), "a CPU's factors say nothing of NVIDIA GeForce RTX 3090"),
        (cpu, msgspec.structs.replace(ON_CPU, name="another CPU"), "say nothing of another CPU"),
        (unknown, simulated(), "the device table lacks"),
        (scripted, simulated(), "no cell of it was measured"),
        (changed, simulated(), "it has 0 in all"),
    ):
        with pytest.raises(InputError, match=words):
            calibrated.read(run, machine)


def test_the_largest_batch_is_the_memory_models(tmp_path: Path) -> None:
    plan = schedule.plan(SUITE, devices.lookup("rtx3090"))
    shape, limit = catalogue.lookup("llama-7b"), devices.lookup("rtx3090").memory_bytes
    for group, one in zip(plan.groups, dry_runs.document(plan, None)["frontiers"], strict=True):
        largest = one["largest_batch"]
        runtime = group.key.runtime
        assert memory.predict(shape, runtime, "float16", largest, 12, 128) <= limit
        assert memory.predict(shape, runtime, "float16", largest + 1, 12, 128) > limit
        assert one["limit_bytes"] == limit


def test_the_document_says_what_predicted_it() -> None:
    by = Calibration({("eager", "float16"): TRUTH}, devices.lookup("h100"), "X", 9, Error(1.1, 1.2, 0.9, 9))
    plan = schedule.plan(SUITE, by.device, factors=by.factors)
    found = json.loads(msgspec.json.encode(dry_runs.document(plan, by)))
    assert found["calibration"]["factors"] == [
        {"runtime": "eager", "dtype": "float16", **msgspec.structs.asdict(TRUTH)}
    ]
    assert found["calibration"]["error_on_unseen_cells"]["typical"] == 1.1
    assert dry_runs.document(plan, None)["calibration"] is None


def test_the_command_predicts_by_a_run(tmp_path: Path, run_command: Callable) -> None:
    run = write(tmp_path / "run", H100, devices.lookup("h100"), noise=0.05)
    suite = tmp_path / "s.toml"
    suite.write_text('schema = "shortllama.suite/1"\nsubjects = ["llama-7b"]\nbatch = [1, 100000]\n')
    base = ("sweep", suite, "--device", "rtx3090", "--calibrated-by", run)
    done = run_command(*base, "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [one["expected"] for one in found["cells"]] == ["ok", "oom"]
    assert found["cells"][1]["tokens_per_s"] is None
    assert found["calibration"]["cells"] == 9
    for arguments, words in (
        ((*base, "--runtime", "roofline"), "add --dry-run"),
        ((*base[:-1], tmp_path / "none", "--dry-run"), "cannot be read"),
    ):
        done = run_command(*arguments)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert words in done.stderr


def test_shapes_are_of_what_is_here_and_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(calibrated.sources, "_from_hub", lambda name: asked.append(name))

    def row(subject: str, digest: str | None = None) -> Measurement:
        cell = Cell(subject, "eager", "float16", "sdpa", 12, 16, "none", 1)
        return Measurement(cell, cell.id, "e", "ok", False, SessionId("s"), subject_digest=digest)

    names = (
        "reference",
        "reference/ppl:0.25",
        "llama-7b/depth:26",
        "owner/model",
        "owner/model/depth:2",
        "x\0y",
        "z" * 999,
    )
    rows = [*map(row, names), row("llama-7b", "0" * 16), row("llama-13b", catalogue.lookup("llama-13b").digest())]
    assert list(calibrated.shapes(rows)) == [*names[:3], "llama-13b"]
    assert asked == [], "a report asks nobody"
