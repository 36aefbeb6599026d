"""What scoring needs in memory, in closed form, and where hidden states wait."""

from __future__ import annotations

import errno
import os
import tempfile

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shortllama import calibration, catalogue, criteria, layout, scoring, surgery
from shortllama.criteria import boundaries, memory
from shortllama.criteria.boundaries import Boundaries
from shortllama.errors import InputError
from shortllama.shape import BlockShape, ModelShape
from shortllama.variants import Variant

LLAMA = catalogue.lookup("llama-7b")
SMALL = ModelShape.uniform(
    vocabulary=41, hidden=24, head_dim=6, blocks=4, query_heads=6, kv_heads=3, neurons=20, tied=True
)


def needed(criterion: str, samples: int, length: int = 128, shape: ModelShape = LLAMA, **how) -> memory.Need:
    found = memory.need(shape, criterion, [length] * samples, **how)
    assert found is not None
    return found


def gradient_bytes(shape: ModelShape) -> int:
    return 4 * max(map(shape.block_parameters, shape.blocks))


# -- what is needed ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, 10, 1000, 100_000])
@pytest.mark.parametrize("name", ["llama-7b", "llama-13b", "llama-3-8b"])
@pytest.mark.parametrize(
    ("criterion", "estimator", "blocks"),
    [
        ("taylor", None, 1.5),
        ("taylor-sample", None, 1.5),
        ("taylor-vector", None, 1.5),
        ("llm-pruner", "param_first", 1.5),
        ("llm-pruner", "param_second", 1.5),
        ("llm-pruner", "param_mix", 2.5),
    ],
)
def test_gradients_and_activations_stay_within_what_is_promised(name, samples, criterion, estimator, blocks):
    shape = catalogue.lookup(name)
    found = needed(criterion, samples, shape=shape, variant=Variant(estimator=estimator))
    assert found.gradients + found.activations <= blocks * gradient_bytes(shape)
    assert found.states <= memory.STATES_BYTES
    state = samples * 128 * shape.hidden * 4
    assert found.states + found.file == len(shape.blocks) * state
    assert (found.file > 0) == (len(shape.blocks) * state > memory.STATES_BYTES)


def test_a_need_in_words():
    one = memory.Need(weights=1 << 29, gradients=1 << 26, states=1 << 29, activations=0)
    assert one.said() == "needs about 1.1 GiB: weights 0.5, gradients 0.062, hidden states 0.5"
    assert memory.Need(weights=123 << 20, activations=5 << 20).said() == (
        "needs about 128 MiB: weights 123, activations 5"
    )
    assert memory.Need(weights=1 << 30, file=64 << 30).said() == (
        "needs about 1 GiB: weights 1; 64 GiB of hidden states in a temporary file"
    )


