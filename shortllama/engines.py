"""Which engines can take a checkpoint as it is, by its shape and config.json alone. Pure.

What is said of an engine was read in its source: transformers 5.23, vLLM 0.11 to main, and the llama.cpp of
llama-cpp-python 0.3.36.
"""

from __future__ import annotations

import msgspec

from shortllama import configs
from shortllama.errors import UnsupportedError
from shortllama.exporting import llamacpp
from shortllama.families import lookup
from shortllama.shape import ModelShape

_NOT_IN_VLLM = ("rwkv",)


class Fit(msgspec.Struct, frozen=True):
    """Whether an engine can take a checkpoint, and why: how it is loaded, or what stands in the way."""

    engine: str
    can: bool
    why: str


def fits(shape: ModelShape, config: configs.Config) -> tuple[Fit, ...]:
    """Return one line for each engine: transformers, vLLM, llama.cpp. `config` is the folder's config.json."""
    return (_transformers(shape, config), _vllm(shape, config), _llamacpp(shape, config))


def _own_form(shape: ModelShape) -> str:
    """What keeps a shape from every stock class."""
    if not all(block.query_heads and block.neurons for block in shape.blocks):
        what = "blocks without attention or FFN"
    elif not shape.is_uniform:
        what = "blocks of different widths"
    else:
        what = f"{shape.blocks[0].query_heads} heads with biases {', '.join(shape.biases) or 'none'}"
    return f"no stock class has {what}; export --to padded makes one that fits"


def _transformers(shape: ModelShape, config: configs.Config) -> Fit:
    form = str(config.get("model_type"))
    if form == configs.OWN_MODEL_TYPE:
        return Fit("transformers", False, f"{_own_form(shape)}, shortllama.load takes it as it is")
    if lookup(shape.family).cache is None:
        return Fit("transformers", True, f"as {form}, with use_cache=False: with its cache it decodes something else")
    return Fit("transformers", True, f"as {form}")


def _vllm(shape: ModelShape, config: configs.Config) -> Fit:
    form = str(config.get("model_type"))
    if form == configs.OWN_MODEL_TYPE:
        return Fit("vLLM", False, _own_form(shape))
    if shape.family in _NOT_IN_VLLM:
        return Fit("vLLM", False, f"it has no {shape.family}")
    if form == "seed_oss" and set(shape.biases) != {"q", "k", "v"}:
        return Fit("vLLM", False, f"its seed_oss has biases on q, k, v only, this model on {', '.join(shape.biases)}")
    attends = any(block.kv_heads for block in shape.blocks)
    if attends and (shape.head_dim % 8 or not 32 <= shape.head_dim <= 256):
        return Fit(
            "vLLM", False, f"its attention kernels want heads of 32 to 256 in steps of 8, these are {shape.head_dim}"
        )
    return Fit("vLLM", True, f"as {form}")


def _llamacpp(shape: ModelShape, config: configs.Config) -> Fit:
    try:
        llamacpp.refuse(shape, configs.base_config(config))
        _, after = llamacpp.expressible(shape)
    except UnsupportedError as error:
        return Fit("llama.cpp", False, str(error))
    name = llamacpp.architecture(after)
    return Fit("llama.cpp", True, f"as {name}, by export --to gguf, where that knows its tokenizer")
