"""Perplexity: equal to a sum by hand, whatever the batches; the protocol beside the number; golden values."""

from __future__ import annotations

import copy
import json
import math

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shortllama import calibration, surgery
from shortllama.errors import InputError
from shortllama.evaluation import perplexity
from shortllama.evaluation.perplexity import evaluate
from shortllama.evaluation.results import Evaluation, Perplexity, Quality, read_evaluation, write_evaluation
from tests.test_calibration import Letters


@pytest.fixture(scope="module")
def model():
    from shortllama.shape import ModelShape

    shape = ModelShape.uniform(vocabulary=97, hidden=32, head_dim=8, blocks=2, query_heads=4, kv_heads=2, neurons=48)
    return surgery.build(shape, dtype="float64", std=0.3, seed=3)


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("".join(chr(33 + (i * i) % 89) for i in range(70)))
    return path


def ids_of(path) -> list[int]:
    return Letters()(path.read_text(), add_special_tokens=False, verbose=False)["input_ids"]


def nll_of(model, ids: list[int], first: int = 1) -> list[float]:
    """The NLL of each token from index `first` on, by hand."""
    with torch.no_grad():
        logs = torch.log_softmax(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double(), dim=-1)
    return [-logs[i - 1, ids[i]].item() for i in range(first, len(ids))]


# -- by hand ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [None, 1, 3])
def test_the_paper_s_protocol_equals_a_sum_by_hand(model, book, batch):
    stream = [0, *ids_of(book)]
    result = evaluate(model, Letters(), str(book), window=16, batch=batch)
    parts = [nll for start in (0, 16, 32, 48) for nll in nll_of(model, stream[start : start + 16])]
    assert result.tokens == len(parts) == 60
    assert result.nll == pytest.approx(sum(parts) / 60, rel=1e-12)
    assert result.perplexity == pytest.approx(math.exp(sum(parts) / 60), rel=1e-12)
    assert (result.sequences, result.window, result.stride) == (4, 16, 16)
    assert (result.bos, result.layout, result.split) == ("stream", "stream", None)
    assert result.protocol == "window 16, stride 16, BOS stream, stream, 60 tokens"


def test_a_bos_before_every_window_predicts_its_first_token_too(model, book):
    stream = ids_of(book)
    result = evaluate(model, Letters(), str(book), window=16, bos="window")
    parts = [nll for start in (0, 16, 32, 48) for nll in nll_of(model, [0, *stream[start : start + 16]])]
    assert result.tokens == len(parts) == 64
    assert result.nll == pytest.approx(np.mean(parts), rel=1e-12)


