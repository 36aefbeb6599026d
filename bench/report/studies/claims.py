"""What the two papers claim of quality, and whether it holds in a study: each claim with its numbers. Pure.

A claim is a row of data: what it says, who says it, and which pairs of outcomes decide it. A pair is judged by
perplexity on the study's first text, means over seeds, and only between models that lost nearly as many parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import msgspec

from bench.report import quantities
from bench.report.studies.held import Held
from bench.report.studies.outcomes import Outcome, final, mean, outcomes, recipes, spread
from bench.report.values import Column, Table, Value
from shortllama.evaluation import tasks
from shortllama.evaluation.tasks import TASKS
from shortllama.studies import summary
from shortllama.study import NONE

# Shares of all parameters removed within which two models are compared.
ALIKE = 0.05
HALF = 0.5
SHORTENED, SHORTGPT = "Shortened LLaMA", "ShortGPT"
HOLDS, FAILS, MIXED, UNTOLD = "holds", "does not hold", "holds in part", "cannot be told"


class Case(msgspec.Struct, frozen=True):
    """One place where a claim can be tested: in words, and whether it held there; None where errors are too large."""

    words: str
    held: bool | None


class Claim(msgspec.Struct, frozen=True):
    """What is claimed, by whom, and the cases that a study has of it."""

    says: str
    source: str
    cases: Callable[[Held, str], Iterator[Case]]


def verdict(cases: Sequence[Case]) -> str | None:
    """Return what the cases come to, None without any. Where most of them cannot be told, neither can the claim."""
    if not cases:
        return None
    known = [case.held for case in cases if case.held is not None]
    if 2 * len(known) < len(cases):
        return UNTOLD
    return HOLDS if all(known) else MIXED if any(known) else FAILS


# -- pairs -------------------------------------------------------------------------------------------------------------


def alike(one: Outcome, other: Outcome) -> bool:
    """Whether two outcomes lost nearly as much, and had the same text to be scored on and retraining."""
    same = (one.ratio, one.recipe, one.taught_between) == (other.ratio, other.recipe, other.taught_between)
    read = {text for text in (one.calibration, other.calibration) if text}
    return same and len(read) <= 1 and abs(one.removed - other.removed) <= ALIKE


def _no_worse(first: Outcome, second: Outcome, text: str) -> Case:
    """Whether the first has no higher perplexity than the second; where seeds overlap it has not."""
    ours, theirs = first.result(text), second.result(text)
    how = "" if first.recipe == NONE else f" after {first.recipe}"
    words = f"{_said(first, ours)} against {_said(second, theirs)}{how}, at {quantities.share(first.ratio)}"
    return Case(words, min(ours) <= max(theirs))


def _said(one: Outcome, values: Sequence[float]) -> str:
    ends = spread(values)
    seeds = "" if ends is None else f" ({quantities.interval(ends, 'number')})"
    return f"{quantities.inert(one.label)} {quantities.significant(mean(values))}{seeds}"


def _of_unit(held: Held, text: str, unit: str) -> list[Outcome]:
    """Plain outcomes of one way to cut: whole blocks, modules, or widths."""
    return [one for one in outcomes(held) if one.first.unit == unit and not one.in_steps and one.result(text)]


def _best_pairs(held: Held, text: str, ours: str, theirs: str, retrained: bool) -> Iterator[Case]:
    """At each ratio, the best method that cuts one way against the best that cuts the other way."""
    for ratio in dict.fromkeys(one.ratio for one in outcomes(held)):
        for recipe in recipes(outcomes(held)):
            if (recipe != NONE) != retrained:
                continue
            sides = [
                [one for one in _of_unit(held, text, unit) if (one.ratio, one.recipe) == (ratio, recipe)]
                for unit in (ours, theirs)
            ]
            pairs = [(a, b) for a in sides[0] for b in sides[1] if alike(a, b)]
            if pairs:
                yield _no_worse(*min(pairs, key=lambda two: sum(mean(one.result(text)) for one in two)), text)


def _named_pairs(held: Held, text: str, method: str, other: str, unit: str = "block") -> Iterator[Case]:
    """Two methods wherever they are retrained alike."""
    for one in _of_unit(held, text, "block"):
        for rival in _of_unit(held, text, unit):
            if (one.label, rival.first.method) == (method, other) and rival.is_plain and alike(one, rival):
                yield _no_worse(one, rival, text)


# -- the claims --------------------------------------------------------------------------------------------------------


def _recovers(held: Held, text: str) -> Iterator[Case]:
    for one in _of_unit(held, text, "block"):
        shares = one.closed(text, held.dense)
        if shares:
            words = f"{quantities.inert(one.label)} {quantities.share(mean(shares))} at {quantities.share(one.ratio)}"
            yield Case(words, mean(shares) >= HALF)


def _once(held: Held, text: str) -> Iterator[tuple[Outcome, Outcome]]:
    """Pairs of several cuts with retraining between, and one cut of the same method."""

    def way(one: Outcome) -> tuple[object, ...]:
        return one.first.method, one.ratio, one.recipe, one.calibration

    for several in (one for one in outcomes(held) if one.taught_between and one.result(text)):
        for once in _of_unit(held, text, several.first.unit):
            if way(once) == way(several) and once.is_plain:
                yield several, once


def _several_first(held: Held, text: str) -> Iterator[Case]:
    for several, once in _once(held, text):
        if several.recipe == NONE:
            yield _no_worse(several, once, text)


def _retraining_bridges(held: Held, text: str) -> Iterator[Case]:
    """A gap is bridged where it is less than half of what it was before retraining."""
    for several, once in _once(held, text):
        if several.recipe == NONE or not several.after(text) or not once.after(text):
            continue
        before, after = (mean(b) - mean(a) for a, b in zip(_sides(several, text), _sides(once, text), strict=True))
        words = f"{quantities.significant(before)} apart in perplexity before {several.recipe}"
        words += f", {quantities.significant(after)} after, at {quantities.share(several.ratio)}"
        yield Case(words, abs(after) < HALF * abs(before))


def _sides(one: Outcome, text: str) -> tuple[list[float], list[float]]:
    return one.before(text), one.after(text)


class Fall(msgspec.Struct, frozen=True):
    """What an outcome lost of the dense model's lead over guessing, in choosing and in writing (see `summary.Loss`).

    `error`: two standard errors of the difference, as if models were evaluated on items of their own.
    """

    outcome: Outcome
    chosen: float
    written: float
    error: float

    @property
    def writing_first(self) -> bool | None:
        """Whether writing fell more, None where that is within the error."""
        return None if abs(self.written - self.chosen) <= self.error else self.written > self.chosen


def falls(held: Held) -> list[Fall]:
    """Return what each way to prune took from tasks at which the dense model does not guess, of both kinds."""
    dense = {} if held.dense is None else summary.telling(held.dense)
    found: list[Fall] = []
    for one in final(outcomes(held)):
        now = {name: value for name in dense if (value := one.accuracy(name)) is not None}
        sides = [[n for n in dense if (TASKS[n].choices == (1, 1)) == writing] for writing in (False, True)]
        if len(now) == len(dense) and all(sides):
            chosen, written = (summary.lead_lost(names, dense, now) or 0.0 for names in sides)
            errors = [_error(one, names) / sum(dense[n] - tasks.guessing(n) for n in names) for names in sides]
            found.append(Fall(one, chosen, written, summary.CERTAIN * math.hypot(*errors)))
    return found


def _error(one: Outcome, names: Sequence[str]) -> float:
    """The standard error of a sum of accuracies, that of one seed: all seeds meet the same items."""
    known = one.first.result.zero_shot
    assert known is not None, "all tasks were evaluated"
    return math.hypot(*(known.tasks[name].standard_error or 0.0 for name in names))


def _generating_first(held: Held, text: str) -> Iterator[Case]:
    for one in falls(held):
        chosen, written = quantities.share(one.chosen), quantities.share(one.written)
        where = f"{quantities.inert(one.outcome.label)} at {quantities.share(one.outcome.ratio)}"
        yield Case(f"{where}: writing lost {written}, choosing {chosen}", one.writing_first)


CLAIMS = (
    Claim("LoRA wins back at least half of what removing blocks cost", f"{SHORTENED}, sec. 3.2", _recovers),
    Claim(
        "After retraining, removing blocks is no worse than reducing widths",
        f"{SHORTENED}, Tables 3 and 10",
        lambda held, text: _best_pairs(held, text, "block", "width", True),
    ),
    Claim(
        "Before retraining, blocks are at least as redundant as widths",
        SHORTGPT,
        lambda held, text: _best_pairs(held, text, "block", "width", False),
    ),
    Claim(
        "The perplexity criterion is no worse than Taylor+ in perplexity",
        f"{SHORTENED}, Table 5",
        lambda held, text: _named_pairs(held, text, "ppl", "taylor+"),
    ),
    Claim(
        "Block influence is no worse than the perplexity criterion",
        SHORTGPT,
        lambda held, text: _named_pairs(held, text, "bi", "ppl"),
    ),
    Claim(
        "Removing whole blocks is no worse in perplexity than removing modules",
        f"{SHORTENED}, Table 6",
        lambda held, text: _named_pairs(held, text, "ppl", "ppl", "module"),
    ),
    Claim("Several cuts are no worse than one, before the last retraining", f"{SHORTENED}, Figure 5", _several_first),
    Claim("Retraining bridges the gap between one cut and several", f"{SHORTENED}, Figure 5", _retraining_bridges),
    Claim("Generating falls more than choosing", SHORTGPT, _generating_first),
)


def table(held: Held) -> Table | None:
    """Return the claims that this study tests, each with its verdict and every case."""
    text = next(iter(held.texts), "")
    columns = (
        Column("claim", "Claim"), Column("source", "Claimed by"), Column("verdict", "Here"),
        Column("held_in", "Held in", "integer"), Column("cases", "Cases", "integer"), Column("numbers", "Numbers"),
    )  # fmt: skip
    rows: list[tuple[Value, ...]] = []
    for claim in CLAIMS:
        cases = [*claim.cases(held, text)]
        said = verdict(cases)
        if said is not None:
            kept = sum(case.held is True for case in cases)
            numbers = "; ".join(case.words for case in cases)
            rows.append((claim.says, claim.source, said, kept, len(cases), numbers))
    if not rows:
        return None
    caption = (
        f"Judged by perplexity on {quantities.inert(text)}, means over seeds with their ranges, between models whose "
        f"shares of removed parameters differ by {quantities.share(ALIKE)} at most; retrained ones by the same recipe. "
        "Where the ranges of two methods overlap, neither is worse. Losses in accuracy differ where they do by two "
        "standard errors. Models that were not retrained are compared before retraining."
    )
    return Table(
        "study-claims", "What the papers claim, on this model", columns, tuple(rows), held.line, caption=caption
    )
