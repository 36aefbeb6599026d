"""The grid: strict suites with the path of what is wrong, stable ids, and an order that groups cells."""

from __future__ import annotations

from itertools import groupby, pairwise
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import cells
from bench.cells import BatchRange, Cell, Suite
from shortllama.errors import InputError

SUITE = """schema = "shortllama.suite/1"
subjects = ["llama-7b", "llama-7b/depth-26"]
"""


def write(tmp_path: Path, text: str) -> str:
    file = tmp_path / "suite.toml"
    file.write_text(text)
    return str(file)


def suite(**fields: object) -> Suite:
    return msgspec.convert({"schema": cells.SUITE_SCHEMA, "subjects": ["a"], **fields}, Suite)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("batchs = [1]", "$.batchs; did you mean 'batch'"),
        ("batch = [0]", "$.batch"),
        ("batch = {from = 1, facto = 2}", "facto"),
        ("batch = {from = 8, until = 4}", "$.batch"),
        ('runtimes = ["eagre"]', "$.runtimes[0]: unknown runtime 'eagre'"),
        ('dtypes = ["float16", "fp8"]', "$.dtypes[1]: unknown dtype 'fp8'"),
        ('timing = "hasty"', "$.timing: unknown timing 'hasty'"),
        ("prompt = []", "$.prompt is empty"),
        ("output = [8, 8]", "$.output names a value twice"),
        ('budgets = ["24GB"]', "$.budgets[0]: budget '24GB' is not a size"),
        ("cell_seconds = 0", "$.cell_seconds"),
        ('schema = "shortllama.suite/2"', "suite"),
    ],
)
def test_a_bad_suite_is_refused_with_the_path(tmp_path: Path, line: str, expected: str) -> None:
    text = SUITE + line if not line.startswith("schema") else line + '\nsubjects = ["a"]'
    with pytest.raises(InputError) as error:
        cells.read_suite(write(tmp_path, text))
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_suite_names_the_shipped_ones() -> None:
    with pytest.raises(InputError, match=r"neither a file nor a shipped suite; shipped: .*quick"):
        cells.read_suite("quik")


@pytest.mark.parametrize("file", sorted((Path(cells.__file__).parent / "suites").glob("*.toml")), ids=lambda f: f.stem)
def test_shipped_suites_are_readable(file: Path) -> None:
    assert next(cells.expand(cells.read_suite(file.stem)))


def test_a_file_may_be_named_without_suffix_only_if_it_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "quick").write_text(SUITE)
    monkeypatch.chdir(tmp_path)
    assert cells.read_suite("quick").subjects == ("llama-7b", "llama-7b/depth-26")


def test_the_id_of_a_cell_never_changes() -> None:
    """Golden: runs of different years pair up by it."""
    cell = Cell("llama-7b", "eager", "float16", "sdpa", 12, 128, "none", 1)
    assert cell.id == "673ddf45d6a0b48d"
    assert cell.group.batch == 0
    assert cell.label == "llama-7b eager float16 M1 P12 L128"


VALUES = st.builds(
    Cell,
    st.sampled_from(["a", "b"]),
    st.sampled_from(["eager", "static"]),
    st.sampled_from(["float16", "float32"]),
    st.just("sdpa"),
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from(["none", "1GiB"]),
    st.integers(0, 3),
)


@given(VALUES, VALUES)
def test_ids_are_equal_exactly_for_equal_cells(one: Cell, other: Cell) -> None:
    assert (one.id == other.id) == (one == other)
    assert msgspec.json.decode(msgspec.json.encode(one), type=Cell).id == one.id


@given(st.integers(1, 100), st.integers(2, 5), st.integers(1, 10_000))
def test_a_range_is_geometric_up_to_its_end(start: int, factor: int, until: int) -> None:
    values = cells.batches(suite(batch={"from": start, "factor": factor, "until": until}))
    assert all(later == earlier * factor for earlier, later in pairwise(values))
    assert not values or (values[0] == start and values[-1] <= until < values[-1] * factor)
    assert bool(values) == (start <= until)


def test_an_open_range_ends_at_the_largest_batch() -> None:
    assert cells.batches(suite(batch={}))[-1] == cells.LARGEST_BATCH
    assert suite(batch={}).batch == BatchRange(1, 2, "oom")


def test_expand_yields_every_combination_once_and_group_by_group() -> None:
    grid = suite(subjects=["a", "b"], runtimes=["eager", "static"], batch=[4, 1, 2], output=[8, 16], budgets=["none"])
    found = list(cells.expand(grid))
    assert len(found) == len(set(found)) == 2 * 2 * 3 * 2
    groups = [(key, [cell.batch for cell in members]) for key, members in groupby(found, key=lambda c: c.group)]
    assert len(groups) == len({key for key, _ in groups}) == 8
    assert all(batches == [1, 2, 4] for _, batches in groups)
    assert [key.subject for key, _ in groups] == ["a", "b"] * 4


@pytest.mark.parametrize(
    ("text", "size"), [("none", None), ("24GiB", 24 << 30), ("512MiB", 512 << 20), ("1.5 KiB", 1536)]
)
def test_budgets_are_sizes(text: str, size: int | None) -> None:
    assert cells.budget_bytes(text) == size


@pytest.mark.parametrize("text", ["", "24", "24GB", "0GiB", "-1GiB", "GiB", "nan GiB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="write for example 24GiB"):
        cells.budget_bytes(text)
