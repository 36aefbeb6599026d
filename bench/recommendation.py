"""Which subject to take: the cells that meet the constraints, the Pareto front of all, one choice and why. Pure.

A candidate is one measured (or predicted) cell. The choice is the candidate of highest throughput among those that meet
every constraint; a candidate of which a constrained quantity is not known does not meet it. What binds is found by
leaving each constraint out: those without which the choice would be faster.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec

from bench.cells import Cell
from bench.timing import Estimate

MILLION = 1e6
HOUR_S = 3600.0


class Candidate(msgspec.Struct, frozen=True):
    """One cell to choose. Seconds a call, new tokens a second, peak bytes, perplexity (None: not evaluated) and money a
    million new tokens (None without a price). `origin`: measured, simulated or predicted, and where."""

    cell: Cell
    origin: str
    latency_s: Estimate
    throughput: Estimate
    memory_bytes: int | None
    perplexity: float | None
    cost: float | None = None


class Quantity(msgspec.Struct, frozen=True):
    """What is compared: its name in words, unit (a key of the report's formats), whether more is better, its value."""

    name: str
    unit: str
    more_is_better: bool
    of: Callable[[Candidate], float | None]


QUANTITIES: Mapping[str, Quantity] = {
    "latency": Quantity("latency", "s", False, lambda one: one.latency_s.value),
    "throughput": Quantity("throughput", "tokens/s", True, lambda one: one.throughput.value),
    "memory": Quantity("peak memory", "bytes", False, lambda one: one.memory_bytes),
    "perplexity": Quantity("perplexity", "number", False, lambda one: one.perplexity),
    "cost": Quantity("cost a million tokens", "number", False, lambda one: one.cost),
}


class Constraint(msgspec.Struct, frozen=True):
    """A limit on a quantity (a key of QUANTITIES): at most it, or at least where more is better."""

    quantity: str
    limit: float

    def margin(self, one: Candidate) -> float | None:
        """Return the room left as a share of the limit, negative where it is exceeded; None where nothing is known."""
        known = QUANTITIES[self.quantity]
        value = known.of(one)
        if value is None:
            return None
        room = value - self.limit if known.more_is_better else self.limit - value
        return room / self.limit

    def holds(self, one: Candidate) -> bool:
        """Return whether a candidate is known to meet it."""
        margin = self.margin(one)
        return margin is not None and margin >= 0


class Recommendation(msgspec.Struct, frozen=True):
    """The choice (None where nothing fits), the best of another subject, the front, and why.

    `binding`: quantities whose limits keep a faster candidate out; `closest`: where nothing fits, the candidate that
    misses by least, with what it misses (share of the limit, None where the quantity is not known); `unknown`: how many
    candidates lack a constrained quantity; `lead`: throughput over the runner-up's; `clear`: whether their intervals
    are apart (None where one has none).
    """

    choice: Candidate | None
    runner_up: Candidate | None
    front: tuple[Candidate, ...]
    considered: int
    margins: dict[str, float]
    binding: tuple[str, ...]
    closest: Candidate | None
    misses: dict[str, float | None]
    unknown: dict[str, int]
    lead: float | None
    clear: bool | None


def recommend(candidates: Sequence[Candidate], constraints: Sequence[Constraint]) -> Recommendation:
    """Return the choice among `candidates` (at least one) under `constraints`; of equally fast ones the one of
    lower perplexity, then of less memory."""
    fitting = _meeting(candidates, constraints)
    choice = _fastest(fitting)
    others = [one for one in fitting if choice and one.cell.subject != choice.cell.subject]
    runner_up = _fastest(others)
    closest = None if choice else _closest(candidates, constraints)
    return Recommendation(
        choice=choice,
        runner_up=runner_up,
        front=front(candidates),
        considered=len(candidates),
        margins={one.quantity: margin for one in constraints if choice and (margin := one.margin(choice)) is not None},
        binding=_binding(candidates, constraints, choice),
        closest=closest,
        misses={one.quantity: one.margin(closest) for one in constraints if closest and not one.holds(closest)},
        unknown={c.quantity: n for c in constraints if (n := sum(c.margin(one) is None for one in candidates))},
        lead=choice.throughput.value / runner_up.throughput.value if choice and runner_up else None,
        clear=_apart(choice.throughput, runner_up.throughput) if choice and runner_up else None,
    )


def front(candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """Return the candidates that no other one of the same lengths beats: latency, throughput, memory and perplexity.

    One beats another that is nowhere better and somewhere worse. A quantity that one of the two lacks does not count.
    Throughput descends.
    """
    kept: list[Candidate] = []
    for one in sorted(candidates, key=lambda one: -one.throughput.value):
        if not any(_beats(other, one) for other in kept if _comparable(other, one)):
            kept = [other for other in kept if not (_comparable(one, other) and _beats(one, other))] + [one]
    return tuple(kept)


def _comparable(a: Candidate, b: Candidate) -> bool:
    return (a.cell.prompt, a.cell.output, a.origin) == (b.cell.prompt, b.cell.output, b.origin)


def _beats(a: Candidate, b: Candidate) -> bool:
    better = 0
    for known in QUANTITIES.values():
        mine, yours = known.of(a), known.of(b)
        if mine is None or yours is None or mine == yours:
            continue
        if (mine > yours) != known.more_is_better:
            return False
        better += 1
    return better > 0


def _meeting(candidates: Iterable[Candidate], constraints: Sequence[Constraint]) -> list[Candidate]:
    return [one for one in candidates if all(constraint.holds(one) for constraint in constraints)]


def _fastest(candidates: Iterable[Candidate]) -> Candidate | None:
    def place(one: Candidate) -> tuple[float, float, float]:
        unknown = math.inf
        return one.throughput.value, -(one.perplexity or unknown), -(one.memory_bytes or unknown)

    return max(candidates, key=place, default=None)


def _binding(
    candidates: Sequence[Candidate], constraints: Sequence[Constraint], choice: Candidate | None
) -> tuple[str, ...]:
    """The limits without which something faster (or anything at all) would be chosen."""
    found: list[str] = []
    for left_out in constraints:
        best = _fastest(_meeting(candidates, [one for one in constraints if one != left_out]))
        if best and (choice is None or best.throughput.value > choice.throughput.value):
            found.append(left_out.quantity)
    return tuple(found)


def _closest(candidates: Sequence[Candidate], constraints: Sequence[Constraint]) -> Candidate | None:
    """The candidate whose worst miss is smallest; one of which something is not known comes after all others."""

    def worst(one: Candidate) -> tuple[bool, float]:
        margins = [constraint.margin(one) for constraint in constraints]
        return any(margin is None for margin in margins), -min((m for m in margins if m is not None), default=0.0)

    return min(candidates, key=worst, default=None)


def _apart(a: Estimate, b: Estimate) -> bool | None:
    if a.low is None or a.high is None or b.low is None or b.high is None:
        return None
    return a.low > b.high or b.low > a.high


def cost(throughput: float, price_per_hour: float) -> float:
    """Return the price of a million new tokens at `throughput` tokens a second."""
    return price_per_hour / HOUR_S / throughput * MILLION
