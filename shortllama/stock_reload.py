"""What a checkpoint folder computes when stock transformers loads it: run as a script, in a process of its own.

Nothing of this package is imported here, so that a folder which passes cannot owe it to our own loader.
Input: a JSON line on stdin {"folder", "prompt", "steps", "attention"}; output: what `outputs` returns, as one line.
The attention implementation is named, because transformers 5.17 runs Gemma 2 without its soft caps by default.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def outputs(model: Any, prompt: list[int], steps: int) -> dict[str, Any]:
    """Return the model's class and attention, its logits after each prompt token (T, V) and `steps` greedy tokens.

    One sequence; the tokens are decoded one by one with a KV cache, so that cache numbering is exercised too. Without
    one of a known name (RWKV's state, with which decoding is wrong) all tokens so far are run again for each.
    """
    import torch

    device = next(model.parameters()).device
    ids = torch.tensor([prompt], device=device)
    tokens: list[int] = []
    with torch.inference_mode():
        result = model(ids, use_cache=True)
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
    return {"class": type(model).__name__, "attention": kind, "logits": logits.tolist(), "tokens": tokens}


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
