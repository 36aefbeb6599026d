"""What the figures of a study share: colours of curves that are no subjects, and words for what is left out. Pure."""

from __future__ import annotations

from bench.report.series import PANEL_LIMIT, SERIES_LIMIT

COLOURS = (
    "cool-1",
    "cool-2",
    "warm-1",
    "warm-3",
    "other-1",
    "other-2",
    "cool-3",
    "warm-2",
    "cool-4",
    "warm-4",
    "other-3",
)


def tint(place: int) -> str:
    """Return the colour of the n-th curve of a figure."""
    return COLOURS[place % len(COLOURS)]


def left_out(panels: int, most: int) -> str:
    """Say what a figure of so many panels, with so many members at most, leaves out."""
    parts = [f"{panels - PANEL_LIMIT} of {panels} panels"] if panels > PANEL_LIMIT else []
    parts += [f"what is beyond the first {SERIES_LIMIT} of a panel"] if most > SERIES_LIMIT else []
    return f"Not drawn: {' and '.join(parts)}; the tables have them all." if parts else ""
