"""Between a transformers `config.json` and a ModelShape, without transformers: dicts and integers only.

What cannot be expressed exactly as a ModelShape is refused by name, never approximated. Three kinds of config leave
here: one that a stock class loads (`stock_config`), our own form for shapes that none can express (`own_config`), and
the one a model of any shape is constructed from before its Linears are resized (`skeleton_config`). All are copies.
"""

from __future__ import annotations

import copy
from typing import Any

import msgspec

from shortllama.config_facts import (
    BIASES_KEY,
    FAMILY_KEY,
    OWN_MODEL_TYPE,
    Config,
    family_of,
    field_of,
    has_window,
    layer_types,
)
from shortllama.errors import InputError, UnsupportedError
from shortllama.families import Family, lookup
from shortllama.plans import BlockKeep
from shortllama.shape import BlockShape, ModelShape

# Stock classes that run the mathematics of a Llama at any head count, and the biases that each has only together.
FOREIGN_BIASES: dict[str, tuple[tuple[str, ...], ...]] = {
    "mistral": (),
    "seed_oss": (("q", "k", "v"), ("o",), ("gate", "up", "down")),
}
_FOREIGN_ARCHITECTURES = {"mistral": "MistralForCausalLM", "seed_oss": "SeedOssForCausalLM"}
_SEED_OSS_SWITCHES = ("attention_bias", "attention_out_bias", "mlp_bias")
_LLAMA_LIKE = ("llama", "mistral", "qwen2")

# -- reading ----------------------------------------------------------------------------------------------------------


def shape_of(config: Config) -> ModelShape:
    """Return the shape that a config.json describes. Raises InputError or UnsupportedError naming the field."""
    if config.get("model_type") == OWN_MODEL_TYPE:
        return _own_shape(config)
    family = family_of(config)
    try:
        shape = _uniform_shape(config, family)
    except KeyError as error:
        raise InputError(f"config.json of a {family.model_type} model lacks {error.args[0]!r}") from error
    except (TypeError, ZeroDivisionError, ValueError) as error:
        raise InputError(f"config.json of a {family.model_type} model: sizes must be positive integers") from error
    window = layer_types(config)
    if window is not None and len(window) != len(shape.blocks):
        raise InputError(
            f"config.json: layer_types has {len(window)} entries, num_hidden_layers is {len(shape.blocks)}; "
            "they must be equal"
        )
    return shape


def _own_shape(config: Config) -> ModelShape:
    try:
        base = shape_of(config["base"])
        blocks = msgspec.convert(config["blocks"], tuple[BlockShape, ...])
    except KeyError as error:
        raise InputError(f"config.json of a {OWN_MODEL_TYPE} model lacks {error.args[0]!r}") from error
    except msgspec.ValidationError as error:
        raise InputError(f"config.json of a {OWN_MODEL_TYPE} model: blocks: {error}") from error
    if len(blocks) != len(base.blocks):
        raise InputError(f"config.json: {len(blocks)} entries in blocks, num_hidden_layers is {len(base.blocks)}")
    return msgspec.structs.replace(base, blocks=blocks, biases=tuple(config.get("biases", base.biases)))


