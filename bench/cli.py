"""The command `shortllama`: the harness's verbs, and the core's mounted beside them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from bench.ab import ab
from bench.ceilings import ceilings
from bench.compare import compare
from bench.doctor import doctor
from bench.oom import oom
from bench.recommend import recommend
from bench.sweep import sweep
from shortllama import cli as core
from shortllama import console
from shortllama.errors import InputError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Which pruned shape of a Llama-like model is really faster on this hardware, where does memory end, and what "
    "does it cost in quality?",
)
app.add_typer(core.app)
app.command(epilog="Example: shortllama sweep quick --out runs/mine")(sweep)
app.command(epilog="Example: shortllama oom quick --budget 64MiB --out runs/ends")(oom)

app.command(epilog="Example: shortllama ceilings --device cpu --out ceilings.json")(ceilings)
app.command(epilog="Example: shortllama doctor --aa 5")(doctor)


@app.command(epilog="Example: shortllama report runs/mine --out reports/mine")
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Runs: folders or files; studies; files of eval.", show_default=False),
    ],
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of the report.", show_default=False)] = None,
    terminal: Annotated[bool, typer.Option("--terminal", help="Show the report here; --out is optional then.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Write a report on runs and studies: one HTML page, Markdown, figures as PNG and SVG, tables as CSV."""
    from bench import report as reports

    if out is None and not terminal:
        raise InputError("no place for the report; give --out DIR, or --terminal to read it here")
    if terminal and as_json:
        raise InputError("--terminal and --json both write to stdout; give one of them")
    made = reports.read(runs) if out is None else reports.write(runs, out)
    if terminal:
        reports.show(made)
    if out is None:
        return
    if as_json:
        names = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
        console.emit({"out": str(out), "files": names})
    console.say(f"wrote {out / 'index.html'}")


app.command(epilog="Example: shortllama compare runs/before runs/after --fail-over latency:5%")(compare)
app.command(epilog="Example: shortllama ab --base main --head my-branch --out runs/ab")(ab)
app.command(epilog="Example: shortllama recommend runs/mine --max-latency 2s --max-memory 24GiB --max-ppl 30")(
    recommend
)


def main() -> None:
    """Run the command line and exit with its code."""
    sys.exit(console.run(app))
