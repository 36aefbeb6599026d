"""Perplexity: equal to a sum by hand, whatever the batches; the protocol beside the number; golden values."""

from __future__ import annotations

import copy
import json
import math
import tracemalloc
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shortllama import calibration, pieces, surgery
from shortllama.errors import InputError
from shortllama.evaluation import perplexity, protocol, tokens
from shortllama.evaluation.perplexity import Beside, evaluate
from shortllama.evaluation.protocol import Protocol
from shortllama.evaluation.results import Evaluation, Perplexity, Quality, read_evaluation, write_evaluation
from shortllama.evaluation.windows import cut
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
    result = evaluate(model, Letters(), str(book), protocol=Protocol(window=16), batch=batch)
    parts = [nll for start in (0, 16, 32, 48) for nll in nll_of(model, stream[start : start + 16])]
    assert result.tokens == len(parts) == 60
    assert result.nll == pytest.approx(sum(parts) / 60, rel=1e-12)
    assert result.perplexity == pytest.approx(math.exp(sum(parts) / 60), rel=1e-12)
    assert (result.sequences, result.window, result.stride) == (4, 16, 16)
    assert (result.bos, result.layout, result.split) == ("stream", "stream", None)
    assert result.protocol == "window 16, stride 16, BOS stream, stream, 60 tokens"


def test_a_bos_before_every_window_predicts_its_first_token_too(model, book):
    stream = ids_of(book)
    result = evaluate(model, Letters(), str(book), protocol=Protocol(window=16, bos="window"))
    parts = [nll for start in (0, 16, 32, 48) for nll in nll_of(model, [0, *stream[start : start + 16]])]
    assert result.tokens == len(parts) == 64
    assert result.nll == pytest.approx(np.mean(parts), rel=1e-12)


@pytest.mark.parametrize("bos", ["none", "window"])
def test_a_stride_predicts_each_token_once_with_more_context(model, book, bos):
    stream = ids_of(book)
    result = evaluate(model, Letters(), str(book), protocol=Protocol(window=16, stride=6, bos=bos))
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
    result = evaluate(model, Letters(), str(path), protocol=Protocol(window=12, layout="documents"), batch=batch)
    parts: list[float] = []
    for text in documents:
        ids = [0, *Letters()(text, add_special_tokens=False, verbose=False)["input_ids"]][:12]
        parts += nll_of(model, ids)
    assert result.tokens == len(parts)
    assert result.nll == pytest.approx(np.mean(parts), rel=1e-12)
    assert (result.layout, result.sequences) == ("documents", 4)
    bare = evaluate(model, Letters(), str(path), protocol=Protocol(window=12, layout="documents", bos="none"))
    assert bare.sequences == 3, "a document of one token predicts nothing"
    limited = evaluate(model, Letters(), str(path), protocol=Protocol(window=12, layout="documents"), limit=2)
    assert limited.sequences == 2
    assert limited.nll == pytest.approx(np.mean(parts[: 5 + 11]), rel=1e-12)


def test_documents_are_joined_by_a_blank_line(model, tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('"first part"\n"second part"\n')
    joined = tmp_path / "joined.txt"
    joined.write_text("first part\n\nsecond part")
    short = Protocol(window=8)
    assert evaluate(model, Letters(), str(path), protocol=short) == evaluate(
        model, Letters(), str(joined), protocol=short
    )


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
    other = shaken(model, 0.05)
    tokenizer = Letters()
    text = perplexity.prepare("self", tokenizer=tokenizer, dense=model, protocol=Protocol(window=32), limit=48)
    dense, changed = perplexity.measure(model, text), perplexity.measure(other, text)
    assert dense.digest == changed.digest
    assert dense.nll < changed.nll
    assert evaluate(other, tokenizer, "self", protocol=Protocol(window=32), limit=48, dense=model) == changed
    assert dense.sequences == 48


@given(st.integers(2, 60), st.integers(2, 20), st.data())
def test_windows_predict_each_token_at_most_once_and_none_in_the_covered_range_is_lost(size, window, data):
    stride = data.draw(st.integers(1, window))
    predicted: list[int] = []
    rows_N3 = np.stack([np.arange(size)] * 3, axis=1)
    edges = sorted({0, size, *data.draw(st.lists(st.integers(0, size), max_size=4))})
    for one in cut((rows_N3[a:b] for a, b in pairwise(edges)), window, stride):
        assert len(one.ids) == window
        assert one.predicted.tolist() == [len(one.ids) - one.first, *[sum(one.ids[one.first :])] * 2]
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
            model,
            Letters(),
            str(book),
            protocol=Protocol(window=16),
            batch=3,
            progress=lambda done, total: calls.append((done, total)),
        )
        assert model.training
    finally:
        model.eval()
    assert calls == [(3, 4), (4, 4)]


