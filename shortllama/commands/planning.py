"""The verbs about plans: `plan` chooses, `compose` joins, `show` and `diff` tell."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shortllama import checkpoint, console, display, journal, options, plans, pruning, sources
from shortllama import scores as score_files
from shortllama.commands import groups, studying
from shortllama.commands.resuming import resumable
from shortllama.difference import difference
from shortllama.errors import InputError
from shortllama.plans import Plan
from shortllama.retraining import record as retraining
from shortllama.scores import Scores
from shortllama.shape import ModelShape
from shortllama.sources import Source
from shortllama.studies import rows

PlanOut = Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write the plan here.")]
PlanPath = Annotated[Path, typer.Argument(help="A plan file, or a checkpoint folder that holds one.")]
Shown = Annotated[
    Path, typer.Argument(help="A plan or scores file, or the folder of a checkpoint or a study.", show_default=False)
]

# What a preset leaves open: how much to remove, and what must stay.
_BESIDE_PRESET = ("preset", "ratio", "blocks", "target_params", "at_most", "protect")


def plan(
    model: options.Model,
    *,
    choosing: groups.Choosing,
    measuring: groups.Measuring,
    allotting: groups.Allotting,
    calibrating: groups.Calibrating,
    out: PlanOut = None,
    as_json: options.Json = False,
) -> None:
    """Choose what to remove from a model, and write it as a plan. Scores the model first where --scores is not given.

    A catalogue name has no weights to score: its plan is blind, right in shape and arbitrary in the choice. A preset
    needs neither weights nor data.
    """
    options.check_output_file(out)
    source = sources.locate(model)
    with resumable([out]):
        made, _ = make(source, choosing, measuring, allotting, calibrating, out)
        if made.compensation and choosing.scores is None:
            console.note(
                "the biases of this plan come from its scores, which are not kept; to apply it later, write them "
                "first (score --out) and give them to plan and prune, or prune at once (prune --method)"
            )
        _deliver(made, source.shape, out, as_json)


def make(
    source: Source,
    choosing: groups.Choosing,
    measuring: groups.Measuring,
    allotting: groups.Allotting,
    calibrating: groups.Calibrating,
    out: Path | None,
) -> tuple[Plan, Scores | None]:
    """Return the plan of a method with its scores, or of a preset, and tell what the user should know about it.

    Where it has to score first, a journal beside `out` keeps what is finished; see `resumable`.
    """
    target, protection = choosing.target, choosing.protection
    if choosing.preset is not None:
        reason = "--preset is a published order that needs no scores"
        groups.refuse(reason, choosing, measuring, allotting, but=_BESIDE_PRESET)
        made = pruning.from_preset(source, choosing.preset, target, at_most=choosing.at_most, protect=protection)
        return made, None
    if choosing.method is None:
        raise InputError(
            "nothing says what to remove; give --plan FILE (prune), --method NAME with --ratio R or --preset NAME"
        )
    choice = groups.choice(choosing.method, choosing, measuring, allotting)
    scores = None if choosing.scores is None else score_files.read_scores(choosing.scores)
    with console.steps() as progress:
        return pruning.choose(
            source,
            choice,
            groups.scoring(measuring, calibrating),
            scores,
            progress=progress,
            note=console.note,
            journal=None if out is None else journal.beside(out),
        )


def compose(
    first: Annotated[Path, typer.Argument(help="The plan for the base model.", show_default=False)],
    second: Annotated[Path, typer.Argument(help="A plan for what the first one leaves.", show_default=False)],
    out: PlanOut = None,
    as_json: options.Json = False,
) -> None:
    """Join two plans into the one plan that equals applying the first and then the second."""
    options.check_output_file(out)
    earlier, later = plans.read_plan(first), plans.read_plan(second)
    base = sources.locate(earlier.base.model).shape
    _deliver(plans.compose(earlier, later, base), base, out, as_json)


def _deliver(made: Plan, base: ModelShape, out: Path | None, as_json: bool) -> None:
    if out is not None:
        plans.write_plan(out, made)
        console.say(f"wrote {out}")
    if as_json:
        console.emit(made)
    else:
        display.show_plan(made, base)


def show(path: Shown, as_json: options.Json = False) -> None:
    """Show what a plan keeps, how scores rank, or what a folder holds: a checkpoint, or a study (its tables)."""
    if (path / rows.FILE).is_file():
        studying.show(path, as_json)
        return
    if path.is_file() and score_files.is_scores(path):
        scores = score_files.read_scores(path)
        if as_json:
            console.emit(scores)
        else:
            display.show_scores(scores)
        return
    shape = sources.from_folder(str(path), path).shape if path.is_dir() else None
    held = plans.read_plan(path) if shape is None or (path / "plan.json").exists() else None
    base = pruning.base_at_hand(held) if held else None
    taught = retraining.read(path) if path.is_dir() else None
    costs = manifest.costs if path.is_dir() and (manifest := checkpoint.read_manifest(path)) else {}
    if shape is None and base is not None and held is not None:
        shape = plans.shape_of(held, base)
    if as_json:
        described = display.shape_document(str(path), shape, "float16") if shape else None
        counted = base.parameters if base else None
        found = {"plan": held, "shape": described, "base_parameters": counted, "retraining": taught, "costs": costs}
        console.emit(found)
        return
    if held is not None:
        display.show_plan(held, base)
    if shape is not None:
        display.show_shape(str(path), shape, "float16")
    if costs:
        display.show_costs(costs)
    if taught is not None:
        display.show_retraining(taught)


def diff(a: PlanPath, b: PlanPath, as_json: options.Json = False) -> None:
    """Show which blocks, KV groups and neurons only one of two plans for the same base keeps."""
    first, second = plans.read_plan(a), plans.read_plan(b)
    found = difference(first, second)
    if as_json:
        console.emit(found)
    else:
        display.show_difference((first, second), (str(a), str(b)), found)
