"""The published variants of the width methods: their names, which method has which, and what each defaults to. Pure.

One value for what is measured (`metric`) and for how widths are allotted (`structure`), because a command takes both
at once. None is the method's default, so that a variant that was not asked for leaves no trace in a plan.
"""

from __future__ import annotations

import difflib

import msgspec

from shortllama.errors import InputError

FLAP = ("flap", "flap-exact")

METRICS = ("WIFV", "WIFN", "IFV")
# U is uniform, A adaptive, M manual: across layers (L), then modules (M), as FLAP writes them.
STRUCTURES: dict[str, tuple[str, ...]] = {name: ("AL-AM", "AL-MM", "UL-MM", "UL-UM") for name in FLAP}
MANUAL = ("AL-MM", "UL-MM")

_OUT_OF_SCOPE = {
    "unstructured": "single weights are not removed here: masks leave shapes, speed and memory as they are",
    "channel-wise": "the hidden size stays: the residual stream is one for all blocks; prune depth for more",
}


class Variant(msgspec.Struct, frozen=True):
    """What was asked of a width method beyond its target; None is its default.

    `metric`: what flap measures. `structure`: how widths are allotted to blocks and modules. `remove_heads`: KV heads
    (each with its query heads) that structures with manual modules remove, over all blocks.
    """

    metric: str | None = None
    structure: str | None = None
    remove_heads: int | None = None

    def check_measured(self, criterion: str) -> None:
        """Raise InputError for what `criterion` does not measure."""
        _one_of("--metric", self.metric, METRICS if criterion in FLAP else (), criterion)

    def check(self, method: str, criterion: str) -> None:
        """Raise InputError for what the method does not have, or a manual structure without its number of heads."""
        self.check_measured(criterion)
        reason = _OUT_OF_SCOPE.get((self.structure or "").lower())
        if reason:
            raise InputError(f"--structure {self.structure} is out of scope: {reason}")
        _one_of("--structure", self.structure, STRUCTURES.get(method, ()), method)
        structure, heads = structure_of(method, self), self.remove_heads
        if (structure in MANUAL) != (heads is not None):
            raise InputError(
                f"--structure {structure} leaves the number of heads to you; add --remove-heads N"
                if heads is None
                else f"--remove-heads {heads} is for --structure {' or '.join(MANUAL)}; leave it out"
            )
        if heads is not None and heads < 0:
            raise InputError(f"--remove-heads {heads}: give how many KV heads to remove over all blocks, 0 or more")

    def said(self) -> list[str]:
        """Return what a plan's method says of this variant; nothing for defaults."""
        heads = [] if self.remove_heads is None else [f"{self.remove_heads} heads"]
        return [text for text in (self.metric, self.structure) if text] + heads


def structure_of(method: str, variant: Variant) -> str | None:
    """Return the structure that `method` follows; None for methods that have one rule only."""
    return variant.structure or next(iter(STRUCTURES.get(method, ())), None)


def metric_of(variant: Variant) -> str:
    """Return what flap measures."""
    return variant.metric or METRICS[0]


def _one_of(option: str, value: str | None, known: tuple[str, ...], owner: str) -> None:
    if value is None or value in known:
        return
    if not known:
        raise InputError(f"{option} {value} is not for {owner}; leave it out")
    near = difflib.get_close_matches(value.upper(), known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(known)}"
    raise InputError(f"{option} {value!r} is unknown to {owner}; {hint}")
