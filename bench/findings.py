"""What the results say, in sentences: each with its number, its cause and the command to run next. Pure.

A finding is what a reader would work out with the tables and a quarter of an hour. Every function takes the Grid and
returns findings, none where the results do not carry one; RULES lists them in the order of the report.
"""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import msgspec

from bench import limit_findings as physical
from bench.report import choices, quantities, wording
from bench.report.palette import kind
from bench.report.summaries import Grid, Group, Setting, Summary, quotient
from bench.report.values import Finding
from bench.report.wording import Commands
from bench.timing import Estimate

NOISY = 0.05  # half an interval's width, as a share of the median, above which a cell counts as noisy
_PER_RULE = 4

# What one runtime does that another does not; read as "fast is faster than slow because".
_RUNTIME_CAUSES = {
    ("static", "eager"): "eager's growing cache copies all keys and values at every token; the static cache does not.",
    ("eager", "static"): "The static cache reads all its slots at every token; eager's cache holds only those in use.",
    ("eager", "paper"): "The paper's protocol samples and synchronises at every token; the plain loop does neither.",
    ("static", "paper"): "The paper's protocol samples and synchronises at every token; the plain loop does neither.",
}


def findings(grid: Grid, commands: Commands) -> tuple[Finding, ...]:
    """Return what the results say, the most decisive first."""
    return tuple(finding for rule in RULES for finding in rule(grid, commands)[:_PER_RULE])


def verdict(grid: Grid, found: Sequence[Finding]) -> str:
    """Return one paragraph: the briefs of the findings that decide something, then what was measured."""
    briefs = [finding.brief for finding in found if finding.brief]
    outcomes = Counter(row.row.outcome for row in grid.rows)
    oom = outcomes["oom"] + outcomes["oom-implied"]
    other = len(grid.rows) - outcomes["ok"] - oom
    parts = [f"{outcomes['ok']:,} of {wording.plural(len(grid.rows), 'cell')} measured"]
    parts += [f"{oom:,} out of memory"] if oom else []
    parts += [f"{other:,} failed, skipped or unstable"] if other else []
    return " ".join([*briefs, f"{', '.join(parts)}." if grid.rows else "Only the ends of memory were searched."])


# -- the rules ---------------------------------------------------------------------------------------------------------


def nothing_fits(grid: Grid, commands: Commands) -> list[Finding]:
    """Every cell ran out of memory."""
    if not grid.rows or any(row.counts for row in grid.rows):
        return []
    least = min(grid.rows, key=lambda row: row.row.memory.analytic or math.inf)
    if not any(row.row.outcome.startswith("oom") for row in grid.rows):
        return []
    need = least.row.memory.analytic
    cause = _need(grid, least)
    command = wording.more_memory(commands, need) if need else commands.sweep("--dry-run")
    headline = "Nothing fits: memory ended before any cell could be measured."
    return [Finding("nothing", headline, cause, command, brief=headline)]


def fastest(grid: Grid, commands: Commands) -> list[Finding]:
    """The fastest subject of each runtime over its dense model, at the smallest batch that tells."""
    found: list[Finding] = []
    best_of: list[tuple[Setting, Summary]] = []
    for setting, groups in choices.first_per_runtime(grid):
        row = choices.decisive(groups)
        best = choices.winner(row)
        if best is not None:
            best_of.append((setting, best))
            found.append(_fastest_over_dense(grid, setting, best, row, commands))
        elif len(row) > 1:
            best = min(row, key=lambda cell: cell.call_s.value if cell.call_s else math.inf)
            headline = f"In {wording.runtime(setting)}, {wording.place(grid, best)} is fastest at {wording.call(best)}."
            found.append(Finding("fastest", headline, "", commands.sweep("--out", "again"), "latency-batch"))
    if best_of:
        found[0] = msgspec.structs.replace(found[0], brief=_fastest_brief(grid, best_of))
    return found


def alone(grid: Grid, commands: Commands) -> list[Finding]:
    """What a single subject does, where there is nothing to compare it with."""
    if len(grid.subjects) != 1:
        return []
    found: list[Finding] = []
    for setting, groups in choices.first_per_runtime(grid):
        cell = choices.decisive(groups)[0]
        assert cell.throughput is not None
        name, speed = wording.label(grid, cell.cell.subject), quantities.significant(cell.throughput.value)
        headline = f"{name} in {wording.runtime(setting)} at {wording.call(cell)}, {speed} tokens/s."
        again = commands.sweep("--out", "again")
        found.append(Finding("alone", headline, "", again, "latency-batch", "" if found else headline))
    return found


