"""What is asked of NVML, on a driver that a fake plays: absent, forbidding, shared, silent."""

from __future__ import annotations

import os
import sys

import pytest
from fake_nvml import Fake

from bench import environment, nvml
from shortllama.errors import InputError


@pytest.mark.parametrize(
    ("variable", "expected"),
    [
        (None, ["0", "1", "2"]),
        ("2,0", ["2", "0"]),
        ("", []),
        ("-1", []),
        ("1,9,0", ["1"]),
        ("GPU-ab,1", ["GPU-ab", "1"]),
    ],
)
def test_visible_devices_are_read_as_cuda_reads_them(
    monkeypatch: pytest.MonkeyPatch, variable: str | None, expected: list[str]
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if variable is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    assert nvml._visible(3) == expected


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def put(fake: Fake) -> Fake:
        monkeypatch.setitem(sys.modules, "pynvml", fake)
        return fake

    return put


def test_devices_are_described_and_the_library_is_closed(install) -> None:
    fake = install(Fake())
    first, second = nvml.devices()
    assert first == second
    assert (first["name"], first["memory_bytes"], first["power_limit_w"]) == ("NVIDIA H100 80GB HBM3", 80 << 30, 700.0)
    assert nvml.used_bytes(0) == 3 << 30
    assert fake.open == 0


def test_a_question_that_a_device_refuses_is_none(install) -> None:
    install(Fake(mute=("nvmlDeviceGetEnforcedPowerLimit", "nvmlDeviceGetMigMode")))
    assert [(one["power_limit_w"], one["mig"]) for one in nvml.devices()] == [(None, None)] * 2
    install(Fake(mute=("nvmlDeviceGetMemoryInfo", "nvmlDeviceGetComputeRunningProcesses")))
    assert (nvml.devices(), nvml.used_bytes(0), nvml.other_processes(0)) == ([], None, None)


@pytest.mark.parametrize("code", [12, 9])
def test_without_a_driver_there_are_no_devices(code: int, install) -> None:
    install(Fake(init=code))
    assert (nvml.devices(), nvml.used_bytes(0), nvml.other_processes(0)) == ([], None, None)
    assert environment.machine(None).kind == "cpu"


def test_a_driver_that_forbids_is_said_in_one_line(install) -> None:
    install(Fake(init=4))
    with pytest.raises(InputError, match=r"refuses to answer \(NVML: Insufficient Permissions\).*--device cpu"):
        environment.machine(None)
    assert environment.machine("cpu").kind == "cpu"


def test_this_process_is_not_another(install) -> None:
    install(Fake(pids=(os.getpid(), 7)))
    assert nvml.other_processes(1) == [7]


def test_a_device_named_by_uuid_is_found_by_it(install, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = install(Fake())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-ab,1")
    assert [nvml.handle(fake, index) for index in (0, 1)] == ["by uuid", "by index"]
    assert len(nvml.devices()) == 2
