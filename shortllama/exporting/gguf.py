"""Write a checkpoint as one GGUF file for llama.cpp, in the architecture that `llamacpp` names.

The weights are the source's, bit for bit, but for vectors, which llama.cpp needs in float32, and for the order of the
rows of q and k where an architecture rotates neighbouring pairs: transformers rotates the two halves of a head. Needs
the extra `gguf`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from shortllama import checkpoint, files, tensorfile
from shortllama.digests import digest_of
from shortllama.errors import InputError, UnsupportedError
from shortllama.exporting import MARK, Export
from shortllama.exporting.arrays import Opened, load, opened
from shortllama.exporting.llamacpp import architecture, expressible, refuse, rope, rotates_pairs
from shortllama.exporting.padding import Placed, placements
from shortllama.exporting.vocabulary import Vocabulary, from_tokenizer
from shortllama.families import lookup
from shortllama.shape import ModelShape

FILE = "model.gguf"

_BLOCK_NAMES = {
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
    "qkv": "attn_qkv",
    "gate_up": "ffn_up",
}

# llama.cpp's general.file_type of a file whose matrices have this dtype.
_FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32}


def export(model: str | Path, out: Path) -> Export:
    """Write a folder's model and tokenizer as model.gguf; returns the record. See `exporting.export`."""
    gguf = _library()
    source = opened(model)
    refuse(source.shape, source.config)
    kept, after = expressible(source.shape)
    vocabulary, chat_template = _vocabulary(source.folder, source.shape.vocabulary)
    checkpoint.refuse_own_folder(out, source.folder)
    arch = architecture(after)
    with files.new_folder(out, MARK) as folder:
        writer = gguf.GGUFWriter(folder / FILE, arch)
        _describe(writer, source, after)
        _add_vocabulary(writer, vocabulary, chat_template)
        _write_tensors(gguf, writer, source, _tensors(source.shape, kept, after))
        record = Export(
            form="gguf",
            architecture=arch,
            dtype=source.dtype,
            parameters=after.parameters,
            source_parameters=source.shape.parameters,
            kv_bytes_per_token=after.kv_bytes_per_token(source.dtype),
            source_kv_bytes_per_token=source.shape.kv_bytes_per_token(source.dtype),
            shape_digest=after.digest(),
            source_shape_digest=source.shape.digest(),
            weights={FILE: digest_of(folder / FILE)},
            companions={},
            version=checkpoint.package_version(),
        )
        files.write_atomically(folder / MARK, files.encode_json(record))
    return record


def _library() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise UnsupportedError("GGUF files need the package gguf; install the extra: shortllama[gguf]") from error
    return gguf


# -- metadata ---------------------------------------------------------------------------------------------------------


