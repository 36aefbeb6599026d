"""The deterministic gate: what is committed holds, and what makes a step dearer or larger turns it red."""

from __future__ import annotations

import os
from typing import Any

import msgspec
import pytest

from bench import baselines, children, environment, worker
from bench.baselines import GRANULARITY, Baselines, differences


@pytest.fixture(scope="module", autouse=True)
def server() -> None:
    """The fork server of this test process: with torch, whichever test starts it."""
    children.serve(children.TORCH_MODULES, environment.child_variables(1))


@pytest.fixture(scope="module")
def committed() -> Baselines:
    return baselines.read()


def test_the_committed_figures_hold(committed: Baselines) -> None:
    now = baselines.measured()
    if os.environ.get("CI"):
        assert now.versions == committed.versions, "the pins moved: python -m bench.baselines --update"
    assert differences(committed, now) == [], "meant? python -m bench.baselines --update"


def test_an_extra_copy_a_block_is_found(committed: Baselines, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    plain = msgspec.structs.replace(committed, operations={"llama": baselines.operations("llama")})
    forward = modeling_llama.LlamaMLP.forward
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", lambda self, x: forward(self, x.clone()))
    now = msgspec.structs.replace(committed, operations={"llama": baselines.operations("llama")})
    assert sorted(differences(plain, now)) == [
        f"operations llama {runtime} block clone: None -> 1" for runtime in ("eager", "paper", "static")
    ]


def run_with_doubled_cache(work: bytes, send: Any) -> None:
    """Entry of a child whose static caches have twice the slots they need."""
    from bench.runtimes import caches

    made = caches.StaticCache
    caches.StaticCache = lambda config, max_cache_len: made(config=config, max_cache_len=2 * max_cache_len)  # type: ignore[assignment, misc]
    worker.run(work, send)


def test_a_doubled_cache_is_found(committed: Baselines) -> None:
    doubled = baselines.peak("static", run_with_doubled_cache)
    now = msgspec.structs.replace(committed, peak_bytes={**committed.peak_bytes, "static": doubled})
    (line,) = differences(committed, now)
    assert line.startswith("peak_bytes static: ")
    cache = baselines.PEAK_BATCH * (16 + 24 - 1) * baselines.PEAK.kv_bytes_per_token("float32")
    assert doubled - committed.peak_bytes["static"] == pytest.approx(cache, rel=0.1)


def test_a_wrong_shape_is_found(committed: Baselines) -> None:
    costs = committed.shapes["llama-7b"]
    largest = {**costs.largest_batch, "h100 eager": costs.largest_batch["h100 eager"] - 1}
    wrong = msgspec.structs.replace(costs, parameters=costs.parameters + 1, largest_batch=largest)
    now = msgspec.structs.replace(committed, shapes={**committed.shapes, "llama-7b": wrong})
    assert differences(committed, now) == [
        f"shapes llama-7b largest_batch h100 eager: {largest['h100 eager'] + 1} -> {largest['h100 eager']}",
        f"shapes llama-7b parameters: {costs.parameters} -> {costs.parameters + 1}",
    ]


def test_peaks_are_good_to_two_mib(committed: Baselines) -> None:
    for off, found in ((GRANULARITY, 0), (-GRANULARITY, 0), (GRANULARITY + 1, 1), (-GRANULARITY - 1, 1)):
        moved = {name: value + off for name, value in committed.peak_bytes.items()}
        now = msgspec.structs.replace(committed, peak_bytes=moved)
        assert len(differences(committed, now)) == found * len(moved)


def test_operations_of_other_versions_are_not_compared(committed: Baselines) -> None:
    other = msgspec.structs.replace(committed, versions={"torch": "9", "transformers": "9"}, operations={})
    assert differences(committed, other) == []
