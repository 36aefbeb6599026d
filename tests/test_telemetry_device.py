"""Reading a device through NVML, on a fake driver and a clock that the test holds: every way in which it can fail."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
from fake_nvml import PART, UUID, Fake

from bench.telemetry import counters, device, fields, sampler
from bench.telemetry.device import Devices
from bench.telemetry.readings import PERIOD_S, Loop
from bench.telemetry.sampler import Begin, End, Reader

NVML_FIELDS = {
    "nvml_busy", "ring_busy", "ring_memory_busy", "power_w", "energy_j", "sm_clock_mhz", "temperature_c",
    "throttle_reasons", "power_violation_s", "device_used_bytes", "gpm_sm", "joules_per_token",
}  # fmt: skip


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock whose `now` the test sets: monotonic seconds, and as many as time of day plus 1.7e9."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    held = SimpleNamespace(now=1000.0)
    day = 1.7e9
    played = SimpleNamespace(
        monotonic=lambda: held.now,
        time=lambda: held.now + day,
        time_ns=lambda: int((held.now + day) * 1e9),
        process_time=lambda: 0.004 * held.now,
    )
    for module in (device, counters, sampler):
        monkeypatch.setattr(module, "time", played)
    held.day = played.time
    return held


def telemetry(
    clock: SimpleNamespace, fake: Fake | str, seconds: float = 5.0, uuid: str | None = UUID, windows: int = 1
) -> dict[str, Any]:
    """The telemetry of the last of several windows over calls that make 1000 tokens."""
    devices = Devices(fake)
    for number in range(windows):
        since = clock.now
        reader = Reader(Begin(number, 0, uuid), devices)
        while clock.now < since + seconds:
            clock.now += PERIOD_S
            reader.read()
        loop = Loop(since, clock.now, 10, 1000)
        clock.now += 0.01
        answer = reader.end(End(number, loop, 70.0))
    assert list(answer.telemetry) == [*fields.FIELDS, fields.REASONS]
    return dict(answer.telemetry)


def why(row: dict[str, Any], name: str) -> str:
    assert row[name] is None, f"{name} is {row[name]}"
    return fields.reason(row, name) or ""


def test_all_is_read_from_a_device_that_answers(clock: SimpleNamespace) -> None:
    row = telemetry(clock, Fake(clock=clock.day))
    assert (row["nvml_busy"], row["ring_busy"], row["ring_memory_busy"]) == pytest.approx((0.9, 0.9, 0.4))
    assert row["power_w"] == pytest.approx(400, rel=0.02)
    assert (row["power_max_w"], row["power_source"]) == (401, "energy counter")
    assert row["energy_disagreement"] < 0.03
    assert row[fields.ENERGY] == pytest.approx(400 * 5 / 1000, rel=0.03)
    assert row["joules_per_token_net"] == pytest.approx(330 * 5 / 1000, rel=0.03)
    assert (row["sm_clock_mhz"], row["memory_clock_mhz"], row["temperature_c"]) == (1755, 2619, 61)
    assert (row["gpm_sm"], row["gpm_tensor"], row["gpm_dram"]) == (0.8, 0.3, 0.6)
    assert (row["device_used_bytes"], row["throttle_reasons"], row["flags"]) == (3 << 30, [], [])
    assert (row["power_violation_s"], row["thermal_violation_s"]) == (0, 0)
    assert row["sampler_cpu_share"] == pytest.approx(0.004)


def test_each_window_stands_for_itself(clock: SimpleNamespace) -> None:
    fake = Fake(clock=clock.day)
    first, third = telemetry(clock, fake), telemetry(clock, fake, windows=3)
    timeless = {
        "power_w",
        "readings",
        "sampler_cpu_share",
        "energy_j",
        "energy_disagreement",
        "joules_per_token",
        "joules_per_token_net",
        "window_s",
        # Of the real host under the fake device, whose clock does not stand still and may not have moved.
        "host_busy",
        "host_busy_max",
        "cpu_mhz",
        "reasons",
    }
    assert {k: v for k, v in first.items() if k not in timeless} == {
        k: v for k, v in third.items() if k not in timeless
    }
    real = {"host_busy", "host_busy_max"}
    assert first["reasons"].keys() - real == third["reasons"].keys() - real
    assert third["energy_j"] == pytest.approx(first["energy_j"], rel=0.05)


@pytest.mark.parametrize("ring", [(0.02, 120), (0.16, 32), (0.16, 7)])
def test_a_ring_that_wraps_around_is_fetched_in_time(clock: SimpleNamespace, ring: tuple[float, int]) -> None:
    """The driver keeps 2.4 s, 5.1 s or 1.1 s of samples; they are fetched every second."""
    assert telemetry(clock, Fake(clock=clock.day, ring=ring), seconds=20.0)["ring_busy"] == pytest.approx(0.9)


def test_a_ring_that_is_overwritten_between_fetches_says_nothing(clock: SimpleNamespace) -> None:
    row = telemetry(clock, Fake(clock=clock.day, ring=(0.02, 10)))
    assert "the ring was overwritten" in why(row, "ring_busy")
    assert row["energy_j"] is not None


@pytest.mark.parametrize(
    ("missing", "fields_lost", "source"),
    [
        (("nvmlDeviceGetSamples",), ("ring_busy", "ring_memory_busy"), 400),
        (("nvmlDeviceGetSamples", "nvmlDeviceGetFieldValues"), ("ring_busy", "ring_memory_busy"), 399),
        (("nvmlDeviceGetTotalEnergyConsumption",), ("energy_j", "joules_per_token", "energy_disagreement"), 401),
        (("nvmlDeviceGetViolationStatus",), ("power_violation_s", "thermal_violation_s"), 401),
        (("nvmlDeviceGetUtilizationRates",), ("nvml_busy",), 401),
        (("nvmlGpmQueryDeviceSupport",), ("gpm_sm", "gpm_tensor", "gpm_dram"), 401),
        (("nvmlGpmMetricsGet",), ("gpm_sm", "gpm_tensor", "gpm_dram"), 401),
    ],
)
@pytest.mark.parametrize("how", ["binding", "driver", "device", "permission"])
def test_what_cannot_be_asked_is_null_and_the_rest_stands(
    clock: SimpleNamespace, missing: tuple[str, ...], fields_lost: tuple[str, ...], source: float, how: str
) -> None:
    codes = {"driver": (13, "Function Not Found"), "device": (3, "Not Supported"), "permission": (4, "Permissions")}
    if how == "binding":
        fake, said = Fake(clock=clock.day, lacks=missing), missing[0]
    else:
        code, said = codes[how]
        fake = Fake(clock=clock.day, refuse=dict.fromkeys(missing, code))
    row = telemetry(clock, fake)
    assert all(said in why(row, name) for name in fields_lost)
    assert row["power_max_w"] == source, "power is of the next source"
    assert all(row[name] is not None for name in NVML_FIELDS - {*fields_lost})


def test_a_question_without_an_answer_is_not_asked_again(clock: SimpleNamespace) -> None:
    fake = Fake(clock=clock.day, mute=("nvmlDeviceGetPowerUsage",))
    asked: list[str] = []
    real = fake.__getattr__

    def counting(name: str) -> Any:
        asked.append(name)
        return real(name)

    type(fake).__getattr__, kept = (lambda self, name: counting(name)), type(fake).__getattr__
    try:
        telemetry(clock, fake)
    finally:
        type(fake).__getattr__ = kept
    assert asked.count("nvmlDeviceGetPowerUsage") == 1
    assert asked.count("nvmlDeviceGetClockInfo") > 50


def test_events_are_read_under_their_old_name_too(clock: SimpleNamespace) -> None:
    new = "nvmlDeviceGetCurrentClocksEventReasons"
    for fake in (
        Fake(clock=clock.day, events=36, lacks=(new,)),
        Fake(clock=clock.day, events=36, refuse={new: 13}),
        Fake(clock=clock.day, events=36, lacks=("nvmlDeviceGetCurrentClocksThrottleReasons",)),
    ):
        row = telemetry(clock, fake)
        assert (row["throttle_reasons"], row["flags"]) == (["sw_power_cap", "sw_thermal_slowdown"], ["power-capped"])


def test_a_part_of_a_device_has_no_power_and_says_why(clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", PART)
    fake = Fake(clock=clock.day, part=True, uuid=PART)
    row = telemetry(clock, fake, uuid="GPU-that-cuda-gave")
    assert {why(row, name) for name in ("nvml_busy", "power_w", "energy_j", "sm_clock_mhz")} == {"NVML: Not Supported"}
    assert "Not Supported" in why(row, "gpm_sm")
    assert row["device_used_bytes"] == 3 << 30


def test_another_device_than_the_measured_one_is_never_read(clock: SimpleNamespace) -> None:
    row = telemetry(clock, Fake(clock=clock.day), uuid="GPU-elsewhere")
    assert {row[name] for name in NVML_FIELDS} == {None}
    assert why(row, "power_w") == "NVML knows no device GPU-elsewhere: Not Found"


def test_a_device_that_is_lost_in_the_window_costs_its_fields(clock: SimpleNamespace) -> None:
    row = telemetry(clock, Fake(clock=clock.day, lost_at=clock.day() + 3))
    lost = NVML_FIELDS - {"throttle_reasons"}
    assert {why(row, name).removeprefix("performance counters (GPM): ").removeprefix("NVML: ") for name in lost} == {
        "GPU is lost"
    }
    assert row["throttle_reasons"] == [], "what was seen before it was lost"
    assert row["host_busy"] is not None or why(row, "host_busy") == "the two readings are of one time"


def test_a_device_that_is_lost_before_costs_all_fields(clock: SimpleNamespace) -> None:
    row = telemetry(clock, Fake(clock=clock.day, lost_at=clock.day() - 1))
    assert {why(row, name) for name in NVML_FIELDS} == {f"NVML knows no device {UUID}: GPU is lost"}


def test_no_driver_and_a_forbidding_one_are_said(clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    for code, said in ((12, "there is no NVIDIA driver"), (4, "Insufficient Permissions")):
        monkeypatch.setitem(sys.modules, "pynvml", Fake(init=code))
        with sampler._library() as library:
            row = telemetry(clock, library)
        assert said in why(row, "power_w")
        assert said in why(row, "gpm_sm")


def test_counters_that_go_backwards_say_nothing(clock: SimpleNamespace) -> None:
    row = telemetry(clock, Fake(clock=clock.day, back_at=clock.day() + 2, violated=(0.1, 0.1)))
    for name in ("energy_j", "joules_per_token", "power_violation_s", "thermal_violation_s"):
        assert "backwards" in why(row, name)
    assert row["power_source"] == "ring"


def test_a_counter_that_power_contradicts_is_flagged(clock: SimpleNamespace) -> None:
    assert telemetry(clock, Fake(clock=clock.day, counted=0.8))["flags"] == ["energy-disagrees"]


def test_violations_are_seconds_of_the_window(clock: SimpleNamespace) -> None:
    row = telemetry(clock, Fake(clock=clock.day, violated=(0.5, 0.2)))
    assert (row["power_violation_s"], row["thermal_violation_s"]) == pytest.approx((2.5, 1.0), rel=0.02)
    assert row["throttle_reasons"] == ["power_violation", "thermal_violation"]


def test_performance_counters_begin_with_hopper(clock: SimpleNamespace) -> None:
    assert "begin with Hopper" in why(telemetry(clock, Fake(clock=clock.day, hopper=False)), "gpm_sm")


@pytest.mark.parametrize(("gpm", "said"), [({2: 80.0, 10: 60.0}, "Not Supported"), ({2: 80.0, 5: float("nan"), 10: 60.0}, "not a number")])  # fmt: skip  # noqa: E501
def test_one_performance_counter_may_fail(clock: SimpleNamespace, gpm: dict[int, float], said: str) -> None:
    row = telemetry(clock, Fake(clock=clock.day, gpm=gpm))
    assert (row["gpm_sm"], row["gpm_dram"]) == (0.8, 0.6)
    assert said in why(row, "gpm_tensor")


def test_performance_counters_need_two_samples(clock: SimpleNamespace) -> None:
    assert "two samples 0.2 s apart" in why(telemetry(clock, Fake(clock=clock.day), seconds=0.15), "gpm_sm")
