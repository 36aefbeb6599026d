from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shortllama import console, files
from shortllama.cli import app
from shortllama.errors import InputError
from shortllama.plans import BlockKeep, Target, make_plan
from shortllama.scores import Cost, Scores, check_finite, read_scores, write_scores
from shortllama.shape import ModelShape

finite = st.floats(allow_nan=False, allow_infinity=False)


@given(st.lists(finite, min_size=1, max_size=5), st.lists(st.lists(finite, max_size=3), max_size=3))
def test_scores_survive_json_exactly(blocks: list[float], neurons: list[list[float]]) -> None:
    scores = Scores(
        criterion="ppl",
        unit="block",
        base_digest="x",
        blocks=tuple(blocks),
        neurons=tuple(map(tuple, neurons)),
        calibration={"digest": "d", "samples": 10},
    )
    read = files.decode_json(files.encode_json(scores), Scores, "scores.json")
    assert read == scores
    assert read.digest() == scores.digest()


def test_the_digest_is_about_the_scores_not_their_cost() -> None:
    one = Scores(criterion="mag", unit="block", base_digest="x", blocks=(1.0, 2.0), cost=Cost(1.0, None, 0))
    assert one.digest() == msgspec.structs.replace(one, cost=Cost(9.0, 5, 1)).digest()
    assert one.digest() != msgspec.structs.replace(one, blocks=(1.0, 3.0)).digest()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_are_never_written(tmp_path: Path, bad: float) -> None:
    path = tmp_path / "scores.json"
    depth = Scores(criterion="ppl", unit="block", base_digest="x", blocks=(1.0, bad))
    with pytest.raises(InputError, match=rf"scores.blocks\[1\] is {bad}"):
        write_scores(path, depth)
    width = Scores(criterion="w", unit="width", base_digest="x", kv_groups=((1.0,), (2.0,)), neurons=((1.0,), (bad,)))
    with pytest.raises(InputError, match=r"scores.neurons\[1\]"):
        write_scores(path, width)
    assert not path.exists()


def test_scores_that_rank_nothing_are_refused() -> None:
    with pytest.raises(InputError, match=r"all 3 values equal 0\.5"):
        check_finite(Scores(criterion="bi", unit="block", base_digest="x", blocks=(0.5, 0.5, 0.5)))
    check_finite(Scores(criterion="bi", unit="block", base_digest="x", blocks=(0.5,)))


