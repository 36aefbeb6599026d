"""Results files: nothing half written, nothing silently dropped, every bad line named."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bench import store
from bench.cells import Cell
from bench.measurement import (
    LARGEST_LINE_BYTES,
    Environment,
    Frontier,
    Measurement,
    Samples,
    SessionId,
    environment,
)
from shortllama.errors import InputError

ENVIRONMENT = environment({"device": "x"}, {})
SLOWLY = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)


def row(batch: int = 1, outcome: str = "ok", **more: object) -> Measurement:
    cell = Cell("m", "eager", "float16", "sdpa", 12, 128, "none", batch)
    return Measurement(cell, cell.id, ENVIRONMENT.id, outcome, False, SessionId("s"), **more)  # pyright: ignore


def write(path: Path, *rows: Measurement | Environment | Frontier) -> None:
    with store.Writer(path) as writer:
        for one in rows:
            writer.write(one)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / store.FILE_NAME
    write(path, ENVIRONMENT, row(1), row(2, "oom", reason="why"))
    return path


def test_what_was_written_is_read(file: Path) -> None:
    frontier = Frontier(row().cell.group, ENVIRONMENT.id, 1, False)
    write(file, frontier)
    for path in (file, file.parent):
        results = store.read(path)
        assert results.path == file
        assert results.environments == {ENVIRONMENT.id: ENVIRONMENT}
        assert results.measurements == (row(1), row(2, "oom", reason="why"))
        assert results.frontiers == (frontier,)


def test_every_row_is_on_disk_before_write_returns(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    with store.Writer(path) as writer:
        writer.write(ENVIRONMENT)
        for batch in range(1, 4):
            writer.write(row(batch))
            assert len(store.read(path).measurements) == batch


def test_an_environment_is_written_once_also_on_resume(file: Path) -> None:
    again = environment({"device": "x"}, {"load": 3.0})
    write(file, again, row(3), again)
    assert file.read_bytes().count(b'"kind":"environment"') == 1
    assert len(store.read(file).measurements) == 3


@SLOWLY
@given(cut=st.integers(0, 2000))
def test_a_torn_file_is_refused_by_readers_and_mended_by_the_next_writer(file: Path, cut: int) -> None:
    """A kill leaves any prefix of the file: whole rows survive it, a torn one goes, and the rest can be appended."""
    whole = file.parent / "whole"
    whole.mkdir(exist_ok=True)
    data = file.read_bytes() if not (whole / "data").exists() else (whole / "data").read_bytes()
    (whole / "data").write_bytes(data)
    prefix = data[: min(cut, len(data))]
    file.write_bytes(prefix)
    complete = [line for line in data.splitlines() if data.find(line) + len(line) <= len(prefix)]
    if prefix and prefix not in (b"\n".join(complete), b"\n".join(complete) + b"\n"):
        with pytest.raises(InputError, match=rf"line {len(complete) + 1} is cut off"):
            store.read(file)
    with store.Writer(file) as writer:
        assert file.read_bytes() == b"".join(line + b"\n" for line in complete)
        writer.write(ENVIRONMENT)
        writer.write(row(9))
    assert store.read(file).measurements[-1] == row(9)
    assert len(store.read(file).measurements) == max(len(complete), 1)


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda line: line[: len(line) // 2], "line 2: not readable"),
        (lambda line: line.replace(b'"ok"', b'"fine"'), "line 2: $.outcome: Invalid enum value 'fine'"),
        (lambda line: line.replace(b"measurement/1", b"measurement/9"), "line 2: $.schema"),
        (lambda line: line.replace(b'"wall_s":null', b'"wall_s":null,"wall":1'), "line 2: unknown key $.wall; did you"),
        (lambda line: line.replace(b'"batch":1', b'"batch":"1"'), "line 2: $.cell.batch: Expected `int`, got `str`"),
        (lambda line: line.replace(b'"batch":1', b'"batch":7'), "line 2: cell_id"),
        (lambda line: line.replace(ENVIRONMENT.id.encode(), b"0" * 16), "line 2: environment '0000"),
        (lambda line: line.replace(b'"kind":"measurement"', b'"kind":"other"'), "line 2: "),
        (lambda line: b"\xff\xfe" + line, "line 2: not readable"),
        (lambda line: b"[1]", "line 2: "),
        (lambda line: b"\n\n" + line.replace(b'"batch":1', b'"batch":7'), "line 4: cell_id"),
    ],
)
def test_a_corrupt_line_is_named(file: Path, edit, expected: str) -> None:
    lines = file.read_bytes().split(b"\n")
    lines[1] = edit(lines[1])
    file.write_bytes(b"\n".join(lines))
    with pytest.raises(InputError) as error:
        store.read(file)
    assert expected in str(error.value)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_run_without_rows_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no measurements\.jsonl"):
        store.read(tmp_path)
    file = tmp_path / store.FILE_NAME
    with pytest.raises(InputError, match="cannot be read"):
        store.read(file)
    write(file)
    with pytest.raises(InputError, match="a run without rows"):
        store.read(file)
    write(file, ENVIRONMENT)
    with pytest.raises(InputError, match="a run without rows"):
        store.read(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", ["samples", "telemetry", "wall_s"])
def test_a_number_that_is_not_finite_is_never_written(file: Path, value: float, place: str) -> None:
    fields = {"samples": Samples((1.0, value)), "telemetry": {"a": [{"b": value}]}, "wall_s": value}
    before = file.read_bytes()
    with store.Writer(file) as writer, pytest.raises(AssertionError, match="not finite"):
        writer.write(row(3, **{place: fields[place]}))
    assert file.read_bytes() == before


def test_a_line_over_8_kib_is_never_written(file: Path) -> None:
    before = file.read_bytes()
    with store.Writer(file) as writer, pytest.raises(AssertionError, match="is over 8192"):
        writer.write(row(3, reason="x" * LARGEST_LINE_BYTES))
    assert file.read_bytes() == before


def test_a_row_needs_its_environment_first(tmp_path: Path) -> None:
    with store.Writer(tmp_path / "m.jsonl") as writer, pytest.raises(AssertionError, match="not written before"):
        writer.write(row())


def test_a_full_disk_leaves_the_rows_before_it(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk takes half of the line, then nothing more."""
    before, real = file.read_bytes(), os.write
    taken: list[int] = []

    def half(descriptor: int, data: bytes) -> int:
        if taken:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken.append(real(descriptor, data[: len(data) // 2]))
        return taken[0]

    with store.Writer(file) as writer:
        monkeypatch.setattr(os, "write", half)
        with pytest.raises(InputError, match=r"No space left on device.*--resume"):
            writer.write(row(3))
        monkeypatch.undo()
        assert taken
        assert file.read_bytes() == before
        writer.write(row(3))
    assert len(store.read(file).measurements) == 3


def test_a_new_environment_that_did_not_fit_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.jsonl"

    def full(descriptor: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with store.Writer(path) as writer:
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            with pytest.raises(InputError):
                writer.write(ENVIRONMENT)
        writer.write(ENVIRONMENT)
        writer.write(row())
    assert len(store.read(path).measurements) == 1


def test_two_sweeps_do_not_write_the_same_file(file: Path) -> None:
    with store.Writer(file), pytest.raises(InputError, match="another sweep is writing here"):
        store.Writer(file)
    store.Writer(file).close()


def test_a_folder_that_does_not_exist_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be written"):
        store.Writer(tmp_path / "missing" / "m.jsonl")


@SLOWLY
@given(st.lists(st.tuples(st.integers(1, 99), st.sampled_from(["ok", "oom", "failed"])), min_size=1, max_size=12))
def test_appending_in_any_number_of_sessions_gives_the_same_file(tmp_path: Path, rows: list[tuple[int, str]]) -> None:
    one, many = tmp_path / "one.jsonl", tmp_path / "many.jsonl"
    for path in (one, many):
        path.unlink(missing_ok=True)
    write(one, ENVIRONMENT, *(row(batch, outcome) for batch, outcome in rows))
    for batch, outcome in rows:
        write(many, ENVIRONMENT, row(batch, outcome))
    assert one.read_bytes() == many.read_bytes()
    assert [(r.cell.batch, r.outcome) for r in store.read(one).measurements] == rows


def test_a_line_is_json_that_any_reader_understands() -> None:
    import json

    decoded = json.loads(store.encode(row()))
    assert decoded["kind"] == "measurement"
    assert decoded["cell"]["batch"] == 1
    assert msgspec.convert(decoded, Measurement | Environment | Frontier) == row()
