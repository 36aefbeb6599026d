"""The file `quality.json`: what evaluation found out about each subject, with the protocol beside every number.

Plain values, no torch, so that a report reads it without loading a model. A figure without its window, stride, BOS
policy and token count cannot be compared with anything, so they are one value here.

Schema history: shortllama.eval/1: first.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import msgspec

from shortllama import files
from shortllama.errors import InputError

SCHEMA = "shortllama.eval/1"


class Perplexity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One perplexity and how it was measured.

    `perplexity` is exp(`nll`), `nll` the mean over `tokens` predicted tokens in nats. `window` and `stride` count
    tokens, without a BOS that is put before each window; they are null for token ids taken line by line as given.
    `bos`: "stream" (once before each text), "window" (before each window), "none", or "given" (ids as they are).
    `layout`: "stream" (documents joined by a blank line, cut into full windows) or "documents" (the start of each).
    `digest` identifies the token ids that were evaluated, `sequences` counts windows.
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

    @property
    def protocol(self) -> str:
        """The protocol in one line, to be printed beside the number."""
        if self.window is None:
            return f"whole sequences as given, {self.sequences} sequences, {self.tokens} tokens"
        return (
            f"window {self.window}, stride {self.stride}, BOS {self.bos}, {self.layout}, "
            f"{f'split {self.split}, ' if self.split else ''}{self.tokens} tokens"
        )


class Quality(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All that was evaluated on one subject; perplexities by source name as given by the user."""

    perplexity: dict[str, Perplexity] = {}


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
