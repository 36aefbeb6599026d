"""The file `retraining.json` of a retrained checkpoint: what was done to it, on what, at what cost. Plain values.

Schema history: shortllama.retraining/1: first.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from shortllama import files
from shortllama.retraining.recipes import Stage
from shortllama.scores import Cost

FILE = "retraining.json"


class Data(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was learned from. `digest` identifies ids and masks; `skipped` had nothing to learn; counts are of all.

    `tokens` are those of all examples, held-out ones included, `targets` those of them that are predicted.
    """

    source: str
    kind: str
    digest: str
    examples: int
    held_out: int
    skipped: int
    tokens: int
    targets: int


class HeldOut(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Cross-entropy on the held-out examples, in nats a predicted token, before step `step` (the last: at the end)."""

    step: int
    nll: float


class Done(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One finished stage of a recipe.

    `losses`: one a step, what the stage minimizes, in nats a predicted token; null for a step that was not taken
    because its loss or gradient was not finite. The last of `held_out` is of the weights as they are stored. `cost`:
    seconds, interruptions left out; peak bytes beyond the model's own; tokens run through the model in training.
    """

    recipe: str
    stage: Stage
    data: Data
    losses: tuple[float | None, ...]
    held_out: tuple[HeldOut, ...]
    cost: Cost
    trained_parameters: int
    processes: int
    device: str
    torch: str
    teacher: str | None = None


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that a checkpoint's weights went through after pruning, in order."""

    stages: tuple[Done, ...]
    schema: Literal["shortllama.retraining/1"] = "shortllama.retraining/1"


def read(folder: Path) -> Record | None:
    """Return the record in a checkpoint folder; None where it was not retrained."""
    file = folder / FILE
    return files.decode_json(files.read_bytes(file), Record, str(file)) if file.is_file() else None
