"""What the results say, in sentences: each with its number, its cause and the command to run next. Pure.

A finding is what a reader would work out with the tables and a quarter of an hour. Every function takes the Grid and
returns findings, none where the results do not carry one; RULES lists them in the order of the report.
"""

from __future__ import annotations

import math
import re
import shlex
from collections import Counter
from collections.abc import Callable, Sequence

import msgspec

from bench import cells
from bench.report import quantities
from bench.report.palette import kind
from bench.report.summaries import Grid, Group, Setting, Summary, quotient
from bench.report.values import Finding
from bench.timing import Estimate
from shortllama import methods

NOISY = 0.05  # half an interval's width, as a share of the median, above which a cell counts as noisy
_PER_RULE = 4
_METHOD_PLAN = re.compile(r"(?P<model>.+)/(?P<method>[^/:]+):(?P<ratio>0?\.\d+)")

# What one runtime does that another does not; read as "fast is faster than slow because".
_RUNTIME_CAUSES = {
    ("static", "eager"): "eager's growing cache copies all keys and values at every token; the static cache does not.",
    ("eager", "static"): "The static cache reads all its slots at every token; eager's cache holds only those in use.",
    ("eager", "paper"): "The paper's protocol samples and synchronises at every token; the plain loop does neither.",
    ("static", "paper"): "The paper's protocol samples and synchronises at every token; the plain loop does neither.",
}


class Commands(msgspec.Struct, frozen=True):
    """What the commands in findings refer to: the suite as named by the user, and the run's folder."""

    suite: str
    run: str

    def sweep(self, *options: str) -> str:
        """Return a sweep of the same suite."""
        return shlex.join(["shortllama", "sweep", self.suite, *options])


def findings(grid: Grid, commands: Commands) -> tuple[Finding, ...]:
    """Return what the results say, the most decisive first."""
    return tuple(finding for rule in RULES for finding in rule(grid, commands)[:_PER_RULE])


def verdict(grid: Grid, found: Sequence[Finding]) -> str:
    """Return one paragraph: the briefs of the findings that decide something, then what was measured."""
    briefs = [finding.brief for finding in found if finding.brief]
    outcomes = Counter(row.row.outcome for row in grid.rows)
    oom = outcomes["oom"] + outcomes["oom-implied"]
    other = len(grid.rows) - outcomes["ok"] - oom
    parts = [f"{outcomes['ok']:,} of {_plural(len(grid.rows), 'cell')} measured"]
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
    cause = (
        f"The smallest cell, {_label(grid, least)}, needs {quantities.size(need)} by the memory model." if need else ""
    )
    command = _more_memory(commands, need) if need else commands.sweep("--dry-run")
    headline = "Nothing fits: memory ended before any cell could be measured."
    return [Finding("nothing", headline, cause, command, brief=headline)]


def fastest(grid: Grid, commands: Commands) -> list[Finding]:
    """The fastest subject of each runtime at its smallest batch, over its dense model."""
    found: list[Finding] = []
    best_of: list[tuple[Setting, Summary]] = []
    for setting, groups in _first_per_runtime(grid):
        row = _candidates(groups)
        gains = [cell for cell in row if cell.speedup is not None]
        if gains:
            best = max(gains, key=lambda cell: cell.speedup.value if cell.speedup else 0.0)
            best_of.append((setting, best))
            found.append(_fastest_over_dense(grid, setting, best, row, commands))
        elif len(row) > 1:
            best = min(row, key=lambda cell: cell.call_s.value if cell.call_s else math.inf)
            headline = f"In {_runtime(setting)}, {_label(grid, best)} is fastest at {_call(best)}."
            found.append(Finding("fastest", headline, "", commands.sweep("--out", "again"), "latency-batch"))
    if best_of:
        found[0] = msgspec.structs.replace(found[0], brief=_fastest_brief(grid, best_of))
    return found


def alone(grid: Grid, commands: Commands) -> list[Finding]:
    """What a single subject does, where there is nothing to compare it with."""
    if len(grid.subjects) != 1:
        return []
    found: list[Finding] = []
    for setting, groups in _first_per_runtime(grid):
        cell = _candidates(groups)[0]
        assert cell.throughput is not None
        speed = quantities.significant(cell.throughput.value)
        headline = f"{_name(grid, cell.cell.subject)} in {_runtime(setting)} at {_call(cell)}, {speed} tokens/s."
        command = commands.sweep("--out", "again")
        found.append(Finding("alone", headline, "", command, "latency-batch", "" if found else headline))
    return found


