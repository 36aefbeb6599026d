"""A recommendation as a report: the choice with its reasons, every candidate, and where the limits cut. Pure.

It is a Report like any other, so that page, Markdown and CSV come from the same code. Throughput, which the choice has
most of, stands against whatever else is known of the candidates: latency, peak memory, perplexity.
"""

from __future__ import annotations

from collections.abc import Sequence

from bench.recommendation import QUANTITIES, Candidate, Constraint, Recommendation
from bench.report import quantities, reasons, wording
from bench.report.assembly import SIMULATED
from bench.report.palette import colours
from bench.report.series import PANEL_LIMIT, SERIES_LIMIT
from bench.report.sources import combine
from bench.report.summaries import baselines, labels, ordered
from bench.report.values import Axis, Chart, Column, Finding, Guide, Panel, Point, Report, Series, Source, Table, Value
from bench.timing import Estimate

PREDICTED = "Predicted rows follow from shapes and a datasheet; no device ran them."
AXES = {
    "latency": Axis("Latency of a call", "s"), "memory": Axis("Peak memory", "bytes"),
    "perplexity": Axis("Perplexity", "number"),
}  # fmt: skip


def build(
    answer: Recommendation,
    constraints: Sequence[Constraint],
    candidates: Sequence[Candidate],
    sources: Sequence[Source],
) -> Report:
    """Return the report on an answer; `candidates`: all that were considered, `sources`: of their runs."""
    simulated = any(one.origin.startswith("simulated") for one in candidates)
    predicted = any(one.origin.startswith("predicted") for one in candidates)
    line = combine(sources, simulated=simulated)
    return Report(
        title=_title(answer),
        source=f"predicted from shapes · {line}" if predicted else line,
        verdict=_verdict(answer, constraints),
        findings=_findings(answer, constraints),
        notes=(*([SIMULATED] if simulated else []), *([PREDICTED] if predicted else [])),
        charts=tuple(chart for name in AXES if (chart := _chart(name, answer, constraints, candidates, line))),
        tables=(*_limits(answer, constraints, line), _candidates(answer, constraints, candidates, line)),
        sources=tuple(sources),
    )


# -- sentences ---------------------------------------------------------------------------------------------------------


def _title(answer: Recommendation) -> str:
    if answer.choice is None:
        return f"None of {answer.considered:,} candidates meets every limit"
    cell = answer.choice.cell
    return f"Take {quantities.inert(cell.subject)} in {cell.runtime} at batch {cell.batch:,}"


def _verdict(answer: Recommendation, constraints: Sequence[Constraint]) -> str:
    asked = wording.join([reasons.bound(one) for one in constraints]) or "no limit"
    if answer.choice is None:
        assert answer.closest is not None
        return f"Asked for {asked}. Closest is {reasons.describe(answer.closest)}."
    last = f" The runner-up is {reasons.behind(answer)}." if answer.runner_up else ""
    return f"Asked for {asked}. The fastest of those that meet it: {reasons.figures(answer.choice)}.{last}"


def _findings(answer: Recommendation, constraints: Sequence[Constraint]) -> tuple[Finding, ...]:
    found: list[Finding] = []
    one = answer.choice or answer.closest
    assert one is not None
    command, figure = wording.keep_command(one.cell.subject), "throughput-latency"
    if answer.choice is not None:
        cause = _sentences([one.origin, *reasons.unlimited(answer, constraints)])
        found.append(Finding("choice", f"Take {reasons.describe(one)}.", cause, command, figure))
        binds = [f"{text[:1].upper()}{text[1:]}." for text in reasons.limits(answer, constraints)]
        found += [Finding("limit", text, "", "", _figure(c)) for text, c in zip(binds, constraints, strict=True)]
    else:
        found.append(Finding("nothing", f"Closest: {reasons.describe(one)}.", one.origin, command, figure))
        found += [Finding("limit", f"{t[:1].upper()}{t[1:]}.") for t in reasons.misses(answer, constraints)]
        found += [Finding("limit", f"{text[:1].upper()}{text[1:]}.") for text in [reasons.without(answer)] if text]
    if answer.runner_up is not None:
        headline = f"Runner-up: {reasons.describe(answer.runner_up)}."
        other = wording.keep_command(answer.runner_up.cell.subject)
        found.append(Finding("runner-up", headline, _sentences([reasons.behind(answer)]), other, figure))
    found += [Finding("unknown", f"{text}.") for text in reasons.unknown(answer)]
    return tuple(found)


def _sentences(texts: Sequence[str]) -> str:
    return " ".join(f"{text[:1].upper()}{text[1:]}." for text in texts)


def _figure(constraint: Constraint) -> str:
    return f"throughput-{constraint.quantity}" if constraint.quantity in AXES else "throughput-latency"


