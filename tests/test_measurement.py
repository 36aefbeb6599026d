"""Rows of a results file: one golden line, strict decoding, and environments named by their fingerprint alone."""

from __future__ import annotations

import msgspec
import pytest

from bench.cells import Cell
from bench.measurement import Bounds, Environment, Frontier, Measurement, Memory, Row, Samples, SessionId, environment

CELL = Cell("llama-7b/depth-26", "eager", "float16", "sdpa", 12, 128, "24GiB", 8)

GOLDEN = (
    b'{"kind":"measurement","cell":{"subject":"llama-7b/depth-26","runtime":"eager","dtype":"float16",'
    b'"attention":"sdpa","prompt":12,"output":128,"budget":"24GiB","batch":8},"cell_id":"ID","environment":"e",'
    b'"outcome":"ok","simulated":false,"session":{"id":"s","pair":0,"order":""},'
    b'"schema":"shortllama.measurement/1","timing":"careful","samples":{"call_s":[0.5,0.25],"prefill_s":[],'
    b'"step_s":[],"device_s":[]},"warm_up":3,"stop":"interval","tokens":1024,"memory":{"analytic":123,'
    b'"allocated":null,"reserved":null,"device_used":null,"context":null,"first_call":null,'
    b'"reasons":{"allocated":"why"}},"telemetry":{},"bounds":null,"graphs":null,"reason":null,"witness":null,"emulated":null,'
    b'"subject_digest":null,"parameters":null,"wall_s":null}'
)


def test_one_measurement_line_is_written_as_it_always_was() -> None:
    row = Measurement(
        CELL,
        CELL.id,
        "e",
        "ok",
        False,
        SessionId("s"),
        samples=Samples((0.5, 0.25)),
        warm_up=3,
        stop="interval",
        tokens=1024,
        memory=Memory(analytic=123, reasons={"allocated": "why"}),
    )
    expected = GOLDEN.replace(b'"ID"', f'"{CELL.id}"'.encode())
    assert msgspec.json.encode(row) == expected
    assert msgspec.json.decode(expected, type=Row) == row


@pytest.mark.parametrize(
    "row",
    [
        environment({"device": "x", "threads": 1}, {"date": "2026-01-01"}),
        Frontier(CELL.group, "e", 17, False, fits=(16, 17), fails=(18, 18)),
        Measurement(CELL, CELL.id, "e", "oom", True, SessionId("s", 2, "AB"), bounds=Bounds(1, 2), witness="w"),
    ],
)
def test_rows_of_every_kind_survive_the_round_trip(row: Row) -> None:
    assert msgspec.json.decode(msgspec.json.encode(row), type=Row) == row


def test_the_environment_is_named_by_what_must_be_equal() -> None:
    here = environment({"a": 1, "b": [2]}, {"load": 0.1})
    assert here.id == environment({"b": [2], "a": 1}, {"load": 9.9}).id
    assert here.id != environment({"a": 1, "b": [3]}, {"load": 0.1}).id


@pytest.mark.parametrize(
    "change",
    [{"outcome": "fine"}, {"schema": "shortllama.measurement/0"}, {"extra": 1}, {"cell": {}}, {"simulated": "no"}],
)
def test_an_edited_row_is_refused(change: dict[str, object]) -> None:
    row = msgspec.to_builtins(Measurement(CELL, CELL.id, "e", "ok", False, SessionId("s")))
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({**row, **change}, Row)


def test_environments_and_measurements_are_told_apart_by_kind() -> None:
    line = b'{"kind":"environment","id":"e","fingerprint":{}}'
    assert isinstance(msgspec.json.decode(line, type=Row), Environment)
