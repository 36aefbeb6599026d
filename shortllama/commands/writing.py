"""The verbs about checkpoints: `prune` and `export` write one and prove it, `verify` proves one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shortllama import console, display, exporting, options, plans, pruning, sources
from shortllama import scores as score_files
from shortllama.commands import groups
from shortllama.commands.planning import make
from shortllama.commands.resuming import resumable
from shortllama.errors import InputError, VerificationError
from shortllama.plans import Plan
from shortllama.scores import Scores
from shortllama.sources import Source

if TYPE_CHECKING:
    from shortllama.verification import Report


def prune(
    model: options.Model,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder to write; only an older result is replaced.", show_default=False)
    ],
    *,
    plan: Annotated[Path | None, typer.Option(metavar="FILE", help="Apply this plan, choose nothing.")] = None,
    choosing: groups.Choosing,
    measuring: groups.Measuring,
    allotting: groups.Allotting,
    calibrating: groups.Calibrating,
    as_json: options.Json = False,
) -> None:
    """Write a pruned checkpoint and verify it: reloaded in a fresh process, its outputs must be the right ones.

    The result loads in stock transformers wherever one of its classes has the pruned shape.
    """
    options.check_output_folder(out)
    source = sources.locate(model)
    if source.folder is None:
        raise InputError(f"{model} is a shape without weights; prune a folder, a hub id or 'reference'")
    with resumable([out]):
        if plan is None:
            made, scores = make(source, choosing, measuring, allotting, calibrating, out)
        else:
            made = plans.read_plan(plan)
            # A plan with biases takes the scores that hold them; where files are looked up matters to no plan.
            but = ("data_dir", "trust_remote_code", *(["scores"] if made.compensation else []))
            reason = "--plan says what to remove already"
            groups.refuse(reason, choosing, measuring, allotting, calibrating, but=but)
            scores = None if choosing.scores is None else score_files.read_scores(choosing.scores)
        _write(source, made, scores, out, as_json)


def _write(source: Source, made: Plan, scores: Scores | None, out: Path, as_json: bool) -> None:
    """Show what changes, write the checkpoint, prove it. Raises VerificationError where the proof fails."""
    from shortllama import checkpoint, compensation, verification

    plans.check_base(made, source.shape)
    compensation.check(made, scores)
    if made.compensation is None:
        checkpoint.refuse_unwritable(made)
    folder = sources.fetch(source)
    checkpoint.stored_tensors(folder, source.shape)
    if not as_json:
        display.show_before_after(source.shape, plans.shape_of(made, source.shape))
    with console.steps(in_bytes=True) as progress:
        manifest = pruning.write(source, made, out, scores=scores, progress=progress)
    report = verification.verify(out, source.name)
    if as_json:
        console.emit({"folder": str(out), "plan": made, "manifest": manifest, "verification": report})
    else:
        display.show_report(report)
    require(report)
    console.say(f"wrote {out}, verified")


def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint folder.", show_default=False)],
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The dense model: outputs must equal it with the rest masked.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Reload a checkpoint in a fresh process and compare its outputs; exit code 1 where they differ."""
    from shortllama import verification

    report = verification.verify(folder, against)
    if as_json:
        console.emit(report)
    else:
        display.show_report(report)
    require(report)


def export(
    model: options.Model,
    to: Annotated[
        str,
        typer.Option(metavar="FORM", help="padded (uniform, for stock transformers) or gguf (for llama.cpp)."),
    ],
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder to write; only an older export is replaced.", show_default=False)
    ],
    as_json: options.Json = False,
) -> None:
    """Write a checkpoint in another form that computes the same, for software that cannot take its shape."""
    exporting.check_form(to)
    options.check_output_folder(out, exporting.MARK)
    record = exporting.export(model, to, out)
    report = None
    if to == "padded":
        from shortllama import verification

        report = verification.verify_padded(out, model)
    if as_json:
        console.emit({"folder": str(out), "export": record, "verification": report})
    else:
        display.show_export(str(out), record)
        if report is not None:
            display.show_report(report)
    if report is not None:
        require(report)


def require(report: Report) -> None:
    """Raise VerificationError where a check failed. The folder stays, to be looked into."""
    if not report.ok:
        raise VerificationError(f"{report.folder} is not what it should be, do not use it: {report.failures}")
