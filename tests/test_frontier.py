"""The largest batch is found exactly, in few trials, whatever the prediction, the noise and the faults."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import frontier
from bench.frontier import Answer, Ask, Trial


def found(fits: Callable[[Ask], bool], predicted: int, most: int = 500) -> tuple[Answer, list[Trial]]:
    trials: list[Trial] = []
    while isinstance(asked := frontier.advise(trials, predicted), Ask):
        assert asked.batch >= 1
        trials.append(Trial(asked.batch, fits(asked), asked.whole))
        assert len(trials) < most, "a search must end"
    return asked, trials


@given(largest=st.integers(1, 50_000), error=st.floats(-0.05, 0.05))
@settings(max_examples=400)
def test_a_prediction_within_five_percent_takes_few_trials(largest: int, error: float) -> None:
    predicted = min(max(round(largest * (1 + error)), math.ceil(0.95 * largest)), math.floor(1.05 * largest))
    answer, trials = found(lambda asked: asked.batch <= largest, predicted)
    assert answer == Answer(largest)
    assert len(trials) <= frontier.most_trials(largest) == 7 + math.ceil(math.log2(1 + 0.1 * largest))


@given(largest=st.integers(0, 5_000), predicted=st.integers(0, 20_000))
@settings(max_examples=400)
def test_any_prediction_finds_the_brute_force_answer_confirmed_on_both_sides(largest: int, predicted: int) -> None:
    answer, trials = found(lambda asked: asked.batch <= largest, predicted)
    assert answer == Answer(largest)
    at, above = ([t for t in trials if t.batch == batch] for batch in (largest, largest + 1))
    assert len(above) >= 2
    assert not any(t.fits for t in above)
    if largest:
        assert len(at) >= 2
        assert any(t.whole for t in at), "a whole generation certifies the answer"
        assert {largest + 2, largest + 8} <= {t.batch for t in trials}


@given(largest=st.integers(1, 300), hole=st.sampled_from([2, 8]), error=st.floats(-0.05, 0.05))
def test_memory_that_is_not_monotone_is_said(largest: int, hole: int, error: float) -> None:
    # Where a further batch fits, the search either says so or has found that batch as its answer.
    def fits(asked: Ask) -> bool:
        return asked.batch <= largest or asked.batch == largest + hole

    answer, _ = found(fits, max(1, round(largest * (1 + error))))
    assert answer in (Answer(largest, beyond=(largest + hole,)), Answer(largest + hole))


@given(largest=st.integers(1, 400), predicted=st.integers(1, 800), seed=st.integers(0, 2**16))
@settings(max_examples=200)
def test_noise_at_the_edge_ends_in_a_batch_that_the_majority_of_its_trials_holds(
    largest: int, predicted: int, seed: int
) -> None:
    noise = random.Random(seed)

    def fits(asked: Ask) -> bool:
        if abs(asked.batch - largest) <= 2:
            return noise.random() < 0.5
        return asked.batch <= largest

    answer, trials = found(fits, predicted)
    assert abs(answer.largest - largest) <= 3
    whole_only = any(t.whole and not t.fits for t in trials)

    def verdicts(batch: int) -> list[bool]:
        return [t.fits for t in trials if t.batch == batch and (t.whole or not t.fits or not whole_only)]

    assert sum(verdicts(answer.largest + 1)) * 2 < len(verdicts(answer.largest + 1))
    assert answer.largest == 0 or sum(verdicts(answer.largest)) * 2 > len(verdicts(answer.largest))
    assert set(answer.unsteady) == {t.batch for t in trials if len(set(verdicts(t.batch))) == 2}


@given(largest=st.integers(1, 400), lost=st.integers(1, 50), predicted=st.integers(1, 800))
def test_where_whole_generations_need_more_only_they_count(largest: int, lost: int, predicted: int) -> None:
    whole = max(largest - lost, 0)
    answer, trials = found(lambda asked: asked.batch <= (whole if asked.whole else largest), predicted)
    assert answer.largest == whole
    if whole:
        assert any(t.batch == whole and t.fits and t.whole for t in trials)
    assert [t.fits for t in trials if t.batch == whole + 1 and t.whole].count(False) >= 1


def test_memory_that_never_ends_ends_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    answer, trials = found(lambda asked: True, 1000)
    assert answer == Answer(frontier.LARGEST, open_ended=True)
    assert len(trials) < 40
