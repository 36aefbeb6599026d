"""Roofs against a plain sum over steps, the device table against its own rules, and the anchors that are known."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import shapes

from bench import devices, physics
from bench.cells import Cell
from bench.devices import Device
from shortllama import catalogue
from shortllama.errors import InputError, UnsupportedError
from shortllama.shape import ModelShape

DTYPES = st.sampled_from(["float64", "float32", "float16", "bfloat16"])


def cell(**changes: object) -> Cell:
    base = Cell("llama-7b", "eager", "float16", "sdpa", 12, 128, "none", 1)
    return msgspec.structs.replace(base, **changes)  # pyright: ignore


@given(shapes(), DTYPES, st.integers(1, 50), st.integers(0, 200))
def test_coefficients_count_what_the_shape_counts(shape: ModelShape, dtype: str, batch: int, context: int) -> None:
    cost = physics.costs(shape, dtype)
    by_bytes, by_flops = physics.step_s(cost, 1.0, 1.0, batch, context)
    assert (by_bytes, by_flops) == (shape.decode_bytes(batch, context, dtype), shape.decode_flops(batch, context))
    by_bytes, by_flops = physics.prefill_s(cost, 1.0, 1.0, batch, context)
    assert (by_bytes, by_flops) == (shape.prefill_bytes(batch, context, dtype), shape.prefill_flops(batch, context))


@given(shapes(), st.integers(1, 40), st.integers(1, 40), st.integers(1, 60), st.floats(1e-3, 1e3))
def test_the_closed_form_equals_the_sum_over_steps(
    shape: ModelShape, batch: int, prompt: int, output: int, rate: float
) -> None:
    """The two bounds cross somewhere for some of these rates; the brute force does not care where."""
    cost = physics.costs(shape, "float16")
    brute = sum(max(physics.step_s(cost, 1.0, rate, batch, prompt + i)) for i in range(output - 1))
    assert physics.steps_s(cost, 1.0, rate, batch, prompt, output) == pytest.approx(brute, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("output", [1, 2, 30, 60, 90, 120, 300])
def test_the_closed_form_holds_where_the_bounds_cross(output: int) -> None:
    """A shape whose attention FLOPs overtake the bytes within the call, which few random ones do."""
    shape = ModelShape.uniform(
        vocabulary=8, hidden=8, head_dim=8, blocks=1, query_heads=8, kv_heads=1, neurons=8, tied=True
    )
    cost = physics.costs(shape, "float16")
    first, last = (physics.step_s(cost, 1.0, 4.0, 1, context) for context in (1, 200))
    assert first[0] > first[1]
    assert last[0] < last[1]
    brute = sum(max(physics.step_s(cost, 1.0, 4.0, 1, 1 + i)) for i in range(output - 1))
    assert physics.steps_s(cost, 1.0, 4.0, 1, 1, output) == pytest.approx(brute)


@pytest.mark.parametrize(
    ("device", "subject", "tokens_per_s"),
    [
        ("h100", "llama-7b", 254),
        ("h200", "llama-7b", 363),
        ("a100", "llama-7b", 154),
        ("rtx3090", "llama-7b", 71),
        ("h100", "llama-7b/depth-26", 311),
        ("h200", "llama-7b/depth-21", 548),
        ("a100", "llama-7b/depth-23", 213),
        ("rtx3090", "llama-7b/wanda-sp-35", 107),
    ],
)
def test_roofs_meet_the_known_anchors(device: str, subject: str, tokens_per_s: float) -> None:
    roof = physics.roof_s(catalogue.lookup(subject), cell(), devices.lookup(device))
    assert 128 / roof == pytest.approx(tokens_per_s, rel=0.01)


def test_a_bound_is_never_better_than_the_roof() -> None:
    device = devices.lookup("h100")
    found = physics.bounds(catalogue.lookup("llama-7b"), cell(), device, median_s=2.4)
    assert found.roof_s is not None
    assert found.achieved == pytest.approx(found.roof_s / 2.4)
    assert found.achieved == pytest.approx(0.21, abs=0.01)  # the paper's share of the roof on this device


def test_what_cannot_be_known_is_null_with_the_reason() -> None:
    shape = catalogue.lookup("llama-7b")
    for device in (None, devices.lookup("cpu"), devices.unknown("T4", 1 << 34)):
        found = physics.bounds(shape, cell(), device, median_s=1.0)
        assert (found.roof_s, found.achieved) == (None, None)
        assert found.why == "the peaks of this device are not known"
    assert physics.bounds(shape, cell(), devices.lookup("h100"), median_s=1.0).why is None


def test_what_fits_a_known_cache_is_read_at_its_bandwidth() -> None:
    shape = catalogue.lookup("llama-7b")
    memory = msgspec.structs.replace(devices.lookup("h100"), flops={"float16": 1e30})
    whole = physics.costs(shape, "float16").weights + 140 * shape.kv_bytes_per_token("float16")
    fast = msgspec.structs.replace(memory, cache_bytes=whole, cache_bandwidth=2 * memory.bandwidth)
    assert physics.roof_s(shape, cell(), fast) == pytest.approx(physics.roof_s(shape, cell(), memory) / 2)
    small = msgspec.structs.replace(fast, cache_bytes=whole - 1)
    assert physics.roof_s(shape, cell(), small) == physics.roof_s(shape, cell(), memory)


@given(shapes(), st.integers(1, 20), st.integers(1, 50), st.integers(2, 50))
def test_no_runtime_moves_less_than_the_algorithm(shape: ModelShape, batch: int, prompt: int, output: int) -> None:
    for runtime in ("eager", "static"):
        one = cell(runtime=runtime, batch=batch, prompt=prompt, output=output)
        for context in (prompt, prompt + output - 2):
            assert physics.moved_bytes(shape, one, context) >= shape.decode_bytes(batch, context, "float16")


# -- the device table -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", devices.names())
def test_every_row_of_the_table_is_usable(name: str) -> None:
    device = devices.lookup(name)
    assert device.memory_bytes > 1 << 30
    assert device.bandwidth > 1e9
    assert device.rate("float16") > 1e9
    assert device.flops.get("float32", 0) <= device.flops["float16"] or device.nominal
    assert devices.lookup(name) == device


def test_an_unknown_device_names_its_neighbours() -> None:
    with pytest.raises(InputError, match="did you mean rtx3090"):
        devices.lookup("rtx309")
    with pytest.raises(InputError, match="known: h100"):
        devices.lookup("quantum")


def test_an_unknown_rate_is_said() -> None:
    with pytest.raises(UnsupportedError, match="rtx3090 has no known rate for float64"):
        devices.lookup("rtx3090").rate("float64")


@pytest.mark.parametrize(
    ("driver", "short"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb"),
        ("NVIDIA GeForce RTX 3090", "rtx3090"),
        ("Tesla T4", None),
    ],
)
def test_drivers_names_are_matched(driver: str, short: str | None) -> None:
    found = devices.match(driver)
    assert (found.short if isinstance(found, Device) else None) == short
