"""Shapes with names: published models, and the pruned models of Shortened LLaMA's Table 1 (arXiv 2402.02834).

A pruned row is a blind plan's text, so a row and the same text typed by a user are one thing. No weights are involved.
"""

from __future__ import annotations

import difflib
from functools import lru_cache

from shortllama import blind
from shortllama.errors import InputError
from shortllama.plans import Plan, shape_after
from shortllama.shape import ModelShape

_uniform = ModelShape.uniform

_LLAMA_7B = _uniform(vocabulary=32000, hidden=4096, head_dim=128, blocks=32, query_heads=32, kv_heads=32, neurons=11008)
_LLAMA_13B = _uniform(
    vocabulary=32000, hidden=5120, head_dim=128, blocks=40, query_heads=40, kv_heads=40, neurons=13824
)

# Sizes are those of the config.json each model was published with.
MODELS: dict[str, ModelShape] = {
    "llama-7b": _LLAMA_7B,
    "llama-13b": _LLAMA_13B,
    "llama-2-7b": _LLAMA_7B,
    "llama-3-8b": _uniform(
        vocabulary=128256, hidden=4096, head_dim=128, blocks=32, query_heads=32, kv_heads=8, neurons=14336
    ),
    "llama-3.2-1b": _uniform(
        vocabulary=128256, hidden=2048, head_dim=64, blocks=16, query_heads=32, kv_heads=8, neurons=8192, tied=True
    ),
    "mistral-7b": _uniform(
        family="mistral",
        vocabulary=32000,
        hidden=4096,
        head_dim=128,
        blocks=32,
        query_heads=32,
        kv_heads=8,
        neurons=14336,
    ),
    "qwen2.5-7b": _uniform(
        family="qwen2",
        vocabulary=152064,
        hidden=3584,
        head_dim=128,
        blocks=28,
        query_heads=28,
        kv_heads=4,
        neurons=18944,
        biases=("q", "k", "v"),
    ),
    "qwen3-8b": _uniform(
        family="qwen3",
        vocabulary=151936,
        hidden=4096,
        head_dim=128,
        blocks=36,
        query_heads=32,
        kv_heads=8,
        neurons=12288,
        qk_norm=True,
    ),
}

# Vicuna is LLaMA fine-tuned: the same shapes, and the paper's Table 1 gives one row for both.
ALIASES = {
    "vicuna-7b": "llama-7b",
    "vicuna-13b": "llama-13b",
    "vicuna-7b-v1.3": "llama-7b",
    "vicuna-13b-v1.3": "llama-13b",
}

# Table 1. The number in a name is the paper's label (percent of parameters removed; blocks left for depth), not the
# ratio given to the method. FLAP's means and deviations are over blocks; its compensation biases are not counted.
ROWS: dict[str, str] = {
    "llama-7b/wanda-sp-20": "width:26x8807",
    "llama-7b/wanda-sp-27": "width:23x7816",
    "llama-7b/wanda-sp-35": "width:21x7156",
    "llama-7b/flap-20": "flap:26.9±7.5x8577.4±2078.4",
    "llama-7b/flap-27": "flap:24.6±8.6x7497.1±2358.0",
    "llama-7b/flap-35": "flap:23.0±8.8x6781.1±2440.6",
    "llama-7b/llm-pruner-20": "width:24x8256@4-30",
    "llama-7b/llm-pruner-27": "width:21x7155@4-30",
    "llama-7b/llm-pruner-35": "width:18x6054@4-30",
    "llama-7b/depth-26": "depth:26",
    "llama-7b/depth-23": "depth:23",
    "llama-7b/depth-21": "depth:21",
    "llama-13b/wanda-sp-21": "width:32x11060",
    "llama-13b/wanda-sp-29": "width:29x9954",
    "llama-13b/wanda-sp-37": "width:26x8710",
    "llama-13b/flap-21": "flap:33.7±8.9x10778.7±2316.0",
    "llama-13b/flap-29": "flap:31.1±10.6x9570.8±2601.0",
    "llama-13b/flap-37": "flap:27.5±11.3x8326.6±2874.9",
    "llama-13b/llm-pruner-21": "width:30x10368@4-38",
    "llama-13b/llm-pruner-29": "width:26x8985@4-38",
    "llama-13b/llm-pruner-37": "width:22x7603@4-38",
    "llama-13b/depth-32": "depth:32",
    "llama-13b/depth-29": "depth:29",
    "llama-13b/depth-25": "depth:25",
}


def names() -> tuple[str, ...]:
    """Return every name: the models, their aliases, and the rows of Table 1."""
    return (*MODELS, *ALIASES, *ROWS)


def knows(name: str) -> bool:
    """Return whether the model part of `name` is in the catalogue."""
    return name.partition("/")[0] in MODELS or name.partition("/")[0] in ALIASES


def lookup(name: str) -> ModelShape:
    """Return the shape of a model, a row of Table 1, or MODEL/PLAN with a blind plan such as `llama-7b/depth:26`.

    Raises InputError with the nearest names where there is none.
    """
    model, slash, _ = name.partition("/")
    if not knows(name):
        raise InputError(f"{name!r} is not in the catalogue; {near(name)}")
    plan = plan_of(name) if slash else None
    shape = MODELS[ALIASES.get(model, model)]
    return shape if plan is None else shape_after(shape, plan.keep)


@lru_cache(maxsize=256)
def plan_of(name: str) -> Plan:
    """Return the blind plan behind a name of the form MODEL/ROW or MODEL/PLAN, seed 0. Raises InputError."""
    given, _, text = name.partition("/")
    model = ALIASES.get(given, given)
    row = ROWS.get(f"{model}/{text}", text)
    if ":" not in row:
        raise InputError(
            f"{name!r} is neither in the catalogue nor MODEL/PLAN, as {model}/depth:26; {near(f'{model}/{text}')}"
        )
    return blind.parse(row, model=model, shape=MODELS[model])


def near(name: str) -> str:
    """Return a hint: the catalogue names close to `name`, or how to list them."""
    close = difflib.get_close_matches(name.lower(), names(), n=3, cutoff=0.7)
    return f"did you mean {' or '.join(close)}?" if close else "`shortllama shapes` lists it"
