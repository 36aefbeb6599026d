"""Exports: a padded folder computes the same in stock transformers, a GGUF file the same by llama.cpp's own rules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import msgspec
import numpy as np
import pytest
import torch
from gguf_cases import GGUF, IDS, QWEN2, QWEN3, SPLITS, TEXTS, byte_level_files, shape_like, written
from gguf_model import Gguf
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import shapes
from transformers import AutoModelForCausalLM

from shortllama import checkpoint, configs, console, display, exporting, layout, sources, surgery, verification
from shortllama.cli import app
from shortllama.errors import InputError, UnsupportedError
from shortllama.exporting import bytelevel, llamacpp, padding, vocabulary
from shortllama.shape import BlockShape, ModelShape


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([IDS])).logits[0]


# -- padded -----------------------------------------------------------------------------------------------------------

PADDED = {
    "groups and neurons": (shape_like((8, 4, 96), (4, 2, 40), (6, 3, 17)), "llama"),
    "heads that llama refuses": (shape_like((6, 3, 96), (4, 2, 40)), "mistral"),
    "queries a group": (shape_like((8, 2, 32), (2, 2, 32), (4, 4, 16)), "llama"),
    "removed modules": (shape_like((0, 0, 30), (8, 4, 0), (4, 2, 20), tied=True), "llama"),
    "compensated": (shape_like((8, 4, 96), (4, 2, 40), biases=("o", "down")), "llama"),
    "compensated, odd heads": (shape_like((6, 3, 96), (4, 2, 40), biases=("o", "down")), "seed_oss"),
    "all biases": (shape_like((4, 4, 9), (0, 0, 8), biases=("q", "k", "v", "o", "gate", "up", "down")), "llama"),
    "mistral": (shape_like((6, 3, 96), (4, 2, 40), family="mistral"), "mistral"),
    "qwen2": (shape_like((6, 3, 96), (0, 0, 40), **QWEN2), "qwen2"),
    "qwen2 compensated": (
        shape_like((6, 3, 9), (2, 1, 4), family="qwen2", biases=("q", "k", "v", "o", "down")),
        "seed_oss",
    ),
    "qwen3": (shape_like((6, 3, 96), (0, 0, 40), (4, 2, 0), **QWEN3), "qwen3"),
}


@pytest.mark.parametrize("name", PADDED)
def test_a_padded_folder_computes_the_same_in_stock_transformers(tmp_path: Path, name: str):
    shape, model_type = PADDED[name]
    own = written(tmp_path / "own", shape)
    record = exporting.export(tmp_path / "own", "padded", tmp_path / "out")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64)
    assert stock.config.model_type == record.architecture == model_type
    assert (logits(stock) - logits(own)).abs().max() < 1e-6 * logits(own).abs().max()
    assert record.parameters == sum(parameter.numel() for parameter in stock.parameters())
    assert record.source_parameters == sum(parameter.numel() for parameter in own.parameters())
    assert record.overhead == record.parameters / record.source_parameters - 1 > 0
    # Our own loader runs the same family's class as for the dense model.
    again, _ = checkpoint.load(tmp_path / "out")
    assert type(again) is type(own)
    assert surgery.shape_of(again) == sources.from_folder("m", tmp_path / "out").shape
    assert (logits(again) - logits(own)).abs().max() < 1e-6 * logits(own).abs().max()


@settings(max_examples=60)
@given(shapes(max_blocks=4), st.data())
def test_padding_holds_every_value_once_and_is_the_smallest_uniform_shape(shape: ModelShape, data: st.DataObject):
    gone = data.draw(st.sets(st.integers(0, len(shape.blocks) - 1)))
    blocks = tuple(BlockShape(0, 0, b.neurons) if i in gone else b for i, b in enumerate(shape.blocks))
    shape = msgspec.structs.replace(shape, blocks=blocks)
    after, _ = padding.uniform(shape, configs.config_of(shape))
    assert after.is_uniform
    assert after.blocks[0].neurons == max(block.neurons for block in blocks)
    assert after.blocks[0].kv_heads == max(1, *(block.kv_heads for block in blocks), 0)
    placed = padding.placements(shape, after)
    assert {name: one.dimensions for name, one in placed.items()} == layout.tensors(after)
    assert {one.source for one in placed.values()} - {None} == set(layout.tensors(shape))
    for one in placed.values():
        if one.source is None:
            continue
        held = layout.tensors(shape)[one.source]
        for axis, (kept, size) in enumerate(zip((one.rows, one.columns), held, strict=False)):
            assert kept is None or len(set(kept)) == size, axis
            assert kept is None or max(kept, default=-1) < one.dimensions[axis]


def test_a_dense_folder_pads_to_itself(tmp_path: Path):
    own = written(tmp_path / "own", shape_like((8, 4, 96), (8, 4, 96)), "bfloat16")
    record = exporting.export(tmp_path / "own", "padded", tmp_path / "out")
    assert (record.overhead, record.dtype) == (0, "bfloat16")
    assert torch.equal(logits(checkpoint.load(tmp_path / "out")[0]), logits(own))


def test_verification_sees_that_a_padded_folder_is_not_what_it_was_made_from(tmp_path: Path):
    for name, neurons in (("own", 40), ("other", 39)):
        written(tmp_path / name, shape_like((6, 3, 96), (4, 2, neurons)))
        exporting.export(tmp_path / name, "padded", tmp_path / f"{name} padded")
    (tmp_path / "other padded" / "model.safetensors").replace(tmp_path / "own padded" / "model.safetensors")
    checks = verification.verify_padded(tmp_path / "own padded", tmp_path / "own").checks
    assert {check.name for check in checks if not check.passed} == {"files", "the folder it was made from"}


def test_the_command_exports_verifies_and_reports_the_overhead(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    shape = shape_like((6, 3, 96), (4, 2, 40))
    written(tmp_path / "own", shape, "float32")
    own, out = str(tmp_path / "own"), str(tmp_path / "out")
    assert console.run(app, ["export", own, "--to", "padded", "--out", out, "--json"]) == 0
    document = json.loads(capfd.readouterr().out)
    assert document["export"]["source_parameters"] == shape.parameters
    checks = {check["name"]: check["passed"] for check in document["verification"]["checks"]}
    assert {"stock transformers in a fresh process", "the folder it was made from"} <= checks.keys()
    assert all(checks.values())
    record = msgspec.convert(document["export"], exporting.Export)
    display.show_export(out, record)
    assert f"{100 * (record.parameters / shape.parameters - 1):+.2f} %" in capfd.readouterr().out
    assert console.run(app, ["export", own, "--to", "gguf", "--out", str(tmp_path / "file")]) == 0
    assert "llama.cpp as deci" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["own", "--to", "padding", "--out", "out"], ["padding", "did you mean 'padded'"]),
        (["own", "--to", "onnx", "--out", "out"], ["onnx", "padded, gguf"]),
        (["own", "--to", "padded", "--out", "own"], ["own", "export.json"]),
        (["llama-7b", "--to", "gguf", "--out", "out"], ["llama-7b", "without weights"]),
    ],
)
def test_what_cannot_be_exported_is_refused_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    arguments: list[str],
    says: list[str],
):
    written(tmp_path / "own", shape_like((4, 2, 8)), "float32")
    monkeypatch.chdir(tmp_path)
    assert console.run(app, ["export", *arguments]) == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert all(part in line for part in says), line
    assert not (tmp_path / "out").exists()


# -- gguf -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GGUF)
def test_a_gguf_file_read_by_the_rules_of_llama_cpp_computes_the_same(tmp_path: Path, name: str):
    shape, architecture, dtype, config = GGUF[name]
    written(tmp_path / "own", shape, dtype, **config)
    record = exporting.export(tmp_path / "own", "gguf", tmp_path / "out")
    read = Gguf(tmp_path / "out" / "model.gguf")
    assert read.architecture == record.architecture == architecture
    own, _ = checkpoint.load(tmp_path / "own", dtype="float64")
    expected = logits(own).numpy()
    assert np.abs(read.logits(IDS) - expected).max() < 1e-6 * np.abs(expected).max()
    assert read.value(f"{architecture}.attention.key_length") == shape.head_dim
    assert read.value(f"{architecture}.attention.value_length") == shape.head_dim
    assert ("output.weight" in read.tensors) == (not shape.tied)
    counted = sum(tensor.size for name, tensor in read.tensors.items() if name != "rope_freqs.weight")
    assert counted == record.parameters


def test_a_gguf_file_holds_the_weights_bit_for_bit(tmp_path: Path):
    written(tmp_path / "own", shape_like((8, 4, 96), (8, 4, 96)), "float16")
    exporting.export(tmp_path / "own", "gguf", tmp_path / "out")
    own, _ = checkpoint.load(tmp_path / "own")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    block = own.model.layers[1]
    for name, module in (
        ("attn_v", block.self_attn.v_proj),
        ("attn_output", block.self_attn.o_proj),
        ("ffn_down", block.mlp.down_proj),
    ):
        assert tensors[f"blk.1.{name}.weight"].data.dtype == np.float16
        assert np.array_equal(tensors[f"blk.1.{name}.weight"].data, module.weight.detach().numpy())
    norm = tensors["blk.1.ffn_norm.weight"]
    assert norm.data.dtype == np.float32
    # Halves of a head interleaved, as llama.cpp's own converter does it.
    q = block.self_attn.q_proj.weight.detach().numpy()
    expected = q.reshape(8, 2, 4, 64).swapaxes(1, 2).reshape(64, 64)
    assert np.array_equal(tensors["blk.1.attn_q.weight"].data, expected)
    assert not np.array_equal(expected, q)


@pytest.mark.parametrize("where", ["small", "stories"])
def test_the_vocabulary_tokenizes_like_the_tokenizer(tmp_path: Path, where: str, request: pytest.FixtureRequest):
    from tokenizers import Tokenizer

    if where == "small":
        written(tmp_path / "own", shape_like((8, 4, 9)), "float32")
        folder = tmp_path / "own"
    else:
        folder = request.getfixturevalue("stories")
    exporting.export(folder, "gguf", tmp_path / "out")
    read = Gguf(tmp_path / "out" / "model.gguf")
    original = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in TEXTS:
        assert read.encode(text) == (original.encode(text).ids if text else [1]), text
    assert read.value("tokenizer.ggml.bos_token_id") == 1
    assert read.value("tokenizer.ggml.eos_token_id") == 2
    types = read.value("tokenizer.ggml.token_type")
    assert types[:3] == [vocabulary.UNKNOWN, vocabulary.CONTROL, vocabulary.CONTROL]
    assert types.count(vocabulary.BYTE) == 256
    if where == "small":
        assert types[-1] == vocabulary.UNUSED  # more embeddings than tokens
    assert [int(kind) for kind in gguf.TokenType][:6] == [1, 2, 3, 4, 5, 6]


def test_token_types_are_those_of_the_library():
    for name in ("NORMAL", "UNKNOWN", "CONTROL", "USER_DEFINED", "UNUSED", "BYTE"):
        assert getattr(vocabulary, name) == getattr(gguf.TokenType, name)


def _tokenizer(folder: Path, **changes: Any) -> None:
    document = json.loads((folder / "tokenizer.json").read_text())
    for name, value in changes.items():
        document[name] = {**document[name], **value} if isinstance(document[name], dict) else value
    (folder / "tokenizer.json").write_text(json.dumps(document))


def _config(folder: Path, **changes: Any) -> None:
    document = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**document, **changes}))


ODD = {
    "byte-level": (lambda folder: _tokenizer(folder, model={"byte_fallback": False}), "splits text by None"),
    "unigram": (lambda folder: _tokenizer(folder, model={"type": "Unigram"}), "Unigram model"),
    "normalizer": (lambda folder: _tokenizer(folder, normalizer={"normalizers": [{"type": "NFKC"}]}), "NFKC"),
    "splitter": (lambda folder: _tokenizer(folder, pre_tokenizer={"type": "Digits"}), "Digits"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer.json"),
    "activation": (lambda folder: _config(folder, hidden_act="gelu"), "gelu"),
    "rotary": (lambda folder: _config(folder, rope_parameters={"rope_type": "yarn", "factor": 2.0}), "yarn"),
}


@pytest.mark.parametrize("name", ODD)
def test_what_a_gguf_file_cannot_hold_is_refused_in_one_line(tmp_path: Path, name: str):
    written(tmp_path / "own", shape_like((8, 4, 9)), "float32")
    spoil, says = ODD[name]
    spoil(tmp_path / "own")
    with pytest.raises(InputError, match=says) as caught:
        exporting.export(tmp_path / "own", "gguf", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("shape", "config", "says"),
    [
        (shape_like((8, 4, 9), family="gemma2"), {}, "a gemma2 model: llama.cpp rounds its activation"),
        (shape_like((8, 4, 9), **{**QWEN3, "biases": ("q", "k", "v", "o")}), {}, "qwen3 has no bias on o"),
        (shape_like((8, 4, 9), **QWEN3), {"rope_parameters": {"rope_type": "llama3"}}, "no rotary scaling 'llama3'"),
        (shape_like((8, 4, 9)), {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        (shape_like((6, 3, 9), family="phi3"), {}, "fill the hidden size 64, these have 48"),
        (shape_like((8, 4, 9), family="mistral"), {"sliding_window": 16}, "sliding window"),
    ],
)
def test_models_that_llama_cpp_computes_otherwise_are_refused(shape: ModelShape, config: dict[str, Any], says: str):
    with pytest.raises(UnsupportedError, match=says):
        llamacpp.refuse(shape, {**configs.config_of(shape), **config})


@pytest.mark.parametrize("shape", [shape_like((8, 4, 9), (8, 4, 8), **QWEN3), shape_like((8, 4, 0), **QWEN3)])
def test_architectures_with_one_size_for_all_blocks_say_so(shape: ModelShape):
    with pytest.raises(UnsupportedError, match="qwen3 has one size for all blocks; export --to padded first"):
        llamacpp.expressible(shape)


def test_a_padded_folder_goes_where_the_unpadded_cannot(tmp_path: Path):
    own = written(tmp_path / "own", shape_like((8, 4, 96), (4, 2, 40), **QWEN3), "float32")
    with pytest.raises(UnsupportedError, match="export --to padded first"):
        exporting.export(tmp_path / "own", "gguf", tmp_path / "out")
    exporting.export(tmp_path / "own", "padded", tmp_path / "padded")
    exporting.export(tmp_path / "padded", "gguf", tmp_path / "out")
    expected = logits(own).numpy()
    assert np.abs(Gguf(tmp_path / "out" / "model.gguf").logits(IDS) - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("split", SPLITS)
def test_a_byte_level_vocabulary_tokenizes_like_the_tokenizer(tmp_path: Path, split: str):
    from tokenizers import Tokenizer

    written(tmp_path / "own", shape_like((8, 4, 9), vocabulary=420), "float32")
    byte_level_files(tmp_path / "own", split)
    exporting.export(tmp_path / "own", "gguf", tmp_path / "out")
    read = Gguf(tmp_path / "out" / "model.gguf")
    original = Tokenizer.from_file(str(tmp_path / "own" / "tokenizer.json"))
    assert (read.value("tokenizer.ggml.model"), read.value("tokenizer.ggml.pre")) == ("gpt2", split)
    for text in TEXTS:
        assert read.encode(text) == original.encode(text).ids, text
    types = dict(zip(read.value("tokenizer.ggml.tokens"), read.value("tokenizer.ggml.token_type"), strict=True))
    kinds = {"<bos>": vocabulary.CONTROL, "<tool>": vocabulary.USER_DEFINED, "the": vocabulary.NORMAL}
    assert {token: types[token] for token in kinds} == kinds
    assert list(types.values())[-1] == vocabulary.UNUSED
    assert read.value("tokenizer.ggml.eos_token_id") == original.token_to_id("<eos>")


def test_the_alphabet_of_bytes_is_that_of_the_tokenizers():
    from tokenizers.pre_tokenizers import ByteLevel

    assert sorted(bytelevel.alphabet()) == sorted(ByteLevel.alphabet())
    signs = bytelevel.alphabet()
    encoded = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str("\u00e9 \n")[0][0]
    assert encoded == "".join(signs[byte] for byte in "\u00e9 \n".encode())


def _byte_level(change: Any) -> Any:
    def spoil(folder: Path) -> None:
        byte_level_files(folder, "qwen2", vocabulary=280)
        document = json.loads((folder / "tokenizer.json").read_text())
        change(document)
        (folder / "tokenizer.json").write_text(json.dumps(document))

    return spoil


def _split(document: Any) -> Any:
    return document["pre_tokenizer"]["pretokenizers"][0]


ODD_BYTE_LEVEL = {
    "rule": (
        lambda d: _split(d)["pattern"].update(Regex="[0-9]+"),
        r"splits text by '\[0-9\]\+'.*dbrx, gpt-2, llama-bpe",
    ),
    "behaviour": (lambda d: _split(d).update(behavior="Removed"), "splits text by Split"),
    "words taken whole": (lambda d: d["model"].update(ignore_merges=True), "splits text by"),
    "bytes only": (lambda d: d.update(pre_tokenizer={"type": "ByteLevel", "use_regex": False}), "space put in front"),
    "three steps": (lambda d: d["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "Digits"}), "Digits then Split"),
    "normalizer": (lambda d: d.update(normalizer={"type": "NFKC"}), "NFKC in front"),
    "dropout": (lambda d: d["model"].update(dropout=0.1), "dropout 0.1"),
    "a byte": (lambda d: d["model"]["vocab"].pop("!"), r"no token for byte 33 \(1 of 256"),
    "template": (
        lambda d: d["post_processor"]["processors"][1]["single"].insert(0, {"SpecialToken": {"id": "<eos>"}}),
        "puts <eos>, <bos> around a text",
    ),
    "post-processor": (lambda d: d.update(post_processor={"type": "RobertaProcessing"}), "ends with RobertaProcessing"),
}


@pytest.mark.parametrize("name", ODD_BYTE_LEVEL)
def test_byte_level_tokenizers_without_an_exact_rule_are_refused(tmp_path: Path, name: str):
    written(tmp_path / "own", shape_like((8, 4, 9)), "float32")
    change, says = ODD_BYTE_LEVEL[name]
    _byte_level(change)(tmp_path / "own")
    with pytest.raises(UnsupportedError, match=says) as caught:
        exporting.export(tmp_path / "own", "gguf", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_byte_level_tokenizer_needs_an_end_of_text(tmp_path: Path):
    written(tmp_path / "own", shape_like((8, 4, 9)), "float32")
    byte_level_files(tmp_path / "own", "llama-bpe", vocabulary=280)
    (tmp_path / "own" / "tokenizer_config.json").write_text('{"bos_token": "<bos>"}')
    with pytest.raises(UnsupportedError, match="names no eos_token"):
        exporting.export(tmp_path / "own", "gguf", tmp_path / "out")


def test_nfc_is_let_through_and_an_end_of_text_behind_is_written(tmp_path: Path):
    written(tmp_path / "own", shape_like((8, 4, 9)), "float32")

    def change(document: Any) -> None:
        document["normalizer"] = {"type": "NFC"}
        document["post_processor"]["processors"][1]["single"].append({"SpecialToken": {"id": "<eos>"}})

    _byte_level(change)(tmp_path / "own")
    exporting.export(tmp_path / "own", "gguf", tmp_path / "out")
    read = Gguf(tmp_path / "out" / "model.gguf")
    assert (read.value("tokenizer.ggml.add_bos_token"), read.value("tokenizer.ggml.add_eos_token")) == (True, True)


def test_float64_weights_have_no_place_in_a_gguf_file(tmp_path: Path):
    written(tmp_path / "own", shape_like((8, 4, 9)), "float64")
    with pytest.raises(UnsupportedError, match="float64"):
        exporting.export(tmp_path / "own", "gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()
