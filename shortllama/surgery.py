"""Models of any shape, by one construction path: the stock class on meta, its Linears resized, tensors put in.

Random weights (`build`), pruned weights (`apply`) and weights from files (`checkpoint.load`) differ only in where the
tensors come from, so every subject of a comparison runs the same modelling code. Knows nothing of files or criteria.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

import msgspec
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from shortllama import configs, layout, quantisation
from shortllama.errors import InputError, PlanError, UnsupportedError
from shortllama.families import Adapter, Family, adapter, check_steady, lookup
from shortllama.plans import Plan, check_base, shape_after
from shortllama.shape import BlockShape, ModelShape, item_bytes

ATTENTIONS = ("sdpa", "eager")

# Set on models whose weights are random: the only ones with memory that a blind plan may be applied to.
_RANDOM = "shortllama_random_weights"


def build(
    shape: ModelShape,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    seed: int = 0,
    attention: str = "sdpa",
    std: float = 0.02,
) -> PreTrainedModel:
    """Return a model of `shape` with normal(0, `std`) weights and biases, norms that only normalize, in eval mode.

    On device "meta" it holds no weights. Equal arguments give equal weights on one kind of device, rounded where the
    shape says that they are quantised.
    """
    check_device(device)
    hold = quantisation.holder(shape, dtype, device)
    model = skeleton(shape, configs.config_of(shape), dtype=dtype, attention=attention)
    setattr(model, _RANDOM, True)
    generator = None if device == "meta" else torch.Generator(device).manual_seed(seed)

    family = lookup(shape.family)

    def drawn(name: str, dimensions: tuple[int, ...]) -> Tensor:
        tensor = torch.empty(dimensions, dtype=torch_dtype(dtype), device=device)
        if name.endswith("weight") and family.norm_mark in name.rsplit(".", 2)[-2]:
            return tensor.fill_(family.norm_weight)
        return hold(name, tensor.normal_(0, std, generator=generator))

    return put(model, {name: drawn(name, size) for name, size in layout.tensors(shape).items()}, device)


def apply(plan: Plan, model: PreTrainedModel, *, compensation: Mapping[str, Tensor] | None = None) -> PreTrainedModel:
    """Return a new model with what `plan` keeps of `model`; the same code on meta and on real weights.

    `model` and its config are untouched: all tensors are copies. KV-cache layers (`layer_idx`) are renumbered over the
    blocks that have attention. `compensation` holds bias vectors (h,) by the result's parameter name
    (model.layers.0.self_attn.o_proj.bias); a projection that gets one anywhere gets one everywhere, zero elsewhere.

    Raises PlanError for a plan of another base, a blind plan on real weights, or missing compensation.
    """
    base = shape_of(model)
    check_base(plan, base)
    check_steady(model)
    if plan.blind and not is_weightless(model):
        raise PlanError(
            f"plan of method {plan.method!r} is blind (it reproduces a shape, its indices mean nothing); it applies to "
            "shapes and random weights only; make a plan from scores for real weights"
        )
    if (plan.compensation is None) != (compensation is None):
        raise PlanError(
            f"plan asks for compensation {plan.compensation!r}, {'no' if compensation is None else 'some'} biases were "
            "given; give exactly what the plan names"
        )
    after = shape_after(base, plan.keep)
    after = with_biases(after, compensation or {})
    config = configs.pruned_config(configs.base_config(config_dict(model)), plan.keep)
    device = next(model.parameters()).device
    pruned = skeleton(after, config, dtype=dtype_name(model), attention=attention_name(model))
    source = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        taken = {name: _take(source[one.source], one) for name, one in layout.slices(base, plan.keep).items()}
        _compensate(taken, after, compensation or {})
    if hasattr(model, _RANDOM):
        setattr(pruned, _RANDOM, True)
    pruned.generation_config = copy.deepcopy(model.generation_config)
    return put(pruned, taken, str(device)).train(model.training)


# -- construction -----------------------------------------------------------------------------------------------------


def skeleton(shape: ModelShape, config: configs.Config, *, dtype: str, attention: str) -> PreTrainedModel:
    """Return a model of `shape` on meta: the stock class of its family from a copy of `config`, Linears resized.

    `config` has as many blocks as `shape`; its sizes need not be `shape`'s. Tensors are put in by `put`.
    """
    if attention not in ATTENTIONS:
        raise InputError(f"attention {attention!r} is unknown; choose one of {', '.join(ATTENTIONS)}")
    attention = attention if lookup(shape.family).sdpa else "eager"
    fields = configs.skeleton_config(config, shape)
    made = AutoConfig.for_model(fields.pop("model_type"), **_decoded(fields))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(made, dtype=torch_dtype(dtype), attn_implementation=attention)
        if not shape.mixer:  # made whole, with cache layers numbered by the class itself
            _resize(adapter(model), shape)
    return model.eval()


def _decoded(value: Any) -> Any:
    """Return a config's values with the numbers that JSON lacks, which transformers writes as {"__float__": x}."""
    if isinstance(value, dict):
        marked = value.get("__float__")
        return float(marked) if marked is not None else {name: _decoded(one) for name, one in value.items()}
    return [_decoded(one) for one in value] if isinstance(value, list) else value


