"""Before a sweep: subjects that must be pruned are written, and every subject with weights is evaluated.

Both need torch, so they happen in a child; what comes back is folders in RUN/subjects and RUN/quality.json
(`shortllama.eval/1`). A resumed run keeps what is there. All subjects of one base meet the same tokens: text `self` is
sampled from the dense model once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import msgspec

from bench import children, environment, runtimes
from bench.schedule import Schedule
from bench.subjects import Subject
from shortllama import pruning, sources
from shortllama.errors import InputError, ShortllamaError
from shortllama.evaluation.results import Evaluation, Quality, read_evaluation, write_evaluation
from shortllama.plans import Target

SUBJECTS = "subjects"
QUALITY = "quality.json"

Report = Callable[[str, int, int], None]


class Task(msgspec.Struct, frozen=True):
    """What a child has to do: prune into folders, then evaluate `evaluated` on the sources `texts`."""

    pruned: tuple[tuple[Subject, str], ...]
    evaluated: tuple[Subject, ...]
    texts: tuple[str, ...]
    file: str
    seed: int
    threads: int


class Step(msgspec.Struct, frozen=True, tag=True):
    """So far."""

    what: str
    done: int
    total: int


class Refused(msgspec.Struct, frozen=True, tag=True):
    """A user's mistake, or a defect (`expected` false): the message."""

    text: str
    expected: bool


class Done(msgspec.Struct, frozen=True, tag=True):
    """All of it."""


_DECODER: msgspec.json.Decoder[Step | Refused | Done] = msgspec.json.Decoder(Step | Refused | Done)


def folder_of(run: Path, subject: Subject) -> Path:
    """Return where the weights of a subject that must be pruned first are written in a run, quantised or not."""
    base, _, plan = sources.split(subject.name)[0].rpartition("/")
    name = f"{Path(base).name}__{plan}".replace(":", "=").replace(" ", "-")
    if base != Path(base).name:  # two folders may have the same name
        name += f"__{hashlib.sha256(base.encode()).hexdigest()[:8]}"
    return run / SUBJECTS / name


def prepare(plan: Schedule, texts: tuple[str, ...], run: Path, *, seed: int, threads: int, report: Report) -> Schedule:
    """Write and evaluate what the plan's measured subjects need; return the plan with their folders filled in.

    Raises InputError for what the sources or methods refuse.
    """
    measured = {g.subject.name: g.subject for g in plan.groups if g.key.runtime not in runtimes.SIMULATED}
    to_prune = [one for one in measured.values() if one.prune and not folder_of(run, one).exists()]
    ready = {name: _filled(one, run) for name, one in measured.items()}
    weighty = tuple(one for one in ready.values() if one.folder)
    evaluated = () if not texts or _has_quality(run / QUALITY, weighty, texts) else weighty
    if to_prune or evaluated:
        pruned = tuple((one, folder) for folder, one in {str(folder_of(run, one)): one for one in to_prune}.items())
        task = Task(pruned, evaluated, texts, str(run / QUALITY), seed, threads)
        _supervise(task, environment.child_variables(threads), report)
    return Schedule(
        tuple(msgspec.structs.replace(g, subject=ready.get(g.subject.name, g.subject)) for g in plan.groups)
    )


def check_weights(plan: Schedule) -> None:
    """Raise InputError for a subject whose weights are missing, cut off or of another shape (headers alone are read),
    and for quantised ones that are to be measured where torchao is missing."""
    from shortllama import checkpoint, quantisation

    if any(g.subject.shape.quantised and g.key.runtime not in runtimes.SIMULATED for g in plan.groups):
        quantisation.require()
    for subject in {group.subject.name: group.subject for group in plan.groups}.values():
        place = subject.prune[0] if subject.prune else subject.folder
        if place and (Path(place) / "config.json").is_file():
            checkpoint.stored_tensors(Path(place), sources.from_folder(subject.name, Path(place)).shape)


def _filled(subject: Subject, run: Path) -> Subject:
    if subject.prune is None:
        return subject
    return msgspec.structs.replace(subject, folder=str(folder_of(run, subject)))


def _has_quality(file: Path, subjects: Iterable[Subject], texts: tuple[str, ...]) -> bool:
    if not file.exists():
        return not any(True for _ in subjects)
    found = read_evaluation(file).subjects
    return all(one.name in found and set(texts) <= found[one.name].perplexity.keys() for one in subjects)


