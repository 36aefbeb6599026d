"""Perplexity of a model on text, with its protocol: window, stride, BOS policy, layout and token count.

The default is the papers' protocol (128-token windows of one stream that begins with one BOS, not overlapping, the
tail dropped; the first token of a window is never predicted), which gives larger values than the usual 2048-token
windows: a difference of context length, not a defect. NLLs are summed in float64 from float32 log-probabilities.

`prepare` turns a source into windows once, so that several subjects meet exactly the same tokens; `measure` runs them.

Legend: B batch, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from shortllama import calibration, texts
from shortllama.errors import InputError
from shortllama.evaluation.results import Perplexity
from shortllama.stack import quiet, token_nll

Bos = Literal["stream", "window", "none"]
Layout = Literal["stream", "documents"]

DEFAULT_WINDOW = 128
SELF_SAMPLES = 64


@dataclass(frozen=True)
class Window:
    """Token ids (T,) run in one piece; the last `fresh` of them count as predicted, except one at the very start."""

    ids: np.ndarray
    fresh: int

    @property
    def first(self) -> int:
        """Index of the first predicted token."""
        return max(1, len(self.ids) - self.fresh)


@dataclass(frozen=True)
class Text:
    """Windows ready to run, under a name, with the protocol that cut them (see `Perplexity` for the fields)."""

    name: str
    windows: tuple[Window, ...]
    window: int | None
    stride: int | None
    bos: Literal["stream", "window", "none", "given"]
    layout: Layout
    split: str | None = None


def evaluate(
    model: Any,
    tokenizer: Any,
    src: str,
    *,
    window: int = DEFAULT_WINDOW,
    stride: int | None = None,
    bos: Bos | None = None,
    layout: Layout = "stream",
    limit: int | None = None,
    batch: int | None = None,
    dense: Any = None,
    seed: int = 0,
    data_dir: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Return the perplexity of a causal language model on `src`, with its protocol: `prepare`, then `measure`.

    `self` text is sampled from `dense`, by default from `model` itself.
    """
    text = prepare(
        src,
        tokenizer=tokenizer,
        dense=model if dense is None else dense,
        window=window,
        stride=stride,
        bos=bos,
        layout=layout,
        limit=limit,
        seed=seed,
        data_dir=data_dir,
    )
    return measure(model, text, batch=batch, progress=progress)


def prepare(
    src: str,
    *,
    tokenizer: Any = None,
    dense: Any = None,
    window: int = DEFAULT_WINDOW,
    stride: int | None = None,
    bos: Bos | None = None,
    layout: Layout = "stream",
    limit: int | None = None,
    seed: int = 0,
    data_dir: Path | None = None,
) -> Text:
    """Return `src` (a text or JSONL file, short name, `ids:FILE.jsonl` or `self`) as windows.

    `window` tokens each, `stride` (default: `window`) tokens from one to the next; with a smaller stride only tokens
    not yet predicted count, so that each is predicted once, with more context. `bos`: "stream" begins each text with
    one, "window" puts one before every window (which then predicts its first token too), "none"; by default "stream"
    where the tokenizer has a BOS. `layout`: "stream" joins documents by a blank line and cuts full windows; "documents"
    takes the first `window` tokens (a "stream" BOS included) of each. `limit` is the most windows taken. `ids:` lines
    are taken whole as given; `self` is `limit` (default 64) sequences of `window` tokens sampled from `dense`.

    Raises InputError for a bad source or protocol, and for text that gives no window.
    """
    step = window if stride is None else stride
    _check_protocol(window, step, layout, limit)
    if src == calibration.SELF:
        drawn = calibration.load(
            src, tokenizer=tokenizer, model=dense, samples=limit or SELF_SAMPLES, length=window, seed=seed
        )
        return _given(src, drawn.sequences)
    if src.startswith(texts.IDS):
        path = Path(src.removeprefix(texts.IDS))
        return _given(f"{texts.IDS}{path.name}", [np.asarray(ids) for ids in texts.read_ids(path)[:limit]])
    documents = texts.read_documents(src, data_dir)
    marker = calibration.bos_id(tokenizer)
    policy: Bos = bos or ("none" if marker is None else "stream")
    if policy != "none" and marker is None:
        raise InputError(f"{documents.name}: BOS policy {policy!r}, but this tokenizer has no BOS token; use 'none'")
    prefix = [] if marker is None else [marker]
    tokenize = calibration.tokenize_with(tokenizer, documents.name)
    streams = ["\n\n".join(documents.texts)] if layout == "stream" else documents.texts[:limit]
    ids = [np.array([*(prefix if policy == "stream" else []), *tokenize(stream)]) for stream in streams]
    windows = list(cut(ids[0], window, step)) if layout == "stream" else [Window(one[:window], window) for one in ids]
    if policy == "window":
        windows = [Window(np.array([*prefix, *one.ids]), one.fresh) for one in windows]
    windows = [one for one in windows if one.first < len(one.ids)][:limit]
    if not windows:
        raise InputError(
            f"{documents.name}: {sum(map(len, ids))} tokens give no window of {window}; give more text or a shorter one"
        )
    return Text(documents.name, tuple(windows), window, step, policy, layout, documents.split)


