"""Run a criterion on a model: check, measure, and return Scores with their cost. The only way a criterion is called.

The model comes back exactly as it was. Knows no method, no target count and no plan.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shortllama import criteria, families, stack, surgery, texts
from shortllama.calibration import Calibration
from shortllama.errors import InputError
from shortllama.scores import Cost, Scores, check_finite
from shortllama.shape import ModelShape

Progress = Callable[[int, int], None]


def score(
    model: Any,
    criterion: str,
    calibration: Calibration | None = None,
    *,
    towards: ModelShape | None = None,
    seed: int = 0,
    reductions: criteria.Reductions | None = None,
    progress: Progress | None = None,
) -> Scores:
    """Return the scores of `criterion` on a transformers model; higher = keep.

    `calibration` is needed by all but mag, mag-sp, random and last, which ignore it. `towards`: the shape that the
    model will be pruned to; wanda-sp feeds the outputs of blocks pruned to it on, and dense outputs without it.
    `reductions`: how mag and taylor aggregate weights, by default the published sums.
    `seed` is for random scores and bootstrap intervals. `progress(done, total)` is called as the work goes on.
    Equal arguments give equal scores on one machine; weights, flags and mode of `model` are left as they were.

    Raises InputError for an unknown criterion, missing calibration, ids outside the vocabulary, a model without
    weights, and scores that are not finite or all equal; UnsupportedError for an unknown family.
    """
    chosen = criteria.lookup(criterion)
    how = reductions or criteria.Reductions()
    how.check(chosen.NAME)
    adapter = families.adapter(model)
    shape = surgery.shape_of(model)
    used = _checked(chosen, calibration, shape, model)
    task = criteria.Task(adapter, shape, used, seed, towards, progress or _silent, how)
    cost = start_cost(model, used.tokens if used else 0)
    with stack.quiet(model):
        found = chosen.score(task)
    scores = Scores(
        criterion=chosen.NAME,
        unit=chosen.UNIT,
        base_digest=shape.digest(),
        blocks=found.blocks,
        kv_groups=found.kv_groups,
        neurons=found.neurons,
        runs=found.runs,
        calibration=used.description if used else None,
        details=found.details,
        cost=cost(),
    )
    check_finite(scores)
    return scores


def _silent(done: int, total: int) -> None:
    pass


def _checked(
    chosen: criteria.Criterion, calibration: Calibration | None, shape: ModelShape, model: Any
) -> Calibration | None:
    """Return the calibration if the criterion reads it, None otherwise, after checking what it needs."""
    if chosen.NEEDS != "nothing" and any(parameter.is_meta for parameter in model.parameters()):
        raise InputError(f"criterion {chosen.NAME} reads weights, and this model is a shape without any; load weights")
    if chosen.NEEDS != "calibration":
        return None
    if calibration is None:
        raise InputError(f"criterion {chosen.NAME} needs calibration; give a text file, ids:FILE.jsonl or 'self'")
    name = str(calibration.description["source"])
    texts.check_vocabulary(calibration.sequences, shape.vocabulary, name)
    return calibration


def start_cost(model: Any, tokens: int) -> Callable[[], Cost]:
    """Return a function that returns the cost since now of work on `model` over `tokens`: wall time and peak memory.

    Peak bytes are counted beyond what is held now (the model): of the device's allocations on CUDA, else of the
    process's resident memory, where the kernel lets its high-water mark be reset (Linux); null elsewhere.
    """
    device = next(model.parameters()).device
    started, resident = time.perf_counter(), _reset_peak(device)

    def cost() -> Cost:
        return Cost(round(time.perf_counter() - started, 6), _peak(device, resident), tokens)

    return cost


def _reset_peak(device: Any) -> int | None:
    """Start a new high-water mark; return the bytes held now, None where it cannot be done."""
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status_bytes("VmRSS")
    except OSError:
        return None


def _peak(device: Any, start: int | None) -> int | None:
    if start is None:
        return None
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) - start
    return max(0, _status_bytes("VmHWM") - start)


def _status_bytes(field: str) -> int:
    """Return a figure of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")
