"""Retraining of a model by name, from folder to folder: what the command does, once its options are read.

Importing this loads no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from shortllama import files, plans, pruning, sources
from shortllama.errors import InputError
from shortllama.plans import BlockKeep, Plan, Target
from shortllama.retraining import record
from shortllama.retraining.recipes import Recipe
from shortllama.sources import Source

if TYPE_CHECKING:
    from shortllama.checkpoint import Manifest
    from shortllama.retraining.loop import Progress
    from shortllama.retraining.memory import Estimate
    from shortllama.retraining.objectives import Teacher
    from shortllama.retraining.record import Record


class Told(msgspec.Struct, frozen=True):
    """What is known before the first step: memory for each stage, and the bytes that were free before loading."""

    recipe: Recipe
    estimates: tuple[Estimate, ...]
    free: int
    data: tuple[record.Data, ...]


class Settings(msgspec.Struct, frozen=True):
    """What to retrain on, and how to go about it; what is computed is in the recipe.

    `data`: a source for each stage, or one for all. `teacher`: the dense model to learn from; None is the plan's base.
    """

    data: tuple[str, ...]
    teacher: str | None = None
    resume: bool = False
    save_every_s: float = 600.0
    data_dir: Path | None = None
    trust_remote_code: bool = False
    device: str | None = None


def state_folder(out: Path) -> Path:
    """Return where the state of a run is kept until `out` is complete."""
    return out.with_name(f"{out.name}.state")


def check(source: Source, recipe: Recipe, settings: Settings, out: Path) -> None:
    """Raise InputError for what can be refused before anything is loaded."""
    from shortllama import checkpoint

    if source.folder is None:
        raise InputError(f"{source.name} is a shape without weights; retrain a folder, a hub id or 'reference'")
    checkpoint.refuse_own_folder(out, source.folder)
    if len(settings.data) not in (1, len(recipe.stages)):
        stages = len(recipe.stages)
        wanted = "one --data" if stages == 1 else f"one --data, or {stages}: one for each of its stages"
        raise InputError(f"{len(settings.data)} times --data; recipe {recipe.name} takes {wanted}")
    if settings.teacher is not None and all(stage.learns != "teacher" for stage in recipe.stages):
        raise InputError(f"recipe {recipe.name} learns from no teacher; leave out --teacher, or use recipe distill")
    held = state_folder(out)
    if held.is_dir() and any(held.iterdir()) and not settings.resume:
        raise InputError(
            f"{held}: holds the state of a run that did not finish; give --resume to go on, or remove it to start again"
        )


def retrain(
    source: Source,
    recipe: Recipe,
    settings: Settings,
    out: Path,
    *,
    progress: Progress | None = None,
    prepared: Callable[[str, int, int], None] | None = None,
    tell: Callable[[Told], None] | None = None,
) -> tuple[Manifest, Record] | None:
    """Retrain a named model by `recipe` into the folder `out`; return its manifest and record.

    The plan travels on, and the record of earlier retraining with it. None in a process that does not lead its team.
    `progress` is told of steps, `prepared(what, done, total)` of reading data, `tell` once before the first step.
    Raises InputError as `loop.retrain` and `examples.load` do.
    """
    check(source, recipe, settings, out)
    from shortllama import checkpoint
    from shortllama.retraining import examples, loop, processes

    device = processes.device_here() if settings.device is None else pruning.compute_device(settings.device)
    free = _free_bytes(device)
    with processes.joined(device) as team:
        folder = sources.fetch(source)
        model, tokenizer = checkpoint.load(folder, device=device, trust_remote_code=settings.trust_remote_code)
        plan = plans.read_plan(folder) if (folder / checkpoint.MARK).is_file() else _everything(source)
        teacher = _teacher(source, plan, recipe, settings, device)
        data = [
            examples.load(
                src,
                stage,
                tokenizer=tokenizer,
                dense=lambda: _dense(source, teacher, device),
                data_dir=settings.data_dir,
                progress=lambda done, total: (prepared or _silent)("data", done, total),
            )
            for src, stage in zip(_spread(settings.data, recipe), recipe.stages, strict=True)
        ]
        if tell is not None and team.leads:
            tell(_told(model, recipe, data, teacher, free))
        done = loop.retrain(
            model,
            recipe,
            data,
            teacher=teacher,
            team=team,
            folder=state_folder(out),
            save_every_s=settings.save_every_s,
            progress=progress if team.leads else None,
        )
        written = None
        if team.leads:
            earlier = record.read(folder)
            whole = record.Record((*(earlier.stages if earlier else ()), *done))
            documents = {record.FILE: files.encode_json(whole)}
            written = checkpoint.save(model, plan, out, companions=folder, documents=documents), whole
            files.remove_folder(state_folder(out))
        team.wait()
        return written


def _spread(given: Sequence[str], recipe: Recipe) -> Sequence[str]:
    return given if len(given) == len(recipe.stages) else [*given] * len(recipe.stages)


def _everything(source: Source) -> Plan:
    """Return the plan of a model that nothing was removed from."""
    keep = tuple(BlockKeep(index) for index in range(len(source.shape.blocks)))
    name = pruning.base_name(source)
    return plans.make_plan(model=name, shape=source.shape, method="none", target=Target("shape", "all"), keep=keep)


def _teacher(source: Source, plan: Plan, recipe: Recipe, settings: Settings, device: str) -> Teacher | None:
    """Return the loaded teacher, in the dtype that is computed in; None for a recipe that has none."""
    taught = [stage for stage in recipe.stages if stage.learns == "teacher"]
    if not taught:
        return None
    import torch

    from shortllama import checkpoint
    from shortllama.retraining import loop
    from shortllama.retraining.objectives import Teacher

    base = pruning.dense_base(source) if settings.teacher is None else sources.locate(settings.teacher)
    if base is None:
        raise InputError(f"{source.name} has no plan.json that names the dense model; give --teacher MODEL")
    same = base.shape.digest() == plan.base.shape_digest
    if not same and any(stage.hidden for stage in taught) and len(base.shape.blocks) != len(source.shape.blocks):
        raise InputError(
            f"teacher {base.name} is not the base of this model's plan, so nothing says which of its blocks are which; "
            "leave out --hidden"
        )
    dtype = loop.resolved(taught[0], torch.device(device)).dtype
    model, _ = checkpoint.load(sources.fetch(base), dtype=dtype, device=device)
    blocks = [keep.index for keep in plan.keep] if same else range(len(source.shape.blocks))
    return Teacher(model.requires_grad_(False), pruning.base_name(base), tuple(blocks))


def _dense(source: Source, teacher: Teacher | None, device: str) -> Any:
    """Return the model that `self` text is sampled from: the teacher, the plan's base, or the model itself."""
    if teacher is not None:
        return teacher.model
    return pruning.load(pruning.dense_base(source) or source, device=device)[0]


def _told(model: Any, recipe: Recipe, data: Sequence[Any], teacher: Teacher | None, free: int) -> Told:
    from shortllama import surgery
    from shortllama.families import adapter
    from shortllama.retraining import loop, memory

    shape, device = surgery.shape_of(model), adapter(model).embedding.weight.device
    stages = [loop.resolved(stage, device) for stage in recipe.stages]
    other = None if teacher is None else surgery.shape_of(teacher.model)
    found = tuple(
        memory.estimate(
            shape, stage, length=one.longest, stored=surgery.dtype_name(model), teacher=other, device=str(device)
        )
        for stage, one in zip(stages, data, strict=True)
    )
    return Told(Recipe(recipe.name, tuple(stages)), found, free, tuple(one.data for one in data))


def _free_bytes(device: str) -> int:
    """Return the bytes that are free on the device, or in the machine's memory."""
    if device == "cpu":
        import psutil

        return psutil.virtual_memory().available
    import torch

    return torch.cuda.mem_get_info(device)[0]


def _silent(what: str, done: int, total: int) -> None:
    pass
