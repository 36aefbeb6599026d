"""A sheet measured in pixels, y upwards: text, marks and axes at exact places, on matplotlib without pyplot.

At 72 dots an inch a point is a pixel, so that sizes here are CSS pixels in an SVG. Text is measured in DejaVu Sans,
which matplotlib ships and which is as wide as any common sans-serif face: where a page renders labels in its own font,
they take no more room than was measured, and labels that do not overlap here do not overlap there.
"""

from __future__ import annotations

import io
import unicodedata
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D

from bench.report.figures.placement import Box
from bench.report.palette import LIGHT

_SETTINGS: dict[str, Any] = {
    "figure.dpi": 72,
    "font.family": ["DejaVu Sans"],
    "text.parse_math": False,  # a `$` in a subject's name is a `$`
    "text.usetex": False,
    "svg.fonttype": "none",  # text stays text: searchable, copied, and as sharp as the page
    "axes.unicode_minus": True,
}


@contextmanager
def drawing(salt: str) -> Generator[None]:
    """Enter matplotlib's own defaults and ours, whatever matplotlibrc the user has; `salt` keeps ids in SVG apart."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        settings: Any = {**_SETTINGS, "svg.hashsalt": salt}
        matplotlib.rcParams.update(settings)
        # Characters of a name that DejaVu lacks are boxes in a PNG and the reader's own fonts in an SVG: no news.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


@lru_cache(maxsize=1)
def _renderer() -> RendererAgg:
    return RendererAgg(8, 8, 72)


@lru_cache(maxsize=4096)
def measure(text: str, size: float, weight: str = "normal") -> float:
    """Return the width of `text` in pixels; characters of wide scripts count double, as their own fonts draw them."""
    properties = FontProperties(family=["DejaVu Sans"], size=size, weight=weight)
    width = _renderer().get_text_width_height_descent(text, properties, ismath=False)[0]
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return width + wide * size * 0.5


def fitting(text: str, size: float, room: float, weight: str = "normal") -> str:
    """Return `text` shortened in the middle until it fits into `room` pixels."""
    from bench.report.quantities import shorten

    if measure(text, size, weight) <= room:
        return text
    low, high = 1, len(text)
    while low < high:  # the longest that fits
        middle = (low + high + 1) // 2
        low, high = (middle, high) if measure(shorten(text, middle), size, weight) <= room else (low, middle - 1)
    return shorten(text, low)


class Sheet:
    """One figure of `width` x `height` pixels. Colours are names of the palette."""

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self.figure = Figure(figsize=(width / 72, height / 72), dpi=72, facecolor=LIGHT["paper"])
        FigureCanvasAgg(self.figure)

    def axes(self, box: Box) -> Axes:
        """Return empty log-log axes that fill `box`: a base line, no ticks."""
        axes = self.figure.add_axes((
            box.left / self.width, box.bottom / self.height,
            (box.right - box.left) / self.width, (box.top - box.bottom) / self.height,
        ))  # fmt: skip
        axes.set_facecolor("none")
        for side in ("left", "top", "right"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set(color=LIGHT["guide"], linewidth=1)
        return axes

    def text(
        self, x: float, y: float, text: str, *, size: float, colour: str = "ink", weight: str = "normal",
        align: str = "left", vertical: str = "baseline",
    ) -> float:  # fmt: skip
        """Write one line of text at (x, y); return the x where it ends (begins, where right-aligned)."""
        self.figure.text(
            x / self.width, y / self.height, text, fontsize=size, color=LIGHT[colour], fontweight=weight, ha=align,
            va=vertical,
        )  # fmt: skip
        return x + measure(text, size, weight)

    def line(self, xs: Sequence[float], ys: Sequence[float], colour: str, **style: Any) -> None:
        """Draw a line or marks through pixels."""
        horizontal, vertical = [x / self.width for x in xs], [y / self.height for y in ys]
        style.setdefault("linewidth", 1.0)
        self.figure.add_artist(
            Line2D(horizontal, vertical, color=LIGHT[colour], transform=self.figure.transFigure, **style)
        )

    def png(self) -> bytes:
        """Return the sheet as PNG at two dots a pixel."""
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="png", dpi=144, metadata={"Software": None})
        return buffer.getvalue()

    def svg(self) -> str:
        """Return the sheet as an SVG document without a date, so that equal data gives equal bytes."""
        buffer = io.StringIO()
        self.figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        return _sans(buffer.getvalue())


def _sans(svg: str) -> str:
    """Name fallbacks in the SVG: DejaVu Sans is on few machines, and without fallbacks a serif face would come."""
    return svg.replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, 'Segoe UI', Helvetica, Arial, sans-serif")
