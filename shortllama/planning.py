"""From a method, a target and scores to a plan. Pure: every decision here is instant and exactly testable.

Without scores the plan is blind: the right shape, with an arbitrary choice of units.
"""

from __future__ import annotations

from shortllama import configs, depth, methods, request, width, width_rules
from shortllama.depth import goal_for
from shortllama.plans import BlockKeep, Plan, Provenance, Target, make_plan, shape_after, shape_of
from shortllama.removals import Unit
from shortllama.request import Request
from shortllama.scores import Scores
from shortllama.shape import ModelShape
from shortllama.variants import Variant

__all__ = ["goal_for", "make_plan_for", "outlook", "remark"]


def make_plan_for(
    method: str,
    *,
    model: str,
    shape: ModelShape,
    target: Target,
    scores: Scores | None = None,
    protect: tuple[int, int] | None = None,
    align: int = 1,
    at_most: bool = False,
    unit: Unit | None = None,
    iterative: bool = False,
    variant: Variant | None = None,
    seed: int | None = None,
) -> Plan:
    """Return the plan that `method` makes for `shape` at `target`; a blind one where there are no `scores`.

    Target kinds: "ratio" (in (0, 1): of blocks, or of the KV groups and neurons of each unprotected block), "blocks"
    (how many go), "target-params" (parameters of the result; it may exceed them by less than one step, with `at_most`
    it stays at or below them). `protect` overrides the method's (first, last) blocks left whole. `align` rounds kept
    widths up to multiples of it. `unit` "module" removes attention and FFNs apart, ranked as `removals` says; a ratio
    is then that of the blocks' parameters, and the nearest number of modules goes. `iterative` plans take scores that
    were made anew after each removal (`Scores.order`). `variant` chooses among a width method's published variants.
    `seed` is only recorded.
    Raises InputError for a target out of range or scores of another criterion or model, UnsupportedError for widths
    that no model of the family can have.
    """
    asked = _asked(method, shape, target, scores, protect, align, at_most, unit, iterative, variant)
    keep = _keep(asked)
    configs.check_heads(shape_after(shape, keep))
    return make_plan(
        model=model,
        shape=shape,
        method=asked.method.name + request.variant(asked),
        target=target,
        keep=keep,
        blind=scores is None,
        compensation=asked.compensation,
        provenance=_provenance(scores, seed),
    )


def outlook(
    method: str,
    *,
    shape: ModelShape,
    target: Target,
    protect: tuple[int, int] | None = None,
    align: int = 1,
    at_most: bool = False,
    unit: Unit | None = None,
    iterative: bool = False,
    variant: Variant | None = None,
) -> ModelShape | None:
    """Return the shape that such a plan will have, before anything is scored; None where only scores tell.

    Raises InputError for everything that `make_plan_for` would refuse whatever the scores.
    """
    asked = _asked(method, shape, target, None, protect, align, at_most, unit, iterative, variant)
    if asked.method.unit == "width" and width_rules.adapts(asked):
        return None
    after = shape_after(shape, _keep(asked))
    configs.check_heads(after)
    return after


def _asked(
    method: str,
    shape: ModelShape,
    target: Target,
    scores: Scores | None,
    protect: tuple[int, int] | None,
    align: int,
    at_most: bool,
    unit: Unit | None,
    iterative: bool,
    variant: Variant | None,
) -> Request:
    row = methods.lookup(method)
    chosen = row.protect if protect is None else protect
    only = request.unit_of(row, unit)
    asked = Request(row, shape, target, scores, chosen, align, at_most, only, iterative, variant or Variant())
    request.check(asked)
    return asked


def _keep(asked: Request) -> tuple[BlockKeep, ...]:
    return depth.keep_pieces(asked) if asked.method.unit == "block" else width.keep_widths(asked)


def remark(plan: Plan, shape: ModelShape) -> str | None:
    """Return a sentence for the user where the result has more parameters than --target-params asked, else None."""
    if plan.target.kind != "target-params":
        return None
    above = shape_of(plan, shape).parameters - float(plan.target.value)
    if above <= 0:
        return None
    return f"the result has {above:,.0f} parameters more than asked, less than one step; --at-most rounds the other way"


def _provenance(scores: Scores | None, seed: int | None) -> Provenance:
    if scores is None:
        return Provenance()
    digest = (scores.calibration or {}).get("digest")
    return Provenance(scores.digest(), None if digest is None else str(digest), seed)
