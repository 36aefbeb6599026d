"""The measured runtimes produce the same tokens, exactly as many as asked, without waiting for the device."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any, cast

import pytest

torch = pytest.importorskip("torch")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from bench.runtimes import MODULES, SIMULATED, load  # noqa: E402
from bench.runtimes.eager import Growing  # noqa: E402
from bench.runtimes.loading import allocating, random_prompt  # noqa: E402
from bench.runtimes.loop import Loop  # noqa: E402
from bench.runtimes.paper import PaperSession  # noqa: E402
from bench.runtimes.protocol import Options, OutOfMemory, Session  # noqa: E402
from bench.runtimes.static import Preallocated  # noqa: E402
from bench.subjects import Subject  # noqa: E402
from shortllama import surgery  # noqa: E402
from shortllama.errors import InputError  # noqa: E402
from shortllama.shape import BlockShape, ModelShape  # noqa: E402

OPTIONS = Options(dtype="float32", attention="sdpa", device="cpu", seed=3, threads=1)
PROMPTS = [[5, 17, 3, 88, 41], [1, 1, 2, 3, 5], [96, 0, 50, 25, 12]]


def non_uniform(tiny: ModelShape) -> ModelShape:
    blocks = (BlockShape(8, 4, 96), BlockShape(2, 1, 33), BlockShape(6, 3, 64))
    return ModelShape(**{f: getattr(tiny, f) for f in tiny.__struct_fields__ if f != "blocks"}, blocks=blocks)


SESSIONS: dict[str, Callable[..., Session]] = {
    "eager": lambda model: Loop(model, OPTIONS, Growing),
    "static": lambda model: Loop(model, OPTIONS, Preallocated),
    "paper": lambda model: PaperSession(model, None, OPTIONS),
}


def large_weights(shape: ModelShape, attention: str = "sdpa", seed: int = 0):
    # Weights of the usual 0.02 repeat one token for ever, and every loop would agree on it.
    return surgery.build(shape, std=0.15, seed=seed, attention=attention)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("uneven", [False, True])
def test_greedy_tokens_are_equal_in_all_runtimes(tiny_shape: ModelShape, attention: str, uneven: bool) -> None:
    shape = non_uniform(tiny_shape) if uneven else tiny_shape
    model = large_weights(shape, attention)
    produced = {name: make(model).generate(PROMPTS, 24) for name, make in SESSIONS.items()}
    assert len({token for row in produced["eager"] for token in row}) > 10, "the tokens must differ to mean anything"
    assert [len(row) for row in produced["eager"]] == [24] * 3
    assert produced["eager"] == produced["static"] == produced["paper"]


def test_greedy_tokens_equal_decoding_without_any_cache(tiny_shape: ModelShape) -> None:
    model = large_weights(tiny_shape)
    ids = torch.tensor(PROMPTS)
    with torch.no_grad():
        for _ in range(12):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert SESSIONS["static"](model).generate(PROMPTS, 12) == ids[:, 5:].tolist()


@pytest.mark.parametrize("name", SESSIONS)
@pytest.mark.parametrize("output", [1, 2, 9])
def test_a_call_has_exactly_the_tokens_and_times_of_its_cell(name: str, output: int, tiny_shape: ModelShape) -> None:
    session = SESSIONS[name](large_weights(tiny_shape))
    session.prepare(2, 6, output)
    for _ in range(2):
        call = session.call()
        assert call.tokens == 2 * output
        assert len(call.step_s) == output - 1
        assert call.device_s is None
        assert 0 < call.prefill_s <= call.call_s
        assert min(call.step_s, default=1) > 0
        assert call.prefill_s + sum(call.step_s) <= call.call_s


@pytest.mark.parametrize("name", SESSIONS)
def test_an_end_token_does_not_end_a_generation(name: str, tiny_shape: ModelShape) -> None:
    model = large_weights(tiny_shape)
    first = SESSIONS["eager"](model).generate(PROMPTS, 1)[0][0]
    model.generation_config.eos_token_id = first
    model.config.eos_token_id = first
    session = SESSIONS[name](model)
    assert [len(row) for row in session.generate(PROMPTS, 8)] == [8] * 3
    session.prepare(3, 5, 8)
    assert session.call().tokens == 24


@pytest.mark.parametrize(("kind", "attribute"), [(Growing, None), (Preallocated, "cumulative_length")])
def test_a_probe_leaves_the_cache_as_a_whole_call_does(kind, attribute: str | None, tiny_shape: ModelShape) -> None:
    caches = []

    class Watched(kind):
        def fresh(self):
            caches.append(super().fresh())
            return caches[-1]

    session = Loop(large_weights(tiny_shape), OPTIONS, cast(Any, Watched))
    session.prepare(2, 6, 7)

    def sizes() -> list[tuple]:
        layers = caches[-1].layers
        return [(tuple(layer.keys.shape), attribute and int(getattr(layer, attribute))) for layer in layers]

    session.call()
    whole = sizes()
    assert whole[0][0] == (2, 4, 12, 8)  # batch, KV heads, prompt + output - 1, head_dim
    session.probe()
    assert sizes() == whole


class Recorded(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["eager", "static"])
def test_no_step_reads_the_device(name: str, tiny_shape: ModelShape) -> None:
    session = SESSIONS[name](large_weights(tiny_shape))
    counts = []
    for output in (4, 12):
        session.prepare(1, 5, output)
        session.call()
        with Recorded() as seen:
            session.call()
        # _local_scalar_dense is .item(): the host waits for it. Copies between dtypes or devices would show as well.
        assert not [op for op in seen.names if "_local_scalar_dense" in op or ("_to_copy" in op and name == "eager")]
        counts.append(len(seen.names))
    assert counts[1] > counts[0]


def test_prompts_are_random_seeded_and_nested(tiny_shape: ModelShape) -> None:
    large = random_prompt(97, 8, 12, OPTIONS)
    assert torch.equal(random_prompt(97, 2, 12, OPTIONS), large[:2])
    assert len(large.unique()) > 20
    assert int(large.max()) < 97


def test_the_paper_prompt_is_its_text_where_there_is_a_tokenizer(tiny_shape: ModelShape) -> None:
    class Tokenizer:
        def __call__(self, text: str) -> dict[str, list[int]]:
            assert text == "The Leaning Tower of Pisa is known for"
            return {"input_ids": [1, 7, 9]}

    session = PaperSession(large_weights(tiny_shape), Tokenizer(), OPTIONS)
    session.prepare(2, 5, 1)
    assert session._ids.tolist() == [[1, 7, 9, 1, 7]] * 2


def test_a_failed_allocation_is_out_of_memory_and_holds_no_tensor() -> None:
    @allocating
    def fail() -> None:
        held = torch.zeros(8)
        kept.append(weakref.ref(held))
        torch.empty(1 << 50)

    kept: list = []
    with pytest.raises(OutOfMemory, match="can't allocate memory"):
        fail()
    gc.collect()
    assert kept[0]() is None


def test_other_failures_pass_through() -> None:
    @allocating
    def fail() -> None:
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        fail()


@pytest.mark.parametrize("name", sorted(set(MODULES) - SIMULATED))
def test_a_session_opens_from_a_shape(name: str, tiny_shape: ModelShape) -> None:
    module = load(name)
    assert (module.NAME, module.SIMULATED) == (name, False)
    session = module.open_session(Subject("tiny", tiny_shape, "tiny"), OPTIONS)
    session.prepare(1, 3, 2)
    assert session.call().tokens == 2
    session.close()


def test_a_checkpoint_that_is_not_the_subject_is_refused(stories, tiny_shape: ModelShape) -> None:
    subject = Subject("stories", tiny_shape, "stories", folder=str(stories))
    with pytest.raises(InputError, match=r"holds 292,800 parameters|holds [\d,]+ parameters, its shape says"):
        load("eager").open_session(subject, OPTIONS)
