"""Documentation that cannot rot: the README's sessions are run, every command has help with a working example."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from bench.cli import app

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
# Each of these runs this test or takes minutes, so only that the target exists is checked (make -n).
MAKE = re.compile(r"^make\b")
# The clone is where this test runs.
ELSEWHERE = re.compile(r"^(git clone|cd) ")


def sessions(text: str) -> list[list[str]]:
    """Return the commands of every ```console block: lines after `$ `, with lines continued by a backslash joined."""
    blocks = re.findall(r"^```console[^\n]*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return [re.findall(r"^\$ (.+)$", block.replace("\\\n", " "), flags=re.MULTILINE) for block in blocks]


def commands() -> dict[str, Any]:
    """Every command of the program by name."""
    group: Any = typer.main.get_command(app)
    return dict(group.commands)


def examples(command: Any) -> list[str]:
    """The example command lines in a command's help."""
    text = f"{command.help or ''}\n{command.epilog or ''}".replace("\\\n", " ")
    return re.findall(rf"shortllama {command.name}\b[^\n`]*", text)


def test_console_blocks_are_parsed():
    text = "a\n```console\n$ one --x \\\n    1\noutput\n$ two\n```\n```python\n$ no\n```\n```console\n$ three\n```\n"
    assert sessions(text) == [["one --x      1", "two"], ["three"]]


@pytest.mark.slow
def test_every_command_in_the_readme_works(tmp_path: Path):
    found = [line for block in sessions(README.read_text()) for line in block]
    assert found, "README.md has no console block"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for line in found:
        if ELSEWHERE.match(line):
            continue
        line = MAKE.sub(f"make --dry-run --directory {shlex.quote(str(ROOT))}", line)
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", line],
            cwd=tmp_path,
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, f"$ {line}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("name", sorted(commands()))
def test_every_command_has_help_with_an_example_and_is_in_the_readme(name: str):
    command = commands()[name]
    assert command.help, f"{name} has no help"
    assert examples(command), f"the help of {name} shows no example `shortllama {name} ...`"
    assert re.search(rf"shortllama {name}\b", README.read_text()), f"README.md does not mention shortllama {name}"


@pytest.mark.parametrize("name", sorted(commands()))
def test_every_option_says_what_it_does_and_json_is_everywhere(name: str):
    parameters = commands()[name].params
    silent = [one.name for one in parameters if one.name != "help" and not getattr(one, "help", None)]
    assert not silent, f"{name}: no help for {silent}"
    assert "--json" in {option for one in parameters for option in one.opts}, f"{name} has no --json"


@pytest.mark.parametrize("name", sorted(commands()))
def test_examples_in_help_are_accepted_by_the_program(name: str):
    command = commands()[name]
    for example in examples(command):
        arguments = shlex.split(example)[2:]
        command.make_context(name, arguments)  # raises a usage error for an unknown option or a missing argument
