"""Doing a study: every pruned model once, every run of it, a row for each. The shell around the verbs that do the work.

A study's folder: `study.toml`, `study.jsonl` (rows), `dense.json` and `quality.json` (the dense model alone, and with
all results, by subject); `pruned/ID/` with plan.json, scores.json and eval.json of each pruned model; `runs/ID/` with
plan.json, eval.json and retraining.json; `text/`, what the dense model wrote to learn from. Weights lie in `model/`
inside the folders, and go once nothing needs them, unless the study keeps them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from shortllama import files, journal, methods, plans, pruning, sources, study, texts
from shortllama.errors import InputError, ShortllamaError
from shortllama.evaluation.results import Evaluation, Quality, read_evaluation, write_evaluation
from shortllama.plans import Plan, Target
from shortllama.retraining import named, record
from shortllama.retraining.recipes import Recipe, Stage
from shortllama.scores import Cost, Scores, read_scores, write_scores
from shortllama.sources import Source
from shortllama.studies import rows
from shortllama.studies.rows import Row
from shortllama.study import Pruned, Retraining, Run, Study

QUALITY = "quality.json"
MARK = "study.toml"
EVAL, PLAN, SCORES, MODEL = "eval.json", "plan.json", "scores.json", "model"

Step = Callable[..., None]


class Settings(msgspec.Struct, frozen=True):
    """Where to compute and to look for data; no part of what is found."""

    device: str | None = None
    data_dir: Path | None = None
    trust_remote_code: bool = False
    save_every_s: float = 60.0


@dataclass
class Work:
    """A study being done in the folder `out`. `step(what, done, total, loss)` and `note(sentence)` tell a person."""

    study: Study
    source: Source
    out: Path
    settings: Settings
    step: Step
    note: Callable[[str], None]
    meter: Any = None
    runs: tuple[Run, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.runs = study.grid(self.study)

    def go(self) -> tuple[str, ...]:
        """Do what is left of the study; return what failed, one line each. Finished runs are never repeated."""
        failed: list[str] = []
        with rows.writer(self.out) as file:
            done = {row.id for row in rows.read(self.out)}
            self._dense()
            self.step("runs", len(done), len(self.runs))
            try:
                for pruned, group in groupby(self.runs, key=lambda run: run.pruned):
                    self._group(pruned, list(group), file, done, failed)
            finally:
                self._write_quality()
        return tuple(failed)

    def _group(self, pruned: Pruned, group: list[Run], file: BinaryIO, done: set[str], failed: list[str]) -> None:
        """Do the runs of one pruned model that are left, adding to what is done or has failed."""
        for run in [run for run in group if run.id not in done]:
            try:
                rows.append(file, self._run(run))
            except ShortllamaError as error:
                failed.append(f"{run.id}: {error}")
                continue
            done.add(run.id)
            self.step("runs", len(done), len(self.runs))
        for run in group:
            if run.id in done:
                self._tidy(self.out / "runs" / run.id)
                self._tidy(self.out / "runs" / run.plain.id)
        if all(run.id in done for run in group):
            self._tidy(self.out / "pruned" / pruned.id)

    # -- what is evaluated --------------------------------------------------------------------------------------------

    def _dense(self) -> None:
        file = self.out / "dense.json"
        found = dict(read_evaluation(file).subjects) if file.exists() else {}
        for held in ("", *(one for one in self.study.quantised if one != study.NONE)):
            source = _held(self.source, held)
            if source.name not in found:
                found[source.name] = self._measure(source, "dense")
                write_evaluation(file, Evaluation(found))

    def _measure(self, source: Source, what: str) -> Quality:
        from shortllama.studies.measuring import Meter

        if self.meter is None:
            self.meter = Meter(self.source, self.study.evaluation, self.settings)
        return self.meter.measure(source, lambda of, done, total: self.step(f"{what}: {of}", done, total))

    def _write_quality(self) -> None:
        subjects = dict(read_evaluation(self.out / "dense.json").subjects)
        for row in rows.read(self.out):
            base = row.subject.partition(" + ")[0]
            subjects[base] = row.before
            subjects[row.subject] = row.result
        write_evaluation(self.out / QUALITY, Evaluation(subjects))

    # -- one run ------------------------------------------------------------------------------------------------------

    def _run(self, run: Run) -> Row:
        base = self.out / "pruned" / run.pruned.id
        if not (base / EVAL).exists():
            self._prepare(run.pruned, base)
        folder = self.out / "runs" / run.id
        folder.mkdir(parents=True, exist_ok=True)
        before = read_evaluation(base / EVAL).subjects[run.pruned.subject]
        plan, after, costs = plans.read_plan(base), None, self._costs(base)
        if run.recipe is not None:
            if not (base / MODEL).exists():
                self._weights(run.pruned, base)
            taught = self.out / "runs" / run.plain.id / MODEL  # once, however its weights are then held
            self._retrain(base / MODEL, run.recipe, run.seed or 0, taught, run.id)
            after = self._measure(_held(sources.from_folder(run.plain.subject, taught), run.quantised), run.id)
            known = record.read(taught)
            assert known is not None, "just retrained"
            files.write_atomically(folder / record.FILE, files.encode_json(known))
            mine = known.stages[len(known.stages) - len(self._recipe(run.recipe, 0).stages) :]
            costs |= _named("retraining", [one.cost for one in mine])
        elif run.quantised:
            if not (base / MODEL).exists():
                self._weights(run.pruned, base)
            after = self._measure(_held(sources.from_folder(run.pruned.subject, base / MODEL), run.quantised), run.id)
        elif self.study.keep_weights:
            self.note(f"{run.id}: its weights are in {base / MODEL}")
        write_evaluation(folder / EVAL, Evaluation({run.subject: after or before}))
        plans.write_plan(folder / PLAN, plan)
        return self._row(run, plan, before, after, costs)

    def _row(self, run: Run, plan: Plan, before: Quality, after: Quality | None, costs: Mapping[str, Cost]) -> Row:
        pruned = run.pruned
        return Row(
            id=run.id,
            pruned=pruned.id,
            subject=run.subject,
            model=pruned.model,
            method=pruned.method.method,
            label=pruned.method.label,
            unit=pruned.method.unit or methods.lookup(pruned.method.method).unit,
            iterative=pruned.method.iterative,
            steps=pruned.method.steps,
            ratio=pruned.ratio,
            achieved=plan.achieved,
            parameters=plans.shape_of(plan, self.source.shape).parameters,
            calibration=pruned.calibration,
            recipe=run.made,
            seed=pruned.seed if run.seed is None else run.seed,
            before=before,
            after=after,
            costs=dict(costs),
        )

    def _recipe(self, one: Retraining, seed: int) -> Recipe:
        return one.of(seed, positions(self.source))

    def _retrain(self, model: Path, one: Retraining, seed: int, out: Path, what: str) -> None:
        """Retrain the folder `model` into `out`, going on where that was stopped; done already is fine."""
        if (out / PLAN).exists():
            return
        recipe = self._recipe(one, seed)
        learns = any(stage.learns == "teacher" for stage in recipe.stages)
        given = one.data if len(one.data) > 1 else one.data * len(recipe.stages)
        settings = named.Settings(
            tuple(self._text(src, stage) for src, stage in zip(given, recipe.stages, strict=True)),
            self.study.model if learns else None,
            resume=True,
            save_every_s=self.settings.save_every_s,
            data_dir=self.settings.data_dir,
            trust_remote_code=self.settings.trust_remote_code,
            device=self.settings.device,
        )
        named.retrain(
            sources.from_folder(out.name, model),
            recipe,
            settings,
            out,
            progress=lambda of, done, total, loss: self.step(f"{what}: {of}", done, total, loss),
            prepared=lambda of, done, total: self.step(f"{what}: {of}", done, total),
        )

    # -- one pruned model ---------------------------------------------------------------------------------------------

    def _prepare(self, pruned: Pruned, folder: Path) -> None:
        """Score, prune and evaluate; what is finished of it on disk is not done again."""
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / MODEL).exists():
            self._weights(pruned, folder)
        quality = self._measure(sources.from_folder(pruned.subject, folder / MODEL), pruned.id)
        write_evaluation(folder / EVAL, Evaluation({pruned.subject: quality}))

    def _weights(self, pruned: Pruned, folder: Path) -> None:
        if pruned.between is not None:
            self._in_steps(pruned, pruned.between, folder)
            return
        target = Target("ratio", pruned.ratio)
        plan, scores = self._choose(pruned, self.source, target, folder, self._scores(pruned, folder))
        pruning.write(self.source, plan, folder / MODEL, scores=scores, progress=self._steps(pruned.id))

    def _scores(self, pruned: Pruned, folder: Path) -> Scores | None:
        """Return scores on disk that decide this model too: its own, or those of another ratio."""
        alike = [one.pruned.id for one in self.runs if pruned.scored_as and one.pruned.scored_as == pruned.scored_as]
        for known in (folder, *(self.out / "pruned" / name for name in alike)):
            if (known / SCORES).exists():
                return read_scores(known / SCORES)
        return None

    def _choose(
        self,
        pruned: Pruned,
        source: Source,
        target: Target,
        folder: Path,
        scores: Scores | None,
        ids: str | None = None,
    ) -> tuple[Plan, Scores]:
        """Choose what goes of `source`, keeping plan and scores in `folder`."""
        used = pruned.calibration or study.Calibration()
        scoring = pruning.Scoring(
            calibration=ids or used.source,
            samples=used.samples,
            length=used.length,
            seed=pruned.seed or 0,
            data_dir=self.settings.data_dir,
            trust_remote_code=self.settings.trust_remote_code,
            device=self.settings.device,
        )
        row, partial = pruned.method, journal.beside(folder / SCORES)
        choice = pruning.Choice(
            row.method,
            target,
            protect=row.protect,
            align=row.align,
            unit=row.unit,
            iterative=row.iterative,
            variant=row.variant,
        )
        plan, found = pruning.choose(
            source, choice, scoring, scores, progress=self._steps(pruned.id), note=self.note, journal=partial
        )
        assert found is not None, "a source with weights"
        write_scores(folder / SCORES, found)
        plans.write_plan(folder / PLAN, plan)
        journal.discard(partial)
        return plan, found

    def _in_steps(self, pruned: Pruned, between: Retraining, folder: Path) -> None:
        """Remove a part, retrain, score what is left, and so on (Shortened LLaMA, Figure 5); goes on at any part.

        All parts are scored on the same tokens: text `self` is that of the dense model.
        """
        from shortllama import checkpoint, surgery

        current, whole = self.source, None
        parts = study.targets(pruned.method, pruned.ratio, len(self.source.shape.blocks))
        ids = self._sampled_ids(pruned)
        for number, target in enumerate(parts, 1):
            here = folder / f"step-{number}"
            here.mkdir(exist_ok=True)
            last = number == len(parts)
            cut = folder / MODEL if last else here / "pruned"
            if not (cut / PLAN).exists():
                known = read_scores(here / SCORES) if (here / SCORES).exists() else None
                part, _ = self._choose(pruned, current, target, here, known, ids)
                joined = part if whole is None else plans.compose(whole, part, self.source.shape)
                origin = sources.fetch(current)
                taught = record.read(origin)
                documents = {} if taught is None else {record.FILE: files.encode_json(taught)}
                model, _ = checkpoint.load(origin)
                checkpoint.save(surgery.apply(part, model), joined, cut, companions=origin, documents=documents)
            whole = plans.read_plan(cut)
            if not last:
                self._retrain(cut, between, pruned.seed or 0, here / MODEL, f"{pruned.id} step {number}")
                current = sources.from_folder(f"{pruned.id} step {number}", here / MODEL)
        assert whole is not None, "two parts or more"
        plans.write_plan(folder / PLAN, whole)
        taught = record.read(folder / MODEL)
        assert taught is not None, "retrained between parts"
        files.write_atomically(folder / record.FILE, files.encode_json(taught))

    def _sampled_ids(self, pruned: Pruned) -> str | None:
        """Return the calibration that all parts share where it is text of the dense model; None where text is given."""
        used = pruned.calibration
        if used is None or used.source != study.SELF:
            return None
        return self._sampled(used.samples, used.length, pruned.seed or 0)

    def _text(self, src: str, stage: Stage) -> str:
        """Return what a stage learns from: text of the dense model from a file, so that it is sampled once for all."""
        from shortllama.retraining import examples

        return self._sampled(examples.wanted(stage), stage.length, stage.seed) if src == study.SELF else src

    def _sampled(self, samples: int, length: int, seed: int) -> str:
        """Return the source of text that the dense model writes, kept in a file."""
        from shortllama import calibration

        file = self.out / "text" / f"self-{samples}x{length}-s{seed}.jsonl"
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            model, tokenizer = pruning.load(self.source, device=self.settings.device)
            drawn = calibration.load(
                calibration.SELF,
                tokenizer=tokenizer,
                model=model,
                samples=samples,
                length=length,
                seed=seed,
                progress=lambda done, total: self.step(f"text by {self.study.model}", done, total),
            )
            lines = (msgspec.json.encode(ids.tolist()) for ids in drawn.sequences)
            files.write_atomically(file, b"\n".join(lines) + b"\n")
        return f"{texts.IDS}{file}"

    # -- the rest -----------------------------------------------------------------------------------------------------

    def _costs(self, base: Path) -> dict[str, Cost]:
        """Return what a pruned model cost: scoring, all steps of it, and retraining between them."""
        parts = sorted(base.glob("step-*")) or [base]
        scored = [cost for part in parts if (cost := read_scores(part / SCORES).cost) is not None]
        taught = record.read(base)
        return {**_named("scoring", scored), **_named("between", [one.cost for one in taught.stages] if taught else [])}

    def _steps(self, what: str) -> Callable[[str, int, int], None]:
        return lambda of, done, total: self.step(f"{what}: {of}", done, total)

    def _tidy(self, folder: Path) -> None:
        """Remove the weights in a finished folder."""
        if not self.study.keep_weights:
            for path in (folder / MODEL, *folder.glob(f"step-*/{MODEL}"), *folder.glob("step-*/pruned")):
                files.remove_folder(path)


def _held(source: Source, held: str) -> Source:
    """The model with its weights held as int8 or int4; "" leaves them."""
    if not held:
        return source
    shape = msgspec.structs.replace(source.shape, quantised=held)
    return msgspec.structs.replace(source, name=f"{source.name}+{held}", shape=shape)


def _named(name: str, costs: list[Cost]) -> dict[str, Cost]:
    found = rows.total(costs)
    return {} if found is None else {name: found}


def positions(source: Source) -> int | None:
    """Return how many positions a model has, None where its config does not say."""
    found = (source.config or {}).get("max_position_embeddings")
    return found if isinstance(found, int) else None


def dense_quality(out: Path) -> Quality | None:
    """Return the evaluation of a study's dense model, None before there is one."""
    file = out / "dense.json"
    return next(iter(read_evaluation(file).subjects.values())) if file.exists() else None


def begin(given: Study, text: bytes, out: Path, *, resume: bool) -> None:
    """Make the study's folder, or check that it holds this study. Raises InputError naming what does not fit."""
    files.check_folder(out, MARK)
    if (out / MARK).exists() and not resume:
        raise InputError(f"{out}: holds a study already; give --resume to go on with it, or another --out")
    if (out / MARK).exists():
        held = study.read(out / MARK)
        if (held.model, held.evaluation) != (given.model, given.evaluation):
            raise InputError(f"{out}: holds a study of another model or evaluation; give another --out")
    known = {run.id for run in study.grid(given)}
    for row in rows.read(out):
        if row.id not in known:
            raise InputError(f"{out}: holds the run {row.id}, which is no part of this study; give another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror})") from error
    files.write_atomically(out / MARK, text)