def cut(ids: np.ndarray, window: int, stride: int) -> Iterator[Window]:
    """Yield the full windows of a stream from its start; the tail that fills none is dropped."""
    for start in range(0, len(ids) - window + 1, stride):
        yield Window(ids[start : start + window], stride if start else window)


def measure(
    model: Any, text: Text, *, batch: int | None = None, progress: Callable[[int, int], None] | None = None
) -> Perplexity:
    """Return the perplexity of `model` on prepared windows: exp(sum of NLL / predicted tokens).

    `batch` windows run together (default: as many as a bound on the logits' memory allows, at most 16); it changes
    nothing beyond rounding: shorter windows are padded on the right, which causal attention never sees.
    Raises InputError for ids outside the model's vocabulary and for a mean NLL that is not finite.
    """
    vocabulary = model.get_input_embeddings().num_embeddings
    texts.check_vocabulary((window.ids.tolist() for window in text.windows), vocabulary, text.name)
    longest = max(len(window.ids) for window in text.windows)
    rows = batch or min(16, calibration.rows_within(longest, vocabulary))
    total, tokens = 0.0, 0
    with quiet(model), torch.no_grad():
        for start in range(0, len(text.windows), rows):
            part = text.windows[start : start + rows]
            total += _summed_nll(model, part)
            tokens += sum(len(window.ids) - window.first for window in part)
            if progress is not None:
                progress(start + len(part), len(text.windows))
    nll = total / tokens
    if not math.isfinite(nll):
        raise InputError(f"{text.name}: the mean NLL is {nll}; check the weights, or evaluate in float32")
    return Perplexity(
        perplexity=math.exp(min(nll, 700.0)),  # e^700 is near the largest float; the exact mean stands beside it
        nll=nll,
        tokens=tokens,
        sequences=len(text.windows),
        window=text.window,
        stride=text.stride,
        bos=text.bos,
        layout=text.layout,
        digest=calibration.digest([window.ids for window in text.windows]),
        split=text.split,
    )


def _summed_nll(model: Any, windows: Sequence[Window]) -> float:
    """Return the summed NLL of the windows' predicted tokens, in nats."""
    length = max(len(window.ids) for window in windows)
    padded_BT = np.zeros((len(windows), length), dtype=np.int64)
    counts_BT = np.zeros((len(windows), length), dtype=bool)
    for row, window in enumerate(windows):
        padded_BT[row, : len(window.ids)] = window.ids
        counts_BT[row, window.first : len(window.ids)] = True
    ids_BT = torch.from_numpy(padded_BT).to(model.get_input_embeddings().weight.device)
    nll_BT = token_nll(model(input_ids=ids_BT, use_cache=False).logits, ids_BT)
    return nll_BT[torch.from_numpy(counts_BT[:, 1:]).to(nll_BT.device)].sum(dtype=torch.float64).item()


def _given(name: str, sequences: Sequence[np.ndarray]) -> Text:
    windows = tuple(Window(np.asarray(ids, dtype=np.int64), len(ids)) for ids in sequences)
    return Text(name, windows, window=None, stride=None, bos="given", layout="documents")


def _check_protocol(window: int, stride: int, layout: Layout, limit: int | None) -> None:
    if window < 2:
        raise InputError(f"window of {window} tokens; at least 2 are needed to predict one")
    if not 1 <= stride <= window:
        raise InputError(
            f"stride {stride} with window {window}; it must be between 1 and the window, or tokens are lost"
        )
    if layout == "documents" and stride != window:
        raise InputError(f"stride {stride}: documents are evaluated one window each; leave the stride out")
    if limit is not None and limit < 1:
        raise InputError(f"limit of {limit} windows; give at least 1")
