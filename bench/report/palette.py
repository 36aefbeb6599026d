"""Colours and markers: a subject looks the same in every figure of a report, in light, dark and print.

Kinds have families of hues: dense is ink, depth-pruned is cool, width-pruned is warm, so that the paper's question can
be answered at a glance. Every colour has a contrast of 3:1 or more on its background. Dense and the first three of each
family were searched for the largest least difference in CIELAB over normal and simulated colour-blind vision; a test
repeats the simulation. Text is never in a series colour.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from shortllama import methods

FAMILIES = {
    "dense": ("dense",),
    "depth": ("cool-1", "cool-2", "cool-3", "cool-4"),
    "width": ("warm-1", "warm-2", "warm-3", "warm-4"),
}
REST = (
    "other-1", "other-2", "cool-1", "warm-1", "cool-3", "warm-3", "cool-2", "warm-2", "other-3", "warm-4", "cool-4",
)  # fmt: skip

# Every value occurs once in LIGHT: an inline figure is drawn in these and its colours replaced by names.
LIGHT = {
    "dense": "#1f2328", "cool-1": "#0143c9", "cool-2": "#16a088", "cool-3": "#8364ba", "cool-4": "#5f93b8",
    "warm-1": "#b92402", "warm-2": "#8f1f76", "warm-3": "#b48f01", "warm-4": "#d9705c",
    "other-1": "#4d7c0f", "other-2": "#7a5c99", "other-3": "#6b7280",
    "ink": "#1c1f24", "muted": "#59616d", "rule": "#dfe3e8", "guide": "#c3c9d1", "paper": "#ffffff",
}  # fmt: skip
DARK = {
    "dense": "#f3f4f6", "cool-1": "#779ef2", "cool-2": "#30d5a1", "cool-3": "#945ff9", "cool-4": "#93c5e8",
    "warm-1": "#dd5f2a", "warm-2": "#d161a4", "warm-3": "#fdc75c", "warm-4": "#d98a7b",
    "other-1": "#a3d65c", "other-2": "#c9b1e0", "other-3": "#a7b0bd",
    "ink": "#e9ecf1", "muted": "#a2abb8", "rule": "#2c323b", "guide": "#4a525e", "paper": "#14171c",
}  # fmt: skip

MARKERS = {
    "": "o",
    "pruned": "o",
    "retrained": "D",  # where nothing ran: states of a study
    "eager": "o",
    "static": "s",
    "paper": "D",
    "compile": "^",
    "cudagraph": "v",
    "roofline": "P",
}
# Hollow, around a point: what the gate says of it, and what a recommendation takes.
VERDICTS = {
    "regressed": "^", "improved": "v", "inconclusive": "D", "equivalent": "o", "choice": "s", "runner-up": "h",
    "closest": "s",
}  # fmt: skip
_DEPTH_PLAN = re.compile(r"depth\b|depth[-:]")


def kind(subject: str, dense: bool) -> str:
    """Return the family of a subject: "dense", "depth", "width" or "other" (a folder whose method is not known)."""
    if dense:
        return "dense"
    plan = subject.rsplit("/", 1)[-1].lower()
    if _DEPTH_PLAN.match(plan):
        return "depth"
    name = re.split(r":|-\d", plan, maxsplit=1)[0]
    row = methods.METHODS.get(name)
    if row is not None:
        return "depth" if row.unit == "block" else "width"
    return "width" if name in ("flap", "width", "llm-pruner") else "other"


def colours(subjects: Sequence[tuple[str, bool]]) -> dict[str, str]:
    """Return a colour name for each (subject, is dense). A family that runs out starts again.

    Subjects of no known kind, and dense models after the first, take what the others leave.
    """
    chosen: dict[str, str] = {}
    count = {"dense": 0, "depth": 0, "width": 0}
    rest: list[str] = []
    for subject, dense in subjects:
        family = kind(subject, dense)
        if family == "other" or (family == "dense" and count["dense"]):
            rest.append(subject)
            continue
        chosen[subject] = FAMILIES[family][count[family] % len(FAMILIES[family])]
        count[family] += 1
    left = [name for name in REST if name not in chosen.values()] or list(REST)
    chosen.update((subject, left[index % len(left)]) for index, subject in enumerate(rest))
    return chosen


def marker(runtime: str) -> str:
    """Return the matplotlib marker of a runtime."""
    return MARKERS.get(runtime, "X")