def put(model: PreTrainedModel, tensors: Mapping[str, Tensor], device: str) -> PreTrainedModel:
    """Fill a skeleton with one tensor for each of its parameters, by name; returns `model`, changed in place.

    Tied heads are tied again, and the rotary buffers, which no checkpoint holds, are computed on `device`.
    """
    result = model.load_state_dict(tensors, strict=False, assign=True)
    assert not result.unexpected_keys, result.unexpected_keys
    model.tie_weights()
    missing = set(result.missing_keys) - set(getattr(model, "all_tied_weights_keys", {}))
    assert not missing, missing
    parts = adapter(model)
    if parts.family.rotary is not None:
        parent, _, leaf = parts.family.rotary.rpartition(".")
        made: Any = type(parts.rotary)
        with torch.device("meta" if device == "meta" else "cpu"):
            rotary = made(model.config)
        setattr(model.get_submodule(parent), leaf, rotary.to(device))
    if device != "meta":
        _compute_constants(model, device)
    return model


def _compute_constants(model: PreTrainedModel, device: str) -> None:
    """Put in the constants that some classes keep as buffers and no checkpoint holds."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if not buffer.is_meta:
                continue
            if name == "embed_scale":  # Gemma scales its embeddings
                module.embed_scale = torch.tensor(module.scalar_embed_scale, device=device)
            else:
                assert type(module).__name__ == "FalconMambaWeightlessRMSNorm", (type(module), name)
                setattr(module, name, torch.ones(buffer.shape, dtype=buffer.dtype, device=device))


def _resize(parts: Adapter, shape: ModelShape) -> None:
    """Give every block of a skeleton its sizes, and number KV-cache layers over the blocks that have attention.

    Cache layers must be contiguous from 0: transformers asks layer 0 for the length of the whole cache.
    """
    cache_layer = 0
    for index, size in enumerate(shape.blocks):
        if not (size.query_heads and size.neurons):
            parts.blocks[index] = PartialBlock(parts.family, parts.blocks[index], size)
        block = parts.blocks[index]
        for name, linear in parts.projections(block).items():
            _replace_linear(block, parts.family.projections[name], linear, _features(shape, size, name))
        attention, mlp = parts.attention(block), parts.mlp(block)
        if attention is not None:
            vars(attention).update(layer_idx=cache_layer, num_key_value_groups=size.query_heads // size.kv_heads)
            if hasattr(attention, "num_key_value_heads"):
                vars(attention).update(num_key_value_heads=size.kv_heads)
            cache_layer += 1
        if mlp is not None:
            vars(mlp).update(intermediate_size=size.neurons)


def _features(shape: ModelShape, size: BlockShape, name: str) -> tuple[int, int, bool]:
    """Return a projection's input size, output size, and whether it has a bias."""
    queries, keys = size.query_heads * shape.head_dim, size.kv_heads * shape.head_dim
    fused = {"qkv": queries + 2 * keys, "gate_up": 2 * size.neurons}
    inside = {"q": queries, "k": keys, "v": keys, "o": queries, **fused}.get(name, size.neurons)
    bias = name in shape.biases
    return (inside, shape.hidden, bias) if name in ("o", "down") else (shape.hidden, inside, bias)


def _replace_linear(block: nn.Module, path: str, linear: nn.Linear, wanted: tuple[int, int, bool]) -> None:
    if (linear.in_features, linear.out_features, linear.bias is not None) == wanted:
        return
    inputs, outputs, bias = wanted
    block.set_submodule(path, nn.Linear(inputs, outputs, bias=bias, device="meta", dtype=linear.weight.dtype))


