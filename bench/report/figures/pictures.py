"""Every picture that a report needs of one chart."""

from __future__ import annotations

import msgspec

from bench.report.figures import canvas, draw
from bench.report.values import Chart


class Picture(msgspec.Struct, frozen=True):
    """`png` and `svg` stand alone, with heading and source; `wide` and `narrow` are for a page, which says these."""

    png: bytes
    svg: str
    wide: str
    narrow: str


def render(chart: Chart) -> Picture:
    """Draw one chart in every size; equal charts give equal bytes."""
    with canvas.drawing(chart.name):
        alone = draw.draw(chart, draw.FILE)
        png, svg = alone.png(), alone.svg()
        wide = draw.draw(chart, draw.WIDE).svg()
    with canvas.drawing(f"{chart.name} narrow"):  # another salt: both drawings live in one page
        return Picture(png, svg, wide, draw.draw(chart, draw.NARROW).svg())
