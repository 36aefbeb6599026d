"""The axis queries-per-group: what query heads score, how many of every group go, and that the result computes that."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import plan_of, scores_of, shapes

import shortllama as sl
from shortllama import (
    calibration,
    catalogue,
    checkpoint,
    compensation,
    console,
    criteria,
    scoring,
    selection,
    surgery,
    verification,
)
from shortllama.cli import app
from shortllama.errors import InputError, PlanError
from shortllama.families import adapter
from shortllama.methods import METHODS
from shortllama.planning import make_plan_for, outlook
from shortllama.plans import (
    BlockKeep,
    Plan,
    Target,
    block_keep,
    kept_neurons,
    kept_queries,
    read_plan,
    shape_after,
    shape_of,
)
from shortllama.scores import Scores, read_scores, write_scores
from shortllama.shape import BlockShape, ModelShape
from shortllama.variants import Variant

AXIS = "queries-per-group"
QUERIES = Variant(axis=AXIS)
FAMILIES = {"llama": {}, "mistral": {}, "qwen2": {"biases": ("q", "k", "v")}, "qwen3": {"qk_norm": True}}
FORWARD = ("wanda-sp", "mag-sp", "flap", "flap-exact")
LLAMA_3 = catalogue.lookup("llama-3-8b")


def shape_like(family: str = "llama", **changes: Any) -> ModelShape:
    sizes = {"vocabulary": 41, "hidden": 24, "head_dim": 4, "blocks": 3, "query_heads": 6, "kv_heads": 2, "neurons": 20}
    return ModelShape.uniform(family=family, **{**sizes, **FAMILIES[family], **changes})


def build(family: str = "llama", **changes: Any) -> Any:
    return surgery.build(shape_like(family, **changes), dtype="float64", std=0.2, seed=1)


def tokens(rows: int = 5, length: int = 9) -> calibration.Calibration:
    ids = np.random.default_rng(0).integers(0, 41, size=(rows, length))
    return calibration.describe(ids, "made", seed=None, bos=None)


def heads(scores: Scores) -> tuple[tuple[float, ...], ...]:
    assert isinstance(scores.query_heads, tuple)
    return scores.query_heads


def plan(method: str, shape: ModelShape, ratio: float, scores: Scores | None = None, **options: Any) -> Plan:
    target = Target(options.pop("kind", "ratio"), ratio)
    chosen = options.pop("variant", QUERIES)
    return make_plan_for(method, model="m", shape=shape, target=target, scores=scores, variant=chosen, **options)


# -- scores -----------------------------------------------------------------------------------------------------------


def ungrouped(model: Any) -> Any:
    """The same function with a KV head of its own for every query head."""
    shape = surgery.shape_of(model)
    blocks = tuple(BlockShape(b.query_heads, b.query_heads, b.neurons) for b in shape.blocks)
    wide = surgery.build(msgspec.structs.replace(shape, blocks=blocks), dtype="float64")
    tensors = dict(model.state_dict())
    for name, tensor in tensors.items():
        if ".k_proj." in name or ".v_proj." in name:
            per_head = tensor.view(-1, shape.head_dim, *tensor.shape[1:])
            tensors[name] = per_head.repeat_interleave(shape.blocks[0].queries_per_group, dim=0).flatten(0, 1)
    wide.load_state_dict(tensors)
    return wide


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("criterion", FORWARD)
def test_a_query_head_scores_as_a_head_with_a_kv_head_of_its_own(criterion: str, family: str) -> None:
    """The oracle is what multi-head attention has always scored; the fold over groups is what groups score."""
    model, used = build(family), tokens()
    grouped, alone = scoring.score(model, criterion, used), scoring.score(ungrouped(model), criterion, used)
    assert grouped.kv_groups is not None
    assert alone.kv_groups is not None
    for index, found in enumerate(heads(grouped)):
        assert found == pytest.approx(alone.kv_groups[index], rel=1e-9)
        assert len(set(found)) == 6
        assert grouped.kv_groups[index] == pytest.approx([sum(found[:3]), sum(found[3:])], rel=1e-9)


def test_scores_of_ungrouped_models_say_nothing_twice() -> None:
    for criterion in (*FORWARD, "llm-pruner"):
        scores = scoring.score(build(query_heads=6, kv_heads=6), criterion, tokens())
        assert scores.query_heads is msgspec.UNSET
        assert b"query_heads" not in msgspec.json.encode(scores)


def gradients(model: Any, used: calibration.Calibration) -> dict[str, torch.Tensor]:
    """The gradient of the mean loss over all tokens, of every weight."""
    model.zero_grad()
    ids = torch.from_numpy(np.stack(used.sequences))
    logits = model(input_ids=ids, use_cache=False).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("reduction", ["sum", "max", "first", "prod"])
def test_a_query_head_of_llm_pruner_is_coupled_through_q_and_o(reduction: str, family: str) -> None:
    model, used = build(family), tokens()
    scores = scoring.score(model, "llm-pruner", used, variant=Variant(group_reduction=reduction))
    found = gradients(model, used)
    for index in range(3):
        channels = []
        for short, axis in (("q", 1), ("o", 0)):
            name = f"model.layers.{index}.self_attn.{short}_proj.weight"
            channels.append((model.get_parameter(name) * found[name]).abs().sum(dim=axis))
        both = torch.stack(channels).detach()
        joined = {"sum": both.sum(0), "max": both.amax(0), "first": both[0], "prod": both.prod(0)}[reduction]
        # Norms compute in float32 whatever the weights are.
        assert heads(scores)[index] == pytest.approx(joined.view(6, 4).sum(1).tolist(), rel=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_wanda_sp_scores_each_block_behind_those_that_lost_query_heads(family: str) -> None:
    model, used = build(family), tokens()
    shape = surgery.shape_of(model)
    blocks = (BlockShape(4, 2, 13), shape.blocks[1], BlockShape(2, 2, 13))  # block 1 stays, as a protected one
    towards = msgspec.structs.replace(shape, blocks=blocks)
    scores = scoring.score(model, "wanda-sp", used, towards=towards)
    keep = [BlockKeep(i) for i in range(3)]
    for index, after in enumerate(blocks):
        before = surgery.apply(plan_of(shape, tuple(keep)), model)
        alone = scoring.score(before, "wanda-sp", used)
        assert alone.neurons is not None
        assert heads(scores)[index] == pytest.approx(heads(alone)[index], rel=1e-9)
        if after != shape.blocks[index]:
            stay = selection.heads_within(range(2), 3, after.query_heads // 2, heads(alone)[index])
            neurons = selection.highest(alone.neurons[index], after.neurons)
            keep[index] = block_keep(index, shape.blocks[index], (0, 1), neurons, stay)
    dense = scoring.score(model, "wanda-sp", used)
    assert heads(dense)[2] != pytest.approx(heads(scores)[2], rel=1e-3), "the order of blocks does not matter"
    assert criteria.remark(scores, towards) is None
    groups = shape_after(shape, (BlockKeep(0, "0", "0-12"), BlockKeep(1), BlockKeep(2, "1", "0-12")))
    assert "computed with other widths" in str(criteria.remark(scores, groups))
    assert "computed with dense outputs" in str(criteria.remark(dense, towards))


def test_each_step_of_llm_pruner_scores_the_model_without_the_query_heads_that_went() -> None:
    model, used = build(query_heads=8), tokens()
    shape = surgery.shape_of(model)
    towards = msgspec.structs.replace(shape, blocks=(shape.blocks[0], *(BlockShape(4, 2, 14),) * 2))
    scores = scoring.score(model, "llm-pruner", used, towards=towards, variant=Variant(steps=2))
    dense = scoring.score(model, "llm-pruner", used)
    assert dense.neurons is not None
    # Half of the way: 1 of the 2 query heads of every group and 3 of the 6 neurons that go from blocks 1 and 2.
    first = [BlockKeep(0)]
    for i in (1, 2):
        stay = selection.heads_within(range(2), 4, 3, heads(dense)[i])
        first.append(block_keep(i, shape.blocks[i], (0, 1), selection.highest(dense.neurons[i], 17), stay))
    after = scoring.score(surgery.apply(plan_of(shape, tuple(first)), model), "llm-pruner", used)
    for keep in first[1:]:
        left = kept_queries(keep, shape.blocks[keep.index])
        found, ranks = heads(after)[keep.index], heads(scores)[keep.index]
        for start in (0, 4):
            of_group = [(j, value) for j, value in zip(left, found, strict=True) if start <= j < start + 4]
            ordered = [j for j, _ in sorted(of_group, key=lambda pair: pair[1])]
            by_rank = sorted(range(start, start + 4), key=ranks.__getitem__)
            assert by_rank[1:] == ordered
            assert sorted(ranks[start : start + 4]) == [0, 1, 2, 3]
    assert criteria.remark(scores, towards) is None


# -- how many go ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "ratio", "block", "parameters"),
    [
        ("wanda-sp", 0.25, (24, 8, 10752), 6_352_539_648),
        ("mag-sp", 0.6, (16, 8, 5735), 4_111_339_520),
        ("wanda-sp", 0.999, (8, 8, 15), 1_593_708_544),
        ("llm-pruner", 0.25, (24, 8, 10752), 6_667_112_448),
        ("llm-pruner", 0.3, (24, 8, 10035), 6_438_039_552),
        ("llm-pruner", 0.999, (8, 8, 14), 2_800_242_688),
    ],
)
def test_widths_of_llama_3_8b_are_these(
    method: str, ratio: float, block: tuple[int, int, int], parameters: int
) -> None:
    """Golden. Wanda-sp: int(r H/K) of each 4; LLM-Pruner: (C - int(C (1 - r))) // d of the 4 d channels of a group."""
    after = shape_after(LLAMA_3, plan(method, LLAMA_3, ratio).keep)
    first, last = METHODS[method].protect
    assert set(after.blocks[first : 32 - last]) == {BlockShape(*block)}
    assert {*after.blocks[:first], *after.blocks[32 - last :]} <= {LLAMA_3.blocks[0]}
    assert after.parameters == parameters


