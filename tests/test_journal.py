"""Scoring that is killed goes on: the same scores bit for bit, with fewer block passes; what is not its own is told."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shortllama import checkpoint, console, costs, journal, surgery
from shortllama.cli import app
from shortllama.commands.resuming import resumable
from shortllama.criteria import CRITERIA, TRACED
from shortllama.errors import InputError
from shortllama.journal import Journal
from shortllama.plans import BlockKeep, Target, make_plan
from shortllama.scores import Cost, Scores, read_scores

# One pass over the data, or no data at all: these begin anew.
SHORT = {*TRACED, "flap", "flap-exact", "mag", "mag-sp", "random", "last"}


def quiet(_: str) -> None:
    pass


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return journal.beside(tmp_path / "scores.json")


def test_the_journal_lies_beside_the_output(tmp_path: Path):
    assert journal.beside(tmp_path / "out").name == "out.partial.jsonl"


values = st.recursive(
    st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=3) | st.integers(-(2**53), 2**53),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=8,
)


@given(kept=st.dictionaries(st.text(max_size=5), values, max_size=5), torn=st.binary(max_size=9))
def test_values_come_back_exactly_and_a_torn_line_is_cut(kept, torn, tmp_path_factory):
    path = journal.beside(tmp_path_factory.mktemp("kept") / "out")
    first = journal.resume(path, {"a": (1, 2)}, pytest.fail).part("x")
    for name, value in kept.items():
        first.keep(name, value)
    assert path.exists() == bool(kept), "the file appears with its first value"
    if kept:
        with path.open("ab") as file:
            file.write(torn.replace(b"\n", b""))
    told: list[str] = []
    again = journal.resume(path, {"a": [1, 2]}, told.append)
    assert len(told) == bool(kept)
    for name, value in kept.items():
        assert json.dumps(again.part("x").finished(name)) == json.dumps(value)
    again.keep("more", 1.5)
    assert journal.resume(path, {"a": [1, 2]}, quiet).finished("more") == 1.5
    journal.discard(path)
    journal.discard(path)
    assert not path.exists()


def test_parts_do_not_see_each_other(path: Path):
    whole = journal.resume(path, {}, quiet)
    whole.part("a").keep("1", 2)
    assert whole.part("a").finished(1) == 2
    assert whole.finished("1") is None
    assert whole.part("b").finished("1") is None
    whole.part("a").keep("bad", [float("nan")])
    assert whole.part("a").finished("bad") is None, "what is not finite is refused later, and never kept"


def test_another_key_starts_anew_and_says_what_differs(path: Path):
    journal.resume(path, {"criterion": "ppl", "seed": 0}, quiet).keep("0", 1.0)
    told: list[str] = []
    other = journal.resume(path, {"criterion": "kl", "seed": 0}, told.append)
    assert told == [f"{path} is of another run (criterion): starting anew"]
    assert other.finished("0") is None
    other.keep("0", 2.0)
    assert journal.resume(path, {"criterion": "kl", "seed": 0}, quiet).finished("0") == 2.0


@pytest.mark.parametrize("text", ["mine\n", '{"schema": "other/1"}\n', '{"schema": "shortllama.journal/1"}\n', "[]\n"])
def test_a_file_that_is_no_journal_is_left_alone(path: Path, text: str):
    path.write_text(text)
    with pytest.raises(InputError, match="not a journal"):
        journal.resume(path, {}, quiet)
    assert path.read_text() == text


def test_a_head_torn_by_the_kill_is_no_journal_yet(path: Path):
    path.write_bytes(b'{"schema": "shortlla')
    fresh = journal.resume(path, {}, pytest.fail)
    fresh.keep("0", 1)
    assert journal.resume(path, {}, quiet).finished("0") == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_are_carried_exactly_with_their_number(path: Path, monkeypatch, dtype: torch.dtype):
    monkeypatch.setattr(journal, "FIRST_S", 0.0)
    monkeypatch.setattr(journal, "PATIENCE", 1e-9)
    tensors = [torch.randn(2, 3, 4).to(dtype), torch.randn(1, 5).to(dtype)]
    one = journal.resume(path, {}, quiet).part("step 1")
    one.carry(3, lambda: pytest.fail("nothing was finished yet"))
    one.keep("0", 1)
    one.carry(3, lambda: tensors[:1])
    one.carry(4, lambda: tensors)
    mark, found = journal.resume(path, {}, quiet).part("step 1").carried() or pytest.fail("nothing carried")
    assert mark == 4
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, tensors, strict=True))
    assert journal.resume(path, {}, quiet).part("step 2").carried() is None
    other = journal.resume(path, {"seed": 1}, quiet)
    assert other.carried() is None
    assert not list(path.parent.glob("*.tensors")), "another run's tensors went with its journal"


def test_tensors_wait_until_writing_them_is_little_of_the_time(path: Path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(journal.time, "monotonic", lambda: now[0])
    one = journal.resume(path, {}, quiet)
    one.keep("0", 1)
    written: list[int] = []

    def carry(mark: int, takes: float) -> None:
        def make():
            written.append(mark)
            now[0] += takes
            return []

        one.carry(mark, make)

    for mark, at in enumerate([0.5, 1.5, 2.0, 40.0, 42.0]):
        now[0] = max(now[0], at)
        carry(mark, 1.0)
    assert written == [1, 3], "20 seconds must pass after one that took one"


def test_no_journal_keeps_nothing():
    none = Journal()
    none.keep("0", 1)
    none.carry(1, lambda: pytest.fail("asked for tensors"))
    assert (none.finished("0"), none.carried(), none.part("x").finished("0")) == (None, None, None)


def test_costs_of_killed_runs_are_added_up(path: Path):
    first = journal.resume(path, {}, quiet)
    cost = first.metered(lambda: Cost(2.0, 10, 64, block_passes=3.0))
    first.keep("0", 1)
    assert cost() == Cost(2.0, 10, 64, block_passes=3.0)
    second = journal.resume(path, {}, quiet)
    cost = second.metered(lambda: Cost(0.5, 7, 64, block_passes=1.0))
    assert cost() == Cost(2.5, 10, 64, block_passes=4.0, runs=2)
    second.keep("1", 1)
    third = journal.resume(path, {}, quiet).metered(lambda: Cost(1.0, None, 64, reasons={"peak_bytes": "why"}))
    assert third() == Cost(3.5, 10, 64, block_passes=None, runs=3, reasons={"peak_bytes": "why"})
    assert costs.joined(None, Cost(1.0, None, 0)) == Cost(1.0, None, 0)


# -- killed for real --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 5 blocks, and calibration of 3 sequences beside it."""
    from shortllama.shape import ModelShape

    shape = ModelShape.uniform(vocabulary=97, hidden=32, head_dim=8, blocks=5, query_heads=4, kv_heads=2, neurons=48)
    keep = tuple(BlockKeep(index) for index in range(5))
    plan = make_plan(model="m", shape=shape, method="none", target=Target("shape", "all"), keep=keep)
    out = tmp_path_factory.mktemp("model")
    checkpoint.save(surgery.build(shape, std=0.2), plan, out / "dense")
    ids = torch.randint(97, (3, 12), generator=torch.Generator().manual_seed(0)).tolist()
    (out / "ids.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ids))
    return out


# A server that has loaded torch once forks the children: each is a process of its own, and there at once.
CHILDREN = multiprocessing.get_context("forkserver")
CHILDREN.set_forkserver_preload(["shortllama.scoring", "shortllama.checkpoint", "shortllama.criteria.llm_pruner"])


def command(lines: int, ready: Any, arguments: list[str]) -> None:
    """Run a command whose journal kills the process after so many lines, or hangs there where `ready` is an event."""
    journal.FIRST_S, journal.PATIENCE = 0.0, 1e-9
    write, written = Journal.keep, 0

    def keep(self: Journal, name: object, value: Any) -> None:
        nonlocal written
        write(self, name, value)
        written += 1
        if written == lines and ready is not None:
            ready.set()
            time.sleep(60)
        if written == lines:
            os.kill(os.getpid(), signal.SIGKILL)

    Journal.keep = keep
    sys.exit(console.run(app, arguments))


def killed_after(lines: int, *arguments: object) -> None:
    """Run a command in a process of its own that is killed with SIGKILL once its journal has so many lines."""
    child = CHILDREN.Process(target=command, args=(lines, None, [*map(str, arguments)]))
    child.start()
    child.join(300)
    assert child.exitcode == -signal.SIGKILL


@pytest.fixture
def finish(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return finish(*arguments): run a command to its end here, and return what it said."""

    def run(*arguments: object) -> str:
        code = console.run(app, [*map(str, arguments)])
        said = capsys.readouterr().err
        assert code == 0, said
        return said

    return run


def scoring(folder: Path, criterion: str, out: Path, *more: object) -> list[object]:
    ids = f"ids:{folder / 'ids.jsonl'}"
    return ["score", folder / "dense", "--criterion", criterion, "--calibration", ids, "--out", out, *more]


def passes(scores: Scores) -> float:
    assert scores.cost is not None
    assert scores.cost.block_passes is not None
    return scores.cost.block_passes


CASES = [
    ("ppl", 4, ()),
    ("kl", 10, ("--iterative",)),
    ("bi", 3, ("--iterative",)),
    ("ppl", 9, ("--unit", "module")),
    ("taylor", 3, ()),
    ("taylor-sample", 3, ()),
    ("taylor", 7, ("--iterative",)),
    ("llm-pruner", 3, ()),
    ("llm-pruner", 3, ("--estimator", "param_mix")),
    ("wanda-sp", 3, ()),
]


@pytest.mark.parametrize(("criterion", "lines", "more"), CASES)
def test_a_killed_scoring_goes_on_to_the_same_scores(finish, folder: Path, tmp_path: Path, criterion, lines, more):
    whole, killed = tmp_path / "whole.json", tmp_path / "killed.json"
    finish(*scoring(folder, criterion, whole, *more))
    killed_after(lines, *scoring(folder, criterion, killed, *more))
    assert not killed.exists()
    kept = journal.beside(killed)
    spent = json.loads(kept.read_bytes().splitlines()[-1])["cost"]["block_passes"]
    said = finish(*scoring(folder, criterion, killed, *more))
    assert f"going on after {lines} finished parts in {kept}" in said
    before, after = read_scores(whole), read_scores(killed)
    assert after.digest() == before.digest()
    assert after.cost is not None
    assert after.cost.runs == 2
    assert passes(after) - spent < passes(before), "the second run did not save anything"
    assert sorted(one.name for one in tmp_path.iterdir()) == ["killed.json", "whole.json"]


def test_ctrl_c_keeps_what_is_finished_and_says_how_to_go_on(finish, folder: Path, tmp_path: Path):
    out, ready = tmp_path / "plan.json", CHILDREN.Event()
    ids = f"ids:{folder / 'ids.jsonl'}"
    asked = ["plan", folder / "dense", "--method", "ppl", "--blocks", 2, "--calibration", ids, "--out", out]
    child = CHILDREN.Process(target=command, args=(2, ready, [*map(str, asked)]))
    child.start()
    assert ready.wait(60)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGINT)
    child.join(60)
    assert child.exitcode == 130
    assert journal.beside(out).is_file()
    assert not out.exists()
    assert "going on after 2 finished parts" in finish(*asked)
    assert [one.name for one in tmp_path.iterdir()] == ["plan.json"]


def test_an_interrupted_command_names_its_journal(tmp_path: Path, capsys):
    journal.resume(journal.beside(tmp_path / "there"), {}, quiet).keep("0", 1)
    with pytest.raises(KeyboardInterrupt), resumable([tmp_path / "there", None, tmp_path / "not"]):
        raise KeyboardInterrupt
    kept = journal.beside(tmp_path / "there")
    assert capsys.readouterr().err == f"note: {kept} keeps what is finished; the same command goes on from there\n"
    with resumable([tmp_path / "there"]):
        pass
    assert not kept.exists()


def test_other_options_calibration_or_weights_start_anew(finish, folder: Path, tmp_path: Path):
    out = tmp_path / "scores.json"
    killed_after(2, *scoring(folder, "ppl", out))
    said = finish(*scoring(folder, "ppl", out, "--seed", 1))
    assert f"{journal.beside(out)} is of another run (seed): starting anew" in said
    killed_after(2, *scoring(folder, "ppl", out))
    os.utime(folder / "dense" / "model.safetensors", ns=(1, 1))
    assert "of another run (model)" in finish(*scoring(folder, "ppl", out))


def test_several_criteria_go_on_where_each_was(finish, folder: Path, tmp_path: Path):
    out = tmp_path / "scores"
    killed_after(8, *scoring(folder, "bi,kl,ppl", out))
    assert sorted(one.name for one in out.iterdir()) == ["kl.json.partial.jsonl", "ppl.json.partial.jsonl"]
    said = finish(*scoring(folder, "bi,kl,ppl", out))
    assert said.count("going on after") == 2
    assert sorted(one.name for one in out.iterdir()) == ["bi.json", "kl.json", "ppl.json"]
    finish(*scoring(folder, "kl", tmp_path / "kl.json"))
    assert read_scores(out / "kl.json").digest() == read_scores(tmp_path / "kl.json").digest()


# -- on a terminal ----------------------------------------------------------------------------------------------------


def on_terminal(name: str, arguments: list[str]) -> None:
    """Run a command whose stderr is the terminal `name`, and whose parts each take longer than a look at it."""
    os.environ["TERM"] = "xterm"
    os.dup2(os.open(name, os.O_RDWR), 2)
    write = Journal.keep

    def keep(self: Journal, name: object, value: Any) -> None:
        write(self, name, value)
        time.sleep(0.15)

    Journal.keep = keep
    sys.exit(console.run(app, arguments))


def test_scoring_shows_progress_and_time_left_on_a_terminal_only(finish, folder: Path, tmp_path: Path):
    asked = scoring(folder, "ppl", tmp_path / "scores.json")
    said = finish(*asked)
    assert f"wrote {tmp_path / 'scores.json'}\n" in said
    assert "ppl scores" not in said
    outer, inner = os.openpty()
    child = CHILDREN.Process(target=on_terminal, args=(os.ttyname(inner), [*map(str, asked)]))
    child.start()
    seen = b""
    while child.is_alive() or select.select([outer], [], [], 0.2)[0]:
        if select.select([outer], [], [], 0.2)[0]:
            seen += os.read(outer, 65536)
    os.close(outer)
    os.close(inner)
    assert child.exitcode == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen.decode())
    drawn = re.findall(r"ppl scores +\S*[━╸╺]+ *(\d+)/18 +(\d:\d\d:\d\d)", text)
    assert len({done for done, _ in drawn}) > 1, text


def test_every_criterion_either_goes_on_or_is_one_pass():
    """What `test_a_killed_scoring...` covers and what begins anew, so that a new criterion says which it is."""
    assert {name for name, _, _ in CASES} | SHORT | {"taylor-vector"} == set(CRITERIA)
