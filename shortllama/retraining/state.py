"""The state of an interrupted run: written now and then, read when it is resumed. Safetensors and JSON, no pickle.

A folder that holds, for each stage, its newest state in a folder of its own: what is trained with AdamW's moments as
float32 tensors, and `state.json`. A state appears complete under a new name before an older one is removed, so that a
kill at any moment leaves one to go on from. Random numbers are no part of it: they follow from seed and step.

State history: shortllama.retraining-state/1: first.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Literal

import msgspec
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from shortllama import checkpoint, files, tensorfile
from shortllama.errors import InputError
from shortllama.retraining.recipes import Stage
from shortllama.retraining.record import HeldOut
from shortllama.scores import Cost

FILE = "state.json"


class Identity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What must be the same for a run to go on: the stage, its data, and the weights that it began with."""

    stage: Stage
    data: str
    model: str
    teacher: str | None = None


class State(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a stage is: `step` steps are done, `updates` of them changed the weights."""

    identity: Identity
    step: int
    updates: int
    losses: tuple[float | None, ...]
    held_out: tuple[HeldOut, ...]
    cost: Cost
    schema: Literal["shortllama.retraining-state/1"] = "shortllama.retraining-state/1"


def write(folder: Path, number: int, state: State, tensors: Mapping[str, Tensor]) -> None:
    """Write the state of stage `number`, and remove what it replaces."""
    older = _states(folder, number)
    place = folder / f"stage-{number}-step-{state.step:08}"
    files.remove_folder(place)
    planned = [
        tensorfile.Planned(name, "F32", tuple(one.shape), partial(checkpoint.raw_pieces, one))
        for name, one in tensors.items()
    ]
    with files.new_folder(place, FILE) as made:
        tensorfile.write_folder(made, planned, checkpoint.SHARD_BYTES)
        files.write_atomically(made / FILE, files.encode_json(state))
    for one in older:
        if one != place:
            files.remove_folder(one)


def read(folder: Path, number: int, identity: Identity) -> tuple[State, dict[str, Tensor]] | None:
    """Return the newest state of stage `number`, None where there is none yet.

    Raises InputError where it belongs to another run, naming the first thing that differs.
    """
    found = _states(folder, number)
    if not found:
        return None
    file = found[-1] / FILE
    state = files.decode_json(files.read_bytes(file), State, str(file))
    _check(folder, state.identity, identity)
    return state, {name: checkpoint.read_tensor(one) for name, one in tensorfile.in_folder(found[-1]).items()}


_MOMENTS = ("exp_avg", "exp_avg_sq")


def tensors_of(trained: Mapping[str, nn.Parameter], optimizer: Optimizer | None) -> dict[str, Tensor]:
    """Return what is trained, and the optimizer's moments of it, as a state holds them."""
    tensors: dict[str, Tensor] = {f"trained.{name}": one for name, one in trained.items()}
    for name, one in trained.items():
        if optimizer is not None and optimizer.state[one]:
            tensors |= {f"{key}.{name}": optimizer.state[one][key] for key in _MOMENTS}
    return tensors


def restore(
    trained: Mapping[str, nn.Parameter], optimizer: Optimizer, tensors: Mapping[str, Tensor], updates: int
) -> None:
    """Put back, in place, what `tensors_of` returned after so many updates."""
    with torch.no_grad():
        for name, one in trained.items():
            one.copy_(tensors[f"trained.{name}"])
    names = {one: name for name, one in trained.items()}
    whole = optimizer.state_dict()
    for index, one in enumerate(one for group in optimizer.param_groups for one in group["params"]):
        if f"{_MOMENTS[0]}.{names[one]}" in tensors:
            moments = {key: tensors[f"{key}.{names[one]}"] for key in _MOMENTS}
            whole["state"][index] = {"step": torch.tensor(float(updates)), **moments}
    optimizer.load_state_dict(whole)


def updates_of(optimizer: Optimizer) -> int:
    """Return how many steps an optimizer has taken, -1 where its parameters disagree: it was stopped in the middle."""
    counts = {int(one["step"]) for one in optimizer.state.values()} or {0}
    return counts.pop() if len(counts) == 1 else -1


def _states(folder: Path, number: int) -> list[Path]:
    """Return the folders with a whole state of a stage, the newest last."""
    return [path for path in sorted(folder.glob(f"stage-{number}-step-*")) if (path / FILE).is_file()]


def _check(folder: Path, was: Identity, now: Identity) -> None:
    if was == now:
        return
    for name in Stage.__struct_fields__:
        before, after = getattr(was.stage, name), getattr(now.stage, name)
        if before != after:
            raise InputError(
                f"{folder}: this run began with {name.replace('_', '-')} {before}, not {after}; resume it with the "
                "options it began with, or remove the folder to start again"
            )
    what = next(name for name in ("data", "model", "teacher") if getattr(was, name) != getattr(now, name))
    named = {"data": "data", "model": "weights", "teacher": "a teacher"}[what]
    raise InputError(f"{folder}: this run began with other {named}; remove the folder to start again")