def frequency_factors(parameters: Mapping[str, Any], head_dim: int) -> np.ndarray:
    """Return what Llama 3.1's scaling divides each rotary frequency by, (head_dim / 2,) float32.

    As in transformers' `_compute_llama3_parameters`: long wavelengths by `factor`, short ones by 1, a blend between.
    """
    low, high = float(parameters["low_freq_factor"]), float(parameters["high_freq_factor"])
    factor, context = float(parameters["factor"]), float(parameters["original_max_position_embeddings"])
    wavelengths = 2 * math.pi * parameters["rope_theta"] ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    smooth = np.clip((context / wavelengths - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def _describe(writer: Any, source: Opened, after: ModelShape) -> None:
    """Write what llama.cpp must know of the model; head sizes are explicit, it would derive them from the heads."""
    config, parameters = source.config, rope(source.config)
    writer.add_name(source.name)
    writer.add_file_type(_FILE_TYPES[_code(source.dtype)])
    writer.add_vocab_size(after.vocabulary)
    writer.add_context_length(int(config.get("max_position_embeddings", 2048)))
    writer.add_embedding_length(after.hidden)
    writer.add_block_count(len(after.blocks))
    first = after.blocks[0]
    alike = after.is_uniform
    writer.add_head_count(first.query_heads if alike else [block.query_heads for block in after.blocks])
    writer.add_head_count_kv(first.kv_heads if alike else [block.kv_heads for block in after.blocks])
    writer.add_feed_forward_length(first.neurons if alike else [block.neurons for block in after.blocks])
    writer.add_key_length(after.head_dim)
    writer.add_value_length(after.head_dim)
    writer.add_layer_norm_rms_eps(float(config.get("rms_norm_eps", 1e-6)))
    writer.add_rope_dimension_count(after.head_dim)
    writer.add_rope_freq_base(parameters["rope_theta"])
    if parameters["rope_type"] == "linear":
        writer.add_rope_scaling_type(_library().RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(parameters["factor"]))


def _code(dtype: str) -> str:
    code = tensorfile.NAMES[dtype]
    if code not in _FILE_TYPES:
        raise UnsupportedError(
            f"weights in {dtype} are not written to GGUF files; save them in float32, float16 or bfloat16"
        )
    return code


def _vocabulary(folder: Path, size: int) -> tuple[Vocabulary, str | None]:
    """Return the vocabulary of a folder's tokenizer, and its chat template if it has one."""
    file, template = folder / "tokenizer.json", folder / "chat_template.jinja"
    if not file.is_file():
        raise InputError(
            f"{folder}: no tokenizer.json, which a GGUF file must hold; save the tokenizer with transformers"
        )
    config = folder / "tokenizer_config.json"
    found = files.decode_json(files.read_bytes(config), dict[str, Any], str(config)) if config.is_file() else {}
    vocabulary = from_tokenizer(files.decode_json(files.read_bytes(file), dict[str, Any], str(file)), found, size)
    if template.is_file():
        return vocabulary, files.read_bytes(template).decode()
    older = found.get("chat_template")
    return vocabulary, older if isinstance(older, str) else None


def _add_vocabulary(writer: Any, vocabulary: Vocabulary, chat_template: str | None) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.pre is None:
        writer.add_token_scores(vocabulary.scores)
    else:
        writer.add_tokenizer_pre(vocabulary.pre)
        writer.add_token_merges(vocabulary.merges)
    for name, number in vocabulary.special.items():
        getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    writer.add_add_space_prefix(vocabulary.add_space_prefix)
    if chat_template is not None:
        writer.add_chat_template(chat_template)


# -- tensors ----------------------------------------------------------------------------------------------------------


def _tensors(shape: ModelShape, kept: tuple[int, ...], after: ModelShape) -> dict[str, tuple[Placed, int]]:
    """Return, for each tensor by llama.cpp's name, what it holds, and the heads whose rows are reordered (0: none)."""
    family = lookup(shape.family)
    whole = list(shape.blocks)
    for index, block in zip(kept, after.blocks, strict=True):
        whole[index] = block
    placed = placements(shape, msgspec.structs.replace(after, blocks=tuple(whole)))
    names = {family.embedding: "token_embd", family.final_norm: "output_norm", family.head: "output"}
    heads: dict[str, int] = {}
    for position, index in enumerate(kept):
        start = f"{family.blocks}.{index}."
        names |= {f"{start}{path}": f"blk.{position}.{_BLOCK_NAMES[s]}" for s, path in family.projections.items()}
        names |= {f"{start}{family.attention_norms[0]}": f"blk.{position}.attn_norm"}
        names |= {f"{start}{family.mlp_norms[0]}": f"blk.{position}.ffn_norm"}
        names |= {f"{start}{path}": f"blk.{position}.attn_{path.split('.')[-1]}" for path in family.head_norms}
        if rotates_pairs(shape):
            heads |= {f"{start}{family.projections['q']}": whole[index].query_heads}
            heads |= {f"{start}{family.projections['k']}": whole[index].kv_heads}
    found: dict[str, tuple[Placed, int]] = {}
    for name, one in placed.items():
        module, _, leaf = name.rpartition(".")
        found[f"{names[module]}.{leaf}"] = (one, heads.get(module, 0))
    return found


def interleaved(values: np.ndarray, heads: int) -> np.ndarray:
    """Return the rows of q or k (weight or bias) in llama.cpp's order: the halves of each head's rows interleaved."""
    half = values.shape[0] // heads // 2
    return values.reshape(heads, 2, half, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def _write_tensors(gguf: Any, writer: Any, source: Opened, tensors: dict[str, tuple[Placed, int]]) -> None:
    """Write the header, then the tensors one after the other, in memory one at a time."""
    codes = {name: _written_code(source, one) for name, (one, _) in tensors.items()}
    factors = _factors(source)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    for name, (one, _) in tensors.items():
        count = math.prod(one.dimensions) * tensorfile.ITEM_BYTES[codes[name]]
        kind = getattr(gguf.GGMLQuantizationType, codes[name])
        writer.add_tensor_info(name, one.dimensions, np.dtype(np.float32), count, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        for one, heads in tensors.values():
            values = load(source, one)
            values = interleaved(values, heads) if heads else values
            writer.write_tensor_data(_widened(values, source, one) if len(one.dimensions) == 1 else values)
    except OSError as error:
        raise InputError(f"{FILE}: cannot be written ({error.strerror})") from error
    finally:
        writer.close()


def _factors(source: Opened) -> np.ndarray | None:
    parameters = rope(source.config)
    return frequency_factors(parameters, source.shape.head_dim) if parameters["rope_type"] == "llama3" else None


def _written_code(source: Opened, one: Placed) -> str:
    if len(one.dimensions) == 1:
        return "F32"
    stored = source.tensors.get(one.source or "")
    return _code(tensorfile.DTYPES[stored.code] if stored else source.dtype)


def _widened(bits: np.ndarray, source: Opened, one: Placed) -> np.ndarray:
    """Return a vector's bits as float32 values, which holds every 16-bit value exactly."""
    stored = source.tensors.get(one.source or "")
    code = stored.code if stored else tensorfile.NAMES[source.dtype]
    if code == "BF16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view({"F16": np.float16, "F32": np.float32, "F64": np.float64}[code]).astype(np.float32)