@st.composite
def scored(draw: st.DrawFn, name: str = "wanda-sp") -> tuple[ModelShape, Scores]:
    """A shape with grouped attention, and scores of it."""
    shape = draw(shapes().filter(lambda shape: shape.blocks[0].queries_per_group > 1))
    return shape, Scores(
        criterion=name,
        unit="width",
        base_digest=shape.digest(),
        kv_groups=tuple(draw(scores_of(block.kv_heads)) for block in shape.blocks),
        query_heads=tuple(draw(scores_of(block.query_heads)) for block in shape.blocks),
        neurons=tuple(draw(scores_of(block.neurons)) for block in shape.blocks),
    )


@given(st.data(), st.floats(0.01, 0.99), st.sampled_from([1, 2, 3, 4, 8]))
def test_the_best_heads_of_every_group_stay_and_groups_do(data: st.DataObject, ratio: float, align: int) -> None:
    shape, scores = data.draw(scored())
    try:
        made = plan("wanda-sp", shape, ratio, scores, align=align)
    except InputError as error:
        assert "removes no query head and no neuron" in str(error)  # noqa: PT017 - the only refusal there may be
        return
    assert scores.neurons is not None
    for keep in made.keep:
        block, values = shape.blocks[keep.index], heads(scores)[keep.index]
        size, stay = block.queries_per_group, kept_queries(keep, block)
        count = len(stay) // block.kv_heads
        least = size - int(ratio * size)
        unit = align // math.gcd(align, block.kv_heads * shape.head_dim)
        assert least <= count < least + unit
        assert count % unit == 0 or count == size
        assert keep.kv_groups is None
        for group in range(block.kv_heads):
            inside = set(range(group * size, (group + 1) * size))
            kept = inside & set(stay)
            assert len(kept) == count
            assert all(values[gone] <= values[one] for gone in inside - kept for one in kept)
        assert len(kept_neurons(keep, block)) >= block.neurons - int(ratio * block.neurons)


