"""Labels without overlaps: one-dimensional spreading, rows of a key, and a first-come rule for boxes. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec


class Box(msgspec.Struct, frozen=True):
    """A rectangle in pixels, y upwards."""

    left: float
    bottom: float
    right: float
    top: float

    def overlaps(self, other: Box) -> bool:
        """Return whether the insides meet; touching edges do not."""
        return (
            self.left < other.right and other.left < self.right and self.bottom < other.top and other.bottom < self.top
        )

    def inside(self, other: Box) -> bool:
        """Return whether this box lies within the other."""
        return (
            self.left >= other.left
            and self.right <= other.right
            and self.bottom >= other.bottom
            and self.top <= other.top
        )


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Return positions near `wanted` (any order), at least `gap` apart, in [low, high], moved as little as possible.

    Least squares under ordering: shifting the i-th by i gaps turns it into isotonic regression, which pooling adjacent
    violators solves exactly. Where they cannot all fit, they are spread evenly over the range.
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    room = high - low - gap * (len(wanted) - 1)
    if room < 0:
        step = (high - low) / (len(wanted) - 1)
        return _unsorted(order, [low + i * step for i in range(len(wanted))])
    blocks: list[list[float]] = []  # [sum, count] of shifted positions that share one value
    for rank, index in enumerate(order):
        blocks.append([wanted[index] - rank * gap, 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] >= blocks[-1][0] / blocks[-1][1]:
            total, count = blocks.pop()
            blocks[-1] = [blocks[-1][0] + total, blocks[-1][1] + count]
    shifted = [total / count for total, count in blocks for _ in range(int(count))]
    placed = [min(max(value, low), low + room) + rank * gap for rank, value in enumerate(shifted)]
    return _unsorted(order, placed)


def _unsorted(order: Sequence[int], values: Sequence[float]) -> list[float]:
    result = [0.0] * len(values)
    for rank, index in enumerate(order):
        result[index] = values[rank]
    return result


def rows(widths: Sequence[float], available: float, gap: float) -> list[list[int]]:
    """Return indices in rows no wider than `available`, in order; an item wider than that has a row of its own."""
    filled: list[list[int]] = []
    used = 0.0
    for index, width in enumerate(widths):
        if filled and used + gap + width <= available:
            filled[-1].append(index)
            used += gap + width
        else:
            filled.append([index])
            used = width
    return filled


def free(candidates: Sequence[Box], taken: Sequence[Box], frame: Box) -> Box | None:
    """Return the first candidate inside the frame that meets nothing taken, None if there is none."""
    for box in candidates:
        if box.inside(frame) and not any(box.overlaps(other) for other in taken):
            return box
    return None
