"""Decoding whose step is compiled by torch.compile: one full graph over a preallocated cache, the prefill eager.

The compiler's default mode: kernels are fused and generated, and still launched one by one; what launching costs is
for `cudagraph` to take away. One compilation a cell, before its first call: a graph holds for one batch and one length.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import TYPE_CHECKING

import torch
from torch._dynamo import exc
from torch._dynamo.utils import counters

from bench.measurement import Graphs
from bench.runtimes import loading
from bench.runtimes.caches import Steady
from bench.runtimes.loop import Loop
from bench.runtimes.marks import Marks
from bench.runtimes.protocol import Options, Session
from bench.subjects import Subject

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache

NAME = "compile"
SIMULATED = False

# Takes the cache, a token (B, 1) and its position (1, 1); returns the next token and position.
Step = Callable[["Cache", torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class CompiledLoop(Loop):
    """A session (see `protocol.Session`) whose decode step is compiled for each cell."""

    def __init__(self, model: PreTrainedModel, options: Options) -> None:
        super().__init__(model, options, Steady)
        self._next: Step | None = None

    def _arrange(self, ids: torch.Tensor, output: int) -> None:
        self._next = None
        torch._dynamo.reset()  # the graphs of the cell before
        super()._arrange(ids, output)
        self._made, self._seconds, self._before = 0, 0.0, _compiled()
        if not self._step_positions:
            return
        start = perf_counter()
        self._next = self._build()
        self._seconds = perf_counter() - start
        self._made = _compiled()[0] - self._before[0]

    def _build(self) -> Step:
        """Return the compiled step, having run it; where the model does not make one graph, one with breaks."""
        for whole in (True, False):
            step: Step = torch.compile(self._step_on, fullgraph=whole, dynamic=False)
            try:
                self._try(step)
            except exc.Unsupported:
                if not whole:
                    raise
                continue
            return step
        raise AssertionError("the second way ends the loop")

    def _try(self, step: Step) -> None:
        assert self._caches is not None
        cache = self._caches.fresh()
        token, position = self._step(cache, self._ids, self._prompt_positions), self._at(self._ids.shape[1])
        for _ in range(min(2, len(self._step_positions))):  # the second finds what only a second call compiles
            token, position = step(cache, token, position)

    def _step_on(self, cache: Cache, token: torch.Tensor, position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._step(cache, token, position), position + 1

    def _at(self, position: int) -> torch.Tensor:
        """A position (1, 1) as steps return it: one sliced from a row has other strides, and would compile again."""
        return torch.full((1, 1), position, device=self._ids.device)

    def _decode(self, cache: Cache, timer: Marks) -> list[torch.Tensor]:
        token = self._step(cache, self._ids, self._prompt_positions)
        timer.mark()
        produced = [token]
        if self._next is None:
            return produced
        position = self._at(self._ids.shape[1])
        for _ in self._step_positions:
            token, position = self._next(cache, token, position)
            timer.mark()
            produced.append(token)
        return produced

    def _last_step(self, cache: Cache, token: torch.Tensor) -> torch.Tensor:
        assert self._next is not None
        last = self._ids.shape[1] + len(self._step_positions) - 1
        return self._next(cache, token, self._at(last))[0]

    def graphs(self) -> Graphs | None:
        """Return what torch.compile did for this cell."""
        graphs, breaks = _compiled()
        again = graphs - self._before[0] - self._made
        return Graphs(self._made, again, breaks - self._before[1], round(self._seconds, 3))

    def kernel_seconds(self) -> float | None:
        """The step that could be traced alone is the one before compiling, with other kernels."""
        return None

    def operations(self) -> dict[str, int] | None:
        """A compiled step calls kernels of its own making, which no dispatcher sees."""
        return None

    def close(self) -> None:
        """Free the model, the cache and the compiled code."""
        self._next = None
        super().close()
        torch._dynamo.reset()


def _compiled() -> tuple[int, int]:
    """How many graphs this process compiled so far, and how many breaks they had."""
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def open_session(subject: Subject, options: Options) -> Session:
    """Return a session of `subject`."""
    model, _ = loading.load(subject, options)
    return CompiledLoop(model, options)
