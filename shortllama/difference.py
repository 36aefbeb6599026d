"""What two plans for one base keep differently, as index sets. Pure; needs no shape, so any two can be compared."""

from __future__ import annotations

import msgspec
from msgspec import UNSET

from shortllama.errors import PlanError
from shortllama.indices import format_indices, parse_indices
from shortllama.plans import BlockKeep, Plan

# Plans are compared without their base at hand, so index sets have no known size; this is above any dimension.
ANY_SIZE = 1 << 40


class SetDifference(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Units that only the first or only the second plan keeps, as index sets; "all but ..." where one keeps all."""

    only_a: str
    only_b: str


class BlockDifference(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A block that both plans keep, with different insides; null where that part is alike."""

    index: int
    kv_groups: SetDifference | None
    neurons: SetDifference | None
    queries: SetDifference | None


class Difference(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`blocks`: whole blocks kept by one plan only; `inside`: blocks kept by both, in ascending order."""

    equal: bool
    blocks: SetDifference
    inside: tuple[BlockDifference, ...]


def difference(a: Plan, b: Plan) -> Difference:
    """Return what `a` and `b` keep differently. Raises PlanError where they are not for the same base shape."""
    if a.base.shape_digest != b.base.shape_digest:
        raise PlanError(
            f"the plans are for different bases, {a.base.model}@{a.base.shape_digest} and "
            f"{b.base.model}@{b.base.shape_digest}; a difference needs two plans for one base"
        )
    kept_a, kept_b = ({keep.index: keep for keep in plan.keep} for plan in (a, b))
    blocks = SetDifference(format_indices(kept_a.keys() - kept_b.keys()), format_indices(kept_b.keys() - kept_a.keys()))
    inside = tuple(
        found for index in sorted(kept_a.keys() & kept_b.keys()) if (found := _inside(kept_a[index], kept_b[index]))
    )
    return Difference(not (blocks.only_a or blocks.only_b or inside), blocks, inside)


def _inside(a: BlockKeep, b: BlockKeep) -> BlockDifference | None:
    groups, neurons, queries = _sets(a.kv_groups, b.kv_groups), _sets(a.neurons, b.neurons), _queries(a, b)
    return BlockDifference(a.index, groups, neurons, queries) if groups or neurons or queries else None


def _queries(a: BlockKeep, b: BlockKeep) -> SetDifference | None:
    """The query heads inside groups: None where both keep their groups whole, since the groups say it all."""
    if a.queries is UNSET and b.queries is UNSET:
        return None
    if a.queries is not UNSET and b.queries is not UNSET:
        return _sets(a.queries, b.queries)
    some, whole = (b, a) if a.queries is UNSET else (a, b)
    # How many heads a group has is not known here, so heads of one set cannot be looked up in the other's groups.
    if whole.kv_groups == "":
        rest, beside = "", f"{some.queries}"
    else:
        rest = f"all of its groups but {some.queries}"
        same = whole.kv_groups in (None, some.kv_groups)
        beside = "" if same else f"{some.queries} outside KV groups {whole.kv_groups}"
    return SetDifference(rest, beside) if whole is a else SetDifference(beside, rest)


def _sets(a: str | None, b: str | None) -> SetDifference | None:
    """None where the sets are equal. A null set keeps all, however many that is."""
    if a == b:
        return None
    if a is None or b is None:
        part = b if a is None else a
        rest = f"all but {part}" if part else "all"
        return SetDifference(rest, "") if a is None else SetDifference("", rest)
    first, second = set(parse_indices(a, ANY_SIZE)), set(parse_indices(b, ANY_SIZE))
    if first == second:
        return None
    return SetDifference(format_indices(first - second), format_indices(second - first))
