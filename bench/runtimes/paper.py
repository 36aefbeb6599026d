"""What the paper timed: transformers' `generate` with sampling, one call, the whole call.

Protocol of Shortened LLaMA (arXiv 2402.02834) and its scripts: the prompt below, top-k 50, top-p 0.95, temperature 1,
minimum length = maximum length, outputs returned as a dict. Deviations: no output is kept from one call to the next
(theirs kept one, with its cache), and the prompt is repeated or cut to the cell's length.
"""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig

from bench.measurement import Graphs
from bench.runtimes import loading
from bench.runtimes.loading import allocating, random_prompt
from bench.runtimes.marks import marks
from bench.runtimes.operations import Counted
from bench.runtimes.protocol import Call, Options, Session
from bench.subjects import Subject

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "paper"
SIMULATED = False
PROMPT = "The Leaning Tower of Pisa is known for"


class PaperSession:
    """A session (see `protocol.Session`) around `generate`."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any, options: Options) -> None:
        self._model: Any = model
        self._tokenizer = tokenizer
        self._options = options
        # An end-of-sequence token anywhere would end sequences early; generate fills unset fields from these two.
        self._model.generation_config = GenerationConfig()
        self._model.config.eos_token_id = None
        torch.manual_seed(options.seed)

    def clock(self) -> float:
        """Return the host's clock, seconds."""
        return perf_counter()

    @allocating
    def prepare(self, batch: int, prompt: int, output: int) -> None:
        """Lay out the prompt: the paper's text where the subject has a tokenizer, else random tokens."""
        if self._tokenizer is None:
            self._ids = random_prompt(self._model.config.vocab_size, batch, prompt, self._options)
        else:
            text: list[int] = self._tokenizer(PROMPT)["input_ids"]
            row = [text[i % len(text)] for i in range(prompt)]
            self._ids = torch.tensor([row], device=self._options.device).repeat(batch, 1)
        self._output = output
        self._marks = marks(output, self._options.device)

    @allocating
    def call(self) -> Call:
        """Generate once, timed; a token counts as done when the forward pass after it begins."""
        timer = self._marks
        passes = 0

        def mark(*_: object) -> None:
            nonlocal passes
            if passes:
                timer.mark()
            passes += 1

        hook = self._model.register_forward_pre_hook(mark)
        try:
            timer.start()
            produced = self._sample()
            timer.mark()
            call = timer.finish(produced.numel())
        finally:
            hook.remove()
        expected = (self._ids.shape[0], self._output)
        assert tuple(produced.shape) == expected, f"produced {tuple(produced.shape)} tokens, the cell asks {expected}"
        return call

    def _sample(self, output: int | None = None) -> torch.Tensor:
        """Return the new tokens (B, L). The rest of what generate returns, its cache among it, is dropped here."""
        options = GenerationConfig(
            do_sample=True, top_k=50, top_p=0.95, temperature=1.0, **_exactly(output or self._output)
        )
        out = self._model.generate(self._ids, attention_mask=torch.ones_like(self._ids), generation_config=options)
        return out.sequences[:, self._ids.shape[1] :]

    def probe(self) -> None:
        """Generate once: sampling has buffers of its own, which no shorter run would show."""
        self.call()

    def graphs(self) -> Graphs | None:
        """Nothing is compiled or captured."""
        return None

    def kernel_seconds(self) -> float | None:
        """The steps of `generate` are not run one by one."""
        return None

    @allocating
    def operations(self) -> dict[str, int] | None:
        """Return how often one more token calls each operation: a call of 3 tokens less one of 2, sampling included."""
        counts: list[dict[str, int]] = []
        for output in (2, 3):
            with Counted() as counted:
                self._sample(output)
            counts.append(counted.by_name)
        more = {name: count - counts[0].get(name, 0) for name, count in counts[1].items()}
        return {name: count for name, count in more.items() if count}

    @allocating
    def generate(self, prompt_ids: list[list[int]], output: int) -> list[list[int]]:
        """Return the greedy new tokens (B, output) of `generate` without sampling."""
        ids = torch.tensor(prompt_ids, device=self._options.device)
        options = GenerationConfig(do_sample=False, **_exactly(output))
        out = self._model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=options)
        return out.sequences[:, ids.shape[1] :].tolist()

    def close(self) -> None:
        """Free the model."""
        self._model = None


def _exactly(output: int) -> dict[str, Any]:
    """Generation options for exactly `output` new tokens."""
    return {
        "max_new_tokens": output,
        "min_new_tokens": output,
        "eos_token_id": None,
        "pad_token_id": 0,
        "use_cache": True,
        "return_dict_in_generate": True,
    }


def open_session(subject: Subject, options: Options) -> Session:
    """Return a session of `subject`."""
    model, tokenizer = loading.load(subject, options)
    return PaperSession(model, tokenizer, options)
