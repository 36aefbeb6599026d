"""What a report says of limits and predictions: sentences with the numbers of planted rows, else nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from bench import devices, peaks, physics, prediction
from bench.cells import Cell
from bench.measurement import Bounds, Environment, Measurement, Samples, SessionId, environment
from bench.peaks import Peaks
from bench.prediction import Overheads
from bench.report import assembly
from bench.report.values import Report, Table
from bench.store import Results
from shortllama import catalogue
from tests.report_cases import quick

PEAKS = Peaks(1e10, 1e10, {"float16": 1e12}, {"eager": 5e-6}, 1 << 20, 1e11)
KINDS = {"simulated": False, "kind": "cpu", "device": "some CPU"}
CPU = environment(KINDS, {peaks.FACT: msgspec.to_builtins(PEAKS)})
SUBJECTS = ("llama-7b", "llama-7b/depth-26", "llama-7b/depth-21")
TRUTH = Overheads(0.8, 1e-3, 0.0)


def report(where: Environment = CPU, **more: Any) -> Report:
    """Cells of a 7B model on a slow machine, taking what TRUTH predicts; those of batch 1 call many operations."""
    rows = []
    for subject in SUBJECTS:
        shape = catalogue.lookup(subject)
        for batch in (1, 4, 1024):
            cell = Cell(subject, "eager", "float16", "sdpa", 12, 17, "none", batch)
            call = prediction.call_s(shape, cell, PEAKS.device(devices.lookup("cpu")), TRUTH)
            step = max(physics.step_s(physics.costs(shape, "float16"), 1e10, 1e12, batch, 20)) / 0.8
            samples = Samples((call,) * 6, (call / 17,) * 6, (step,) * 16)
            ops = {"mm": 200_000} if batch == 1 else {"mm": 1}
            bounds = Bounds(shape.decode_bytes(batch, 20), shape.decode_flops(batch, 20), ops_per_token=ops)
            rows.append(
                Measurement(
                    cell, cell.id, where.id, "ok", False, SessionId("s"), samples=samples, bounds=bounds, **more
                )
            )
    results = Results(Path("run"), {where.id: where}, tuple(rows), ())
    return assembly.build([results], None, (), {name: catalogue.lookup(name) for name in SUBJECTS})


def table(found: Report, name: str) -> Table | None:
    return next((one for one in found.tables if one.name == name), None)


def column(found: Table, key: str) -> list[Any]:
    place = [one.key for one in found.columns].index(key)
    return [row[place] for row in found.rows]


def test_the_cells_table_holds_regimes_and_shares_of_roofs() -> None:
    cells = table(report(), "cells")
    assert cells is not None
    assert column(cells, "regime") == ["launch", "bandwidth", "compute"] * 3
    assert all(value == pytest.approx(0.8) for value in column(cells, "of_measured_roof"))
    assert set(column(cells, "of_datasheet_roof")) == {None}
    shown = {one.key for one in cells.columns} - cells.hidden
    assert {"regime", "of_measured_roof"} <= shown
    assert not {"of_datasheet_roof", "launch_share", "dispatch_share"} & shown


def test_the_finding_counts_what_limits_and_says_how_near() -> None:
    (found,) = [one for one in report().findings if one.kind == "limits"]
    for words in ("by launching in 3", "by memory bandwidth in 3", "by arithmetic in 3", "of 9 cells"):
        assert words in found.headline
    assert "of this machine's ceilings" in found.cause
    assert "dispatching operations takes at least" in found.cause
    assert "--runtime compile" in found.command


def test_predictions_are_judged_as_shipped_and_on_cells_not_seen() -> None:
    found = report()
    errors = table(found, "prediction-error")
    assert errors is not None
    assert column(errors, "cells") == [9]
    assert column(errors, "fitted_worst")[0] == pytest.approx(1, abs=1e-3)
    assert column(errors, "shipped_typical")[0] > 1.2
    (said,) = [one for one in found.findings if one.kind == "prediction"]
    assert "--calibrated-by" in said.command


def test_nothing_is_said_where_nothing_is_known() -> None:
    bare = report(environment(KINDS, {}))
    assert not [one for one in bare.findings if one.kind == "limits"]
    cells = table(bare, "cells")
    assert cells is not None
    assert set(column(cells, "regime")) == {None}
    assert "shortllama ceilings" in column(cells, "regime_reason")[0]
    found = assembly.build([quick()[0]])
    assert table(found, "prediction-error") is None
    assert not [one for one in found.findings if one.kind == "prediction"]