class PartialBlock(GradientCheckpointingLayer):
    """A pre-norm decoder block without its attention, its FFN, or both; a removed module's norms are gone too.

    Runs the stock modules it was made from, under their own names, and nothing in place of the removed ones: adding
    a zero would cost a kernel launch that the comparison would measure.
    """

    def __init__(self, family: Family, block: nn.Module, size: BlockShape) -> None:
        super().__init__()
        self.has_attention, self.has_mlp = bool(size.query_heads), bool(size.neurons)
        assert family.mlp is not None
        self.attention_names = (family.attention_norms[0], family.attention, *family.attention_norms[1:])
        self.mlp_names = (family.mlp_norms[0], family.mlp, *family.mlp_norms[1:])
        for names, here in ((self.attention_names, self.has_attention), (self.mlp_names, self.has_mlp)):
            for name in names:
                self.register_module(name, getattr(block, name) if here else None)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Return the hidden states (B, T, h) after what is left of the block; arguments as in the stock block."""
        if self.has_attention:
            norm, attention, *after = (getattr(self, name) for name in self.attention_names)
            attended, _ = attention(hidden_states=norm(hidden_states), **kwargs)
            for norm in after:
                attended = norm(attended)
            hidden_states = hidden_states + attended
        if self.has_mlp:
            norm, mlp, *after = (getattr(self, name) for name in self.mlp_names)
            output = mlp(norm(hidden_states))
            for norm in after:
                output = norm(output)
            hidden_states = hidden_states + output
        return hidden_states


# -- slicing ----------------------------------------------------------------------------------------------------------


def _take(tensor: Tensor, one: layout.Slice) -> Tensor:
    """Return a contiguous copy of the rows and columns of `tensor` that a slice names."""
    taken = tensor.detach()
    for axis, kept in ((0, one.rows), (1, one.columns)):
        if kept is not None:
            taken = taken.index_select(axis, torch.tensor(kept, dtype=torch.long, device=tensor.device))
    return taken.clone() if taken.data_ptr() == tensor.data_ptr() else taken


def with_biases(shape: ModelShape, compensation: Mapping[str, Any]) -> ModelShape:
    """Return `shape` with biases on the projections that `compensation` names by parameter."""
    paths = {f".{path}.bias": short for short, path in lookup(shape.family).projections.items()}
    extra = [short for suffix, short in paths.items() if any(name.endswith(suffix) for name in compensation)]
    return msgspec.structs.replace(shape, biases=tuple(dict.fromkeys((*shape.biases, *extra))))


def _compensate(taken: dict[str, Tensor], after: ModelShape, compensation: Mapping[str, Tensor]) -> None:
    """Add the bias vectors to `taken`, in place; biases that `after` has and nobody gave are zero."""
    expected = layout.tensors(after)
    wrong = [name for name, bias in compensation.items() if tuple(bias.shape) != expected.get(name)]
    if wrong:
        raise PlanError(
            f"compensation {wrong[0]!r} has dimensions {tuple(compensation[wrong[0]].shape)}, the pruned model expects "
            f"{expected.get(wrong[0], 'no such parameter')}"
        )
    like = next(iter(taken.values()))
    for name in expected.keys() - taken.keys():
        taken[name] = torch.zeros(expected[name], dtype=like.dtype, device=like.device)
    for name, bias in compensation.items():
        taken[name] = taken[name] + bias.to(like)


# -- what a model is --------------------------------------------------------------------------------------------------


def shape_of(model: PreTrainedModel) -> ModelShape:
    """Return the shape of a model as its modules are, resized or not. Raises UnsupportedError for unknown families."""
    parts = adapter(model)
    outside = configs.shape_of(config_dict(model))
    if outside.mixer:
        return msgspec.structs.replace(outside, blocks=outside.blocks[:1] * len(parts.blocks))
    blocks = tuple(_block_shape(parts, block) for block in parts.blocks)
    present = [name for block in parts.blocks for name, one in parts.projections(block).items() if one.bias is not None]
    biases = tuple(dict.fromkeys((*outside.biases, *present)))
    return msgspec.structs.replace(outside, blocks=blocks, biases=biases)


def config_dict(model: PreTrainedModel) -> configs.Config:
    """Return a model's config as config.json would hold it."""
    return json.loads(model.config.to_json_string())


def is_weightless(model: PreTrainedModel) -> bool:
    """Whether a model has no weights that mean anything: on meta, or random ones from `build`."""
    return hasattr(model, _RANDOM) or all(parameter.is_meta for parameter in model.parameters())


def check_device(name: str) -> None:
    """Raise UnsupportedError unless torch can use the device "cpu", "meta", "cuda" or "cuda:N" on this machine."""
    kind, _, index = name.partition(":")
    if kind == "cuda":
        seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
        usable = int(index or 0) < seen if (index or "0").isdecimal() else False
    else:
        seen, usable = 0, name in ("cpu", "meta")
    if not usable:
        raise UnsupportedError(
            f"device {name!r} cannot be used: torch {torch.__version__} sees {seen} CUDA devices here; "
            "give cpu, or cuda:N with N below that"
        )


def torch_dtype(name: str) -> torch.dtype:
    """Return torch's dtype of a name of `shape.ITEM_BYTES`. Raises InputError for any other."""
    item_bytes(name)
    return getattr(torch, name)


def dtype_name(model: PreTrainedModel) -> str:
    """Return the dtype of a model's weights by name."""
    return str(adapter(model).embedding.weight.dtype).removeprefix("torch.")


def attention_name(model: PreTrainedModel) -> str:
    """Return which attention implementation a model runs, by transformers' name."""
    return str(model.config._attn_implementation)


def _block_shape(parts: Adapter, block: nn.Module) -> BlockShape:
    found = parts.projections(block)
    queries = found["o"].in_features if "o" in found else 0
    keys = found["k"].out_features if "k" in found else 0
    if "qkv" in found:
        keys = (found["qkv"].out_features - queries) // 2
    neurons = found["down"].in_features if "down" in found else 0
    return BlockShape(queries // parts.head_dim, keys // parts.head_dim, neurons)