def _fastest_brief(grid: Grid, best_of: Sequence[tuple[Setting, Summary]]) -> str:
    """Say in one sentence what is fastest where, runtimes with the same winner together."""
    winners: dict[tuple[str, str], list[str]] = {}
    batch = best_of[0][1].cell.batch
    for setting, best in best_of:
        gain, dense = best.speedup, grid.baseline[best.cell.subject]
        assert gain is not None
        name = best.cell.subject if (gain.low or gain.value) > 1 else ""
        winners.setdefault((name, dense), []).append(
            f"{quantities.ratio(gain.value)} in {_runtime(setting)}" if name else _runtime(setting)
        )
    sentences = [
        f"{_name(grid, name)} is fastest at batch {batch:,}: {_join(where)} over {_name(grid, dense)}."
        if name else f"Nothing is measurably faster than {_name(grid, dense)} in {_join(where)}."
        for (name, dense), where in winners.items()
    ]  # fmt: skip
    return " ".join(sentences)


def _fastest_over_dense(
    grid: Grid, setting: Setting, best: Summary, row: Sequence[Summary], commands: Commands
) -> Finding:
    gain, dense = best.speedup, grid.baseline[best.cell.subject]
    assert gain is not None
    name, over = _name(grid, best.cell.subject), _name(grid, dense)
    where = f"In {_runtime(setting)} at batch {best.cell.batch:,}"
    if (gain.low or gain.value) > 1:
        headline = f"{where}, {name} is fastest: {_estimate(gain)} over {over}, {_call(best, batch=False)}."
    else:
        headline = f"{where}, nothing is measurably faster than {over}; {name} comes nearest, {_estimate(gain)}."
    original = next((cell for cell in row if cell.cell.subject == dense), None)
    cause = " ".join(part for part in (_why(best, original, gain), _other_kind(grid, best, row)) if part)
    again = f"{commands.sweep('--out', 'again')} && {shlex.join(['shortllama', 'compare', commands.run, 'again'])}"
    return Finding("fastest", headline, cause, again, "latency-batch")


def _why(best: Summary, dense: Summary | None, gain: Estimate) -> str:
    """Set the gain against what the bytes of a step allow."""
    if dense is None or best.row.bounds is None or dense.row.bounds is None:
        return ""
    allowed = dense.row.bounds.decode_bytes / best.row.bounds.decode_bytes
    if best.row.bounds.regime == "launch":
        return "The step is launch-bound: what counts is the number of kernels, so the number of blocks."
    fewer = f"A step moves {quantities.share(1 - 1 / allowed)} fewer bytes, which allows {quantities.ratio(allowed)}"
    if gain.value > 1.05 * allowed:
        return f"{fewer}; the rest comes from launching fewer kernels or from caches."
    if gain.value < 0.95 * allowed:
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
    return f"The best {opposite}-pruned subject, {_name(grid, rival.cell.subject)}, reaches {_estimate(rival.speedup)}."


def quality(grid: Grid, commands: Commands) -> list[Finding]:
    """The pruned subject that pays least for its speed: added nats a token over the log of the speed-up."""
    for setting, groups in _first_per_runtime(grid):
        for source in dict.fromkeys(name for values in grid.perplexity.values() for name in values):
            ranked = sorted(_prices(grid, groups, source), key=lambda item: item[0])
            if ranked:
                return [_quality_finding(grid, setting, source, ranked)]
    return []


def _prices(grid: Grid, groups: dict[str, Group], source: str) -> list[tuple[float, Summary, float]]:
    """Return (nats per log speed-up, cell, added nats) of every subject that is faster than its dense model."""
    prices: list[tuple[float, Summary, float]] = []
    for cell in _candidates(groups):
        own = grid.perplexity.get(cell.cell.subject, {}).get(source)
        dense = grid.perplexity.get(grid.baseline.get(cell.cell.subject, ""), {}).get(source)
        if own and dense and cell.speedup and (cell.speedup.low or cell.speedup.value) > 1:
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
    headline = (
        f"{_name(grid, subject)} gives most speed for its loss of quality: perplexity {quantities.significant(own)} on "
        f"{source} against {quantities.significant(other)} of {_name(grid, dense)}, at "
        f"{quantities.ratio(best.speedup.value)} in {_runtime(setting)}."
    )
    brief = (
        f"{_name(grid, subject)} gives most speed for its loss of quality: perplexity {quantities.significant(own)} on "
        f"{source} against {quantities.significant(other)} of {_name(grid, dense)}."
    )
    cause = f"It adds {added:.2f} nats a token" if added >= 0 else "It loses no quality on this text"
    if len(ranked) > 1:
        _, second, more = ranked[1]
        assert second.speedup is not None
        gain = quantities.ratio(second.speedup.value)
        cause += f"; next is {_name(grid, second.cell.subject)} with {more:.2f} nats at {gain}"
    return Finding("quality", headline, f"{cause}.", keep_command(subject), "perplexity-latency", brief)


