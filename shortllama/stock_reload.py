"""What a checkpoint folder computes when stock transformers loads it: run as a script, in a process of its own.

Nothing of this package is imported here, so that a folder which passes cannot owe it to our own loader.
Input: a JSON line on stdin {"folder", "prompt", "steps", "attention"}; output: what `outputs` returns, as one line.
The attention implementation is named, because transformers 5.17 runs Gemma 2 without its soft caps by default.
"""

from __future__ import annotations

import json
import sys
from typing import Any

# What forwards call the cache that they return and take: attention's, that of state-space models, RWKV's.
CACHES = ("past_key_values", "cache_params", "state")


def outputs(model: Any, prompt: list[int], steps: int) -> dict[str, Any]:
    """Return the model's class and attention, its logits after each prompt token (T, V) and `steps` greedy tokens.

    "cache" is what `cached_decoding` says, None where the config turns the cache off. One sequence; the tokens are
    decoded one by one with a KV cache, so that cache numbering is exercised too. Without one of a known name (RWKV's
    state, with which decoding is wrong) all tokens so far are run again for each.
    """
    import torch

    device = next(model.parameters()).device
    ids = torch.tensor([prompt], device=device)
    tokens: list[int] = []
    cache = cached_decoding(model, prompt, steps) if getattr(model.config, "use_cache", True) else None
    with torch.inference_mode():
        result = model(ids, use_cache=cache is not None and cache["error"] is None)
        # State-space models name their cache otherwise.
        names = [name for name in ("past_key_values", "cache_params") if getattr(result, name, None) is not None]
        if not names:
            result = model(ids, use_cache=False)
        logits = result.logits[0].float().cpu()
        for _ in range(steps):
            new = result.logits[:, -1:].argmax(-1)
            tokens.append(int(new))
            ids = new if names else torch.cat([ids, new], dim=1)
            result = model(ids, use_cache=bool(names), **{name: getattr(result, name) for name in names})
    kind = model.config._attn_implementation
    return {
        "class": type(model).__name__,
        "attention": kind,
        "logits": logits.tolist(),
        "tokens": tokens,
        "cache": cache,
    }


def cached_decoding(model: Any, prompt: list[int], steps: int) -> dict[str, Any]:
    """Return how far decoding with the model's own cache is from one pass over the same tokens without it.

    {"difference": of the logits (2, S, V) of S = `steps` steps, at most, as a share of the largest logit, None where
    decoding failed; "error": why it failed, or None}. Two sequences are decoded: a cache that mixes them up (RWKV's,
    in transformers 5.23) is right for one.
    """
    import torch

    ids_BT = torch.tensor([prompt, prompt[1:] + prompt[:1]], device=next(model.parameters()).device)
    with torch.inference_mode():
        try:
            logits_BSV, ids_BT = _decode(model, ids_BT, steps)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            return {"difference": None, "error": f"{type(error).__name__}: {error}"}
        again_BSV = model(ids_BT[:, :-1], use_cache=False).logits[:, -steps:].double()
    difference = float((logits_BSV - again_BSV).abs().max() / again_BSV.abs().max().clamp(min=1e-30))
    return {"difference": difference if difference == difference else float("inf"), "error": None}


def _decode(model: Any, ids_BT: Any, steps: int) -> tuple[Any, Any]:
    """Return the logits (B, S, V) of greedy steps with a cache, and all tokens (B, T + S)."""
    import torch

    logits: list[Any] = []
    result = model(ids_BT, use_cache=True)
    for step in range(steps):
        logits.append(result.logits[:, -1].double())
        new_BT = result.logits[:, -1:].argmax(-1)
        ids_BT = torch.cat([ids_BT, new_BT], dim=1)
        if step + 1 < steps:
            cache = next(name for name in CACHES if getattr(result, name, None) is not None)
            result = model(new_BT, use_cache=True, **{cache: getattr(result, cache)})
    return torch.stack(logits, 1), ids_BT


def main() -> None:
    """Load the folder named on stdin in float32 with stock classes and print its outputs."""
    asked = json.loads(sys.stdin.readline())
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        asked["folder"], dtype="float32", attn_implementation=asked["attention"], trust_remote_code=False
    )
    json.dump(outputs(model.eval(), asked["prompt"], asked["steps"]), sys.stdout)


if __name__ == "__main__":
    main()
