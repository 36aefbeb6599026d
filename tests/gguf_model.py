"""A GGUF file run by the rules of llama.cpp's architectures, in numpy: a second way to read it.

Follows llama.cpp where it differs from transformers: `llama` and `deci` rotate neighbouring pairs; all but `deci` apply
block 0's sizes to every block; `deci` reads the head size at block 0 and drops the attention of a block without FFN;
SPM joins the pair with the highest score; byte-level BPE splits by the rules that are known by name.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import regex

from shortllama.exporting.bytelevel import alphabet

_SPACE = "\u2581"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# What llama.cpp splits by, one after the other, and whether it takes words that are tokens whole.
_SPLITS = {
    "llama-bpe": ([_LLAMA3], True),
    "dbrx": ([_LLAMA3], False),
    "qwen2": ([_LLAMA3.replace("{1,3}", "")], False),
    "gpt-2": ([_GPT2], False),
    "smollm": ([r"\p{N}", _GPT2], False),
}


class Gguf:
    """A file read back: metadata by key, tensors by name in float64."""

    def __init__(self, path: Path) -> None:
        self.reader = gguf.GGUFReader(path)
        self.tensors = {tensor.name: self._floats(tensor) for tensor in self.reader.tensors}
        self.architecture: str = self.value("general.architecture")

    @staticmethod
    def _floats(tensor: Any) -> np.ndarray:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        return values.reshape(tuple(reversed(tensor.shape.tolist()))).astype(np.float64)

    def value(self, key: str, default: Any = None) -> Any:
        field = self.reader.fields.get(key)
        return default if field is None else field.contents()

    def sizes(self, name: str) -> list[int]:
        """A size of every block; `llama` has one for all."""
        blocks = self.value(f"{self.architecture}.block_count")
        found = self.value(f"{self.architecture}.{name}")
        assert isinstance(found, int) == (self.architecture != "deci")
        return [found] * blocks if isinstance(found, int) else found

    def logits(self, ids: list[int]) -> np.ndarray:
        """The logits (T, V) of one sequence."""
        sizes = zip(
            *(self.sizes(n) for n in ("attention.head_count", "attention.head_count_kv", "feed_forward_length")),
            strict=True,
        )
        x = self.tensors["token_embd.weight"][ids]
        for index, (heads, groups, neurons) in enumerate(sizes):
            assert index or heads, "the head size is read at block 0"
            attended = self._attention(index, x, heads, groups) if heads else x
            if not neurons:
                continue  # whatever was attended is lost
            normed = self._norm(attended, f"blk.{index}.ffn_norm")
            up = self._linear(normed, f"blk.{index}.ffn_up")
            if self.architecture == "phi3":
                gate, up = np.split(up, 2, axis=-1)
            else:
                gate = self._linear(normed, f"blk.{index}.ffn_gate")
            hidden = gate / (1 + np.exp(-gate)) * up
            assert hidden.shape[1] == neurons
            x = attended + self._linear(hidden, f"blk.{index}.ffn_down")
        head = self.tensors.get("output.weight", self.tensors["token_embd.weight"])
        return self._norm(x, "output_norm") @ head.T

    def _attention(self, index: int, x: np.ndarray, heads: int, groups: int) -> np.ndarray:
        size = self.value(f"{self.architecture}.attention.key_length")
        assert size == self.value(f"{self.architecture}.rope.dimension_count")
        normed = self._norm(x, f"blk.{index}.attn_norm")
        if self.architecture == "phi3":
            joined = self._linear(normed, f"blk.{index}.attn_qkv")
            parts = np.split(joined, [heads * size, (heads + groups) * size], axis=-1)
        else:
            parts = [self._linear(normed, f"blk.{index}.attn_{name}") for name in "qkv"]
        q, k, v = (part.reshape(len(x), -1, size) for part in parts)
        assert (q.shape[1], k.shape[1], v.shape[1]) == (heads, groups, groups)
        if self.architecture == "qwen3":
            q, k = self._norm(q, f"blk.{index}.attn_q_norm"), self._norm(k, f"blk.{index}.attn_k_norm")
        q, k = self._rotate(q), self._rotate(k)
        k, v = (np.repeat(part, heads // groups, axis=1) for part in (k, v))
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(size)
        scores = np.where(np.tril(np.ones(scores.shape[1:], bool)), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        mixed = np.einsum("hqk,khd->qhd", weights, v).reshape(len(x), heads * size)
        return x + self._linear(mixed, f"blk.{index}.attn_output")

    def _rotate(self, x: np.ndarray) -> np.ndarray:
        half = x.shape[-1] // 2
        base = self.value(f"{self.architecture}.rope.freq_base")
        angles = np.arange(len(x))[:, None] * base ** (-np.arange(half) / half)
        if self.value(f"{self.architecture}.rope.scaling.type") == "linear":
            angles /= self.value(f"{self.architecture}.rope.scaling.factor")
        angles = (angles / self.tensors.get("rope_freqs.weight", 1.0))[:, None]
        if self.architecture not in ("llama", "deci"):
            first, second = x[..., :half], x[..., half:]
            return np.concatenate(
                [first * np.cos(angles) - second * np.sin(angles), first * np.sin(angles) + second * np.cos(angles)], -1
            )
        even, odd = x[..., 0::2], x[..., 1::2]
        turned = [even * np.cos(angles) - odd * np.sin(angles), even * np.sin(angles) + odd * np.cos(angles)]
        return np.stack(turned, -1).reshape(x.shape)

    def _norm(self, x: np.ndarray, name: str) -> np.ndarray:
        epsilon = self.value(f"{self.architecture}.attention.layer_norm_rms_epsilon")
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * self.tensors[f"{name}.weight"]

    def _linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return x @ self.tensors[f"{name}.weight"].T + self.tensors.get(f"{name}.bias", 0.0)

    def encode(self, text: str) -> list[int]:
        """Token ids by llama.cpp's rules for the file's kind of vocabulary."""
        start = [self.value("tokenizer.ggml.bos_token_id")] if self.value("tokenizer.ggml.add_bos_token") else []
        end = [self.value("tokenizer.ggml.eos_token_id")] if self.value("tokenizer.ggml.add_eos_token") else []
        kinds = {"llama": self._joined_by_score, "gpt2": self._joined_by_rank}
        return start + kinds[self.value("tokenizer.ggml.model")](text) + end

    def _joined_by_rank(self, text: str) -> list[int]:
        """Byte-level BPE: split, then join the pair of the lowest rank, left first."""
        patterns, whole_words = _SPLITS[self.value("tokenizer.ggml.pre")]
        words = [text]
        for pattern in patterns:
            words = [part for word in words for part in regex.split(f"({pattern})", word) if part]
        tokens = {token: number for number, token in enumerate(self.value("tokenizer.ggml.tokens"))}
        ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(self.value("tokenizer.ggml.merges"))}
        signs = alphabet()
        ids: list[int] = []
        for word in words:
            pieces = [signs[byte] for byte in word.encode()]
            if whole_words and "".join(pieces) in tokens:
                pieces = ["".join(pieces)]
            while joined := [(ranks[pair], i) for i, pair in enumerate(pairwise(pieces)) if pair in ranks]:
                at = min(joined)[1]
                pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
            ids += [tokens[piece] for piece in pieces]
        return ids

    def _joined_by_score(self, text: str) -> list[int]:
        """SPM: join the pair of the highest score, left first; bytes for what is unknown."""
        tokens = {token: number for number, token in enumerate(self.value("tokenizer.ggml.tokens"))}
        scores = self.value("tokenizer.ggml.scores")
        if text and self.value("tokenizer.ggml.add_space_prefix"):
            text = " " + text
        pieces = list(text.replace(" ", _SPACE))
        while True:
            joined = [(scores[tokens[a + b]], -i) for i, (a, b) in enumerate(pairwise(pieces)) if a + b in tokens]
            if not joined:
                break
            at = -max(joined)[1]
            pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
        ids = [[tokens[p]] if p in tokens else [tokens[f"<0x{byte:02X}>"] for byte in p.encode()] for p in pieces]
        return [number for found in ids for number in found]
