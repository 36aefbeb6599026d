"""What a model writes after a prompt: greedily, and once drawn from its whole distribution with a seed.

Nothing is truncated (no top-k, no top-p), so that a pruned model's text shows what its distribution has become.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from shortllama import calibration
from shortllama.errors import InputError
from shortllama.evaluation.results import Generation

# By name, as --generate takes them. The paper's: tables 8, 11 and 12.
PROMPTS: dict[str, tuple[str, ...]] = {
    "@paper": (
        "AI can create a logo in seconds",
        "What's great about the holiday season,",
        "Neural network pruning is defined as",
    )
}
TEMPERATURES = (0.0, 1.0)


def expand(prompts: Iterable[str]) -> list[str]:
    """Return the prompts, with named sets such as `@paper` in full. Raises InputError for a blank or unknown one."""
    found: list[str] = []
    for prompt in prompts:
        if prompt.startswith("@") and prompt not in PROMPTS:
            raise InputError(f"no prompts are called {prompt!r}; known are {', '.join(PROMPTS)}")
        if not prompt.strip():
            raise InputError(f"prompt {prompt!r} is blank; give some text to go on from, or {', '.join(PROMPTS)}")
        found += PROMPTS.get(prompt, (prompt,))
    return list(dict.fromkeys(found))


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    tokens: int,
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Generation, ...]:
    """Return what the model writes after each prompt in at most `tokens` tokens, greedily and drawn with `seed`.

    A prompt begins with a BOS where the tokenizer has one. Raises InputError without a tokenizer.
    """
    if not prompts:
        return ()
    from shortllama import sampling

    tokenize = calibration.tokenize_with(tokenizer, "the prompt")
    marker = calibration.bos_id(tokenizer)
    ends = _ends(model, tokenizer)
    found: list[Generation] = []
    for prompt in prompts:
        ids_P = np.array([*([] if marker is None else [marker]), *tokenize(prompt)], dtype=np.int64)
        for temperature in TEMPERATURES:
            new = sampling.sample(model, ids_P[None], tokens, seed=seed, temperature=temperature)[
                0, len(ids_P) :
            ].tolist()
            kept = next((new[:at] for at, token in enumerate(new) if token in ends), new)
            found.append(
                Generation(
                    prompt=prompt,
                    text=_continuation(tokenizer, ids_P.tolist(), kept),
                    tokens=len(kept),
                    temperature=temperature,
                    ended=len(kept) < len(new),
                    seed=None if temperature == 0 else seed,
                )
            )
            if progress is not None:
                progress(len(found), len(prompts) * len(TEMPERATURES))
    return tuple(found)


def _ends(model: Any, tokenizer: Any) -> set[int]:
    """The tokens with which a text ends."""
    named = [getattr(getattr(model, "generation_config", None), "eos_token_id", None), tokenizer.eos_token_id]
    return {token for one in named if one is not None for token in (one if isinstance(one, list) else [one])}


def _continuation(tokenizer: Any, prompt: list[int], new: list[int]) -> str:
    """Decode the new tokens as they stand behind the prompt: alone they may lose the space that they begin with."""
    before = tokenizer.decode(prompt, skip_special_tokens=True)
    whole = tokenizer.decode([*prompt, *new], skip_special_tokens=True)
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(new, skip_special_tokens=True)
