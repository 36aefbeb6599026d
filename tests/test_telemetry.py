"""What a row says of its telemetry: only what is valid, and a reason for all else. Readings here are made up."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest
import report_cases as cases
from hypothesis import given
from hypothesis import strategies as st

from bench import rows, schedule
from bench.cells import Cell, Suite
from bench.devices import lookup
from bench.measurement import LARGEST_LINE_BYTES, Measurement, Samples, SessionId
from bench.metrics import BY_NAME
from bench.report.assembly import build
from bench.telemetry import fields, throttling, window
from bench.telemetry.fields import FIELDS, OTHERS, REASONS
from bench.telemetry.readings import Loop, Reading, Window

IDLE_W = 70.0


def made(seconds: float = 5.0, period: float = 0.1, more: dict[str, Any] | None = None, **lack: str) -> Window:
    """Readings of a device at 400 W whose energy counter sees 396; `more` replaces quantities by functions of time."""
    quantities: dict[str, Any] = {
        "busy": lambda at: 0.9,
        "power_w": lambda at: 400.0,
        "energy_j": lambda at: 5e6 + 396.0 * at,
        "sm_clock_mhz": lambda at: 1700.0,
        "memory_clock_mhz": lambda at: 2619.0,
        "temperature_c": lambda at: 60.0 + at,
        "events": lambda at: 0,
        "device_used_bytes": lambda at: 3e9,
        "power_violation_s": lambda at: 7.0,
        "thermal_violation_s": lambda at: 8.0,
        "cpu_s": lambda at: 100.0 + 0.5 * at,
        "rss_bytes": lambda at: 1e9 + at,
        "host_busy_s": lambda at: 50.0 + at,
        "host_s": lambda at: 90.0 + 2 * at,
        "cpu_mhz": lambda at: 2600.0,
    } | (more or {})
    times = [10.0 + period * number for number in range(round(seconds / period) + 1)]
    readings = tuple(
        Reading(at, {name: float(ask(at)) for name, ask in quantities.items() if name not in lack}, dict(lack))
        for at in times
    )
    return Window(readings, cpu_s=0.02 * seconds)


def summed(found: Window, loop: Loop | None = None, idle_w: float | str = IDLE_W) -> dict[str, Any]:
    first, last = found.readings[0].at_s, found.readings[-1].at_s
    return window.summarise(found, loop or Loop(first, last, 10, 1000), idle_w)


def test_every_field_has_a_value_or_a_reason() -> None:
    row = summed(made())
    assert list(row) == [*FIELDS, REASONS]
    null = {name for name in FIELDS if row[name] is None}
    assert null == {"ring_busy", "ring_memory_busy", "gpm_sm", "gpm_tensor", "gpm_dram"}
    assert fields.explained(row) == dict.fromkeys(sorted(null, key=list(FIELDS).index), "was not read in the window")
    assert (row["calls"], row["tokens"], row["readings"], row["window_s"]) == (10, 1000, 51, 5.0)
    assert row["sampler_cpu_share"] == 0.02
    assert (row["nvml_busy"], row["sm_clock_mhz"], row["memory_clock_mhz"]) == (0.9, 1700, 2619)
    assert (row["temperature_c"], row["device_used_bytes"]) == (75.0, 3_000_000_000)
    assert (row["cpu_cores"], row["host_busy"], row["rss_bytes"]) == (0.5, 0.5, 1_000_000_015)
    assert (row["power_violation_s"], row["thermal_violation_s"], row[fields.THROTTLE], row["flags"]) == (0, 0, [], [])


def test_peaks_are_the_highest_that_a_reading_can_tell() -> None:
    """Utilisation jumps to 1 between 13 and 14 s; what was read in the first second speaks of before the window."""
    busy = {"busy": lambda at: 0.99 if at < 10.5 else 0.95 if 13 <= at < 14 else 0.5}
    busy["host_busy_s"] = lambda at: 50.0 + 0.4 * at + (1.2 * min(max(at - 13, 0), 1))
    row = summed(made(more=busy))
    assert row["nvml_busy_max"] == 0.95
    assert row["nvml_busy"] < row["nvml_busy_max"]
    assert row["host_busy_max"] == pytest.approx(0.8), "1.6 of 2 seconds of two cores"
    assert row["host_busy"] == pytest.approx((0.4 * 5 + 1.2) / 10)


def test_one_stretch_has_a_mean_and_no_peak() -> None:
    row = summed(made(0.9))
    assert (row["host_busy"], row["host_busy_max"]) == (0.5, None)
    assert "no two stretches" in (fields.reason(row, "host_busy_max") or "")


def test_a_failed_reading_leaves_no_peak() -> None:
    row = summed(made(busy="NVML: GPU is lost", host_s="psutil: denied"))
    assert row["nvml_busy_max"] is row["host_busy_max"] is None
    assert fields.reason(row, "nvml_busy_max") == "NVML: GPU is lost"
    assert fields.reason(row, "host_busy_max") == "psutil: denied"


def test_energy_is_what_the_counter_says_and_power_checks_it() -> None:
    row = summed(made())
    assert row["power_w"] == pytest.approx(396)
    assert (row["power_source"], row["power_max_w"]) == ("energy counter", 400.0)
    assert row["energy_j"] == pytest.approx(396 * 5)
    assert row["energy_disagreement"] == pytest.approx(400 / 396 - 1, rel=1e-3)
    assert row[fields.ENERGY] == pytest.approx(396 * 5 / 1000)
    assert row["joules_per_token_net"] == pytest.approx((396 - IDLE_W) * 5 / 1000)
    assert BY_NAME["energy"].value(_measured(row)) == row[fields.ENERGY], "compare reads what the row says"


def _measured(telemetry: dict[str, Any]) -> Any:
    return msgspec.defstruct("Row", [("telemetry", dict)])(telemetry)


@pytest.mark.parametrize(("watts", "flagged"), [(396 * 1.04, False), (396 * 1.06, True), (396 * 0.94, True)])
def test_a_counter_that_power_contradicts_is_flagged(watts: float, flagged: bool) -> None:
    row = summed(made(more={"power_w": lambda at: watts}))
    assert row["flags"] == ([window.DISAGREES] if flagged else [])
    assert row[fields.ENERGY] is not None


@given(st.floats(0, 1), st.integers(0, 1000))
def test_a_coarse_counter_and_uneven_readings_cost_little(phase: float, seed: int) -> None:
    """The counter moves every 0.1 s, readings come up to a fifth early or late: within 2.5 % of the truth."""
    source = random.Random(seed)
    at, readings = 10.0, list[Reading]()
    while at < 14.5:
        counter = 5e6 + 400.0 * 0.1 * int((at + 0.1 * phase) / 0.1)
        readings.append(Reading(at, {"energy_j": counter, "power_w": 400.0}))
        at += 0.1 * source.uniform(0.8, 1.2)
    row = summed(Window(tuple(readings)))
    assert row["power_w"] == pytest.approx(400, rel=0.025)


@pytest.mark.parametrize("seconds", [0.5, 1.9])
def test_a_short_window_has_no_means(seconds: float) -> None:
    row = summed(made(seconds))
    told = {name for name in FIELDS if row[name] is not None}
    edges = {"power_violation_s", "thermal_violation_s", "host_busy", "throttle_reasons"}
    edges |= {"host_busy_max"} if seconds > 1 else set()
    assert told == edges | {"window_s", "readings", "calls", "tokens", "sampler_cpu_share", "idle_power_w", "flags"}
    assert fields.reason(row, "nvml_busy") == f"the window of {seconds:.2f} s is shorter than 2 s"


def test_a_window_of_two_seconds_has_means_and_no_energy() -> None:
    row = summed(made(2.0))
    assert (row["nvml_busy"], row["power_w"], row["power_source"]) == (0.9, 400.0, "usage")
    assert row["energy_j"] is row[fields.ENERGY] is row["joules_per_token_net"] is None
    assert fields.reason(row, fields.ENERGY) == "spans of the energy counter must be 3 s long, the readings cover 2.0 s"


def test_what_lies_outside_the_loop_does_not_count() -> None:
    """Idle before and after: means are of the loop, and so is the energy."""

    def while_looping(inside: float, outside: float) -> Any:
        return lambda at: inside if 12 <= at <= 17 else outside

    def energy(at: float) -> float:
        return 400.0 * min(max(at - 12, 0), 5) + 70.0 * (at - 10)

    more = {"busy": while_looping(0.8, 0.0), "power_w": while_looping(470, 70), "energy_j": energy}
    row = summed(made(10.0, more=more), Loop(12, 17, 10, 100))
    assert (row["nvml_busy"], row["window_s"]) == (0.8, 5)
    assert row["power_w"] == pytest.approx(470)
    assert row[fields.ENERGY] == pytest.approx(470 * 5 / 100)
    assert row["energy_disagreement"] == pytest.approx(0, abs=1e-6)


def test_utilisation_of_before_the_window_does_not_count() -> None:
    row = summed(made(more={"busy": lambda at: 0.1 if at < 10.95 else 0.9}))
    assert row["nvml_busy"] == pytest.approx(0.9)


def test_a_quantity_that_fails_once_is_null() -> None:
    found = made()
    lost = tuple(
        one if one.at_s < 12 else Reading(one.at_s, {}, dict.fromkeys(one.values, "NVML: GPU is lost"))
        for one in found.readings
    )
    row = summed(msgspec.structs.replace(found, readings=lost))
    assert row["nvml_busy"] is row["power_w"] is row["energy_j"] is row["thermal_violation_s"] is None
    assert {fields.reason(row, name) for name in ("nvml_busy", "power_w", "energy_j")} == {"NVML: GPU is lost"}
    assert row[fields.THROTTLE] == [], "what was seen before stands"


@pytest.mark.parametrize("name", ["energy_j", "thermal_violation_s", "host_busy_s"])
def test_a_counter_that_goes_backwards_says_nothing(name: str) -> None:
    row = summed(made(more={name: lambda at: 10.0 * (at % 4.7)}))
    field = {"energy_j": "energy_j", "thermal_violation_s": "thermal_violation_s", "host_busy_s": "host_busy"}[name]
    assert row[field] is None
    assert "backwards" in (fields.reason(row, field) or "")


def test_a_counter_that_stands_still_is_no_energy() -> None:
    row = summed(made(more={"energy_j": lambda at: 5.0}))
    assert (row["energy_j"], fields.reason(row, fields.ENERGY)) == (None, "the energy counter stood still")
    assert (row["power_w"], row["power_source"]) == (400.0, "usage")


@pytest.mark.parametrize(("idle", "said"), [("was not measured", "was not measured"), (500.0, "less than the 500 W")])
def test_without_a_credible_idle_power_there_is_no_net_energy(idle: float | str, said: str) -> None:
    row = summed(made(), idle_w=idle)
    assert row[fields.ENERGY] is not None
    assert row["joules_per_token_net"] is None
    assert said in (fields.reason(row, "joules_per_token_net") or "")


def test_without_a_loop_there_are_no_tokens_and_no_process() -> None:
    row = window.summarise(made(), None, IDLE_W)
    assert row["power_w"] is not None
    assert {row[name] for name in ("calls", "tokens", "cpu_cores", "rss_bytes", fields.ENERGY)} == {None}


# -- rings ------------------------------------------------------------------------------------------------------------


def ringed(samples: Any, seconds: float = 5.0) -> dict[str, Any]:
    return summed(msgspec.structs.replace(made(seconds), rings={"busy": samples, "power_w": "NVML: Not Supported"}))


def test_the_ring_counts_inside_the_window_only() -> None:
    samples = tuple((8.0 + 0.16 * number, 0.5 if 10 <= 8.0 + 0.16 * number <= 15 else 1.0) for number in range(60))
    assert ringed(samples)["ring_busy"] == 0.5
    assert ringed(tuple(reversed(samples)))["ring_busy"] == 0.5, "a ring may begin anywhere"
    assert ringed(samples + samples[20:40])["ring_busy"] == 0.5, "what was fetched twice counts once"


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        (lambda at: at > 12, "lack 2.1 s of the window: the ring was overwritten"),
        (lambda at: at < 13, "lack 2.1 s of the window"),
        (lambda at: not 11 < at < 12.5, "lack 1.6 s of the window"),
        (lambda at: at < 10.5, "has 4 samples"),
    ],
)
def test_a_ring_that_does_not_cover_the_window_says_nothing(kept: Any, said: str) -> None:
    samples = tuple((10.0 + 0.16 * number, 0.5) for number in range(32))
    row = ringed(tuple(one for one in samples if kept(one[0])))
    assert row["ring_busy"] is None
    assert said in (fields.reason(row, "ring_busy") or "")


def test_slow_samples_need_a_longer_window() -> None:
    assert ringed(tuple((10.0 + number, 0.5) for number in range(6)))["ring_busy"] is None
    assert ringed(tuple((10.0 + number, 0.5) for number in range(13)), 12.0)["ring_busy"] == 0.5


# -- throttling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "names", "flags", "spoils"),
    [
        (0, [], [], None),
        (1 | 2 | 256, [], [], None),
        (4, ["sw_power_cap"], ["power-capped"], None),
        (32, ["sw_thermal_slowdown"], [], "sw_thermal_slowdown"),
        (4 | 64, ["hw_thermal_slowdown", "sw_power_cap"], ["power-capped"], "hw_thermal_slowdown"),
        (128, ["hw_power_brake_slowdown"], [], "hw_power_brake_slowdown"),
        (8, ["hw_slowdown"], [], "hw_slowdown"),
        (16 | 512, ["board_limit", "sync_boost"], [], None),
        (1 << 13, ["bit_13"], [], None),
    ],
)
def test_event_bits_are_named_and_judged(bits: int, names: list[str], flags: list[str], spoils: str | None) -> None:
    row = summed(made(more={"events": lambda at: bits if at > 14 else 0}))
    assert (row[fields.THROTTLE], row["flags"]) == (names, flags)
    assert throttling.spoiled(row) == spoils


@pytest.mark.parametrize(
    ("name", "share", "names", "spoils"),
    [
        ("thermal_violation_s", 0.02, ["thermal_violation"], True),
        ("thermal_violation_s", 0.005, [], False),
        ("power_violation_s", 0.5, ["power_violation"], False),
    ],
)
def test_violations_are_judged_by_their_share(name: str, share: float, names: list[str], spoils: bool) -> None:
    row = summed(made(more={name: lambda at: share * at}))
    assert row[fields.THROTTLE] == names
    assert (throttling.spoiled(row) is not None) == spoils
    assert row[name] == pytest.approx(5 * share)


def test_what_throttled_the_timing_pass_stands_in_the_row() -> None:
    timed = summed(made(0.5, more={"events": lambda at: 32, "power_violation_s": lambda at: at}))
    row = window.merged(timed, summed(made(more={"events": lambda at: 4})))
    assert row[fields.THROTTLE] == ["power_violation", "sw_power_cap", "sw_thermal_slowdown"]
    assert (row["power_violation_s"], row["thermal_violation_s"], row["flags"]) == (0.5, 0, ["power-capped"])
    assert (row["nvml_busy"], row["window_s"]) == (0.9, 5)
    unsampled = window.merged(timed, fields.absent("not asked"))
    assert throttling.spoiled(unsampled) == "sw_thermal_slowdown"
    assert (unsampled["nvml_busy"], fields.reason(unsampled, "nvml_busy")) == (None, "not asked")
    nothing = window.merged({}, fields.absent("died"))
    assert (nothing[fields.THROTTLE], fields.reason(nothing, fields.THROTTLE)) == (None, "died")


# -- rows -------------------------------------------------------------------------------------------------------------


@given(
    st.dictionaries(st.sampled_from(sorted(FIELDS)), st.text(min_size=1, max_size=400)),
    st.dictionaries(
        st.sampled_from(sorted(FIELDS.keys() - {"flags"})), st.floats(allow_nan=False, allow_infinity=False)
    ),
)
def test_telemetry_is_small_and_whole_whatever_went_wrong(reasons: dict[str, str], values: dict[str, float]) -> None:
    row = fields.row(values | {"flags": []}, reasons, "for another reason")
    assert list(row) == [*FIELDS, REASONS]
    assert len(msgspec.json.encode(row)) <= fields.LARGEST_BYTES + 600, "null fields are named twice at worst"
    for name in FIELDS:
        assert (fields.reason(row, name) is None) == (row[name] is not None)


def test_a_reason_for_most_is_said_once() -> None:
    row = fields.row({"flags": [], "calls": 3}, {"tokens": "why not"}, "no device")
    assert row[REASONS] == {OTHERS: "no device", "tokens": "why not"}
    assert fields.reason(row, "calls") is None
    assert fields.absent("gone")[REASONS] == {OTHERS: "gone"}


def test_the_longest_row_fits_its_line_with_telemetry() -> None:
    """All samples that a row may have, and every field: the steps give way, by means of neighbours."""
    cell = Cell("some-organisation/some-model/wanda-sp:0.25", "cudagraph", "bfloat16", "sdpa", 512, 4096, "24GiB", 1024)
    numbers = tuple(round(0.01 + number / 7e6, 7) for number in range(256))
    samples = Samples(numbers[:100], numbers[:100], numbers, numbers[:100])
    telemetry = summed(made())
    row = Measurement(cell, cell.id, "e" * 16, "ok", False, SessionId("s" * 8), samples=samples, telemetry=telemetry)
    assert rows._fitting(row) == row
    row = msgspec.structs.replace(row, reason="x" * (LARGEST_LINE_BYTES + 2 - len(msgspec.json.encode(row))))
    fitted = rows._fitting(row)
    assert len(msgspec.json.encode(fitted)) < LARGEST_LINE_BYTES
    assert len(fitted.samples.step_s) == 128
    assert sum(fitted.samples.step_s) / 128 == pytest.approx(sum(numbers) / 256, rel=1e-5)
    assert msgspec.structs.replace(fitted, samples=samples) == row
    assert rows._fitting(fitted) == fitted


def test_the_report_shows_energy_and_what_to_know_of_a_row() -> None:
    results = cases.sweep({"reference": (12, 7e6, 1_900_000)}, {"eager": 1.0}, (1, 2))
    told = summed(made(more={"events": lambda at: 4}))
    first, second = results.measurements
    results = msgspec.structs.replace(results, measurements=(msgspec.structs.replace(first, telemetry=told), second))
    (table,) = (one for one in build([results]).tables if one.name == "cells")
    keys = [column.key for column in table.columns]
    shown = [(row[keys.index("joules_per_token")], row[keys.index("remark")]) for row in table.rows]
    assert shown[0] == (told[fields.ENERGY], "power-capped")
    assert shown[1][0] is None
    assert "joules_per_token" not in table.hidden
    (without,) = (
        one for one in build([cases.sweep({"a": (2, 1e6, 9)}, {"eager": 1.0}, (1,))]).tables if one.name == "cells"
    )
    assert "joules_per_token" in without.hidden


@pytest.mark.parametrize(("runtime", "seconds"), [("eager", 2.0), ("roofline", 0.0)])
def test_a_schedule_counts_the_telemetry_pass(runtime: str, seconds: float) -> None:
    plain = Suite("shortllama.suite/1", ("llama-7b",), (runtime,), output=(4,))
    device = lookup("rtx3090") if runtime == "roofline" else msgspec.structs.replace(lookup("rtx3090"), short="cpu")
    (one,) = schedule.plan(plain, device).planned()
    (more,) = schedule.plan(msgspec.structs.replace(plain, telemetry=True), device).planned()
    assert one.cell_s is not None
    assert more.cell_s == pytest.approx(one.cell_s + seconds)
