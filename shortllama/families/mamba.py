"""Mamba, FalconMamba and Mamba 2: state-space mixers without attention. Their blocks are removed whole only.

A block counts as one without attention whose neurons are the mixer's inner channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import msgspec

from shortllama.families.family import Family, Mixer
from shortllama.shape import BlockShape, ModelShape

Tensors = list[tuple[str, tuple[int, ...]]]


def _mixer(field: Callable[[str], Any]) -> Mixer:
    hidden, states, width = (int(field(n)) for n in ("hidden_size", "state_size", "conv_kernel"))
    inner = int(field("expand") * hidden)
    rank = math.ceil(hidden / 16) if field("time_step_rank") == "auto" else int(field("time_step_rank"))
    return Mixer(
        (
            ("norm.weight", (hidden,)),
            ("mixer.A_log", (inner, states)),
            ("mixer.D", (inner,)),
            *_linear("mixer.in_proj", (2 * inner, hidden), field("use_bias")),
            *_linear("mixer.conv1d", (inner, 1, width), field("use_conv_bias")),
            *_linear("mixer.x_proj", (rank + 2 * states, inner), False),
            *_linear("mixer.dt_proj", (inner, rank), True),
            *_linear("mixer.out_proj", (hidden, inner), field("use_bias")),
        ),
        BlockShape(0, 0, inner),
    )


def _fields(shape: ModelShape) -> dict[str, Any]:
    tensors = dict(shape.mixer)
    inner, states = tensors["mixer.A_log"]
    return {
        "state_size": states,
        "conv_kernel": tensors["mixer.conv1d.weight"][2],
        "expand": inner // shape.hidden,
        "time_step_rank": tensors["mixer.dt_proj.weight"][1],
        "use_bias": "mixer.in_proj.bias" in tensors,
        "use_conv_bias": "mixer.conv1d.bias" in tensors,
    }


def _mixer2(field: Callable[[str], Any]) -> Mixer:
    hidden, states, width = (int(field(n)) for n in ("hidden_size", "state_size", "conv_kernel"))
    inner, heads, groups = int(field("expand") * hidden), int(field("num_heads")), int(field("n_groups"))
    mixed = inner + 2 * groups * states
    return Mixer(
        (
            ("norm.weight", (hidden,)),
            *((f"mixer.{name}", (heads,)) for name in ("dt_bias", "A_log", "D")),
            ("mixer.norm.weight", (inner,)),
            *_linear("mixer.in_proj", (inner + mixed + heads, hidden), field("use_bias")),
            *_linear("mixer.conv1d", (mixed, 1, width), field("use_conv_bias")),
            *_linear("mixer.out_proj", (hidden, inner), field("use_bias")),
        ),
        BlockShape(0, 0, inner),
    )


def _fields2(shape: ModelShape) -> dict[str, Any]:
    """Return fields that give these tensors: groups and states per group are known as a product, so one group."""
    tensors = dict(shape.mixer)
    (inner,), (heads,) = tensors["mixer.norm.weight"], tensors["mixer.D"]
    return {
        "state_size": (tensors["mixer.conv1d.weight"][0] - inner) // 2,
        "n_groups": 1,
        "conv_kernel": tensors["mixer.conv1d.weight"][2],
        "expand": inner // shape.hidden,
        "num_heads": heads,
        "head_dim": inner // heads,
        "use_bias": "mixer.in_proj.bias" in tensors,
        "use_conv_bias": "mixer.conv1d.bias" in tensors,
    }


def _linear(name: str, dimensions: tuple[int, ...], bias: object) -> Tensors:
    return [(f"{name}.weight", dimensions), *([(f"{name}.bias", dimensions[:1])] if bias else [])]


_COMMON = {"expand": 2, "conv_kernel": 4, "use_bias": False, "use_conv_bias": True}

MAMBA = Family(
    model_type="mamba",
    defaults={**_COMMON, "state_size": 16, "time_step_rank": "auto", "tie_word_embeddings": True},
    mixer=_mixer,
    mixer_fields=_fields,
    sdpa=False,
    cache="cache_params",
    outgoing=("mixer.out_proj",),
    blocks="backbone.layers",
    attention="mixer",
    mlp=None,
    attention_norms=("norm",),
    mlp_norms=(),
    projections={},
    embedding="backbone.embeddings",
    rotary=None,
    final_norm="backbone.norm_f",
)

FALCON_MAMBA = msgspec.structs.replace(MAMBA, model_type="falcon_mamba")

MAMBA2 = msgspec.structs.replace(
    MAMBA,
    model_type="mamba2",
    defaults={**_COMMON, "state_size": 128, "n_groups": 8, "num_heads": 128},
    mixer=_mixer2,
    mixer_fields=_fields2,
)
