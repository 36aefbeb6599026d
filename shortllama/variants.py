"""The published variants of the width methods: their names, which method has which, and what each defaults to. Pure.

One value for what is measured (`metric`) and for how widths are allotted (`structure`), because a command takes both
at once. None is the method's default, so that a variant that was not asked for leaves no trace in a plan.
"""

from __future__ import annotations

import difflib

import msgspec

from shortllama.errors import InputError

FLAP = ("flap", "flap-exact")
LLM_PRUNER = ("llm-pruner",)
# Whose plans remove heads and neurons.
WIDTH = (*FLAP, *LLM_PRUNER, "wanda-sp", "mag-sp")

METRICS = ("WIFV", "WIFN", "IFV")
ESTIMATORS = ("param_first", "param_second", "param_mix", "vectorize", "l1", "l2")
MAGNITUDES = ("l1", "l2")
GROUP_REDUCTIONS = ("sum", "mean", "max", "prod", "first")
# The default first. For FLAP, U is uniform, A adaptive, M manual: across layers (L), then modules (M).
STRUCTURES: dict[str, tuple[str, ...]] = {
    **{name: ("AL-AM", "AL-MM", "UL-MM", "UL-UM") for name in FLAP},
    **{name: ("local", "global") for name in LLM_PRUNER},
}
MANUAL = ("AL-MM", "UL-MM")
# Along which attentions shrink, the default first; see `axes`.
AXES = ("kv-groups", "queries-per-group")

_OUT_OF_SCOPE = {
    "unstructured": "single weights are not removed here: masks leave shapes, speed and memory as they are",
    "channel-wise": "the hidden size stays, as one residual stream runs through all blocks; prune width inside blocks "
    "(local, global), or depth",
}


class Variant(msgspec.Struct, frozen=True):
    """What was asked of a width method beyond its target; None is its default.

    `metric`: what flap measures. `structure`: how widths are allotted to blocks and modules. `remove_heads`: KV heads
    (each with its query heads) that structures with manual modules remove, over all blocks. `estimator`,
    `group_reduction`: the salience of llm-pruner's weights, and how those of coupled weights become one; `steps`: in
    how many parts, scored anew each time, it goes to its target. `axis`: whether whole KV groups go, or query heads of
    every group.
    """

    metric: str | None = None
    structure: str | None = None
    remove_heads: int | None = None
    estimator: str | None = None
    group_reduction: str | None = None
    steps: int | None = None
    axis: str | None = None

    def check_measured(self, criterion: str) -> None:
        """Raise InputError for what `criterion` does not measure."""
        ours = criterion in LLM_PRUNER
        _one_of("--metric", self.metric, METRICS if criterion in FLAP else (), criterion)
        _one_of("--estimator", self.estimator, ESTIMATORS if ours else (), criterion)
        _one_of("--group-reduction", self.group_reduction, GROUP_REDUCTIONS if ours else (), criterion)
        if self.steps is not None and not ours:
            raise InputError(f"--steps {self.steps} is not for {criterion}; leave it out")
        if self.steps is not None and self.steps < 1:
            raise InputError(f"--steps {self.steps}: give how many steps to prune in, 1 or more")

    def check(self, method: str, criterion: str) -> None:
        """Raise InputError for what the method does not have, or a manual structure without its number of heads."""
        self.check_measured(criterion)
        reason = _OUT_OF_SCOPE.get((self.structure or "").lower())
        if reason:
            raise InputError(f"--structure {self.structure} is out of scope: {reason}")
        _one_of("--structure", self.structure, STRUCTURES.get(method, ()), method)
        _one_of("--axis", self.axis, AXES if method in WIDTH else (), method)
        self._check_axis(structure_of(method, self))
        structure, heads = structure_of(method, self), self.remove_heads
        if (structure in MANUAL) != (heads is not None):
            raise InputError(
                f"--structure {structure} leaves the number of heads to you; add --remove-heads N"
                if heads is None
                else f"--remove-heads {heads} is for --structure {' or '.join(MANUAL)}; leave it out"
            )
        if heads is not None and heads < 0:
            raise InputError(f"--remove-heads {heads}: give how many KV heads to remove over all blocks, 0 or more")
        if structure == "global" and steps_of(self) > 1:
            raise InputError(
                f"--steps {self.steps} is for --structure local: what each step removes globally, only scores tell"
            )

    def _check_axis(self, structure: str | None) -> None:
        """Raise InputError for a structure whose words mean nothing where as many heads go from every group."""
        if axis_of(self) == AXES[0]:
            return
        if structure in MANUAL:
            raise InputError(
                f"--structure {structure} removes a number of KV heads, and with --axis {self.axis} all of them stay; "
                "use AL-AM or UL-UM"
            )
        if structure == "global":
            raise InputError(
                f"--structure global compares single heads, and --axis {self.axis} removes one of every group at once; "
                "use local"
            )

    def said(self) -> list[str]:
        """Return what a plan's method says of this variant; nothing for defaults."""
        heads = [] if self.remove_heads is None else [f"{self.remove_heads} heads"]
        steps = [f"{self.steps} steps"] if steps_of(self) > 1 else []
        named = (self.metric, self.estimator, self.group_reduction, self.structure, self.axis)
        return [text for text in named if text] + heads + steps

    def record(self, criterion: str) -> dict[str, str | int]:
        """Return what scores by `criterion` say of how they were measured."""
        if criterion in FLAP:
            return {"metric": metric_of(self)}
        if criterion in LLM_PRUNER:
            reduction = group_reduction_of(self)
            return {"estimator": estimator_of(self), "group_reduction": reduction, "steps": steps_of(self)}
        return {}

    def asked(self) -> dict[str, str | int]:
        """Return the part of `record` that was asked for."""
        fields = ("metric", "estimator", "group_reduction", "steps")
        return {name: value for name in fields if (value := getattr(self, name)) is not None}


def structure_of(method: str, variant: Variant) -> str | None:
    """Return the structure that `method` follows; None for methods that have one rule only."""
    return variant.structure or next(iter(STRUCTURES.get(method, ())), None)


def metric_of(variant: Variant) -> str:
    """Return what flap measures."""
    return variant.metric or METRICS[0]


def estimator_of(variant: Variant) -> str:
    """Return what llm-pruner measures of a weight."""
    return variant.estimator or ESTIMATORS[0]


def group_reduction_of(variant: Variant) -> str:
    """Return how llm-pruner joins the values of coupled weights."""
    return variant.group_reduction or GROUP_REDUCTIONS[0]


def steps_of(variant: Variant) -> int:
    """Return in how many steps llm-pruner goes to its target."""
    return variant.steps or 1


def axis_of(variant: Variant) -> str:
    """Return along which axis attentions shrink."""
    return variant.axis or AXES[0]


def _one_of(option: str, value: str | None, known: tuple[str, ...], owner: str) -> None:
    if value is None or value in known:
        return
    if not known:
        raise InputError(f"{option} {value} is not for {owner}; leave it out")
    spelled = {one.lower(): one for one in known}
    near = difflib.get_close_matches(value.lower(), spelled, n=1)
    hint = f"did you mean {spelled[near[0]]}?" if near else f"choose one of {', '.join(known)}"
    raise InputError(f"{option} {value!r} is unknown to {owner}; {hint}")
