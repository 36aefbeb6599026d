"""Depth and width pruning of Llama-like models. Importing this package loads neither torch nor transformers.

    import shortllama as sl

    model, tokenizer = sl.load("reference")
    plan = sl.plan(model, method="taylor+", ratio=0.2)
    pruned = sl.apply(plan, model)

`load`, `score`, `plan` and `apply` are those of `shortllama.api`, which see.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shortllama.api import apply as apply
    from shortllama.api import load as load
    from shortllama.api import plan as plan
    from shortllama.api import score as score

__all__ = ["apply", "load", "plan", "score"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from shortllama import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
