"""What commands may load and which module may import which: by sys.modules and import-linter, never by the clock."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from bench.cells import Cell
from bench.cli import app
from bench.measurement import Measurement, Samples, SessionId, environment

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "transformers", "scipy.stats", "matplotlib.pyplot", "huggingface_hub")

# Runs commands in one process, one after the other, and reports after each what heavy modules are loaded by then.
PROBE = """
import json, sys
from shortllama import console
from bench.cli import app
commands, heavy = json.load(sys.stdin)
seen = []
for command in commands:
    code = console.run(app, command)
    seen.append([command, code, sorted(set(heavy) & set(sys.modules))])
print("SEEN", json.dumps(seen))
"""


def probe(tmp_path: Path, *commands: list[str], heavy: tuple[str, ...] = HEAVY) -> list[tuple[list[str], int, list]]:
    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        input=json.dumps([commands, heavy]),
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.rpartition("SEEN ")[2])


def names() -> list[str]:
    group: Any = typer.main.get_command(app)
    return sorted(group.commands)


def test_help_of_every_command_is_light(tmp_path: Path):
    commands = [["--help"], *([name, "--help"] for name in names())]
    for command, code, loaded in probe(tmp_path, *commands, heavy=(*HEAVY, "numpy", "scipy", "matplotlib")):
        assert (code, loaded) == (0, []), command


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    """Two plans, a checkpoint folder without weights, a run of two rows and a suite, in the test's folder."""
    from shortllama import blind, catalogue
    from shortllama.plans import write_plan

    shape = catalogue.lookup("llama-7b")
    for name, text in (("a", "depth:26"), ("b", "width:24x8256")):
        write_plan(tmp_path / f"{name}.json", blind.parse(text, model="llama-7b", shape=shape))
    folder = tmp_path / "folder"
    folder.mkdir()
    config = {"model_type": "llama", "vocab_size": 9, "hidden_size": 8, "num_attention_heads": 2}
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2, "intermediate_size": 6}))
    write_run(tmp_path / "run")
    (tmp_path / "suite.toml").write_text(SUITE)
    return tmp_path


SUITE = """
schema = "shortllama.suite/1"
subjects = ["llama-7b", "llama-7b/depth:26", "llama-7b/wanda-sp:0.2"]
runtimes = ["eager", "static"]
budgets = ["24GiB"]
batch = {from = 1, factor = 4, until = "oom"}
"""


def write_run(folder: Path) -> None:
    from bench import store

    folder.mkdir()
    where = environment({"device": "test"}, {})
    with store.Writer(folder) as writer:
        writer.write(where)
        for batch in (1, 2):
            cell = Cell("llama-7b", "roofline", "float16", "sdpa", 12, 128, "none", batch)
            samples = Samples(call_s=(1.0,) * 12, prefill_s=(0.1,) * 12, step_s=(0.007,) * 127)
            session = SessionId("s")
            writer.write(Measurement(cell, cell.id, where.id, "ok", True, session, samples=samples, tokens=batch * 128))


LIGHT = [
    ["shapes"],
    ["shapes", "llama-7b/flap-20"],
    ["plan", "llama-7b", "--method", "wanda-sp", "--ratio", "0.2", "--out", "plan.json"],
    ["plan", "llama-7b", "--method", "ppl", "--target-params", "5e9", "--json"],
    ["show", "a.json"],
    ["show", "folder"],
    ["diff", "a.json", "b.json"],
    ["compare", "run", "run"],
    ["sweep", "suite.toml", "--dry-run"],
    ["study", "reference", "--dry-run"],
    ["plan", "llama-7b", "--method", "nonsense", "--ratio", "0.2"],
    ["shapes", "nonsense"],
]


@pytest.mark.parametrize("command", LIGHT, ids=" ".join)
def test_verbs_that_only_plan_are_light(documents: Path, command: list[str]):
    ((_, code, loaded),) = probe(documents, command)
    assert loaded == []
    assert code == (2 if "nonsense" in command else 0)


def test_the_probe_sees_what_is_loaded(tmp_path: Path):
    ((_, code, loaded),) = probe(tmp_path, ["score", "llama-7b", "--criterion", "last"])
    assert code == 0
    assert {"torch", "transformers"} <= set(loaded)


@pytest.mark.parametrize("package", ["shortllama", "bench"])
def test_importing_a_package_is_light(package: str):
    code = f"import sys, {package}; print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


# -- who may import whom ----------------------------------------------------------------------------------------------


def lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache"],
        capture_output=True,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        timeout=300,
    )


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the source tree, to plant violations in."""
    for package in ("shortllama", "bench"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__", "model"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_import_contracts_hold(tree: Path):
    done = lint_imports(tree)
    assert done.returncode == 0, done.stdout


VIOLATIONS = [
    ("shortllama/shape.py", "from bench import cells"),
    ("shortllama/plans.py", "import torch"),
    ("shortllama/selection.py", "from shortllama import surgery"),
    ("bench/comparison.py", "import torch"),
    ("bench/cells.py", "from bench import runner"),
    ("bench/sweep.py", "import torch"),
    ("bench/store.py", "import matplotlib.pyplot"),
]


@pytest.mark.parametrize(("module", "line"), VIOLATIONS, ids=[f"{module}: {line}" for module, line in VIOLATIONS])
def test_a_planted_violation_breaks_a_contract(tree: Path, module: str, line: str):
    with (tree / module).open("a") as file:
        file.write(f"\n\ndef planted():\n    {line}\n")
    done = lint_imports(tree)
    assert done.returncode == 1, done.stdout
    assert "BROKEN" in done.stdout
