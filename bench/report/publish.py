"""The impure edge of the report: reads runs, draws, and writes one folder, all of it or nothing."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from bench import calibrated, store
from bench.report import assembly, delimited, evaluations, markdown, merging
from bench.report.sources import Origin, describe
from bench.report.studies import held, parts
from bench.report.studies.held import Held
from bench.report.values import Report, Source
from bench.run_folder import SUITE
from bench.store import Results
from shortllama import files, plans
from shortllama.errors import InputError
from shortllama.evaluation.results import read_evaluation

MARK = "index.html"
QUALITY = "quality.json"


def gather(runs: Sequence[Path]) -> tuple[Report, Sequence[Path]]:
    """Return the report on these runs, and those among them that hold measurements; the others are studies.

    Raises InputError where a run or study cannot be read or has no rows.
    """
    _need_one(runs)
    alone = [_given(run, None) for run in runs if _is_evaluation(run)]
    runs = [run for run in runs if not _is_evaluation(run)]
    if not runs:
        raise InputError(f"{alone[0].name}: an evaluation alone; give a run or a study beside it")
    studies = {run: held.read(run, _named(run)) for run in runs if held.is_study(run)}
    if all(run in studies and not store.file_of(run).exists() for run in runs):
        return evaluations.added(parts.report(list(studies.values())), alone), []
    measured = store.measured(runs)
    results = [store.read(run) for run in measured]
    others = [run for run in studies if run not in measured]
    given = [_given(run, studies.get(run)) for run in (*measured, *others)]
    quality, notes = merging.merged([*given, *alone])
    shapes = calibrated.shapes(row for one in results for row in one.measurements)
    report = assembly.build(results, quality, [_origin(run) for run in measured], shapes)
    report = parts.joined(report, list(studies.values()), notes)
    return evaluations.added(report, alone), measured


def write(runs: Sequence[Path], out: Path) -> Report:
    """Write the report on these runs into `out`: index.html, report.md, figures/, tables/ and the suites.

    Raises InputError where a run cannot be read or has no rows, and where `out` is not ours; nothing is written then.
    """
    _need_one(runs)
    files.check_folder(out, MARK)
    report, measured = gather(runs)
    studies = [run for run in runs if held.is_study(run)]
    with files.new_folder(out, MARK) as folder:
        try:
            _write_all(report, folder)
            for number, run in enumerate(measured, 1):
                suite = store.file_of(run).parent / SUITE
                if suite.is_file():  # so that the folder says on its own how to measure again
                    name = SUITE if len(measured) == 1 else f"suite-{number}.toml"
                    (folder / name).write_bytes(suite.read_bytes())
            for number, run in enumerate(studies, 1):
                if (run / held.STUDY).is_file():
                    name = held.STUDY if len(studies) == 1 else f"study-{number}.toml"
                    (folder / name).write_bytes((run / held.STUDY).read_bytes())
        except OSError as error:
            raise InputError(f"{out}: cannot be written ({error.strerror})") from error
    return report


def save(report: Report, out: Path) -> None:
    """Write a report that is there already into `out`, as `write` does. Raises InputError where `out` is not ours."""
    with files.new_folder(out, MARK) as folder:
        try:
            _write_all(report, folder)
        except OSError as error:
            raise InputError(f"{out}: cannot be written ({error.strerror})") from error


def sources(runs: Sequence[Path], results: Sequence[Results]) -> list[Source]:
    """Return where the rows of these runs come from, one source an environment."""
    found: dict[str, Source] = {}
    for run, one in zip(runs, results, strict=True):
        for environment in one.environments.values():
            found.setdefault(environment.id, describe(environment, _origin(run)))
    return list(found.values())


def _need_one(runs: Sequence[Path]) -> None:
    if not runs:
        raise InputError("no run given; name the folder of at least one (see shortllama sweep --out)")


def _named(folder: Path) -> str:
    """Return what a report calls a folder: where a machine keeps its files is nobody's business."""
    return folder.name if folder.is_absolute() else str(folder)


def _is_evaluation(path: Path) -> bool:
    """Return whether a path is a file of `shortllama eval`; rows are in .jsonl files, and runs are folders."""
    return path.is_file() and path.suffix == ".json"


def _given(run: Path, study: Held | None) -> merging.Given:
    """Return the qualities of a run, a study or a file of evaluations, and what plans left of which weights."""
    folder = store.file_of(run).parent
    if _is_evaluation(run):
        return merging.Given(_named(run), read_evaluation(run).subjects)
    quality = read_evaluation(folder / QUALITY).subjects if (folder / QUALITY).exists() else {}
    left: dict[str, str] = {}
    for path in sorted(folder.glob("subjects/*/plan.json")):
        plan = plans.read_plan(path)
        left[f"{plan.base.model}/{plan.method}:{plan.target.value:g}"] = merging.weights(plan)
    if study is not None:
        left |= {held.subject(row): merging.weights(study.plans[row.pruned]) for row in study.rows
                 if row.pruned in study.plans}  # fmt: skip
    return merging.Given(_named(folder), quality, left)


def _origin(run: Path) -> Origin:
    """Return what the run's folder says: its suite by name where it is a shipped one, else by the file kept there."""
    folder = store.file_of(run).parent
    named = _named(folder)
    if not (folder / SUITE).is_file():
        return Origin(named)
    suite = next((name for name in _shipped() if _same(name, folder / SUITE)), f"{named}/{SUITE}")
    return Origin(named, suite, shlex.join(["shortllama", "sweep", suite, "--out", "again"]))


def _shipped() -> list[str]:
    return [path.stem for path in sorted((Path(assembly.__file__).parents[1] / "suites").glob("*.toml"))]


def _same(name: str, copy: Path) -> bool:
    """Return whether a copy says what the shipped suite of that name says, comments aside."""
    from bench import cells

    try:
        return cells.read_suite(name) == cells.read_suite(str(copy))
    except InputError:  # an older suite: the run is still worth a report
        return False


def _write_all(report: Report, folder: Path) -> None:
    from bench.report import html
    from bench.report.figures.pictures import Picture, render

    figures, tables = folder / "figures", folder / "tables"
    figures.mkdir()
    tables.mkdir()
    pictures: dict[str, Picture] = {}
    for chart in report.charts:
        picture = pictures[chart.name] = render(chart)
        (figures / f"{chart.name}.png").write_bytes(picture.png)
        (figures / f"{chart.name}.svg").write_text(picture.svg, encoding="utf-8")
        (figures / f"{chart.name}.csv").write_text(delimited.chart(chart), encoding="utf-8")
    for table in report.tables:
        (tables / f"{table.name}.csv").write_text(delimited.table(table), encoding="utf-8")
    (folder / "report.md").write_text(markdown.render(report), encoding="utf-8")
    (folder / MARK).write_text(html.render(report, pictures), encoding="utf-8")
