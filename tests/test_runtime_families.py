"""Every family decodes the same tokens in every runtime: windows that roll and states of constant size among them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from family_cases import CASES, stock_model
from recording import captured_on_host

from bench.runtimes.caches import Growing, Preallocated
from bench.runtimes.cudagraph import CapturedLoop
from bench.runtimes.loop import Loop
from bench.runtimes.paper import PaperSession
from bench.runtimes.protocol import Options, Session
from shortllama import families
from shortllama.errors import InputError

OPTIONS = Options(dtype="float32", attention="sdpa", device="cpu", seed=3, threads=1)
PROMPTS = [[5, 17, 3, 88, 41], [1, 1, 2, 3, 5], [96, 0, 50, 25, 12]]
OUTPUT = 16
CACHED = [name for name, case in CASES.items() if families.lookup(case.model_type).cache is not None]
ROLLING = [name for name, case in CASES.items() if "sliding_window" in case.fields]


def sessions(model: Any) -> dict[str, Session]:
    return {
        "eager": Loop(model, OPTIONS, Growing),
        "static": Loop(model, OPTIONS, Preallocated),
        "cudagraph": CapturedLoop(model, OPTIONS, captured_on_host),
        "paper": PaperSession(model, None, OPTIONS),
    }


def uncached(model: Any) -> list[list[int]]:
    ids = torch.tensor(PROMPTS)
    for _ in range(OUTPUT):
        with torch.inference_mode():
            ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids[:, len(PROMPTS[0]) :].tolist()


@pytest.mark.parametrize("name", CACHED)
def test_all_runtimes_decode_what_the_model_says_without_a_cache(name: str):
    case = CASES[name]
    if name in ROLLING:  # a window that the cell does not leave
        case = dataclasses.replace(case, fields={**case.fields, "sliding_window": 64})
    model = stock_model(case)
    expected = uncached(model)
    assert len({token for row in expected for token in row}) > 5, "the tokens must differ to mean anything"
    for session in sessions(model).values():
        assert session.generate(PROMPTS, OUTPUT) == expected
        session.prepare(2, 6, 5)
        session.probe()
        assert session.call().tokens == 10
        assert session.generate(PROMPTS, OUTPUT) == expected, "what a cell left behind must not show in the next"


@pytest.mark.parametrize("name", ROLLING)
def test_beyond_its_window_a_cache_rolls_or_is_refused(name: str):
    model = stock_model(CASES[name])
    expected = uncached(model)
    made = sessions(model)
    with pytest.raises(InputError, match=r"20 positions, and the model's window is 8: .*give --runtime eager,static"):
        made.pop("cudagraph").generate(PROMPTS, OUTPUT)
    for session in made.values():
        assert session.generate(PROMPTS, OUTPUT) == expected
        session.prepare(2, 6, 12)
        session.probe()
        assert session.call().tokens == 24


def test_a_family_whose_cache_is_wrong_is_refused():
    with pytest.raises(InputError, match="rwkv decodes otherwise with its cache than without"):
        sessions(stock_model(CASES["rwkv"]))