# -- several tokenizers, several models -------------------------------------------------------------------------------


class Pairs:
    """A tokenizer of one token two characters, which tells what each covers."""

    is_fast = True
    bos_token_id = 0

    def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool, return_offsets_mapping: bool = False):
        spans = [(start, min(start + 2, len(text))) for start in range(0, len(text), 2)]
        return {"input_ids": [1 + sum(map(ord, text[a:b])) % 96 for a, b in spans], "offset_mapping": spans}


def test_bits_per_byte_and_word_perplexity_equal_sums_by_hand(model, tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("né à la  carte, ou non")
    result = evaluate(model, Pairs(), str(path), protocol=Protocol(window=5))
    pairs = ["né", " à", " l", "a ", " c", "ar", "te", ", ", "ou", " n", "on"]
    stream = [0, *Pairs()(path.read_text(), add_special_tokens=False, verbose=False)["input_ids"]]
    total = sum(nll_of(model, stream[:5]) + nll_of(model, stream[5:10]))
    # Windows: BOS and four pairs, of which the pairs are predicted; then five pairs, of which four are.
    predicted = pairs[:4] + pairs[5:9]
    assert (result.tokens, result.bytes, result.words) == (8, len("".join(predicted).encode()), 4)
    assert result.bits_per_byte == pytest.approx(total / math.log(2) / result.bytes, rel=1e-12)
    assert result.word_perplexity == pytest.approx(math.exp(total / 4), rel=1e-12)
    assert evaluate(model, Letters(), str(path), protocol=Protocol(window=5)).bits_per_byte is None


def test_bits_per_byte_does_not_depend_on_how_the_text_is_cut_into_tokens(tmp_path):
    """Models that hold all tokens equally likely, of vocabularies that cut the text into halves of each other."""
    from shortllama.shape import ModelShape

    path = tmp_path / "t.txt"
    path.write_text("abcdefgh" * 8)
    found = []
    for vocabulary in (97, 97**2):
        shape = ModelShape.uniform(
            vocabulary=vocabulary, hidden=8, head_dim=4, blocks=1, query_heads=2, kv_heads=1, neurons=8
        )
        even = surgery.build(shape, std=0.0)
        tokenizer = Pairs() if vocabulary > 97 else OneByOne()
        found.append(evaluate(even, tokenizer, str(path), protocol=Protocol(window=1 + 64 // (1 + (vocabulary > 97)))))
    assert found[0].bits_per_byte == pytest.approx(found[1].bits_per_byte, rel=1e-6)
    assert found[0].nll != pytest.approx(found[1].nll, rel=0.1)


class OneByOne(Letters):
    is_fast = True

    def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool, return_offsets_mapping: bool = False):
        found = super().__call__(text, add_special_tokens=add_special_tokens, verbose=verbose)
        return {**found, "offset_mapping": [(at, at + 1) for at in range(len(text))]}


def shaken(model, amount: float):
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(amount * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    return other


@pytest.mark.parametrize("batch", [1, 3])
def test_divergence_equals_a_sum_by_hand(model, book, batch):
    other = shaken(model, 0.1)
    text = perplexity.prepare(str(book), tokenizer=Letters(), protocol=Protocol(window=16, stride=5))
    ours, theirs = perplexity.compare(other, Beside("dense", model), text, batch=batch)
    kl, same, tokens = 0.0, 0, 0
    for window in text.windows():
        ids = torch.from_numpy(window.ids.copy())[None]
        with torch.no_grad():
            q, p = (
                torch.log_softmax(one(input_ids=ids).logits[0, window.first - 1 : -1], dim=-1) for one in (other, model)
            )
        kl += (p.exp() * (p - q)).sum().item()
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        tokens += len(p)
    assert ours.divergence is not None
    assert ours.divergence.against == "dense"
    assert ours.divergence.kl == pytest.approx(kl / tokens, rel=1e-9)
    assert ours.divergence.agreement == same / tokens
    assert 0 < same < tokens
    assert near(msgspec.structs.replace(ours, divergence=None), perplexity.measure(other, text))
    assert near(theirs, perplexity.measure(model, text))


def near(result: Perplexity, other: Perplexity) -> bool:
    """Whether two results are equal up to the rounding of their sums."""
    pairs = zip(msgspec.structs.astuple(result), msgspec.structs.astuple(other), strict=True)
    return all(a == (pytest.approx(b, rel=1e-9) if isinstance(b, float) else b) for a, b in pairs)


def test_a_model_does_not_diverge_from_itself(model, book):
    text = perplexity.prepare(str(book), tokenizer=Letters(), protocol=Protocol(window=16))
    ours, theirs = perplexity.compare(model, Beside("itself", model), text)
    assert ours.divergence is not None
    assert (ours.divergence.kl, ours.divergence.agreement) == (0.0, 1.0)
    assert ours.nll == theirs.nll


def test_a_token_that_the_dense_model_excludes_adds_nothing(model, book):
    """A logit of minus infinity has probability 0, and 0 log 0 is 0."""
    excluding = copy.deepcopy(model)
    head = excluding.lm_head.forward
    excluding.lm_head.forward = lambda x: torch.cat(
        [head(x)[..., :96], torch.full_like(head(x)[..., 96:], -torch.inf)], -1
    )
    (book.parent / "low.jsonl").write_text("[1, 2, 3, 4, 5]\n")
    text = perplexity.prepare(f"ids:{book.parent}/low.jsonl")
    ours, _ = perplexity.compare(model, Beside("dense", excluding), text)
    assert ours.divergence is not None
    assert 0 < ours.divergence.kl < 10


def test_models_of_other_vocabularies_are_not_compared(model, book):
    from shortllama.shape import ModelShape

    other = surgery.build(
        ModelShape.uniform(vocabulary=50, hidden=8, head_dim=4, blocks=1, query_heads=2, kv_heads=1, neurons=8)
    )
    text = perplexity.prepare(str(book), tokenizer=Letters(), protocol=Protocol(window=16))
    with pytest.raises(InputError, match="dense has a vocabulary of 50, the model one of 97"):
        perplexity.compare(model, Beside("dense", other), text)


def test_bf16_weights_lose_no_more_than_their_own_rounding(model, book):
    """Log-probabilities in float32, sums in float64: what is left is the logits' rounding, not that of a sum."""
    half = copy.deepcopy(model).to(torch.bfloat16)
    text = perplexity.prepare(str(book), tokenizer=Letters(), protocol=Protocol(window=16))
    with torch.no_grad():
        parts = []
        for window in text.windows():
            ids = torch.from_numpy(window.ids.copy())[None]
            logs = torch.log_softmax(half(input_ids=ids).logits[0].double(), dim=-1)
            parts += (-logs[:-1].gather(1, ids[0, 1:, None])).flatten().tolist()
    assert perplexity.measure(half, text, batch=1).nll == pytest.approx(np.mean(parts), rel=1e-6)


# -- long text --------------------------------------------------------------------------------------------------------


def peak_bytes(work) -> int:
    """The most that Python and NumPy held at once while `work` ran."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("layout", ["stream", "documents"])
@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_memory_does_not_grow_with_the_text(tmp_path, monkeypatch, suffix, layout):
    """Four times the text, in one line or in many documents, is read, tokenized, cut and run in the same memory."""
    from tests.test_token_stream import byte_level

    monkeypatch.setattr(tokens, "CHUNK", 1 << 12)
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1 << 12)
    sentence = "The pruned model keeps the blocks that matter most, and its perplexity says what was lost. "
    document = sentence if suffix == "txt" else json.dumps(sentence * 10) + "\n"
    tokenizer, peaks = byte_level(), []
    vocabulary = torch.nn.Embedding(len(tokenizer), 1)
    indifferent = torch.nn.Module()
    indifferent.get_input_embeddings = lambda: vocabulary
    indifferent.forward = lambda input_ids, use_cache: SimpleNamespace(logits=torch.zeros(*input_ids.shape, 600))
    for size in (1, 1, 4):  # the first pass imports and fills caches
        path = tmp_path / f"{size}.{suffix}"
        path.write_text(document * (size * 60_000 // len(document)))
        text = perplexity.prepare(f"{path}@layout={layout}", tokenizer=tokenizer)
        peaks.append(peak_bytes(lambda text=text: perplexity.measure(indifferent, text)))
    assert peaks[2] < 1.2 * peaks[1]


def test_a_limit_reads_no_further(tmp_path, model):
    path = tmp_path / "t.txt"
    path.write_bytes(b"fine text\n" * 20_000 + b"\xff not text")
    text = perplexity.prepare(str(path), tokenizer=OneByOne(), protocol=Protocol(window=16), limit=3)
    assert perplexity.measure(model, text).sequences == 3
    with pytest.raises(InputError, match="not UTF-8 text"):
        evaluate(model, OneByOne(), str(path), protocol=Protocol(window=16))


def test_progress_knows_the_end_of_a_file_in_many_blocks(tmp_path, model):
    path = tmp_path / "t.txt"
    path.write_text("a few words, again and again; " * 5_000)
    seen: list[tuple[int, int]] = []
    text = perplexity.prepare(str(path), tokenizer=OneByOne(), protocol=Protocol(window=512))
    perplexity.measure(model, text, progress=lambda done, total: seen.append((done, total)))
    last = seen[-1][0]
    assert seen[-1] == (last, last)
    assert all(done <= total for done, total in seen)
    assert all(abs(total - last) < 0.05 * last for _, total in seen), "the end is told well before it is reached"


# -- protocols --------------------------------------------------------------------------------------------------------


def test_a_source_carries_its_protocol(model, book):
    cases = {
        "book.txt": ("book.txt", Protocol(128)),
        "book.txt@paper": ("book.txt", Protocol(128)),
        "wikitext2:test@2048": ("wikitext2:test", Protocol(2048)),
        "self@paper-bos": ("self", Protocol(128, bos="window")),
        "a@b/c.txt": ("a@b/c.txt", Protocol(128)),
        "a@b/c.txt@2048": ("a@b/c.txt", Protocol(2048)),
        "c4@window=64,stride=16,bos=none": ("c4", Protocol(64, 16, "none")),
        "c4@layout=documents": ("c4", Protocol(128, layout="documents")),
    }
    assert {src: protocol.parse(src) for src in cases} == cases
    assert evaluate(model, Letters(), f"{book}@window=16,stride=4") == evaluate(
        model, Letters(), str(book), protocol=Protocol(16, 4)
    )


@pytest.mark.parametrize(
    ("src", "message"),
    [
        ("c4@papr", "no protocol is called 'papr'; did you mean 'paper'"),
        ("c4@", "no protocol is called ''; use paper, paper-bos, 2048 or window="),
        ("c4@windw=3", r"c4@windw=3: unknown key \$.windw; did you mean 'window'"),
        ("c4@window=x", r"\$.window: Expected `int`"),
        ("c4@bos=all", r"\$.bos: Invalid enum value 'all'"),
        ("c4@window=8,stride=9", "stride 9 with window 8"),
        ("c4@window=8,stride=4,layout=documents", "leave the stride out"),
        ("c4@window=1", "window of 1 tokens"),
    ],
)
def test_bad_protocols_are_answered_in_one_line(src, message):
    with pytest.raises(InputError, match=message):
        protocol.parse(src)


def test_short_names_are_evaluated_on_held_out_text(model, tmp_path):
    for name, text in {"wiki.train.raw": "train ", "wiki.test.raw": "test it "}.items():
        (tmp_path / "wikitext2").mkdir(exist_ok=True)
        (tmp_path / "wikitext2" / name).write_text(text * 9)
    (tmp_path / "ptb").mkdir()
    (tmp_path / "ptb" / "ptb.valid.txt").write_text("validate " * 9)
    (tmp_path / "ptb" / "ptb.test.txt").write_text("test " * 9)
    short = Protocol(window=8)
    held = {"wikitext2": "wikitext2/wiki.test.raw", "ptb": "ptb/ptb.valid.txt"}
    for name, file in held.items():
        ours = evaluate(model, Letters(), name, protocol=short, data_dir=tmp_path)
        assert ours.digest == evaluate(model, Letters(), str(tmp_path / file), protocol=short).digest
        assert ours.split in ("test", "valid")
    asked = evaluate(model, Letters(), "wikitext2:train", protocol=short, data_dir=tmp_path)
    assert asked.split == "train"
    assert asked.digest != evaluate(model, Letters(), "wikitext2", protocol=short, data_dir=tmp_path).digest


# -- bad input --------------------------------------------------------------------------------------------------------


def test_bad_protocols_and_sources_are_named_in_one_line(model, book, tmp_path):
    (tmp_path / "high.jsonl").write_text("[1, 97]\n")
    no_bos = Letters()
    no_bos.bos_token_id = None
    cases = [
        (dict(protocol=Protocol(window=1)), "window of 1 tokens"),
        (dict(protocol=Protocol(window=8, stride=9)), "stride 9 with window 8"),
        (dict(protocol=Protocol(window=8, stride=0)), "stride 0 with window 8"),
        (dict(protocol=Protocol(window=8, stride=4, layout="documents")), "leave the stride out"),
        (dict(limit=0), "limit of 0 windows"),
        (dict(protocol=Protocol(window=500)), "71 tokens give no window of 500"),
        (dict(src=f"ids:{tmp_path}/high.jsonl"), "high.jsonl: sequence 1 holds token id 97"),
        (dict(tokenizer=None), "without a tokenizer"),
        (dict(tokenizer=no_bos, protocol=Protocol(bos="window")), "has no BOS token; use"),
        (dict(src="gone.txt"), "no such file"),
    ]
    for arguments, expected in cases:
        given_ = {"tokenizer": Letters(), "src": str(book), **arguments}
        with pytest.raises(InputError) as error:
            evaluate(model, given_.pop("tokenizer"), given_.pop("src"), **given_)
        assert expected in str(error.value), arguments
        assert "\n" not in str(error.value)
    assert evaluate(model, no_bos, str(book), protocol=Protocol(window=16)).bos == "none"


def test_a_broken_model_has_no_perplexity(model, book):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.norm.weight[0] = float("nan")
    with pytest.raises(InputError, match=r"book\.txt: the mean NLL is nan"):
        evaluate(broken, Letters(), str(book), protocol=Protocol(window=16))


# -- the file ---------------------------------------------------------------------------------------------------------


def test_results_are_read_back_as_written(model, book, tmp_path):
    result = evaluate(model, Letters(), str(book), protocol=Protocol(window=16))
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
    text = perplexity.prepare("self", tokenizer=Letters(), dense=model, protocol=Protocol(window=4), limit=2)
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

    how: dict[str, Any] = {"tokenizer": tokenizer, "limit": 60}
    bare = perplexity.prepare(f"{src}@window=512,layout=documents,bos=none", **how)
    assert perplexity.measure(model, bare).perplexity == pytest.approx(3.68, abs=0.006)
    text = perplexity.prepare(f"{src}@window=512,layout=documents", **how)
    assert perplexity.measure(model, text).perplexity == pytest.approx(3.65, abs=0.005)
    for gone, expected in enumerate((121, 13.5, 7.9, 9.2, 10.1)):
        pruned = copy.deepcopy(model)
        del pruned.model.layers[gone]
        assert perplexity.measure(pruned, text).perplexity == pytest.approx(expected, rel=0.01)
