"""Where ticks go and which fit. Pure arithmetic over axis limits and label widths."""

from __future__ import annotations

import math
from collections.abc import Sequence

_STEPS = ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7), (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9))
_LINEAR = (1, 2, 2.5, 5)


def logarithmic(low: float, high: float, least: int = 4) -> list[float]:
    """Return round values in [low, high] for a log axis: the coarsest of five sets that has `least` of them.

    Where even the finest has fewer, the axis spans so little that equal steps read better.
    """
    for steps in _STEPS:
        decades = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
        found = [float(f"{step}e{decade}") for decade in decades for step in steps]
        found = [value for value in found if low <= value <= high]
        if len(found) >= least:
            return found
    return linear(low, high, least)


def linear(low: float, high: float, least: int = 4) -> list[float]:
    """Return at least `least` equally spaced round values in [low, high]."""
    raw = (high - low) / least
    decade = 10.0 ** math.floor(math.log10(raw))
    step = max(m * decade for m in (0.5, *_LINEAR) if m * decade <= raw)
    values = [float(f"{i * step:.12g}") for i in range(math.floor(low / step), math.ceil(high / step) + 1)]
    return [value for value in values if low <= value <= high]


def limits(values: Sequence[float], pad: float = 1.0, least: float = 1.6) -> tuple[float, float]:
    """Return log-axis limits around positive values: `pad` twelfths of the span at each side, at least `least` apart.

    A span of nothing would blow up noise to the height of the figure.
    """
    low, high = math.log(min(values)), math.log(max(values))
    missing = max(0.0, math.log(least) - (high - low))
    margin = missing / 2 + pad * (high - low + missing) / 12
    return math.exp(low - margin), math.exp(high + margin)


def from_zero(values: Sequence[float]) -> tuple[float, float]:
    """Return limits of a linear axis: zero, and the largest of these values with a little room."""
    return 0.0, (max([0.0, *values]) or 1.0) * 1.06


def thin(positions: Sequence[float], widths: Sequence[float], gap: float) -> list[int]:
    """Return indices of labels to keep, ascending, so that centred labels of these widths stay `gap` apart.

    From the left, each that fits: of evenly spaced labels of one width, that is every k-th.
    """
    kept: list[int] = []
    for index, (position, width) in enumerate(zip(positions, widths, strict=True)):
        if not kept or position - positions[kept[-1]] >= (widths[kept[-1]] + width) / 2 + gap:
            kept.append(index)
    return kept
