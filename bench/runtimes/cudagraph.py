"""Decoding by replaying one captured step: the next token is fed back inside the graph, the host only says "again".

What the device itself takes for a step, with nothing to launch. The prefill is eager; cache, token, position and
the tokens produced are buffers of fixed addresses. One capture a cell, before its first call.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from bench.measurement import Graphs
from bench.runtimes import loading
from bench.runtimes.caches import Steady
from bench.runtimes.loop import Loop
from bench.runtimes.marks import Marks
from bench.runtimes.operations import Counted
from bench.runtimes.protocol import Options, Session
from bench.subjects import Subject

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache

NAME = "cudagraph"
SIMULATED = False

WARM_UPS = 3
NOT_PRODUCED = -1


class Captured(NamedTuple):
    """A captured step: `replay` submits it again, `pool_bytes` is what its intermediate tensors occupy."""

    replay: Callable[[], object]
    pool_bytes: int


# Takes the step, what sets its buffers back to the first position, and the device.
Capture = Callable[[Callable[[], None], Callable[[], None], str], Captured]


def capture(step: Callable[[], None], rewind: Callable[[], None], device: str) -> Captured:
    """Return `step` as a CUDA graph. It runs a few times first, on a stream of its own: libraries set themselves up
    in their first call, which a capture would record or refuse. `rewind` comes before each run."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            rewind()
            step()
        rewind()
    torch.cuda.current_stream(device).wait_stream(stream)
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_reserved(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph):
        step()
    return Captured(graph.replay, torch.cuda.memory_reserved(device) - before)


class CapturedLoop(Loop):
    """A session (see `protocol.Session`) that replays one captured decode step."""

    def __init__(self, model: PreTrainedModel, options: Options, capture: Capture = capture) -> None:
        super().__init__(model, options, Steady)
        self._capture = capture
        self._captured: Captured | None = None

    def _arrange(self, ids: torch.Tensor, output: int) -> None:
        self._captured = None  # its pool is freed before the next cell's is made
        super()._arrange(ids, output)
        assert self._caches is not None
        batch, prompt = ids.shape
        self._token = torch.zeros(batch, 1, dtype=torch.long, device=ids.device)
        self._position = torch.zeros(1, 1, dtype=torch.long, device=ids.device)
        # One column a position: a step that is fed position p writes the token it produces into column p.
        self._produced = torch.full((batch, prompt + output), NOT_PRODUCED, device=ids.device)
        self._cache = self._caches.fresh()
        self._seconds = 0.0
        if self._step_positions:
            self._prefill(self._cache)
            start = perf_counter()
            self._captured = self._capture(self._advance, self._rewind, self._options.device)
            self._seconds = perf_counter() - start

    def _prefill(self, cache: Cache) -> torch.Tensor:
        """Return the first token (B, 1), having set the buffers for the first step."""
        token = self._step(cache, self._ids, self._prompt_positions)
        self._token.copy_(token)
        self._position.fill_(self._ids.shape[1])
        return token

    def _advance(self) -> None:
        """One decode step from buffers into buffers: what is captured."""
        token = self._step(self._cache, self._token, self._position)
        self._produced.index_copy_(1, self._position[0], token)
        self._token.copy_(token)
        self._position.add_(1)

    def _rewind(self) -> None:
        prompt = self._ids.shape[1]
        self._position.fill_(prompt)
        if self._caches is not None:
            self._caches.advance(self._cache, prompt)

    def _decode(self, cache: Cache, timer: Marks) -> list[torch.Tensor]:
        token = self._prefill(cache)
        timer.mark()
        if self._captured is None:
            return [token]
        replay = self._captured.replay
        for _ in self._step_positions:
            replay()
            timer.mark()
        first, steps = self._ids.shape[1], len(self._step_positions)
        return [token, self._produced[:, first : first + steps]]

    def _check(self, produced: list[torch.Tensor]) -> None:
        super()._check(produced)
        missing = int((torch.cat(produced, 1) == NOT_PRODUCED).sum())
        assert not missing, f"{missing} tokens of the cell were never written: a replay did nothing"
        self._produced.fill_(NOT_PRODUCED)

    def _last_step(self, cache: Cache, token: torch.Tensor) -> torch.Tensor:
        assert self._captured is not None
        self._token.copy_(token)
        self._position.copy_(self._step_positions[-1])
        self._captured.replay()
        return self._token

    def graphs(self) -> Graphs | None:
        """Return the capture of this cell: a graph is never captured again, since nothing of a cell changes."""
        if self._captured is None:
            return Graphs(0)
        return Graphs(1, seconds=round(self._seconds, 3), pool_bytes=self._captured.pool_bytes)

    def kernel_seconds(self) -> float | None:
        """The kernels of a graph follow each other by themselves: nothing waits to be launched."""
        return None

    @loading.allocating
    @torch.inference_mode()
    def operations(self) -> dict[str, int] | None:
        """Return how often the captured step calls each operation; None without a decode step."""
        assert self._caches is not None, "prepare a cell first"
        if not self._step_positions:
            return None
        self._prefill(self._caches.fresh())
        with Counted() as counted:
            self._advance()
        return counted.by_name

    def close(self) -> None:
        """Free the graph, the model and the cache."""
        self._captured = None
        self._cache: Any = None
        super().close()


def open_session(subject: Subject, options: Options) -> Session:
    """Return a session of `subject`."""
    model, _ = loading.load(subject, options)
    return CapturedLoop(model, options)
