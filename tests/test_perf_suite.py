"""The performance suite as users of this repository run it: saved, compared, and failing on a planted regression."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ONE = "tests/perf/test_decode.py::test_prefill[dense-static]"
FIGURES = {
    "tokens_per_s", "first_token_s", "step_s", "peak_bytes", "ops_per_token", "mbu", "utilisation", "outcome", "stop",
    "cell",
}  # fmt: skip


def run(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", *options]
    return subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "COLUMNS": "200"},
    )


def test_saved_compared_and_failed(tmp_path: Path):
    storage = ("--benchmark-only", "--benchmark-storage", str(tmp_path))
    saved = run(ONE, *storage, "--benchmark-save", "base")
    assert saved.returncode == 0, saved.stdout
    (file,) = tmp_path.rglob("*_base.json")
    document = json.loads(file.read_bytes())
    (one,) = document["benchmarks"]
    assert one["extra_info"].keys() == FIGURES
    assert one["group"] == "prefill static M1 P256"
    assert one["stats"]["rounds"] >= 10
    assert one["extra_info"]["peak_bytes"] > 1 << 20
    for key in ("min", "max", "mean", "median"):
        one["stats"][key] /= 10
    file.write_text(json.dumps(document))
    failed = run(ONE, *storage, "--benchmark-compare", "--benchmark-compare-fail", "median:100%")
    assert failed.returncode != 0
    assert "Performance has regressed" in failed.stdout + failed.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "performance suite: run pytest --benchmark-only"),
        (("--benchmark-enable", "-n", "1"), "off under xdist, where tests slow each other down"),
    ],
)
def test_it_does_not_run_unless_asked(options, words):
    done = run(ONE, "-rs", *options)
    assert done.returncode == 0, done.stdout
    assert words in done.stdout
    assert "1 skipped" in done.stdout


def test_only_the_suite_is_collected_from_the_root():
    done = run("--benchmark-only", "--collect-only")
    collected = [line for line in done.stdout.splitlines() if "::" in line]
    assert collected
    assert all(line.startswith("tests/perf/") for line in collected)
    for part in ("test_decode[", "test_prefill[", "test_surgery[", "test_ppl_scores", "test_writing", "test_report.py"):
        assert any(part in line for line in collected), part
