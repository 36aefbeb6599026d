"""Random shapes, plans and scores for property tests. Small: what they test does not depend on size."""

from __future__ import annotations

from hypothesis import strategies as st

from shortllama.plans import BlockKeep, Plan, Target, block_keep, make_plan
from shortllama.shape import BlockShape, ModelShape


@st.composite
def shapes(draw: st.DrawFn, *, uniform: bool = False, min_blocks: int = 1, max_blocks: int = 8) -> ModelShape:
    """A shape of any family: grouped or multi-head attention, tied or untied, blocks alike or not."""
    family = draw(st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]))
    per_group = draw(st.integers(1, 3))
    count = draw(st.integers(min_blocks, max_blocks))
    sizes = st.tuples(st.integers(1, 4), st.integers(1, 12))
    drawn = [draw(sizes)] * count if uniform else [draw(sizes) for _ in range(count)]
    return ModelShape(
        family=family,
        vocabulary=draw(st.integers(3, 40)),
        hidden=draw(st.integers(1, 8)) * 2,
        head_dim=draw(st.integers(1, 4)) * 2,
        tied=draw(st.booleans()),
        blocks=tuple(BlockShape(groups * per_group, groups, neurons) for groups, neurons in drawn),
        biases=("q", "k", "v") if family == "qwen2" else (),
        qk_norm=family == "qwen3",
    )


@st.composite
def keeps(draw: st.DrawFn, shape: ModelShape) -> tuple[BlockKeep, ...]:
    """What a plan may keep of `shape`: any blocks but none at all, any groups and neurons, empty sets included."""
    kept = draw(st.sets(st.integers(0, len(shape.blocks) - 1), min_size=1))
    keep: list[BlockKeep] = []
    for index in sorted(kept):
        block = shape.blocks[index]
        groups = draw(st.sets(st.integers(0, block.kv_heads - 1))) if block.kv_heads else set()
        neurons = draw(st.sets(st.integers(0, block.neurons - 1))) if block.neurons else set()
        queries = draw(queries_in(tuple(sorted(groups)), block.queries_per_group))
        keep.append(block_keep(index, block, tuple(sorted(groups)), tuple(sorted(neurons)), queries))
    return tuple(keep)


@st.composite
def queries_in(draw: st.DrawFn, groups: tuple[int, ...], size: int) -> tuple[int, ...]:
    """Query heads that may stay in these groups of `size`: any of each, but as many in all."""
    count = draw(st.integers(1, size)) if groups else 0
    return tuple(
        group * size + offset for group in groups for offset in sorted(draw(st.permutations(range(size)))[:count])
    )


def plan_of(shape: ModelShape, keep: tuple[BlockKeep, ...], *, method: str = "test") -> Plan:
    """A real (not blind) plan that keeps `keep`."""
    return make_plan(model="m", shape=shape, method=method, target=Target("shape", "drawn"), keep=keep)


def scores_of(size: int) -> st.SearchStrategy[tuple[float, ...]]:
    """`size` finite scores; few distinct values, so that ties are common."""
    return st.lists(st.integers(-3, 3).map(float) | st.floats(-1e3, 1e3), min_size=size, max_size=size).map(tuple)
