"""Published removal orders: the sets the paper removed, on the shapes it removed them from."""

from __future__ import annotations

import msgspec
import pytest

from shortllama import catalogue, presets, surgery
from shortllama.errors import InputError, PlanError, ShortllamaError
from shortllama.plans import Plan, Target, check_base
from shortllama.shape import ModelShape

LLAMA = catalogue.lookup("llama-7b")


def removed(plan: Plan, shape: ModelShape) -> list[int]:
    return sorted(set(range(len(shape.blocks))) - {keep.index for keep in plan.keep})


def plan(name: str, shape: ModelShape = LLAMA, **options) -> Plan:
    return presets.plan(name, model="m", shape=shape, **options)


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("paper-llama-7b-taylor-20", range(24, 30)),
        ("paper-llama-7b-taylor-27", range(21, 30)),
        ("paper-llama-7b-taylor-35", range(19, 30)),
        ("paper-llama-7b-ppl-20", [10, 13, 24, 25, 26, 27]),
        ("paper-vicuna-7b-taylor-35", range(19, 30)),
        ("paper-llama-2-7b-taylor-27", range(21, 30)),
    ],
)
def test_the_papers_models_lose_the_blocks_that_its_models_lost(name: str, blocks) -> None:
    made = plan(name)
    assert removed(made, LLAMA) == list(blocks)
    assert not made.blind
    assert made.target == Target("preset", name)
    assert made.provenance.scores_digest is None
    check_base(made, LLAMA)


def test_every_preset_makes_a_plan_of_its_own_shape() -> None:
    labelled = {name for name, preset in presets.presets().items() if preset.count}
    assert {"paper-vicuna-13b-ppl-37", "paper-vicuna-13b-taylor-29", "paper-llama-7b-mag-20"} <= labelled
    assert "paper-vicuna-13b-taylor-37" not in labelled, "12 unprotected blocks were published, 15 would go"
    for name, preset in presets.presets().items():
        shape = catalogue.lookup(preset.shape)
        assert len(set(preset.order)) == len(preset.order)
        assert set(preset.order) <= set(range(len(shape.blocks)))
        target = None if preset.count else Target("blocks", 6)
        made = plan(name, shape, target=target)
        assert len(removed(made, shape)) == (preset.count or 6)


def test_an_order_takes_any_target_and_any_protection() -> None:
    for target, at_most, count in [
        (Target("blocks", 3), False, 3),
        (Target("ratio", 0.25), False, 8),
        (Target("target-params", 5_422_977_024), False, 6),
        (Target("target-params", 5_422_977_024), True, 7),
    ]:
        made = plan("paper-llama-7b-taylor", target=target, at_most=at_most)
        assert removed(made, LLAMA) == sorted((27, 24, 26, 25, 29, 28, 23, 22)[:count])
        assert made.target == target
    bare = plan("paper-llama-7b-taylor-20", protect=(0, 0))
    assert removed(bare, LLAMA) == [0, 24, 25, 26, 27, 29]


def test_fine_tuned_models_may_have_more_tokens() -> None:
    shape = msgspec.structs.replace(LLAMA, vocabulary=32001)
    assert removed(plan("paper-vicuna-7b-ppl-20", shape), shape) == [10, 11, 20, 24, 25, 27]


def test_a_preset_applies_to_real_weights() -> None:
    """Same blocks, other sizes would be refused; so shrink what a block holds, not how many there are."""
    small = ModelShape.uniform(vocabulary=9, hidden=8, head_dim=2, blocks=32, query_heads=4, kv_heads=4, neurons=6)
    with pytest.raises(PlanError, match="for the blocks of llama-7b"):
        plan("paper-llama-7b-taylor-20", small)
    model = surgery.build(LLAMA, device="meta")
    assert len(surgery.apply(plan("paper-llama-7b-taylor-20"), model).model.layers) == 26


@pytest.mark.parametrize(
    ("name", "shape", "options", "problem"),
    [
        ("paper-llama7b-taylor-20", LLAMA, {}, "did you mean paper-llama-7b-taylor-20"),
        ("nonsense", LLAMA, {}, "choose one of paper-llama-7b-ppl"),
        ("paper-llama-7b-ppl", LLAMA, {}, "is an order without a count; add --blocks N"),
        (
            "paper-llama-7b-ppl-20",
            LLAMA,
            {"target": Target("blocks", 3)},
            "leave out --blocks, or use paper-llama-7b-ppl",
        ),
        ("paper-llama-7b-ppl", LLAMA, {"target": Target("blocks", 16)}, "16 blocks would go; 15 unprotected ones"),
        ("paper-llama-7b-ppl", LLAMA, {"target": Target("ratio", 0.01)}, "0 blocks would go"),
        ("paper-llama-7b-ppl", LLAMA, {"target": Target("ratio", 1.5)}, "--ratio 1.5 is outside (0, 1)"),
        ("paper-llama-7b-ppl-20", catalogue.lookup("llama-13b"), {}, "this model has 40 of hidden size 5120"),
        ("paper-llama-7b-ppl-20", LLAMA, {"protect": (20, 5)}, "5 unprotected ones were published"),
    ],
)
def test_bad_requests_are_refused_in_one_line(name: str, shape: ModelShape, options, problem: str) -> None:
    with pytest.raises(ShortllamaError) as error:
        plan(name, shape, **options)
    assert problem in str(error.value)
    assert "\n" not in str(error.value)
    assert isinstance(error.value, InputError)
