"""Recipes of retraining as rows of data, and how a person scales one down. Pure: no torch.

A recipe is one stage after the other, each with its own optimizer. What the data look like (text, instructions, ids)
is no part of it: text is packed into windows, instructions are truncated and their prompts masked, under any recipe.
"""

from __future__ import annotations

import difflib
from typing import Literal

import msgspec

from shortllama.errors import InputError, UnsupportedError

DTYPES = ("bfloat16", "float32")
SCHEDULES = ("linear", "cosine")


class Stage(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One optimizer's work, complete: two runs of equal stages on equal models and data give equal losses.

    `trains`: "lora" adapts every projection of every block by matrices of `rank`, scaled by `alpha` / `rank`; "all"
    trains every parameter. `learns`: "tokens" minimizes cross-entropy, "teacher" the divergence from a dense model at
    `temperature`, plus `hidden` times the relative squared error of the hidden states.

    `rate` is the peak learning rate, reached after `warm_up` steps (at most a tenth of all) and falling to zero,
    linearly or as a cosine. A step takes `batch` sequences, `micro_batch` of them at once in each process. `length` is
    the window in tokens, or where instructions are cut off. `steps` None: `epochs` passes over the data. Weight decay
    acts on matrices only. `held_out` sequences (at most a twentieth) are never trained on.

    `dtype` of the computation; None is bfloat16 on a GPU that has it, else float32. What is trained is float32 always.
    `checkpointing` computes blocks again in the backward pass instead of keeping what they computed.
    """

    trains: Literal["lora", "all"]
    learns: Literal["tokens", "teacher"] = "tokens"
    rate: float = 1e-4
    schedule: Literal["linear", "cosine"] = "linear"
    warm_up: int = 100
    batch: int = 64
    micro_batch: int = 4
    length: int = 256
    epochs: float = 1.0
    steps: int | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    clip: float = 1.0
    rank: int | None = None
    alpha: int | None = None
    dropout: float = 0.0
    temperature: float | None = None
    hidden: float | None = None
    held_out: int = 2000
    seed: int = 0
    dtype: str | None = None
    checkpointing: bool = False

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("micro_batch", 1), ("length", 2), ("steps", 1), ("rank", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name.replace('_', '-')} of {value}; give at least {least}")
        if not (0 < self.rate < 1 and self.epochs > 0):
            raise InputError(f"learning rate {self.rate:g}, {self.epochs:g} epochs; expected 0 < rate < 1, epochs > 0")
        if self.temperature is not None and self.temperature <= 0:
            raise InputError(f"temperature {self.temperature:g}; expected a number above 0, such as 1 or 2")
        if self.hidden is not None and self.hidden < 0:
            raise InputError(f"hidden-state weight {self.hidden:g}; expected 0 (none) or more")
        if self.schedule not in SCHEDULES:
            raise InputError(f"schedule {self.schedule!r} is unknown; choose one of {', '.join(SCHEDULES)}")
        if self.dtype not in (None, *DTYPES):
            why = "; float16 would need its losses scaled" if self.dtype == "float16" else ""
            raise UnsupportedError(f"retraining in {self.dtype!r} is not done; choose {' or '.join(DTYPES)}{why}")

    def steps_over(self, examples: int) -> int:
        """Return the number of steps on so many training examples."""
        return self.steps or max(1, int(self.epochs * examples) // self.batch)

    def factor(self, step: int, steps: int) -> float:
        """Return the share of the peak rate at a step counted from 0, of `steps`; never zero."""
        import math

        warm_up = min(self.warm_up, steps // 10)
        if step < warm_up:
            return (step + 1) / (warm_up + 1)
        left = (steps - step) / (steps - warm_up)
        return left if self.schedule == "linear" else (1 - math.cos(math.pi * left)) / 2


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A name and its stages, in order."""

    name: str
    stages: tuple[Stage, ...]


# Shortened LLaMA sec. 3.2 and its published training settings: Alpaca, two epochs of about 49,760 examples.
_LORA = Stage(trains="lora", rank=8, alpha=16, dropout=0.05, epochs=2, micro_batch=4)

# Shortened LLaMA v2 (arXiv 2402.02834v2) states optimizer, rate, decay and batch of its continued pretraining. It does
# not state schedule, warm-up and window: those are ours.
_CPT = Stage(
    trains="all", schedule="cosine", batch=512, micro_batch=2, length=2048, betas=(0.9, 0.95), weight_decay=0.1
)

# The same optimizer; the divergence alone, without cross-entropy on the data, whose tokens the teacher predicts better.
_DISTILL = msgspec.structs.replace(_CPT, learns="teacher", temperature=1.0, hidden=0.0)

RECIPES: dict[str, Recipe] = {
    row.name: row
    for row in (
        Recipe("lora", (_LORA,)),
        Recipe("cpt", (_CPT,)),
        Recipe("cpt-lora", (_CPT, _LORA)),
        Recipe("distill", (_DISTILL,)),
    )
}

# Options that only some stages read: the field that such a stage has set.
_READ_BY = {"rank": "rank", "temperature": "temperature", "hidden": "temperature"}


def lookup(name: str) -> Recipe:
    """Return the recipe of that name. Raises InputError with the nearest name."""
    row = RECIPES.get(name)
    if row is None:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(RECIPES)}"
        raise InputError(f"recipe {name!r} is unknown; {hint}")
    return row


def scaled(recipe: Recipe, **changes: object) -> Recipe:
    """Return `recipe` with fields of its stages changed; None changes nothing. `alpha` follows `rank`, at their ratio.

    Raises InputError for a value out of range, and for an option that no stage of this recipe reads.
    """
    given = {name: value for name, value in changes.items() if value is not None}
    for name in given:
        if name in _READ_BY and all(getattr(stage, _READ_BY[name]) is None for stage in recipe.stages):
            meant = [row.name for row in RECIPES.values() if any(getattr(one, _READ_BY[name]) for one in row.stages)]
            raise InputError(f"recipe {recipe.name} has no {name}; it belongs to {' and '.join(meant)}")
    return Recipe(recipe.name, tuple(_changed(stage, given) for stage in recipe.stages))


def within(recipe: Recipe, positions: int | None) -> Recipe:
    """Return `recipe` with no window longer than a model has positions for; None is no bound."""
    stages = (msgspec.structs.replace(one, length=min(one.length, positions or one.length)) for one in recipe.stages)
    return Recipe(recipe.name, tuple(stages))


def _changed(stage: Stage, given: dict[str, object]) -> Stage:
    mine = {n: value for n, value in given.items() if n not in _READ_BY or getattr(stage, _READ_BY[n]) is not None}
    rank = mine.get("rank")
    if isinstance(rank, int) and stage.alpha is not None and stage.rank is not None:
        mine["alpha"] = max(1, stage.alpha * rank // stage.rank)
    if isinstance(batch := mine.get("batch"), int) and "micro_batch" not in mine:
        mine["micro_batch"] = min(stage.micro_batch, max(1, batch))
    return msgspec.structs.replace(stage, **mine)
