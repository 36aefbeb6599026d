"""Models with tokenizers that are exported to GGUF files, for the tests that read these by the rules or run them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from strategies import plan_of

from shortllama import checkpoint, surgery
from shortllama.plans import BlockKeep
from shortllama.shape import BIASES, BlockShape, ModelShape

IDS = [1, 30, 22, 5, 17, 8, 41, 3]
SPACE = "\u2581"
QWEN3 = {"family": "qwen3", "qk_norm": True}
QWEN2 = {"family": "qwen2", "biases": ("q", "k", "v")}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}


def shape_like(*blocks: tuple[int, int, int], **changes: Any) -> ModelShape:
    """Blocks of (query heads, KV heads, neurons) at hidden 64, heads of 8."""
    fields = {"family": "llama", "vocabulary": 300, "hidden": 64, "head_dim": 8, "tied": False}
    return ModelShape(**{**fields, **changes}, blocks=tuple(BlockShape(*block) for block in blocks))


def tokenizer_files(folder: Path, *words: str) -> None:
    """A byte-fallback BPE tokenizer as converted from SentencePiece: every way to split a token is a merge."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), SPACE, *"adehinot"]
    merges: list[list[str]] = []
    for word in words or (f"{SPACE}t", "he", f"{SPACE}the", "in", "on", f"{SPACE}on"):
        tokens.append(word)
        merges += [[word[:i], word[i:]] for i in range(1, len(word)) if word[:i] in tokens and word[i:] in tokens]
    special = [{"id": i, "content": tokens[i], "special": True} for i in range(3)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{**one, **flags} for one in special],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": SPACE},
                {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "ByteFallback"},
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": merges,
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(document))
    config = {"tokenizer_class": "TokenizersBackend", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def written(folder: Path, shape: ModelShape, dtype: str = "float64", **config: Any) -> torch.nn.Module:
    """Write a model of `shape` with random weights to `folder`; returns it."""
    model = surgery.build(shape, dtype=dtype, std=0.15)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases too, each its own: one taken for another must show
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    for name, value in config.items():
        setattr(model.config, name, value)
    keep = tuple(BlockKeep(i) for i in range(len(shape.blocks)))
    checkpoint.save(model, plan_of(shape, keep), folder)
    tokenizer_files(folder)
    return model


# -- byte-level tokenizers --------------------------------------------------------------------------------------------

_ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+"
_OTHERS = "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"

# How the tokenizers of published models split text: (what comes before the byte-level step, ignore_merges).
SPLITS: dict[str, tuple[str | None, bool]] = {
    "llama-bpe": (_ENDINGS + "|\\p{N}{1,3}" + _OTHERS, True),
    "dbrx": (_ENDINGS + "|\\p{N}{1,3}" + _OTHERS, False),
    "qwen2": (_ENDINGS + "|\\p{N}" + _OTHERS, False),
    "gpt-2": (None, False),
    "smollm": ("digits", False),
}

_CORPUS = ["the tin on the tot, the others aren't in it", "It's 12345 o'clock; I'LL be there in 2026!", "  a\n\n\tb  c"]


def byte_level_files(folder: Path, split: str, vocabulary: int = 400) -> None:
    """A byte-level BPE with the splits of a published kind, trained on a few lines, BOS in front."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    pattern, ignore_merges = SPLITS[split]
    own = pattern in (None, "digits")
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=own)]
    if pattern == "digits":
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    elif pattern is not None:
        steps.insert(0, pre_tokenizers.Split(Regex(pattern), "isolated"))
    tokenizer.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(_CORPUS * 4, trainer)
    tokenizer.add_special_tokens([AddedToken("<bos>", special=True), AddedToken("<eos>", special=True)])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    template = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "TokenizersBackend", "bos_token": "<bos>", "eos_token": "<eos>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


TEXTS = [
    "the tin on the tot",
    "  two  spaces ",
    "a\nline",
    "caf\u00e9 \U0001f642",
    "",
    "tttthehehe on in the",
    "It's 1234567 o'clock, isn't it? I'LL SEE",
    "tabs\t\tand\r\n\r\nlines  \n  in\u00a0between ",
]


# -- what is exported ------------------------------------------------------------------------------------------------

GGUF = {
    "uniform": (shape_like((8, 4, 96), (8, 4, 96)), "llama", "float32", {}),
    "uniform, odd heads": (shape_like((6, 3, 96), (6, 3, 96), tied=True), "llama", "float16", {}),
    "widths": (shape_like((8, 4, 96), (4, 2, 40), (6, 3, 17), tied=True), "deci", "float32", {}),
    "queries": (shape_like((6, 2, 96), (6, 2, 96)), "llama", "float32", {}),
    "queries of each block": (shape_like((8, 2, 96), (4, 2, 40), (6, 1, 17)), "deci", "float32", {}),
    "first without attention": (shape_like((0, 0, 40), (6, 3, 17), (0, 0, 8)), "deci", "float32", {}),
    "without FFN": (shape_like((8, 4, 40), (6, 3, 0), (4, 2, 0)), "deci", "bfloat16", {}),
    "empty blocks": (shape_like((0, 0, 0), (6, 3, 9), (0, 0, 0), (4, 2, 6)), "deci", "float32", {}),
    "compensated": (shape_like((8, 4, 96), (4, 2, 40), biases=("o", "down")), "deci", "float32", {}),
    "biases": (shape_like((8, 4, 9), (8, 2, 9), biases=("q", "k", "v")), "deci", "float32", {}),
    "qwen2": (shape_like((8, 4, 9), (8, 4, 9), **QWEN2), "llama", "float32", {}),
    "qwen2, odd heads": (shape_like((6, 3, 9), (4, 2, 9), **QWEN2), "deci", "float32", {}),
    "all biases": (shape_like((6, 3, 9), (6, 3, 9), biases=BIASES), "llama", "float32", {}),
    "qwen3": (shape_like((8, 4, 96), (8, 4, 96), **QWEN3), "qwen3", "float32", {}),
    "qwen3, odd heads": (shape_like((6, 2, 9), (6, 2, 9), tied=True, **QWEN3), "qwen3", "float32", {}),
    "qwen3, linear": (shape_like((8, 4, 96), **QWEN3), "qwen3", "float32", {"rope_parameters": LINEAR}),
    "phi3": (shape_like((8, 4, 96), (8, 4, 96), family="phi3"), "phi3", "float32", {}),
    "linear": (
        shape_like((8, 4, 96)),
        "llama",
        "float32",
        {"rope_parameters": LINEAR},
    ),
    "llama3": (
        shape_like((8, 4, 96), (4, 2, 96)),
        "deci",
        "float32",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
}
