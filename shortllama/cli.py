"""The core's verbs as a typer application: parse, call the library, show. Decides nothing itself.

`bench.cli` mounts `app`, so that one program has every verb. torch and transformers are loaded only by the verbs that
compute with weights (score, eval, verify, prune, and plan where it must score), inside themselves.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from shortllama import blind, catalogue, console, display, exporting, options, plans, pruning, sources
from shortllama import scores as score_files
from shortllama.criteria import Reductions
from shortllama.difference import difference
from shortllama.errors import InputError, VerificationError
from shortllama.evaluation.results import Evaluation, write_evaluation
from shortllama.plans import Plan, Target
from shortllama.pruning import Choice, Scoring
from shortllama.removals import Unit
from shortllama.scores import Scores
from shortllama.shape import ModelShape, item_bytes
from shortllama.sources import Source
from shortllama.variants import Variant

if TYPE_CHECKING:
    from rich.progress import TaskID

    from shortllama.verification import Report

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

PlanOut = Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write the plan here.")]
PlanPath = Annotated[Path, typer.Argument(help="A plan file, or a checkpoint folder that holds one.")]


@app.command(epilog="Example: shortllama shapes llama-7b/depth-26")
def shapes(
    name: Annotated[
        str | None,
        typer.Argument(help="A model, a row of the catalogue, or a range such as llama-7b/depth:16..32."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="The type that weights and KV cache are priced in.")] = "float16",
    as_json: options.Json = False,
) -> None:
    """List the catalogue, or show what one shape costs: parameters, bytes, FLOPs, alignment. Needs no weights."""
    item_bytes(dtype)
    names = catalogue.names() if name is None else blind.expand(name)
    found = [(one, sources.locate(one).shape) for one in names]
    single = name is not None and len(found) == 1
    if as_json:
        documents = [display.shape_document(one, shape, dtype) for one, shape in found]
        console.emit(documents[0] if single else {"shapes": documents})
    elif single:
        display.show_shape(*found[0], dtype)
    else:
        display.show_shapes(found, dtype)


@app.command(epilog="Example: shortllama score reference --criterion ppl --out scores.json")
def score(
    model: options.Model,
    criterion: options.Criterion,
    unit: options.Unit = None,
    iterative: options.Iterative = False,
    weight_reduction: options.WeightReduction = "sum",
    block_reduction: options.BlockReduction = "sum",
    metric: options.Metric = None,
    estimator: options.Estimator = None,
    group_reduction: options.GroupReduction = None,
    calibration: options.Calibration = "self",
    samples: options.Samples = 10,
    length: options.Length = 128,
    seed: options.Seed = 0,
    data_dir: options.DataDir = None,
    trust_remote_code: options.Trust = False,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the scores here.")] = None,
    as_json: options.Json = False,
) -> None:
    """Measure how important each block, module, or KV group and neuron of a model is; higher = keep.

    --iterative removes one after the other until one is left; plan takes as many of them as it needs.
    """
    options.check_output_file(out)
    scoring = Scoring(
        calibration, samples, length, seed, data_dir, trust_remote_code, Reductions(weight_reduction, block_reduction)
    )
    variant = Variant(metric, estimator=estimator, group_reduction=group_reduction)
    how = {"unit": unit, "steps": pruning.Steps() if iterative else None, "variant": variant}
    with _steps() as progress:
        scores = pruning.score(sources.locate(model), criterion, scoring, **how, progress=progress)
    if out is not None:
        score_files.write_scores(out, scores)
        console.say(f"wrote {out}")
    if as_json:
        console.emit(scores)
    else:
        display.show_scores(scores)


@app.command(epilog="Example: shortllama plan llama-7b --method wanda-sp --ratio 0.2 --out plan.json")
def plan(
    model: options.Model,
    method: options.Method = None,
    preset: options.Preset = None,
    ratio: options.Ratio = None,
    blocks: options.Blocks = None,
    target_params: options.TargetParams = None,
    at_most: options.AtMost = False,
    protect: options.Protect = None,
    align: options.Align = 1,
    unit: options.Unit = None,
    iterative: options.Iterative = False,
    scores: options.ScoresFile = None,
    weight_reduction: options.WeightReduction = "sum",
    block_reduction: options.BlockReduction = "sum",
    metric: options.Metric = None,
    estimator: options.Estimator = None,
    group_reduction: options.GroupReduction = None,
    structure: options.Structure = None,
    remove_heads: options.RemoveHeads = None,
    steps: options.VariantSteps = None,
    calibration: options.Calibration = "self",
    samples: options.Samples = 10,
    length: options.Length = 128,
    seed: options.Seed = 0,
    data_dir: options.DataDir = None,
    trust_remote_code: options.Trust = False,
    out: PlanOut = None,
    as_json: options.Json = False,
) -> None:
    """Choose what to remove from a model, and write it as a plan. Scores the model first where --scores is not given.

    A catalogue name has no weights to score: its plan is blind, right in shape and arbitrary in the choice. A preset
    needs neither weights nor data.
    """
    options.check_output_file(out)
    scoring = Scoring(
        calibration, samples, length, seed, data_dir, trust_remote_code, Reductions(weight_reduction, block_reduction)
    )
    target = options.optional_target(ratio, blocks, target_params)
    variant = Variant(metric, structure, remove_heads, estimator, group_reduction, steps)
    limits = _Limits(at_most, options.protection(protect), align, unit, iterative, variant)
    source = sources.locate(model)
    made, _ = _make(source, method, preset, target, limits, scoring, scores)
    if made.compensation and scores is None:
        console.say(
            "note: the biases of this plan come from its scores, which are not kept; to apply it later, write them "
            "first (score --out) and give them to plan and prune, or prune at once (prune --method)"
        )
    _deliver(made, source.shape, out, as_json)


@app.command(epilog="Example: shortllama compose depth.json width.json --out both.json")
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


@app.command(epilog="Example: shortllama show plan.json")
def show(path: PlanPath, as_json: options.Json = False) -> None:
    """Show what a plan keeps, or what a checkpoint folder holds: its plan, shape and costs."""
    shape = sources.from_folder(str(path), path).shape if path.is_dir() else None
    held = plans.read_plan(path) if shape is None or (path / "plan.json").exists() else None
    base = pruning.base_at_hand(held) if held else None
    if shape is None and base is not None and held is not None:
        shape = plans.shape_of(held, base)
    if as_json:
        described = display.shape_document(str(path), shape, "float16") if shape else None
        console.emit({"plan": held, "shape": described, "base_parameters": base.parameters if base else None})
        return
    if held is not None:
        display.show_plan(held, base)
    if shape is not None:
        display.show_shape(str(path), shape, "float16")


@app.command(epilog="Example: shortllama diff taylor.json ppl.json")
def diff(a: PlanPath, b: PlanPath, as_json: options.Json = False) -> None:
    """Show which blocks, KV groups and neurons only one of two plans for the same base keeps."""
    first, second = plans.read_plan(a), plans.read_plan(b)
    found = difference(first, second)
    if as_json:
        console.emit(found)
    else:
        display.show_difference((first, second), (str(a), str(b)), found)


@app.command(epilog="Example: shortllama prune reference --method ppl --ratio 0.25 --out pruned")
def prune(
    model: options.Model,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder to write; only an older result is replaced.", show_default=False)
    ],
    plan_file: Annotated[
        Path | None, typer.Option("--plan", metavar="FILE", help="Apply this plan, choose nothing.")
    ] = None,
    method: options.Method = None,
    preset: options.Preset = None,
    ratio: options.Ratio = None,
    blocks: options.Blocks = None,
    target_params: options.TargetParams = None,
    at_most: options.AtMost = False,
    protect: options.Protect = None,
    align: options.Align = 1,
    unit: options.Unit = None,
    iterative: options.Iterative = False,
    scores: options.ScoresFile = None,
    weight_reduction: options.WeightReduction = "sum",
    block_reduction: options.BlockReduction = "sum",
    metric: options.Metric = None,
    estimator: options.Estimator = None,
    group_reduction: options.GroupReduction = None,
    structure: options.Structure = None,
    remove_heads: options.RemoveHeads = None,
    steps: options.VariantSteps = None,
    calibration: options.Calibration = "self",
    samples: options.Samples = 10,
    length: options.Length = 128,
    seed: options.Seed = 0,
    data_dir: options.DataDir = None,
    trust_remote_code: options.Trust = False,
    as_json: options.Json = False,
) -> None:
    """Write a pruned checkpoint and verify it: reloaded in a fresh process, its outputs must be the right ones.

    The result loads in stock transformers wherever one of its classes has the pruned shape.
    """
    options.check_output_folder(out)
    source = sources.locate(model)
    if source.folder is None:
        raise InputError(f"{model} is a shape without weights; prune a folder, a hub id or 'reference'")
    if plan_file is not None:
        made = plans.read_plan(plan_file)
        options.refuse_choice(
            method=method,
            preset=preset,
            ratio=ratio,
            blocks=blocks,
            target_params=target_params,
            scores=None if made.compensation else scores,
            unit=unit,
            iterative=iterative,
            metric=metric,
            structure=structure,
            remove_heads=remove_heads,
            estimator=estimator,
            group_reduction=group_reduction,
            steps=steps,
        )
        found = None if scores is None else score_files.read_scores(scores)
    else:
        scoring = Scoring(
            calibration,
            samples,
            length,
            seed,
            data_dir,
            trust_remote_code,
            Reductions(weight_reduction, block_reduction),
        )
        target = options.optional_target(ratio, blocks, target_params)
        variant = Variant(metric, structure, remove_heads, estimator, group_reduction, steps)
        limits = _Limits(at_most, options.protection(protect), align, unit, iterative, variant)
        made, found = _make(source, method, preset, target, limits, scoring, scores)
    _write(source, made, found, out, as_json)


@app.command(epilog="Example: shortllama verify pruned --against reference")
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
    _require(report)


@app.command(epilog="Example: shortllama export pruned --to padded --out uniform")
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
        _require(report)


@app.command("eval", epilog="Example: shortllama eval pruned --ppl wikitext2 --ppl book.txt --out quality.json")
def evaluate(
    model: options.Model,
    ppl: Annotated[
        list[str] | None,
        typer.Option(metavar="SRC", help="Perplexity on this text (as --calibration of score); may be repeated."),
    ] = None,
    seed: options.Seed = 0,
    data_dir: options.DataDir = None,
    trust_remote_code: options.Trust = False,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the evaluation here.")] = None,
    as_json: options.Json = False,
) -> None:
    """Measure what a model is worth: perplexity, with the protocol (window, stride, BOS, tokens) beside each number."""
    options.check_output_file(out)
    if not ppl:
        raise InputError("nothing to evaluate; give --ppl SRC, for example --ppl self")
    source = sources.locate(model)
    with _steps() as progress:
        quality = pruning.evaluate(
            source, ppl, seed=seed, data_dir=data_dir, trust_remote_code=trust_remote_code, progress=progress
        )
    found = Evaluation({pruning.base_name(source): quality})
    if out is not None:
        write_evaluation(out, found)
        console.say(f"wrote {out}")
    if as_json:
        console.emit(found)
    else:
        display.show_evaluation(found)


# -- what the verbs share ---------------------------------------------------------------------------------------------


@contextmanager
def _steps() -> Generator[pruning.Progress]:
    """Yield progress(what, done, total), shown as one bar for each `what`."""
    with console.progress() as bar:
        tasks: dict[str, TaskID] = {}

        def step(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield step


class _Limits(NamedTuple):
    """What a choice has beside its method and target; see `Choice`."""

    at_most: bool
    protect: tuple[int, int] | None
    align: int
    unit: Unit | None
    iterative: bool
    variant: Variant


def _make(
    source: Source,
    method: str | None,
    preset: str | None,
    target: Target | None,
    limits: _Limits,
    scoring: Scoring,
    scores_path: Path | None,
) -> tuple[Plan, Scores | None]:
    """Return the plan of a method with its scores, or of a preset, and tell what the user should know about it."""
    if preset is not None:
        options.refuse_beside_preset(
            method=method,
            align=None if limits.align == 1 else limits.align,
            unit=limits.unit,
            iterative=limits.iterative,
            scores=scores_path,
            **{name: getattr(limits.variant, name) for name in limits.variant.__struct_fields__},
        )
        return pruning.from_preset(source, preset, target, at_most=limits.at_most, protect=limits.protect), None
    if method is None:
        raise InputError(
            "nothing says what to remove; give --plan FILE (prune), --method NAME with --ratio R or --preset NAME"
        )
    choice = Choice(method, options.required(target), *limits)
    scores = None if scores_path is None else score_files.read_scores(scores_path)
    with _steps() as progress:
        return pruning.choose(
            source, choice, scoring, scores, progress=progress, note=lambda text: console.say(f"note: {text}")
        )


def _deliver(made: Plan, base: ModelShape, out: Path | None, as_json: bool) -> None:
    if out is not None:
        plans.write_plan(out, made)
        console.say(f"wrote {out}")
    if as_json:
        console.emit(made)
    else:
        display.show_plan(made, base)


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
    manifest = pruning.write(source, made, out, scores=scores)
    report = verification.verify(out, source.name)
    if as_json:
        console.emit({"folder": str(out), "plan": made, "manifest": manifest, "verification": report})
    else:
        display.show_report(report)
    _require(report)
    console.say(f"wrote {out}, verified")


def _require(report: Report) -> None:
    """Raise VerificationError where a check failed. The folder stays, to be looked into."""
    if not report.ok:
        raise VerificationError(f"{report.folder} is not what it should be, do not use it: {report.failures}")
