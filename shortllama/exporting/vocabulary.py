"""A tokenizer.json as the vocabulary of a GGUF file. Pure: a dict in, lists out.

A byte-level BPE (Llama 3, Qwen) stays one (`bytelevel`). A byte-fallback BPE becomes a SentencePiece vocabulary:
llama.cpp's tokenizer "llama" (SPM) joins the adjacent pair whose joined token has the highest score; a BPE joins the
pair of the lowest rank. With minus the rank as the score both do the same, where every way to split a token is a
merge, as in tokenizers converted from SentencePiece.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from shortllama.errors import UnsupportedError
from shortllama.exporting import bytelevel

# llama.cpp's token types (gguf.TokenType), by number so that no library is needed to read a tokenizer.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_SPACE = "\u2581"

# The score of tokens that no merge makes: below every rank.
_NO_MERGE = -1e4


class Vocabulary(msgspec.Struct, frozen=True):
    """Tokens by id, with scores and llama.cpp's types; ids of special tokens; what is put around a text.

    `model`: llama.cpp's name of the algorithm, "llama" (SentencePiece) or "gpt2" (byte-level BPE); the latter has
    `merges` in rank order and the name `pre` of how it splits text, and no scores.
    """

    model: str
    tokens: list[str]
    scores: list[float]
    types: list[int]
    special: dict[str, int]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    merges: list[str] = []
    pre: str | None = None


def from_tokenizer(document: dict[str, Any], config: dict[str, Any], size: int) -> Vocabulary:
    """Return the vocabulary of a tokenizer.json for a model with `size` embeddings.

    `config` is tokenizer_config.json. Embeddings beyond the tokenizer become unused tokens.
    Raises UnsupportedError for any tokenizer that llama.cpp does not reproduce.
    """
    model = document.get("model") or {}
    if model.get("type") != "BPE":
        raise UnsupportedError(
            f"tokenizer.json is a {model.get('type', 'no')} model; a GGUF file is written for BPE only"
        )
    ids: dict[str, int] = model["vocab"]
    added = {one["id"]: one for one in document.get("added_tokens") or []}
    by_id = {number: token for token, number in ids.items()} | {number: one["content"] for number, one in added.items()}
    if max(by_id, default=-1) >= size:
        raise UnsupportedError(
            f"tokenizer.json has token {max(by_id)}, the model {size} embeddings; do they belong together?"
        )
    special = _special(config, {token: number for number, token in by_id.items()}, model.get("unk_token"))
    add_bos, add_eos = _surroundings(document, config, special, by_id)
    tokens = [by_id.get(number, f"[PAD{number}]") for number in range(size)]
    common = {"tokens": tokens, "special": special, "add_bos": add_bos, "add_eos": add_eos}
    types = [_type(number, by_id, added, special) for number in range(size)]
    if not model.get("byte_fallback"):
        pre, merges = bytelevel.pre_tokenizer(document), bytelevel.merges(model)
        if "eos" not in special:
            raise UnsupportedError(
                "tokenizer_config.json names no eos_token, for which llama.cpp takes token 11 of a byte-level tokenizer"
            )
        types = [NORMAL if kind == BYTE else kind for kind in types]
        return Vocabulary("gpt2", scores=[], types=types, add_space_prefix=False, merges=merges, pre=pre, **common)
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(model["merges"]):
        ranks.setdefault("".join(merge.split(" ", 1) if isinstance(merge, str) else merge), rank)
    scores = [-float(ranks[token]) if token in ranks else _NO_MERGE for token in tokens]
    return Vocabulary("llama", scores=scores, types=types, add_space_prefix=_adds_space(document), **common)


def _type(number: int, by_id: dict[int, str], added: dict[int, Any], special: dict[str, int]) -> int:
    if number not in by_id:
        return UNUSED
    if number == special.get("unk"):
        return UNKNOWN
    if number in added:
        return CONTROL if added[number].get("special") else USER_DEFINED
    return BYTE if _BYTE_TOKEN.fullmatch(by_id[number]) else NORMAL


def _special(config: dict[str, Any], ids: dict[str, int], unknown: str | None) -> dict[str, int]:
    """Return the ids of bos, eos, unk and pad, where the tokenizer has them."""
    found: dict[str, int] = {}
    for name in ("bos", "eos", "unk", "pad"):
        token = config.get(f"{name}_token") or (unknown if name == "unk" else None)
        content = token.get("content") if isinstance(token, dict) else token
        if content in ids:
            found[name] = ids[content]
    return found


def _surroundings(
    document: dict[str, Any], config: dict[str, Any], special: dict[str, int], by_id: dict[int, str]
) -> tuple[bool, bool]:
    """Whether encoding puts BOS in front of a text and EOS behind it: the post-processor decides, else the config.

    Raises UnsupportedError where it puts anything else around a text.
    """
    processor = document.get("post_processor")
    if processor is None:
        return bool(config.get("add_bos_token", False)), bool(config.get("add_eos_token", False))
    found = (False, False)
    for step in processor.get("processors", [processor]):
        if step.get("type") == "ByteLevel":
            continue
        if step.get("type") != "TemplateProcessing":
            raise UnsupportedError(f"tokenizer.json ends with {step.get('type')}, which a GGUF file cannot hold")
        signs = [part["SpecialToken"]["id"] if "SpecialToken" in part else None for part in step["single"]]
        at = signs.index(None)
        allowed = [[], [by_id.get(special.get("bos", -1))]], [[], [by_id.get(special.get("eos", -1))]]
        if signs[:at] not in allowed[0] or signs[at + 1 :] not in allowed[1]:
            raise UnsupportedError(
                f"tokenizer.json puts {', '.join(sign for sign in signs if sign)} around a text; a GGUF file can hold "
                "its bos_token in front and its eos_token behind"
            )
        found = bool(signs[:at]), bool(signs[at + 1 :])
    return found


def _adds_space(document: dict[str, Any]) -> bool:
    """Whether a space is put in front of a text. Raises UnsupportedError where spaces are not turned into U+2581."""
    normalizer, splitter = document.get("normalizer") or {}, document.get("pre_tokenizer") or {}
    steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
    kinds = [step["type"] for step in steps]
    replaced = [step for step in steps if step["type"] == "Replace" and step.get("content") == _SPACE]
    if splitter.get("type") == "Metaspace" and not kinds:
        return splitter.get("prepend_scheme", "always") != "never"
    if splitter or not replaced or set(kinds) - {"Prepend", "Replace"} or len(replaced) != kinds.count("Replace"):
        odd = [kind for kind in (*kinds, splitter.get("type")) if kind not in (None, "Prepend", "Replace")]
        raise UnsupportedError(
            f"tokenizer.json normalizes or splits text by {', '.join(odd) or 'nothing'}; a GGUF file is written for "
            "SentencePiece-like tokenizers only, which turn spaces into U+2581"
        )
    return "Prepend" in kinds
