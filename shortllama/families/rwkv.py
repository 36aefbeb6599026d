"""RWKV (version 4): time mixing in place of attention, ungated channel mixing. Its blocks are removed whole only.

In eval mode the stock forward divides weights in place, by a number that depends on the block's position, and the
hidden state with them: a guard against overflow in float16 that changes nothing else. It is switched off, so that
weights may be sliced after a forward, and renumbered. The norm that the first block applies to the embeddings stays
when that block goes. Cached decoding disagrees with the uncached one (transformers 5.17 to 5.23), so it is not used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from shortllama.families.family import Family, Mixer
from shortllama.shape import BlockShape, ModelShape


def _mixer(field: Callable[[str], Any]) -> Mixer:
    hidden = int(field("hidden_size"))
    inner = int(field("attention_hidden_size") or hidden)
    neurons = int(field("intermediate_size") or 4 * hidden)
    mixed = {"attention": ("key", "value", "receptance"), "feed_forward": ("key", "receptance")}
    return Mixer(
        (
            *((f"{norm}.{leaf}", (hidden,)) for norm in ("ln1", "ln2") for leaf in ("weight", "bias")),
            *((f"attention.{name}", (inner,)) for name in ("time_decay", "time_first")),
            *((f"{part}.time_mix_{name}", (1, 1, hidden)) for part, names in mixed.items() for name in names),
            *((f"attention.{name}.weight", (inner, hidden)) for name in mixed["attention"]),
            ("attention.output.weight", (hidden, inner)),
            ("feed_forward.key.weight", (neurons, hidden)),
            ("feed_forward.receptance.weight", (hidden, hidden)),
            ("feed_forward.value.weight", (hidden, neurons)),
        ),
        BlockShape(0, 0, neurons),
    )


def _fields(shape: ModelShape) -> dict[str, Any]:
    tensors = dict(shape.mixer)
    return {
        "attention_hidden_size": tensors["attention.key.weight"][0],
        "intermediate_size": tensors["feed_forward.key.weight"][0],
    }


FAMILY = Family(
    model_type="rwkv",
    defaults={"attention_hidden_size": None, "intermediate_size": None},
    steady={"rescale_every": 0},
    cache=None,
    sdpa=False,
    entry_norm="pre_ln",
    block_outputs=3,
    norm_mark="ln",
    final_norms=2,
    mixer=_mixer,
    mixer_fields=_fields,
    outgoing=("attention.output", "feed_forward.value"),
    blocks="rwkv.blocks",
    attention="attention",
    mlp="feed_forward",
    attention_norms=("ln1",),
    mlp_norms=("ln2",),
    projections={},
    embedding="rwkv.embeddings",
    rotary=None,
    final_norm="rwkv.ln_out",
    head="head",
)
