"""The doctor: planted facts give the finding, its cause and what to try; what was not seen is never called fine."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from bench import ab, diagnosis, doctor, environment, experiment, noise, store, vitals
from bench.cells import Cell
from bench.diagnosis import Facts, Finding, Gpu, Sampler
from bench.measurement import SessionId
from tests.test_comparison import row, session

CPU = Facts(
    "cpu", cores=4, threads=2, load=0.3, busy={}, stolen=0.0, swapped=False, governors=frozenset({"performance"}),
    boost=False, throttled=3, throttled_now=False, wait_policy="passive", noise=0.02, ceilings=True,
    sampler=Sampler(0.005, 0.001, -0.01, 0.012),
)  # fmt: skip
GPU = Gpu(
    others=[], slowed=frozenset(), clocks_chosen=False, power_limit=700.0, power_default=700.0, temperature_c=40,
    persistence=True, ecc=True, ecc_errors=0, mig=False,
)  # fmt: skip


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "shortllama"


def examined(**changes: Any) -> dict[str, Finding]:
    return {one.check: one for one in diagnosis.examine(msgspec.structs.replace(CPU, **changes))}


def on_gpu(**changes: Any) -> dict[str, Finding]:
    return examined(kind="cuda", gpu=msgspec.structs.replace(GPU, **changes))


def test_a_quiet_machine_is_fine() -> None:
    assert {one.state for one in examined().values()} == {"fine"}
    assert {one.state for one in on_gpu().values()} == {"fine"}
    assert on_gpu().keys() - examined().keys() == {"exclusivity", "limits", "persistence", "ECC and MIG"}


@pytest.mark.parametrize(
    ("check", "changes", "seen", "remedy"),
    [
        ("load", {"load": 4.0}, "load 4.00 on 4 cores", "uptime"),
        ("load", {"load": 2.5, "busy": {"cc (7)": 0.9}}, "cc (7) 90%", "end it"),
        ("steal", {"stolen": 0.03}, "3.0% of CPU time", "ab --pairs"),
        ("memory", {"swapped": True}, "swapped", "free -h"),
        ("governor", {"governors": frozenset({"powersave"}), "boost": True}, "powersave; boost on", "cpupower"),
        ("throttling", {"throttled_now": True}, "3 times since the machine started, and right now", "fans"),
        ("threads", {"threads": 8}, "8 compute threads on 4 cores", "OMP_NUM_THREADS=4"),
        ("threads", {"wait_policy": "active"}, "OMP_WAIT_POLICY=active", "unset OMP_WAIT_POLICY"),
        (
            "allocator and kernel settings",
            {"variables": {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}},
            "expandable_segments",
            "unset PYTORCH_ALLOC_CONF",
        ),
        ("allocator and kernel settings", {"variables": {"CUDA_LAUNCH_BLOCKING": "1"}}, "=1", "unset CUDA_LAUNCH"),
        ("sampler", {"sampler": Sampler(0.03, 0.0, -0.1, 0.1)}, "3.0% of one core", "--no-telemetry"),
        ("sampler", {"sampler": Sampler(0.001, 0.05, 0.03, 0.07)}, "+5.0% longer", "--no-telemetry"),
    ],
)  # fmt: skip
def test_trouble_on_a_host_is_named(check: str, changes: dict[str, Any], seen: str, remedy: str) -> None:
    found = examined(**changes)
    assert found[check].state == "trouble"
    assert seen in found[check].seen
    assert remedy in found[check].remedy
    assert found[check].cause
    assert [one.check for one in found.values() if one.state != "fine"] == [check]


@pytest.mark.parametrize(
    ("check", "changes", "seen", "remedy"),
    [
        ("exclusivity", {"others": [41, 42]}, "processes 41, 42", "ps -p 41"),
        ("throttling", {"slowed": frozenset({"hw_slowdown"})}, "hw_slowdown in every reading", "PERFORMANCE"),
        ("throttling", {"temperature_c": 90}, "90 °C", "let it cool"),
        ("limits", {"clocks_chosen": True}, "clocks were set", "--reset-gpu-clocks"),
        ("limits", {"power_limit": 300.0}, "300 of 700 W", "--power-limit"),
        ("persistence", {"persistence": False}, "off", "--persistence-mode=1"),
        ("ECC and MIG", {"ecc_errors": 2}, "2 uncorrected", "ECC"),
        ("ECC and MIG", {"mig": True}, "MIG on", "shortllama ceilings"),
    ],
)
def test_trouble_on_a_device_is_named(check: str, changes: dict[str, Any], seen: str, remedy: str) -> None:
    found = on_gpu(**changes)
    assert found[check].state == "trouble"
    assert seen in found[check].seen
    assert remedy in found[check].remedy
    assert [one.check for one in found.values() if one.state != "fine"] == [check]


def test_what_was_not_seen_is_not_called_fine() -> None:
    blind = diagnosis.examine(Facts("cuda", 4, 2, 0.1, gpu=Gpu(), sampler=Sampler(None, reason="died")))
    states = {one.check: one.state for one in blind}
    assert states.pop("load") == states.pop("threads") == states.pop("allocator and kernel settings") == "fine"
    assert set(states.values()) == {"unknown"}
    assert {"exclusivity", "throttling", "limits", "persistence", "ECC and MIG", "sampler", "noise", "ceilings"} <= (
        states.keys()
    )


def test_a_gpus_host_may_be_busy_as_long_as_a_core_is_free() -> None:
    busy = {"load": 2.5, "busy": {"cc (7)": 0.9}}
    assert examined(**busy)["load"].state == "trouble"
    assert examined(**busy, kind="cuda", gpu=GPU)["load"].state == "fine"


# -- gathering --------------------------------------------------------------------------------------------------------


def test_the_kernels_files_are_read(tmp_path: Path) -> None:
    assert (vitals.governors(tmp_path), vitals.boost(tmp_path), vitals.throttle_count(tmp_path)) == (None, None, None)
    for name, text in {
        "cpu0/cpufreq/scaling_governor": "performance", "cpu11/cpufreq/scaling_governor": "powersave",
        "intel_pstate/no_turbo": "1", "cpu0/thermal_throttle/core_throttle_count": "4",
        "cpu0/thermal_throttle/package_throttle_count": "5", "cpu0/thermal_throttle/core_throttle_max_time_ms": "9",
    }.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    assert vitals.governors(tmp_path) == {"performance", "powersave"}
    assert vitals.boost(tmp_path) is False
    assert vitals.throttle_count(tmp_path) == 9


class Refused(Exception):
    """NVML's error."""


