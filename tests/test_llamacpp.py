"""Exported files in llama.cpp itself, where the extra `llamacpp` is installed: the same tokens as transformers.

Its KV cache is float32 here (float16 by default), so that both compute alike; weights are float32, because llama.cpp
rounds activations to the type of 16-bit weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_cases import GGUF, IDS, SPLITS, TEXTS, byte_level_files, shape_like, written
from strategies import plan_of

from shortllama import checkpoint, exporting, sources
from shortllama.plans import BlockKeep

llama_cpp = pytest.importorskip("llama_cpp", reason="llama.cpp runs where shortllama[llamacpp] is installed")

F32 = 0
STEPS = 24


def llama(folder: Path, **options: Any) -> Any:
    kinds = {"type_k": F32, "type_v": F32, "flash_attn": False, "n_threads": 1, "n_threads_batch": 1}
    exporting.export(folder, "gguf", folder.with_name("gguf"))
    path = str(folder.with_name("gguf") / "model.gguf")
    return llama_cpp.Llama(path, n_ctx=256, logits_all=True, verbose=False, **kinds, **options)


def greedy(model: Any, ids: list[int]) -> tuple[np.ndarray, list[int]]:
    """The logits (T, V) of the ids, and the tokens that llama.cpp goes on with."""
    model.reset()
    model.eval(ids)
    logits, tokens = np.array(model.scores[: len(ids)]), []
    for _ in range(STEPS):
        tokens.append(int(model.scores[model.n_tokens - 1].argmax()))
        model.eval(tokens[-1:])
    return logits, tokens


def expected(model: Any, ids: list[int]) -> tuple[np.ndarray, list[int]]:
    """The same of transformers, without a cache."""
    tokens = list(ids)
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0].numpy()
        for _ in range(STEPS):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return logits, tokens[len(ids) :]


def assert_same(folder: Path, ids: list[int]) -> None:
    own, _ = checkpoint.load(folder, dtype="float32")
    logits, tokens = expected(own, ids)
    theirs, continued = greedy(llama(folder), ids)
    assert np.abs(theirs - logits).max() < 1e-5 * np.abs(logits).max()
    assert continued == tokens
    assert len(set(tokens)) > 3, "a model that repeats one token shows nothing"


@pytest.mark.parametrize("name", GGUF)
def test_llama_cpp_goes_on_with_the_same_tokens(tmp_path: Path, name: str):
    shape, _, _, config = GGUF[name]
    written(tmp_path / "own", shape, "float32", **config)
    assert_same(tmp_path / "own", IDS)


def test_a_depth_pruned_checkpoint(tmp_path: Path):
    written(tmp_path / "dense", shape_like(*[(8, 4, 96)] * 4), "float32")
    plan = plan_of(sources.from_folder("dense", tmp_path / "dense").shape, (BlockKeep(0), BlockKeep(2), BlockKeep(3)))
    checkpoint.write(tmp_path / "dense", plan, tmp_path / "pruned")
    assert_same(tmp_path / "pruned", IDS)


@pytest.mark.parametrize("split", SPLITS)
def test_llama_cpp_splits_texts_like_the_tokenizer(tmp_path: Path, split: str):
    from tokenizers import Tokenizer

    written(tmp_path / "own", shape_like((8, 4, 9), vocabulary=420), "float32")
    byte_level_files(tmp_path / "own", split)
    model = llama(tmp_path / "own", vocab_only=True)
    original = Tokenizer.from_file(str(tmp_path / "own" / "tokenizer.json"))
    for text in [*TEXTS, "a<eos>b <tool>c"]:
        assert model.tokenize(text.encode(), special=True) == original.encode(text).ids, text


def test_real_weights_with_their_tokenizer(stories: Path, tmp_path: Path):
    keep = (BlockKeep(0), BlockKeep(1, "0,1"), BlockKeep(3, None, "0-99"))
    plan = plan_of(sources.from_folder("m", stories).shape, keep)
    checkpoint.write(stories, plan, tmp_path / "own")
    _, tokenizer = checkpoint.load(tmp_path / "own")
    ids = tokenizer("Once upon a time, there was")["input_ids"]
    assert llama(tmp_path / "own", vocab_only=True).tokenize(b"Once upon a time, there was") == ids
    assert json.loads((tmp_path / "gguf" / "export.json").read_text())["architecture"] == "deci"
    assert_same(tmp_path / "own", ids)
