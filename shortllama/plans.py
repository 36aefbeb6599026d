"""Plans: which blocks survive and, in each, which heads and FFN neurons survive. Pure data, one JSON file.

One vocabulary for every method: depth pruning lists fewer blocks, width pruning lists all blocks with subsets, removing
only an MHA or only an FFN is the empty set, iterative pruning is `compose`. A plan holds no timestamps and no host
paths: equal inputs give equal bytes. It must not know of models, criteria or devices.

Schema history: shortllama.plan/1: first. `queries` of a block came later and is left out where groups stay whole, so
that all other plans have the bytes that they had.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from shortllama import files
from shortllama.errors import PlanError
from shortllama.indices import count_indices, format_indices, parse_indices
from shortllama.shape import BlockShape, ModelShape

SCHEMA = "shortllama.plan/1"

# The projections that each kind of bias compensation gives a bias.
COMPENSATED: dict[str, tuple[str, ...]] = {"flap": ("o", "down")}


class BlockKeep(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One surviving block: its index in the base, and the KV groups, neurons and query heads kept, as index sets.

    None keeps all; "" keeps none, which removes the MHA (or FFN) together with its norms. A KV group is one KV head
    with the query heads that read it. `queries` (unset: all) names the query heads kept inside the groups kept, among
    those of the whole block: as many in each of them, one or more, since configs know one number for all groups.
    """

    index: int
    kv_groups: str | None = None
    neurons: str | None = None
    queries: str | UnsetType = UNSET

    @property
    def is_whole(self) -> bool:
        """Whether nothing of the block goes."""
        return self.kv_groups is None and self.neurons is None and self.queries is UNSET


