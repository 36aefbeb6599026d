"""Weights held as integers of 8 or 4 bits (extra `quant`): torchao's weight-only configs, for models of every shape.

A model's name with +int8 or +int4 behind it (reference+int8, ./pruned+int4) is that model with the matrices of its
blocks rounded to the nearest level, in memory, while they are read: the files stay as they are, and no more than one
matrix is ever held twice. Embedding, output head, norms and biases stay as they are too: a tied head is the embedding,
and rounding the head costs most quality for the least memory. Knows no method, task or runtime; imports torch and
torchao only when weights are quantised.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from shortllama import layout
from shortllama.errors import UnsupportedError
from shortllama.families import lookup
from shortllama.shape import ModelShape

if TYPE_CHECKING:
    from torch import Tensor


def groups(shape: ModelShape) -> dict[str, int | None]:
    """Return, for each matrix in the blocks by parameter name, how many of its inputs share a scale.

    All of them in int8; None where a matrix stays as it is, because the int4 kernels have no such size.
    """
    family = lookup(shape.family)
    parts = {"qkv": "q", "gate_up": "gate"}
    paths = {f"{path}.weight": parts.get(short, short) for short, path in family.projections.items()}
    found: dict[str, int | None] = {}
    for name in layout.tensors(shape):
        index, _, path = name.removeprefix(f"{family.blocks}.").partition(".")
        matrices = shape.matrices(shape.blocks[int(index)]) if index.isdecimal() else {}
        matrix = matrices.get(path if shape.mixer else paths.get(path, ""))
        if matrix is not None:
            found[name] = matrix.group(shape.quantised)
    return found


def remark(shape: ModelShape, name: str) -> str | None:
    """Return a sentence on matrices that stay as they are, None where all are quantised."""
    wide = [size for size in groups(shape).values() if size is None] if shape.quantised else []
    if not wide:
        return None
    return (
        f"{name}: {len(wide)} of {len(groups(shape))} matrices are not quantised: {shape.quantised} kernels want "
        "multiples of 32 inputs and 16 outputs (prune with --align 32)"
    )


def require() -> None:
    """Raise UnsupportedError where torchao is not installed."""
    if importlib.util.find_spec("torchao") is None:
        raise UnsupportedError(
            "quantised weights are torchao's, which is not installed; pip install 'shortllama[quant]', or leave +int8 "
            "and +int4 out"
        )


def holder(shape: ModelShape, dtype: str, device: str) -> Callable[[str, Tensor], Tensor]:
    """Return a function that gives a parameter, by name and value in `dtype`, as a model of `shape` holds it.

    Raises UnsupportedError where torchao is missing, or it and torch cannot compute with such weights on this device.
    """
    if not shape.quantised:
        return lambda name, tensor: tensor
    shape.weight_bytes(dtype)  # refuses a dtype that is too narrow
    require()
    _try(shape.quantised, dtype, device)
    wanted = groups(shape)

    def hold(name: str, tensor: Tensor) -> Tensor:
        group = wanted.get(name)
        return tensor if group is None else _rounded(tensor, shape.quantised, group)

    return hold


def _try(held: str, dtype: str, device: str) -> None:
    """Multiply by one small matrix: which kernels there are depends on processor, device, torch and torchao.

    What they raise has no common base.
    """
    import torch

    try:
        matrix = _rounded(torch.ones(16, 32, dtype=getattr(torch, dtype), device=device), held, 32)
        with torch.inference_mode():
            torch.nn.functional.linear(torch.ones(1, 32, dtype=getattr(torch, dtype), device=device), matrix)
    except Exception as error:
        said = " ".join(str(error).split())[:160]
        hint = " (int4 on CUDA wants bfloat16)" if held == "int4" and device != "cpu" and dtype != "bfloat16" else ""
        raise UnsupportedError(
            f"{held} weights cannot be computed with in {dtype} on {device} here{hint}: "
            f"{type(error).__name__}: {said}; leave +{held} out, or take another dtype or device"
        ) from error


def _rounded(tensor: Tensor, held: str, group: int) -> Tensor:
    """Return a matrix (outputs, inputs) as torchao holds it."""
    from torch import nn

    torchao: Any = importlib.import_module("torchao.quantization")
    linear = nn.Linear(tensor.shape[1], tensor.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(tensor, requires_grad=False)
    torchao.quantize_(linear, _config(torchao, held, group, tensor.device.type))
    return linear.weight


def _config(torchao: Any, held: str, group: int, kind: str) -> Any:
    """Return torchao's config. In int4 the kernels, and with them the packing, belong to the device, the levels not."""
    if held == "int8":
        return torchao.Int8WeightOnlyConfig(set_inductor_config=False)
    if kind == "cpu":
        for_cpu = importlib.import_module("torchao.prototype.quantization.int4").PrototypeInt4WeightOnlyConfig
        return for_cpu(group_size=group, set_inductor_config=False)
    packing = importlib.import_module("torchao.quantization.quantize_.workflows").Int4PackingFormat
    return torchao.Int4WeightOnlyConfig(
        group_size=group, int4_packing_format=packing.TILE_PACKED_TO_4D, set_inductor_config=False
    )


def held_bytes(model: Any) -> int:
    """Return the bytes that a model's parameters occupy, quantised ones by the tensors inside them; ties count once."""
    return sum(_bytes(one) for one in model.parameters())


def _bytes(tensor: Any) -> int:
    names = [*getattr(tensor, "tensor_data_names", ()), *getattr(tensor, "optional_tensor_data_names", ())]
    if not names:
        return tensor.numel() * tensor.element_size()
    return sum(_bytes(part) for name in names if (part := getattr(tensor, name)) is not None)
