"""The biases that stand in for what was pruned: FLAP's compensation (arXiv 2312.11983, sec. 3.4).

A pruned input channel of o_proj or down_proj goes on contributing its mean: b = W (mu * pruned), in float64. The means
come with the scores, and belong to the plan that was made from them. Where a whole module is gone, its mean output is
a constant that the residual stream lacks; it moves to the nearest module left before it, which adds to the same stream
just as well (only constants lie between). Before the first module left there is no such place, and it is dropped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shortllama.errors import PlanError
from shortllama.families import Adapter, adapter
from shortllama.plans import BlockKeep, Plan, kept_neurons, kept_queries
from shortllama.scores import Scores
from shortllama.shape import BlockShape

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

OUTPUTS = ("o", "down")


def check(plan: Plan, scores: Scores | None) -> None:
    """Raise PlanError unless `scores` are those that `plan` was made from; nothing to check without compensation."""
    if plan.compensation is None:
        return
    if scores is None:
        raise PlanError(
            f"plan needs {plan.compensation!r} compensation, whose means are in the scores it was made from; give them "
            "too (--scores FILE, written by shortllama score --out)"
        )
    if scores.digest() != plan.provenance.scores_digest:
        raise PlanError(
            f"plan was made from scores {plan.provenance.scores_digest}, these are {scores.digest()}; its compensation "
            "needs the same scores"
        )


def biases(plan: Plan, model: PreTrainedModel, scores: Scores | None) -> dict[str, Tensor] | None:
    """Return the bias (h,) of every output projection left, by its name in the result; None if `plan` has none.

    `model` is the dense one. float64, on the device of the weights. Raises PlanError for other scores than the plan's.
    """
    import torch

    from shortllama import surgery

    check(plan, scores)
    if plan.compensation is None:
        return None
    assert scores is not None, "checked"
    assert scores.details is not None, "a criterion whose plans are compensated records means"
    parts, shape = adapter(model), surgery.shape_of(model)
    kept = {one.index: (number, one) for number, one in enumerate(plan.keep)}
    found: dict[str, Tensor] = {}
    last: str | None = None
    for index, block in enumerate(parts.blocks):
        number, keep = kept.get(index, (-1, BlockKeep(index, "", "")))
        projections = parts.projections(block)
        for short in (name for name in OUTPUTS if name in projections):
            left = _kept_channels(short, keep, shape.blocks[index], projections[short])
            if left:
                last = f"{parts.family.blocks}.{number}.{parts.family.projections[short]}.bias"
                found[last] = torch.zeros(shape.hidden, dtype=torch.float64, device=projections[short].weight.device)
            if last is not None and (left or _plain(parts)):
                mean = scores.details["means"][short][index]
                found[last] += _constant(projections[short], mean, left).to(found[last].device)
    return found


def _plain(parts: Adapter) -> bool:
    """Whether modules add straight to the residual stream, without a norm behind them."""
    return parts.family.norms_per_module == 1


def _kept_channels(short: str, keep: BlockKeep, block: BlockShape, linear: nn.Linear) -> list[int]:
    if short == "down":
        return list(kept_neurons(keep, block))
    width = linear.in_features // block.query_heads
    return [channel for head in kept_queries(keep, block) for channel in range(head * width, (head + 1) * width)]


def _constant(linear: nn.Linear, mean: Any, left: list[int]) -> Tensor:
    """Return what the pruned channels of a projection put out on average, with its bias where nothing is left."""
    import torch

    with torch.no_grad():
        pruned_C = torch.tensor(mean, dtype=torch.float64, device=linear.weight.device)
        pruned_C[left] = 0
        constant = linear.weight.double() @ pruned_C
        return constant + linear.bias.double() if linear.bias is not None and not left else constant
