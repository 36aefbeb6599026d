"""Studies: one file names what varies, and becomes an ordered list of runs, each with an id. Pure: nothing is loaded.

The grid is methods x ratios x calibrations x seeds x recipes. What a choice does not depend on is no part of it
(calibration and seed of a method that reads none), so that equal runs are equal values and count once. Ids leave out
what is a default, so that an option added later changes none.
Schema history: shortllama.study/1: first.
"""

from __future__ import annotations

import hashlib
import re
from itertools import pairwise
from pathlib import Path
from typing import Literal

import msgspec

from shortllama import files, methods
from shortllama.errors import InputError
from shortllama.plans import Target
from shortllama.removals import Unit
from shortllama.retraining import recipes
from shortllama.retraining.recipes import Recipe
from shortllama.variants import LLM_PRUNER, MAGNITUDES, Variant

SELF = "self"
NONE = "none"

# Criteria that read no text; llm-pruner's magnitudes come on top. Known here so that no criterion has to be loaded.
WITHOUT_TEXT = ("mag", "mag-sp", "random", "last")


class Method(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """A method with its options, as `prune` has them.

    `between` names a recipe: the ratio is then reached in `steps` parts, the model retrained by that recipe after each
    part but the last, and scored anew. Without it, `steps` is llm-pruner's own. `seeds`: instead of the study's.
    """

    method: str
    unit: Unit | None = None
    iterative: bool = False
    protect: tuple[int, int] | None = None
    align: int = 1
    axis: str | None = None
    structure: str | None = None
    remove_heads: int | None = None
    metric: str | None = None
    estimator: str | None = None
    group_reduction: str | None = None
    steps: int | None = None
    between: str | None = None
    seeds: tuple[int, ...] | None = None

    @property
    def variant(self) -> Variant:
        """The width method's variant."""
        names = [name for name in Variant.__struct_fields__ if name != "steps"]
        steps = None if self.between else self.steps
        return Variant(**{name: getattr(self, name) for name in names}, steps=steps)

    @property
    def label(self) -> str:
        """The method's name with every option that is not a default."""
        said = ["modules"] if self.unit == "module" else []
        said += ["iterative"] if self.iterative else []
        said += self.variant.said()
        said += [f"{self.steps} steps, {self.between} between"] if self.between else []
        said += [f"align {self.align}"] if self.align != 1 else []
        said += [f"protect {self.protect[0]},{self.protect[1]}"] if self.protect else []
        return self.method + (f" ({', '.join(said)})" if said else "")


class Calibration(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What is scored on; a source as `score --calibration` takes it."""

    source: str = SELF
    samples: int = 10
    length: int = 128

    @property
    def label(self) -> str:
        """Source and size."""
        return f"{self.source} {self.samples}x{self.length}"


class Retraining(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """A recipe, scaled as `retrain` scales it; "none" leaves the pruned model as it is. `name`: what it is called.

    `ratios`: those of the study's that it is for; by default all.
    """

    recipe: str
    name: str | None = None
    data: tuple[str, ...] = ()
    steps: int | None = None
    batch: int | None = None
    micro_batch: int | None = None
    length: int | None = None
    lr: float | None = None
    schedule: str | None = None
    rank: int | None = None
    temperature: float | None = None
    hidden: float | None = None
    dtype: str | None = None
    checkpointing: bool | None = None
    ratios: tuple[float, ...] | None = None

    @property
    def label(self) -> str:
        """Its name, by default that of the recipe."""
        return self.name or self.recipe

    def of(self, seed: int, positions: int | None) -> Recipe:
        """Return the recipe as it runs; its windows fit `positions` unless a length is given."""
        names = set(self.__struct_fields__) - {"recipe", "name", "data", "lr", "ratios"}
        changes = {name: getattr(self, name) for name in names}
        found = recipes.scaled(recipes.lookup(self.recipe), **changes, rate=self.lr, seed=seed)
        return found if self.length is not None else recipes.within(found, positions)


class Evaluating(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """What every model is evaluated on, before and after retraining. `seed`: of text `self`, and of nothing else.

    `task_data`: a folder, looked up in the data folder too, as names of texts are.
    """

    texts: tuple[str, ...]
    tasks: tuple[str, ...] = ()
    task_data: str | None = None
    limit: int | None = None
    seed: int = 1_000_000


class Study(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The whole file.

    `quantised`: how the weights of every result, and of the dense model, are held: none (as they are), int8, int4.
    """

    schema: Literal["shortllama.study/1"]
    model: str
    methods: tuple[Method, ...]
    ratios: tuple[float, ...]
    evaluation: Evaluating
    calibrations: tuple[Calibration, ...] = (Calibration(),)
    recipes: tuple[Retraining, ...] = (Retraining(recipe=NONE),)
    seeds: tuple[int, ...] = (0,)
    quantised: tuple[str, ...] = (NONE,)
    keep_weights: bool = False


class Pruned(msgspec.Struct, frozen=True, omit_defaults=True):
    """A pruned model of a study, evaluated: what several runs begin with. None: makes no difference to it."""

    model: str
    method: Method
    ratio: float
    calibration: Calibration | None
    seed: int | None
    between: Retraining | None
    evaluation: Evaluating

    @property
    def id(self) -> str:
        """Readable, a file name, and different for different values."""
        return _id(self, self.method.label, f"{self.ratio:g}", f"s{self.seed or 0}")

    @property
    def subject(self) -> str:
        """What reports call it: as a sweep names such a subject (reference/ppl:0.25), and what is not a default."""
        usual = self.calibration in (None, Calibration())
        said = [] if usual or self.calibration is None else [f"on {self.calibration.label}"]
        said += [f"seed {self.seed}"] if self.seed else []
        return " ".join([f"{self.model}/{self.method.label}:{self.ratio:g}", *said])

    @property
    def scored_as(self) -> str | None:
        """Equal for models that equal scores decide; None where scores belong to one ratio."""
        row = methods.lookup(self.method.method)
        if row.unit == "width" or self.method.iterative or self.between is not None:
            return None
        return _digest((self.model, row.criterion, self.method.unit or row.unit, self.calibration, self.seed))


class Run(msgspec.Struct, frozen=True, omit_defaults=True):
    """One run: a pruned model, its retraining with a seed, or None for both, and int8 or int4 where it is quantised."""

    pruned: Pruned
    recipe: Retraining | None = None
    seed: int | None = None
    quantised: str = ""

    @property
    def made(self) -> str:
        """What is done to the pruned model: the recipe's label, and how its weights are then held."""
        return (NONE if self.recipe is None else self.recipe.label) + (f"+{self.quantised}" if self.quantised else "")

    @property
    def plain(self) -> Run:
        """The same run before it is quantised."""
        return msgspec.structs.replace(self, quantised="")

    @property
    def id(self) -> str:
        """Readable, a file name, and different for different values."""
        seed = self.pruned.seed if self.seed is None else self.seed
        return _id(self, self.pruned.method.label, f"{self.pruned.ratio:g}", self.made, f"s{seed or 0}")

    @property
    def subject(self) -> str:
        """What reports call it."""
        held = f"+{self.quantised}" if self.quantised else ""
        if self.recipe is None:
            return self.pruned.subject + held
        seed = f" seed {self.seed}" if self.seed and not self.pruned.seed else ""
        return f"{self.pruned.subject} + {self.recipe.label}{seed}{held}"


def read(path: Path) -> Study:
    """Return the study in a TOML file. Raises InputError naming the offending key."""
    return files.decode_toml(files.read_bytes(path), Study, str(path))


def path_of(name: str) -> Path:
    """Return the file of a study: a TOML file itself, or the shipped study of that name."""
    path, shipped = Path(name), Path(__file__).parent / "studies"
    if path.suffix or path.exists():
        return path
    if not (shipped / f"{name}.toml").exists():
        names = ", ".join(sorted(one.stem for one in shipped.glob("*.toml")))
        raise InputError(f"study {name!r} is neither a file nor a shipped study; shipped: {names}")
    return shipped / f"{name}.toml"


def grid(study: Study) -> tuple[Run, ...]:
    """Return the runs, each once; those of one pruned model follow each other."""
    named = {one.label: one for one in study.recipes}
    return tuple(
        dict.fromkeys(
            run
            for row in study.methods
            for ratio in study.ratios
            for calibration in study.calibrations
            for seed in row.seeds or study.seeds
            for run in _runs(study, _pruned(study, row, ratio, calibration, seed, named), seed)
        )
    )


def _runs(study: Study, pruned: Pruned, seed: int) -> list[Run]:
    asked = [one for one in study.recipes if one.ratios is None or pruned.ratio in one.ratios]
    plain = [Run(pruned) if one.recipe == NONE else Run(pruned, _everywhere(one), seed) for one in asked]
    held = ["" if one == NONE else one for one in study.quantised]
    return [msgspec.structs.replace(run, quantised=one) for run in plain for one in held]


def _everywhere(one: Retraining) -> Retraining:
    """A recipe as a run has it: the grid's own choices are no part of a run."""
    return msgspec.structs.replace(one, ratios=None)


def _pruned(
    study: Study, row: Method, ratio: float, calibration: Calibration, seed: int, named: dict[str, Retraining]
) -> Pruned:
    read = reads_text(row)
    between = _everywhere(named[row.between]) if row.between else None
    drawn = read or between is not None or methods.lookup(row.method).criterion == "random"
    method = msgspec.structs.replace(row, seeds=None)
    return Pruned(
        study.model, method, ratio, calibration if read else None, seed if drawn else None, between, study.evaluation
    )


def reads_text(row: Method) -> bool:
    """Whether a method's criterion reads calibration text."""
    criterion = methods.lookup(row.method).criterion
    return criterion not in WITHOUT_TEXT and not (criterion in LLM_PRUNER and row.estimator in MAGNITUDES)


def targets(row: Method, ratio: float, blocks: int) -> tuple[Target, ...]:
    """Return what each part of a way in steps removes of what the parts before it left.

    Whole blocks are counted against the dense model, so that all parts together remove what the ratio removes at once;
    of widths and modules each part takes the share that leaves (1 - ratio k/K) of the dense model's, to rounding.
    Raises InputError where a part would remove no block.
    """
    steps, method = row.steps or 1, methods.lookup(row.method)
    shares = [ratio * part / steps for part in range(steps + 1)]
    pairs = list(pairwise(shares))
    if method.unit == "width" or row.unit == "module":
        return tuple(Target("ratio", 1 - (1 - after) / (1 - before)) for before, after in pairs)
    counts = [method.removes(blocks, after) - method.removes(blocks, before) for before, after in pairs]
    if min(counts) < 1:
        total = method.removes(blocks, ratio)
        raise InputError(f"steps = {steps}, but ratio {ratio:g} removes {total} of {blocks} blocks; take fewer steps")
    return tuple(Target("blocks", count) for count in counts)


# -- names and costs --------------------------------------------------------------------------------------------------


def _digest(value: object) -> str:
    return hashlib.sha256(msgspec.json.encode(value, order="sorted")).hexdigest()[:8]


def _id(value: object, *parts: str) -> str:
    readable = "_".join(re.sub(r"[^A-Za-z0-9.+]+", "-", part).strip("-") for part in parts)
    return f"{readable[:80]}_{_digest(value)}"


def tokens(run: Run, positions: int | None) -> dict[str, int | None]:
    """Return the tokens that a run reads in scoring (each step anew) and trains on; None where only the data tell."""
    parts = (run.pruned.method.steps or 1) if run.pruned.between else 1
    once = run.pruned.calibration
    between = _trained(run.pruned.between, positions)
    return {
        "scoring": 0 if once is None else parts * once.samples * once.length,
        "between": None if between is None else (parts - 1) * between,
        "retraining": _trained(run.recipe, positions),
    }


def _trained(one: Retraining | None, positions: int | None) -> int | None:
    if one is None:
        return 0
    stages = one.of(0, positions).stages
    counted = [stage.steps * stage.batch * stage.length for stage in stages if stage.steps is not None]
    return sum(counted) if len(counted) == len(stages) else None
