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
from gguf_model import Gguf
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import plan_of, shapes
from transformers import AutoModelForCausalLM

from shortllama import checkpoint, configs, console, display, exporting, layout, sources, surgery, verification
from shortllama.cli import app
from shortllama.errors import InputError, UnsupportedError
from shortllama.exporting import llamacpp, padding, vocabulary
from shortllama.plans import BlockKeep
from shortllama.shape import BlockShape, ModelShape

IDS = [1, 30, 22, 5, 17, 8, 41, 3]
SPACE = "\u2581"


def shape_like(*blocks: tuple[int, int, int], **changes: Any) -> ModelShape:
    """Blocks of (query heads, KV heads, neurons) at hidden 64, heads of 8."""
    fields = {"family": "llama", "vocabulary": 300, "hidden": 64, "head_dim": 8, "tied": False}
    return ModelShape(**{**fields, **changes}, blocks=tuple(BlockShape(*block) for block in blocks))


def tokenizer_files(folder: Path, *words: str) -> None:
    """A byte-fallback BPE tokenizer as converted from SentencePiece: every way to split a token is a merge."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), SPACE, *"adehinot"]
    merges: list[list[str]] = []
    for word in words or (f"{SPACE}t", "he", f"{SPACE}the", "in", "on", f"{SPACE}on"):
        tokens.append(word)
        merges += [[word[:i], word[i:]] for i in range(1, len(word)) if word[:i] in tokens and word[i:] in tokens]
    special = [{"id": i, "content": tokens[i], "special": True} for i in range(3)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{**one, **flags} for one in special],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": SPACE},
                {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "ByteFallback"},
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": merges,
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(document))
    config = {"tokenizer_class": "TokenizersBackend", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def written(folder: Path, shape: ModelShape, dtype: str = "float64", **config: Any) -> torch.nn.Module:
    """Write a model of `shape` with random weights to `folder`; returns it."""
    model = surgery.build(shape, dtype=dtype, std=0.15)
    for name, value in config.items():
        setattr(model.config, name, value)
    keep = tuple(BlockKeep(i) for i in range(len(shape.blocks)))
    checkpoint.save(model, plan_of(shape, keep), folder)
    tokenizer_files(folder)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([IDS])).logits[0]


# -- padded -----------------------------------------------------------------------------------------------------------

QWEN3 = {"family": "qwen3", "qk_norm": True}
QWEN2 = {"family": "qwen2", "biases": ("q", "k", "v")}
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

GGUF = {
    "uniform": (shape_like((8, 4, 96), (8, 4, 96)), "llama", "float32", {}),
    "uniform, odd heads": (shape_like((6, 3, 96), (6, 3, 96), tied=True), "llama", "float16", {}),
    "widths": (shape_like((8, 4, 96), (4, 2, 40), (6, 3, 17), tied=True), "deci", "float32", {}),
    "queries": (shape_like((6, 2, 96), (6, 2, 96)), "llama", "float32", {}),
    "queries of each block": (shape_like((8, 2, 96), (4, 2, 40), (6, 1, 17)), "deci", "float32", {}),
    "first without attention": (shape_like((0, 0, 40), (6, 3, 17), (0, 0, 8)), "deci", "float32", {}),
    "without FFN": (shape_like((8, 4, 40), (6, 3, 0), (4, 2, 0)), "deci", "bfloat16", {}),
    "empty blocks": (shape_like((0, 0, 0), (6, 3, 9), (0, 0, 0), (4, 2, 6)), "deci", "float32", {}),
    "compensated": (shape_like((8, 4, 96), (4, 2, 40), biases=("o", "down")), "deci", "float32", {}),
    "biases": (shape_like((8, 4, 9), (8, 2, 9), biases=("q", "k", "v")), "deci", "float32", {}),
    "qwen2": (shape_like((8, 4, 9), (8, 4, 9), **QWEN2), "llama", "float32", {}),
    "linear": (
        shape_like((8, 4, 96)),
        "llama",
        "float32",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}},
    ),
    "llama3": (
        shape_like((8, 4, 96), (4, 2, 96)),
        "deci",
        "float32",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
}


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


TEXTS = [
    "the tin on the tot",
    "  two  spaces ",
    "a\nline",
    "caf\u00e9 \U0001f642",
    "",
    "tttthehehe on in the",
    "<s> </s>",
]


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
    for text in TEXTS[:-1]:
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
    "byte-level": (lambda folder: _tokenizer(folder, model={"byte_fallback": False}), "byte-level BPE"),
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
        (shape_like((8, 4, 9), **QWEN3), {}, "qwen3"),
        (shape_like((6, 3, 9), **QWEN2), {}, "query bias of the hidden size 64; 6 heads"),
        (shape_like((8, 4, 9), family="mistral"), {"sliding_window": 16}, "sliding window"),
    ],
)
def test_models_that_llama_cpp_computes_otherwise_are_refused(shape: ModelShape, config: dict[str, Any], says: str):
    with pytest.raises(UnsupportedError, match=says):
        llamacpp.refuse(shape, {**configs.config_of(shape), **config})


def test_float64_weights_have_no_place_in_a_gguf_file(tmp_path: Path):
    written(tmp_path / "own", shape_like((8, 4, 9)), "float64")
    with pytest.raises(UnsupportedError, match="float64"):
        exporting.export(tmp_path / "own", "gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()
