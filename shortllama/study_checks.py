"""What of a study can be refused before a model is loaded, each by the key that is at fault. Pure."""

from __future__ import annotations

from collections.abc import Callable

from shortllama import methods, planning
from shortllama.errors import InputError, ShortllamaError
from shortllama.evaluation import protocol, tasks
from shortllama.plans import Target
from shortllama.shape import QUANTISED, ModelShape
from shortllama.study import NONE, SELF, Method, Retraining, Study, targets


def check(study: Study, shape: ModelShape, positions: int | None, where: str) -> None:
    """Raise InputError, naming the key, for all that can be refused before a model is loaded."""
    for key in ("methods", "ratios", "calibrations", "recipes", "seeds", "quantised"):
        if not getattr(study, key):
            raise InputError(f"{where}: $.{key} is empty; give at least one")
    _check_quantised(study, where)
    labels = [one.label for one in study.recipes]
    for number, one in enumerate(study.recipes):
        at = f"{where}: $.recipes[{number}]"
        if labels.index(one.label) != number:
            raise InputError(f"{at}: a second recipe is called {one.label!r}; give each a name")
        strange = sorted(set(one.ratios or ()) - set(study.ratios))
        if strange or one.ratios == ():
            listed = _listed(tuple(strange)) or "nothing"
            raise InputError(f"{at}.ratios: {listed} is no ratio of this study; it has {_listed(study.ratios)}")
        _within(at, lambda one=one: _check_recipe(one, positions))
    for number, one in enumerate(study.calibrations):
        if one.samples < 1 or one.length < 2:
            raise InputError(
                f"{where}: $.calibrations[{number}]: {one.samples} samples of {one.length} tokens; expected 1 or more "
                "of 2 or more"
            )
    for number, row in enumerate(study.methods):
        if row.seeds == ():
            raise InputError(f"{where}: $.methods[{number}].seeds is empty; give at least one, or leave it out")
        for ratio in study.ratios:
            _within(
                f"{where}: $.methods[{number}]", lambda row=row, ratio=ratio: _check_method(row, ratio, shape, study)
            )
    _check_evaluation(study, f"{where}: $.evaluation")


def _listed(ratios: tuple[float, ...]) -> str:
    return ", ".join(f"{ratio:g}" for ratio in ratios)


def _check_quantised(study: Study, where: str) -> None:
    known = (NONE, *QUANTISED)
    for number, one in enumerate(study.quantised):
        if one not in known:
            raise InputError(f"{where}: $.quantised[{number}] is {one!r}; expected one of {', '.join(known)}")


def _within(at: str, action: Callable[[], object]) -> None:
    try:
        action()
    except ShortllamaError as error:
        raise type(error)(f"{at}: {error}") from error


def _check_recipe(one: Retraining, positions: int | None) -> None:
    if one.recipe == NONE:
        own = set(one.__struct_fields__) - {"recipe", "ratios"}
        given = [name for name in one.__struct_fields__ if name in own and getattr(one, name) not in (None, ())]
        if given:
            raise InputError(f"recipe 'none' retrains nothing; leave out {', '.join(given)}")
        return
    if one.label == NONE:
        raise InputError(f"recipe {one.recipe} is called 'none'; give it another name")
    found = one.of(0, positions)
    if len(one.data) not in (1, len(found.stages)):
        raise InputError(f"{len(one.data)} sources in data; recipe {one.recipe} takes 1 or one a stage")
    if SELF in one.data and one.steps is None:
        raise InputError("data 'self' has no end; give steps")


def _check_method(row: Method, ratio: float, shape: ModelShape, study: Study) -> None:
    target = Target("ratio", ratio)
    planning.outlook(
        row.method,
        shape=shape,
        target=target,
        protect=row.protect,
        align=row.align,
        unit=row.unit,
        iterative=row.iterative,
        variant=row.variant,
    )
    if row.between is None:
        return
    usable = [one.label for one in study.recipes if one.recipe != NONE]
    if row.between not in usable:
        raise InputError(f"between = {row.between!r} is no recipe of this study; it has {', '.join(usable) or 'none'}")
    if (row.steps or 1) < 2:
        raise InputError(f"between = {row.between!r} needs steps of 2 or more, saw {row.steps}")
    if methods.lookup(row.method).compensation:
        raise InputError(f"{row.method} adds biases, which belong to one step; leave between out")
    targets(row, ratio, len(shape.blocks))


def _check_evaluation(study: Study, at: str) -> None:
    wanted = study.evaluation
    if not wanted.texts:
        raise InputError(f"{at}.texts is empty; give at least one, such as 'self'")
    if wanted.limit is not None and wanted.limit < 1:
        raise InputError(f"{at}.limit is {wanted.limit}; expected 1 or more")
    _within(
        at, lambda: [protocol.parse(src) for src in wanted.texts] and tasks.lookup(",".join(wanted.tasks or ("all",)))
    )
    drawn = {*study.seeds, *(seed for row in study.methods for seed in row.seeds or ())}
    by_itself = any(protocol.parse(src)[0] == SELF for src in wanted.texts)
    if wanted.seed in drawn and (by_itself or {tasks.ENDING, tasks.WORD} & {*wanted.tasks}):
        raise InputError(
            f"{at}.seed is {wanted.seed}, which is a seed of runs too: 'self' would be the very text that is "
            "calibrated and retrained on; give another"
        )
