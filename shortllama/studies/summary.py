"""What a study amounts to: for each method and ratio the loss, and how much of it came back. Pure, and its tables.

A share of the gap closed is (pruned - retrained) / (pruned - dense) in perplexity: 1 is the dense model. It is given
only where all three were measured on the same tokens. Figures over several seeds are means; the range stands beside.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from shortllama import display
from shortllama.evaluation import tasks
from shortllama.evaluation.results import Perplexity, Quality
from shortllama.evaluation.tasks import TASKS
from shortllama.studies.rows import Row

CERTAIN = 2.0  # standard errors above guessing from which an accuracy says something


class Line(msgspec.Struct, frozen=True):
    """One text under one method, ratio, calibration and recipe; perplexities are means over `runs`."""

    text: str
    method: str
    ratio: float
    removed: float
    calibration: str
    recipe: str
    runs: int
    dense: float | None
    pruned: float
    retrained: float | None
    closed: float | None
    closed_range: tuple[float, float] | None


class Loss(msgspec.Struct, frozen=True):
    """What choosing and generating lost, as shares of the dense model's lead over guessing; the rise in nats a token.

    `choosing`: mean over the tasks with choices; `generating`: over those whose word has to be written. ShortGPT (arXiv
    2403.03853) sees the second fall first. Tasks at which the dense model guesses are left out (`telling`).
    """

    subject: str
    recipe: str
    choosing: float | None
    generating: float | None
    nats: float | None


def lines(rows: Sequence[Row], dense: Quality | None) -> tuple[Line, ...]:
    """Return the table of perplexities, text by text."""
    groups: dict[tuple[str, float, str, str], list[Row]] = {}
    for row in rows:
        calibration = "-" if row.calibration is None else row.calibration.label
        groups.setdefault((row.label, row.ratio, calibration, row.recipe), []).append(row)
    texts = dict.fromkeys(text for row in rows for text in row.before.perplexity)
    return tuple(_line(text, key, group, dense) for text in texts for key, group in groups.items())


def _line(text: str, key: tuple[str, float, str, str], rows: Sequence[Row], dense: Quality | None) -> Line:
    base = None if dense is None else dense.perplexity.get(text)
    pruned = [row.before.perplexity[text] for row in rows]
    retrained = [row.after.perplexity[text] for row in rows if row.after is not None]
    shares = [share for p, r in zip(pruned, retrained, strict=False) if (share := closed(base, p, r)) is not None]
    method, ratio, calibration, recipe = key
    return Line(
        text=text,
        method=method,
        ratio=ratio,
        removed=_mean(row.achieved.parameters for row in rows),
        calibration=calibration,
        recipe=recipe,
        runs=len(rows),
        dense=base and base.perplexity,
        pruned=_mean(one.perplexity for one in pruned),
        retrained=_mean(one.perplexity for one in retrained) if retrained else None,
        closed=_mean(shares) if shares else None,
        closed_range=(min(shares), max(shares)) if len(shares) > 1 else None,
    )


def closed(dense: Perplexity | None, pruned: Perplexity, retrained: Perplexity) -> float | None:
    """Return the share of the gap that retraining closed; None for other tokens, or where there was no gap."""
    if dense is None or len({dense.digest, pruned.digest, retrained.digest}) != 1:
        return None
    gap = pruned.perplexity - dense.perplexity
    return None if gap <= 0 else (pruned.perplexity - retrained.perplexity) / gap


def losses(rows: Sequence[Row], dense: Quality | None) -> tuple[Loss, ...]:
    """Return what each run lost in tasks; none without tasks."""
    if dense is None or dense.zero_shot is None:
        return ()
    before = telling(dense)
    found = []
    for row in rows:
        now = _accuracies(row.result)
        nats = [
            one.nll - dense.perplexity[text].nll
            for text, one in row.result.perplexity.items()
            if text in dense.perplexity and dense.perplexity[text].digest == one.digest
        ]
        choosing, generating = _lost(before, now, choosing=True), _lost(before, now, choosing=False)
        found.append(Loss(row.subject, row.recipe, choosing, generating, nats[0] if nats else None))
    return tuple(found)


def telling(dense: Quality) -> dict[str, float]:
    """Return the accuracies of the dense model that are above guessing by two standard errors, by task.

    Where it guesses, there is nothing that pruning could take away.
    """
    found = {} if dense.zero_shot is None else dense.zero_shot.tasks
    return {
        name: one.value
        for name, one in found.items()
        if name in TASKS and one.value - tasks.guessing(name) > CERTAIN * (one.standard_error or 0.0)
    }


def _accuracies(quality: Quality) -> dict[str, float]:
    return {} if quality.zero_shot is None else {name: one.value for name, one in quality.zero_shot.tasks.items()}


def _lost(before: Mapping[str, float], now: Mapping[str, float], *, choosing: bool) -> float | None:
    names = [name for name in before if name in now and (TASKS[name].choices != (1, 1)) == choosing]
    return lead_lost(names, before, now)


def lead_lost(names: Iterable[str], before: Mapping[str, float], now: Mapping[str, float]) -> float | None:
    """Return the share of the lead over guessing in `before`, a mean over tasks, that is gone in `now`.

    Accuracy itself would make choosing look steady: a model that is ruined still guesses. None without a lead.
    """
    named = [*names]
    had, has = (math.fsum(of[name] - tasks.guessing(name) for name in named) for of in (before, now))
    return None if had <= 0 else 1 - has / had


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return math.fsum(found) / len(found)


# -- tables -----------------------------------------------------------------------------------------------------------


def show(rows: Sequence[Row], dense: Quality | None) -> None:
    """Print the tables of a study."""
    table = lines(rows, dense)
    columns = (
        "method ",
        "ratio",
        "removed",
        "calibration ",
        "recipe ",
        "runs",
        "dense",
        "pruned",
        "retrained",
        "closed",
    )
    for text in dict.fromkeys(line.text for line in table):
        chosen = [line for line in table if line.text == text]
        display.table(columns, map(_cells, chosen), title=f"perplexity on {text}")
    lost = losses(rows, dense)
    if lost:
        cells = [
            (one.subject, one.recipe, *map(_percent, (one.choosing, one.generating)), _number(one.nats)) for one in lost
        ]
        columns = ("model ", "recipe ", "choosing lost", "generating lost", "nats a token lost")
        display.table(columns, cells, title="accuracy lost, of the dense model's")


def _cells(line: Line) -> tuple[str, ...]:
    spread = "" if line.closed_range is None else f" ({line.closed_range[0]:.0%} to {line.closed_range[1]:.0%})"
    numbers = map(_number, (line.dense, line.pruned, line.retrained))
    told = (line.method, f"{line.ratio:g}", f"{line.removed:.1%}", line.calibration, line.recipe, str(line.runs))
    return (*told, *numbers, _percent(line.closed) + spread)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"
