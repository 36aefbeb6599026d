"""Published removal orders (Shortened LLaMA, arXiv 2402.02834) as plans: what its authors removed, without any data.

`paper-llama-7b-taylor-20` is the paper's model with the label "20 %": the first 6 blocks of the order published for
that model and criterion. `paper-llama-7b-taylor` is the order itself, to be cut at a target of the user's. Taylor and
Mag orders are cut as the paper's "+" variants, which keep the first four and last two blocks, unless told otherwise.
presets.json holds, for each model: its catalogue shape, blocks removed by label, and the orders, which were published
unprotected and up to the length given there. It must not know of models or scores.
"""

from __future__ import annotations

import difflib
from functools import lru_cache
from pathlib import Path

import msgspec

from shortllama import catalogue, depth, files, methods, removals, request
from shortllama.errors import InputError, PlanError
from shortllama.plans import Plan, Target, make_plan
from shortllama.removals import Goal, Piece
from shortllama.request import Request
from shortllama.shape import ModelShape

_FILE = Path(__file__).parent / "presets.json"
_PREFIX = "paper-"


class _Published(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    shape: str
    labels: dict[str, int]
    orders: dict[str, tuple[int, ...]]


class Preset(msgspec.Struct, frozen=True):
    """One published order: its name, the catalogue name of its model's shape, the method whose protection it is cut
    with, the blocks in order of removal, and how many of them a label removes (None: the order alone)."""

    name: str
    shape: str
    method: str
    order: tuple[int, ...]
    count: int | None = None


@lru_cache(maxsize=1)
def presets() -> dict[str, Preset]:
    """Return every preset by name; labels for which too little of the order was published are not among them."""
    found: dict[str, Preset] = {}
    for model, row in files.decode_json(files.read_bytes(_FILE), dict[str, _Published], str(_FILE)).items():
        for criterion, order in row.orders.items():
            method = methods.METHODS.get(f"{criterion}+") or methods.lookup(criterion)
            whole = Preset(f"{_PREFIX}{model}-{criterion}", row.shape, method.name, order)
            free = _free(whole, len(catalogue.lookup(row.shape).blocks), method.protect)
            found[whole.name] = whole
            for label, count in row.labels.items():
                if count <= len(free):
                    labelled = f"{whole.name}-{label}"
                    found[labelled] = msgspec.structs.replace(whole, name=labelled, count=count)
    return found


def lookup(name: str) -> Preset:
    """Return the preset of that name. Raises InputError with the nearest names."""
    found = presets().get(name)
    if found is None:
        near = difflib.get_close_matches(name, presets(), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(presets())}"
        raise InputError(f"preset {name!r} is unknown; {hint}")
    return found


def plan(
    name: str,
    *,
    model: str,
    shape: ModelShape,
    target: Target | None = None,
    protect: tuple[int, int] | None = None,
    at_most: bool = False,
) -> Plan:
    """Return the plan, not a blind one, of a preset for a model of the shape that it was published for.

    A name with a label has its own target; one without takes a `target` of `planning.make_plan_for`. `protect`
    overrides that of the paper's variant. Vocabularies may differ: fine-tuned models add tokens.
    Raises InputError for an unknown name, a missing or second target, and more blocks than were published; PlanError
    for a model of another shape.
    """
    preset = lookup(name)
    _check_shape(preset, shape)
    if (preset.count is None) == (target is None):
        raise InputError(
            f"preset {name} is an order without a count; add --blocks N, --ratio R or --target-params P"
            if target is None
            else f"preset {name} says how many blocks go; leave out --{target.kind}, or use {_order_name(preset)}"
        )
    row = methods.lookup(preset.method)
    chosen = row.protect if protect is None else protect
    wanted = Goal(preset.count or 0, "floor", "count")
    if target is not None:
        request.check(Request(row, shape, target, None, chosen, 1, at_most))
        wanted = depth.goal_for(row.name, shape=shape, target=target, at_most=at_most)
    order = [Piece(index) for index in _free(preset, len(shape.blocks), chosen)]
    # Blocks are alike in these models, so what was not published counts as what was.
    count = wanted.count([wanted.size(shape, Piece(index)) for index in range(len(shape.blocks))])
    if not 0 < count <= len(order):
        raise InputError(
            f"preset {name}: {count} blocks would go; {len(order)} unprotected ones were published, "
            "ask for at least 1 and no more than these"
        )
    return make_plan(
        model=model,
        shape=shape,
        method=_order_name(preset),
        target=target or Target("preset", name),
        keep=removals.keep_after(shape, order[:count]),
    )


def _free(preset: Preset, blocks: int, protect: tuple[int, int]) -> tuple[int, ...]:
    first, last = protect
    return tuple(index for index in preset.order if first <= index < blocks - last)


def _order_name(preset: Preset) -> str:
    return preset.name if preset.count is None else preset.name.rpartition("-")[0]


def _check_shape(preset: Preset, shape: ModelShape) -> None:
    expected = catalogue.lookup(preset.shape)
    same = (shape.blocks, shape.hidden, shape.head_dim) == (expected.blocks, expected.hidden, expected.head_dim)
    if not same:
        raise PlanError(
            f"preset {preset.name} is for the blocks of {preset.shape} ({len(expected.blocks)} of hidden size "
            f"{expected.hidden}), this model has {len(shape.blocks)} of hidden size {shape.hidden}; score it instead"
        )
