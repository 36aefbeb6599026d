"""What a criterion measured on a model: higher = keep, everywhere. One JSON file, no torch.

Schema history: shortllama.scores/1: first. `order`, null without --iterative, and all of `cost` but its first three
fields came later: older files read the same.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import msgspec
from msgspec import UNSET, UnsetType

from shortllama import files
from shortllama.errors import InputError

SCHEMA = "shortllama.scores/1"


class Cost(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What scoring, or writing a checkpoint, took.

    `wall_s`: seconds, without loading the model. `peak_bytes`: memory beyond what was held before; null where it cannot
    be measured. `tokens`: calibration tokens read, once for each step of an iterative run. `block_passes`: forward runs
    of one block over all calibration tokens; null where none was counted. `shared`: the criteria measured in one and
    the same pass, each of which records the whole cost. `runs`: above 1 where runs that were killed are part of it;
    times and passes are then sums of what is known of them, which is up to the last part that each finished, and the
    peak is the highest. `estimated_bytes`: what `peak_bytes` was expected to be; null where it was not estimated.
    `reasons`: for nulls, by field.
    """

    wall_s: float
    peak_bytes: int | None
    tokens: int
    block_passes: float | None = None
    shared: tuple[str, ...] = ()
    runs: int = 1
    estimated_bytes: int | None = None
    reasons: dict[str, str] = {}


class Scores(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Scores of one model. Which lists are present depends on `unit`; each has one entry (or list) per block.

    unit "block": `blocks`. unit "module": `attention`, `mlp`, null where a block has none. unit "width": `kv_groups`
    (L lists of K), `neurons` (L lists of F), and where KV heads are shared `query_heads` (L lists of H, comparable
    within a group). Scores are comparable between blocks only where the criterion says so.
    `runs`: by length n, one value for each run of n blocks (angular). `order`: what an iterative run removed, one after
    the other, as `removals.Piece` texts; the lists are then those of the dense model, its first step. `calibration` is
    the description written by `calibration.describe`: source, digest, samples, length, seed; null for data-free
    criteria. `details` holds what a criterion adds (intervals, compensation statistics' file).
    """

    criterion: str
    unit: Literal["block", "module", "width"]
    base_digest: str
    schema: Literal["shortllama.scores/1"] = SCHEMA
    blocks: tuple[float, ...] | None = None
    attention: tuple[float | None, ...] | None = None
    mlp: tuple[float | None, ...] | None = None
    kv_groups: tuple[tuple[float, ...], ...] | None = None
    neurons: tuple[tuple[float, ...], ...] | None = None
    query_heads: tuple[tuple[float, ...], ...] | UnsetType = UNSET
    runs: dict[str, tuple[float, ...]] | None = None
    calibration: dict[str, Any] | None = None
    details: dict[str, Any] | None = None
    order: tuple[str, ...] | None = None
    cost: Cost | None = None

    def digest(self) -> str:
        """Return 16 hexadecimal digits over everything but the cost, so that a re-run with equal scores is equal."""
        bare = msgspec.structs.replace(self, cost=None)
        return hashlib.sha256(msgspec.json.encode(bare, order="sorted")).hexdigest()[:16]


def check_finite(scores: Scores) -> None:
    """Raise InputError where a score is NaN or infinite, or where all scores of a list are equal (no ranking)."""
    flat: dict[str, Sequence[float | None] | None] = {
        "blocks": scores.blocks,
        "attention": scores.attention,
        "mlp": scores.mlp,
    }
    for run, distances in (scores.runs or {}).items():
        flat[f"runs.{run}"] = distances
    for name, listed in flat.items():
        values = [(index, value) for index, value in enumerate(listed or ()) if value is not None]
        bad = [(index, value) for index, value in values if not math.isfinite(value)]
        if bad:
            raise InputError(
                f"scores.{name}[{bad[0][0]}] is {bad[0][1]}: not finite; check the calibration text and dtype"
            )
        if len(values) > 1 and len({value for _, value in values}) == 1 and not name.startswith("runs"):
            raise InputError(
                f"scores.{name}: all {len(values)} values equal {values[0][1]}; this criterion ranks nothing here"
            )
    queries = scores.query_heads or ()
    for name, lists in {"kv_groups": scores.kv_groups, "neurons": scores.neurons, "query_heads": queries}.items():
        for block, values in enumerate(lists or ()):
            if not all(map(math.isfinite, values)):
                raise InputError(
                    f"scores.{name}[{block}] holds a value that is not finite; check the calibration text and dtype"
                )


def is_scores(path: Path) -> bool:
    """Return whether a file calls itself scores, readable or not as such."""
    try:
        named = msgspec.json.decode(files.read_bytes(path))
    except (InputError, msgspec.DecodeError):
        return False
    return isinstance(named, dict) and str(cast("dict[str, Any]", named).get("schema")).startswith("shortllama.scores/")


def read_scores(path: Path) -> Scores:
    """Return the scores in `path`. Raises InputError naming the offending key."""
    return files.decode_json(files.read_bytes(path), Scores, str(path))


def write_scores(path: Path, scores: Scores) -> None:
    """Check and write atomically."""
    check_finite(scores)
    files.write_atomically(path, files.encode_json(scores))