@settings(max_examples=60)
@given(shapes().filter(lambda shape: shape.blocks[0].queries_per_group > 1), st.booleans(), st.data())
def test_target_params_is_met_within_one_step(shape: ModelShape, at_most: bool, data: st.DataObject) -> None:
    wanted = data.draw(st.integers(1, shape.parameters - 1))

    def left(kind: str, value: float, **options: Any) -> int:
        return shape_after(shape, plan("wanda-sp", shape, value, kind=kind, **options).keep).parameters

    # Brute force over every ratio at which some count changes.
    sizes = {block.queries_per_group for block in shape.blocks} | {block.neurons for block in shape.blocks}
    reachable = {left("ratio", k / size + 1e-9) for size in sizes for k in range(1, size)}
    if at_most:
        best = max((p for p in reachable if p <= wanted), default=None)
    else:
        best = min((p for p in reachable if p >= wanted >= min(reachable)), default=None)
    if best is None:
        with pytest.raises(InputError):
            left("target-params", wanted, at_most=at_most)
    else:
        assert left("target-params", wanted, at_most=at_most) == best


# -- FLAP's adaptive widths -------------------------------------------------------------------------------------------


def flap_scores(method: str, shape: ModelShape, seed: int) -> tuple[Scores, torch.Tensor, torch.Tensor]:
    """Scores from squared attention metrics (L, H d) and MLP metrics (L, f), each block on a scale of its own."""
    generator = torch.Generator().manual_seed(seed)
    count, block = len(shape.blocks), shape.blocks[0]

    def drawn(width: int) -> torch.Tensor:
        values = torch.rand(count, width, generator=generator, dtype=torch.float64) ** 4
        return values * torch.logspace(-3, 3, count, dtype=torch.float64)[:, None]

    attention, mlp = drawn(block.query_heads * shape.head_dim), drawn(block.neurons)
    scores = Scores(
        criterion=method,
        unit="width",
        base_digest=shape.digest(),
        kv_groups=tuple(map(tuple, attention.view(count, block.kv_heads, -1).sum(2).tolist())),
        query_heads=tuple(map(tuple, attention.view(count, block.query_heads, -1).sum(2).tolist())),
        neurons=tuple(map(tuple, mlp.tolist())),
        details={"attention_deviation": attention.std(dim=1).tolist(), "means": {}, "metric": "WIFV"},
    )
    return scores, attention, mlp