def _fastest_brief(grid: Grid, best_of: Sequence[tuple[Setting, Summary]]) -> str:
    """Say in a sentence what is fastest where, runtimes with the same winner together."""
    winners: dict[tuple[str, str, int], list[str]] = {}
    for setting, best in best_of:
        gain, dense = best.speedup, grid.baseline[best.cell.subject]
        assert gain is not None
        faster = wording.is_above(gain, 1)
        where = f"{quantities.ratio(gain.value)} in {wording.runtime(setting)}" if faster else wording.runtime(setting)
        winners.setdefault((best.cell.subject if faster else "", dense, best.cell.batch), []).append(where)
    sentences: list[str] = []
    for (subject, dense, batch), where in winners.items():
        over, places = wording.label(grid, dense), wording.join(where)
        if subject:
            name = wording.label(grid, subject)
            sentences.append(f"{name} is fastest at batch {batch:,}: {places} over {over}.")
        else:
            sentences.append(f"At batch {batch:,}, nothing is measurably faster than {over} in {places}.")
    return " ".join(sentences)


def _fastest_over_dense(
    grid: Grid, setting: Setting, best: Summary, row: Sequence[Summary], commands: Commands
) -> Finding:
    gain, dense = best.speedup, grid.baseline[best.cell.subject]
    assert gain is not None
    name, over = wording.label(grid, best.cell.subject), wording.label(grid, dense)
    where = f"In {wording.runtime(setting)} at batch {best.cell.batch:,}"
    times = wording.estimate_text(gain)
    if wording.is_above(gain, 1):
        headline = f"{where}, {name} is fastest: {times} over {over}, {wording.call(best, batch=False)}."
    else:
        headline = f"{where}, nothing is measurably faster than {over}; {name} comes nearest, {times}."
    original = next((cell for cell in row if cell.cell.subject == dense), None)
    cause = " ".join(part for part in (_why(best, original, gain), _other_kind(grid, best, row)) if part)
    again = f"{commands.sweep('--out', 'again')} && {shlex.join(['shortllama', 'compare', commands.run, 'again'])}"
    return Finding("fastest", headline, cause, again, "latency-batch")


def _why(best: Summary, dense: Summary | None, gain: Estimate) -> str:
    """Set the gain against what the bytes of a step allow."""
    if dense is None or best.row.bounds is None or dense.row.bounds is None:
        return ""
    allowed = dense.row.bounds.decode_bytes / best.row.bounds.decode_bytes
    if best.limits is not None and best.limits.regime == "launch":
        return "The step is launch-bound: what counts is the number of kernels, so the number of blocks."
    fewer = f"A step moves {quantities.share(1 - 1 / allowed)} fewer bytes, which allows {quantities.ratio(allowed)}"
    if not wording.is_above(gain, 1):
        wide = wording.is_above(gain, allowed, high=True)
        return f"{fewer}; the interval is too wide to see it." if wide else f"{fewer}."
    if wording.is_above(gain, 1.02 * allowed):
        shorter = kind(best.cell.subject, False) == "depth"
        return (
            f"{fewer}; the rest comes from {'launching fewer kernels or from ' if shorter else ''}caches, or is noise."
        )
    if not wording.is_above(gain, 0.98 * allowed, high=True):
        return f"{fewer}; fixed costs per kernel keep the rest."
    return f"{fewer}: the gain follows the bytes."


def _other_kind(grid: Grid, best: Summary, row: Sequence[Summary]) -> str:
    """Name the best of the other pruning unit: depth against width is the question of the paper."""
    opposite = {"depth": "width", "width": "depth"}.get(kind(best.cell.subject, False))
    rivals = [cell for cell in row if cell.speedup is not None and kind(cell.cell.subject, False) == opposite]
    if opposite is None or not rivals:
        return ""
    rival = max(rivals, key=lambda cell: cell.speedup.value if cell.speedup else 0.0)
    assert rival.speedup is not None
    name, times = wording.label(grid, rival.cell.subject), wording.estimate_text(rival.speedup)
    return f"The best {opposite}-pruned subject, {name}, reaches {times}."


def quality(grid: Grid, commands: Commands) -> list[Finding]:
    """The pruned subject that pays least for its speed: added nats a token over the log of the speed-up."""
    sources = list(dict.fromkeys(name for values in grid.perplexity.values() for name in values))
    for setting, groups in choices.first_per_runtime(grid):
        for source in sources:
            ranked = sorted(_prices(grid, groups, source), key=lambda item: item[0])
            if ranked:
                return [_quality_finding(grid, setting, source, ranked)]
    return [finding for source in sources for finding in _least_loss(grid, source)][:1]


