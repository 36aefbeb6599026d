"""The commands that a study's findings end with: the same again, the pruned model alone, a longer retraining. Pure."""

from __future__ import annotations

import shlex

from bench.report.studies.held import Held
from shortllama import methods
from shortllama.studies.rows import Row
from shortllama.study import Retraining


def again(held: Held) -> str:
    """The same study in another folder, where its file is at hand."""
    if held.given is None:
        return ""
    return shlex.join(["shortllama", "study", f"{held.name}/study.toml", "--out", "again"])


def prune(row: Row) -> str:
    """The command that makes the pruned model; "" for one that is made in steps or by an unknown option."""
    if row.method not in methods.METHODS or row.label not in (row.method, f"{row.method} (modules)"):
        return ""
    words = ["prune", row.model, "--method", row.method, "--ratio", f"{row.ratio:g}"]
    words += ["--unit", "module"] if row.unit == "module" else []
    if row.calibration is not None:
        wanted = row.calibration
        words += ["--calibration", wanted.source, "--samples", str(wanted.samples), "--length", str(wanted.length)]
    words += ["--seed", str(row.seed)] if row.seed else []
    return shlex.join(["shortllama", *words, "--out", _folder(row)])


def _folder(row: Row) -> str:
    return f"{row.method}{'-modules' if row.unit == 'module' else ''}-{row.ratio:g}"


def longer(held: Held, row: Row) -> str:
    """Twice as much of the same recipe, on the same pruned model; "" where the study does not say what it was."""
    made = prune(row)
    named_so = {one.label: one for one in (held.given.recipes if held.given else ())}
    recipe = named_so.get(row.recipe)
    if not made or recipe is None or recipe.steps is None or len(recipe.data) != 1:
        return ""
    words = ["shortllama", "retrain", _folder(row), *_options(recipe), "--out", f"{_folder(row)}-longer"]
    return f"{made} && {shlex.join(words)}"


def _options(recipe: Retraining) -> list[str]:
    assert recipe.steps is not None
    words = ["--recipe", recipe.recipe, "--data", recipe.data[0], "--steps", str(2 * recipe.steps)]
    for flag, value in (("--batch", recipe.batch), ("--length", recipe.length), ("--lr", recipe.lr)):
        words += [] if value is None else [flag, f"{value:g}" if isinstance(value, float) else str(value)]
    return words
