"""Threads, devices and fingerprints of the machine at hand."""

from __future__ import annotations

import os

import pytest

from bench import environment, nvml, schedule
from bench.cells import BatchRange, Suite
from shortllama.errors import InputError


def test_threads_are_the_cores_we_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert 1 <= environment.threads() <= len(os.sched_getaffinity(0))
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert environment.threads() == 3


def test_threads_respect_the_affinity_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    assert environment.threads() == 1


@pytest.mark.parametrize("text", ["0", "two", "-1"])
def test_a_bad_thread_count_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    with pytest.raises(InputError, match="OMP_NUM_THREADS"):
        environment.threads()


def test_the_fingerprint_tells_threads_and_allocators_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    here = environment.machine("cpu")
    one, two = environment.measured(here, 1), environment.measured(here, 2)
    assert one.id == environment.measured(here, 1).id
    assert one.id != two.id
    assert environment.differences(one, two) == "threads: 1 -> 2"
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    assert environment.measured(here, 1).id != one.id
    assert one.facts["date"] >= "2020"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("AMD EPYC 9654 96-Core Processor", "amd-epyc-9654"),
        ("Intel(R) Xeon(R) CPU E5-2690 v4 @ 2.60GHz", "intel-xeon-e5-2690-v4"),
        ("NVIDIA H100 80GB HBM3", "h100-80gb-hbm3"),
        ("???", "unknown"),
    ],
)
def test_device_names_become_folder_names(name: str, expected: str) -> None:
    assert environment.slug(name) == expected


@pytest.mark.parametrize("name", ["cuda:99", "rtx3009", "tpu"])
def test_an_unknown_device_is_refused(name: str) -> None:
    with pytest.raises(InputError):
        environment.machine(name)


# -- a machine with a GPU, played by a double -------------------------------------------------------------------------

CARDS = {
    "NVIDIA H100 80GB HBM3": 85_520_809_984,
    "NVIDIA GeForce RTX 4080": 17_171_480_576,
}


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch):
    """Return install(name): from then on this machine has one such card, and a torch with CUDA."""

    def install(name: str, torch: str = "2.13.0+cu130") -> None:
        found = {"name": name, "memory_bytes": CARDS[name], "driver": "580.1", "power_limit_w": 700.0}
        monkeypatch.setattr(nvml, "devices", lambda: [found])
        monkeypatch.setattr(environment, "_version", lambda package: torch if package == "torch" else "1")

    return install


def test_a_cuda_device_is_taken_where_there_is_one(card) -> None:
    card("NVIDIA H100 80GB HBM3")
    found = environment.machine(None)
    assert (found.kind, found.place, found.slug) == ("cuda", "cuda:0", "h100-80gb-hbm3")
    assert (found.device.short, found.device.memory_bytes) == ("h100", CARDS[found.name])
    assert environment.machine("cpu").kind == "cpu"
    fingerprint = environment.measured(found, 4).fingerprint
    assert (fingerprint["device"], fingerprint["driver"], fingerprint["power_limit_w"]) == (found.name, "580.1", 700.0)


def test_a_cuda_device_outside_the_table_has_its_memory_and_no_peaks(card) -> None:
    card("NVIDIA GeForce RTX 4080")
    found = environment.machine("cuda:0")
    assert found.device.memory_bytes == CARDS[found.name]
    assert found.device.nominal
    suite = Suite(schema="shortllama.suite/1", subjects=("llama-7b",), batch=BatchRange(), budgets=("none", "8GiB"))
    planned = list(schedule.plan(suite, found.device).planned())
    assert {one.expected for one in planned} >= {"ok", "oom"}
    assert {one.call_s for one in planned if one.expected == "ok"} == {None}


def test_a_torch_without_cuda_falls_back_and_says_so(card) -> None:
    card("NVIDIA H100 80GB HBM3", torch="2.13.0+cpu")
    assert environment.machine(None).kind == "cpu"
    with pytest.raises(InputError, match="built without CUDA"):
        environment.machine("cuda")