def _least_loss(grid: Grid, source: str) -> list[Finding]:
    """The best perplexity among pruned subjects, where none of them is measurably faster."""
    known = {name: values[source] for name, values in grid.perplexity.items() if source in values}
    pruned = [name for name in known if grid.baseline.get(name) in known]
    if not pruned:
        return []
    best = min(pruned, key=lambda name: known[name].nll - known[grid.baseline[name]].nll)
    dense = grid.baseline[best]
    values = [quantities.significant(known[name].perplexity) for name in (best, dense)]
    headline = (
        f"{wording.label(grid, best)} loses least quality: perplexity {values[0]} on {source} against {values[1]} of "
        f"{wording.label(grid, dense)}."
    )
    cause = (
        f"It adds {known[best].nll - known[dense].nll:.2f} nats a token; what that buys in speed was not measurable."
    )
    return [Finding("quality", headline, cause, wording.keep_command(best), "perplexity-latency", headline)]


def _prices(grid: Grid, groups: Mapping[str, Group], source: str) -> list[tuple[float, Summary, float]]:
    """Return (nats per log speed-up, cell, added nats) of every subject that is faster than its dense model."""
    prices: list[tuple[float, Summary, float]] = []
    for cell in choices.decisive(groups):
        own = grid.perplexity.get(cell.cell.subject, {}).get(source)
        dense = grid.perplexity.get(grid.baseline.get(cell.cell.subject, ""), {}).get(source)
        if own and dense and cell.speedup and wording.is_above(cell.speedup, 1):
            prices.append(((own.nll - dense.nll) / math.log(cell.speedup.value), cell, own.nll - dense.nll))
    return prices


def _quality_finding(
    grid: Grid, setting: Setting, source: str, ranked: Sequence[tuple[float, Summary, float]]
) -> Finding:
    _, best, added = ranked[0]
    subject = best.cell.subject
    dense = grid.baseline[subject]
    own, other = (grid.perplexity[name][source].perplexity for name in (subject, dense))
    assert best.speedup is not None
    name, over = wording.label(grid, subject), wording.label(grid, dense)
    brief = (
        f"{name} gives most speed for its loss of quality: perplexity {quantities.significant(own)} on {source} "
        f"against {quantities.significant(other)} of {over}"
    )
    headline = f"{brief}, at {quantities.ratio(best.speedup.value)} in {wording.runtime(setting)}."
    cause = f"It adds {added:.2f} nats a token" if added >= 0 else "It loses no quality on this text"
    if len(ranked) > 1:
        _, second, more = ranked[1]
        assert second.speedup is not None
        gain = quantities.ratio(second.speedup.value)
        cause += f"; next is {wording.label(grid, second.cell.subject)} with {more:.2f} nats at {gain}"
    return Finding("quality", headline, f"{cause}.", wording.keep_command(subject), "perplexity-latency", f"{brief}.")


def memory(grid: Grid, commands: Commands) -> list[Finding]:
    """Where memory ends, per budget and lengths; runtimes that end alike in one finding."""
    alike: dict[tuple[str, str], list[Setting]] = {}
    for setting, groups in grid.groups.items():
        if any(group.fails is not None for group in groups.values()) and any(group.fits for group in groups.values()):
            limits: dict[str, list[str]] = {}
            for group in groups.values():
                limits.setdefault(wording.limit(group), []).append(wording.label(grid, group.subject))
            words = "; ".join(f"{limit} for {wording.join(names, 3)}" for limit, names in limits.items())
            alike.setdefault((words, _lengths(grid, setting)), []).append(setting)
    found = [_memory_finding(grid, words, where, same, commands) for (words, where), same in alike.items()]
    if found:
        found[0] = msgspec.structs.replace(found[0], brief=found[0].headline)
    return found


def _memory_finding(grid: Grid, words: str, where: str, same: Sequence[Setting], commands: Commands) -> Finding:
    groups = grid.groups[same[0]]
    first = next(group for group in groups.values() if group.fails is not None)
    failing = next((cell for cell in first.cells if cell.cell.batch == first.fails), None)
    need = failing.row.memory.analytic if failing else None
    command = wording.more_memory(commands, need) if need and same[0].budget != "none" else commands.sweep("--dry-run")
    runtimes = wording.join(list(dict.fromkeys(wording.runtime(setting) for setting in same)))
    headline = f"In {runtimes}{where}, memory ends {words}."
    return Finding("memory", headline, _need(grid, failing) if failing else "", command, "oom-frontier")


