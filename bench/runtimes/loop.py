"""Our own greedy decode loop, the same for every kind of cache: what `eager` and `static` measure.

Nothing in the timed region waits for the device: token ids stay on it, positions are given explicitly, and only the
last position's logits are computed.
"""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol

import torch

from bench.measurement import Graphs
from bench.runtimes import caches, kernels
from bench.runtimes.loading import allocating, random_prompt
from bench.runtimes.marks import Marks, marks
from bench.runtimes.operations import Counted
from bench.runtimes.protocol import Call, Options

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache


class Caches(Protocol):
    """How one kind of cache is had, for cells of up to `slots` cached tokens a sequence."""

    def fresh(self) -> Cache:
        """Return an empty cache; called before the timed region."""
        ...

    def advance(self, cache: Cache, tokens: int) -> None:
        """Make `cache`, which holds a prompt, as large as if it held `tokens` tokens."""
        ...


class CacheKind(Protocol):
    """Makes the caches of a cell."""

    def __call__(self, config: Any, slots: int) -> Caches:
        """Return the caches for a model config and the longest length."""
        ...


class Loop:
    """A session (see `protocol.Session`) that decodes greedily with caches of one kind."""

    def __init__(self, model: PreTrainedModel, options: Options, kind: CacheKind) -> None:
        self._model: Any = model
        self._options = options
        self._kind = kind
        self._keyword = caches.keyword(model)

    def clock(self) -> float:
        """Return the host's clock, seconds."""
        return perf_counter()

    @allocating
    @torch.inference_mode()
    def prepare(self, batch: int, prompt: int, output: int) -> None:
        """Draw the prompt tokens and set up the cache of a cell; what the cell before held is freed."""
        self._arrange(random_prompt(self._model.config.vocab_size, batch, prompt, self._options), output)

    def _arrange(self, ids: torch.Tensor, output: int) -> None:
        self._caches: Caches | None = None  # freed first: two caches must never be alive together
        self._ids = ids
        prompt = ids.shape[1]
        slots = prompt + output - 1
        positions = torch.arange(slots, device=ids.device).unsqueeze(0)
        self._prompt_positions = positions[:, :prompt]
        self._step_positions = tuple(positions[:, i : i + 1] for i in range(prompt, slots))
        self._caches = self._kind(self._model.config, slots)
        self._marks = marks(output, self._options.device)

    @allocating
    @torch.inference_mode()
    def call(self) -> Call:
        """Generate once, timed."""
        assert self._caches is not None, "prepare a cell first"
        cache = self._caches.fresh()
        timer = self._marks
        timer.start()
        produced = self._decode(cache, timer)
        call = timer.finish(sum(token.numel() for token in produced))
        self._check(produced)
        return call

    def _decode(self, cache: Cache, timer: Marks) -> list[torch.Tensor]:
        """Return the new tokens, (B, any number) tensors in order."""
        token = self._step(cache, self._ids, self._prompt_positions)
        timer.mark()
        produced = [token]
        for position in self._step_positions:
            token = self._step(cache, token, position)
            timer.mark()
            produced.append(token)
        return produced

    def _step(self, cache: Cache, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        given = {self._keyword: cache, "use_cache": True, "logits_to_keep": 1}
        out = self._model(input_ids=ids, position_ids=positions, **given)
        return out.logits[:, -1].argmax(-1, keepdim=True)

    def _check(self, produced: list[torch.Tensor]) -> None:
        shape = tuple(torch.cat(produced, 1).shape)
        expected = (self._ids.shape[0], len(self._step_positions) + 1)
        assert shape == expected, f"produced {shape} tokens, the cell asks for {expected}"

    @allocating
    @torch.inference_mode()
    def probe(self) -> None:
        """Run the prefill and the last step, between them the cache made as large as it would be by then."""
        assert self._caches is not None, "prepare a cell first"
        cache = self._caches.fresh()
        token = self._step(cache, self._ids, self._prompt_positions)
        if self._step_positions:
            self._caches.advance(cache, self._ids.shape[1] + len(self._step_positions) - 1)
            token = self._last_step(cache, token)
        token.cpu()  # waits for the device

    def _last_step(self, cache: Cache, token: torch.Tensor) -> torch.Tensor:
        """Return the last token of the cell, whose cache holds all others but `token`."""
        return self._step(cache, token, self._step_positions[-1])

    def graphs(self) -> Graphs | None:
        """Nothing is compiled or captured."""
        return None

    @allocating
    @torch.inference_mode()
    def operations(self) -> dict[str, int] | None:
        """Return how often the first decode step of the cell calls each operation; None without a decode step."""
        assert self._caches is not None, "prepare a cell first"
        if not self._step_positions:
            return None
        cache = self._caches.fresh()
        token = self._step(cache, self._ids, self._prompt_positions)
        with Counted() as counted:
            self._step(cache, token, self._step_positions[0])
        return counted.by_name

    @allocating
    @torch.inference_mode()
    def kernel_seconds(self) -> float | None:
        """Return the seconds that kernels of the first decode step run; None on a CPU and without a decode step."""
        assert self._caches is not None, "prepare a cell first"
        if self._options.device == "cpu" or not self._step_positions:
            return None
        cache = self._caches.fresh()
        token = self._step(cache, self._ids, self._prompt_positions)
        return kernels.seconds(lambda: self._step(cache, token, self._step_positions[0]), self._options.device)

    @allocating
    @torch.inference_mode()
    def generate(self, prompt_ids: list[list[int]], output: int) -> list[list[int]]:
        """Return the greedy new tokens (B, output)."""
        self._arrange(torch.tensor(prompt_ids, device=self._options.device), output)
        assert self._caches is not None
        self._marks.start()
        produced = self._decode(self._caches.fresh(), self._marks)
        return torch.cat(produced, 1).tolist()

    def close(self) -> None:
        """Free the model and the cache."""
        self._caches = None
        self._model = None
