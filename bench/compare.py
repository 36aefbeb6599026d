"""The verb `compare`: two results files in, a verdict and an exit code out. Imports neither torch nor scipy."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from bench import comparison_text, foreign, store
from bench.comparison import Comparison, exit_code, limits_of
from bench.comparison import compare as compare_results
from shortllama import console, files


def compare(
    base: Annotated[
        Path,
        typer.Argument(metavar="BASE", help="Run (folder, file, or pytest-benchmark's .json) to compare with."),
    ],
    head: Annotated[Path, typer.Argument(metavar="HEAD", help="Run (folder, file, or .json) to judge.")],
    fail_over: Annotated[
        list[str] | None,
        typer.Option(
            metavar="METRIC:PERCENT", help="Let this much worsening pass; repeatable; only these metrics gate."
        ),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 3 where a verdict is inconclusive.")] = False,
    markdown: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also write a Markdown table, worst first."),
    ] = None,
    junit: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also write JUnit XML, a test case a cell."),
    ] = None,
    github: Annotated[
        bool, typer.Option("--github", help="Also print annotations for GitHub Actions, on stderr.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> int:
    """Compare two runs cell by cell: exit code 0 fine, 1 regressed, 3 incomparable environments.

    Example: shortllama compare runs/before runs/after --fail-over latency:5%
    """
    limits = limits_of(fail_over or [])
    found = compare_results(_read(base), _read(head), limits)
    return publish(found, strict=strict, markdown=markdown, junit=junit, github=github, as_json=as_json)


def _read(path: Path) -> store.Results:
    return foreign.read(path) if foreign.is_foreign(path) else store.read(path)


def publish(
    found: Comparison,
    *,
    strict: bool = False,
    markdown: Path | None = None,
    junit: Path | None = None,
    github: bool = False,
    as_json: bool = False,
) -> int:
    """Write a comparison wherever it is asked for; return the exit code."""
    code = exit_code(found, strict=strict)
    if markdown is not None:
        files.write_atomically(markdown, comparison_text.markdown(found).encode())
    if junit is not None:
        from bench import junit as xml

        files.write_atomically(junit, xml.document(found, strict=strict))
    if as_json:
        console.emit({"schema": "shortllama.comparison/1", "exit_code": code, "comparison": found})
    else:
        sys.stdout.write(comparison_text.terminal(found))
    if github:
        from bench.github import commands

        sys.stderr.write(commands(found))
    if found.differing:
        console.say("incomparable: times were not compared, because the environments differ")
    return code