def standardised(x: torch.Tensor) -> torch.Tensor:
    return (x - x.mean(dim=1, keepdim=True)) / x.std(dim=1, keepdim=True)


def adaptive(attention: torch.Tensor, mlp: torch.Tensor, shape: ModelShape, ratio: float, exact: bool) -> Any:
    """AL-AM in FLAP's way for this axis: a unit is the i-th lowest query head of every group, the highest one stays.

    Returns the query heads left in each group and the neurons left, by block.
    """
    layers, block, head_dim = len(shape.blocks), shape.blocks[0], shape.head_dim
    heads = standardised(attention).view(layers, block.kv_heads, block.queries_per_group, head_dim).mean(3)
    units = heads.sort(dim=2)[0].mean(1)[:, :-1]
    mlp = standardised(mlp)
    price = 2 * block.kv_heads * head_dim
    price = price if exact else price // 3 * 3
    everything = torch.cat([units.flatten(), mlp.flatten()])
    ordered, indices = torch.sort(everything, descending=True, stable=True)
    weight = torch.full((len(indices),), 3.0, dtype=torch.float64)
    weight[indices < units.numel()] = price
    stay = layers * (price + 2 * block.kv_heads * head_dim)  # one query head of every group, K and V
    wanted = (weight.sum() + stay) * (1 - ratio)
    threshold = ordered[torch.argmin(torch.abs(torch.cumsum(weight, 0) + stay - wanted))]
    return 1 + (units > threshold).sum(1), (mlp > threshold).sum(1)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 999),
    ratio=st.floats(0.05, 0.9),
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(2, 4), st.sampled_from([2, 4, 8])),
    method=st.sampled_from(["flap", "flap-exact"]),
)
def test_adaptive_widths_rank_heads_of_every_group_with_neurons(
    seed: int, ratio: float, sizes: tuple[int, int, int, int], method: str
) -> None:
    layers, groups, size, head_dim = sizes
    shape = shape_like(
        blocks=layers, kv_heads=groups, query_heads=groups * size, head_dim=head_dim, neurons=25, hidden=16
    )
    scores, attention, mlp = flap_scores(method, shape, seed)
    queries, neurons = adaptive(attention, mlp, shape, ratio, method == "flap-exact")
    try:
        made = plan(method, shape, ratio, scores)
    except InputError as error:
        assert "removes no query head" in str(error)  # noqa: PT017 - the only refusal there may be
        assert (queries == size).all()
        assert (neurons == 25).all()
        return
    after = shape_after(shape, made.keep).blocks
    assert [block.queries_per_group for block in after] == queries.tolist()
    assert [block.kv_heads for block in after] == [groups] * layers
    assert [block.neurons for block in after] == neurons.tolist()


