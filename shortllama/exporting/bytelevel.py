"""Which byte-level BPE tokenizers llama.cpp reproduces, and by which name of its pre-tokenizers. Pure.

llama.cpp's tokenizer "gpt2" splits a text by a rule that it knows by name, then joins pairs of the lowest rank, as the
original does. Names and rules were read in its source (llama-vocab.cpp, as in llama-cpp-python 0.3.36). A rule that it
only approximates (`tekken`, whose classes of letters it narrows to ASCII) has no name here. It has no normalizers: a
text that NFC changes is tokenized otherwise.
"""

from __future__ import annotations

from typing import Any

from shortllama.errors import UnsupportedError

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_THREE_DIGITS = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
_ONE_DIGIT = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST

# What splits the text in front of the byte-level step, and whether a word that is a token is taken whole.
_NAMES: dict[tuple[str, bool], str] = {
    (_THREE_DIGITS, True): "llama-bpe",  # Llama 3
    (_THREE_DIGITS, False): "dbrx",  # the same splits, all words merged: Phi-4
    (_ONE_DIGIT, False): "qwen2",  # Qwen 2 to 3
    ("", False): "gpt-2",
    ("digits", False): "smollm",
}


def pre_tokenizer(document: dict[str, Any]) -> str:
    """Return llama.cpp's name for how a byte-level tokenizer.json splits text. Raises UnsupportedError for others."""
    splitter, model = document.get("pre_tokenizer") or {}, document["model"]
    steps = splitter.get("pretokenizers", [splitter])
    *before, last = steps
    if last.get("type") != "ByteLevel" or len(before) > 1:
        raise _unknown(" then ".join(str(step.get("type")) for step in steps))
    if last.get("add_prefix_space", True):
        raise _unknown("a space put in front of the text")
    rule = _rule(before[0]) if before else ""
    # The byte-level step splits by GPT-2's own rule, unless it is told that something did before.
    own_rule = bool(last.get("use_regex", True))
    name = _NAMES.get((rule, bool(model.get("ignore_merges"))))
    if name is None or own_rule != (name in ("gpt-2", "smollm")):
        raise _unknown(f"{rule or 'bytes'!r}")
    kinds = {step.get("type") for step in _steps(document.get("normalizer"), "normalizers")}
    if kinds - {"NFC"}:
        raise _unknown(f"{', '.join(sorted(map(str, kinds)))} in front")
    return name


def _rule(step: dict[str, Any]) -> str:
    if step.get("type") == "Digits" and step.get("individual_digits"):
        return "digits"
    plain = step.get("behavior") == "Isolated" and not step.get("invert")
    if step.get("type") != "Split" or not plain:
        raise _unknown(str(step.get("type")))
    return str((step.get("pattern") or {}).get("Regex"))


def _steps(part: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    return [] if part is None else part.get(name, [part])


def _unknown(what: str) -> UnsupportedError:
    return UnsupportedError(
        f"tokenizer.json splits text by {what}, for which llama.cpp has no exact rule; a GGUF file is written for "
        f"byte-level tokenizers of the kinds {', '.join(sorted(_NAMES.values()))}"
    )


def alphabet() -> list[str]:
    """Return the characters that stand for the 256 bytes, as GPT-2 published them: printable ones for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def merges(model: dict[str, Any]) -> list[str]:
    """Return the merges in rank order, as llama.cpp takes them. Raises UnsupportedError for what it does not do."""
    odd = [
        name for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "unk_token") if model.get(name)
    ]
    if odd:
        raise UnsupportedError(f"tokenizer.json's BPE has {odd[0]} {model[odd[0]]!r}, which llama.cpp does not follow")
    lacking = [byte for byte, sign in enumerate(alphabet()) if sign not in model["vocab"]]
    if lacking:
        raise UnsupportedError(
            f"tokenizer.json has no token for byte {lacking[0]} ({len(lacking)} of 256 missing); llama.cpp drops it"
        )
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
