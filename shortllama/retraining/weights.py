"""A model's weights as retraining needs them: their dtypes, what tells two models apart, blocks computed twice."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def cast(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Give parameters their dtypes, in place. Buffers stay: rotary frequencies are float32 in every model."""
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtypes[name])


def fingerprint(model: nn.Module) -> str:
    """Return 16 hexadecimal digits over names, sizes and some values of each parameter, to tell models apart."""
    whole = hashlib.sha256()
    for name, parameter in model.named_parameters():
        few = parameter.detach().flatten()[:: max(1, parameter.numel() // 64)][:64]
        whole.update(f"{name} {tuple(parameter.shape)}".encode())
        whole.update(few.float().cpu().numpy().tobytes())
    return whole.hexdigest()[:16]


def recompute_blocks(model: Any, on: bool) -> None:
    """Switch checkpointing of blocks on or off, by the name that this release of transformers has for it."""
    named = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if on:
        getattr(model, f"{named}_checkpointing_enable")({"use_reentrant": False})
    else:
        getattr(model, f"{named}_checkpointing_disable")()
