"""The verb that runs a grid of prunings, retrainings and evaluations: `study`."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from shortllama import console, display, files, options, quantisation, sources, study_checks
from shortllama import study as studies
from shortllama.errors import InputError
from shortllama.studies import rows, summary, work
from shortllama.study import Run


def study(
    file: Annotated[
        str, typer.Argument(metavar="STUDY", help="A TOML file, or a shipped study: reference.", show_default=False)
    ],
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder for everything that is found.")] = None,
    *,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what DIR has not finished.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the runs with their tokens, and seconds where DIR tells; run none.")
    ] = False,
    data_dir: options.DataDir = None,
    trust_remote_code: options.Trust = False,
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """Prune, retrain and evaluate over methods, ratios, calibrations, recipes and seeds, and compare what is left.

    Each pruned model is made once. A run that is finished is never repeated; what was killed goes on with --resume.
    """
    path = studies.path_of(file)
    given = studies.read(path)
    source = sources.locate(given.model)
    if source.folder is None:
        raise InputError(
            f"{path}: $.model {given.model!r} is a shape without weights; give a folder, a hub id or 'reference'"
        )
    study_checks.check(given, source.shape, work.positions(source), str(path))
    if dry_run:
        _list(studies.grid(given), work.positions(source), () if out is None else rows.read(out), as_json)
        return
    if out is None:
        raise InputError("nothing says where results go; give --out DIR, or --dry-run")
    if any(one != studies.NONE for one in given.quantised):
        quantisation.require()
    options.check_output_folder(out, work.MARK)
    work.begin(given, files.read_bytes(path), out, resume=resume)
    settings = work.Settings(device, data_dir, trust_remote_code)
    try:
        with _bars() as step:
            failed = work.Work(given, source, out, settings, step, console.note).go()
    except KeyboardInterrupt:
        console.note(f"{out} keeps what is finished; --resume goes on from there")
        raise
    show(out, as_json)
    for line in failed:
        console.say(f"failed: {line}")
    console.say(
        f"{len(rows.read(out))} runs in {out}" + (f", {len(failed)} failed (--resume tries again)" if failed else "")
    )
    if failed:
        raise typer.Exit(1)


def show(out: Path, as_json: bool) -> None:
    """Show what the study in a folder has found so far."""
    found, dense = rows.read(out), work.dense_quality(out)
    if as_json:
        tables = {"perplexity": summary.lines(found, dense), "losses": summary.losses(found, dense)}
        console.emit({"dense": dense, "rows": found, "summary": tables})
    else:
        summary.show(found, dense)


def _list(runs: tuple[Run, ...], positions: int | None, done: tuple[rows.Row, ...], as_json: bool) -> None:
    finished = {row.id for row in done}
    listed: list[dict[str, Any]] = []
    for run in runs:
        tokens = studies.tokens(run, positions)
        seconds = _seconds(tokens["retraining"], run.plain.made, done)
        told = {"id": run.id, "subject": run.subject, "finished": run.id in finished}
        listed.append({**told, "tokens": tokens, "retraining_s": seconds})
    if as_json:
        console.emit({"runs": listed})
        return
    parts = ("scoring", "between", "retraining")
    cells = [
        (
            one["subject"],
            "yes" if one["finished"] else "-",
            *("?" if one["tokens"][part] is None else f"{one['tokens'][part]:,}" for part in parts),
            "?" if one["retraining_s"] is None else f"{one['retraining_s']:,.0f} s",
        )
        for one in listed
    ]
    display.table(("run ", "finished", "tokens scored", "retrained between", "retrained", "retraining takes"), cells)
    pruned = {run.pruned: studies.tokens(run, positions) for run in runs}
    known = [one["tokens"]["retraining"] for one in listed]
    said = (
        "some take whole passes over their data"
        if None in known
        else f"{sum(filter(None, known)):,} tokens retrained on"
    )
    console.say(f"{len(runs)} runs of {len(pruned)} pruned models; {said}")


def _seconds(tokens: int | None, recipe: str, done: tuple[rows.Row, ...]) -> float | None:
    """Return what retraining on so many tokens takes, by the finished runs of the same recipe; None without any."""
    if tokens == 0:
        return 0.0
    known = [row.costs["retraining"] for row in done if row.recipe == recipe and "retraining" in row.costs]
    rates = [cost.wall_s / cost.tokens for cost in known if cost.tokens]
    return tokens * statistics.median(rates) if rates and tokens is not None else None


@contextmanager
def _bars() -> Generator[Callable[..., None]]:
    """Yield step(what, done, total, loss): one bar for the study, and one for what is being done."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}")
    with console.progress(*columns, TimeRemainingColumn()) as bar:
        whole, part = bar.add_task("runs", total=None, loss=""), bar.add_task("", total=None, loss="")
        current = ""

        def step(what: str, done: int, total: int, loss: float | None = None) -> None:
            nonlocal current
            if what == "runs":
                bar.update(whole, completed=done, total=total)
                return
            if what != current:
                current = what
                bar.reset(part, description=what, total=total, loss="")
            bar.update(part, completed=done, total=total, loss="" if loss is None else f"loss {loss:.4f}")

        yield step