def _supervise(task: Task, variables: Mapping[str, str], report: Report) -> None:
    children.serve(children.TORCH_MODULES, variables)
    with children.Child(work, msgspec.json.encode(task), variables) as child:
        while True:
            try:
                message = _DECODER.decode(child.receive(None))
            except children.Ended as end:
                raise InputError(
                    f"preparing the subjects ended early ({end.reason}); is there enough memory?"
                ) from None
            if isinstance(message, Done):
                return
            if isinstance(message, Step):
                report(message.what, message.done, message.total)
            elif message.expected:
                raise InputError(message.text)
            else:
                raise RuntimeError(message.text)


# -- inside the child --------------------------------------------------------------------------------------------------


def work(job: bytes, send: Callable[[bytes], None]) -> None:
    """Entry of the child: do a Task, report each step."""
    import torch

    task = msgspec.json.decode(job, type=Task)
    torch.set_num_threads(task.threads)

    def report(what: str, done: int, total: int) -> None:
        send(msgspec.json.encode(Step(what, done, total)))

    try:
        for subject, folder in task.pruned:
            _prune(subject, Path(folder), task.seed, report)
        if task.evaluated:
            write_evaluation(Path(task.file), Evaluation(_evaluate(task, report)))
    except ShortllamaError as error:
        send(msgspec.json.encode(Refused(str(error), True)))
    except Exception as error:  # told apart from a user's mistake, and raised again by the parent
        send(msgspec.json.encode(Refused(f"{type(error).__name__}: {error}", False)))
    else:
        send(msgspec.json.encode(Done()))


def _prune(subject: Subject, folder: Path, seed: int, report: Report) -> None:
    from shortllama import checkpoint

    assert subject.prune is not None
    base, method, ratio = subject.prune
    source = _source(base)
    scoring = pruning.Scoring(seed=seed)

    def named(what: str, done: int, total: int) -> None:
        report(f"{subject.name}: {what}", done, total)

    plan, _ = pruning.choose(source, pruning.Choice(method, Target("ratio", ratio)), scoring, progress=named)
    checkpoint.write(sources.fetch(source), plan, folder, progress=partial(named, "writing"))
    held = sources.from_folder(subject.name, folder).shape
    if held != msgspec.structs.replace(subject.shape, quantised=""):
        raise InputError(f"subject {subject.name}: pruning left {held.parameters:,} parameters, not as planned")


def _evaluate(task: Task, report: Report) -> dict[str, Quality]:
    """Perplexities by subject; the subjects of one base one after another, their texts prepared once."""
    found: dict[str, Quality] = {}
    ordered = sorted(task.evaluated, key=lambda one: one.dense)
    for dense, members in groupby(ordered, key=lambda one: one.dense):
        together = list(members)
        prepared = _Texts(_base(dense, together[0], task.texts), task)
        for subject in together:
            found[subject.name] = prepared.measure(subject, report)
    return {one.name: found[one.name] for one in task.evaluated}


class _Texts:
    """The texts of one base's subjects, prepared with its tokenizer, `self` sampled from it."""

    def __init__(self, base: sources.Source, task: Task) -> None:
        from shortllama.evaluation import perplexity

        self._perplexity: Any = perplexity
        model, tokenizer = pruning.load(base)
        self._texts = {
            src: perplexity.prepare(src, tokenizer=tokenizer, dense=model, seed=task.seed) for src in task.texts
        }

    def measure(self, subject: Subject, report: Report) -> Quality:
        """Return a subject's perplexity on every text."""
        assert subject.folder is not None
        source = _source(subject.folder)
        held = msgspec.structs.replace(source.shape, quantised=subject.shape.quantised)
        model, _ = pruning.load(msgspec.structs.replace(source, shape=held))
        found = {}
        for src, text in self._texts.items():
            found[src] = self._perplexity.measure(model, text)
            report(f"{subject.name}: perplexity on {src}", 1, 1)
        return Quality(found)


def _base(dense: str, subject: Subject, texts: tuple[str, ...]) -> sources.Source:
    """The model that gives the texts: the dense one where text is sampled from it, else any with the tokenizer."""
    from shortllama.calibration import SELF
    from shortllama.evaluation import protocol

    if all(protocol.parse(src)[0] != SELF for src in texts):
        assert subject.folder is not None
        return _source(subject.folder)
    try:
        return sources.locate(dense)
    except InputError as error:
        raise InputError(
            f"text 'self' is sampled from the dense model of {subject.name}, which is not found: {error}; "
            "name a text file in $.perplexity instead"
        ) from error


def _source(place: str) -> sources.Source:
    """A folder or a hub id, as `Subject.folder` and `Subject.prune` hold them."""
    folder = Path(place)
    if folder.is_dir() and folder.resolve() != sources.REFERENCE_FOLDER.resolve():
        return sources.from_folder(place, folder)
    return sources.locate(sources.REFERENCE if folder.is_dir() else place)
