"""Quantised weights: their bytes, levels and logits against what they should be, for every family and any widths."""

from __future__ import annotations

import json

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import shapes
from test_families import CASES, IDS, logits, stock_model

from bench import memory, physics, subjects
from bench.cells import Cell
from bench.runtimes import loading
from bench.runtimes.operations import Counted
from bench.runtimes.protocol import Options
from shortllama import checkpoint, families, quantisation, shape, sources, surgery
from shortllama.errors import InputError, UnsupportedError
from shortllama.shape import ModelShape

HELD = ("int8", "int4")


def held_as(given: ModelShape, held: str) -> ModelShape:
    return msgspec.structs.replace(given, quantised=held)


# Sizes that int4 kernels take, in groups of 128 and of 32, and blocks of which they take some matrices only.
UNEVEN = ModelShape(
    "llama", 97, 128, 16, False,
    (
        shape.BlockShape(8, 4, 96), shape.BlockShape(3, 1, 41), shape.BlockShape(0, 0, 64), shape.BlockShape(2, 2, 0),
    ),
    biases=("down",),
)  # fmt: skip
FUSED = ModelShape("phi3", 97, 64, 8, False, (shape.BlockShape(8, 2, 40), shape.BlockShape(8, 2, 64)))


# -- bytes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("given", [UNEVEN, FUSED], ids=["uneven", "fused"])
def test_weights_are_counted_as_they_are_held(torchao, given: ModelShape, held: str, dtype: str) -> None:
    whole = held_as(given, held)
    model = surgery.build(whole, dtype=dtype)
    assert quantisation.held_bytes(model) == whole.weight_bytes(dtype) < given.weight_bytes(dtype)
    assert sum(one.numel() for one in model.parameters()) == given.parameters


@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("name", CASES)
def test_every_family_computes_with_quantised_weights(torchao, name: str, held: str, tmp_path) -> None:
    """Read from files; near the model with float weights, and not equal to it."""
    model = stock_model(CASES[name])
    model.save_pretrained(tmp_path / "dense")
    source = sources.from_folder(name, tmp_path / "dense")
    quantised, _ = checkpoint.load(tmp_path / "dense", quantised=held)
    whole = held_as(source.shape, held)
    assert quantisation.held_bytes(quantised) == whole.weight_bytes("float32")
    plain, _ = checkpoint.load(tmp_path / "dense")
    wanted, seen = logits(plain), logits(quantised)
    assert seen.isfinite().all()
    taken = [group for group in quantisation.groups(whole).values() if group]
    assert bool(taken) == (not torch.equal(wanted, seen)), "some matrix is quantised"
    if held == "int8":
        error = (seen - wanted).norm() / wanted.norm()
        assert taken
        assert error < 0.25


@settings(max_examples=200)
@given(shapes(), st.sampled_from(HELD))
def test_names_and_sizes_agree_on_what_is_quantised(given: ModelShape, held: str) -> None:
    """The closed form counts the parts of matrices, what is quantised is chosen by the names of parameters."""
    from shortllama import layout

    whole, sizes = held_as(given, held), layout.tensors(given)
    bytes_by_name = 0
    for name, group in quantisation.groups(whole).items():
        rows, columns = sizes[name]
        matrix = shape.Matrix(rows, columns, 16)
        bytes_by_name += matrix.held_bytes(held, "bfloat16") if group else 2 * rows * columns
    others = sum(2 * int(np.prod(size)) for name, size in sizes.items() if name not in quantisation.groups(whole))
    assert whole.weight_bytes("bfloat16") == bytes_by_name + others
    assert whole.digest() != given.digest()


def test_a_step_reads_fewer_bytes_and_a_conversion_is_held_and_moved() -> None:
    given = subjects.resolve("llama-7b").shape
    cell = Cell("llama-7b", "static", "bfloat16", "sdpa", 12, 128, "none", 1)
    dense, eighth, fourth = (held_as(given, held) for held in ("", *HELD))
    linear = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    rows = 32 * (4 * 4096 + 2 * 11008 + 4096)
    assert dense.decode_bytes(1, 0, "bfloat16") - eighth.decode_bytes(1, 0, "bfloat16") == linear - 5 * rows
    # 32 inputs of 11008 are left over by 128: 86 groups of 128; every other matrix has 32 groups of them.
    assert dense.weight_bytes("bfloat16") - fourth.weight_bytes("bfloat16") == 3 * linear // 2 - 4 * linear // 128
    widest = 2 * 4096 * 11008
    plain, converting, packed = (
        memory.predict(one, "static", "bfloat16", 1, 12, 128) - one.weight_bytes("bfloat16")
        for one in (dense, eighth, fourth)
    )
    assert (converting - plain, packed - plain) == (widest, 0)
    held = eighth.read_weight_bytes("bfloat16") - dense.read_weight_bytes("bfloat16")
    assert physics.moved_bytes(eighth, cell, 12) - physics.moved_bytes(dense, cell, 12) == held + 4 * linear
    compiled = msgspec.structs.replace(cell, runtime="compile")
    assert physics.moved_bytes(eighth, compiled, 12) - physics.moved_bytes(dense, compiled, 12) == held


