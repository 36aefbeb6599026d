"""The verb `compare`: two results files in, a verdict and an exit code out. Imports neither torch nor scipy."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from bench import comparison_text
from bench.comparison import compare as compare_results
from bench.comparison import exit_code, limits_of
from bench.store import read
from shortllama import console, files


def compare(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="Run (folder or file) to compare with.")],
    head: Annotated[Path, typer.Argument(metavar="HEAD", help="Run (folder or file) to judge.")],
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
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> int:
    """Compare two runs cell by cell: exit code 0 fine, 1 regressed, 3 incomparable environments.

    Example: shortllama compare runs/before runs/after --fail-over latency:5%
    """
    found = compare_results(read(base), read(head), limits_of(fail_over or []))
    code = exit_code(found, strict=strict)
    if markdown is not None:
        files.write_atomically(markdown, comparison_text.markdown(found).encode())
    if as_json:
        console.emit({"schema": "shortllama.comparison/1", "exit_code": code, "comparison": found})
    else:
        sys.stdout.write(comparison_text.terminal(found))
    if found.differing:
        console.say("incomparable: times were not compared, because the environments differ")
    return code
