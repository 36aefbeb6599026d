"""Memory limits and peaks are real, and exact, in fresh processes."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from bench import budget, children, environment, heap, outcomes

MIB = 1 << 20


@pytest.fixture(scope="module", autouse=True)
def server() -> None:
    """The fork server of this test process: with torch, whichever test starts it."""
    children.serve(children.TORCH_MODULES, environment.child_variables(1))


def ask(entry: Callable, question: object = None) -> object:
    """Run `entry(question, answer)` in a child; return what it answers."""
    with children.Child(entry, json.dumps(question).encode(), environment.child_variables(1)) as child:
        return json.loads(child.receive(60))


def allocate(job: bytes, send: Callable[[bytes], None]) -> None:
    limit, sizes = json.loads(job)
    heap.fix_malloc()
    import torch

    torch.zeros(16).sum()
    heap.settle()
    budget.limit_data(limit)
    said: list[str] = []
    for size in sizes:
        try:
            held = torch.empty(size, dtype=torch.uint8)
            said.append("fits")
            del held
        except RuntimeError as error:
            said.append(str(error))
    send(json.dumps([said, budget.is_limited()]).encode())


def peak(job: bytes, send: Callable[[bytes], None]) -> None:
    heap.fix_malloc()
    import torch

    torch.zeros(1 << 20).add_(1)
    heap.settle()
    seen = []
    for size in json.loads(job):
        assert budget.reset_peak()
        base = budget.resident_bytes()
        held = torch.ones(size, dtype=torch.uint8)
        del held
        seen.append(budget.peak_bytes() - base)
    send(json.dumps(seen).encode())


def lay(job: bytes, send: Callable[[bytes], None]) -> None:
    """Say by how much a tensor, small blocks and objects let the data grow in a heap with a large hole."""
    import torch

    torch.ones(1 << 20).add_(1)
    # Below the threshold of a new process; the last one keeps the hole from being the heap's end.
    blocks = [ctypes.create_string_buffer(100 << 10) for _ in range(65)]
    heap.fix_malloc()
    del blocks[:-1]
    heap.settle()
    if json.loads(job):
        assert heap.lay_out()

    def growth(make: Callable[[], object]) -> int:
        before = budget.data_bytes()
        held = make()
        grown = budget.data_bytes() - before
        del held
        return grown

    found = [
        growth(lambda: [torch.empty(size << 10, dtype=torch.uint8) for size in (1024, 100, 40)]),
        growth(lambda: [ctypes.create_string_buffer(9 << 10) for _ in range(400)]),
        growth(lambda: [[bytes(200) for _ in range(500)] for _ in range(20)]),
    ]
    send(json.dumps([*found, len(blocks)]).encode())


def test_a_laid_out_heap_maps_tensors_and_has_room_for_the_rest() -> None:
    """Without it, a hole takes the tensor for nothing, and small things make the data grow."""
    tensor, blocks, objects, _ = ask(lay, True)
    assert 1164 <= tensor >> 10 <= 1164 + 3 * 8, "each mapped by itself, in whole pages"
    assert (blocks, objects) == (0, 0)
    tensor, blocks, objects, _ = ask(lay, False)
    assert tensor == 0
    assert objects > 0


def test_the_limit_is_exact_to_a_mebibyte() -> None:
    said, limited = ask(allocate, [32 * MIB, [31 * MIB, 33 * MIB, 31 * MIB, 32 * MIB - (256 << 10)]])
    assert limited
    assert said[0] == said[2] == said[3] == "fits", "a failed allocation leaves the process usable"
    assert outcomes.is_out_of_memory(said[1])


def test_this_process_is_not_limited() -> None:
    assert not budget.is_limited()


def test_peaks_are_those_of_each_allocation() -> None:
    sizes = [40 * MIB, 10 * MIB, 60 * MIB]
    seen = ask(peak, sizes)
    assert seen == pytest.approx(sizes, rel=0.02)


def test_a_refused_reset_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "write_text", refuse)
    assert not budget.reset_peak()


def test_available_memory_is_some_of_what_there_is() -> None:
    assert 0 < budget.available_bytes() <= psutil.virtual_memory().total


@pytest.mark.parametrize(
    ("contents", "expected"),
    [
        ({"memory.max": "1000000\n", "memory.current": "250000\n"}, 750_000),
        ({"memory.max": "1000\n", "memory.current": "2500\n"}, 0),
        ({"memory.max": "max\n", "memory.current": "5\n"}, None),
        ({"memory/memory.limit_in_bytes": "9223372036854771712", "memory/memory.usage_in_bytes": "5"}, None),
        ({"memory/memory.limit_in_bytes": "4096", "memory/memory.usage_in_bytes": "96"}, 4000),
        ({}, None),
    ],
)
def test_a_control_group_leaves_what_it_says(tmp_path: Path, contents: dict[str, str], expected: int | None) -> None:
    for name, text in contents.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert budget.cgroup_free(tmp_path) == expected
