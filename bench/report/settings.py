"""What a set of cells has in common and what tells them apart, in words. Pure.

Titles of panels say only what differs between neighbours; what is equal everywhere is said once.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from bench.report.summaries import Setting
from bench.report.values import Source

_WORDS = {
    "runtime": "{}", "dtype": "{}", "attention": "{} attention", "prompt": "prompt {}", "output": "output {}",
    "budget": "budget {}", "timing": "{} timing",
}  # fmt: skip

UNSAID = ("careful", "", 0)  # the rule, and what a family of settings leaves open


def split(settings: Collection[Setting], sources: Mapping[str, Source]) -> tuple[dict[Setting, str], str]:
    """Return a title for each setting from what differs between them, and the rest as one text.

    The runtime is always in the titles. The careful protocol is the rule and stays unsaid unless it differs.
    """
    differing = [name for name in _WORDS if len({getattr(setting, name) for setting in settings}) > 1]
    if "runtime" not in differing:
        differing.insert(0, "runtime")
    several = len({setting.environment for setting in settings}) > 1
    places = {_device(source) for s in settings if (source := sources.get(s.environment))}
    titles: dict[Setting, str] = {}
    for setting in settings:
        words = [word(setting, name) for name in differing if getattr(setting, name) != ""]
        if setting.simulated:
            words.insert(1, "simulated")
        if several:
            source = sources.get(setting.environment)
            words.append(_where(source, places) if source else setting.environment)
        titles[setting] = " · ".join(words)
    first = next(iter(settings), None)
    same = [name for name in _WORDS if name not in differing]
    constant = [word(first, name) for name in same if getattr(first, name) not in UNSAID] if first else []
    return titles, " · ".join(text for text in constant if text)


def _device(source: Source) -> tuple[str, str]:
    """Device and date, the latter where it is not what a side is named by."""
    return source.device.partition(" · ")[0], "" if source.side == source.date else source.date


def _where(source: Source, places: Collection[tuple[str, str]]) -> str:
    """Say what tells environments apart: device and date, and of two runs on one of them the side, alone if it can."""
    words = [", ".join(part for part in _device(source) if part)] if len(places) > 1 or not source.side else []
    return " · ".join([*words, *([source.side] if source.side else [])])


def word(setting: Setting, name: str) -> str:
    """Return one property of a setting in words."""
    value = getattr(setting, name)
    return "no memory budget" if name == "budget" and value == "none" else _WORDS[name].format(value)
