"""The numbers of Shortened LLaMA (arXiv 2402.02834) as data (`paper.json`), for reports to set measured ones beside.

Tables 1 (shapes), 2 and 4 (latency), 9 (memory), 3 and 10 (zero-shot), 5 (criteria), 6 (granularity), 7 (calibration).
Null is what the paper marks as out of memory. Nothing here is compared. Schema history: shortllama.paper/1: first.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Literal

import msgspec

from shortllama import files


class Shape(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A row of Table 1; `name` as in the catalogue. Means and deviations over blocks where widths differ; of blocks
    `pruned_blocks` (first, end) alone where only these were pruned. `params_b`: 1e9, in closed form."""

    name: str
    blocks: int
    params_b: float
    heads: int | None = None
    ffn: int | None = None
    heads_mean: float | None = None
    heads_sd: float | None = None
    ffn_mean: float | None = None
    ffn_sd: float | None = None
    pruned_blocks: tuple[int, int] | None = None


class Latency(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A row of Tables 2 (llama-7b) and 4 (llama-13b): one sequence, 12 input and 128 output tokens, float16."""

    model: str
    pruned: str
    method: str
    blocks: int
    h100_latency_s: float | None
    h100_tok_s: float | None
    rtx3090_latency_s: float | None
    rtx3090_tok_s: float | None


class Memory(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A cell of Table 9: peak GiB of a depth-pruned model on an H100 of 80 GiB, None where it ran out of memory."""

    model: str
    row: str
    blocks: int
    batch: int
    output: int
    input: int
    gib: float | None


class ZeroShot(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A row of Tables 2, 3, 4 and 10 after retraining. Perplexities; accuracies in per cent."""

    model: str
    pruned: str
    method: str
    wikitext2_ppl: float
    ptb_ppl: float
    average: float
    boolq: float
    piqa: float
    hellaswag: float
    winogrande: float
    arc_easy: float
    arc_challenge: float
    openbookqa: float
    h100_tok_s: float | None
    rtx3090_tok_s: float | None


class Criterion(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A row of Table 5."""

    pruned: str
    criterion: str
    wikitext2_ppl: float
    ptb_ppl: float
    average: float


class Granularity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A row of Table 6."""

    unit: str
    params_b: float
    wikitext2_ppl: float
    ptb_ppl: float
    average: float


class Calibration(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A row of Table 7; None: out of memory."""

    method: str
    samples: int
    wikitext2_ppl: float | None
    average: float | None


class Paper(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything in the file; `source` names the paper and its tables."""

    schema: Literal["shortllama.paper/1"]
    source: str
    shapes: tuple[Shape, ...]
    latency: tuple[Latency, ...]
    memory: tuple[Memory, ...]
    zero_shot: tuple[ZeroShot, ...]
    criteria: tuple[Criterion, ...]
    granularity: tuple[Granularity, ...]
    calibration: tuple[Calibration, ...]


@cache
def read() -> Paper:
    """Return the paper's numbers, read once from the package."""
    path = Path(__file__).with_name("paper.json")
    return files.decode_json(files.read_bytes(path), Paper, str(path))
