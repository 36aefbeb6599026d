"""Retraining of a model in memory: a recipe's stages, one after the other, whatever the model was pruned to.

Each step's examples, their division into micro-batches and every random number follow from the seed and the step, and
losses are sums over predicted tokens divided by their number in the whole batch. So neither the number of processes
nor an interruption changes the series of losses beyond rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

from shortllama.errors import InputError
from shortllama.families import adapter
from shortllama.retraining import guards
from shortllama.retraining.examples import Examples
from shortllama.retraining.objectives import Teacher
from shortllama.retraining.processes import ALONE, Team
from shortllama.retraining.recipes import Recipe, Stage
from shortllama.retraining.record import Done
from shortllama.retraining.stage import Progress, Run


def retrain(
    model: Any,
    recipe: Recipe,
    data: Sequence[Examples],
    *,
    teacher: Teacher | None = None,
    team: Team = ALONE,
    folder: Path | None = None,
    save_every_s: float = 600.0,
    progress: Progress | None = None,
) -> tuple[Done, ...]:
    """Run a recipe on `model`, in place, and return what was done, one value a stage.

    The model comes back in the mode, dtype and structure it had, adapters merged. `data`: examples for each stage, or
    one for all of them. `folder` keeps the state every `save_every_s` seconds; where it holds the state of this very
    run, the run goes on from there. Torch's own random numbers are left as they were.

    Raises InputError for ids outside the vocabulary or beyond the model's positions, a first loss that is not that of
    the evaluated model, losses that stay NaN, a state of another run, and memory that does not suffice (what to lower).
    """
    if len(data) not in (1, len(recipe.stages)):
        raise InputError(f"recipe {recipe.name} has {len(recipe.stages)} stages, {len(data)} data sources were given")
    training = model.training
    done: list[Done] = []
    device = adapter(model).embedding.weight.device
    for number, stage in enumerate(recipe.stages):
        run = Run(model, resolved(stage, device), data[min(number, len(data) - 1)], teacher, team, number, folder)
        run.check()
        with guards.random_kept(device), guards.memory_told(run.stage, run.data.longest, run.at):
            done.append(run.go(recipe, save_every_s, progress or _silent, last=number + 1 == len(recipe.stages)))
    model.train(training)
    return tuple(done)


def resolved(stage: Stage, device: torch.device) -> Stage:
    """Return the stage with the dtype that it computes in on `device`."""
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return msgspec.structs.replace(stage, dtype=stage.dtype or ("bfloat16" if native else "float32"))


def _silent(what: str, done: int, total: int, loss: float) -> None:
    pass