@settings(max_examples=30)
@given(seed=st.integers(0, 999), ratio=st.floats(0.1, 0.6))
def test_exact_prices_meet_the_ratio_of_projections_within_one_unit(seed: int, ratio: float) -> None:
    shape = shape_like(blocks=6, query_heads=8, kv_heads=2, neurons=40)
    scores, *_ = flap_scores("flap-exact", shape, seed)
    made = plan("flap-exact", shape, ratio, scores)

    def projections(one: ModelShape) -> int:
        return sum(one.hidden * (2 * one.head_dim * (b.query_heads + b.kv_heads) + 3 * b.neurons) for b in one.blocks)

    unit = 24 * 4 * 2 * 2
    assert abs(projections(shape_of(made, shape)) - projections(shape) * (1 - Fraction(ratio))) <= 1.5 * unit


def test_flap_reaches_target_params_with_its_biases() -> None:
    shape = shape_like(blocks=6, query_heads=8, kv_heads=2, neurons=40)
    scores, *_ = flap_scores("flap", shape, 3)
    wanted = int(shape.parameters * 0.75)
    found = shape_of(plan("flap", shape, wanted, scores, kind="target-params"), shape)
    assert found.biases == ("o", "down")
    assert wanted <= found.parameters < wanted + 24 * 4 * 2 * 2


# -- the result -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["flap", "flap-exact", "wanda-sp", "mag-sp", "llm-pruner"])
def test_every_method_leaves_what_its_mask_computes(method: str, family: str) -> None:
    model, used = build(family), tokens()
    shape = surgery.shape_of(model)
    made = sl.plan(model, method=method, ratio=0.5, calibration=used, variant=QUERIES, protect=(0, 0))
    variant = msgspec.structs.replace(QUERIES, structure=None)
    towards = outlook(method, shape=shape, target=Target("ratio", 0.5), variant=variant, protect=(0, 0))
    scores = sl.score(model, METHODS[method].criterion, calibration=used, towards=towards)
    assert made.method == f"{method} ({AXIS})"
    assert made.provenance.scores_digest == scores.digest()
    after = shape_of(made, shape)
    assert [block.kv_heads for block in after.blocks] == [2, 2, 2]
    assert min(block.query_heads for block in after.blocks) < 6
    pruned = sl.apply(made, model, scores=scores)
    assert surgery.shape_of(pruned) == after
    biases = compensation.biases(made, model, scores) or {}
    masked = verification.mask(build(family), made)
    parts = adapter(masked)
    for name, bias in biases.items():
        module = masked.get_submodule(name.removesuffix(".bias"))
        module.bias = torch.nn.Parameter(bias)
    assert len(parts.blocks) == 3
    ids = torch.from_numpy(used.sequences[0])[None]
    with torch.no_grad():
        expected, found = masked(ids).logits, pruned(ids).logits
    assert (found - expected).abs().max() < 1e-9


def test_biases_stand_in_for_the_means_of_the_query_heads_that_went() -> None:
    model, used = build(), tokens()
    scores = scoring.score(model, "flap", used)
    made = plan("flap", surgery.shape_of(model), 0.5, scores, variant=Variant(axis=AXIS, structure="UL-UM"))
    biases = compensation.biases(made, model, scores)
    assert biases is not None
    assert scores.details is not None
    for keep in made.keep:
        o_proj = model.model.layers[keep.index].self_attn.o_proj
        gone = sorted(set(range(6)) - set(kept_queries(keep, BlockShape(6, 2, 20))))
        assert len(gone) == 2
        mean = torch.tensor(scores.details["means"]["o"][keep.index], dtype=torch.float64).view(6, 4)
        expected = sum(o_proj.weight.detach().view(24, 6, 4)[:, head] @ mean[head] for head in gone)
        torch.testing.assert_close(biases[f"model.layers.{keep.index}.self_attn.o_proj.bias"], expected)


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "shape", "variant", "problem"),
    [
        ("wanda-sp", catalogue.lookup("llama-7b"), QUERIES, "is read by one query head, so none can go alone; use --a"),
        ("wanda-sp", LLAMA_3, Variant(axis="queries"), "--axis 'queries' is unknown to wanda-sp"),
        ("wanda-sp", LLAMA_3, Variant(axis="kv-group"), "did you mean kv-groups?"),
        ("ppl", LLAMA_3, QUERIES, "--axis queries-per-group is not for ppl"),
        (
            "flap",
            LLAMA_3,
            Variant(axis=AXIS, structure="AL-MM", remove_heads=3),
            "all of them stay; use AL-AM or UL-UM",
        ),
        (
            "flap",
            LLAMA_3,
            Variant(axis=AXIS, structure="UL-MM", remove_heads=3),
            "all of them stay; use AL-AM or UL-UM",
        ),
        (
            "llm-pruner",
            LLAMA_3,
            Variant(axis=AXIS, structure="global"),
            "removes one of every group at once; use local",
        ),
        ("flap", LLAMA_3, QUERIES, "which only scores tell"),
    ],
)
def test_what_has_no_meaning_on_this_axis_is_refused(
    method: str, shape: ModelShape, variant: Variant, problem: str
) -> None:
    with pytest.raises(InputError) as caught:
        plan(method, shape, 0.4, variant=variant)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


