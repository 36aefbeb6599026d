"""Criteria: what is measured on a model to rank its parts. One small file each, with the same four names in it.

`NAME`; `UNITS` (what it can score, its default first: "block", "module", "width"); `NEEDS` ("nothing", "weights" or
"calibration"); `score(task) -> Measured`, higher = keep. This module knows their names without importing them, so that
commands list them without torch.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

from shortllama import methods, removals
from shortllama.errors import InputError
from shortllama.journal import Journal
from shortllama.removals import Part, Piece
from shortllama.variants import LLM_PRUNER, MAGNITUDES, Variant, estimator_of

if TYPE_CHECKING:
    from torch import Tensor

    from shortllama.calibration import Calibration
    from shortllama.families import Adapter
    from shortllama.scores import Scores
    from shortllama.shape import ModelShape
    from shortllama.stack import Stack

Unit = Literal["block", "module", "width"]

CRITERIA: dict[str, str] = {
    "ppl": "shortllama.criteria.ppl",
    "kl": "shortllama.criteria.kl",
    "taylor": "shortllama.criteria.taylor",
    "taylor-sample": "shortllama.criteria.taylor_sample",
    "taylor-vector": "shortllama.criteria.taylor_vector",
    "bi": "shortllama.criteria.bi",
    "angular": "shortllama.criteria.angular",
    "relative-magnitude": "shortllama.criteria.relative_magnitude",
    "norm": "shortllama.criteria.norm",
    "mag": "shortllama.criteria.mag",
    "random": "shortllama.criteria.random",
    "last": "shortllama.criteria.last",
    "wanda-sp": "shortllama.criteria.wanda_sp",
    "mag-sp": "shortllama.criteria.mag_sp",
    "llm-pruner": "shortllama.criteria.llm_pruner",
    "flap": "shortllama.criteria.flap",
    "flap-exact": "shortllama.criteria.flap_exact",
}

# Whose work is to watch one forward pass: however many of them are asked for, it is made once (`trace`).
TRACED = ("bi", "angular", "relative-magnitude", "norm")

REDUCTIONS = ("sum", "mean", "max", "prod")
# Whose scores are made of many weights' values. A vector estimate leaves nothing to reduce within a tensor.
REDUCING = ("mag", "taylor", "taylor-sample", "taylor-vector")


@dataclass(frozen=True)
class Reductions:
    """How the values of weights become one score: over the output neurons of a tensor, then over tensors."""

    weight: str = "sum"
    block: str = "sum"

    def check(self, criterion: str) -> None:
        """Raise InputError for an unknown reduction, or one that `criterion` has no use for."""
        for option, how in (("--weight-reduction", self.weight), ("--block-reduction", self.block)):
            if how not in REDUCTIONS:
                raise InputError(f"{option} {how!r} is unknown; choose one of {', '.join(REDUCTIONS)}")
        if self != Reductions() and criterion not in REDUCING:
            raise InputError(f"criterion {criterion} reduces no weights; reductions are for {', '.join(REDUCING)}")
        if self.weight != "sum" and criterion == "taylor-vector":
            raise InputError("taylor-vector has one value a tensor; leave --weight-reduction out")

    def record(self) -> dict[str, str]:
        """Return what goes into the details of scores."""
        return {"weight_reduction": self.weight, "block_reduction": self.block}


@dataclass(frozen=True)
class Measured:
    """What a criterion found, with the lists of its unit filled in; see `Scores`."""

    blocks: tuple[float, ...] | None = None
    attention: tuple[float | None, ...] | None = None
    mlp: tuple[float | None, ...] | None = None
    runs: dict[str, tuple[float, ...]] | None = None
    kv_groups: tuple[tuple[float, ...], ...] | None = None
    neurons: tuple[tuple[float, ...], ...] | None = None
    query_heads: tuple[tuple[float, ...], ...] | None = None
    details: dict[str, Any] | None = None


@dataclass(frozen=True)
class Task:
    """What a criterion is given: a quiet model (`stack.quiet`) of a known family, and what to measure it on.

    `towards` is the shape the model is going to be pruned to, for criteria that feed pruned outputs on, or None.
    `progress(done, total)` is called after each piece of work, in units of roughly equal cost.
    In an iterative run, `members` are the blocks of the model that are still there (None: all), `shape` is what is left
    of it, and `kept` is a store that lasts from step to step (None: there is one step). `journal` keeps what is
    finished, for a run that goes on after a kill; criteria whose work is one pass over the data ignore it.
    """

    adapter: Adapter
    shape: ModelShape
    calibration: Calibration | None
    seed: int
    towards: ModelShape | None
    progress: Callable[[int, int], None]
    reductions: Reductions = Reductions()
    unit: Unit = "block"
    members: tuple[int, ...] | None = None
    kept: dict[int, Tensor] | None = None
    variant: Variant = field(default_factory=Variant)
    journal: Journal = field(default_factory=Journal)

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """What is scored by block or module, by positions among the members."""
        assert self.unit != "width", "width criteria score inside the blocks"
        return removals.pieces(self.shape, self.unit)

    def lay_out(self, values: Sequence[Any]) -> dict[str, list[Any]]:
        """Return one value a piece as the lists of a scores file: `blocks`, or `attention` and `mlp`."""
        by_piece = dict(zip(self.pieces, values, strict=True))
        parts: tuple[Part, ...] = ("block",) if self.unit == "block" else ("attention", "mlp")
        lists = {part: [by_piece.get(Piece(i, part)) for i in range(len(self.shape.blocks))] for part in parts}
        return {"blocks" if part == "block" else part: found for part, found in lists.items()}

    def measured(self, values: Sequence[float], details: dict[str, Any] | None = None) -> Measured:
        """Return one score a piece, in order, as what the criterion found."""
        lists = {name: tuple(found) for name, found in self.lay_out(values).items()}
        return Measured(
            blocks=lists.get("blocks"), attention=lists.get("attention"), mlp=lists.get("mlp"), details=details
        )

    @cached_property
    def stack(self) -> Stack:
        """The model as a stack of the blocks that are there."""
        from shortllama.stack import Stack

        blocks = list(self.adapter.blocks)
        return Stack(self.adapter.model, blocks if self.members is None else [blocks[index] for index in self.members])

    @property
    def dtype(self) -> str:
        """The type of the model's weights, as `shape.ITEM_BYTES` names it."""
        return str(self.adapter.model.dtype).removeprefix("torch.")

    @property
    def sequences(self) -> int:
        """Number of calibration sequences."""
        assert self.calibration is not None, "the criterion needs calibration and got none"
        return len(self.calibration.sequences)

    def batches(self) -> Iterator[Tensor]:
        """Yield (B, T) int64 ids on the model's device, in the calibration's order; `memory.rows_forward` bounds B."""
        import torch

        from shortllama.criteria import memory

        assert self.calibration is not None, "the criterion needs calibration and got none"
        for ids in self.calibration.batches(lambda length: memory.rows_forward(self.shape, length, self.dtype)):
            yield torch.from_numpy(ids).to(self.stack.device)