# -- values -----------------------------------------------------------------------------------------------------------


def rounded_int8(matrix: torch.Tensor) -> torch.Tensor:
    """Each row to the nearest of 256 levels, the largest weight half a level outside."""
    step = matrix.abs().amax(1, keepdim=True) / 127.5
    return (matrix * (1 / step)).round().clamp(-128, 127) * step


def rounded_int4(matrix: torch.Tensor, group: int) -> torch.Tensor:
    """Each group of inputs to the nearest of 16 levels between its least and its largest weight."""
    parts = matrix.reshape(len(matrix), -1, group)
    low = parts.amin(-1, keepdim=True)
    step = (parts.amax(-1, keepdim=True) - low) / 15
    return (((parts - low) / step).round() * step + low).reshape(matrix.shape)


def with_rounded_weights(model, held: str):
    """The oracle: the same model in floats, its matrices rounded by the two functions above."""
    whole = held_as(surgery.shape_of(model), held)
    for name, group in quantisation.groups(whole).items():
        parameter = model.get_parameter(name)
        if group is not None:
            with torch.no_grad():
                parameter.copy_(rounded_int8(parameter) if held == "int8" else rounded_int4(parameter, group))
    return model


@pytest.mark.parametrize("held", HELD)
def test_logits_equal_those_of_a_model_with_rounded_weights(torchao, held: str) -> None:
    plain = surgery.build(UNEVEN, std=0.3, seed=3)
    before = logits(plain)
    quantised = logits(surgery.build(held_as(UNEVEN, held), std=0.3, seed=3))
    oracle = logits(with_rounded_weights(plain, held))
    moved = (oracle - before).abs().max()
    assert moved > 0.01, "rounding is seen"
    assert (quantised - oracle).abs().max() < 0.01 * moved


@pytest.mark.parametrize("held", HELD)
def test_levels_are_the_nearest(torchao, held: str) -> None:
    matrix = torch.randn(32, 256, generator=torch.Generator().manual_seed(0))
    linear = torch.nn.Linear(256, 32, bias=False)
    linear.weight = torch.nn.Parameter(quantisation._rounded(matrix, held, 128), requires_grad=False)
    with torch.inference_mode():
        back = linear(torch.eye(256)).T
    wanted = rounded_int8(matrix) if held == "int8" else rounded_int4(matrix, 128)
    off = (back - wanted).abs() > 1e-5
    assert off.float().mean() <= 32 / matrix.numel(), "but the largest of a row, which lies between two levels"
    assert (back - matrix).abs().max() <= (matrix.abs().amax() / 127.5 if held == "int8" else matrix.abs().amax() / 15)


def test_perplexity_of_the_reference_model(torchao) -> None:
    """8 bits cost it next to nothing, 4 bits a little."""
    from shortllama import pruning
    from shortllama.evaluation import perplexity

    dense, tokenizer = pruning.load(sources.locate("reference"), device="cpu")
    text = perplexity.prepare("self", tokenizer=tokenizer, dense=dense, limit=4)
    before = perplexity.measure(dense, text).nll
    cost = {}
    for held in HELD:
        model, _ = pruning.load(sources.locate_held(f"reference+{held}"), device="cpu")
        cost[held] = perplexity.measure(model, text).nll - before
    assert 0 < abs(cost["int8"]) < 0.005
    assert abs(cost["int8"]) < cost["int4"] < 0.2


def test_operations_of_a_step_are_counted(torchao) -> None:
    counts = {}
    for held in ("", *HELD):
        model = surgery.build(held_as(UNEVEN, held))
        with torch.inference_mode(), Counted() as counted:
            model(input_ids=torch.tensor([[3]]))
        counts[held] = counted.by_name
    groups = quantisation.groups(held_as(UNEVEN, "int4"))
    four = sum(group is not None for group in groups.values())
    assert 0 < four < len(groups)
    assert counts["int4"]["_weight_int4pack_mm_for_cpu"] == four
    assert counts["int8"]["_to_copy"] - counts[""].get("_to_copy", 0) == len(groups)


# -- names ------------------------------------------------------------------------------------------------------------


def test_a_suffix_names_the_same_model_with_quantised_weights() -> None:
    plain, held = subjects.resolve("reference/ppl:0.25"), subjects.resolve("reference/ppl:0.25+int8")
    assert held == msgspec.structs.replace(plain, name=held.name, shape=held_as(plain.shape, "int8"))
    assert subjects.resolve("llama-7b/wanda-sp-20~64+int4").shape.quantised == "int4"
    assert sources.split("reference/taylor+:0.25") == ("reference/taylor+:0.25", "")


