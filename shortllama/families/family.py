"""The row that describes a family, and the adapter that binds it to a model. Names and attribute walks only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from shortllama.shape import BlockShape, ModelShape

if TYPE_CHECKING:
    from torch import nn

# The seven projections by their short names (those of `shape.BIASES`), as paths inside a pre-norm gated block.
PROJECTIONS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
ATTENTION_PROJECTIONS = ("q", "k", "v", "o")
MLP_PROJECTIONS = ("gate", "up", "down")

# The same where q, k, v are one matrix, and gate and up another: rows one after the other in this order.
FUSED_PROJECTIONS = {
    "qkv": "self_attn.qkv_proj",
    "o": "self_attn.o_proj",
    "gate_up": "mlp.gate_up_proj",
    "down": "mlp.down_proj",
}


class Mixer(msgspec.Struct, frozen=True):
    """What a config says of a block that can only be removed whole: its tensors, and the sizes it is counted with."""

    tensors: tuple[tuple[str, tuple[int, ...]], ...]
    block: BlockShape
    head_dim: int = 1


class Family(msgspec.Struct, frozen=True, kw_only=True):
    """One transformers model type: facts that its config.json does not state, and the names of its modules.

    `biases`: projections that always have a bias; `bias_switches`: config fields that add biases to projections.
    `defaults`: config fields whose absence means this value. `any_heads`: the stock class accepts head counts that do
    not divide the hidden size. `one_head_count`: its attention reads the number of heads from the config. `sdpa`: it
    has that attention; without it, its eager one runs. `pattern`: every so many-th block has full attention, the
    others a window. `attention_norms`, `mlp_norms`: the norm in front of the module and any behind it, removed with
    it. `head_norms`: norms of size head_dim inside the attention. `norm_weight`: that of a norm that only normalizes.
    `norm_mark`: what the names of norms have in common. `entry_norm`: a norm with a bias that the first block
    applies to the embeddings, and that stays when this block goes. `block_outputs`: how many values a block returns.
    `steady`: config fields that our models have whatever their file says, because with others a forward changes the
    weights. `cache`: what the forward calls its cache, None where decoding with it disagrees with decoding without.
    `needs_bos`: without a BOS in front, a text is nothing like what it was trained on.

    `mixer` (config field by name -> Mixer) and its inverse `mixer_fields` (shape -> config fields) are for families
    whose blocks can only be removed whole; `outgoing` are the modules through which such a block adds to the stream.
    `renamed`: names in files of today's tensors; `ignored`: ends of names in files that are no weights.

    Paths of `projections`, `attention`, `mlp`, norms and `outgoing` start at a block, all others at the model.
    """

    model_type: str
    biases: tuple[str, ...] = ()
    bias_switches: Mapping[str, tuple[str, ...]] = {}
    defaults: Mapping[str, Any] = {}
    any_heads: bool = True
    sliding_window: bool = False
    one_head_count: bool = False
    sdpa: bool = True
    pattern: int | None = None
    norms_per_module: int = 1
    norm_weight: float = 1.0
    needs_bos: bool = False
    norm_mark: str = "norm"
    entry_norm: str | None = None
    block_outputs: int = 1
    steady: Mapping[str, Any] = {}
    cache: str | None = "past_key_values"
    final_norms: int = 1
    mixer: Callable[[Callable[[str], Any]], Mixer] | None = None
    mixer_fields: Callable[[ModelShape], dict[str, Any]] | None = None
    outgoing: tuple[str, ...] = ()
    renamed: Mapping[str, str] = {}
    ignored: tuple[str, ...] = ()
    head_norms: tuple[str, ...] = ()
    blocks: str = "model.layers"
    attention: str = "self_attn"
    mlp: str | None = "mlp"
    attention_norms: tuple[str, ...] = ("input_layernorm",)
    mlp_norms: tuple[str, ...] = ("post_attention_layernorm",)
    projections: Mapping[str, str] = msgspec.field(default_factory=lambda: PROJECTIONS)
    embedding: str = "model.embed_tokens"
    rotary: str | None = "model.rotary_emb"
    final_norm: str = "model.norm"
    head: str = "lm_head"


@dataclass(frozen=True)
class Adapter:
    """A model of a known family, by the parts that pruning and scoring need. Holds references, copies nothing."""

    family: Family
    model: Any

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks, in order."""
        return self.model.get_submodule(self.family.blocks)

    @property
    def embedding(self) -> nn.Embedding:
        """The token embedding."""
        return self.model.get_submodule(self.family.embedding)

    @property
    def rotary(self) -> nn.Module | None:
        """The module that turns positions into rotary cosines and sines, if any; it holds non-persistent buffers."""
        return self.model.get_submodule(self.family.rotary) if self.family.rotary else None

    @property
    def final_norm(self) -> nn.Module:
        """The norm in front of the output head."""
        return self.model.get_submodule(self.family.final_norm)

    @property
    def head(self) -> nn.Linear:
        """The output head; its weight is the embedding's where they are tied."""
        return self.model.get_submodule(self.family.head)

    @property
    def head_dim(self) -> int:
        """The size of one attention head."""
        config = self.model.config
        return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    def attention(self, block: nn.Module) -> nn.Module | None:
        """Return a block's attention, or None where it was removed."""
        return getattr(block, self.family.attention)

    def mlp(self, block: nn.Module) -> nn.Module | None:
        """Return a block's FFN, or None where it was removed."""
        return getattr(block, self.family.mlp) if self.family.mlp else None

    def norms(self, block: nn.Module) -> dict[str, nn.Module]:
        """Return the norms in front of a block's modules, by name, without removed ones."""
        names = (*self.family.attention_norms, *self.family.mlp_norms)
        return {name: norm for name in names if (norm := getattr(block, name)) is not None}

    def projections(self, block: nn.Module) -> dict[str, nn.Linear]:
        """Return a block's Linears under q, k, v, o, gate, up, down, without those of removed modules.

        Fused ones are under qkv and gate_up; an FFN without a gate has up and down only.
        """
        found: dict[str, nn.Linear] = {}
        for name, path in self.family.projections.items():
            parent, _, leaf = path.rpartition(".")
            module = getattr(block, parent)
            if module is not None:
                found[name] = getattr(module, leaf)
        return found
