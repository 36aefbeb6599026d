"""The library in Python, as `import shortllama as sl` shows it: load, score, plan, apply.

    import shortllama as sl

    model, tokenizer = sl.load("reference")
    plan = sl.plan(model, method="taylor+", ratio=0.2)
    pruned = sl.apply(plan, model)

Thin: each function is the library's own step for a model in memory. The commands do the same for named models, and
write checkpoints (`shortllama prune`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

from shortllama import methods, planning, presets, pruning, sources
from shortllama.calibration import DEFAULT_LENGTH, DEFAULT_SAMPLES, SELF, Calibration
from shortllama.criteria import Reductions
from shortllama.errors import InputError
from shortllama.plans import Plan, Target
from shortllama.removals import Unit
from shortllama.scores import Scores
from shortllama.shape import ModelShape
from shortllama.variants import Variant


def load(
    name: str | Path,
    *,
    dtype: str | None = None,
    device: str = "cpu",
    attention: str = "sdpa",
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """Return (model, tokenizer or None) of a folder, a hub id, `reference`, or a catalogue name (random weights).

    `dtype` None keeps the stored one. Raises InputError for what cannot be found or read.
    """
    from shortllama import checkpoint

    return checkpoint.load(name, dtype=dtype, device=device, attention=attention, trust_remote_code=trust_remote_code)


@overload
def score(
    model: Any,
    criterion: str,
    *,
    calibration: str | Calibration = ...,
    tokenizer: Any = ...,
    samples: int = ...,
    length: int = ...,
    seed: int = ...,
    data_dir: Path | None = ...,
    unit: Unit | None = ...,
    reductions: Reductions | None = ...,
    towards: ModelShape | None = ...,
    variant: Variant | None = ...,
) -> Scores: ...


@overload
def score(
    model: Any,
    criterion: Sequence[str],
    *,
    calibration: str | Calibration = ...,
    tokenizer: Any = ...,
    samples: int = ...,
    length: int = ...,
    seed: int = ...,
    data_dir: Path | None = ...,
    unit: Unit | None = ...,
    reductions: Reductions | None = ...,
    towards: ModelShape | None = ...,
    variant: Variant | None = ...,
) -> dict[str, Scores]: ...


def score(
    model: Any,
    criterion: str | Sequence[str],
    *,
    calibration: str | Calibration = SELF,
    tokenizer: Any = None,
    samples: int = DEFAULT_SAMPLES,
    length: int = DEFAULT_LENGTH,
    seed: int = 0,
    data_dir: Path | None = None,
    unit: Unit | None = None,
    reductions: Reductions | None = None,
    towards: ModelShape | None = None,
    variant: Variant | None = None,
) -> Scores | dict[str, Scores]:
    """Return the scores of a transformers model by a criterion, or by several as a dict; higher = keep.

    Several share the calibration, and those that only watch a forward pass (bi, angular, relative-magnitude, norm)
    share that pass.

    `calibration`: "self" (sampled from the model), a text or JSONL file (needs `tokenizer`), `ids:FILE.jsonl`, or a
    Calibration made before. `unit` "module" scores attention and FFNs apart. `reductions`: how mag and taylor aggregate
    weights. `towards`: the shape it will be pruned to, which wanda-sp and llm-pruner in steps read. `variant`: what
    flap or llm-pruner measures.
    Raises InputError for a calibration that is missing, too short or malformed.
    """
    from shortllama import scoring

    names = (criterion,) if isinstance(criterion, str) else tuple(criterion)
    used = _calibration(model, names, calibration, tokenizer, samples, length, seed, data_dir, variant)
    how: dict[str, Any] = {"unit": unit, "reductions": reductions, "towards": towards, "variant": variant}
    found = scoring.score_all(model, names, used, **how, seed=seed)
    return found[criterion] if isinstance(criterion, str) else found


def _calibration(
    model: Any,
    names: Sequence[str],
    source: str | Calibration,
    tokenizer: Any,
    samples: int,
    length: int,
    seed: int,
    data_dir: Path | None,
    variant: Variant | None,
) -> Calibration | None:
    """The calibration that the criteria need, or None."""
    from shortllama import calibration, criteria

    if isinstance(source, Calibration):
        return source
    if all(criteria.needs(criteria.lookup(name), variant) != "calibration" for name in names):
        return None
    return calibration.load(
        source, tokenizer=tokenizer, model=model, samples=samples, length=length, seed=seed, data_dir=data_dir
    )


def plan(
    model: Any,
    *,
    method: str | None = None,
    preset: str | None = None,
    ratio: float | None = None,
    blocks: int | None = None,
    target_params: float | None = None,
    at_most: bool = False,
    protect: tuple[int, int] | None = None,
    align: int = 1,
    unit: Unit | None = None,
    iterative: bool = False,
    variant: Variant | None = None,
    reductions: Reductions | None = None,
    scores: Scores | None = None,
    calibration: str | Calibration = SELF,
    tokenizer: Any = None,
    samples: int = DEFAULT_SAMPLES,
    length: int = DEFAULT_LENGTH,
    seed: int = 0,
    data_dir: Path | None = None,
) -> Plan:
    """Return which parts of `model` a method keeps. `model` is a transformers model, or a name as in `load`.

    Give one of `ratio` (share of the blocks, of their parameters by module, or of heads and neurons for width methods),
    `blocks` (how many go) and `target_params` (parameters left; `at_most` never exceeds them). `protect` is (first,
    last) blocks that stay, by default the method's. `align` rounds kept widths up to a multiple. `unit` "module"
    removes attention and FFNs apart, and `iterative` scores what is left again after each removal. `variant` chooses
    among a width method's published variants; flap's biases take its scores in `apply` too. Without `scores` the model
    is scored first, as in `score` (a named one is loaded for it); a catalogue shape gets a blind plan, for random
    weights only. In place of a method, `preset` names a published order (`presets`), which needs no scores and, where
    its name ends in a label, no target. Raises InputError for an unknown method, a target out of range, and scores of
    another model.
    """
    target = _target(ratio, blocks, target_params)
    source = _source(model)
    name, shape = (_name(model), _shape(model)) if source is None else (pruning.base_name(source), source.shape)
    if (method is None) == (preset is None):
        raise InputError("give either a method or a preset")
    if preset is not None:
        return presets.plan(preset, model=name, shape=shape, target=target, protect=protect, at_most=at_most)
    if target is None or method is None:
        raise InputError("give exactly one of ratio, blocks and target_params; saw 0")
    made = {"model": name, "shape": shape, "target": target, "protect": protect, "align": align, "at_most": at_most}
    made |= {"unit": unit, "iterative": iterative, "variant": variant}
    towards = planning.outlook(method, **{key: value for key, value in made.items() if key != "model"})
    if scores is None and source is not None:
        if source.folder is None:
            return planning.make_plan_for(method, **made)
        model, tokenizer = pruning.load(source)
    if scores is None:
        from shortllama import scoring

        row = methods.lookup(method)
        used = _calibration(model, (row.criterion,), calibration, tokenizer, samples, length, seed, data_dir, variant)
        how: dict[str, Any] = {"unit": unit, "seed": seed, "reductions": reductions}
        if iterative:
            goal = planning.goal_for(method, shape=shape, target=target, unit=unit, at_most=at_most)
            stay = row.protect if protect is None else protect
            scores = scoring.iterate(model, row.criterion, used, goal=goal, protect=stay, **how)
        else:
            scores = scoring.score(model, row.criterion, used, towards=towards, variant=variant, **how)
    return planning.make_plan_for(method, **made, scores=scores, seed=seed)


def apply(plan: Plan, model: Any, *, scores: Scores | None = None) -> Any:
    """Return a new model with what `plan` keeps of `model`, which is untouched.

    A plan with bias compensation (flap) takes the `scores` it was made from. Raises PlanError for other scores, a plan
    of another base, and a blind plan on real weights.
    """
    from shortllama import compensation, surgery

    return surgery.apply(plan, model, compensation=compensation.biases(plan, model, scores))


def _target(ratio: float | None, blocks: int | None, target_params: float | None) -> Target | None:
    given = {"ratio": ratio, "blocks": blocks, "target-params": target_params}
    chosen = [Target(kind, value) for kind, value in given.items() if value is not None]
    if len(chosen) > 1:
        raise InputError(f"give exactly one of ratio, blocks and target_params; saw {len(chosen)}")
    return chosen[0] if chosen else None


def _source(model: Any) -> sources.Source | None:
    """Return what a name stands for; None for a model in memory."""
    if isinstance(model, Path):
        return sources.from_folder(str(model), model)
    return sources.locate(model) if isinstance(model, str) else None


def _name(model: Any) -> str:
    """Return what a plan calls a model in memory: the last part of where it came from (no host paths), or its type."""
    return Path(getattr(model.config, "_name_or_path", "") or model.config.model_type).name


def _shape(model: Any) -> ModelShape:
    from shortllama import surgery

    return surgery.shape_of(model)