class Base(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the plan was made for: a name for people, and the shape's digest, which is checked."""

    model: str
    shape_digest: str


class Target(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was asked for, for example kind "ratio", value 0.25; kinds: ratio, blocks, target-params, preset, shape."""

    kind: str
    value: float | str

    def __post_init__(self) -> None:
        # A whole number is written as 6.0 whether it was made here or read back: equal plans, equal bytes.
        if isinstance(self.value, int):
            msgspec.structs.force_setattr(self, "value", float(self.value))


class Achieved(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What came out: the share of all parameters removed (0-1) and the number of blocks left."""

    parameters: float
    blocks: int


class Provenance(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the choice came from: digests of scores and calibration, and the seed; null where there is none."""

    scores_digest: str | None = None
    calibration: str | None = None
    seed: int | None = None


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An ordered list of kept blocks. `blind` plans reproduce a shape only and are refused on real weights.

    `compensation` names the bias compensation that `apply` must add ("flap") or is null.
    """

    base: Base
    method: str
    target: Target
    achieved: Achieved
    keep: tuple[BlockKeep, ...]
    schema: Literal["shortllama.plan/1"] = SCHEMA
    blind: bool = False
    compensation: str | None = None
    provenance: Provenance = Provenance()

    def digest(self) -> str:
        """Return 16 hexadecimal digits that identify this plan."""
        return hashlib.sha256(msgspec.json.encode(self, order="sorted")).hexdigest()[:16]


def kept_groups(keep: BlockKeep, block: BlockShape) -> tuple[int, ...]:
    """Return the KV groups of `block` that survive, ascending."""
    return tuple(range(block.kv_heads)) if keep.kv_groups is None else parse_indices(keep.kv_groups, block.kv_heads)


def kept_queries(keep: BlockKeep, block: BlockShape) -> tuple[int, ...]:
    """Return the query heads of `block` that survive, ascending. Head j reads the KV head of group j // (H/K)."""
    if keep.queries is not UNSET:
        return parse_indices(keep.queries, block.query_heads)
    size = block.queries_per_group
    return tuple(group * size + offset for group in kept_groups(keep, block) for offset in range(size))


def kept_neurons(keep: BlockKeep, block: BlockShape) -> tuple[int, ...]:
    """Return the FFN neurons of `block` that survive, ascending."""
    return tuple(range(block.neurons)) if keep.neurons is None else parse_indices(keep.neurons, block.neurons)


def block_keep(
    index: int,
    block: BlockShape,
    groups: tuple[int, ...],
    neurons: tuple[int, ...],
    queries: tuple[int, ...] | None = None,
) -> BlockKeep:
    """Return the canonical BlockKeep of explicit indices: None, or unset, where everything is kept.

    `queries` None keeps all query heads of the groups.
    """
    whole = queries is None or len(queries) == len(groups) * block.queries_per_group
    return BlockKeep(
        index,
        None if len(groups) == block.kv_heads else format_indices(groups),
        None if len(neurons) == block.neurons else format_indices(neurons),
        UNSET if whole else format_indices(queries or ()),
    )


def check_base(plan: Plan, shape: ModelShape) -> None:
    """Raise PlanError unless `plan` was made for `shape` and its indices are in range and ascending."""
    if plan.base.shape_digest != shape.digest():
        raise PlanError(
            f"plan is for {plan.base.model}@{plan.base.shape_digest}, this model is {len(shape.blocks)} blocks"
            f"@{shape.digest()}; make a plan for this model"
        )
    shape_after(shape, plan.keep)


def shape_after(shape: ModelShape, keep: tuple[BlockKeep, ...]) -> ModelShape:
    """Return the shape that keeping `keep` of `shape` leaves. Raises PlanError for bad indices."""
    if not keep:
        raise PlanError("a plan must keep at least one block")
    blocks: list[BlockShape] = []
    previous = -1
    for one in keep:
        if not previous < one.index < len(shape.blocks):
            raise PlanError(
                f"plan keeps block {one.index} after block {previous}; indices must ascend, below {len(shape.blocks)}"
            )
        previous = one.index
        if shape.mixer and not one.is_whole:
            raise PlanError(
                f"blocks of a {shape.family} model can only be removed whole; plan keeps part of block {previous}"
            )
        block = shape.blocks[one.index]
        groups = block.kv_heads if one.kv_groups is None else count_indices(one.kv_groups, block.kv_heads)
        neurons = block.neurons if one.neurons is None else count_indices(one.neurons, block.neurons)
        blocks.append(BlockShape(groups * _per_group(one, block), groups, neurons))
    return msgspec.structs.replace(shape, blocks=tuple(blocks))


def _per_group(keep: BlockKeep, block: BlockShape) -> int:
    """Return how many query heads each kept group keeps. Raises PlanError where that is not one number for all."""
    if keep.queries is UNSET:
        return block.queries_per_group
    groups = kept_groups(keep, block)
    left = Counter(query // block.queries_per_group for query in kept_queries(keep, block))
    if tuple(sorted(left)) != groups or len(set(left.values())) != 1:
        seen = ", ".join(f"{left[group]} of group {group}" for group in sorted({*left, *groups})) or "none"
        raise PlanError(
            f"plan keeps query heads {keep.queries!r} of block {keep.index}, which are {seen}; every KV group kept "
            f"({format_indices(groups) or 'none'}) must keep as many as the others, one or more, and no other any"
        )
    return left[groups[0]]


def shape_of(plan: Plan, base: ModelShape) -> ModelShape:
    """Return the shape of what `plan` makes of `base`: what it keeps, and the biases of its compensation."""
    return with_biases(shape_after(base, plan.keep), COMPENSATED.get(plan.compensation or "", ()))


def with_biases(shape: ModelShape, projections: tuple[str, ...]) -> ModelShape:
    """Return `shape` with biases on these projections too."""
    return msgspec.structs.replace(shape, biases=tuple(dict.fromkeys((*shape.biases, *projections))))


def make_plan(
    *,
    model: str,
    shape: ModelShape,
    method: str,
    target: Target,
    keep: tuple[BlockKeep, ...],
    blind: bool = False,
    compensation: str | None = None,
    provenance: Provenance | None = None,
) -> Plan:
    """Return a checked plan with its achieved share of parameters filled in. Raises PlanError for bad indices."""
    after = with_biases(shape_after(shape, keep), COMPENSATED.get(compensation or "", ()))
    removed = 1 - after.parameters / shape.parameters
    return Plan(
        base=Base(model, shape.digest()),
        method=method,
        target=target,
        keep=keep,
        blind=blind,
        achieved=Achieved(round(removed, 6), len(after.blocks)),
        compensation=compensation,
        provenance=provenance or Provenance(),
    )


def compose(first: Plan, second: Plan, shape: ModelShape) -> Plan:
    """Return the one plan that equals applying `first` to `shape` and then `second` to the result.

    Raises PlanError where `second` was not made for what `first` leaves, or where bias compensation would be composed
    (its biases belong to the model it was computed on).
    """
    check_base(first, shape)
    between = shape_after(shape, first.keep)
    check_base(second, between)
    if first.compensation or second.compensation:
        raise PlanError(
            "plans with bias compensation cannot be composed; apply the first, then score and prune the result"
        )
    keep: list[BlockKeep] = []
    for later in second.keep:
        earlier = first.keep[later.index]
        block, middle = shape.blocks[earlier.index], between.blocks[later.index]
        groups = kept_groups(earlier, block)
        neurons = kept_neurons(earlier, block)
        queries = kept_queries(earlier, block)
        keep.append(
            block_keep(
                earlier.index,
                block,
                tuple(groups[i] for i in kept_groups(later, middle)),
                tuple(neurons[i] for i in kept_neurons(later, middle)),
                tuple(queries[i] for i in kept_queries(later, middle)),
            )
        )
    return make_plan(
        model=first.base.model,
        shape=shape,
        method=f"{first.method}, then {second.method}",
        target=Target("composed", f"{first.digest()}+{second.digest()}"),
        keep=tuple(keep),
        blind=first.blind or second.blind,
    )


def read_plan(path: Path) -> Plan:
    """Return the plan in a file, or in the plan.json of a checkpoint folder."""
    file = path / "plan.json" if path.is_dir() else path
    return files.decode_json(files.read_bytes(file), Plan, str(file))


def write_plan(path: Path, plan: Plan) -> None:
    """Write the plan atomically; equal plans give equal bytes."""
    files.write_atomically(path, files.encode_json(plan))