def test_protection_may_leave_only_blocks_without_shared_heads() -> None:
    blocks = (BlockShape(4, 2, 8), BlockShape(2, 2, 8))
    shape = msgspec.structs.replace(shape_like(blocks=2), blocks=blocks)
    with pytest.raises(InputError, match="read by one query head"):
        plan("wanda-sp", shape, 0.5, protect=(1, 0))
    assert shape_after(shape, plan("wanda-sp", shape, 0.5).keep).blocks == (BlockShape(2, 2, 4), BlockShape(2, 2, 4))


def test_scores_from_before_query_heads_were_scored_serve_kv_groups_only(tmp_path: Path) -> None:
    model = build()
    scores = scoring.score(model, "mag-sp")
    older = msgspec.structs.replace(scores, query_heads=msgspec.UNSET)
    write_scores(tmp_path / "older.json", older)
    assert "query_heads" not in json.loads((tmp_path / "older.json").read_text())
    assert read_scores(tmp_path / "older.json") == older
    with pytest.raises(InputError, match=r"lack 'query_heads', which method mag-sp \(queries-per-group\) needs; score"):
        plan("mag-sp", shape_like(), 0.5, older)
    groups = Variant(axis="kv-groups")
    assert plan("mag-sp", shape_like(), 0.5, older, variant=groups).keep == plan(
        "mag-sp", shape_like(), 0.5, scores, variant=Variant()
    ).keep  # fmt: skip
    wrong = msgspec.structs.replace(scores, query_heads=heads(scores)[:2])
    with pytest.raises(InputError, match=r"scores\.query_heads are for 2 blocks of 6 units, this model has 3 blocks"):
        plan("mag-sp", shape_like(), 0.5, wrong)
    bad = msgspec.structs.replace(scores, query_heads=((math.nan,) * 6, *heads(scores)[1:]))
    with pytest.raises(InputError, match=r"scores.query_heads\[0\] holds a value that is not finite"):
        plan("mag-sp", shape_like(), 0.5, bad)


def test_what_cannot_be_reached_says_what_stays() -> None:
    with pytest.raises(PlanError, match="cannot be reached by wanda-sp: at least"):
        plan("wanda-sp", LLAMA_3, 1.1e9, kind="target-params")


