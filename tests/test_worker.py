"""A measuring child reports what happened in each cell; on a CPU memory ends for real, where the memory model says."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bench import children, environment, jobs, memory, outcomes, worker
from bench.cells import Cell
from bench.runtimes.protocol import Options, OutOfMemory
from bench.runtimes.roofline import Script
from bench.subjects import Subject
from shortllama.shape import ModelShape

MIB = 1 << 20

# Large enough that its tensors outweigh pages and code, small enough to build at once: 6.3 MiB of weights.
SMALL = ModelShape.uniform(
    vocabulary=512, hidden=128, head_dim=32, blocks=6, query_heads=4, kv_heads=4, neurons=512, tied=True
)


@pytest.fixture(scope="module", autouse=True)
def server() -> None:
    """The fork server of this test process: with torch, whichever test starts it."""
    children.serve(children.TORCH_MODULES, environment.child_variables(1))


def cell(batch: int, runtime: str = "roofline", prompt: int = 8, output: int = 8) -> Cell:
    return Cell("small", runtime, "float32", "sdpa", prompt, output, "none", batch)


def job(*cells: Cell, **more: Any) -> jobs.Job:
    device = "cpu" if cells[0].runtime != "roofline" else "rtx3090"
    options = Options("float32", cells[0].attention, device, 0, 1)
    purpose = "probe" if "limit_bytes" in more else "measure"
    return jobs.Job(Subject("small", SMALL, "small"), cells[0].runtime, options, cells, purpose, **more)


def in_process(work: jobs.Job) -> list[jobs.Message]:
    """Run a job here: a simulated one needs no process of its own."""
    sent: list[bytes] = []
    worker.run(msgspec.json.encode(work), sent.append)
    return [jobs.DECODER.decode(message) for message in sent]


def in_child(work: jobs.Job) -> list[Any]:
    heard: list[Any] = []
    with children.Child(worker.run, msgspec.json.encode(work), environment.child_variables(1)) as child:
        try:
            while True:
                heard.append(jobs.DECODER.decode(child.receive(120)))
        except children.Ended as end:
            heard.append(end)
    return heard


def finished(messages: list[Any]) -> dict[int, jobs.Finished]:
    return {one.index: one for one in messages if isinstance(one, jobs.Finished)}


def script(**faults: Any) -> str:
    return msgspec.json.encode(Script(**faults)).decode()


# -- messages -----------------------------------------------------------------------------------------------------


def test_a_simulated_job_reports_every_cell_in_order() -> None:
    messages = in_process(job(cell(1), cell(4), timing="careful", cell_seconds=1.0, script=script()))
    kinds = [type(one) for one in messages]
    assert kinds == [jobs.Loaded, jobs.Began, jobs.Finished, jobs.Began, jobs.Finished]
    for index, batch in ((0, 1), (1, 4)):
        one = finished(messages)[index]
        assert one.tokens == batch * 8
        assert len(one.samples.call_s) >= 10
        assert len(one.samples.step_s) == 7
        assert one.memory.allocated == memory.predict(SMALL, "roofline", "float32", batch, 8, 8)


def test_the_paper_rule_is_ten_and_twenty() -> None:
    messages = in_process(job(cell(1), timing="paper", cell_seconds=1.0, script=script()))
    one = finished(messages)[0]
    assert (one.warm_up, len(one.samples.call_s), one.stop) == (10, 20, "repeats")


@pytest.mark.parametrize(("fault", "oom"), [({"oom_from": 2}, True), ({"fail_from": 2}, False)])
def test_a_fault_ends_the_job_and_names_its_cell(fault: dict[str, int], oom: bool) -> None:
    cells = (cell(1), cell(2), cell(4))
    last = in_process(job(*cells, timing="careful", cell_seconds=1.0, script=script(**fault)))[-1]
    assert isinstance(last, jobs.Broke)
    assert (last.index, last.oom) == (1, oom)
    assert "batch 2" in last.text


def test_a_subject_that_does_not_fit_breaks_before_its_first_cell() -> None:
    work = job(cell(1), timing="careful", cell_seconds=1.0, script=script())
    tight = msgspec.structs.replace(work, options=msgspec.structs.replace(work.options, budget_bytes=MIB))
    (only,) = in_process(tight)
    assert isinstance(only, jobs.Broke)
    assert (only.index, only.oom) == (-1, True)


# -- memory, for real ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("runtime", ["eager", "static"])
def test_peaks_are_those_of_the_memory_model(runtime: str) -> None:
    batches = (16, 64, 256)
    found = finished(in_child(job(*(cell(b, runtime, 16, 24) for b in batches), limit_bytes=1024 * MIB)))
    for index, batch in enumerate(batches):
        expected = memory.predict(SMALL, runtime, "float32", batch, 16, 24)
        seen = found[index].memory.allocated
        # Beside tensors there are pages of code that run for the first time, some 3 MiB.
        assert seen == pytest.approx(expected, rel=0.08, abs=4 * MIB), (batch, seen, expected)


@pytest.mark.parametrize("runtime", ["eager", "static"])
def test_memory_ends_where_the_model_says(runtime: str) -> None:
    limit = 64 * MIB
    most = memory.largest_batch(SMALL, runtime, "float32", 16, 24, limit)
    batches = (1, round(0.95 * most), round(1.05 * most), 2 * most)
    messages = in_child(job(*(cell(b, runtime, 16, 24) for b in batches), limit_bytes=limit))
    assert sorted(finished(messages)) == [0, 1]
    broke = messages[-2]
    assert isinstance(broke, jobs.Broke)
    assert (broke.index, broke.oom) == (2, True)
    assert "can't allocate memory" in broke.text


def test_a_whole_call_fits_where_its_probe_does(monkeypatch: pytest.MonkeyPatch) -> None:
    # The probe stands for the whole generation; were its peak lower, a cell could pass it and then run out of memory.
    cells = tuple(cell(b, "eager", 16, 24) for b in (64, 200))
    probed = finished(in_child(job(*cells, limit_bytes=1024 * MIB)))
    whole = finished(in_child_calling(job(*cells, limit_bytes=1024 * MIB)))
    for index in (0, 1):
        assert probed[index].memory.allocated == pytest.approx(
            whole[index].memory.allocated,
            rel=0.03,
            abs=3 * MIB,  # pages of code that run for the first time
        )


def in_child_calling(work: jobs.Job) -> list[Any]:
    heard: list[Any] = []
    with children.Child(run_whole_calls, msgspec.json.encode(work), environment.child_variables(1)) as child:
        for _ in range(1 + 2 * len(work.cells)):
            heard.append(jobs.DECODER.decode(child.receive(120)))
    return heard


def run_whole_calls(work: bytes, send: Any) -> None:
    """Entry of a child: the memory pass with whole calls in place of probes."""
    from bench.runtimes.loop import Loop

    def call(self: Any) -> None:
        self.call()

    Loop.probe = call  # type: ignore[method-assign]
    worker.run(work, send)


def test_weights_count_against_the_budget() -> None:
    (broke, end) = in_child(job(cell(1, "eager"), limit_bytes=4 * MIB))
    assert isinstance(broke, jobs.Broke)
    assert (broke.index, broke.oom) == (-1, True)
    assert isinstance(end, children.Ended)


def test_a_timing_pass_has_no_limit_and_real_samples() -> None:
    messages = in_child(job(cell(1, "static"), cell(4, "static"), timing="careful", cell_seconds=0.05))
    found = finished(messages)
    assert sorted(found) == [0, 1]
    for one in found.values():
        assert one.stop in ("interval", "flat", "time", "repeats")
        assert len(one.samples.call_s) >= 3
        assert min(one.samples.call_s) > sum(one.samples.step_s) / 10
        assert one.memory.allocated is None


def test_a_profile_is_a_trace_with_the_longest_operations(tmp_path: Path) -> None:
    one = cell(2, "static")
    work = msgspec.structs.replace(job(one), purpose="profile", folder=str(tmp_path))
    found = finished(in_child(work))[0].profile
    assert found is not None
    assert [path.name for path in tmp_path.iterdir()] == [f"{one.id}.json.gz"]
    trace = msgspec.json.decode(gzip.decompress((tmp_path / f"{one.id}.json.gz").read_bytes()))
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {name for name, *_ in found.longest} <= names
    assert "aten::mm" in names or "aten::addmm" in names
    seconds = [took for *_, took in found.longest]
    assert seconds == sorted(seconds, reverse=True)
    assert 0 < sum(seconds) < 1.5 * found.wall_s
    assert found.kernel_s is None


def test_counting_operations_that_does_not_fit_leaves_the_row_without(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.passes import measure
    from bench.runtimes.protocol import OutOfMemory

    class Full:
        def graphs(self) -> None:
            return None

        def operations(self) -> None:
            raise OutOfMemory("full")

        def kernel_seconds(self) -> None:
            raise OutOfMemory("full")

    whole = jobs.Finished(0, 0.0, tokens=8)
    assert measure._with_operations(whole, Full()) == whole  # type: ignore[arg-type]
    assert measure._with_kernels(whole, Full()) == whole  # type: ignore[arg-type]


def test_kernels_are_profiled_once_a_child(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.passes import measure

    class Traced:
        def graphs(self) -> None:
            return None

        def operations(self) -> dict[str, int]:
            return {"mm": 1}

        def kernel_seconds(self) -> float:
            return 0.002

    work = job(cell(1, "eager"), cell(2, "eager"), timing="careful", cell_seconds=0.05)
    monkeypatch.setattr(measure, "_on_cpu", lambda *_: jobs.Finished(0, 0.0, tokens=8))
    timed = measure.open_pass(work)
    assert [timed(work, Traced()).kernel_s for _ in work.cells] == [0.002, None]  # type: ignore[arg-type]


def test_kernel_seconds_are_the_device_s_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a profile's rows, what the device took itself."""
    import torch

    from bench.runtimes import kernels

    class Average:
        def __init__(self, device_us: float) -> None:
            self.self_device_time_total, self.self_cpu_time_total = device_us, 9e9

    assert kernels.total([Average(1500.0), Average(0.0), Average(500.0)]) == pytest.approx(0.002)
    assert kernels.total([Average(0.0)]) is None
    waits: list[str] = []
    done: list[bool] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    monkeypatch.setattr(kernels, "profile", Profiled([Average(3000.0)]))
    assert kernels.seconds(lambda: done.append(len(waits) == 1), "cuda:0") == pytest.approx(0.003)
    assert (done, waits) == ([True], ["cuda:0", "cuda:0"]), "waited before the step, and for it"


