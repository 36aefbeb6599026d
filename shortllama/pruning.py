"""Verbs on models by name: score one, choose what to remove from it, write it. What commands and sweeps share.

Importing this loads no torch; the verbs do, once all that can be refused without it has been refused.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from shortllama import catalogue, costs, criteria, files, methods, planning, plans, presets, removals, sources
from shortllama.errors import InputError, UnsupportedError
from shortllama.journal import resume
from shortllama.plans import Plan, Target
from shortllama.removals import Goal, Unit
from shortllama.scores import Scores
from shortllama.shape import ModelShape
from shortllama.sources import Source
from shortllama.variants import Variant

if TYPE_CHECKING:
    from shortllama.checkpoint import Manifest

Progress = Callable[[str, int, int], None]


class Scoring(msgspec.Struct, frozen=True):
    """How to obtain scores where none are given. Defaults are the paper's: 10 samples of 128 tokens, sums.

    `device` None: see `compute_device`.
    """

    calibration: str = "self"
    samples: int = 10
    length: int = 128
    seed: int = 0
    data_dir: Path | None = None
    trust_remote_code: bool = False
    device: str | None = None
    reductions: criteria.Reductions = criteria.Reductions()


class Steps(msgspec.Struct, frozen=True):
    """An iterative run: until when, and which blocks at either end stay. By default until one piece is left."""

    goal: Goal = Goal(sys.maxsize, "reach", "count")
    protect: tuple[int, int] = (0, 0)


class Choice(msgspec.Struct, frozen=True):
    """What to remove: a method's name, a target, and constraints. `protect` None: what the method protects.

    `unit` "module" removes attention and FFNs apart; `iterative` scores what is left again after each removal;
    `variant` is that of a width method.
    """

    method: str
    target: Target
    at_most: bool = False
    protect: tuple[int, int] | None = None
    align: int = 1
    unit: Unit | None = None
    iterative: bool = False
    variant: Variant = Variant()


def choose(
    source: Source,
    choice: Choice,
    scoring: Scoring,
    scores: Scores | None = None,
    *,
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
    journal: Path | None = None,
) -> tuple[Plan, Scores | None]:
    """Return the plan of `choice` for a model, and the scores it was made from: those given, else by scoring it first.

    A shape without weights gets a blind plan. `progress(what, done, total)` is called while a model is scored, and
    `note(sentence)` for what the user should know about the plan. `journal`: where scoring keeps what is finished.
    Raises InputError for anything that cannot be done, before loading the model.
    """
    towards = _outlook(source, choice)
    if scores is None and source.folder is not None:
        kept: dict[str, Any] = {"progress": progress, "journal": journal, "note": note}
        scores = _score_for(source, choice, scoring, towards, kept)
    made = _plan(source, choice, scores, None if scores is None else scoring.seed)
    for remark in _remarks(source.shape, choice, made, scores):
        if note is not None and remark:
            note(remark)
    return made, scores


def from_preset(
    source: Source,
    name: str,
    target: Target | None = None,
    *,
    at_most: bool = False,
    protect: tuple[int, int] | None = None,
) -> Plan:
    """Return the plan of a published removal order for a model; see `presets.plan`."""
    return presets.plan(
        name, model=base_name(source), shape=source.shape, target=target, at_most=at_most, protect=protect
    )


def _score_for(
    source: Source, choice: Choice, scoring: Scoring, towards: ModelShape | None, how: dict[str, Any]
) -> Scores:
    """Score a model towards the shape that it will have, or step by step until the target is settled."""
    criterion = methods.lookup(choice.method).criterion
    if not choice.iterative:
        return score(source, criterion, scoring, unit=choice.unit, towards=towards, variant=choice.variant, **how)
    goal = planning.goal_for(
        choice.method, shape=source.shape, target=choice.target, unit=choice.unit, at_most=choice.at_most
    )
    steps = Steps(goal, _protection(choice))
    return score(source, criterion, scoring, unit=choice.unit, steps=steps, **how)


def _protection(choice: Choice) -> tuple[int, int]:
    return methods.lookup(choice.method).protect if choice.protect is None else choice.protect


def _remarks(shape: ModelShape, choice: Choice, made: Plan, scores: Scores | None) -> list[str | None]:
    found = [planning.remark(made, shape)]
    if scores is not None:
        found.append(criteria.remark(scores, plans.shape_after(shape, made.keep)))
        found.append(removals.doubt(scores, shape, made.keep, _protection(choice)))
    return found


def _outlook(source: Source, choice: Choice) -> ModelShape | None:
    """Check all that can be checked without scores; return the shape that the plan will have, if that tells it."""
    return planning.outlook(
        choice.method,
        shape=source.shape,
        target=choice.target,
        protect=choice.protect,
        align=choice.align,
        at_most=choice.at_most,
        unit=choice.unit,
        iterative=choice.iterative,
        variant=choice.variant,
    )


def _plan(source: Source, choice: Choice, scores: Scores | None, seed: int | None) -> Plan:
    return planning.make_plan_for(
        choice.method,
        model=base_name(source),
        shape=source.shape,
        target=choice.target,
        scores=scores,
        protect=choice.protect,
        align=choice.align,
        at_most=choice.at_most,
        unit=choice.unit,
        iterative=choice.iterative,
        variant=choice.variant,
        seed=seed,
    )


def base_name(source: Source) -> str:
    """Return what a plan calls its base: the name given, but of a local folder the last part only (no host paths)."""
    held = f"+{source.shape.quantised}" if source.shape.quantised else ""
    local = source.folder is not None and not source.on_hub and source.name != sources.REFERENCE + held
    return source.folder.resolve().name + held if local and source.folder else source.name


def score(
    source: Source,
    criterion: str,
    scoring: Scoring,
    *,
    unit: Unit | None = None,
    steps: Steps | None = None,
    towards: ModelShape | None = None,
    variant: Variant | None = None,
    progress: Progress | None = None,
    journal: Path | None = None,
    note: Callable[[str], None] | None = None,
) -> Scores:
    """Return the scores of a named model by a criterion; see `score_all`."""
    how: dict[str, Any] = {"unit": unit, "steps": steps, "towards": towards, "variant": variant}
    journals = {} if journal is None else {criterion: journal}
    return score_all(source, (criterion,), scoring, **how, progress=progress, journals=journals, note=note)[criterion]


def score_all(
    source: Source,
    names: Sequence[str],
    scoring: Scoring,
    *,
    unit: Unit | None = None,
    steps: Steps | None = None,
    towards: ModelShape | None = None,
    variant: Variant | None = None,
    progress: Progress | None = None,
    journals: Mapping[str, Path] | None = None,
    note: Callable[[str], None] | None = None,
) -> dict[str, Scores]:
    """Return the scores of a named model by each criterion; loads it, and its calibration where one needs that, once.

    `unit` "module" scores attention and FFNs apart. `steps`: score what is left again after each removal. `towards`:
    the shape it will be pruned to, for criteria that depend on it. `variant`: what a width method measures. All hold
    for every criterion. `journals`: a file for each criterion that keeps what is finished, so that a run with equal
    arguments goes on after a kill (`journal`); they stay, to be discarded once the scores are safe. `note` is told
    when one is gone on with, and how much memory scoring needs. Raises InputError for a shape without weights where a
    criterion reads them.
    """
    needs = {name: _needs(source, name, scoring, unit, variant, iterative=steps is not None) for name in names}
    from shortllama import calibration, surgery
    from shortllama import scoring as engine

    report = progress or _silent
    device = compute_device(scoring.device)
    if set(needs.values()) == {"nothing"}:
        model, tokenizer = surgery.build(source.shape, device="meta"), None
    else:
        model, tokenizer = load(source, device=device, trust_remote_code=scoring.trust_remote_code)
    used = None
    if "calibration" in needs.values():
        used = calibration.load(
            scoring.calibration,
            tokenizer=tokenizer,
            model=model,
            samples=scoring.samples,
            length=scoring.length,
            seed=scoring.seed,
            data_dir=scoring.data_dir,
            progress=lambda done, total: report("calibration", done, total),
        )
    asked = {"unit": unit, "variant": variant, "reductions": scoring.reductions, "seed": scoring.seed, "steps": steps}
    asked |= {"towards": towards, "calibration": used and used.description["digest"], "device": str(model.device)}
    begun = {
        name: resume(path, _key(source, model, {"criterion": name, **asked}), note or (lambda _: None))
        for name, path in (journals or {}).items()
        if needs[name] != "nothing"
    }
    how: dict[str, Any] = {"unit": unit, "seed": scoring.seed, "reductions": scoring.reductions}

    def told(label: str) -> Callable[[int, int], None]:
        return lambda done, total: report(f"{label} scores", done, total)

    if steps is None:
        how |= {"towards": towards, "variant": variant, "progress": told(", ".join(needs)), "journals": begun}
        how["note"] = note
        return engine.score_all(model, tuple(needs), used, **how)
    goal: dict[str, Any] = {"goal": steps.goal, "protect": steps.protect}
    return {
        name: engine.iterate(model, name, used, **goal, **how, progress=told(name), journal=begun.get(name), note=note)
        for name in needs
    }


def _needs(
    source: Source,
    name: str,
    scoring: Scoring,
    unit: Unit | None,
    variant: Variant | None,
    *,
    iterative: bool,
) -> str:
    """Return what a criterion reads, after checking all that can be checked before loading the model."""
    chosen = criteria.lookup(name)
    criteria.check(chosen, unit, scoring.reductions, iterative=iterative)
    (variant or Variant()).check_measured(name)
    needs = criteria.needs(chosen, variant)
    if needs != "nothing" and source.folder is None:
        raise InputError(
            f"{source.name} is a shape without weights, and criterion {name} reads them; "
            "give a folder, a hub id or 'reference' (shortllama plan makes blind plans of shapes)"
        )
    return needs


def _key(source: Source, model: Any, asked: dict[str, Any]) -> dict[str, Any]:
    """Return all that decides scores on one machine: the model's files, what was asked, and the software.

    Weight files count by name, size and time of change: reading them to the last byte again would cost what it saves.
    """
    import torch
    import transformers

    from shortllama import checkpoint

    folder = sources.fetch(source)
    stats = {path.name: path.stat() for path in sorted(folder.glob("*.safetensors"))}
    identity = {"config": msgspec.json.decode(files.read_bytes(folder / "config.json"))}
    identity |= {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
    versions = {"shortllama": checkpoint.package_version(), "torch": str(torch.__version__)}
    versions |= {"transformers": transformers.__version__}
    return msgspec.to_builtins({"model": identity, "dtype": str(model.dtype), "versions": versions, **asked})


def write(
    source: Source, plan: Plan, out: Path, *, scores: Scores | None = None, progress: Progress | None = None
) -> Manifest:
    """Write what `plan` leaves of a named model to the folder `out`; returns its manifest. `progress` counts bytes.

    From file to file, or through a loaded model where the plan has bias compensation, which takes the `scores` that it
    was made from. Raises PlanError for a blind plan, other scores or another base, InputError for an unusable `out`.
    """
    from shortllama import checkpoint, compensation

    compensation.check(plan, scores)
    folder = sources.fetch(source)
    report = partial(progress or _silent, f"writing {out.name}")
    spent = {"scoring": scores.cost} if scores is not None and scores.cost is not None else {}
    if plan.compensation is None:
        return checkpoint.write(folder, plan, out, costs=spent, progress=report)
    from shortllama import surgery

    checkpoint.refuse_own_folder(out, folder)
    applying = costs.start()
    model, _ = checkpoint.load(folder)
    pruned = surgery.apply(plan, model, compensation=compensation.biases(plan, model, scores))
    spent["applying"] = applying()
    return checkpoint.save(pruned, plan, out, companions=folder, costs=spent, progress=report)


def load(source: Source, *, device: str | None = None, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """Return (model, tokenizer or None) on `device`; None: see `compute_device`.

    On a CPU weights are float32: 16-bit arithmetic is slow there, and coarse. On a GPU they stay as stored. Those of a
    source that says so in its shape are quantised, on a GPU from bfloat16, which all its kernels know.
    """
    from shortllama import checkpoint

    device = compute_device(device)
    return checkpoint.load(
        sources.fetch(source),
        dtype="float32" if device == "cpu" else "bfloat16" if source.shape.quantised else None,
        device=device,
        trust_remote_code=trust_remote_code,
        quantised=source.shape.quantised,
    )


def compute_device(name: str | None) -> str:
    """Return the device to compute on: `name`, or for None the first CUDA device if there is one, else the CPU.

    Raises UnsupportedError for one that this machine lacks, or that holds no values.
    """
    import torch

    from shortllama import surgery

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    surgery.check_device(name)
    if name == "meta":
        raise UnsupportedError("device 'meta' holds no values to compute with; give cpu, or cuda:N")
    return name


def dense_base(source: Source) -> Source | None:
    """Return the model that a pruned folder was made from; None for a folder without a plan.

    Raises InputError where the name in its plan does not lead to a model of that shape from here.
    """
    if source.folder is None or not (source.folder / "plan.json").is_file():
        return None
    base = plans.read_plan(source.folder).base
    try:
        found = sources.locate(base.model)
    except InputError:
        found = None
    if found is None or found.folder is None or found.shape.digest() != base.shape_digest:
        raise InputError(
            f"{source.name}: 'self' text is sampled from the dense model, and its base {base.model!r} is not found "
            "from here; run where that name leads to it, or give a text file or ids:FILE.jsonl"
        )
    return found


def base_at_hand(plan: Plan) -> ModelShape | None:
    """Return the shape of a plan's base where its name leads there without the network, else None."""
    name = plan.base.model
    if not (catalogue.knows(name) or name == sources.REFERENCE or Path(name).is_dir()):
        return None
    try:
        shape = sources.locate(name).shape
    except InputError:
        return None
    return shape if shape.digest() == plan.base.shape_digest else None


def _silent(what: str, done: int, total: int) -> None:
    pass
