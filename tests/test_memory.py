"""The memory model against the paper's Table 9, against live tensors of this project's runtimes, and its own rules."""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import shapes

from bench import memory, paper
from bench.cells import Cell
from bench.runtimes.protocol import Options
from bench.subjects import Subject
from shortllama import catalogue
from shortllama.shape import ModelShape

GIB = 1 << 30
TABLE_9 = [(row.model, row.blocks, row.batch, row.output, row.gib) for row in paper.read().memory]
RUNTIMES = st.sampled_from(["eager", "static", "paper", "roofline"])


def paper_gib(model: str, blocks: int, batch: int, output: int) -> float:
    shape = catalogue.lookup(model if blocks == len(catalogue.lookup(model).blocks) else f"{model}/depth:{blocks}")
    return memory.predict(shape, "paper", "float16", batch, 12, output, memory.PAPER_KV_COPIES) / GIB


def test_table_9_is_met_in_every_cell() -> None:
    measured = [row for row in TABLE_9 if row[4] is not None]
    errors = [abs(paper_gib(*row[:4]) / row[4] - 1) for row in measured]
    assert len(errors) == 46
    assert max(errors) < 0.012


def test_table_9s_out_of_memory_cells_are_predicted_and_no_other() -> None:
    over = [row for row in TABLE_9 if paper_gib(*row[:4]) > 80]
    assert over == [row for row in TABLE_9 if row[4] is None]
    assert len(over) == 2


def test_13b_does_not_fit_a_24_gib_card() -> None:
    assert paper_gib("llama-13b", 40, 1, 128) > 24
    assert paper_gib("llama-7b", 32, 1, 128) < 24


def test_todays_stack_needs_half_of_the_papers() -> None:
    today = memory.predict(catalogue.lookup("llama-7b"), "paper", "float16", 64, 12, 512)
    assert 29 < today / GIB < 30
    assert paper_gib("llama-7b", 32, 64, 512) == pytest.approx(61.8, rel=0.012)


@given(shapes(), RUNTIMES, st.integers(1, 64), st.integers(1, 32), st.integers(1, 32), st.sampled_from([1, 3]))
def test_more_of_anything_never_needs_less(
    shape: ModelShape, runtime: str, batch: int, prompt: int, output: int, copies: int
) -> None:
    """What the runner's implied out-of-memory rests on."""
    here = memory.predict(shape, runtime, "float16", batch, prompt, output, copies)
    assert here >= shape.weight_bytes("float16")
    for more in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
        sizes = (batch + more[0], prompt + more[1], output + more[2])
        assert memory.predict(shape, runtime, "float16", *sizes, copies) >= here


@given(shapes(), RUNTIMES, st.integers(1, 20), st.integers(1, 20), st.integers(0, 1 << 20))
def test_the_largest_batch_is_the_last_that_fits(
    shape: ModelShape, runtime: str, prompt: int, output: int, room: int
) -> None:
    limit = shape.weight_bytes("float16") + room
    found = memory.largest_batch(shape, runtime, "float16", prompt, output, limit)

    def fits(batch: int) -> bool:
        return memory.predict(shape, runtime, "float16", batch, prompt, output) <= limit

    assert found == 0 or fits(found)
    assert not fits(found + 1)


def test_no_batch_fits_where_the_weights_do_not() -> None:
    assert memory.largest_batch(catalogue.lookup("llama-13b"), "eager", "float16", 12, 128, 24 * GIB) == 0


# -- oracle: live tensors ---------------------------------------------------------------------------------------------


class Live:
    """Peak bytes of the storages that operations return while they are alive."""

    def __init__(self) -> None:
        self.peak = self.now = 0
        self._sizes: dict[int, int] = {}

    def add(self, storage: object, size: int, key: int) -> None:
        if key not in self._sizes:
            self._sizes[key] = size
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)


@contextmanager
def counting() -> Iterator[Live]:
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    live = Live()

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor):
                    storage = leaf.untyped_storage()
                    live.add(storage, storage.nbytes(), storage._cdata)
            return result

    with Counting():
        yield live


