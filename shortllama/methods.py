"""Pruning methods as rows of data: a criterion, the unit it removes, what it protects, how a ratio becomes a count.

A method holds no code of its own: `taylor+` is `taylor` with the first four and last two blocks protected.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Literal

import msgspec

from shortllama.errors import InputError
from shortllama.selection import half_up, truncated


class Method(msgspec.Struct, frozen=True):
    """One method. `protect`: blocks left whole at the start and the end, unless the user says otherwise.

    `removes(count, ratio)`: how many of `count` units go at a ratio. The units are the blocks of the model (unit
    "block"), or the KV groups and the neurons of each unprotected block (unit "width"), unless a structure of
    `variants` counts them otherwise. `choice`: the lowest scores
    wherever they are, or the one contiguous run that scores lowest. `modules`: can score attention and FFNs apart.
    `iterative`: scores change as parts go, so that scoring again after each removal makes a difference.
    `compensation`: the biases that stand in for what its plans remove.
    """

    name: str
    criterion: str
    unit: Literal["block", "width"]
    removes: Callable[[int, float], int]
    protect: tuple[int, int] = (0, 0)
    choice: Literal["ranked", "run"] = "ranked"
    modules: bool = False
    iterative: bool = False
    compensation: str | None = None


# Shortened LLaMA section 3.1 keeps the first four and the last two blocks in its "+" variants.
_PLUS = (4, 2)

METHODS: dict[str, Method] = {
    row.name: row
    for row in (
        Method("mag", "mag", "block", half_up, modules=True),
        Method("mag+", "mag", "block", half_up, _PLUS, modules=True),
        Method("taylor", "taylor", "block", half_up, modules=True, iterative=True),
        Method("taylor+", "taylor", "block", half_up, _PLUS, modules=True, iterative=True),
        Method("taylor-sample", "taylor-sample", "block", half_up, modules=True, iterative=True),
        Method("taylor-vector", "taylor-vector", "block", half_up, modules=True, iterative=True),
        Method("ppl", "ppl", "block", half_up, modules=True, iterative=True),
        Method("kl", "kl", "block", half_up, modules=True, iterative=True),
        Method("bi", "bi", "block", half_up, iterative=True),
        Method("angular", "angular", "block", half_up, choice="run"),
        Method("relative-magnitude", "relative-magnitude", "block", half_up, iterative=True),
        Method("norm", "norm", "block", half_up, iterative=True),
        Method("random", "random", "block", half_up),
        Method("last", "last", "block", half_up),
        Method("wanda-sp", "wanda-sp", "width", truncated),
        Method("mag-sp", "mag-sp", "width", truncated),
        # The published block range of 7B, 4-29 of 32 (and 4-37 of 40), is that of the "+" variants.
        Method("llm-pruner", "llm-pruner", "width", truncated, _PLUS),
        Method("flap", "flap", "width", truncated, compensation="flap"),
        Method("flap-exact", "flap-exact", "width", truncated, compensation="flap"),
    )
}

ALIASES = {"sequential": "last"}


def lookup(name: str) -> Method:
    """Return the method of that name. Raises InputError with the nearest names."""
    row = METHODS.get(ALIASES.get(name, name))
    if row is None:
        near = difflib.get_close_matches(name, [*METHODS, *ALIASES], n=2)
        hint = f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(METHODS)}"
        raise InputError(f"method {name!r} is unknown; {hint}")
    return row
