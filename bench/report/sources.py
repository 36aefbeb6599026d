"""Environments of result files into the line under every figure, and the block at the end of the report. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from bench.measurement import Environment
from bench.report.quantities import inert
from bench.report.values import Source

LIBRARIES = ("torch", "transformers", "cuda", "driver", "python")


class Origin(msgspec.Struct, frozen=True):
    """What a run folder says beside its rows: its name, its suite, and the command that makes it again."""

    run: str
    suite: str = ""
    command: str = ""


def describe(environment: Environment, origin: Origin) -> Source:
    """Return the Source of one environment; what it does not say is left out, never guessed."""
    facts = tuple(_leaves(environment.fingerprint))
    known = {**dict(_leaves(environment.facts)), **dict(facts)}
    threads = known.get("threads", "")
    parts = (
        re.sub(r"\((?:R|TM|C)\)", "", known.get("device", "unknown device")),
        "simulated" if environment.fingerprint.get("simulated") else "",
        f"{threads} thread{'' if threads == '1' else 's'}" if threads else "",
    )
    return Source(
        environment=environment.id,
        device=" · ".join(part for part in parts if part),
        versions=" · ".join(f"{name} {known[name]}" for name in LIBRARIES if known.get(name)),
        date=known.get("date", "")[:10],
        run=inert(origin.run),
        suite=inert(origin.suite),
        command=origin.command,
        commit=known.get("commit", ""),
        facts=facts,
    )


def _leaves(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted key, text) for every leaf of nested mappings that says something."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{above}{key}.")
        elif isinstance(value, list | tuple):
            yield f"{above}{key}", inert(", ".join(map(str, value)))
        elif value not in (None, ""):
            yield f"{above}{key}", inert(str(value))


def combine(sources: Sequence[Source], *, simulated: bool = False) -> str:
    """Return one line for what draws from these sources; where rows are simulated, the line says so."""
    lines = list(dict.fromkeys(source.line for source in sources))
    if len(lines) > 2:
        lines = [*lines[:2], f"and {len(lines) - 2} more environments, see Provenance"]
    text = "; ".join(lines)
    return f"simulated · {text}" if simulated and "simulated" not in text else text
