"""Which row of a study stands beside which of the paper's, and how far two orders agree. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any, TypeAlias

from bench import paper
from bench.report.studies.held import Held
from bench.report.studies.outcomes import Outcome, final, outcomes, recipes
from shortllama.study import NONE

MODEL = "llama-7b"  # whose rows stand beside models that the paper does not have
NEAR = 0.05  # farthest that two ratios may be apart to stand in one row
_ROUNDING = 1e-9

Pairs: TypeAlias = list[tuple[Any, Outcome | None]]  # a row of the paper or None, and ours or None


def section(held: Held) -> str:
    """Return the model of the paper whose rows stand beside the study's."""
    name = held.model.rstrip("/").rsplit("/", 1)[-1].lower()
    return name if name in {row.model for row in paper.read().zero_shot} else MODEL


def is_papers(held: Held) -> bool:
    """Return whether the study is of one of the paper's models."""
    return section(held) == held.model.rstrip("/").rsplit("/", 1)[-1].lower()


def share(pruned: str) -> float:
    """Return 0.2 for "20%"."""
    return float(pruned.rstrip("%")) / 100


def pair(rows: Sequence[Any], ours: Sequence[Outcome], far: Callable[[Any, Outcome], float | None]) -> Pairs:
    """Return the paper's rows in their order, each with the nearest of ours within NEAR, then what is left of ours."""
    found = [(distance, i, j) for i, row in enumerate(rows) for j, one in enumerate(ours)
             if (distance := far(row, one)) is not None and distance <= NEAR + _ROUNDING]  # fmt: skip
    taken: dict[int, int] = {}
    for _, i, j in sorted(found):
        if i not in taken and j not in taken.values():
            taken[i] = j
    pairs: Pairs = [(row, ours[taken[i]] if i in taken else None) for i, row in enumerate(rows)]
    return pairs + [(None, one) for j, one in enumerate(ours) if j not in taken.values()]


def usual(held: Held) -> list[Outcome]:
    """Return one outcome a label and ratio: the first calibration, retrained by the first recipe where there is one."""
    chosen: dict[tuple[str, float], Outcome] = {}
    for one in one_recipe(final(outcomes(held))):
        chosen.setdefault((one.label, one.ratio), one)
    return list(chosen.values())


def one_recipe(found: Sequence[Outcome]) -> list[Outcome]:
    """Return what the first recipe retrained, and what nothing did."""
    first = next(iter(recipes(found)), NONE)
    return [one for one in found if one.recipe in (first, NONE)]


def agreement(values: Sequence[tuple[float, float]]) -> tuple[int, int]:
    """Return how many pairs of (ours, the paper's) are in one order, and how many are in any; a tie is in none."""
    signs = [(a[0] - b[0]) * (a[1] - b[1]) for a, b in combinations(values, 2)]
    return sum(sign > 0 for sign in signs), sum(sign != 0 for sign in signs)