# -- figures -----------------------------------------------------------------------------------------------------------


def _chart(
    name: str, answer: Recommendation, constraints: Sequence[Constraint], candidates: Sequence[Candidate], line: str
) -> Chart | None:
    """Throughput against one other quantity, a panel for each origin and lengths: only there candidates compare."""
    of = QUANTITIES[name].of
    known = [one for one in candidates if of(one) is not None]
    if len({of(one) for one in known}) < 2:
        return None
    families: dict[tuple[str, int, int], list[Candidate]] = {}
    for one in known:
        families.setdefault((one.origin, one.cell.prompt, one.cell.output), []).append(one)
    lengths = len({key[1:] for key in families}) > 1
    panels = [
        Panel(
            " · ".join(_words(key, several=lengths)),
            _series(name, members, answer),
            guides=(*_limit_lines(name, members, constraints), *_front(name, members)),
        )
        for key, members in families.items()
    ]
    subjects = len({one.cell.subject for one in known})
    lines = any(guide.label for panel in panels for guide in panel.guides)
    axis = AXES[name]
    said = (
        reasons.describe(answer.choice) if answer.choice else f"closest {reasons.describe(answer.closest or known[0])}"
    )
    return Chart(
        name=f"throughput-{name}", title=f"Throughput against {QUANTITIES[name].name}", form="points", x=axis,
        y=Axis("Throughput (tokens/s)", "tokens/s"), panels=tuple(panels[:PANEL_LIMIT]), source=line,
        reading="Up and to the left is better. The dashed steps join candidates that no other one beats in these two"
        f"{'; an upright or level line is a limit' if lines else ''}. Hollow marks were not measured.",
        alternative=f"Throughput against {QUANTITIES[name].name} of {len(known)} candidates. {said}.",
        simulated=any(not one.origin.startswith("measured") for one in known),
        left_out=_left_out(len(panels), subjects),
    )  # fmt: skip


def _words(key: tuple[str, int, int], *, several: bool) -> list[str]:
    origin, prompt, output = key
    return [origin, f"prompt {prompt:,}", f"output {output:,}"] if several else [origin]


def _left_out(panels: int, subjects: int) -> str:
    parts = [f"{panels - PANEL_LIMIT} of {panels} panels"] if panels > PANEL_LIMIT else []
    parts += [f"subjects beyond {SERIES_LIMIT} of {subjects}, the front's first"] if subjects > SERIES_LIMIT else []
    return f"Not drawn: {' and '.join(parts)}; the table has them all." if parts else ""


def _series(name: str, members: Sequence[Candidate], answer: Recommendation) -> tuple[Series, ...]:
    """One series a subject and runtime, the chosen candidate marked; those that matter first where there are many."""
    names = ordered(tuple(dict.fromkeys(one.cell.subject for one in members)), {})
    baseline = baselines(names, {})
    colour = colours([(s, s in baseline.values() or "/" not in s) for s in names])
    label = labels(names, baseline)
    marked = {"choice": answer.choice, "runner-up": answer.runner_up, "closest": answer.closest}
    first = [one.cell.subject for one in (*marked.values(), *answer.front) if one is not None]
    kept = set([subject for subject in dict.fromkeys([*first, *names]) if subject in names][:SERIES_LIMIT])
    groups: dict[tuple[str, str], list[Candidate]] = {}
    for one in members:
        if one.cell.subject in kept:
            groups.setdefault((one.cell.subject, one.cell.runtime), []).append(one)
    found: list[Series] = []
    for (subject, runtime), cells in sorted(groups.items(), key=lambda item: names.index(item[0][0])):
        cells = sorted(cells, key=lambda one: (one.cell.batch, one.cell.budget))
        marks = tuple((i, word) for word, one in marked.items() for i, cell in enumerate(cells) if cell is one)
        simulated = not cells[0].origin.startswith("measured")
        points = tuple(_point(name, one) for one in cells)
        found.append(Series(subject, label[subject], colour[subject], runtime, simulated, points, verdicts=marks))
    return tuple(found)


def _point(name: str, one: Candidate) -> Point:
    x = QUANTITIES[name].of(one)
    assert x is not None, "only known candidates are drawn"
    ends = _ends(one.latency_s) if name == "latency" else None
    return Point(x, one.throughput.value, one.cell.batch, ends, _ends(one.throughput))


def _ends(estimate: Estimate) -> tuple[float, float] | None:
    return None if estimate.low is None or estimate.high is None else (estimate.low, estimate.high)


