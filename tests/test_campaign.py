"""A campaign is made of ordinary commands, in slices that end on time and go on where they ended."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from bench import campaign, filters, schedule, store
from bench.campaign import SLICES, Slice, Spent
from bench.cells import Suite, expand, read_suite
from bench.devices import lookup
from shortllama import console

MODELS = {"paper-7b": "llama-7b", "paper-13b": "llama-13b"}


def cells_of(suite: Suite, one: Slice) -> set[tuple[str, str, int]]:
    keep = filters.parse(one.cells)
    plan = schedule.plan(suite, lookup("h200"), keep=lambda cell: cell.batch <= 64 and keep(cell))
    return {(cell.cell.subject, cell.cell.runtime, cell.cell.batch) for cell in plan.planned()}


@pytest.mark.parametrize("name", MODELS)
def test_the_suites_hold_the_paper_shapes_and_their_aligned_twins(name: str) -> None:
    suite, model = read_suite(name), MODELS[name]
    plain = [subject for subject in suite.subjects if "~" not in subject]
    widths = [subject for subject in plain if "/" in subject and "depth" not in subject]
    assert (len(plain), len(widths), plain[0]) == (13, 9, model)
    assert set(suite.subjects) == {*plain, *(f"{w}~{n}" for w in widths for n in (64, 128))}


@pytest.mark.parametrize("name", MODELS)
def test_the_first_slices_are_the_core(name: str) -> None:
    suite, model = read_suite(name), MODELS[name]
    one, batches, *_ = (cells_of(suite, slice_) for slice_ in SLICES)
    assert len(one) == 2 * (1 + 3 + 9 + 9)
    assert {(runtime, batch) for _, runtime, batch in one} == {("eager", 1), ("cudagraph", 1)}
    four = {subject for subject, *_ in batches}
    assert len(four) == 4
    assert model in four
    assert {batch for *_, batch in batches} == {16, 64}
    assert any("~64" in subject for subject in four)


@pytest.mark.parametrize("name", MODELS)
def test_every_cell_without_a_budget_belongs_to_a_slice_or_is_left_out_on_purpose(name: str) -> None:
    tests = [filters.parse(one.cells) for one in SLICES if one.verb == "sweep"]
    for cell in expand(read_suite(name)):
        if cell.batch == 4 and cell.budget == "none" and "~" not in cell.subject and cell.runtime != "static":
            assert any(test(cell) for test in tests), cell.label


def test_predictions_add_up(capsys: pytest.CaptureFixture) -> None:
    assert run(["paper-7b", "--device", "h200", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(SLICES)
    figures = [[float(word) for word in re.findall(r"(\d+) s\b", line)] for line in lines]
    assert [total for _, total in figures][-1] == pytest.approx(sum(seconds for seconds, _ in figures), abs=len(SLICES))


def run(arguments: list[str]) -> int:
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(campaign.campaign)
    return console.run(app, arguments)


def test_a_campaign_needs_its_device(capsys: pytest.CaptureFixture) -> None:
    assert run(["paper-7b", "--device", "cpu"]) == 2
    assert "--simulate --device h200" in capsys.readouterr().err


@pytest.mark.slow
def test_a_campaign_that_runs_out_of_minutes_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = "batch==1 and output==128 and budget=='none' and 'depth' in subject"
    monkeypatch.setattr(campaign, "SLICES", (
        Slice("sweep", "sweep", few), Slice("ends", "oom", "output==512 and budget=='24GiB' and 'depth' in subject"),
    ))  # fmt: skip
    folder = tmp_path / "run"
    arguments = ["paper-7b", "--device", "h200", "--simulate", "--out", str(folder)]
    ran: list[list[str]] = []
    real: Callable[[list[str], float], int] = campaign.run

    def interrupted_once(line: list[str], seconds: float) -> int:
        ran.append(line)
        return real(line, 0.01 if len(ran) == 1 else seconds)

    monkeypatch.setattr(campaign, "run", interrupted_once)
    assert run(arguments) == 0
    assert len(ran) == 1
    assert not campaign.read(folder).slices.get("sweep", Spent()).done
    assert run(arguments) == 0
    assert [line[3] for line in ran] == ["sweep", "sweep", "oom"]
    results = store.read(folder)
    assert {row.outcome for row in results.measurements} == {"ok"}
    assert len(results.measurements) == 3
    assert len([row for row in results.frontiers if row.confirmed]) == 3
    record = campaign.read(folder).slices
    assert all(one.done and one.predicted_s for one in record.values())
    assert run(arguments) == 0
    assert len(ran) == 3, "nothing is done twice"