def memory(grid: Grid, commands: Commands) -> list[Finding]:
    """Where memory ends, per budget and lengths; runtimes that end alike in one finding."""
    alike: dict[tuple[str, str], list[Setting]] = {}
    for setting, groups in grid.groups.items():
        if any(group.fails is not None for group in groups.values()) and any(group.fits for group in groups.values()):
            limits: dict[str, list[str]] = {}
            for group in groups.values():
                limits.setdefault(_limit(group), []).append(_name(grid, group.subject))
            words = "; ".join(f"{limit} for {_join(names, 3)}" for limit, names in limits.items())
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
    cause = f"{_label(grid, failing)} needs {quantities.size(need)} by the memory model." if failing and need else ""
    command = _more_memory(commands, need) if need and same[0].budget != "none" else commands.sweep("--dry-run")
    runtimes = _join(list(dict.fromkeys(_runtime(setting) for setting in same)))
    return Finding("memory", f"In {runtimes}{where}, memory ends {words}.", cause, command, "oom-frontier")


def _lengths(grid: Grid, setting: Setting) -> str:
    """Name the budget, and the lengths where several were measured."""
    parts = [] if setting.budget == "none" else [f" within {setting.budget}"]
    for name in ("prompt", "output"):
        if len({getattr(other, name) for other in grid.groups}) > 1:
            parts.append(f" at {name} {getattr(setting, name):,}")
    return "".join(parts)


def runtimes(grid: Grid, commands: Commands) -> list[Finding]:
    """The faster runtime on the first subject that has two, at the smallest batch they share."""
    cells_of: dict[Setting, list[Summary]] = {}
    for setting, groups in grid.groups.items():
        group = next((groups[s] for s in grid.subjects if s in groups and groups[s].measured), None)
        if group and not setting.simulated:
            cells_of.setdefault(msgspec.structs.replace(setting, runtime=""), []).append(group.measured[0])
    for rivals in cells_of.values():
        rivals = [r for r in rivals if (r.cell.subject, r.cell.batch) == (rivals[0].cell.subject, rivals[0].cell.batch)]
        if len(rivals) < 2:
            continue
        rivals.sort(key=lambda cell: cell.call_s.value if cell.call_s else math.inf)
        fast, slow = rivals[0], rivals[-1]
        assert fast.call_s is not None
        assert slow.call_s is not None
        gain = quotient(slow.call_s, fast.call_s)
        name, batch = _name(grid, fast.cell.subject), fast.cell.batch
        pair = (fast.cell.runtime, slow.cell.runtime)
        if (gain.low or gain.value) <= 1:
            return [
                Finding("runtime", f"{_join(pair)} are equally fast on {name} at batch {batch}: {_estimate(gain)}.")
            ]
        headline = f"{pair[0]} is {_estimate(gain)} as fast as {pair[1]} on {name} at batch {batch}."
        command = commands.sweep("--runtime", pair[0], "--out", pair[0])
        return [Finding("runtime", headline, _RUNTIME_CAUSES.get(pair, ""), command, "latency-batch")]
    return []


def trouble(grid: Grid, commands: Commands) -> list[Finding]:
    """Cells that failed, timed out, were unstable or skipped."""
    bad = [row for row in grid.rows if row.row.outcome in ("failed", "timed-out", "unstable", "skipped")]
    if not bad:
        return []
    counted = Counter(row.row.outcome for row in bad)
    words = _join([f"{number} {outcome}" for outcome, number in counted.items()])
    reason = quantities.shorten(quantities.inert(bad[0].row.reason or "no reason was recorded"), 160)
    headline = f"{words} of {_plural(len(grid.rows), 'cell')}; they are in no figure."
    return [Finding("trouble", headline, f"{_label(grid, bad[0])}: {reason}", commands.sweep("--out", "again"))]


def noise(grid: Grid, commands: Commands) -> list[Finding]:
    """Cells whose interval is too wide to tell small differences."""
    widths = [(_half_width(row.call_s), row) for row in grid.rows if row.counts]
    wide = [(width, row) for width, row in widths if width is not None and width > NOISY]
    if not wide:
        return []
    width, worst = max(wide, key=lambda item: item[0])
    headline = (
        f"{len(wide)} of {_plural(len(widths), 'measured cell')} have an interval wider than "
        f"±{quantities.share(NOISY)}, the widest ±{quantities.share(width)} ({_label(grid, worst)})."
    )
    cause = "Other work on the machine, or clocks that change; differences of this size are not findings."
    return [Finding("noise", headline, cause, commands.sweep("--out", "quiet"), "latency-batch")]


