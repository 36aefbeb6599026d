"""A stand-in for CUDA graphs on a device without: what is recorded of a step is submitted again, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.runtimes import cudagraph


class Graph(TorchDispatchMode):
    """A graph on a device without graphs: the operations of a step, with the very tensors that they read and wrote.

    As in a CUDA graph, a replay knows nothing of Python: numbers, shapes and branches are those of the recording, and
    every result goes to the address where the recorded one lay. Reading a value on the host is refused.
    """

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[torch.Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a value is read on the host"
        found = func(*args, **(kwargs or {}))
        results = _tensors(found)
        if any(one.alias_info is not None and one.alias_info.is_write for one in func._schema.returns):
            self._calls.append((func, args, kwargs or {}, []))
        elif not {_address(one) for one in results} & {_address(one) for one in _tensors(args)}:  # not a view
            self._calls.append((func, args, kwargs or {}, results))
        return found

    @torch.inference_mode()
    def replay(self) -> None:
        for func, args, kwargs, results in self._calls:
            found = _tensors(func(*args, **kwargs))
            for place, value in zip(results, found, strict=bool(results)):
                place.copy_(value)


def _tensors(values: Any) -> list[torch.Tensor]:
    several = values if isinstance(values, tuple | list) else [values]
    return [one for one in several if torch.is_tensor(one)]


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def captured_on_host(step: Callable[[], None], rewind: Callable[[], None], device: str) -> cudagraph.Captured:
    """What `cudagraph.capture` does, but that what is submitted again is a recording made here."""
    for _ in range(cudagraph.WARM_UPS):
        rewind()
        step()
    rewind()
    with Graph() as recorded:
        step()
    rewind()  # a capture only records: nothing has run
    return cudagraph.Captured(recorded.replay, 123)