# -- the commands -----------------------------------------------------------------------------------------------------


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Return run(*arguments, code=0) -> (stdout, stderr) of a command in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    rows = np.random.default_rng(5).integers(3, 2000, size=(4, 24)).tolist()
    (tmp_path / "ids.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def run(*arguments: object, code: int = 0) -> tuple[str, str]:
        seen = console.run(app, list(map(str, arguments)))
        out, err = capfd.readouterr()
        assert seen == code, err
        return out, err

    return run


CALIBRATION = ("--calibration", "ids:ids.jsonl", "--samples", 4, "--length", 24)


def test_the_reference_model_is_planned_pruned_and_verified(run: Any, tmp_path: Path) -> None:
    """8 KV groups of 2 query heads become 8 of 1, which the stock class of its family takes."""
    how = ("--method", "wanda-sp", "--ratio", 0.5, "--axis", AXIS, *CALIBRATION)
    run("plan", "reference", *how, "--out", "plan.json")
    report = json.loads(run("prune", "reference", "--plan", "plan.json", "--out", "pruned", "--json")[0])
    checks = {check["name"]: check["passed"] for check in report["verification"]["checks"]}
    assert all(checks.values())
    assert {"stock transformers in a fresh process", "masked dense model", "shape of the plan"} <= checks.keys()
    assert report["verification"]["loaded_as"] == "LlamaForCausalLM"
    assert {fit["engine"]: fit["can"] for fit in report["verification"]["engines"]}["llama.cpp"]
    model, _ = checkpoint.load(tmp_path / "pruned")
    assert set(surgery.shape_of(model).blocks) == {BlockShape(8, 8, 192)}


def test_blocks_of_different_groups_are_verified_and_padded(run: Any, tmp_path: Path) -> None:
    """Adaptive widths leave our own form; zero query heads inside the groups make it uniform again, exactly."""
    shape = shape_like(vocabulary=2000, head_dim=6, query_heads=12, kv_heads=2, neurons=30)
    surgery.build(shape, std=0.2).save_pretrained(tmp_path / "dense")
    how = ("--method", "flap", "--ratio", 0.45, "--protect", "1,0", "--axis", AXIS, *CALIBRATION)
    report = json.loads(run("prune", "dense", *how, "--out", "pruned", "--json")[0])
    checks = {check["name"]: check["passed"] for check in report["verification"]["checks"]}
    assert checks["masked dense model with its biases"]
    assert report["manifest"]["form"] == "shortllama"
    found = surgery.shape_of(checkpoint.load(tmp_path / "pruned")[0])
    assert len({block.queries_per_group for block in found.blocks}) > 1
    assert {block.kv_heads for block in found.blocks} == {2}
    padded = json.loads(run("export", "pruned", "--to", "padded", "--out", "padded", "--json")[0])
    assert all(check["passed"] for check in padded["verification"]["checks"])
    most = max(block.query_heads for block in found.blocks)
    assert {block.query_heads for block in surgery.shape_of(checkpoint.load(tmp_path / "padded")[0]).blocks} == {most}


def test_one_file_of_scores_serves_both_axes(run: Any, tmp_path: Path) -> None:
    run("score", "reference", "--criterion", "mag-sp", "--out", "scores.json")
    assert "query heads" in run("score", "reference", "--criterion", "mag-sp")[0]
    for axis in ("kv-groups", AXIS):
        run("plan", "reference", "--method", "mag-sp", "--ratio", 0.5, "--scores", "scores.json", "--axis", axis,
            "--out", f"{axis}.json")  # fmt: skip
    groups, queries = (read_plan(tmp_path / f"{axis}.json") for axis in ("kv-groups", AXIS))
    assert all(keep.queries is msgspec.UNSET and keep.kv_groups for keep in groups.keep)
    assert all(keep.queries and keep.kv_groups is None for keep in queries.keep)
    assert "query heads kept" in run("show", f"{AXIS}.json")[0]
    assert "query heads" in run("diff", "kv-groups.json", f"{AXIS}.json")[0]
    _, err = run("prune", "reference", "--plan", f"{AXIS}.json", "--axis", AXIS, "--out", "p", code=2)
    assert err == "error: --plan says what to remove already; leave out --axis\n"


def test_a_depth_plan_composes_with_one_of_query_heads(run: Any, tmp_path: Path) -> None:
    dense = shape_like(vocabulary=2000)
    surgery.build(dense, std=0.2).save_pretrained(tmp_path / "dense")
    run("plan", "dense", "--method", "last", "--blocks", 1, "--out", "deep.json")
    checkpoint.write(tmp_path / "dense", read_plan(tmp_path / "deep.json"), tmp_path / "deep")
    run("plan", "deep", "--method", "mag-sp", "--ratio", 0.5, "--axis", AXIS, "--out", "wide.json")
    run("compose", "deep.json", "wide.json", "--out", "both.json")
    both, wide = read_plan(tmp_path / "both.json"), read_plan(tmp_path / "wide.json")
    assert both.method == f"last, then mag-sp ({AXIS})"
    assert both.keep == wide.keep
    assert shape_of(both, dense).blocks == (BlockShape(4, 2, 10),) * 2
