"""Options that go together and that several verbs take: one field an option, declared once.

A verb takes a group as one parameter; `flat` gives typer the single options.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, get_type_hints

import msgspec

from shortllama import options
from shortllama.criteria import Reductions
from shortllama.errors import InputError
from shortllama.plans import Target
from shortllama.pruning import Choice, Scoring
from shortllama.variants import Variant

_SCORING = Scoring()


class Group(msgspec.Struct, frozen=True):
    """Options with their defaults; the field `target_params` is the option --target-params."""


class Choosing(Group, frozen=True):
    """What to remove, and how much."""

    method: options.Method = None
    preset: options.Preset = None
    ratio: options.Ratio = None
    blocks: options.Blocks = None
    target_params: options.TargetParams = None
    at_most: options.AtMost = False
    protect: options.Protect = None
    align: options.Align = 1
    scores: options.ScoresFile = None

    @property
    def target(self) -> Target | None:
        """The one target given, None for none. Raises InputError for several."""
        return options.optional_target(self.ratio, self.blocks, self.target_params)

    @property
    def protection(self) -> tuple[int, int] | None:
        """How many blocks at either end must stay; None for the method's own."""
        return options.protection(self.protect)


class Measuring(Group, frozen=True):
    """What a criterion measures, of what."""

    unit: options.Unit = None
    iterative: options.Iterative = False
    weight_reduction: options.WeightReduction = _SCORING.reductions.weight
    block_reduction: options.BlockReduction = _SCORING.reductions.block
    metric: options.Metric = None
    estimator: options.Estimator = None
    group_reduction: options.GroupReduction = None


class Allotting(Group, frozen=True):
    """How a width method turns scores into widths."""

    axis: options.Axis = None
    structure: options.Structure = None
    remove_heads: options.RemoveHeads = None
    steps: options.VariantSteps = None


class Calibrating(Group, frozen=True):
    """The tokens that a model is scored on, and where."""

    calibration: options.Calibration = _SCORING.calibration
    samples: options.Samples = _SCORING.samples
    length: options.Length = _SCORING.length
    seed: options.Seed = _SCORING.seed
    data_dir: options.DataDir = _SCORING.data_dir
    trust_remote_code: options.Trust = _SCORING.trust_remote_code
    device: options.Device = _SCORING.device


def scoring(measuring: Measuring, calibrating: Calibrating) -> Scoring:
    """Return how to score, as the library takes it."""
    reductions = Reductions(measuring.weight_reduction, measuring.block_reduction)
    return Scoring(**msgspec.structs.asdict(calibrating), reductions=reductions)


def variant(measuring: Measuring, allotting: Allotting | None = None) -> Variant:
    """Return the variant of a width method that the options name."""
    given = {} if allotting is None else msgspec.structs.asdict(allotting)
    return Variant(
        metric=measuring.metric, estimator=measuring.estimator, group_reduction=measuring.group_reduction, **given
    )


def choice(method: str, choosing: Choosing, measuring: Measuring, allotting: Allotting) -> Choice:
    """Return what `method` is asked for, as the library takes it. Raises InputError without a target."""
    return Choice(
        method,
        options.required(choosing.target),
        at_most=choosing.at_most,
        protect=choosing.protection,
        align=choosing.align,
        unit=measuring.unit,
        iterative=measuring.iterative,
        variant=variant(measuring, allotting),
    )


def refuse(reason: str, *given: Group, but: Iterable[str] = ()) -> None:
    """Raise InputError, beginning with `reason`, where an option of the groups is not at its default.

    `but`: the fields that are welcome all the same.
    """
    found = [
        f"--{name.replace('_', '-')}"
        for group in given
        for name in group.__struct_fields__
        if name not in but and getattr(group, name) != getattr(type(group)(), name)
    ]
    if found:
        raise InputError(f"{reason}; leave out {', '.join(found)}")


def flat(verb: Callable[..., None]) -> Callable[..., None]:
    """Return `verb` taking every option of its groups itself, in the groups' places, as typer needs it."""
    hints = get_type_hints(verb, include_extras=True)
    groups = {name: hint for name, hint in hints.items() if inspect.isclass(hint) and issubclass(hint, Group)}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(verb).parameters.values():
        single = [parameter.replace(annotation=hints[parameter.name])]
        parameters += _options(groups[parameter.name]) if parameter.name in groups else single

    @functools.wraps(verb)
    def flattened(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field: given.pop(field) for field in group.__struct_fields__})
        verb(**given)

    # By keyword only: required ones may then follow those with defaults, as the help wants them ordered.
    keywords = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    vars(flattened)["__signature__"] = inspect.Signature(keywords)
    flattened.__annotations__ = {parameter.name: parameter.annotation for parameter in keywords}
    return flattened


def _options(group: type[Group]) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    defaults = group()
    return [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=getattr(defaults, name), annotation=hints[name])
        for name in group.__struct_fields__
    ]
