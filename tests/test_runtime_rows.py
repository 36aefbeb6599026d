"""Rows of runtimes: what they say is what their modules are, and a machine that lacks something hears what."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import prediction
from bench.runtime_rows import ROWS, SIMULATED, refusal


def test_every_runtime_has_its_rows() -> None:
    assert set(ROWS) == set(prediction.OVERHEADS) == set(prediction.CPU_OVERHEADS)
    assert {"roofline"} == SIMULATED


@pytest.mark.parametrize(("kind", "variable", "name"), [("cpu", "CXX", "C++"), ("cuda", "CC", "C")])
def test_compiling_needs_a_compiler(
    kind: str, variable: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(variable, raising=False)
    said = refusal("compile", kind)
    assert said is not None
    assert said.startswith(f"runtime compile needs a {name} compiler, and g")
    assert variable in said
    mine = tmp_path / "mycc"
    mine.write_text("")
    mine.chmod(0o755)
    monkeypatch.setenv(variable, "mycc")
    assert refusal("compile", kind) is None


def test_a_graph_needs_a_cuda_device() -> None:
    assert refusal("cudagraph", "cuda") is None
    assert "--runtime eager,static" in (refusal("cudagraph", "cpu") or "")
    assert refusal("eager", "cpu") is None
