"""Words that findings are made of: names, estimates and lists in a sentence, and the commands to run next. Pure."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Sequence

import msgspec

from bench import cells
from bench.report import quantities
from bench.report.summaries import Grid, Group, Setting, Summary
from bench.timing import Estimate
from shortllama import methods

_METHOD_PLAN = re.compile(r"(?P<model>.+)/(?P<method>[^/:]+):(?P<ratio>0?\.\d+)")


# -- commands ----------------------------------------------------------------------------------------------------------


class Commands(msgspec.Struct, frozen=True):
    """What the commands in findings refer to: the suite as named by the user, and the run's folder."""

    suite: str
    run: str

    def sweep(self, *options: str) -> str:
        """Return a sweep of the same suite."""
        return shlex.join(["shortllama", "sweep", self.suite, *options])


def keep_command(subject: str) -> str:
    """Return the command that makes or inspects a subject for use."""
    match = _METHOD_PLAN.fullmatch(subject)
    if match and match["method"] in methods.METHODS:
        model, method, ratio = match.groups()
        words = ("prune", model, "--method", method, "--ratio", ratio, "--out", f"{method}-{ratio}")
        return shlex.join(["shortllama", *words])
    if subject.startswith((".", "/", "~")):
        return shlex.join(["shortllama", "verify", subject])
    return shlex.join(["shortllama", "shapes", subject])


def more_memory(commands: Commands, need_bytes: int) -> str:
    """Return a sweep under the next round budget that holds `need_bytes` with 5 % to spare."""
    step = 1 << max(20, math.floor(math.log2(need_bytes * 1.05)) - 2)
    budget = math.ceil(need_bytes * 1.05 / step) * step
    unit, scale = ("GiB", 1 << 30) if budget % (1 << 30) == 0 else ("MiB", 1 << 20)
    text = f"{budget // scale}{unit}"
    assert cells.budget_bytes(text) == budget
    return commands.sweep("--budget", text, "--out", f"budget-{text}")


# -- words -------------------------------------------------------------------------------------------------------------


def is_above(estimate: Estimate, value: float, *, high: bool = False) -> bool:
    """Return whether the whole interval is above `value`, or with `high` whether it reaches above it."""
    end = estimate.high if high else estimate.low
    return (estimate.value if end is None else end) > value


def label(grid: Grid, subject: str) -> str:
    """Return a name short enough for a sentence."""
    return quantities.shorten(grid.labels[subject], 40)


def limit(group: Group) -> str:
    """Say where memory ends for a group."""
    if group.fails is None:
        return f"beyond batch {group.fits:,}" if group.fits else "at no batch seen"
    return f"after batch {group.fits:,}" if group.fits else f"before batch {group.fails:,}"


def runtime(setting: Setting) -> str:
    """Return the runtime, marked where it is simulated."""
    return f"{setting.runtime} (simulated)" if setting.simulated else setting.runtime


def place(grid: Grid, summary: Summary) -> str:
    """Name a cell."""
    cell = summary.cell
    return f"{label(grid, cell.subject)} in {runtime(summary.setting)} at batch {cell.batch:,}"


def call(summary: Summary, *, batch: bool = True) -> str:
    """Return the latency of a cell with what it is the latency of."""
    assert summary.call_s is not None
    at = f"batch {summary.cell.batch:,}: " if batch else ""
    return f"{at}{quantities.seconds(summary.call_s.value)} for {summary.cell.output:,} tokens"


def estimate_text(estimate: Estimate) -> str:
    """Return a ratio with its interval, where it has one."""
    text = quantities.ratio(estimate.value)
    if estimate.low is None or estimate.high is None:
        return text
    ends = quantities.interval((estimate.low, estimate.high), "ratio").removesuffix(quantities.TIMES)
    return f"{text} (95\u00a0% interval {ends})"


def half_width(estimate: Estimate | None) -> float | None:
    """Return half the width of the interval as a share of the estimate."""
    if estimate is None or estimate.low is None or estimate.high is None:
        return None
    return (estimate.high - estimate.low) / (2 * estimate.value)


def plural(number: int, noun: str) -> str:
    """Return "1 cell" or "2 cells"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def join(words: Sequence[str], limit: int = 6) -> str:
    """Return "a, b and c"; beyond `limit` words, "a, b and 4 more"."""
    shown = list(words)
    if len(shown) > limit:
        shown = [*shown[: limit - 1], f"{len(shown) - limit + 1} more"]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}" if shown else ""