RULES: tuple[Callable[[Grid, Commands], list[Finding]], ...] = (
    nothing_fits, alone, fastest, quality, memory, runtimes, trouble, noise,
)  # fmt: skip


# -- words -------------------------------------------------------------------------------------------------------------


def keep_command(subject: str) -> str:
    """Return the command that makes or inspects a subject for use."""
    match = _METHOD_PLAN.fullmatch(subject)
    if match and match["method"] in methods.METHODS:
        out = f"{match['method']}-{match['ratio']}"
        return shlex.join(
            [
                "shortllama",
                "prune",
                match["model"],
                "--method",
                match["method"],
                "--ratio",
                match["ratio"],
                "--out",
                out,
            ]
        )
    if subject.startswith((".", "/", "~")):
        return shlex.join(["shortllama", "verify", subject])
    return shlex.join(["shortllama", "shapes", subject])


def _first_per_runtime(grid: Grid) -> list[tuple[Setting, dict[str, Group]]]:
    """Return one setting a runtime: the first in which anything was measured."""
    first: dict[tuple[str, str, bool], tuple[Setting, dict[str, Group]]] = {}
    for setting, groups in grid.groups.items():
        if any(group.measured for group in groups.values()):
            first.setdefault((setting.environment, setting.runtime, setting.simulated), (setting, dict(groups)))
    return list(first.values())


def _candidates(groups: dict[str, Group]) -> list[Summary]:
    """Return every subject's cell at the smallest batch at which a speed-up is known, else at the smallest batch."""
    measured = [cell for group in groups.values() for cell in group.measured]
    compared = [cell.cell.batch for cell in measured if cell.speedup is not None]
    batch = min(compared or [cell.cell.batch for cell in measured], default=None)
    return [cell for cell in measured if cell.cell.batch == batch]


def _more_memory(commands: Commands, need_bytes: int) -> str:
    """Return a sweep under the next round budget that holds `need_bytes` with 5 % to spare."""
    step = 1 << max(20, math.floor(math.log2(need_bytes * 1.05)) - 2)
    budget = math.ceil(need_bytes * 1.05 / step) * step
    unit, scale = ("GiB", 1 << 30) if budget % (1 << 30) == 0 else ("MiB", 1 << 20)
    text = f"{budget // scale}{unit}"
    assert cells.budget_bytes(text) == budget
    return commands.sweep("--budget", text, "--out", f"budget-{text}")


def _name(grid: Grid, subject: str) -> str:
    """A label short enough for a sentence."""
    return quantities.shorten(grid.labels[subject], 40)


def _limit(group: Group) -> str:
    if group.fails is None:
        return f"beyond batch {group.fits:,}" if group.fits else "at no batch seen"
    return f"after batch {group.fits:,}" if group.fits else f"before batch {group.fails:,}"


def _runtime(setting: Setting) -> str:
    return f"{setting.runtime} (simulated)" if setting.simulated else setting.runtime


def _label(grid: Grid, summary: Summary) -> str:
    cell = summary.cell
    return f"{_name(grid, cell.subject)} in {_runtime(summary.setting)} at batch {cell.batch:,}"


def _call(summary: Summary, *, batch: bool = True) -> str:
    assert summary.call_s is not None
    at = f"batch {summary.cell.batch:,}: " if batch else ""
    return f"{at}{quantities.seconds(summary.call_s.value)} for {summary.cell.output:,} tokens"


def _estimate(estimate: Estimate) -> str:
    text = quantities.ratio(estimate.value)
    if estimate.low is None or estimate.high is None:
        return text
    return f"{text} (95\u00a0% interval {quantities.interval((estimate.low, estimate.high), 'number')})"


def _half_width(estimate: Estimate | None) -> float | None:
    if estimate is None or estimate.low is None or estimate.high is None:
        return None
    return (estimate.high - estimate.low) / (2 * estimate.value)


def _plural(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _join(words: Sequence[str], limit: int = 6) -> str:
    """Return "a, b and c"; beyond `limit` words, "a, b and 4 more"."""
    shown = list(words)
    if len(shown) > limit:
        shown = [*shown[: limit - 1], f"{len(shown) - limit + 1} more"]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}" if shown else ""
