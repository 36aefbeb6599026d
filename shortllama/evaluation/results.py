"""The file `quality.json`: what evaluation found out about each subject, with the protocol beside every number.

Plain values, no torch, so that a report reads it without loading a model. A figure without its window, stride, BOS
policy and token count cannot be compared with anything, so they are one value here.

Schema history: shortllama.eval/1: first; fields with defaults were added to it, and files without them still load.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import msgspec

from shortllama import files
from shortllama.errors import InputError

SCHEMA = "shortllama.eval/1"


class Divergence(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How far a model's predictions are from those of the model `against`, over the same predicted tokens.

    `kl` is the mean of KL(against || model) in nats a token, `agreement` the share of tokens for which both hold the
    same token most likely.
    """

    against: str
    kl: float
    agreement: float


class Perplexity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One perplexity and how it was measured.

    `perplexity` is exp(`nll`), `nll` the mean over `tokens` predicted tokens in nats. `window` and `stride` count
    tokens, without a BOS that is put before each window; they are null for token ids taken line by line as given.
    `bos`: "stream" (once before each text), "window" (before each window), "none", or "given" (ids as they are).
    `layout`: "stream" (documents joined by a blank line, cut into full windows) or "documents" (the start of each).
    `digest` identifies the token ids that were evaluated, `sequences` counts windows.

    Perplexities of different tokenizers do not compare. `bits_per_byte` and `word_perplexity` do: the same total NLL
    over the `bytes` (UTF-8) that the predicted tokens cover, and over the `words` (split at white space) that begin in
    them. All four are null for ids, and for tokenizers that do not tell what a token covers.
    """

    perplexity: float
    nll: float
    tokens: int
    sequences: int
    window: int | None
    stride: int | None
    bos: Literal["stream", "window", "none", "given"]
    layout: Literal["stream", "documents"]
    digest: str
    split: str | None = None
    bytes: int | None = None
    words: int | None = None
    bits_per_byte: float | None = None
    word_perplexity: float | None = None
    divergence: Divergence | None = None

    @property
    def protocol(self) -> str:
        """The protocol in one line, to be printed beside the number."""
        if self.window is None:
            return f"whole sequences as given, {self.sequences} sequences, {self.tokens} tokens"
        return (
            f"window {self.window}, stride {self.stride}, BOS {self.bos}, {self.layout}, "
            f"{f'split {self.split}, ' if self.split else ''}{self.tokens} tokens"
        )


class Accuracy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One zero-shot task: `value` by `metric`, the one that the paper reports for it (share of items, 0 to 1).

    `standard_error` is that of the mean over items. `metrics` holds everything that the harness computed. `items`
    were evaluated, where the published set has `published`. `origin` is "hub" (the harness's own task)
    or the name of a local file, whose items `digest` identifies; `version` is that of the task's definition there.
    """

    metric: str
    value: float
    items: int
    published: int
    version: str
    origin: str
    metrics: dict[str, float]
    standard_error: float | None = None
    digest: str | None = None

    @property
    def protocol(self) -> str:
        """How it was measured, in one line."""
        share = f"{self.items} items" if self.items == self.published else f"{self.items} of {self.published} items"
        return f"{self.metric}, {share}, {self.origin}, version {self.version}"


class ZeroShot(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Tasks by name, and the harness that ran them. `mean` is the plain mean over those of the paper's seven.

    `bos`: prompts begin with one. `truncated` requests did not fit into the model's window and lost their beginning.
    """

    tasks: dict[str, Accuracy]
    harness: str
    bos: bool
    truncated: int = 0
    mean: float | None = None
    limit: int | None = None

    @property
    def protocol(self) -> str:
        """How all of them were measured, in one line."""
        cut = f", {self.truncated} requests cut to the model's window" if self.truncated else ""
        return f"0-shot, {self.harness}, BOS {'before each prompt' if self.bos else 'none'}{cut}"


class Generation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a model wrote after `prompt`: greedily (`temperature` 0), or drawn from its whole distribution with `seed`.

    `tokens` were generated; `text` ends where the model ended the text, if it did (`ended`).
    """

    prompt: str
    text: str
    tokens: int
    temperature: float
    ended: bool
    seed: int | None = None


class Quality(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All that was evaluated on one subject; perplexities by source as given by the user, protocol included."""

    perplexity: dict[str, Perplexity] = {}
    zero_shot: ZeroShot | None = None
    generations: tuple[Generation, ...] = ()


class Evaluation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file: subjects by name."""

    subjects: dict[str, Quality]
    schema: Literal["shortllama.eval/1"] = SCHEMA


def read_evaluation(path: Path) -> Evaluation:
    """Return the evaluation in `path`. Raises InputError naming the offending key."""
    return files.decode_json(files.read_bytes(path), Evaluation, str(path))


def write_evaluation(path: Path, evaluation: Evaluation) -> None:
    """Write atomically. Raises InputError where a perplexity is not finite: JSON has no such number."""
    for subject, quality in evaluation.subjects.items():
        for source, result in quality.perplexity.items():
            if not math.isfinite(result.perplexity):
                raise InputError(
                    f"perplexity of {subject} on {source} is {result.perplexity} (mean NLL {result.nll}); "
                    "check the dtype, or evaluate in float32"
                )
    files.write_atomically(path, files.encode_json(evaluation))