class Profiled:
    """Stands for torch's profiler, with these averages."""

    def __init__(self, averages: list[Any]) -> None:
        self._averages = averages

    def __call__(self, activities: list[Any]) -> Profiled:
        return self

    def __enter__(self) -> Profiled:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def key_averages(self) -> list[Any]:
        return self._averages


def test_a_loop_profiles_its_first_step_after_a_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.runtimes import kernels, static
    from bench.runtimes.protocol import Options

    session = static.open_session(Subject("small", SMALL, "small"), Options("float32", "sdpa", "cpu", 0, 1))
    lengths: list[int] = []

    def seconds(work: Any, device: str) -> float:
        lengths.append(work().shape[0])
        assert device == "cuda:0"
        return 0.5

    monkeypatch.setattr(kernels, "seconds", seconds)
    session.prepare(3, 4, 2)
    monkeypatch.setattr(session, "_step", lambda *_: pytest.fail("ran a prefill for nothing"))
    assert session.kernel_seconds() is None, "a CPU launches nothing"
    monkeypatch.undo()
    monkeypatch.setattr(kernels, "seconds", seconds)
    monkeypatch.setattr(session, "_options", msgspec.structs.replace(session._options, device="cuda:0"))
    assert session.kernel_seconds() == 0.5
    monkeypatch.setattr(session, "_step_positions", ())
    assert session.kernel_seconds() is None, "a single token has no decode step"
    assert lengths == [3]