def _need(grid: Grid, summary: Summary) -> str:
    need = summary.row.memory.analytic
    return f"{wording.place(grid, summary)} needs {quantities.size(need)} by the memory model." if need else ""


def _lengths(grid: Grid, setting: Setting) -> str:
    """Name the budget, and the lengths where several were measured."""
    parts = [] if setting.budget == "none" else [f" within {setting.budget}"]
    for name in ("prompt", "output"):
        if len({getattr(other, name) for other in grid.groups}) > 1:
            parts.append(f" at {name} {getattr(setting, name):,}")
    return "".join(parts)


def runtimes(grid: Grid, commands: Commands) -> list[Finding]:
    """The faster runtime on the first subject that has two, at the smallest batch they share."""
    rivals_of: dict[Setting, list[Summary]] = {}
    for setting, groups in grid.groups.items():
        group = next((groups[s] for s in grid.subjects if s in groups and groups[s].measured), None)
        if group and not setting.simulated:
            rivals_of.setdefault(msgspec.structs.replace(setting, runtime=""), []).append(group.measured[0])
    for rivals in rivals_of.values():
        same = [r for r in rivals if (r.cell.subject, r.cell.batch) == (rivals[0].cell.subject, rivals[0].cell.batch)]
        if len(same) > 1:
            ranked = sorted(same, key=lambda cell: cell.call_s.value if cell.call_s else math.inf)
            return [_runtime_finding(grid, ranked[0], ranked[-1], commands)]
    return []


def _runtime_finding(grid: Grid, fast: Summary, slow: Summary, commands: Commands) -> Finding:
    assert fast.call_s is not None
    assert slow.call_s is not None
    gain = quotient(slow.call_s, fast.call_s)
    where = f"{wording.label(grid, fast.cell.subject)} at batch {fast.cell.batch:,}"
    pair, times = (fast.cell.runtime, slow.cell.runtime), wording.estimate_text(gain)
    if not wording.is_above(gain, 1):
        headline = f"{wording.join(pair)} cannot be told apart on {where}: {times}."
        again = commands.sweep("--out", "again")
        return Finding("runtime", headline, "Their intervals are wider than the difference.", again, "latency-batch")
    headline = f"{pair[0]} is {times} as fast as {pair[1]} on {where}."
    command = commands.sweep("--runtime", pair[0], "--out", pair[0])
    return Finding("runtime", headline, _RUNTIME_CAUSES.get(pair, ""), command, "latency-batch")


def trouble(grid: Grid, commands: Commands) -> list[Finding]:
    """Cells that failed, timed out, were unstable or skipped."""
    bad = [row for row in grid.rows if row.row.outcome in ("failed", "timed-out", "unstable", "skipped")]
    if not bad:
        return []
    counted = Counter(row.row.outcome for row in bad)
    words = wording.join([f"{number} {outcome}" for outcome, number in counted.items()])
    reason = quantities.shorten(quantities.inert(bad[0].row.reason or "no reason was recorded"), 160)
    headline = f"{words} of {wording.plural(len(grid.rows), 'cell')}; they are in no figure."
    return [Finding("trouble", headline, f"{wording.place(grid, bad[0])}: {reason}", commands.sweep("--out", "again"))]


def noise(grid: Grid, commands: Commands) -> list[Finding]:
    """Cells whose interval is too wide to tell small differences."""
    widths = [(wording.half_width(row.call_s), row) for row in grid.rows if row.counts]
    wide = [(width, row) for width, row in widths if width is not None and width > NOISY]
    if not wide:
        return []
    width, worst = max(wide, key=lambda item: item[0])
    headline = (
        f"{len(wide)} of {wording.plural(len(widths), 'measured cell')} have an interval wider than "
        f"±{quantities.share(NOISY)}, the widest ±{quantities.share(width)} ({wording.place(grid, worst)})."
    )
    cause = "Other work on the machine, or clocks that change; differences of this size are not findings."
    return [Finding("noise", headline, cause, commands.sweep("--out", "quiet"), "latency-batch")]


RULES: tuple[Callable[[Grid, Commands], list[Finding]], ...] = (
    nothing_fits, alone, fastest, quality, memory, runtimes, physical.limits, physical.predictions, trouble, noise,
)  # fmt: skip
