"""What a sweep measures: names become subjects with a known shape, without loading anything.

Grammar: MODEL, or MODEL/PLAN. MODEL is a catalogue name, `reference`, a checkpoint folder or a hub id; PLAN is a
catalogue suffix (depth-26), a blind plan (depth:26, width:24x8256@4-30, flap:...: random weights), or METHOD:RATIO
(ppl:0.25: real weights are pruned before the sweep starts; on a catalogue name, a blind plan of that shape).
`depth:16..32` stands for a range of plans, both ends included. `~64` after either is the same with random weights and
every block's neurons rounded up to a multiple of 64, as --align does: the aligned twin of a shape. `+int8` or `+int4`
at the end of any of these is the same with the weights of its blocks quantised (see `shortllama.quantisation`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import msgspec

from shortllama import blind, catalogue, methods, selection, sources
from shortllama.errors import InputError
from shortllama.plans import read_plan, shape_after
from shortllama.shape import ModelShape

_TWIN = re.compile(r"(.+)~([1-9]\d*)")
BLIND_FORMS = ("depth", "width", "flap")


class Subject(msgspec.Struct, frozen=True):
    """One thing to measure. `folder` holds its weights (a hub id where they are on the hub), None for random weights.

    `prune`: (base, method, ratio) of a subject that must be written first, or None; its `shape` is what the ratio
    leaves and its `folder` is None until then. `dense`: the name of the subject it is compared with (itself if dense).
    """

    name: str
    shape: ModelShape
    dense: str
    folder: str | None = None
    prune: tuple[str, str, float] | None = None


def expand(names: Iterable[str]) -> tuple[str, ...]:
    """Return the names with every range written out, each once, in order."""
    return tuple(dict.fromkeys(one for name in names for one in blind.expand(name)))


def resolve(name: str) -> Subject:
    """Return the subject that `name` means (see the module). Raises InputError with the nearest names."""
    base, held = sources.split(name)
    if held:
        plain = resolve(base)
        return msgspec.structs.replace(plain, name=name, shape=msgspec.structs.replace(plain.shape, quantised=held))
    twin = _TWIN.fullmatch(name)
    if twin and not Path(name).exists():
        return _aligned(resolve(twin[1]), int(twin[2]), name)
    if catalogue.knows(name):
        return Subject(name, catalogue.lookup(name), name.partition("/")[0])
    model, slash, plan = name.rpartition("/")
    if slash and ":" in plan and not Path(name).expanduser().exists():
        return _planned(name, model, plan)
    source = sources.locate(name)
    return Subject(name, source.shape, _dense(name, source), _place(source))


def _aligned(subject: Subject, multiple: int, name: str) -> Subject:
    """The subject with widths that kernels like, which random weights can have and real ones only by --align."""
    if subject.folder is not None or subject.prune is not None:
        raise InputError(f"{name}: {subject.name} has weights of its own; align them with shortllama prune --align")
    most = max(block.neurons for block in resolve(subject.dense).shape.blocks)
    blocks = tuple(
        msgspec.structs.replace(block, neurons=selection.align_up(block.neurons, most, multiple))
        for block in subject.shape.blocks
    )
    return Subject(name, msgspec.structs.replace(subject.shape, blocks=blocks), subject.dense)


def _planned(name: str, model: str, text: str) -> Subject:
    """MODEL/PLAN on a model with real weights."""
    source = sources.locate(model)
    plan = blind.parse(text, model=model, shape=source.shape)
    shape = shape_after(source.shape, plan.keep)
    form, _, value = text.partition(":")
    place = _place(source)
    if form in BLIND_FORMS or place is None:
        return Subject(name, shape, model)
    return Subject(name, shape, model, prune=(place, methods.lookup(form).name, float(value)))


def _place(source: sources.Source) -> str | None:
    if source.on_hub:
        return source.name
    return None if source.folder is None else str(source.folder)


def _dense(name: str, source: sources.Source) -> str:
    """The base of a checkpoint that carries its plan; any other is its own."""
    if source.folder is None or not (source.folder / "plan.json").is_file():
        return name
    return read_plan(source.folder / "plan.json").base.model


def resolve_all(names: Iterable[str]) -> dict[str, Subject]:
    """Return the subjects by name, ranges written out. Raises InputError for the first that is not understood."""
    found: dict[str, Subject] = {}
    for name in expand(names):
        try:
            found[name] = resolve(name)
        except InputError as error:
            raise type(error)(f"subject {name!r}: {error}") from error
    return found
