from __future__ import annotations

import statistics

import pytest

from shortllama import catalogue
from shortllama.errors import InputError
from shortllama.plans import check_base, shape_after
from shortllama.shape import BlockShape

# Facts. Parameter counts as the published checkpoints have them.
PUBLISHED = {
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-2-7b": 6_738_415_616,
    "llama-3-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-8b": 8_190_735_360,
}

# Shortened LLaMA, Table 1: blocks, heads, FFN neurons, parameters in billions; LLM-Pruner prunes blocks [4, L - 2).
TABLE_1 = [
    ("llama-7b", 32, 32, 11008, 6.738),
    ("llama-7b/wanda-sp-20", 32, 26, 8807, 5.470),
    ("llama-7b/wanda-sp-27", 32, 23, 7816, 4.879),
    ("llama-7b/wanda-sp-35", 32, 21, 7156, 4.486),
    ("llama-7b/llm-pruner-20", 32, 24, 8256, 5.423),
    ("llama-7b/llm-pruner-27", 32, 21, 7155, 4.908),
    ("llama-7b/llm-pruner-35", 32, 18, 6054, 4.392),
    ("llama-7b/depth-26", 26, 32, 11008, 5.524),
    ("llama-7b/depth-23", 23, 32, 11008, 4.917),
    ("llama-7b/depth-21", 21, 32, 11008, 4.512),
    ("llama-13b", 40, 40, 13824, 13.016),
    ("llama-13b/wanda-sp-21", 40, 32, 11060, 10.479),
    ("llama-13b/wanda-sp-29", 40, 29, 9954, 9.485),
    ("llama-13b/wanda-sp-37", 40, 26, 8710, 8.406),
    ("llama-13b/llm-pruner-21", 40, 30, 10368, 10.320),
    ("llama-13b/llm-pruner-29", 40, 26, 8985, 9.241),
    ("llama-13b/llm-pruner-37", 40, 22, 7603, 8.163),
    ("llama-13b/depth-32", 32, 40, 13824, 10.478),
    ("llama-13b/depth-29", 29, 40, 13824, 9.527),
    ("llama-13b/depth-25", 25, 40, 13824, 8.258),
]
# The same table's FLAP rows: mean and standard deviation over blocks of heads and of neurons.
TABLE_1_FLAP = [
    ("llama-7b/flap-20", 26.9, 7.5, 8577.4, 2078.4, 5.440),
    ("llama-7b/flap-27", 24.6, 8.6, 7497.1, 2358.0, 4.861),
    ("llama-7b/flap-35", 23.0, 8.8, 6781.1, 2440.6, 4.472),
    ("llama-13b/flap-21", 33.7, 8.9, 10778.7, 2316.0, 10.484),
    ("llama-13b/flap-29", 31.1, 10.6, 9570.8, 2601.0, 9.470),
    ("llama-13b/flap-37", 27.5, 11.3, 8326.6, 2874.9, 8.328),
]


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED.items())
def test_published_parameter_counts(name: str, parameters: int) -> None:
    assert catalogue.lookup(name).parameters == parameters


@pytest.mark.parametrize(("name", "blocks", "heads", "neurons", "billions"), TABLE_1)
def test_table_1(name: str, blocks: int, heads: int, neurons: int, billions: float) -> None:
    shape = catalogue.lookup(name)
    assert f"{shape.parameters / 1e9:.3f}" == f"{billions:.3f}"
    pruned = shape.blocks[4:-2] if "llm-pruner" in name else shape.blocks
    whole = catalogue.lookup(name.partition("/")[0]).blocks[0]
    assert len(shape.blocks) == blocks
    assert set(pruned) == {BlockShape(heads, heads, neurons)}
    if "llm-pruner" in name:
        assert {*shape.blocks[:4], *shape.blocks[-2:]} == {whole}


@pytest.mark.parametrize(("name", "head_mean", "head_sd", "neuron_mean", "neuron_sd", "billions"), TABLE_1_FLAP)
def test_table_1_flap(
    name: str, head_mean: float, head_sd: float, neuron_mean: float, neuron_sd: float, billions: float
) -> None:
    shape = catalogue.lookup(name)
    whole = catalogue.lookup(name.partition("/")[0]).blocks[0]
    heads, neurons = [b.query_heads for b in shape.blocks], [b.neurons for b in shape.blocks]
    assert shape.parameters / 1e9 == pytest.approx(billions, abs=0.002)
    assert sum(heads) == round(head_mean * len(heads))
    assert sum(neurons) == round(neuron_mean * len(neurons))
    for deviation in (statistics.stdev, statistics.pstdev):
        assert deviation(heads) == pytest.approx(head_sd, rel=0.02)
        assert deviation(neurons) == pytest.approx(neuron_sd, rel=0.02)
    assert 1 <= min(heads) <= max(heads) <= whole.query_heads
    assert 1 <= min(neurons) <= max(neurons) <= whole.neurons
    assert shape.biases == ()


GOLDEN_FLAP = [
    "4a3b3af516e81d1a",
    "b8160400a1aaeffe",
    "1398aed4c13dea01",
    "1ccfcc36fb172170",
    "ec3aaaa80b807f2c",
    "028b4d9432e7faf7",
]


def test_flap_rows_never_change() -> None:
    """Golden: stored results refer to these shapes by digest."""
    assert [catalogue.lookup(row[0]).digest() for row in TABLE_1_FLAP] == GOLDEN_FLAP


def test_names_are_complete_and_each_resolves() -> None:
    names = catalogue.names()
    assert {row[0] for row in (*TABLE_1, *TABLE_1_FLAP)} | set(PUBLISHED) <= set(names)
    assert len(set(names)) == len(names)
    for name in names:
        assert catalogue.lookup(name).parameters > 1e9


def test_vicuna_names_are_aliases() -> None:
    assert catalogue.lookup("vicuna-7b") == catalogue.lookup("llama-7b")
    assert catalogue.lookup("vicuna-13b-v1.3/depth-32") == catalogue.lookup("llama-13b/depth-32")
    assert catalogue.plan_of("vicuna-7b/depth-26") == catalogue.plan_of("llama-7b/depth-26")


def test_a_row_is_a_blind_plan_of_its_model() -> None:
    plan = catalogue.plan_of("llama-7b/llm-pruner-20")
    dense = catalogue.lookup("llama-7b")
    check_base(plan, dense)
    assert plan.blind
    assert plan.base.model == "llama-7b"
    assert shape_after(dense, plan.keep) == catalogue.lookup("llama-7b/llm-pruner-20")


def test_any_blind_plan_may_follow_a_model() -> None:
    assert catalogue.lookup("llama-7b/depth:26") == catalogue.lookup("llama-7b/depth-26")
    assert catalogue.lookup("llama-7b/width:26x8807") == catalogue.lookup("llama-7b/wanda-sp:0.2")
    assert len(catalogue.lookup("llama-3-8b/ppl:0.25").blocks) == 24


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("llama7b", "llama-7b"),
        ("Llama-2-7B", "llama-2-7b"),
        ("llama-7b/dept-26", "llama-7b/depth-26"),
        ("llama-7b/wanda-sp-21", "llama-7b/wanda-sp-20"),
        ("llama-7b/", "llama-7b"),
        ("gpt-2", "`shortllama shapes` lists"),
    ],
)
def test_unknown_names_get_the_nearest_ones(name: str, hint: str) -> None:
    with pytest.raises(InputError) as caught:
        catalogue.lookup(name)
    assert hint in str(caught.value)
    assert "\n" not in str(caught.value)
