"""An SVG document of ours as part of a page: its colours become the page's variables, its text the page's font. Pure.

So one drawing serves light, dark and print, and a page with many figures has no two equal ids.
"""

from __future__ import annotations

import re

from bench.report.palette import LIGHT

_NAMES = {colour: name for name, colour in LIGHT.items()}
_COLOUR = re.compile(r"#[0-9a-f]{6}")
_FAMILY = re.compile(r"font-family: [^;\"]*;?")
_SHORTHAND = re.compile(r"font: (?:(bold|\d{3}) )?(\d+(?:\.\d+)?px) [^;\"]*")  # matplotlib before 3.11
_UNTURNED = re.compile(r' transform="rotate\(-0 [^)]*\)"')


def inline(svg: str, *, style: str, label: str) -> str:
    """Return the <svg> element for a page: `style` is its class, `label` its text alternative (escaped already)."""
    body = svg[svg.index("<svg") :].strip()
    head, body = body.split(">", 1)
    box = re.search(r'viewBox="([^"]*)"', head)
    assert box is not None, "matplotlib gives every SVG a viewBox"
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<style type=\"text/css\">.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL)  # matplotlib repeats outlined text there
    body = re.sub(r'<g id="[^"]*"', "<g", body)  # named groups: nothing refers to them, and pages hold many figures
    body = re.sub(r"style=\"[^\"]*\"", _themed, body)
    body = _UNTURNED.sub("", re.sub(r">\s+<", "><", body))
    width = box.group(1).split()[2]
    return (
        f'<svg class="{style}" viewBox="{box.group(1)}" style="max-width:{width}px" role="img" aria-label="{label}" '
        f'xmlns:xlink="http://www.w3.org/1999/xlink">{body}'
    )


def _themed(match: re.Match[str]) -> str:
    """Replace colours by variables and fonts by the page's own, inside one style attribute."""
    text = _COLOUR.sub(lambda m: f"var(--{_NAMES[m.group()]})" if m.group() in _NAMES else m.group(), match.group())
    text = _SHORTHAND.sub(lambda m: f"font-size: {m.group(2)}{'; font-weight: 700' if m.group(1) else ''}", text)
    return _FAMILY.sub("", text)