def _front(name: str, members: Sequence[Candidate]) -> tuple[Guide, ...]:
    """The steps along which throughput grows only as the other quantity does."""
    of = QUANTITIES[name].of
    steps: list[tuple[float, float]] = []
    for one in sorted(members, key=lambda one: (of(one) or 0.0, -one.throughput.value)):
        x, y = of(one) or 0.0, one.throughput.value
        if not steps or y > steps[-1][1]:
            steps += [(x, steps[-1][1])] if steps else []
            steps.append((x, y))
    return (Guide("", tuple(steps)),) if len(steps) > 1 else ()


def _limit_lines(name: str, members: Sequence[Candidate], constraints: Sequence[Constraint]) -> tuple[Guide, ...]:
    xs = [QUANTITIES[name].of(one) or 0.0 for one in members]
    ys = [one.throughput.value for one in members]
    lines = {
        name: lambda limit: ((limit, min(ys)), (limit, max(ys))),
        "throughput": lambda limit: ((min(xs), limit), (max(xs), limit)),
    }
    return tuple(
        Guide(reasons.bound(one), lines[one.quantity](one.limit)) for one in constraints if one.quantity in lines
    )


# -- tables ------------------------------------------------------------------------------------------------------------


def _limits(answer: Recommendation, constraints: Sequence[Constraint], line: str) -> tuple[Table, ...]:
    """What was asked, and how the choice (or the closest) stands to it."""
    if not constraints:
        return ()
    one = answer.choice or answer.closest
    assert one is not None
    columns = (
        Column("quantity", "Quantity"), Column("limit", "Limit"), Column("value", "Here"),
        Column("limit_value", "Limit"), Column("value_value", "Here"), Column("margin", "To spare", "share"),
        Column("binds", "Binds"),
    )  # fmt: skip
    rows: list[tuple[Value, ...]] = []
    for constraint in constraints:
        known = QUANTITIES[constraint.quantity]
        value = known.of(one)
        binds = "yes" if constraint.quantity in answer.binding else "no"
        shown = None if value is None else quantities.text(value, known.unit)
        limit = quantities.text(constraint.limit, known.unit)
        rows.append((known.name, limit, shown, constraint.limit, value, constraint.margin(one), binds))
    caption = "A limit binds where, without it alone, something faster would be chosen, or anything at all."
    hidden = frozenset({"limit_value", "value_value"})
    return (Table("limits", "Limits", columns, tuple(rows), line, hidden=hidden, caption=caption),)


def _candidates(
    answer: Recommendation, constraints: Sequence[Constraint], candidates: Sequence[Candidate], line: str
) -> Table:
    """Every candidate, those that meet the limits first, throughput descending."""
    marked = {"choice": answer.choice, "runner-up": answer.runner_up, "closest": answer.closest}
    front = {id(one) for one in answer.front}
    columns = (
        Column("subject", "Subject"), Column("place", "Place"), Column("runtime", "Runtime"), Column("dtype", "Dtype"),
        Column("batch", "Batch", "integer"), Column("prompt", "Prompt", "integer"),
        Column("output", "Output", "integer"), Column("budget", "Budget"), Column("latency_s", "Latency", "s"),
        Column("latency_interval_s", "95 % interval", "s", interval=True),
        Column("throughput", "Tokens/s", "tokens/s"), Column("memory_bytes", "Peak memory", "bytes"),
        Column("perplexity", "Perplexity", "number"), Column("cost", "Cost of a million tokens", "number"),
        Column("meets", "Limits"), Column("front", "Not beaten"), Column("origin", "Origin"),
    )  # fmt: skip
    rows: list[tuple[Value, ...]] = []
    for one in sorted(candidates, key=lambda c: (not all(k.holds(c) for k in constraints), -c.throughput.value)):
        missed = [QUANTITIES[c.quantity].name for c in constraints if not c.holds(one)]
        place = next((word for word, other in marked.items() if other is one), None)
        cell = one.cell
        rows.append((
            quantities.inert(cell.subject), place, cell.runtime, cell.dtype, cell.batch, cell.prompt, cell.output,
            cell.budget, one.latency_s.value, _ends(one.latency_s), one.throughput.value, one.memory_bytes,
            one.perplexity, one.cost, f"misses {wording.join(missed)}" if missed else "met",
            "yes" if id(one) in front else "no", one.origin,
        ))  # fmt: skip
    values = {column.key: {row[place] for row in rows} for place, column in enumerate(columns)}
    same = [key for key in ("dtype", "prompt", "output", "budget", "origin") if len(values[key]) == 1]
    empty = {key for key, seen in values.items() if seen == {None}}
    unsaid = [] if constraints else ["meets"]
    hidden = frozenset([*same, *empty, *unsaid])
    constant = " · ".join(f"{key} {next(iter(values[key]))}" for key in same if key != "origin")
    caption = "Not beaten: no other candidate of these lengths is nowhere worse and somewhere better."
    return Table("candidates", "Candidates", columns, tuple(rows), line, constant, hidden, caption)