def test_16_bit_models_keep_states_in_16_bits_and_one_weight_more():
    wide, narrow = (needed("taylor", 10, dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert narrow.weights * 2 == wide.weights
    token = 10 * 128 * LLAMA.hidden
    assert narrow.states == token * (31 * 2 + 4)
    assert narrow.gradients - wide.gradients == 4 * LLAMA.hidden * 11008


@given(
    samples=st.integers(1, 2000),
    length=st.integers(2, 300),
    name=st.sampled_from(sorted(set(criteria.CRITERIA) - {"random", "last", "mag", "mag-sp"})),
    dtype=st.sampled_from(["float32", "bfloat16", "float64"]),
)
def test_more_samples_never_need_less(samples, length, name, dtype):
    less, more = (needed(name, n, length, shape=SMALL, dtype=dtype) for n in (samples, samples + 1))
    assert 0 < less.beyond + less.file <= more.beyond + more.file
    assert less.weights == SMALL.weight_bytes(dtype)


@given(length=st.integers(2, 4096), dtype=st.sampled_from(["float32", "bfloat16"]))
def test_batches_hold_at_least_one_sequence_and_no_more_than_fits(length, dtype):
    forward, backward = memory.rows_forward(LLAMA, length, dtype), memory.rows_backward(LLAMA, length, dtype)
    assert 1 <= backward <= forward
    logits, states = length * LLAMA.vocabulary * 4, 33 * length * LLAMA.hidden * (4 if dtype == "float32" else 2)
    assert forward == 1 or (forward * logits <= calibration.LOGITS_BYTES and forward * states <= memory.STATES_BYTES)


def test_sequences_of_several_lengths_count_by_the_largest_batch():
    mixed = memory.need(SMALL, "ppl", [4] * 3 + [50])
    alone = memory.need(SMALL, "ppl", [50])
    assert mixed == alone
    assert memory.need(SMALL, "ppl", [4] * 300 + [50]) == memory.need(SMALL, "ppl", [4] * 300)


def test_blocks_of_different_widths_count_by_the_largest():
    wider = msgspec.structs.replace(SMALL, blocks=(BlockShape(6, 3, 20), BlockShape(6, 3, 40), BlockShape(0, 0, 0)))
    found = memory.need(wider, "taylor", [9] * 5)
    assert found is not None
    assert found.gradients == 4 * wider.block_parameters(wider.blocks[1])


def test_what_is_not_known_of_a_block_is_not_estimated():
    mamba = ModelShape(
        "mamba", 41, 24, 1, True, (BlockShape(0, 0, 0),) * 2, mixer=(("mixer.in_proj.weight", (96, 24)),)
    )
    assert memory.need(mamba, "ppl", [9]) is None
    found = memory.need(mamba, "mag", [])
    assert found is not None
    assert found.beyond == 0


def test_the_cost_records_what_was_expected_and_says_it_first():
    model, said = surgery.build(SMALL), []
    ids = np.random.default_rng(0).integers(0, 41, size=(3, 9))
    used = calibration.describe(ids, "made", seed=None, bos=None)

    def progress(done: int, total: int) -> None:
        assert said, "the need is told before the work"

    found = scoring.score_all(model, ["taylor", "bi", "norm"], used, progress=progress, note=said.append)
    expected = needed("taylor", 3, 9, shape=SMALL)
    assert said[-1] == f"taylor {expected.said()}"
    assert said[0].startswith("bi, norm needs about ")
    assert found["taylor"].cost is not None
    assert found["taylor"].cost.estimated_bytes == expected.beyond


# -- where states wait ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_states_come_back_as_they_went(limit, monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "STATES_BYTES", limit)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    generator = torch.Generator().manual_seed(0)
    states = {
        (index, dtype): torch.randn(index, 3, 5, generator=generator).to(dtype).transpose(0, 1)
        for index in (1, 2, 3)
        for dtype in (torch.bfloat16, torch.float32, torch.float16, torch.float64)
    }
    size = sum(state.nbytes for state in states.values())
    with Boundaries(size, len(states), torch.device("cpu")) as waiting:
        for key, state in states.items():
            waiting[key] = state
        for key in [*reversed(states), (2, torch.float32)]:
            assert torch.equal(waiting[key], states[key])
        waiting[2, torch.float32] = states[2, torch.float32] + 1
        assert torch.equal(waiting[2, torch.float32], states[2, torch.float32] + 1)
        assert torch.equal(waiting[3, torch.float32], states[3, torch.float32])
        assert list(tmp_path.iterdir()) == [], "the file has a name"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("criterion", "estimator"), [("taylor", None), ("taylor-sample", None), ("llm-pruner", "param_mix")]
)
def test_scores_do_not_depend_on_where_states_wait(criterion, estimator, dtype, monkeypatch, tmp_path):
    model, variant = surgery.build(SMALL, std=0.2, dtype=dtype), Variant(estimator=estimator)
    ids = np.random.default_rng(0).integers(0, 41, size=(5, 9))
    used = calibration.describe(ids, "made", seed=None, bos=None)
    in_memory = scoring.score(model, criterion, used, variant=variant)
    opened: list[int] = []
    monkeypatch.setattr(boundaries, "_InFile", lambda size: opened.append(size) or _in_file(size))
    monkeypatch.setattr(memory, "STATES_BYTES", 0)  # blocks this small are differentiated one by one in any case
    in_file = scoring.score(model, criterion, used, variant=variant)
    assert opened
    assert in_file.digest() == in_memory.digest()


_in_file = boundaries._InFile


@pytest.mark.parametrize(
    ("failure", "words"), [(errno.ENOSPC, "has too little room"), (errno.EROFS, "cannot be used (Read-only")]
)
def test_a_disk_without_room_is_said_before_any_work(failure, words, monkeypatch):
    def refuse(*_: int) -> None:
        raise OSError(failure, os.strerror(failure))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(InputError) as error:
        Boundaries(memory.STATES_BYTES + 1, 1, torch.device("cpu"))
    assert words in str(error.value)
    assert "set TMPDIR to a folder with room" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_for_the_file_that_is_not_there_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(InputError, match="cannot be used"):
        Boundaries(memory.STATES_BYTES + 1, 1, torch.device("cpu"))


def test_the_file_is_gone_when_the_walk_fails(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "STATES_BYTES", 0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = len(os.listdir("/proc/self/fd"))

    def fail() -> None:
        with Boundaries(100, 1, torch.device("cpu")):
            assert len(os.listdir("/proc/self/fd")) == before + 1
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert len(os.listdir("/proc/self/fd")) == before


def test_every_tensor_of_a_block_is_in_the_gradients():
    counted = sum(
        int(np.prod(dimensions)) for name, dimensions in layout.tensors(SMALL).items() if ".layers.1." in name
    )
    assert needed("taylor", 3, 9, shape=SMALL).gradients == 4 * counted
