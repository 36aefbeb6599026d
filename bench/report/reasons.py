"""A recommendation in sentences: what to take and why, what comes next, which limit binds, or what comes nearest."""

from __future__ import annotations

from collections.abc import Sequence

from bench.recommendation import QUANTITIES, Candidate, Constraint, Recommendation
from bench.report import quantities

_SHOWN = 8
_SURE = {
    None: "",
    True: ", their intervals apart",
    False: ", their intervals overlap: measure more to be sure",
}


def lines(answer: Recommendation, constraints: Sequence[Constraint]) -> list[str]:
    """Return the answer for a terminal: the choice and its reasons, the runner-up, what binds, the front."""
    if answer.choice is not None:
        said = [f"take {describe(answer.choice)}", f"  {answer.choice.origin}"]
        said += [f"  {text}" for text in (*limits(answer, constraints), *unlimited(answer, constraints))]
        if answer.runner_up is not None:
            said += [f"runner-up {describe(answer.runner_up)}", f"  {behind(answer)}"]
    else:
        assert answer.closest is not None
        said = [f"none of {answer.considered} candidates meets every limit", f"closest {describe(answer.closest)}"]
        said += [f"  {text}" for text in misses(answer, constraints)]
        said += [text for text in [without(answer)] if text]
    said += unknown(answer)
    said += ["", f"not beaten by any other ({len(answer.front)} of {answer.considered} candidates):"]
    said += [f"  {describe(one)}" for one in answer.front[:_SHOWN]]
    if len(answer.front) > _SHOWN:
        said.append(f"  and {len(answer.front) - _SHOWN} more; see --json")
    return said


def describe(one: Candidate) -> str:
    """Return a candidate in one line."""
    return f"{one.cell.label}: {figures(one)}"


def figures(one: Candidate) -> str:
    """Return what is known of a candidate."""
    found = [
        f"{quantities.text(value, known.unit)}{' tokens/s' if known.unit == 'tokens/s' else ''}"
        if name in ("latency", "throughput", "memory")
        else f"{known.name} {quantities.text(value, known.unit)}"
        for name, known in QUANTITIES.items()
        if (value := known.of(one)) is not None
    ]
    return ", ".join(found)


def bound(one: Constraint) -> str:
    """Return a limit in words: "latency at most 2.00 s"."""
    known = QUANTITIES[one.quantity]
    side = "at least" if known.more_is_better else "at most"
    return f"{known.name} {side} {quantities.text(one.limit, known.unit)}"


def limits(answer: Recommendation, constraints: Sequence[Constraint]) -> list[str]:
    """Return each limit with the choice's room under it, and whether it binds."""
    return [
        f"{bound(one)}: {answer.margins[one.quantity]:.0%} to spare"
        f"{', and this limit binds' if one.quantity in answer.binding else ''}"
        for one in constraints
    ]


def unlimited(answer: Recommendation, constraints: Sequence[Constraint]) -> list[str]:
    """Return what had no say in the choice."""
    if not constraints:
        return ["no limit was given: the fastest of all, whatever its memory and quality"]
    known = answer.choice is not None and answer.choice.perplexity is not None
    if known and all(one.quantity != "perplexity" for one in constraints):
        return ["no limit on perplexity was given, so quality had no say (--max-ppl)"]
    return []


def behind(answer: Recommendation) -> str:
    """Return how far the runner-up is behind."""
    return f"{quantities.ratio(answer.lead or 1.0)} slower{_SURE[answer.clear]}"


def misses(answer: Recommendation, constraints: Sequence[Constraint]) -> list[str]:
    """Return what the closest candidate misses, each with its limit."""
    assert answer.closest is not None
    said: list[str] = []
    for one in constraints:
        if one.quantity in answer.misses:
            known = QUANTITIES[one.quantity]
            value = known.of(answer.closest)
            seen = f"not known{_how(one.quantity)}" if value is None else quantities.text(value, known.unit)
            said.append(f"{known.name} {seen}, the limit is {quantities.text(one.limit, known.unit)}")
    return said


def without(answer: Recommendation) -> str:
    """Say without which limit something would fit; "" where no single one stands in the way."""
    names = " or ".join(QUANTITIES[name].name for name in answer.binding)
    return f"something would fit without the limit on {names}" if names else ""


def unknown(answer: Recommendation) -> list[str]:
    """Return of how many candidates a limited quantity is not known."""
    return [
        f"{count} of {answer.considered} candidates have no {QUANTITIES[name].name}{_how(name)}"
        for name, count in answer.unknown.items()
    ]


def _how(name: str) -> str:
    return "; evaluate subjects by a suite with `perplexity`" if name == "perplexity" else ""
