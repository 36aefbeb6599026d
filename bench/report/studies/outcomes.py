"""What a study amounts to, seeds together: one outcome for each way of pruning and retraining. Pure.

Tables, figures and findings read these, so that no two of them disagree on which runs belong together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

from bench.report.quantities import inert
from bench.report.studies.held import Held
from shortllama.evaluation.results import Quality
from shortllama.evaluation.tasks import TASKS
from shortllama.shape import QUANTISED
from shortllama.studies.rows import Row
from shortllama.studies.summary import closed
from shortllama.study import NONE


class Outcome(msgspec.Struct, frozen=True):
    """The runs of one label, ratio, calibration and recipe, one a seed."""

    rows: tuple[Row, ...]

    @property
    def first(self) -> Row:
        """Any of them, for what they share."""
        return self.rows[0]

    @property
    def label(self) -> str:
        """The method with its options."""
        return self.first.label

    @property
    def ratio(self) -> float:
        """What was asked to be removed."""
        return self.first.ratio

    @property
    def recipe(self) -> str:
        """How it was retrained; "none"."""
        return self.first.recipe

    @property
    def calibration(self) -> str:
        """What was scored on, "" for methods that read no text."""
        return "" if self.first.calibration is None else self.first.calibration.label

    @property
    def removed(self) -> float:
        """The share of all parameters that went."""
        return mean(row.achieved.parameters for row in self.rows)

    @property
    def is_plain(self) -> bool:
        """Whether no option but the unit departs from the method's own."""
        return self.label in (self.first.method, f"{self.first.method} (modules)")

    @property
    def in_steps(self) -> bool:
        """Whether parts were scored anew after others had gone (the paper's iterative pruning)."""
        return self.first.iterative or self.taught_between

    @property
    def taught_between(self) -> bool:
        """Whether it was retrained between cuts, and so has had more than others with the same recipe."""
        return "between" in self.first.costs

    def before(self, text: str) -> list[float]:
        """Return the perplexities of the pruned models, one a seed."""
        return _perplexities([row.before for row in self.rows], text)

    def after(self, text: str) -> list[float]:
        """Return the perplexities of the retrained models; none without retraining."""
        return _perplexities([row.after for row in self.rows if row.after is not None], text)

    def result(self, text: str) -> list[float]:
        """Return the perplexities of what came out."""
        return _perplexities([row.result for row in self.rows], text)

    def closed(self, text: str, dense: Quality | None) -> list[float]:
        """Return the share of the gap in perplexity that retraining closed, for each seed of which it can be told."""
        base = None if dense is None else dense.perplexity.get(text)
        shares = [
            closed(base, row.before.perplexity[text], row.after.perplexity[text])
            for row in self.rows
            if row.after is not None and text in row.before.perplexity and text in row.after.perplexity
        ]
        return [share for share in shares if share is not None]

    def accuracy(self, task: str) -> float | None:
        """Return the mean accuracy of a task over the seeds, None where not all were evaluated."""
        return average([_accuracy(row.result, task) for row in self.rows])

    @property
    def seven(self) -> float | None:
        """The mean over the paper's seven tasks, None where not all seven were evaluated."""
        return average([seven(row.result) for row in self.rows])


def is_quantised(row: Row) -> bool:
    """Return whether the weights of a row's result are held in few bits: it is named so behind its recipe."""
    return row.recipe.rpartition("+")[2] in QUANTISED


def outcomes(held: Held, *, quantised: bool = False) -> tuple[Outcome, ...]:
    """Return the outcomes of a study in the order of its rows: those as they are, or those held in few bits."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in (row for row in held.rows if is_quantised(row) == quantised):
        calibration = None if row.calibration is None else row.calibration.label
        groups.setdefault((row.label, row.ratio, calibration, row.recipe), []).append(row)
    return tuple(Outcome(tuple(rows)) for rows in groups.values())


def final(found: Sequence[Outcome]) -> tuple[Outcome, ...]:
    """Return what came out of each way of pruning: its retrained outcomes, or where there is none the pruned one."""
    retrained = {_way(one) for one in found if one.recipe != NONE}
    return tuple(one for one in found if one.recipe != NONE or _way(one) not in retrained)


def _way(one: Outcome) -> tuple[str, float, str]:
    return one.label, one.ratio, one.calibration


def recipes(found: Sequence[Outcome]) -> tuple[str, ...]:
    """Return the recipes, those that retrain first."""
    return tuple(sorted(dict.fromkeys(one.recipe for one in found), key=lambda name: name == NONE))


def several(found: Sequence[Outcome], of: Callable[[Outcome], Any]) -> bool:
    """Return whether these outcomes differ in something, which then has to be said."""
    return len({of(one) for one in found}) > 1


def named(one: Outcome, among: Sequence[Outcome]) -> str:
    """Return a name for an outcome that tells it from others of the same ratio."""
    rivals = [other for other in among if other.ratio == one.ratio]
    said = [one.label]
    said += (
        [f"scored on {one.calibration}"] if one.calibration and _differs(one, rivals, lambda o: o.calibration) else []
    )
    said += [_recipe(one)] if _differs(one, rivals, lambda o: o.recipe) else []
    return inert(", ".join(said))


def _differs(one: Outcome, rivals: Sequence[Outcome], of: Callable[[Outcome], str]) -> bool:
    return several([other for other in rivals if other.label == one.label], of)


def _recipe(one: Outcome) -> str:
    return "not retrained" if one.recipe == NONE else one.recipe


def seven(quality: Quality) -> float | None:
    """Return the mean over the paper's seven tasks; None where one of them is missing: that is another mean."""
    names = [name for name, task in TASKS.items() if task.averaged]
    return average([_accuracy(quality, name) for name in names])


def comparable(text: str, qualities: Iterable[Quality | None]) -> bool:
    """Return whether all of these were measured on a text, and on the same tokens of it."""
    digests = {None if one is None or text not in one.perplexity else one.perplexity[text].digest for one in qualities}
    return len(digests) == 1 and None not in digests


def mean(values: Iterable[float]) -> float:
    """Return the mean of one value or more."""
    found = list(values)
    return math.fsum(found) / len(found)


def average(values: Sequence[float | None]) -> float | None:
    """Return the mean, None where any value is missing."""
    known = [value for value in values if value is not None]
    return mean(known) if known and len(known) == len(values) else None


def spread(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the smallest and the largest of two values or more."""
    return (min(values), max(values)) if len(values) > 1 else None


def _perplexities(qualities: Sequence[Quality], text: str) -> list[float]:
    return [one.perplexity[text].perplexity for one in qualities if text in one.perplexity]


def _accuracy(quality: Quality, task: str) -> float | None:
    if quality.zero_shot is None or task not in quality.zero_shot.tasks:
        return None
    return quality.zero_shot.tasks[task].value