def shape_of(vocabulary: int, hidden: int, heads: int, kv: int, neurons: int, family: str = "llama") -> ModelShape:
    return ModelShape.uniform(
        family=family,
        vocabulary=vocabulary,
        hidden=hidden,
        head_dim=32,
        blocks=4,
        query_heads=heads,
        kv_heads=kv,
        neurons=neurons,
        qk_norm=family == "qwen3",
    )


@pytest.mark.parametrize("runtime", ["eager", "static"])
@pytest.mark.parametrize(
    ("shape", "dtype", "batch", "prompt", "output"),
    [
        (shape_of(500, 128, 4, 4, 344), "float32", 8, 64, 64),  # the FFN leads
        (shape_of(500, 128, 4, 4, 32), "float32", 16, 64, 4),  # attention leads
        (shape_of(500, 256, 4, 4, 32), "bfloat16", 16, 64, 4),  # a norm in float32 leads
        (shape_of(500, 128, 8, 2, 128, "qwen3"), "bfloat16", 16, 64, 2),  # a norm over q leads
        (shape_of(20_000, 64, 2, 1, 96), "float32", 4, 1, 32),  # the logits lead
        (shape_of(500, 128, 4, 2, 344), "float32", 4, 4, 64),  # the growing cache leads
    ],
    ids=["ffn", "attention", "norm", "qk-norm", "logits", "cache"],
)
def test_the_prediction_is_what_live_tensors_take(
    runtime: str, shape: ModelShape, dtype: str, batch: int, prompt: int, output: int
) -> None:
    predicted, live = predicted_and_live(runtime, shape, dtype, (batch, prompt, output), "sdpa")
    assert predicted == pytest.approx(live, rel=0.07 if shape.qk_norm else 0.035)


@pytest.mark.parametrize("runtime", ["eager", "static"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        (shape_of(100, 128, 4, 4, 64), (2, 128, 2)),
        (shape_of(100, 128, 8, 2, 64), (2, 128, 128)),  # heads that share K and V
        (shape_of(100, 256, 8, 8, 64), (8, 64, 2)),
        (shape_of(100, 64, 8, 4, 64), (16, 1, 64)),  # a step leads
        (shape_of(100, 64, 8, 4, 1024), (4, 16, 16)),  # the FFN leads all the same
    ],
    ids=["heads", "groups", "prefill", "step", "ffn"],
)
def test_score_matrices_are_counted(runtime: str, dtype: str, shape: ModelShape, sizes: tuple[int, int, int]) -> None:
    predicted, live = predicted_and_live(runtime, shape, dtype, sizes, "eager")
    assert predicted == pytest.approx(live, rel=0.035)


def test_a_family_without_sdpa_has_score_matrices_in_any_case() -> None:
    shape = shape_of(100, 128, 4, 2, 64)
    gemma = ModelShape.uniform(
        family="gemma2", vocabulary=100, hidden=128, head_dim=32, blocks=4, query_heads=4, kv_heads=2, neurons=64
    )
    sizes = ("static", "float32", 4, 128, 8)
    assert memory.predict(gemma, *sizes) == memory.predict(gemma, *sizes, attention="eager")
    assert memory.predict(shape, *sizes) < memory.predict(shape, *sizes, attention="eager")
    limit = memory.predict(shape, *sizes, attention="eager")
    cell = Cell("m", "static", "float32", "eager", 128, 8, "none", 4)
    assert memory.of_cell(shape, cell) == limit
    assert memory.largest_of(shape, cell, limit) == 4
    assert memory.largest_of(shape, msgspec.structs.replace(cell, attention="sdpa"), limit) > 4


def predicted_and_live(
    runtime: str, shape: ModelShape, dtype: str, sizes: tuple[int, int, int], attention: str
) -> tuple[int, int]:
    """Return what is predicted beside the weights, and the peak of the tensors that are alive."""
    options = Options(dtype, attention, "cpu", 0, 1)
    session = importlib.import_module(f"bench.runtimes.{runtime}").open_session(Subject("m", shape, "m"), options)
    with counting() as live:
        session.prepare(*sizes)
        session.probe()
    session.close()
    return memory.predict(shape, runtime, dtype, *sizes, attention=attention) - shape.weight_bytes(dtype), live.peak