def _uniform_shape(config: Config, family: Family) -> ModelShape:
    if family.mixer is not None:
        return _stack_shape(config, family)
    heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
    return ModelShape.uniform(
        family=family.model_type,
        vocabulary=int(config["vocab_size"]),
        hidden=hidden,
        head_dim=int(field_of(config, family, "head_dim") or hidden // heads),
        blocks=int(config["num_hidden_layers"]),
        query_heads=heads,
        kv_heads=int(field_of(config, family, "num_key_value_heads") or heads),
        neurons=int(config["intermediate_size"]),
        tied=bool(field_of(config, family, "tie_word_embeddings")),
        biases=_biases(config, family),
        qk_norm=bool(family.head_norms),
        norms_per_module=family.norms_per_module,
    )


def _stack_shape(config: Config, family: Family) -> ModelShape:
    """Return the shape of a stack whose blocks can only be removed whole."""

    def field(name: str) -> Any:
        return config[name] if name in config or name not in family.defaults else family.defaults[name]

    assert family.mixer is not None
    mixer = family.mixer(field)
    return ModelShape(
        family=family.model_type,
        vocabulary=int(config["vocab_size"]),
        hidden=int(config["hidden_size"]),
        head_dim=mixer.head_dim,
        tied=bool(field_of(config, family, "tie_word_embeddings")),
        blocks=(mixer.block,) * int(config["num_hidden_layers"]),
        final_norms=family.final_norms,
        entry_norms=2 if family.entry_norm else 0,
        mixer=mixer.tensors,
    )


def _biases(config: Config, family: Family) -> tuple[str, ...]:
    if BIASES_KEY in config:
        return tuple(config[BIASES_KEY])
    switched = [name for field, names in family.bias_switches.items() if config.get(field) for name in names]
    return tuple(dict.fromkeys((*family.biases, *switched)))


# -- writing ----------------------------------------------------------------------------------------------------------


def config_of(shape: ModelShape) -> Config:
    """Return the config.json fields for random weights of any `shape`: exact where the stock class can say it.

    Elsewhere the sizes are legal placeholders and the caller resizes modules (`surgery.build`).
    """
    family = lookup(shape.family)
    fields: Config = {
        "model_type": shape.family,
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "num_hidden_layers": len(shape.blocks),
        "tie_word_embeddings": shape.tied,
        "pad_token_id": None,  # the class's own may lie beyond this vocabulary
        **{field: set(names) <= set(shape.biases) for field, names in family.bias_switches.items()},
        **({"sliding_window": None, "use_sliding_window": False} if family.sliding_window else {}),
    }
    if family.mixer_fields is not None:
        return {**fields, **family.mixer_fields(shape)}
    if family.pattern is not None and not all(block.kv_heads for block in shape.blocks):
        fields["layer_types"] = ["full_attention"] * len(shape.blocks)  # cache layers of one kind, see pruned_config
    heads = _legal_heads(shape)
    placeholder = BlockShape(heads, heads, max((1, *(block.neurons for block in shape.blocks))))
    return skeleton_config({**fields, **_sizes(shape, placeholder)}, shape)


def pruned_config(config: Config, keep: tuple[BlockKeep, ...]) -> Config:
    """Return a copy of a base's config for the kept blocks: their number, and every per-layer list sliced.

    Sizes stay the base's. Raises UnsupportedError where an attention is removed between blocks of different kinds:
    transformers finds a cache layer's kind by block number, and cache layers are numbered over attentions only.
    """
    pruned = copy.deepcopy(config)
    kinds = layer_types(config)
    pruned["num_hidden_layers"] = len(keep)
    if kinds is not None:
        left = [kinds[one.index] for one in keep]
        gone = [one.index for one in keep if one.kv_groups == ""]
        if gone and len(set(left)) > 1:
            raise UnsupportedError(
                f"the attention of block {gone[0]} cannot be removed alone: this model mixes {' and '.join(set(left))};"
                " remove the whole block"
            )
        pruned["layer_types"] = left
    return pruned


def skeleton_config(config: Config, shape: ModelShape) -> Config:
    """Return `config` as the stock class of `shape.family` accepts it: with `shape`'s own sizes where it can be exact.

    `config` is the base's, with as many blocks as `shape`. Where it cannot, the base's (legal) sizes stay.
    """
    exact = _same_family(config, shape)
    if exact is not None:
        return {**exact, **lookup(shape.family).steady}
    legal = {**copy.deepcopy(config), "model_type": shape.family, "head_dim": shape.head_dim}
    for name in (FAMILY_KEY, BIASES_KEY):
        legal.pop(name, None)
    check_heads(shape)
    heads, groups = next(iter(_head_counts(shape)), (0, 0))
    if lookup(shape.family).one_head_count and heads:
        legal |= {"num_attention_heads": heads, "num_key_value_heads": groups}
    elif not _accepts_heads(lookup(shape.family), shape.hidden, int(legal["num_attention_heads"])):
        legal |= {"num_attention_heads": _legal_heads(shape), "num_key_value_heads": _legal_heads(shape)}
    return legal


def _head_counts(shape: ModelShape) -> set[tuple[int, int]]:
    return {(block.query_heads, block.kv_heads) for block in shape.blocks if block.kv_heads}


def check_heads(shape: ModelShape) -> None:
    """Raise UnsupportedError for blocks of different head counts in a family whose class has one for all blocks."""
    if lookup(shape.family).one_head_count and len(_head_counts(shape)) > 1:
        heads = sorted(query for query, _ in _head_counts(shape))
        raise UnsupportedError(
            f"{shape.family} reads one number of heads for all blocks from its config, this plan leaves "
            f"{', '.join(map(str, heads))}; keep as many heads in every block (--protect 0,0; flap: --structure UL-UM)"
        )


def stock_config(config: Config, shape: ModelShape) -> Config | None:
    """Return the config with which a stock class loads weights of `shape`, or None where none can express it.

    Of the base's family where its class accepts the sizes, else a class that runs the same mathematics and takes any
    head count (`mistral` without biases, `seed_oss` with them), marked with the family that our own loader uses.
    """
    exact = _same_family(config, shape)
    if exact is not None or not _is_plain(shape) or shape.family not in _LLAMA_LIKE or has_window(config):
        return exact
    for model_type, groups in FOREIGN_BIASES.items():
        present = [set(names) <= set(shape.biases) for names in groups]
        grouped = {name for names, here in zip(groups, present, strict=True) if here for name in names}
        if grouped == set(shape.biases):
            return _foreign(config, shape, model_type, present)
    return None


def _foreign(config: Config, shape: ModelShape, model_type: str, present: list[bool]) -> Config:
    """Return the config of `shape` as `model_type`, with the bias groups that are `present`."""
    dropped = ("attention_bias", "mlp_bias", "pretraining_tp", "layer_types", "use_sliding_window", "max_window_layers")
    kept = {name: copy.deepcopy(value) for name, value in config.items() if name not in dropped}
    seed_oss = {
        "residual_dropout": 0.0,
        "attention_dropout": 0.0,
        **dict(zip(_SEED_OSS_SWITCHES, present, strict=False)),
    }
    return {
        **kept,
        **_sizes(shape, shape.blocks[0]),
        **(seed_oss if model_type == "seed_oss" else {}),
        "sliding_window": None,
        "model_type": model_type,
        "architectures": [_FOREIGN_ARCHITECTURES[model_type]],
        FAMILY_KEY: shape.family,
        **({BIASES_KEY: list(shape.biases)} if shape.biases else {}),
    }


def own_config(config: Config, shape: ModelShape) -> Config:
    """Return our own form: `config` (the base's, with as many blocks as `shape`) and every block's sizes."""
    check_heads(shape)
    own: Config = {
        "model_type": OWN_MODEL_TYPE,
        "base": copy.deepcopy(config),
        "blocks": [msgspec.to_builtins(block) for block in shape.blocks],
        "biases": list(shape.biases),
    }
    return own | {name: config[name] for name in ("dtype",) if name in config}


def finished(config: Config, dtype: str) -> Config:
    """Return a config as it is written: with its dtype under today's name, without the path it was loaded from."""
    kept = {name: value for name, value in config.items() if name not in ("torch_dtype", "_name_or_path")}
    base = {"base": finished(config["base"], dtype)} if "base" in config else {}
    return {**kept, **base, "dtype": dtype}


def base_config(config: Config) -> Config:
    """Return the stock part of a config.json: `base` of our own form, any other as it is."""
    return config["base"] if config.get("model_type") == OWN_MODEL_TYPE else config


def _is_plain(shape: ModelShape) -> bool:
    """Whether all blocks are alike and whole: what stock modelling code can express at all."""
    if shape.mixer:
        return True
    return shape.is_uniform and bool(shape.blocks) and min(shape.blocks[0].query_heads, shape.blocks[0].neurons) > 0


def _same_family(config: Config, shape: ModelShape) -> Config | None:
    family = lookup(shape.family)
    exact = {**copy.deepcopy(config), **(_sizes(shape, shape.blocks[0]) if shape.blocks else {})}
    exact["model_type"] = shape.family
    for field, names in family.bias_switches.items():
        if bool(exact.get(field)) != (set(names) <= set(shape.biases)):
            exact[field] = not exact.get(field)
    expressible = (
        _is_plain(shape)
        and config.get("model_type") == shape.family
        and (bool(shape.mixer) or _accepts_heads(family, shape.hidden, shape.blocks[0].query_heads))
        and set(_biases(exact, family)) == set(shape.biases)
    )
    return exact if expressible else None


def _accepts_heads(family: Family, hidden: int, heads: int) -> bool:
    return family.any_heads or (heads > 0 and hidden % heads == 0)


def _legal_heads(shape: ModelShape) -> int:
    """A head count that every stock class accepts at this hidden size."""
    return shape.hidden // shape.head_dim if shape.hidden % shape.head_dim == 0 else 1


def _sizes(shape: ModelShape, block: BlockShape) -> Config:
    if shape.mixer:
        return {}
    return {
        "head_dim": shape.head_dim,
        "num_attention_heads": block.query_heads,
        "num_key_value_heads": block.kv_heads,
        "intermediate_size": block.neurons,
    }
