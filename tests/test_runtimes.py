"""The measured runtimes produce the same tokens, exactly as many as asked, without waiting for the device."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any, cast

import pytest

torch = pytest.importorskip("torch")

from recording import Graph, captured_on_host  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from bench.measurement import Graphs  # noqa: E402
from bench.runtime_rows import ROWS, SIMULATED, refusal  # noqa: E402
from bench.runtimes import cudagraph, load  # noqa: E402
from bench.runtimes.caches import Growing, Preallocated  # noqa: E402
from bench.runtimes.compile import CompiledLoop  # noqa: E402
from bench.runtimes.loading import allocating, random_prompt  # noqa: E402
from bench.runtimes.loop import Loop  # noqa: E402
from bench.runtimes.paper import PaperSession  # noqa: E402
from bench.runtimes.protocol import Options, OutOfMemory, Session  # noqa: E402
from bench.subjects import Subject  # noqa: E402
from shortllama import surgery  # noqa: E402
from shortllama.errors import InputError  # noqa: E402
from shortllama.shape import BlockShape, ModelShape  # noqa: E402

OPTIONS = Options(dtype="float32", attention="sdpa", device="cpu", seed=3, threads=1)
PROMPTS = [[5, 17, 3, 88, 41], [1, 1, 2, 3, 5], [96, 0, 50, 25, 12]]


def non_uniform(tiny: ModelShape) -> ModelShape:
    blocks = (BlockShape(8, 4, 96), BlockShape(2, 1, 33), BlockShape(6, 3, 64))
    return ModelShape(**{f: getattr(tiny, f) for f in tiny.__struct_fields__ if f != "blocks"}, blocks=blocks)


needs_compiler = pytest.mark.skipif(bool(refusal("compile", "cpu")), reason=refusal("compile", "cpu") or "")

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


# -- compiled and captured steps --------------------------------------------------------------------------------------


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("output", [1, 2, 24])
def test_replaying_a_step_produces_the_tokens_of_the_loop(uneven: bool, output: int, tiny_shape: ModelShape) -> None:
    model = large_weights(non_uniform(tiny_shape) if uneven else tiny_shape)
    session = cudagraph.CapturedLoop(model, OPTIONS, captured_on_host)
    expected = SESSIONS["static"](model).generate(PROMPTS, output)
    assert session.generate(PROMPTS, output) == expected
    session.prepare(2, 6, 5)
    session.probe()
    first, second = session.call(), session.call()
    assert (first.tokens, second.tokens, len(second.step_s)) == (10, 10, 4)
    assert session.generate(PROMPTS, output) == expected, "what a cell left behind must not show in the next"


def test_a_recording_knows_nothing_of_python() -> None:
    """The recording of these tests would catch a step that counts on the host."""
    place, count = torch.zeros(3), [0]

    def step() -> None:
        place[count[0]] = 1.0
        count[0] += 1

    with Graph() as recorded:
        step()
    recorded.replay()
    assert place.tolist() == [1.0, 0.0, 0.0]
    with pytest.raises(AssertionError, match="read on the host"), Graph():
        place.sum().item()


def test_a_replay_that_does_nothing_is_noticed(tiny_shape: ModelShape) -> None:
    def broken(step: Callable[[], None], rewind: Callable[[], None], device: str) -> cudagraph.Captured:
        return cudagraph.Captured(lambda: None, 0)

    session = cudagraph.CapturedLoop(large_weights(tiny_shape), OPTIONS, broken)
    session.prepare(2, 6, 4)
    with pytest.raises(AssertionError, match="6 tokens of the cell were never written"):
        session.call()


def test_captures_are_counted_with_their_memory(tiny_shape: ModelShape) -> None:
    session = cudagraph.CapturedLoop(large_weights(tiny_shape), OPTIONS, captured_on_host)
    for output, made in ((1, 0), (4, 1)):
        session.prepare(1, 4, output)
        session.call()
        found = session.graphs()
        assert found is not None
        assert (found.made, found.again, found.pool_bytes) == (made, 0, 123 if made else None)


def test_a_capture_warms_up_on_its_own_stream_and_records_once(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    class Named:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: Named) -> None:
            events.append(f"{self.name} waits for {other.name}")

        def __enter__(self) -> None:
            events.append(f"enter {self.name}")

        def __exit__(self, *_: object) -> None:
            events.append(f"leave {self.name}")

    reserved = iter([1000, 1234])
    fakes = {
        "Stream": lambda device: Named("side"),
        "current_stream": lambda device: Named("main"),
        "stream": lambda stream: stream,
        "synchronize": lambda device: events.append("synchronise"),
        "memory_reserved": lambda device: next(reserved),
        "CUDAGraph": lambda: type("Graph", (), {"replay": lambda self: events.append("replay")})(),
        "graph": lambda graph: Named("capture"),
        "device": lambda device: Named("device"),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    found = cudagraph.capture(lambda: events.append("step"), lambda: events.append("rewind"), "cuda:0")
    warm_up = ["rewind", "step"] * 3
    assert events == [
        "side waits for main", "enter side", *warm_up, "rewind", "leave side", "main waits for side", "synchronise",
        "enter device", "enter capture", "step", "leave capture", "leave device",
    ]  # fmt: skip
    assert found.pool_bytes == 234
    found.replay()
    assert events[-1] == "replay"


@needs_compiler
@pytest.mark.slow
def test_a_compiled_step_is_one_graph_and_produces_the_tokens_of_the_loop(tiny_shape: ModelShape) -> None:
    model = large_weights(blocks_of(tiny_shape, 1))
    session = CompiledLoop(model, OPTIONS)
    try:
        assert session.generate(PROMPTS, 9) == SESSIONS["static"](model).generate(PROMPTS, 9)
        session.prepare(3, 5, 9)  # the batch and length that were compiled for: the compiler's cache answers
        session.probe()
        for _ in range(2):
            assert session.call().tokens == 27
        found = session.graphs()
        assert found is not None
        assert (found.made, found.again, found.breaks, found.pool_bytes) == (1, 0, 0, None)
        assert found.seconds > 0
        assert session.operations() is None
        session.prepare(1, 5, 1)
        assert (session.call().tokens, session.graphs()) == (1, Graphs(0))
        session.prepare(3, 5, 9)
        session._ids = session._ids[:1]  # a call of another batch than the one that was compiled for
        session._caches = Preallocated(session._model.config, 13)
        session.call()
        found = session.graphs()
        assert found is not None
        assert (found.made, found.again > 0) == (1, True)
    finally:
        session.close()


# -- operations --------------------------------------------------------------------------------------------------------


def blocks_of(tiny: ModelShape, count: int) -> ModelShape:
    fields = {f: getattr(tiny, f) for f in tiny.__struct_fields__ if f != "blocks"}
    return ModelShape(**fields, blocks=tiny.blocks[:1] * count)


@pytest.mark.parametrize("name", [*SESSIONS, "cudagraph"])
def test_operations_of_a_step_repeat_exactly_and_grow_by_the_block(name: str, tiny_shape: ModelShape) -> None:
    make = SESSIONS.get(name, lambda model: cudagraph.CapturedLoop(model, OPTIONS, captured_on_host))
    totals: list[int] = []
    for blocks in (1, 2, 5):
        seen = []
        for batch in (1, 3):
            session = make(large_weights(blocks_of(tiny_shape, blocks)))
            session.prepare(batch, 6, 5)
            session.call()
            seen.append(session.operations())
        assert seen[0] == seen[1], "counts do not depend on the batch"
        assert sum(count for name, count in seen[0].items() if "scaled_dot_product" in name) == blocks
        assert not {"view", "transpose", "_unsafe_view"} & seen[0].keys(), "views launch nothing"
        totals.append(sum(seen[0].values()))
    assert totals[2] - totals[1] == 3 * (totals[1] - totals[0]) > 0


def test_a_cell_without_a_decode_step_has_no_operations(tiny_shape: ModelShape) -> None:
    session = SESSIONS["static"](large_weights(tiny_shape))
    session.prepare(1, 6, 1)
    assert session.operations() is None


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


@pytest.mark.parametrize("name", sorted(set(ROWS) - SIMULATED - {"cudagraph"}))
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