@pytest.mark.parametrize("name", ["compile", "cudagraph"])
def test_a_step_that_is_compiled_or_captured_has_other_kernels_than_could_be_traced(name: str) -> None:
    from importlib import import_module

    from bench.runtimes.loop import Loop

    kinds = [one for one in vars(import_module(f"bench.runtimes.{name}")).values() if isinstance(one, type)]
    (made,) = [one for one in kinds if issubclass(one, Loop) and one is not Loop]
    assert made.kernel_seconds(made.__new__(made)) is None


def test_a_subject_that_cannot_be_loaded_says_why(tmp_path: Any) -> None:
    work = job(cell(1, "eager"), timing="careful", cell_seconds=0.05)
    missing = msgspec.structs.replace(work, subject=Subject("gone", SMALL, "gone", folder=str(tmp_path / "gone")))
    broke = in_child(missing)[0]
    assert isinstance(broke, jobs.Broke)
    assert not broke.oom
    assert outcomes.classify(broke.text, None, None).outcome == "failed"
    assert "gone" in broke.text


# -- CUDA, played by doubles ------------------------------------------------------------------------------------------


class Ticking:
    """Stands for CUDA: an event takes the next of 2, 4, 6... ms; synchronising is counted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import torch

        clock = iter(range(2, 10_000, 2))
        self.waits = 0

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.ms = next(clock)

            def elapsed_time(self, later: Event) -> float:
                return float(later.ms - self.ms)

        def synchronize(device: str) -> None:
            self.waits += 1

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", synchronize)


def test_event_marks_are_in_seconds_and_wait_at_both_ends_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.runtimes.marks import marks

    device = Ticking(monkeypatch)
    timer = marks(3, "cuda:0")
    for _ in range(2):
        timer.start()
        before = device.waits
        for _ in range(3):
            timer.mark()
        assert device.waits == before
        call = timer.finish(6)
        assert call.device_s == pytest.approx(0.006)
        assert call.prefill_s == pytest.approx(0.002)
        assert call.step_s == pytest.approx((0.002, 0.002))
        assert (call.tokens, device.waits) == (6, before + 1)


class Device:
    """Stands for torch.cuda's memory figures: peaks as given, 60 of 80 bytes free, and what NVML says is used."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, peaks: list[int], *, free: int = 60, used: int | None = 5
    ) -> None:
        import torch

        from bench import nvml

        self.resets, self.fractions = 0, []
        self.others: list[int] = []
        figures = iter(peaks)

        def reset(_: str) -> None:
            self.resets += 1

        fakes = {
            "init": lambda: None,
            "empty_cache": lambda: None,
            "reset_peak_memory_stats": reset,
            "max_memory_allocated": lambda _: next(figures),
            "max_memory_reserved": lambda _: 1000,
            "memory_reserved": lambda _: 700,
            "mem_get_info": lambda _: (60, 80),
            "set_per_process_memory_fraction": lambda share, _: self.fractions.append(share),
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(nvml, "used_bytes", lambda _: used)
        monkeypatch.setattr(nvml, "other_processes", lambda _: self.others)


def on_cuda(work: jobs.Job, budget: int | None = None) -> jobs.Job:
    options = msgspec.structs.replace(work.options, device="cuda:0", budget_bytes=budget)
    return msgspec.structs.replace(work, options=options)


def test_the_first_call_has_a_peak_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.passes import measure

    work = job(cell(1), timing="paper", cell_seconds=1.0, script=script())
    device = Device(monkeypatch, [900, 500])
    session = worker._open_simulated(work)
    session.prepare(1, 8, 8)
    found = measure.open_pass(on_cuda(work))(on_cuda(work), session)
    assert (found.memory.first_call, found.memory.allocated, found.memory.reserved) == (900, 500, 1000)
    assert (found.memory.device_used, found.memory.context) == (0, -700), "used after, less idle, less reserved"
    assert (found.warm_up, len(found.samples.call_s), device.resets) == (10, 20, 2)


def test_what_nvml_does_not_say_is_null_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.passes import cuda_memory

    Device(monkeypatch, [900], used=None)
    with cuda_memory.Peaks("cuda:0", None, cuda_memory.Ballast(None, 0)) as peaks:
        pass
    found = peaks.memory(None, "why")
    assert (found.device_used, found.context, found.first_call) == (None, None, None)
    assert found.reasons["first_call"] == "why"
    assert "NVML" in found.reasons["device_used"]


def test_a_budget_is_ballast_on_a_device_of_our_own_and_a_share_on_another(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from bench.passes import cuda_memory

    options = on_cuda(job(cell(1)), budget=24).options
    made: list[int] = []
    monkeypatch.setattr(torch, "empty", lambda size, **_: made.append(size))
    device = Device(monkeypatch, [])
    held = cuda_memory.limit(options, idle=5)
    assert (held.bytes, held.how) == (36, cuda_memory.HELD_BACK), "60 free, of which 24 are left"
    assert (made, device.fractions) == ([36], [])
    for idle, others in ((5, [17]), (None, []), (2 << 30, [])):
        device.others = others
        assert cuda_memory.limit(options, idle) == cuda_memory.Ballast(how=cuda_memory.SHARE)
    assert (made, device.fractions) == ([36], [0.3] * 3)
    with pytest.raises(OutOfMemory, match="more than the 60 bytes free"):
        cuda_memory.limit(msgspec.structs.replace(options, budget_bytes=61), idle=5)


def test_ballast_does_not_count_as_the_cells_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.passes import cuda_memory

    Device(monkeypatch, [536], used=1041)
    with cuda_memory.Peaks("cuda:0", 5, cuda_memory.Ballast(None, 36)) as peaks:
        pass
    found = peaks.memory(first_call=936)
    assert (found.allocated, found.reserved, found.device_used, found.first_call) == (500, 964, 1000, 900)
    assert found.context == 336


def test_a_whole_generation_certifies_what_a_probe_found() -> None:
    work = job(cell(2, "eager", 4, 6), limit_bytes=256 * MIB)
    probed = finished(in_child(work))[0]
    whole = finished(in_child(msgspec.structs.replace(work, purpose="certify")))[0]
    assert whole.memory.allocated is not None
    assert whole.memory.allocated == pytest.approx(probed.memory.allocated, rel=0.05, abs=3 * MIB)
