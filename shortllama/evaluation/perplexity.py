"""Perplexity of a model on prepared windows, with its protocol, and how far its predictions are from another model's.

Log-probabilities are taken in float32 at least, whatever the weights are, and summed in float64. Logits are worked
through a few rows at a time: beside what the model itself makes, memory grows with neither batch nor vocabulary.

Legend: B batch, T tokens, N rows (predictions), V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from shortllama import calibration, texts
from shortllama.errors import InputError
from shortllama.evaluation.protocol import Protocol
from shortllama.evaluation.results import Divergence, Perplexity
from shortllama.evaluation.windows import Digest, Text, Window, prepare

Progress = Callable[[int, int], None]

# Windows run together, at most.
ROWS = 16
# Logits turned into log-probabilities together: on a CPU 1 MiB in float32, which stays in a cache; elsewhere enough to
# make the launch of a kernel cheap beside it.
LOGITS = {"cpu": 1 << 18}
LOGITS_ELSEWHERE = 1 << 24
IGNORED = -100
MOST = 700.0  # e^700 is near the largest float


class Beside(NamedTuple):
    """Another model with the same vocabulary, by name: what predictions are compared with."""

    name: str
    model: Any


def evaluate(
    model: Any,
    tokenizer: Any,
    src: str,
    *,
    protocol: Protocol | None = None,
    limit: int | None = None,
    batch: int | None = None,
    dense: Any = None,
    seed: int = 0,
    data_dir: Path | None = None,
    progress: Progress | None = None,
) -> Perplexity:
    """Return the perplexity of a causal language model on `src`, with its protocol: `prepare`, then `measure`.

    `self` text is sampled from `dense`, by default from `model` itself.
    """
    source = model if dense is None else dense
    text = prepare(src, tokenizer=tokenizer, dense=source, protocol=protocol, limit=limit, seed=seed, data_dir=data_dir)
    return measure(model, text, batch=batch, progress=progress)


def measure(model: Any, text: Text, *, batch: int | None = None, progress: Progress | None = None) -> Perplexity:
    """Return the perplexity of `model` on prepared windows: exp(sum of NLL / predicted tokens).

    `batch` windows run together (default: as many as a bound on the logits' memory allows, at most 16); it changes
    nothing beyond rounding: shorter windows are padded on the right, which causal attention never sees.
    Raises InputError for ids outside the model's vocabulary and for a mean NLL that is not finite.
    """
    return _run(model, None, text, batch, progress)[0]


def compare(
    model: Any, beside: Beside, text: Text, *, batch: int | None = None, progress: Progress | None = None
) -> tuple[Perplexity, Perplexity]:
    """Return the perplexity of `model`, with its divergence from the model beside, and that of the latter: one pass.

    Raises InputError as `measure` does, and for vocabularies of different size.
    """
    sizes = [one.get_input_embeddings().num_embeddings for one in (model, beside.model)]
    if sizes[0] != sizes[1]:
        raise InputError(
            f"{beside.name} has a vocabulary of {sizes[1]}, the model one of {sizes[0]}; "
            "predictions compare only between models with one tokenizer"
        )
    ours, theirs = _run(model, beside, text, batch, progress)
    assert theirs is not None
    return ours, theirs


@dataclass
class _Sums:
    """What has been added up so far, on the model's device, in float64."""

    nll: Any = 0.0
    other_nll: Any = 0.0
    kl: Any = 0.0
    same: Any = 0
    predicted_3: np.ndarray = field(default_factory=lambda: np.zeros(3, dtype=np.int64))
    windows: int = 0
    digest: Digest = field(default_factory=Digest)


def _run(
    model: Any, beside: Beside | None, text: Text, batch: int | None, progress: Progress | None
) -> tuple[Perplexity, Perplexity | None]:
    vocabulary = model.get_input_embeddings().num_embeddings
    sums = _Sums()
    with _evaluating(model, *([] if beside is None else [beside.model])), torch.no_grad():
        for part in _batches(text.windows(), vocabulary if beside is None else 2 * vocabulary, batch):
            if any(one.ids.max() >= vocabulary for one in part):
                earlier = repeat((0,), sums.windows)  # so that the sequence is named by its number
                texts.check_vocabulary(chain(earlier, (one.ids for one in part)), vocabulary, text.name)
            _add(sums, part, model, None if beside is None else beside.model)
            if progress is not None:
                progress(sums.windows, text.expected(sums.windows))
    if progress is not None and text.expected(sums.windows) != sums.windows:
        progress(sums.windows, sums.windows)
    tokens = int(sums.predicted_3[0])
    ours = _result(float(sums.nll) / tokens, sums, text)
    if beside is None:
        return ours, None
    divergence = Divergence(beside.name, float(sums.kl) / tokens, int(sums.same) / tokens)
    if not math.isfinite(divergence.kl):
        raise InputError(f"{text.name}: the KL divergence from {beside.name} is {divergence.kl}; check the weights")
    return _result(ours.nll, sums, text, divergence), _result(float(sums.other_nll) / tokens, sums, text)


@contextmanager
def _evaluating(*models: Any) -> Generator[None]:
    """Put the models in eval mode, and every module back in its own afterwards."""
    training = {module: module.training for model in models for module in model.modules()}
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, flag in training.items():
            module.training = flag


def _batches(windows: Iterator[Window], vocabulary: int, batch: int | None) -> Iterator[list[Window]]:
    """Yield the windows in order, as many together as the bound on their logits allows when padded."""
    held: list[Window] = []
    longest = 0
    for window in windows:
        reach = max(longest, len(window.rows_T3))
        if held and len(held) >= (batch or min(ROWS, calibration.rows_within(reach, vocabulary))):
            yield held
            held, reach = [], len(window.rows_T3)
        held.append(window)
        longest = reach
    if held:
        yield held


def _add(sums: _Sums, windows: Sequence[Window], model: Any, other: Any) -> None:
    """Run the windows and add what they give."""
    length = max(len(window.rows_T3) for window in windows)
    ids_BT = np.zeros((len(windows), length), dtype=np.int64)
    # What each position predicts: the token after it, where that counts.
    targets_BT = np.full((len(windows), length), IGNORED, dtype=np.int64)
    for row, window in enumerate(windows):
        size = len(window.rows_T3)
        ids_BT[row, :size] = window.ids
        targets_BT[row, window.first - 1 : size - 1] = window.ids[window.first :]
        sums.predicted_3 += window.predicted
        sums.digest.add(window.ids)
    sums.windows += len(windows)
    logits_NV, targets_N = _logits(model, ids_BT), torch.from_numpy(targets_BT.reshape(-1))
    if other is None:
        _add_nll(sums, logits_NV, targets_N.to(logits_NV.device))
    else:
        _add_divergence(sums, logits_NV, _logits(other, ids_BT).to(logits_NV.device), targets_N.to(logits_NV.device))


def _logits(model: Any, ids_BT: np.ndarray) -> Tensor:
    ids = torch.from_numpy(ids_BT).to(model.get_input_embeddings().weight.device)
    return model(input_ids=ids, use_cache=False).logits.flatten(0, 1)


def _slices(logits_NV: Tensor) -> Iterator[slice]:
    rows = max(1, LOGITS.get(logits_NV.device.type, LOGITS_ELSEWHERE) // logits_NV.shape[1])
    for start in range(0, len(logits_NV), rows):
        yield slice(start, start + rows)


def _wide(logits_NV: Tensor) -> Tensor:
    return logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))


