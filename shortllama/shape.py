"""What a model costs, as integers: no weights, no torch.

A `ModelShape` is enough to know parameters, bytes and FLOPs in closed form, and to build a model of that shape with
random weights. Every figure here equals what the built model has (`numel`), which the tests check. It must not know
of plans, files or devices.

Legend: h hidden, d head_dim, q query heads, k KV heads, f FFN neurons, V vocabulary, B batch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from shortllama.errors import InputError, UnsupportedError

ITEM_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}

BIASES = ("q", "k", "v", "o", "gate", "up", "down")

# How the matrices inside the blocks may be held: see `Matrix`.
QUANTISED = ("int8", "int4")

# What quantised weights may be computed in: a product with int8 values is scaled after its sum, which leaves float16's
# range for activations in the hundreds.
WIDE_DTYPES = ("float32", "bfloat16")

# Weights that share a scale and a zero in int4, by the first of these that divides a matrix's inputs, and what the
# kernels want of its outputs.
INT4_GROUPS = (128, 64, 32)
INT4_ROWS = 16

# Mamba's forward multiplies by this weight itself, not through its layer, which quantised tensors cannot do.
_BY_VALUE = ("mixer.dt_proj.weight",)


def item_bytes(dtype: str) -> int:
    """Return the bytes of one value of `dtype`. Raises InputError for a name that is not one of `ITEM_BYTES`."""
    try:
        return ITEM_BYTES[dtype]
    except KeyError:
        raise InputError(f"dtype {dtype!r} is unknown; choose one of {', '.join(ITEM_BYTES)}") from None


class Matrix(NamedTuple):
    """The matrix of a linear layer. `unit` divides its rows; those of q, k and v have one unit, fused or not."""

    rows: int
    columns: int
    unit: int

    def group(self, held: str) -> int | None:
        """Return how many inputs share a scale; None where the matrix stays as it is: int4 kernels lack its size."""
        if held == "int8":
            return self.columns
        return next((size for size in INT4_GROUPS if self.columns % size == 0 and self.unit % INT4_ROWS == 0), None)

    def held_bytes(self, held: str, dtype: str) -> int:
        """Return the bytes of the matrix held as int8 or int4, computed with in `dtype`.

        int8: one byte a weight; a scale in float32 and a zero of one byte (always 0) a row. int4: half a byte a weight;
        a scale and a zero in `dtype` a group. What the kernels of a GPU add as padding is not counted.
        """
        group, item = self.group(held), item_bytes(dtype)
        if group is None:
            return self.rows * self.columns * item
        if held == "int8":
            return self.rows * (self.columns + 5)
        return self.rows * self.columns // 2 + self.rows * (self.columns // group) * 2 * item


class BlockShape(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One decoder block. `query_heads = kv_heads = 0` means no attention, `neurons = 0` no FFN; norms go too."""

    query_heads: int
    kv_heads: int
    neurons: int

    def __post_init__(self) -> None:
        if min(self.query_heads, self.kv_heads, self.neurons) < 0:
            raise InputError(f"block shape {self}: counts must not be negative")
        if (self.query_heads == 0) != (self.kv_heads == 0):
            raise InputError(f"block shape {self}: query and KV heads must be removed together")
        if self.kv_heads and self.query_heads % self.kv_heads:
            raise InputError(f"block shape {self}: query heads must be a multiple of KV heads")

    @property
    def queries_per_group(self) -> int:
        """How many query heads read each KV head; 0 without attention."""
        return self.query_heads // self.kv_heads if self.kv_heads else 0