@pytest.mark.parametrize("bos", ["none", "window"])
def test_a_stride_predicts_each_token_once_with_more_context(model, book, bos):
    stream = ids_of(book)
    result = evaluate(model, Letters(), str(book), window=16, stride=6, bos=bos)
    prefix = [0] if bos == "window" else []
    parts: list[float] = []
    for start in range(0, 70 - 16 + 1, 6):
        whole = [*prefix, *stream[start : start + 16]]
        parts += nll_of(model, whole, 1 if start == 0 else len(whole) - 6)
    assert result.tokens == len(parts) == 16 + 9 * 6 - (bos == "none")
    assert result.nll == pytest.approx(np.mean(parts), rel=1e-12)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_documents_are_evaluated_one_by_one_and_padding_does_not_count(model, tmp_path, batch):
    path = tmp_path / "d.jsonl"
    documents = ["short", "a document that is longer than the window", "x", "another one"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    result = evaluate(model, Letters(), str(path), window=12, layout="documents", batch=batch)
    parts: list[float] = []
    for text in documents:
        ids = [0, *Letters()(text, add_special_tokens=False, verbose=False)["input_ids"]][:12]
        parts += nll_of(model, ids)
    assert result.tokens == len(parts)
    assert result.nll == pytest.approx(np.mean(parts), rel=1e-12)
    assert (result.layout, result.sequences) == ("documents", 4)
    bare = evaluate(model, Letters(), str(path), window=12, layout="documents", bos="none")
    assert bare.sequences == 3, "a document of one token predicts nothing"
    limited = evaluate(model, Letters(), str(path), window=12, layout="documents", limit=2)
    assert limited.sequences == 2
    assert limited.nll == pytest.approx(np.mean(parts[: 5 + 11]), rel=1e-12)


def test_documents_are_joined_by_a_blank_line(model, tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('"first part"\n"second part"\n')
    joined = tmp_path / "joined.txt"
    joined.write_text("first part\n\nsecond part")
    assert evaluate(model, Letters(), str(path), window=8) == evaluate(model, Letters(), str(joined), window=8)


def test_ids_are_taken_as_they_are(model, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("[1, 2, 3, 4]\n[5, 6]\n")
    result = evaluate(model, None, f"ids:{path}")
    assert result.nll == pytest.approx(np.mean(nll_of(model, [1, 2, 3, 4]) + nll_of(model, [5, 6])), rel=1e-12)
    assert (result.window, result.stride, result.bos, result.tokens) == (None, None, "given", 4)
    assert result.protocol == "whole sequences as given, 2 sequences, 4 tokens"
    assert result.digest == calibration.digest([np.array([1, 2, 3, 4]), np.array([5, 6])])


def test_self_text_reads_as_a_divergence_from_the_dense_model(model):
    """Cross-entropy on a model's own text is least for the model itself, up to the sampling noise."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    tokenizer = Letters()
    text = perplexity.prepare("self", tokenizer=tokenizer, dense=model, window=32, limit=48)
    dense, changed = perplexity.measure(model, text), perplexity.measure(other, text)
    assert dense.digest == changed.digest
    assert dense.nll < changed.nll
    assert evaluate(other, tokenizer, "self", window=32, limit=48, dense=model) == changed
    assert dense.sequences == 48


@given(st.integers(2, 60), st.integers(2, 20), st.data())
def test_windows_predict_each_token_at_most_once_and_none_in_the_covered_range_is_lost(size, window, data):
    stride = data.draw(st.integers(1, window))
    predicted: list[int] = []
    for one in perplexity.cut(np.arange(size), window, stride):
        assert len(one.ids) == window
        predicted += one.ids[one.first :].tolist()
    assert len(set(predicted)) == len(predicted)
    covered = (size - window) // stride * stride + window if size >= window else 0
    firsts = set(range(0, covered, window)) if stride == window else {0}
    assert set(predicted) == set(range(covered)) - firsts


def test_progress_and_mode(model, book):
    calls: list[tuple[int, int]] = []
    model.train()
    try:
        evaluate(
            model, Letters(), str(book), window=16, batch=3, progress=lambda done, total: calls.append((done, total))
        )
        assert model.training
    finally:
        model.eval()
    assert calls == [(3, 4), (4, 4)]


# -- bad input --------------------------------------------------------------------------------------------------------


def test_bad_protocols_and_sources_are_named_in_one_line(model, book, tmp_path):
    (tmp_path / "high.jsonl").write_text("[1, 97]\n")
    no_bos = Letters()
    no_bos.bos_token_id = None
    cases = [
        (dict(window=1), "window of 1 tokens"),
        (dict(window=8, stride=9), "stride 9 with window 8"),
        (dict(window=8, stride=0), "stride 0 with window 8"),
        (dict(window=8, stride=4, layout="documents"), "leave the stride out"),
        (dict(limit=0), "limit of 0 windows"),
        (dict(window=500), "71 tokens give no window of 500"),
        (dict(src=f"ids:{tmp_path}/high.jsonl"), "high.jsonl: sequence 1 holds token id 97"),
        (dict(tokenizer=None), "without a tokenizer"),
        (dict(tokenizer=no_bos, bos="window"), "has no BOS token; use 'none'"),
        (dict(src="gone.txt"), "no such file"),
    ]
    for arguments, expected in cases:
        given_ = {"tokenizer": Letters(), "src": str(book), **arguments}
        with pytest.raises(InputError) as error:
            evaluate(model, given_.pop("tokenizer"), given_.pop("src"), **given_)
        assert expected in str(error.value), arguments
        assert "\n" not in str(error.value)
    assert evaluate(model, no_bos, str(book), window=16).bos == "none"


def test_a_broken_model_has_no_perplexity(model, book):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.norm.weight[0] = float("nan")
    with pytest.raises(InputError, match=r"book\.txt: the mean NLL is nan"):
        evaluate(broken, Letters(), str(book), window=16)


# -- the file ---------------------------------------------------------------------------------------------------------


def test_results_are_read_back_as_written(model, book, tmp_path):
    result = evaluate(model, Letters(), str(book), window=16)
    whole = Evaluation({"dense": Quality({"book.txt": result}), "unevaluated": Quality()})
    path = tmp_path / "quality.json"
    write_evaluation(path, whole)
    assert read_evaluation(path) == whole
    assert json.loads(path.read_bytes())["schema"] == "shortllama.eval/1"
    path.write_text(path.read_text().replace('"stride"', '"strid"'))
    with pytest.raises(InputError, match="unknown key"):
        read_evaluation(path)


def test_an_infinite_perplexity_is_not_written_as_null(tmp_path):
    bad = Perplexity(math.inf, 800.0, 1, 1, 128, 128, "none", "stream", "0")
    with pytest.raises(InputError, match="perplexity of dense on c4 is inf"):
        write_evaluation(tmp_path / "q.json", Evaluation({"dense": Quality({"c4": bad})}))
    assert list(tmp_path.iterdir()) == []


def test_a_huge_nll_stays_a_number(model):
    text = perplexity.prepare("self", tokenizer=Letters(), dense=model, window=4, limit=2)
    huge = copy.deepcopy(model)
    with torch.no_grad():
        huge.lm_head.weight.mul_(1e6)
    result = perplexity.measure(huge, text)
    assert result.nll > 700
    assert math.isfinite(result.perplexity)
    assert msgspec.json.encode(result)


# -- golden -----------------------------------------------------------------------------------------------------------


@pytest.mark.data
def test_stories260k_has_the_published_perplexities(stories, data_dir):
    """60 stories, each cut at 512 tokens, mean over all predicted tokens: the values of the test data's README."""
    from shortllama import checkpoint

    model, tokenizer = checkpoint.load(stories)
    src = str(data_dir / "tinystories" / "tinystories_sample.txt")

    protocol = {"tokenizer": tokenizer, "window": 512, "layout": "documents", "limit": 60}
    bare = perplexity.prepare(src, bos="none", **protocol)
    assert perplexity.measure(model, bare).perplexity == pytest.approx(3.68, abs=0.006)
    text = perplexity.prepare(src, bos="stream", **protocol)
    assert perplexity.measure(model, text).perplexity == pytest.approx(3.65, abs=0.005)
    for gone, expected in enumerate((121, 13.5, 7.9, 9.2, 10.1)):
        pruned = copy.deepcopy(model)
        del pruned.model.layers[gone]
        assert perplexity.measure(pruned, text).perplexity == pytest.approx(expected, rel=0.01)
