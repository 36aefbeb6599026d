"""Ceilings: what is measured, what a figure means, where it is kept and who carries it; the command itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import ceilings, environment, peaks
from bench.measurement import Environment
from bench.peaks import Answer, Ask, Ceilings, Figure, Planned, Probe
from bench.timing import Estimate
from shortllama.errors import InputError

MIB = 1 << 20
HERE = Environment("e" * 16, {"device": "some CPU", "threads": 2, "kind": "cpu"}, {"date": "2026-01-02T03:04:05"})


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "shortllama" / "ceilings"


def figure(kind: peaks.Kind, way: str, value: float, size: int = 1) -> Figure:
    return Figure(kind, way, size, value, value * 0.9, value * 1.1, 10)


DOCUMENT = Ceilings(
    HERE, 32 * MIB,
    (
        figure("read", "float32", 8e9), figure("read", "int64", 9e9), figure("copy", "float32", 7e9),
        figure("cache-read", "float32", 8e10), figure("launch", "eager", 4e-6),
        figure("matrix", "float32", 1e11, 512), figure("matrix", "float32", 2e11, 1024),
        figure("gemv-out", "float32", 1e10, 4096), figure("gemv-in", "float32", 5e9, 4095),
    ),
    {"launch graph": "a CPU captures no graphs"}, 30.0,
)  # fmt: skip


# -- what is measured -------------------------------------------------------------------------------------------------


@given(st.sampled_from(["cpu", "cuda"]), st.none() | st.integers(MIB, 512 * MIB), st.integers(64 * MIB, 64 << 30))
def test_tensors_of_memory_exceed_the_cache_and_fit_in_what_is_free(kind: str, cache: int | None, free: int) -> None:
    for probe in peaks.probes(kind, cache, free):
        if probe.kind in ("read", "copy"):
            assert probe.size * (2 if probe.kind == "copy" else 1) <= free / 4
            assert probe.size > (cache or peaks.WITHOUT_CACHE)
        if probe.kind in ("cache-read", "cache-copy"):
            assert cache is not None
            assert probe.size * (2 if probe.kind == "cache-copy" else 1) <= cache / 2
            assert probe.size % 8 == 0


def test_widths_are_odd_and_aligned_both_ways() -> None:
    found = peaks.probes("cpu", 32 * MIB, 16 << 30)
    for kind in ("gemv-out", "gemv-in"):
        widths = [one.size for one in found if one.kind == kind]
        assert {1, 2, 8, 32, 64, 4096} <= {width & -width for width in widths}
        assert all(one.work == 4 * 4096 * one.size for one in found if one.kind == kind)
    assert {one.way for one in peaks.probes("cuda", 50 * MIB, 60 << 30) if one.kind == "launch"} == {"eager", "graph"}


def test_matrices_for_one_token_leave_the_cache_between_turns() -> None:
    probe = Probe("gemv-out", "float32", 4096, 4 * 4096 * 4096)
    assert peaks.copies(probe, 32 * MIB) * probe.work >= 4 * 32 * MIB
    assert peaks.copies(probe, 1) == 1


def test_a_rate_turns_the_interval_of_its_time_around() -> None:
    seconds = Estimate(2.0, 1.0, 4.0, 9)
    assert peaks.figure(Probe("read", "float32", 8, 8), seconds) == Figure("read", "float32", 8, 4.0, 2.0, 8.0, 9)
    assert peaks.figure(Probe("launch", "eager", 1, 1), seconds) == Figure("launch", "eager", 1, 2.0, 1.0, 4.0, 9)
    short = peaks.figure(Probe("read", "float32", 8, 8), Estimate(2.0, None, None, 3))
    assert (short.low, short.high) == (None, None)


def test_peaks_are_the_best_of_every_size_and_way() -> None:
    found = peaks.peaks(DOCUMENT)
    assert (found.read, found.copy, found.cache_read) == (1e10, 7e9, 8e10)
    assert (found.flops, found.launch_s) == ({"float32": 2e11}, {"eager": 4e-6})
    assert (found.cache_bytes, found.date) == (32 * MIB, "2026-01-02")


# -- a CPU's cache ----------------------------------------------------------------------------------------------------


def plant(root: Path, cpu: int, index: int, level: int, kind: str, size: str, shared: str) -> None:
    folder = root / f"cpu{cpu}" / "cache" / f"index{index}"
    folder.mkdir(parents=True)
    for name, text in (("level", level), ("type", kind), ("size", size), ("shared_cpu_list", shared)):
        (folder / name).write_text(f"{text}\n")


def test_the_cache_is_that_of_the_clusters_that_threads_reach(tmp_path: Path) -> None:
    for cpu in range(4):
        plant(tmp_path, cpu, 0, 1, "Instruction", "32K", str(cpu))
        plant(tmp_path, cpu, 1, 2, "Unified", "1M", str(cpu))
        plant(tmp_path, cpu, 2, 3, "Unified", "16384K", "0-1" if cpu < 2 else "2-3")
    assert ceilings.last_level_cache(tmp_path, range(4), 4) == 32 * MIB
    assert ceilings.last_level_cache(tmp_path, range(4), 1) == 16 * MIB
    assert ceilings.last_level_cache(tmp_path, range(2), 4) == 16 * MIB
    assert ceilings.last_level_cache(tmp_path, [7], 1) is None
    (tmp_path / "cpu0/cache/index2/size").write_text("?\n")
    assert ceilings.last_level_cache(tmp_path, [0], 1) == MIB


# -- kept, and carried ------------------------------------------------------------------------------------------------


def test_later_runs_of_the_machine_carry_its_ceilings(state: Path) -> None:
    here = environment.measured(environment.machine("cpu"), 1)
    assert peaks.FACT not in here.facts
    kept = peaks.remember(msgspec.structs.replace(DOCUMENT, environment=here))
    assert kept == state / f"{here.id}.json"
    assert peaks.read(kept).environment.id == here.id
    later = environment.measured(environment.machine("cpu"), 1)
    dated = msgspec.structs.replace(peaks.peaks(DOCUMENT), date=here.facts["date"][:10])
    assert (later.id, peaks.of(later)) == (here.id, dated)
    assert peaks.of(environment.measured(environment.machine("cpu"), 2)) is None, "other threads, other ceilings"
    assert len(msgspec.json.encode(later)) < 4096


def test_a_broken_document_is_named_with_the_way_out(state: Path) -> None:
    here = environment.measured(environment.machine("cpu"), 1)
    state.mkdir(parents=True)
    (state / f"{here.id}.json").write_text("{")
    with pytest.raises(InputError, match=r"delete it to go on without ceilings"):
        environment.measured(environment.machine("cpu"), 1)


def test_a_state_folder_that_cannot_be_made_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    with pytest.raises(InputError, match="set XDG_STATE_HOME"):
        peaks.remember(DOCUMENT)


# -- measuring --------------------------------------------------------------------------------------------------------


def test_each_kind_is_measured_by_real_work(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.passes import ceilings as measuring

    monkeypatch.setattr(measuring, "SECONDS", 0.02)
    probes = (
        Probe("read", "int64", MIB, MIB), Probe("cache-copy", "float32", MIB, 2 * MIB),
        Probe("matrix", "float32", 128, 2 * 128**3), Probe("gemv-in", "float32", 65, 65 * 4096 * 4),
        Probe("launch", "eager", 1, 1),
    )  # fmt: skip
    found = list(measuring.answers(probes, Ask("cpu", 1, MIB, 1 << 30)))
    assert [one.index for one in found] == list(range(len(probes)))
    for one in found:
        assert one.figure is not None
        assert one.figure.low is not None
        assert one.figure.high is not None
        assert one.figure.low <= one.figure.value <= one.figure.high
    launch = found[-1].figure
    assert launch is not None
    assert 1e-8 < launch.value < 1e-3, "seconds of one operation, not of all that were timed together"


def test_what_a_device_cannot_do_is_a_reason_and_slow_products_end_the_series(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from bench.passes import ceilings as measuring

    monkeypatch.setattr(measuring, "SECONDS", 0.02)
    monkeypatch.setattr(measuring, "TOO_LONG_S", 0.0)
    probes = (Probe("read", "float32", 1 << 60, 1), Probe("matrix", "float32", 8, 1), Probe("matrix", "float32", 16, 1))
    first, second, third = measuring.answers(probes, Ask("cpu", 1, MIB, 1 << 30))
    assert first.figure is None
    assert "allocate" in first.reason
    assert second.figure is not None
    assert (third.figure, third.reason) == (None, "a smaller product took long already")
    assert not torch.is_inference_mode_enabled()


def test_a_cuda_device_is_asked_for_its_cache_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch says of the device decides what is measured; the probes themselves need one."""
    import torch

    from bench.passes import ceilings as measuring

    properties = type("Properties", (), {"L2_cache_size": 50 * MIB})()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (64 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(measuring, "answers", lambda plan, ask: iter([Answer(0, None, f"{ask.cache_bytes}")]))
    sent: list[peaks.Message] = []
    measuring.run(Ask("cuda:0", torch.get_num_threads(), None, 0), sent.append)
    assert sent == [Planned(peaks.probes("cuda", 50 * MIB, 64 << 30), 50 * MIB), Answer(0, None, str(50 * MIB))]


def test_reasons_say_what_is_missing() -> None:
    plan = Planned((Probe("matrix", "float16", 512, 1),), None)
    found = ceilings.reasons(plan, [Answer(0, None, "no such kernel")], "cpu")
    assert found["matrix float16 512"] == "no such kernel"
    assert {"read", "cache-read", "launch graph"} <= found.keys()
    assert "launch graph" not in ceilings.reasons(plan, [], "cuda")


def test_the_table_says_every_kind_and_width() -> None:
    said = "\n".join(ceilings.lines(DOCUMENT)).replace("\u00a0", " ")
    for part in ("32.0 MiB", "9.00 GB/s", "80.0 GB/s", "200 GFLOP/s", "4.00 µs", "4095 inputs", "launch graph: a CPU"):
        assert part in said, part


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_measures_this_machine_and_keeps_it(tmp_path: Path, state: Path, run_command: Callable) -> None:
    done = run_command("ceilings", "--device", "cpu", "--out", tmp_path / "c.json", "--json")
    assert done.returncode == 0, done.stderr
    found = peaks.read(tmp_path / "c.json")
    assert json.loads(done.stdout) == json.loads((tmp_path / "c.json").read_text())
    (kept,) = state.glob("*.json")
    assert kept.read_bytes() == (tmp_path / "c.json").read_bytes()
    known = peaks.peaks(found)
    assert known.read > 1e8
    assert known.flops["float32"] > 1e8
    assert {one.kind for one in found.figures} >= {"read", "copy", "matrix", "gemv-out", "gemv-in", "launch"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--device", "rtx3090"), "is not at hand"),
        (("--device", "cuda:7"), "device cuda:7"),
        (("--device", "tpu"), "is unknown"),
        (("--device", "cpu", "--out", "no/such/folder.json"), "there is no folder"),
        (("--device", "cpu", "--out", "."), "is a folder"),
    ],
)
def test_mistakes_are_one_line(run_command: Callable, tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    done = run_command("ceilings", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
