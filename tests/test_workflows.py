"""Workflow files are valid, and every command in them is one that the program, the Makefile and the README know."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from bench.cli import app
from bench.comparison import limits_of

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PERFORMANCE = ROOT / ".github" / "workflows" / "performance.yml"


def steps(path: Path) -> list[dict[str, Any]]:
    document = yaml.safe_load(path.read_text())
    return [step for job in document["jobs"].values() for step in job["steps"]]


def commands(path: Path, program: str) -> list[list[str]]:
    """The arguments of every call of `program` in a workflow."""
    lines = [line for step in steps(path) for line in step.get("run", "").splitlines()]
    words = [shlex.split(part) for line in lines for part in re.split(r"&&|\|\||;|>>", line)]
    return [one[1:] for one in words if one and one[0] == program]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_has_what_github_needs(path: Path) -> None:
    document = yaml.safe_load(path.read_text())
    assert document["name"] == path.stem
    assert document[True], "`on`, which YAML 1.1 reads as true"
    for job in document["jobs"].values():
        assert job["runs-on"]
        assert job["timeout-minutes"] > 0
        for step in job["steps"]:
            assert ("run" in step) != ("uses" in step), step
            assert not set(step) - {"name", "if", "env", "run", "uses", "with"}, step
            assert "uses" not in step or re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step["uses"]), step


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_no_text_of_a_pull_request_reaches_a_shell(path: Path) -> None:
    """What others write (titles, branch names) would be code in a `run`; values come through the environment."""
    for step in steps(path):
        assert "${{" not in step.get("run", ""), step


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_every_command_is_accepted_and_documented(path: Path) -> None:
    group: Any = typer.main.get_command(app)
    readme = (ROOT / "README.md").read_text()
    for name, *arguments in commands(path, "shortllama"):
        context = group.commands[name].make_context(name, list(arguments))  # raises for what it does not know
        limits_of(context.params.get("fail_over") or [])
        assert f"`shortllama {name}`" in readme
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for arguments in commands(path, "make"):
        assert set(arguments) <= set(targets), arguments


def test_the_performance_workflow_sweeps_compares_comments_and_uploads() -> None:
    names = [name for name, *_ in commands(PERFORMANCE, "shortllama")]
    assert names == ["sweep", "report", "compare", "ab", "compare"]
    assert [one[0] for one in commands(PERFORMANCE, "gh")] == ["api", "pr"]
    assert sum("upload-artifact" in step.get("uses", "") for step in steps(PERFORMANCE)) == 2


def test_nothing_runs_without_a_gpu_runner() -> None:
    for job in yaml.safe_load(PERFORMANCE.read_text())["jobs"].values():
        assert job["if"].startswith("vars.GPU_RUNNER != ''")
        assert job["runs-on"] == "${{ vars.GPU_RUNNER }}"


def test_what_a_step_reads_a_step_before_it_writes() -> None:
    """Folders and files that are named in a condition or read by a command are outputs of earlier commands."""
    for job in yaml.safe_load(PERFORMANCE.read_text())["jobs"].values():
        written: set[str] = {"reports/baselines/gpu"}
        for step in job["steps"]:
            for place in re.findall(r"hashFiles\('([^']+)'\)", step.get("if", "")):
                assert any(place == one or place.startswith(f"{one}/") for one in written), place
            written |= set(re.findall(r"--(?:out|markdown|junit) (\S+)", step.get("run", "")))
