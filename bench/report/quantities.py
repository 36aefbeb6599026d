"""Numbers for people. SI base units go in; text goes out. The only place where values become words.

Three significant digits everywhere: measurements here are good to about one per cent, and more digits would claim
more. `text(value, unit)` is what tables, axes and findings share, so that no two of them disagree.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence

MISSING = DASH = "\u2013"
TIMES = "\u00d7"
SPACE = "\u00a0"  # between a number and its unit, which stay on one line
_SECONDS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))
_COUNTS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
_RATES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_BYTES = ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))


def significant(value: float) -> str:
    """Three significant digits without exponents; whole numbers from 100 on, with thousands separators."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    rounded = float(f"{value:.3g}")
    if abs(rounded) >= 100:
        return f"{round(value):,}"
    return f"{rounded:.{max(0, 2 - math.floor(math.log10(abs(rounded))))}f}"


def seconds(value: float) -> str:
    """Return "1.23 s", "12.3 ms" or "456 µs"."""
    for scale, unit in _SECONDS:
        if float(f"{abs(value):.3g}") >= scale:
            return f"{significant(value / scale)}{SPACE}{unit}"
    return f"{significant(value * 1e6)}{SPACE}µs"


def size(value: float) -> str:
    """Return bytes in binary units: "48.0 MiB"."""
    for scale, unit in _BYTES:
        if abs(value) >= scale:
            return f"{significant(value / scale)}{SPACE}{unit}"
    return f"{value:.0f}{SPACE}B"


def count(value: float) -> str:
    """Return "6.74 B" or "4.51 M"; below a thousand as it is."""
    return _scaled(value, _COUNTS)


def rate(value: float) -> str:
    """Return FLOP/s with the prefixes of units, the unit left to the axis: "989 T"."""
    return _scaled(value, _RATES)


def _scaled(value: float, names: Sequence[tuple[float, str]]) -> str:
    for scale, unit in names:
        if abs(value) >= scale:
            return f"{significant(value / scale)}{SPACE}{unit}"
    return f"{value:g}"


def ratio(value: float) -> str:
    """Return a ratio with a multiplication sign after it; two decimals below ten, so that 0.98 and 1.02 look alike."""
    return f"{f'{value:.2f}' if abs(value) < 9.995 else significant(value)}{TIMES}"


def change(value: float) -> str:
    """Return a ratio near one with three decimals: what the gate tells apart is a per cent or two."""
    return f"{value:.3f}{TIMES}"


def share(value: float) -> str:
    """A share of 0-1 as a whole percentage: "25 %"."""
    return f"{100 * value:.0f}{SPACE}%"


def accuracy(value: float) -> str:
    """A share of 0-1 as a percentage with one decimal, as accuracies are reported: "66.3 %"."""
    return f"{100 * value:.1f}{SPACE}%"


FORMATS = {
    "s": seconds,
    "bytes": size,
    "parameters": count,
    "FLOP/s": rate,
    "ratio": ratio,
    "change": change,
    "share": share,
    "accuracy": accuracy,
    "tokens/s": significant,
    "J/token": significant,
    "number": significant,
    "integer": lambda value: f"{value:,.0f}",
}


def text(value: object, unit: str) -> str:
    """Return a table's text for a value in `unit` (a key of FORMATS, or "text"); MISSING for None."""
    if value is None:
        return MISSING
    if unit == "text" or isinstance(value, str):
        return inert(str(value))
    if isinstance(value, tuple):
        return interval(value, unit)
    assert isinstance(value, int | float)
    return FORMATS[unit](value)


def tick(value: float, unit: str) -> str:
    """Return the text of a round value on an axis: as in `text`, without zeros that say nothing."""
    number, space, suffix = FORMATS[unit](value).partition(SPACE)
    return f"{number.rstrip('0').rstrip('.') if '.' in number else number}{space}{suffix}"


def interval(ends: tuple[float, float], unit: str) -> str:
    """Return both ends with a dash between them, and the unit once where both have the same one."""
    low, high = (FORMATS[unit](end) for end in ends)
    stem, _, suffix = high.partition(SPACE)
    if suffix and low.endswith(f"{SPACE}{suffix}"):
        return f"{low.removesuffix(f'{SPACE}{suffix}')}{DASH}{stem}{SPACE}{suffix}"
    return f"{low.removesuffix(TIMES) if high.endswith(TIMES) else low}{DASH}{high}"


def inert(name: str) -> str:
    """Return `name` on one line without control and direction-overriding characters, which have no business in a name.

    Escaping for a format is its renderer's work; this removes what no format can carry (XML 1.0 has no control
    characters) and what would reorder the text around it.
    """
    if name.replace(SPACE, " ").isprintable():  # none of these; asking for every character's category takes longer
        return name.strip()
    kept = (" " if unicodedata.category(character) in ("Cc", "Zl", "Zp") else character for character in name)
    return "".join(c for c in kept if unicodedata.category(c) not in ("Cf", "Cs") or c == "\u200d").strip()


def shorten(name: str, length: int) -> str:
    """Return `name` in at most `length` characters: the middle goes, since names differ at their ends."""
    if len(name) <= length:
        return name
    head = (length - 1) // 2
    return f"{name[:head]}…{name[len(name) - (length - 1 - head) :]}"