def test_a_folder_may_be_called_like_it(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine+int8").mkdir()
    assert sources.split("mine+int8") == ("mine+int8", "")


def test_only_evaluation_and_measurement_take_quantised_models() -> None:
    with pytest.raises(InputError, match=r"only evaluated and measured \(eval, sweep\); give reference$"):
        sources.locate("reference+int8")


def test_what_stays_wide_is_told() -> None:
    assert quantisation.remark(held_as(UNEVEN, "int8"), "m") is None
    told = quantisation.remark(held_as(UNEVEN, "int4"), "m+int4")
    assert told is not None
    assert told.startswith("m+int4: 4 of 21 matrices are not quantised")


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_without_torchao_the_extra_is_named(monkeypatch) -> None:
    monkeypatch.setattr(quantisation.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"pip install 'shortllama\[quant\]'"):
        surgery.build(held_as(UNEVEN, "int8"))


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_a_dtype_that_int8_products_would_leave_is_refused(dtype: str) -> None:
    with pytest.raises(UnsupportedError, match=f"not in {dtype}"):
        held_as(UNEVEN, "int8").weight_bytes(dtype)


def test_missing_kernels_are_one_line(torchao, monkeypatch) -> None:
    def missing(*_):
        raise NotImplementedError("no kernel\nfor this device")

    monkeypatch.setattr(quantisation, "_rounded", missing)
    with pytest.raises(UnsupportedError, match=r"int4 weights cannot be computed with in float32 on cpu here") as told:
        surgery.build(held_as(UNEVEN, "int4"))
    assert "\n" not in str(told.value)


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(InputError, match="int2"):
        held_as(UNEVEN, "int2")


# -- the commands -----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, tiny_shape):
    stock_model(CASES["llama"]).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_a_sweep_measures_quantised_subjects(torchao, folder, run_command, tmp_path) -> None:
    suite = tmp_path / "suite.toml"
    names = [f"{folder}", f"{folder}+int8", f"{folder}/random:0.25+int4"]
    suite.write_text(
        f'schema = "shortllama.suite/1"\nsubjects = {json.dumps(names)}\nruntimes = ["eager", "paper"]\n'
        'dtypes = ["float32"]\nbatch = [1]\nprompt = [4]\noutput = [3]\ncell_seconds = 0.2\n'
    )
    result = run_command("sweep", suite, "--device", "cpu", "--out", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "measurements.jsonl").read_text().splitlines()]
    found = {(row["cell"]["subject"], row["cell"]["runtime"]): row for row in rows if row["kind"] == "measurement"}
    assert {row["outcome"] for row in found.values()} == {"ok"}
    dense, held = found[names[0], "eager"]["bounds"], found[names[1], "eager"]["bounds"]
    assert held["decode_bytes"] < dense["decode_bytes"]
    assert held["ops_per_token"]["_to_copy"] > dense["ops_per_token"].get("_to_copy", 0)


def test_the_dtype_of_a_suite_must_be_wide(run_command, tmp_path) -> None:
    suite = tmp_path / "suite.toml"
    suite.write_text('schema = "shortllama.suite/1"\nsubjects = ["llama-7b+int8"]\n')
    result = run_command("sweep", suite, "--device", "rtx3090", "--runtime", "roofline", "--dry-run")
    assert result.returncode == 2
    assert "int8 weights are computed with in float32 or bfloat16, not in float16" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_the_other_verbs_say_what_to_give(run_command) -> None:
    result = run_command("score", "reference+int8", "--criterion", "mag", "--out", "never.json")
    assert (result.returncode, "give reference" in result.stderr) == (2, True)


def test_a_session_loads_a_quantised_subject(torchao, folder) -> None:
    subject = subjects.resolve(f"{folder}+int8")
    model, _ = loading.load(subject, Options("float32", "sdpa", "cpu", 0, 1))
    assert quantisation.held_bytes(model) == subject.shape.weight_bytes("float32")
    assert families.adapter(model).blocks[0].mlp.down_proj.weight.qdata.dtype == torch.int8
    assert logits(model, IDS).isfinite().all()


def test_an_evaluation_is_kept_under_the_name_given_on_text_of_the_float_model(torchao, folder, tmp_path) -> None:
    from shortllama import pruning
    from shortllama.evaluation import named

    held, plain = (sources.locate_held(f"{folder}{suffix}") for suffix in ("+int8", ""))
    wanted = named.Wanted(texts=("self@window=16",), limit=2, device="cpu")
    ours = named.evaluate(held, wanted).subjects
    theirs = named.evaluate(plain, wanted).subjects
    assert (list(ours), list(theirs)) == (["tiny+int8"], ["tiny"])
    one, other = (found.perplexity["self@window=16"] for found in (ours["tiny+int8"], theirs["tiny"]))
    assert one.digest == other.digest
    assert one.nll != other.nll
    assert pruning.base_name(sources.locate_held("reference+int4")) == "reference+int4"