def library(reasons: list[int], **answers: Any) -> Any:
    """NVML with these answers; anything else is refused or missing."""
    left = list(reasons)

    def refuse(*_: Any) -> Any:
        raise Refused

    names = ("nvmlDeviceGetEccMode", "nvmlDeviceGetTotalEccErrors", "nvmlDeviceGetPersistenceMode")
    constants = ("NVML_TEMPERATURE_GPU", "NVML_MEMORY_ERROR_TYPE_UNCORRECTED", "NVML_VOLATILE_ECC")
    given = {name: (lambda *_, value=value: value) for name, value in answers.items()}
    return SimpleNamespace(
        NVMLError=Refused, nvmlDeviceGetCurrentClocksEventReasons=lambda _: left.pop(0),
        **dict.fromkeys(names, refuse) | dict.fromkeys(constants, 0) | given,
    )  # fmt: skip


def test_only_what_holds_in_every_reading_persists() -> None:
    slept: list[float] = []
    nvml = library([8 | 64 | 2, 8 | 2, 8 | 1 | 2, 8 | 2, 8 | 2], nvmlDeviceGetEnforcedPowerLimit=350_000)
    found = vitals.gpu(nvml, None, [3], slept.append)
    assert (found.slowed, found.clocks_chosen) == ({"hw_slowdown"}, True)
    assert (found.others, found.power_limit, found.power_default) == ([3], 350.0, None)
    assert (found.ecc, found.mig, found.persistence, found.temperature_c) == (None, None, None, None)
    assert sum(slept) == pytest.approx(0.8)
    on = vitals.gpu(
        library([0] * 5, nvmlDeviceGetEccMode=[1, 1], nvmlDeviceGetMigMode=[0, 0]), None, None, slept.append
    )
    assert (on.slowed, on.clocks_chosen, on.ecc, on.mig) == (frozenset(), False, True, False)


