"""What compare reads and writes beside its own rows: pytest-benchmark's JSON, JUnit XML, annotations; and bad files."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as Xml

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import comparison_text, foreign, github, junit, store
from bench.comparison import Change, Comparison, compare, exit_code
from bench.verdicts import Decision
from shortllama.errors import InputError
from tests.test_comparison import call, cell, paired, results, row, save

ROOT = Path(__file__).parent.parent


# -- pytest-benchmark -------------------------------------------------------------------------------------------------


def document(times: dict[str, list[float]], **machine: Any) -> dict[str, Any]:
    """What pytest-benchmark 5 writes, as far as it matters here."""
    info = {
        "node": "host", "processor": "x86_64", "machine": "x86_64", "system": "Linux", "release": "6.1",
        "python_implementation": "CPython", "python_version": "3.11.7",
        "cpu": {"brand_raw": "CPU 9000", "count": 8, "hz_actual_friendly": "2.1 GHz"},
    }  # fmt: skip
    benchmarks = [
        {"group": None, "name": name, "fullname": name, "params": None, "extra_info": {"peak_bytes": 1},
         "stats": {"min": min(data), "median": sorted(data)[len(data) // 2], "data": data, "rounds": len(data)}}
        for name, data in times.items()
    ]  # fmt: skip
    return {
        "machine_info": info | machine,
        "commit_info": {"id": "abc", "dirty": False},
        "benchmarks": benchmarks,
        "datetime": "2026-01-01T00:00:00",
        "version": "5.1.0",
    }


def write(path: Path, times: dict[str, list[float]], **machine: Any) -> Path:
    path.write_text(json.dumps(document(times, **machine)))
    return path


def test_each_benchmark_is_a_cell_of_one_session(tmp_path: Path) -> None:
    base = write(tmp_path / "a.json", {"test_a": [1.0, 1.1, 1.2], "test_b": [2.0]})
    head = write(tmp_path / "b.json", {"test_b": [2.4], "test_a": [1.0, 1.1, 1.2]})
    found = compare(foreign.read(base), foreign.read(head))
    assert [(one.cell, one.metric) for one in found.changes] == [("test_a", "latency"), ("test_b", "latency")]
    assert {one.decision.verdict for one in found.changes} == {"inconclusive"}
    assert found.changes[1].decision.ratio == pytest.approx(1.2)
    assert call(base, head) == 0
    assert call(base, head, "--strict") == 3
    assert call(base, head, "--fail-over", "latency:10%") == 1
    assert call(base, head, "--fail-over", "latency:18%") == 0  # 3 % of noise on top


def test_a_file_saved_without_its_samples_has_its_medians(tmp_path: Path) -> None:
    whole = document({"test_a": [1.0, 1.1, 1.2]})
    del whole["benchmarks"][0]["stats"]["data"]
    (tmp_path / "a.json").write_text(json.dumps(whole))
    assert foreign.read(tmp_path / "a.json").measurements[0].samples.call_s == (1.1,)


@pytest.mark.parametrize(
    ("machine", "code"),
    [
        ({"node": "other"}, 0),
        ({"release": "6.2"}, 0),
        ({"python_version": "3.11.9"}, 0),
        ({"python_version": "3.12.1"}, 3),
        ({"cpu": {"brand_raw": "CPU 9001", "count": 8}}, 3),
        ({"cpu": {}}, 3),
    ],
)
def test_its_machine_is_the_fingerprint(tmp_path: Path, machine: dict[str, Any], code: int) -> None:
    base = write(tmp_path / "a.json", {"test_a": [1.0]})
    assert call(base, write(tmp_path / "b.json", {"test_a": [1.0]}, **machine)) == code


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{}", "machine_info"),
        ('{"schema": "shortllama.plan/1", "keep": []}', "pytest-benchmark"),
        ('{"machine_info": {}, "benchmarks": [{"fullname": "a", "stats": {"median": NaN}}]}', "not readable"),
        ('{"machine_info": {}, "benchmarks": [{"fullname": "a", "stats": {"median": "1"}}]}', "[0].stats.median"),
        ('{"machine_info": {}, "benchmarks": []}', "holds no benchmark"),
        ('{"machine_info": {}, "benchmarks": [{"full', "not readable"),
    ],
)  # fmt: skip
def test_a_json_that_is_not_pytest_benchmarks_is_refused(
    tmp_path: Path, text: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    assert call(path, path) == 2
    message = capsys.readouterr().err
    assert expected in message
    assert message.count("\n") == 1


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_its_times_must_be_positive(tmp_path: Path, value: float, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "a.json", {"test_a": [1.0, value]})
    assert call(path, path) == 2
    assert f"sample of {value} s" in capsys.readouterr().err


def test_it_shares_no_cell_with_a_run_of_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours = save(tmp_path / "ours.jsonl", results(row(cell(), [1.0] * 6)))
    assert call(ours, write(tmp_path / "a.json", {"test_a": [1.0]})) == 2
    assert "no cell in common" in capsys.readouterr().err


def test_what_the_installed_pytest_benchmark_writes_is_read(tmp_path: Path) -> None:
    (tmp_path / "test_x.py").write_text("def test_x(benchmark):\n    benchmark.pedantic(sum, ((1, 2),), rounds=7)\n")
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-json=a.json", "test_x.py"],
        cwd=tmp_path, check=True, capture_output=True, env={**os.environ, "PYTEST_ADDOPTS": ""},
    )  # fmt: skip
    (one,) = foreign.read(tmp_path / "a.json").measurements
    assert (one.cell.subject, len(one.samples.call_s)) == ("test_x.py::test_x", 7)


# -- JUnit ------------------------------------------------------------------------------------------------------------


def change(verdict: str, gates: bool, number: int, name: str) -> Change:
    worse = {"regressed": 0.1, "improved": -0.1}.get(verdict, 0.0)
    return Change(str(number), name, name, "latency", "s", gates, Decision(verdict, 1.0, 1.1, 1.1, worse=worse))


names = st.text(st.characters(exclude_categories=()), max_size=20)
changes = st.lists(
    st.builds(
        change,
        st.sampled_from(["regressed", "improved", "equivalent", "inconclusive", "incomparable"]),
        st.booleans(),
        st.integers(0, 3),
        names,
    ),
    max_size=8,
)


@given(changes, st.lists(names, max_size=2), st.booleans())
def test_junit_fails_exactly_where_the_command_does(found: list[Change], differing: list[str], strict: bool) -> None:
    whole = Comparison(tuple(found), (), len(found), 0, 0, tuple(differing), 0)
    root = Xml.fromstring(junit.document(whole, strict=strict))
    (suite,) = root
    failed = int(suite.attrib["failures"]) + int(suite.attrib["errors"])
    assert (failed > 0) == (exit_code(whole, strict=strict) != 0)
    cases = suite.findall("testcase")
    assert len(cases) == int(suite.attrib["tests"]) == len({one.cell_id for one in found}) + bool(differing)
    assert len(suite.findall("testcase/failure")) == int(suite.attrib["failures"])
    assert len(suite.findall("testcase/skipped")) == int(suite.attrib["skipped"])


def test_junit_tells_the_worst_metric_first() -> None:
    found = compare(*paired(random.Random(0), 1.1))
    root = Xml.fromstring(junit.document(found))
    failure = root.find(".//failure")
    assert failure is not None
    worst = found.having("regressed")[0]
    assert failure.attrib["message"] == comparison_text.line(worst).replace("\u00a0", "\u00a0")
    assert len((failure.text or "").splitlines()) == 4


# -- annotations ------------------------------------------------------------------------------------------------------


@given(changes, st.lists(names, max_size=2))
def test_annotations_are_one_command_a_line(found: list[Change], notes: list[str]) -> None:
    whole = Comparison(tuple(found), (), len(found), 0, 0, (), 0, tuple(notes))
    lines = github.commands(whole).split("\n")
    assert lines.pop() == ""
    for line in lines:
        head, _, data = line.removeprefix("::").partition("::")
        level, _, title = head.partition(" title=")
        assert level in ("error", "warning", "notice")
        assert not set(title) & set(":,\r\n")
        assert "%" not in data.replace("%25", "")
    errors = sum(line.startswith("::error") for line in lines)
    assert errors == min(github.MOST, sum(one.gates for one in whole.having("regressed")))
    assert sum(line.startswith("::warning") for line in lines) <= github.MOST


def test_annotations_do_not_hide_that_they_are_cut() -> None:
    base, head = (results(*(row(cell(b), [x] * 9, simulated=True) for b in range(1, 20))) for x in (1.0, 2.0))
    text = github.commands(compare(base, head))
    assert text.count("::error") == github.MOST
    assert f"{19 * 4 - github.MOST} more regressions" in text
    assert text.splitlines()[-1].startswith("::notice title=shortllama compare::19 cells: 76 regressed")


def test_the_verb_writes_all_of_it_beside_one_json_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, head = paired(random.Random(0), 1.1)
    paths = save(tmp_path / "a.jsonl", base), save(tmp_path / "b.jsonl", head)
    assert call(*paths, "--junit", tmp_path / "j.xml", "--markdown", tmp_path / "m.md", "--github", "--json") == 1
    said = capsys.readouterr()
    assert json.loads(said.out)["exit_code"] == 1
    assert said.err.startswith("::error title=")
    assert Xml.parse(tmp_path / "j.xml").getroot()[0].attrib["failures"] == "1"
    assert "| regressed |" in (tmp_path / "m.md").read_text()
    assert call(*paths, "--junit", tmp_path / "missing" / "j.xml") == 2
    assert "cannot be written" in capsys.readouterr().err


# -- bad files of ours ------------------------------------------------------------------------------------------------


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return save(tmp_path / "good.jsonl", results(row(cell(), [1.0, 1.1, 1.2] * 4)))


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (b'"schema":"shortllama.measurement/1"', b'"schema":"shortllama.measurement/9"', "9', and this version reads"),
        (b'"call_s":[1.0,', b'"call_s":[NaN,', "line 3: not readable"),
        (b'"call_s":[1.0,', b'"call_s":[null,', "call_s[0]"),
        (b'"call_s":[1.0,', b'"call_s":[1e999,', "line 3: not readable"),
        (b'"call_s":[1.0,', b'"call_s":[-1.0,', "sample of -1.0 s"),
    ],
)
def test_a_run_with_values_that_cannot_be_is_refused(
    good: Path, old: bytes, new: bytes, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = good.read_bytes()
    assert data.count(old) >= 1
    bad = good.with_name("bad.jsonl")
    line = data.rindex(old)
    bad.write_bytes(data[:line] + data[line:].replace(old, new, 1))
    assert call(good, bad) == 2
    message = capsys.readouterr().err
    assert expected in message
    assert message.count("\n") == 1


def test_a_truncated_run_is_refused_with_the_way_to_mend_it(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = good.with_name("bad.jsonl")
    bad.write_bytes(good.read_bytes()[:-20])
    assert call(good, bad) == 2
    assert "cut off; repair the run with shortllama sweep --resume" in capsys.readouterr().err


def test_ten_thousand_cells_are_compared_and_written(tmp_path: Path) -> None:
    """Correctness; the time is asserted in tests/perf."""
    base = results(*(row(cell(batch), [1.0] * 6) for batch in range(1, 10_001)))
    head = results(*(msgspec.structs.replace(one) for one in base.measurements))
    found = compare(base, head)
    assert found.cells == 10_000
    assert len(Xml.fromstring(junit.document(found))[0].findall("testcase")) == 10_000
    assert store.FILE_NAME == "measurements.jsonl"


def test_a_foreign_file_is_told_from_a_run_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "run.json").mkdir()
    assert not foreign.is_foreign(tmp_path / "run.json")
    assert foreign.is_foreign(tmp_path / "missing.json")
    assert not foreign.is_foreign(tmp_path / "measurements.jsonl")
    with pytest.raises(InputError, match="cannot be read"):
        foreign.read(tmp_path / "missing.json")