class ModelShape(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A Llama-like decoder as integers.

    `family` is the transformers model type whose modelling code runs it; `biases` names the projections that have one
    (out of q, k, v, o, gate, up, down); `norms_per_module` counts norm vectors of size h beside each MHA and each FFN
    (1 in Llama, 2 in Gemma 2); `qk_norm` adds two vectors of size d to each attention (Qwen3); `final_norms` counts the
    vectors of the norm in front of the output head (2 where it has a bias), `entry_norms` those of a norm right behind
    the embedding (RWKV).

    `mixer` is for families whose blocks can only be removed whole (GPT-NeoX, Mamba): every tensor of a block by name
    and dimensions. All blocks are then alike, and their heads and neurons say only what attention and its cache cost.

    `quantised`: "int8" or "int4" where the matrices of the blocks are held so; embedding, output head, norms and biases
    stay as they are.
    """

    family: str
    vocabulary: int
    hidden: int
    head_dim: int
    tied: bool
    blocks: tuple[BlockShape, ...]
    biases: tuple[str, ...] = ()
    qk_norm: bool = False
    norms_per_module: int = 1
    final_norms: int = 1
    entry_norms: int = 0
    mixer: tuple[tuple[str, tuple[int, ...]], ...] = ()
    quantised: str = ""

    def __post_init__(self) -> None:
        if self.quantised and self.quantised not in QUANTISED:
            raise InputError(f"quantised weights {self.quantised!r} are unknown; choose one of {', '.join(QUANTISED)}")
        unknown = set(self.biases) - set(BIASES)
        if unknown:
            raise InputError(f"biases {sorted(unknown)} are unknown; choose among {', '.join(BIASES)}")
        if min(self.vocabulary, self.hidden, self.head_dim) < 1:
            raise InputError("vocabulary, hidden and head_dim must be at least 1")
        # One order, however they were found: equal shapes have equal digests.
        msgspec.structs.force_setattr(self, "biases", tuple(name for name in BIASES if name in self.biases))

    @classmethod
    def uniform(
        cls,
        *,
        family: str = "llama",
        vocabulary: int,
        hidden: int,
        head_dim: int,
        blocks: int,
        query_heads: int,
        kv_heads: int,
        neurons: int,
        tied: bool = False,
        biases: Iterable[str] = (),
        qk_norm: bool = False,
        norms_per_module: int = 1,
    ) -> ModelShape:
        """Return a shape whose blocks are all alike."""
        block = BlockShape(query_heads, kv_heads, neurons)
        return cls(
            family, vocabulary, hidden, head_dim, tied, (block,) * blocks, tuple(biases), qk_norm, norms_per_module
        )

    # -- parameters -------------------------------------------------------------------------------------------------

    def attention_parameters(self, block: BlockShape) -> int:
        """Return the parameters of a block's attention with its norms: 2hd(q + k), biases, norms."""
        self._check_parts()
        if block.query_heads == 0:
            return 0
        q, kv = block.query_heads * self.head_dim, block.kv_heads * self.head_dim
        widths = {"q": q, "k": kv, "v": kv, "o": self.hidden}
        matrices = 2 * self.hidden * (q + kv)
        vectors = sum(width for name, width in widths.items() if name in self.biases)
        return matrices + vectors + self.norms_per_module * self.hidden + (2 * self.head_dim if self.qk_norm else 0)

    def mlp_parameters(self, block: BlockShape) -> int:
        """Return the parameters of a block's gated FFN with its norms: 3hf, biases, norms."""
        self._check_parts()
        if block.neurons == 0:
            return 0
        widths = {"gate": block.neurons, "up": block.neurons, "down": self.hidden}
        vectors = sum(width for name, width in widths.items() if name in self.biases)
        return 3 * self.hidden * block.neurons + vectors + self.norms_per_module * self.hidden

    def _check_parts(self) -> None:
        if self.mixer:
            raise UnsupportedError(
                f"blocks of a {self.family} model can only be removed whole, not their attention or FFN"
            )

    def block_parameters(self, block: BlockShape) -> int:
        """Return the parameters of one block."""
        if self.mixer:
            return sum(math.prod(dimensions) for _, dimensions in self.mixer)
        return self.attention_parameters(block) + self.mlp_parameters(block)

    @property
    def embedding_parameters(self) -> int:
        """Vh, the embedding table."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """All parameters; a tied output head is counted once."""
        norms = self.final_norms + self.entry_norms
        outside = self.embedding_parameters * (1 if self.tied else 2) + norms * self.hidden
        return outside + sum(map(self.block_parameters, self.blocks))

    # -- bytes and FLOPs --------------------------------------------------------------------------------------------

    def weight_bytes(self, dtype: str = "float16") -> int:
        """Return the bytes of all weights, quantised ones as they are held."""
        return self.parameters * item_bytes(dtype) - self._saved_bytes(dtype)

    def matrices(self, block: BlockShape) -> dict[str, Matrix]:
        """Return the matrices that can be quantised, by projection (fused ones by their parts), else by tensor name."""
        if self.mixer:
            named = {name: size for name, size in self.mixer if len(size) == 2 and name.endswith(".weight")}
            return {name: Matrix(*size, size[0]) for name, size in named.items() if name not in _BY_VALUE}
        q, kv, h, f = block.query_heads * self.head_dim, block.kv_heads * self.head_dim, self.hidden, block.neurons
        unit = math.gcd(q, kv)
        found = {"q": Matrix(q, h, unit), "k": Matrix(kv, h, unit), "v": Matrix(kv, h, unit), "o": Matrix(h, q, h)}
        found |= {"gate": Matrix(f, h, f), "up": Matrix(f, h, f), "down": Matrix(h, f, h)}
        return {name: one for name, one in found.items() if one.rows and one.columns}

    def _saved_bytes(self, dtype: str) -> int:
        """Return how many bytes quantised matrices are smaller than they would be in `dtype`."""
        if not self.quantised:
            return 0
        if dtype not in WIDE_DTYPES:
            raise UnsupportedError(
                f"{self.quantised} weights are computed with in {' or '.join(WIDE_DTYPES)}, not in {dtype}; name one "
                "of those as the dtype"
            )
        item = item_bytes(dtype)
        return sum(
            one.rows * one.columns * item - one.held_bytes(self.quantised, dtype)
            for block in self.blocks
            for one in self.matrices(block).values()
        )

    def kv_bytes_per_token(self, dtype: str = "float16") -> int:
        """Return the KV-cache bytes of one token of one sequence: 2 d sum(k)."""
        return 2 * self.head_dim * sum(block.kv_heads for block in self.blocks) * item_bytes(dtype)

    def read_weight_bytes(self, dtype: str = "float16") -> int:
        """Return the weight bytes that every forward pass must read: all but an untied embedding table.

        A gather of B rows of the table is counted as nothing; a tied table is read whole as the output head.
        """
        unread = 0 if self.tied else self.embedding_parameters
        return (self.parameters - unread) * item_bytes(dtype) - self._saved_bytes(dtype)

    def decode_bytes(self, batch: int, context: int, dtype: str = "float16") -> int:
        """Return the bytes one decode step must move: weights once, `context` cached tokens read, one written.

        `context` counts the tokens already in the cache, for each of `batch` sequences. Activations are not counted.
        """
        return self.read_weight_bytes(dtype) + batch * (context + 1) * self.kv_bytes_per_token(dtype)

    def prefill_bytes(self, batch: int, prompt: int, dtype: str = "float16") -> int:
        """Return the bytes a prefill of `prompt` tokens must move: weights once, the cache written once."""
        return self.read_weight_bytes(dtype) + batch * prompt * self.kv_bytes_per_token(dtype)

    def _linear_multiplications(self) -> int:
        """Multiply-adds per token inside the blocks, without attention itself: the matrices' sizes."""
        if self.mixer:
            return len(self.blocks) * sum(math.prod(sizes) for _, sizes in self.mixer if len(sizes) > 1)
        return sum(
            2 * self.hidden * self.head_dim * (b.query_heads + b.kv_heads) + 3 * self.hidden * b.neurons
            for b in self.blocks
        )

    def decode_flops(self, batch: int, context: int) -> int:
        """Return the FLOPs of one decode step (2 a multiply-add): matrices, output head, attention over context + 1."""
        attended = 4 * self.head_dim * (context + 1) * sum(b.query_heads for b in self.blocks)
        return batch * (2 * (self._linear_multiplications() + self.embedding_parameters) + attended)

    def prefill_flops(self, batch: int, prompt: int) -> int:
        """Return the FLOPs of a prefill whose output head sees the last position only; attention is causal."""
        attended = 2 * self.head_dim * prompt * (prompt + 1) * sum(b.query_heads for b in self.blocks)
        return batch * (2 * (prompt * self._linear_multiplications() + self.embedding_parameters) + attended)

    # -- structure --------------------------------------------------------------------------------------------------

    @property
    def is_uniform(self) -> bool:
        """Whether all blocks are alike (what stock modelling code can express)."""
        return len(set(self.blocks)) <= 1

    def alignments(self) -> dict[str, tuple[int, ...]]:
        """Return, for each dimension that meets a matrix product, the largest power of two dividing each distinct size.

        Kernels prefer multiples of 64 or 128; a removed module (size 0) is left out.
        """
        sizes = {
            "vocabulary": {self.vocabulary},
            "hidden": {self.hidden},
            "head_dim": {self.head_dim},
            "query_width": {b.query_heads * self.head_dim for b in self.blocks},
            "kv_width": {b.kv_heads * self.head_dim for b in self.blocks},
            "neurons": {b.neurons for b in self.blocks},
        }
        return {name: tuple(n & -n for n in sorted(values) if n) for name, values in sizes.items()}

    def digest(self) -> str:
        """Return 16 hexadecimal digits that identify this shape (SHA-256 of its canonical JSON).

        Fields that came later are left out where they have their default: older digests stay valid.
        """
        fields = msgspec.to_builtins(self)
        later = {"final_norms": 1, "entry_norms": 0, "mixer": (), "quantised": ""}
        kept = {name: value for name, value in fields.items() if name not in later or value != later[name]}
        return hashlib.sha256(msgspec.json.encode(kept, order="sorted")).hexdigest()[:16]