def test_this_machine_is_gathered() -> None:
    found = vitals.gather(environment.machine("cpu"))
    assert found.cores >= 1
    assert found.busy is not None
    assert (found.gpu, found.noise, found.ceilings) == (None, None, False)
    assert found.sampler is not None
    assert found.sampler.cpu_share is not None
    assert found.sampler.low is not None
    assert found.sampler.high is not None
    assert found.sampler.low <= (found.sampler.slower or 0) <= found.sampler.high


# -- identical code ---------------------------------------------------------------------------------------------------


def test_the_selftest_runs_the_gate_on_one_tree_and_keeps_the_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    source = random.Random(0)
    asked: list[tuple[Path, int]] = []
    machine = environment.machine("cpu")
    here = environment.measured(machine, environment.threads())

    def run(self: Any, root: Path, cells: list[Cell]) -> store.Results:
        asked.append((root, len(cells)))
        rows = [
            msgspec.structs.replace(row(cell, session(source, 1.0, between=0.02)), session=SessionId(str(len(asked))))
            for cell in cells
        ]
        return store.Results(Path("run"), {}, tuple(rows), ())

    monkeypatch.setattr(ab.Sessions, "run", run)
    found = doctor.selftest(machine, 4)
    assert len(asked) == 8
    assert set(asked) == {(doctor.sides.HERE, 1)}
    assert found.pairs == 4
    assert found.verdict in ("equivalent", "inconclusive")
    assert (found.noise.sessions, found.noise.cells) == (8, 1)
    assert 0.005 < found.noise.between < 0.05
    assert Path(found.kept) == noise.file()
    later = environment.measured(machine, environment.threads())
    assert later.id == here.id
    assert later.facts[noise.BETWEEN_FACT] == pytest.approx(found.allowance)
    assert vitals.environment.measured(machine, environment.threads()).facts.keys() > here.facts.keys()


def test_noise_is_kept_under_the_id_that_runs_have() -> None:
    """The environment of an experiment carries its design in its facts, which are no part of its id."""
    here = environment.measured(environment.machine("cpu"), 1)
    assert experiment.signed(here, experiment.Design("id", "a", "b")).id == here.id


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command_reports_and_changes_nothing(run_command: Callable, state: Path) -> None:
    done = run_command("doctor", "--device", "cpu", "--json", OMP_NUM_THREADS="64")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    by_check = {one["check"]: one for one in found["findings"]}
    assert by_check["threads"]["state"] == "trouble"
    assert by_check["ceilings"]["remedy"] == "shortllama ceilings"
    assert found["selftest"] is None
    assert not state.exists()


@pytest.mark.slow
def test_the_command_measures_the_noise_of_this_machine(run_command: Callable, state: Path) -> None:
    done = run_command("doctor", "--device", "cpu", "--aa", "2", timeout=500)
    assert done.returncode == 0, done.stderr
    assert "identical code, 2 pairs: " in done.stdout
    assert (state / "noise.json").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--aa", "1"), "give 2 to 99 pairs"),
        (("--device", "rtx3090"), "is not at hand"),
        (("--device", "cuda:9"), "device cuda:9"),
    ],
)
def test_mistakes_are_one_line(run_command: Callable, arguments: tuple[str, ...], words: str) -> None:
    done = run_command("doctor", *arguments)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert words in done.stderr
