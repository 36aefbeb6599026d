"""Fixtures shared by all tests: a tiny GQA model, the real test data, and the commands in a fresh process."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import settings

# Before torch loads: spinning OpenMP threads starve a busy two-core machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OMP_NUM_THREADS", "1")
for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
    os.environ.setdefault(name, "1")

# A worker of xdist is one of several, but the commands and the suites that its tests start are what users start alone.
for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", "PYTEST_XDIST_TESTRUNUID"):
    os.environ.pop(name, None)

# Here and not in tests/perf, where pytest would find it too late.
pytest_plugins = ["bench.pytest_plugin"]

# A busy machine is no failure; time is tested in tests/perf.
settings.register_profile("shortllama", deadline=None)
settings.load_profile("shortllama")

ROOT = Path(__file__).parent.parent


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With --benchmark-only, collect the performance suite alone: importing all others would take longer than it."""
    is_other = collection_path.suffix == ".py" and "perf" not in collection_path.parts
    return True if is_other and config.getoption("benchmark_only", False) else None


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The test data folder; tests that need it are skipped where it is absent, but never where it was named."""
    named = os.environ.get("SHORTLLAMA_TEST_DATA")
    folder = Path(named or ROOT.parent / "shared" / "data")
    if not (folder / "weights").is_dir():
        if named:
            pytest.fail(f"SHORTLLAMA_TEST_DATA names {folder}, which holds no weights/ folder")
        pytest.skip("no test data")
    return folder


@pytest.fixture(scope="session")
def stories(data_dir: Path) -> Path:
    """stories260K: a real pretrained Llama of 5 blocks."""
    return data_dir / "weights" / "stories260K" / "hf"


@pytest.fixture(scope="session")
def grown(data_dir: Path) -> Path:
    """A 12-block model whose blocks 1,3,5,6,8,9,11 are near redundant by construction."""
    return data_dir / "weights" / "stories_grown12L_DERIVED"


@pytest.fixture(scope="session")
def harness() -> None:
    """lm-evaluation-harness, an extra: absent only where somebody chose so, which CI does not."""
    if find_spec("lm_eval") is None:
        missing = pytest.fail if os.environ.get("CI") else pytest.skip
        missing("lm-evaluation-harness is not installed: pip install 'shortllama[eval]'")


@pytest.fixture(scope="session")
def torchao() -> None:
    """torchao, an extra: absent only where somebody chose so, which CI does not."""
    if find_spec("torchao") is None:
        missing = pytest.fail if os.environ.get("CI") else pytest.skip
        missing("torchao is not installed: pip install 'shortllama[quant]'")


@pytest.fixture
def tiny_shape():
    """4 blocks, hidden 64, GQA 8/4 heads of 8, FFN 96, vocabulary 97, untied."""
    from shortllama.shape import ModelShape

    return ModelShape.uniform(vocabulary=97, hidden=64, head_dim=8, blocks=4, query_heads=8, kv_heads=4, neurons=96)


@pytest.fixture
def run_command():
    """Return run(*arguments) -> CompletedProcess of the console script in a fresh process."""

    def run(*arguments: object, cwd: Path | None = None, timeout: float = 300, **env: str):
        return subprocess.run(
            [sys.executable, "-m", "bench", *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=timeout,
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        )

    return run
