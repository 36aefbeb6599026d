"""Counts the operations that a piece of code asks of torch: each is a kernel to launch, so their number has a cost.

Views and `_unsafe_view` launch nothing and are not counted. The counts repeat exactly, and are the same for every batch
size; they differ with dtype, attention, cache, device and the versions of torch and transformers, so they compare
within one such setting only.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_NO_KERNEL = frozenset({"aten::_unsafe_view"})


class Counted(TorchDispatchMode):
    """A context manager that counts the operations called inside, by their names without overloads."""

    def __init__(self) -> None:
        super().__init__()
        self._counts: Counter[str] = Counter()

    @property
    def by_name(self) -> dict[str, int]:
        """How often each operation was called, names ascending."""
        return dict(sorted(self._counts.items()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # What inference mode leaves whole (a linear layer, an attention) is counted as what it is made of.
        if func is not torch.ops.prim.device.default:
            with self:
                parts = func.decompose(*args, **(kwargs or {}))
            if parts is not NotImplemented:
                return parts
        name = func._schema.name
        if not func.is_view and name not in _NO_KERNEL:
            self._counts[name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))