class Criterion(Protocol):
    """What every file of this package exports."""

    NAME: str
    UNITS: tuple[Unit, ...]
    NEEDS: Literal["nothing", "weights", "calibration"]

    def score(self, task: Task) -> Measured:
        """Return the scores of the task's model; higher = keep."""
        ...


def lookup(name: str) -> Criterion:
    """Return the criterion of that name, importing it (and torch). Raises InputError with the nearest names."""
    if name not in CRITERIA:
        near = difflib.get_close_matches(name, CRITERIA, n=2)
        hint = f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(CRITERIA)}"
        raise InputError(f"criterion {name!r} is unknown; {hint}")
    return cast("Criterion", importlib.import_module(CRITERIA[name]))


def needs(chosen: Criterion, variant: Variant | None) -> Literal["nothing", "weights", "calibration"]:
    """Return what a criterion reads in this variant."""
    magnitude = chosen.NAME in LLM_PRUNER and estimator_of(variant or Variant()) in MAGNITUDES
    return "weights" if magnitude else chosen.NEEDS


def check(chosen: Criterion, unit: Unit | None, reductions: Reductions, *, iterative: bool) -> None:
    """Raise InputError for what a criterion cannot be asked: another unit, reductions of no weights, iteration."""
    if unit is not None and unit not in chosen.UNITS:
        raise InputError(f"criterion {chosen.NAME} scores by {' or '.join(chosen.UNITS)}, not by {unit}")
    reductions.check(chosen.NAME)
    able = sorted({row.criterion for row in methods.METHODS.values() if row.iterative})
    if iterative and chosen.NAME not in able:
        raise InputError(
            f"--iterative is not for criterion {chosen.NAME}, whose order does not change as parts go; "
            f"use one of {', '.join(able)}"
        )


def remark(scores: Scores, after: ModelShape) -> str | None:
    """Return a sentence where `scores` depend on the pruned shape and were made for another one, else None.

    Wanda-sp feeds the outputs of pruned blocks on, and llm-pruner in steps scores what the steps before left: their
    scores belong to the widths they were computed towards.
    """
    details = scores.details or {}
    if "towards" not in details:
        return None
    towards, found = details["towards"], widths(after)
    # Scores from before query heads could go alone do not list them, and had them all in their groups.
    if towards is not None and all(found[name] == sizes for name, sizes in towards.items()):
        return None
    made_for = "dense outputs" if towards is None else "other widths"
    return (
        f"{scores.criterion} scores depend here on what else is pruned, and these were computed "
        f"with {made_for}; score for this target (leave out --scores) to have them exact"
    )


def widths(shape: ModelShape) -> dict[str, list[int]]:
    """Return the query heads, KV groups and neurons of each block, as `details["towards"]` records them."""
    return {
        "query_heads": [block.query_heads for block in shape.blocks],
        "kv_groups": [block.kv_heads for block in shape.blocks],
        "neurons": [block.neurons for block in shape.blocks],
    }