def test_a_scores_file_round_trips_and_names_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    scores = Scores(criterion="mag", unit="module", base_digest="x", attention=(1.0, 2.0), mlp=(3.0, 4.0))
    write_scores(path, scores)
    assert read_scores(path) == scores
    path.write_bytes(path.read_bytes().replace(b'"module"', b'"layer"'))
    with pytest.raises(InputError, match=r"\$\.unit.*'layer'"):
        read_scores(path)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(InputError, match="not readable"):
        read_scores(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_scores(tmp_path / "none.json")


def test_costs_of_older_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    cost = '{"wall_s": 1.5, "peak_bytes": null, "tokens": 32}'
    path.write_text(
        f'{{"criterion": "mag", "unit": "block", "base_digest": "x", "blocks": [1.0, 2.0], "cost": {cost}}}'
    )
    assert read_scores(path).cost == Cost(1.5, None, 32)


# -- several criteria, and showing what they cost, from the command line ----------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 3 blocks with calibration beside it."""
    from shortllama import checkpoint, surgery

    shape = ModelShape.uniform(vocabulary=31, hidden=16, head_dim=4, blocks=3, query_heads=4, kv_heads=2, neurons=24)
    keep = tuple(BlockKeep(index) for index in range(3))
    plan = make_plan(model="m", shape=shape, method="none", target=Target("shape", "all"), keep=keep)
    out = tmp_path_factory.mktemp("model")
    checkpoint.save(surgery.build(shape, std=0.3), plan, out / "dense")
    (out / "ids.jsonl").write_text("[1, 2, 3, 4]\n[5, 6, 7, 8]\n")
    return out


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Return run(*arguments) -> (exit code, stdout, stderr) of a command in this process."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = console.run(app, [*map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def score(folder: Path, criteria: str, *more: object) -> list[object]:
    ids = f"ids:{folder / 'ids.jsonl'}"
    return ["score", folder / "dense", "--criterion", criteria, "--calibration", ids, *more]


def test_several_criteria_write_a_folder_one_file_each(run, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores"
    code, text, said = run(*score(folder, "bi, angular,ppl,bi", "--out", out))
    assert code == 0, said
    assert sorted(path.name for path in out.iterdir()) == ["angular.json", "bi.json", "ppl.json"]
    assert all(f"wrote {path}" in said for path in out.iterdir())
    assert all(f"{name}: higher = keep" in text for name in ("bi", "angular", "ppl"))
    assert run(*score(folder, "bi", "--out", tmp_path / "one.json"))[0] == 0
    assert read_scores(tmp_path / "one.json").digest() == read_scores(out / "bi.json").digest()
    code, text, _ = run(*score(folder, "bi,angular", "--out", out, "--json"))
    found = msgspec.json.decode(text, type=dict[str, dict[str, Scores]])["scores"]
    assert {name: one.digest() for name, one in found.items()} == {
        name: read_scores(out / f"{name}.json").digest() for name in ("bi", "angular")
    }
    assert sorted(path.name for path in out.iterdir()) == ["angular.json", "bi.json", "ppl.json"]


@pytest.mark.parametrize(
    ("criteria", "out", "expected"),
    [
        ("bi,angular", "file.json", "is a file, and 2 criteria make 2; give --out a folder"),
        ("bi,angular", "none/such", "there is no folder"),
        ("bi", "folder", "is a folder; give --out a file name"),
        ("bi,angle", "new", "criterion 'angle' is unknown; did you mean angular?"),
        ("bi,", "new", "criterion '' is unknown"),
        ("ppl,bi --unit module", "new", "criterion bi scores by block, not by module"),
        ("ppl,kl --block-reduction max", "new", "criterion ppl reduces no weights"),
    ],
)
def test_bad_combinations_are_one_line_and_leave_nothing(run, folder, tmp_path: Path, criteria, out, expected) -> None:
    (tmp_path / "file.json").write_text("mine")
    (tmp_path / "folder").mkdir()
    names, *more = criteria.split(" ")
    code, text, said = run(*score(folder, names, "--out", tmp_path / out, *more))
    assert (code, text) == (2, "")
    assert expected in said
    assert said.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.json", "folder"]
    assert (tmp_path / "file.json").read_text() == "mine"


def test_show_tells_ranks_and_costs(run, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores"
    run(*score(folder, "bi,angular", "--out", out))
    code, text, _ = run("show", out / "bi.json")
    assert code == 0
    assert re.search(r"scoring +\S+ +\S+ \w+ +8 +3 +one pass for bi, angular", text)
    code, text, _ = run("show", out / "bi.json", "--json")
    assert msgspec.json.decode(text, type=Scores) == read_scores(out / "bi.json")
    unknown = Cost(1.0, None, 0, runs=2, reasons={"peak_bytes": "not measurable here"})
    write_scores(tmp_path / "mag.json", Scores("mag", "block", "x", blocks=(1.0, 2.0), cost=unknown))
    assert re.search(r"1 +not measurable here +none +not counted +in 2 runs", run("show", tmp_path / "mag.json")[1])
    (tmp_path / "bad.json").write_text('{"schema": "shortllama.scores/1", "criterion": 3}')
    code, _, said = run("show", tmp_path / "bad.json")
    assert code == 2
    assert "$.criterion" in said


def test_a_pruned_folder_shows_what_it_took(run, folder: Path, tmp_path: Path) -> None:
    ids = f"ids:{folder / 'ids.jsonl'}"
    how = ("--method", "ppl", "--blocks", 1, "--calibration", ids)
    code, _, said = run("prune", folder / "dense", *how, "--out", tmp_path / "pruned")
    assert code == 0, said
    code, text, _ = run("show", tmp_path / "pruned")
    assert re.search(r"scoring +\S+ +\S+ \w+ +8 +6 ", text)
    assert re.search(r"writing +\S+ +\S+ \w+ +none +not counted", text)
    shown = msgspec.json.decode(run("show", tmp_path / "pruned", "--json")[1])
    assert {*shown["costs"]} == {"scoring", "writing"}