def _add_nll(sums: _Sums, logits_NV: Tensor, targets_N: Tensor) -> None:
    for part in _slices(logits_NV):
        nll_N = functional.cross_entropy(
            _wide(logits_NV[part]), targets_N[part], ignore_index=IGNORED, reduction="none"
        )
        sums.nll += nll_N.sum(dtype=torch.float64)


def _add_divergence(sums: _Sums, logits_NV: Tensor, other_NV: Tensor, targets_N: Tensor) -> None:
    """KL(other || model) = sum over the vocabulary of p (log p - log q); a token that `other` excludes adds nothing."""
    for part in _slices(logits_NV):
        counted = targets_N[part] != IGNORED
        q_NV, p_NV = (torch.log_softmax(_wide(one[part][counted]), dim=-1) for one in (logits_NV, other_NV))
        targets_N1 = targets_N[part][counted][:, None]
        sums.nll -= q_NV.gather(1, targets_N1).sum(dtype=torch.float64)
        sums.other_nll -= p_NV.gather(1, targets_N1).sum(dtype=torch.float64)
        kl_NV = torch.where(p_NV == -torch.inf, 0.0, p_NV.exp() * (p_NV - q_NV))
        sums.kl += kl_NV.sum(dtype=torch.float64)
        sums.same += (q_NV.argmax(dim=-1) == p_NV.argmax(dim=-1)).sum()


def _result(nll: float, sums: _Sums, text: Text, divergence: Divergence | None = None) -> Perplexity:
    """Return the figures of a mean NLL. Raises InputError where it is not finite."""
    if not math.isfinite(nll):
        raise InputError(f"{text.name}: the mean NLL is {nll}; check the weights, or evaluate in float32")
    tokens, size, words = map(int, sums.predicted_3)
    counted = text.counted and size > 0 and words > 0
    return Perplexity(
        perplexity=math.exp(min(nll, MOST)),  # the exact mean stands beside it
        nll=nll,
        tokens=tokens,
        sequences=sums.windows,
        window=text.window,
        stride=text.stride,
        bos=text.bos,
        layout=text.layout,
        digest=str(sums.digest),
        split=text.split,
        bytes=size if counted else None,
        words=words if counted else None,
        bits_per_byte=nll * tokens / size / math.log(2) if counted else None,
        word_perplexity=math.exp(min(nll * tokens / words, MOST)) if counted else None,
        divergence=divergence,
    )
