"""Depth and width pruning of Llama-like models. Importing this package loads neither torch nor transformers.

    import shortllama as sl

    model, tokenizer = sl.load("reference")
    plan = sl.plan(model, method="taylor+", ratio=0.2)
    pruned = sl.apply(plan, model)

`load`, `score`, `plan` and `apply` are those of `shortllama.api`, which see.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

from shortllama import plan as _plan

if TYPE_CHECKING:
    from shortllama.api import apply as apply
    from shortllama.api import load as load
    from shortllama.api import plan as plan
    from shortllama.api import score as score

__all__ = ["apply", "load", "plan", "score"]


class _PlanModule(ModuleType):
    """The module `shortllama.plan`, which can also be called.

    The verb and the noun share the name: `shortllama.plan` is a module as soon as anything imports it, and would shadow
    a function of that name.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from shortllama import api

        return api.plan(*args, **kwargs)


_plan.__class__ = _PlanModule  # type: ignore[attr-defined]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from shortllama import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
