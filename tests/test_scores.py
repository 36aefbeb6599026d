from __future__ import annotations

import math
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shortllama import files
from shortllama.errors import InputError
from shortllama.scores import Cost, Scores, check_finite, read_scores, write_scores

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
