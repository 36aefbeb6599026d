"""What studies add to a report, and the whole report where there is nothing else. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

import msgspec

from bench.report import quantities, wording
from bench.report.studies import beside, findings, pairing, series, tables
from bench.report.studies.held import Held
from bench.report.values import Chart, Finding, Report, Source, Table


class Parts(msgspec.Struct, frozen=True):
    """Everything of a report that studies give."""

    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()
    charts: tuple[Chart, ...] = ()
    tables: tuple[Table, ...] = ()
    sources: tuple[Source, ...] = ()


def parts(studies: Sequence[Held]) -> Parts:
    """Return what these studies give, one after the other; of several, each says which it is."""
    found = [_named(_of(held), held, place if len(studies) > 1 else 0) for place, held in enumerate(studies, 1)]
    return Parts(
        tuple(one for part in found for one in part.findings),
        tuple(dict.fromkeys(note for part in found for note in part.notes)),
        tuple(one for part in found for one in part.charts),
        tuple(one for part in found for one in part.tables),
        tuple(one for part in found for one in part.sources),
    )


def joined(report: Report, studies: Sequence[Held], notes: Sequence[str] = ()) -> Report:
    """Return a report on runs with what studies add to it; `notes`: on what was not merged."""
    made = parts(studies)
    briefs = [one.brief for one in made.findings if one.brief]
    return msgspec.structs.replace(
        report,
        verdict=" ".join([report.verdict, *briefs]),
        findings=(*report.findings, *made.findings),
        notes=(*report.notes, *notes, *made.notes),
        charts=(*report.charts, *made.charts),
        tables=(*report.tables, *made.tables),
        sources=(*report.sources, *made.sources),
    )


def report(studies: Sequence[Held]) -> Report:
    """Return the report on studies alone."""
    made = parts(studies)
    return Report(
        title=title(studies),
        source="; ".join(held.line for held in studies),
        verdict=verdict(studies, made.findings),
        findings=made.findings,
        notes=made.notes,
        charts=made.charts,
        tables=made.tables,
        sources=made.sources,
    )


def title(studies: Sequence[Held]) -> str:
    """Name the models and what was done to them."""
    models = list(dict.fromkeys(held.model for held in studies))
    pruned = len({(held.name, row.pruned) for held in studies for row in held.rows})
    retrained = any(row.after is not None for held in studies for row in held.rows)
    what = f"What pruning costs {wording.join(models)}: {wording.plural(pruned, 'pruned model')}"
    return quantities.inert(f"{what}, before and after retraining" if retrained else what)


def verdict(studies: Sequence[Held], found: Sequence[Finding]) -> str:
    """Return one paragraph: what the findings decide, then what it was drawn from."""
    runs = sum(len(held.rows) for held in studies)
    texts = dict.fromkeys(text for held in studies for text in held.texts)
    done = f"{wording.plural(runs, 'run')}, evaluated on {wording.join(list(texts))}"
    tasks = dict.fromkeys(task for held in studies for task in held.tasks)
    return " ".join([*(one.brief for one in found if one.brief), f"{done}{_and(list(tasks))}."])


def _and(tasks: Sequence[str]) -> str:
    return f" and {wording.plural(len(tasks), 'zero-shot task')} ({wording.join(tasks)})" if tasks else ""


def _of(held: Held) -> Parts:
    notes: list[str] = []
    if not pairing.is_papers(held):
        notes.append(
            f"{quantities.inert(held.model)} is a model of {quantities.count(held.parameters)} parameters and none "
            "of the paper's: beside the paper's numbers, only orders compare."
        )
    if held.dense is None:
        notes.append("The study's folder holds no evaluation of the dense model, and so no loss can be told.")
    absent = beside.absent(held)
    if absent:
        notes.append(
            f"The paper also compares, and study {quantities.inert(held.name)} does not: {wording.join(absent)}."
        )
    made = (*tables.tables(held, tables.RESULTS), *beside.tables(held), *tables.tables(held, tables.DETAILS))
    source = _source(held)
    drawn = tuple(msgspec.structs.replace(chart, origins=(source,)) for chart in series.charts(held))
    return Parts(findings.findings(held), tuple(notes), drawn, made, (source,))


def _source(held: Held) -> Source:
    file = f"{held.name}/study.toml"
    return Source(
        environment="",
        device=quantities.inert(held.device),
        versions=" · ".join(part for part in (f"torch {held.torch}" if held.torch else "", held.harness) if part),
        date="",
        run=quantities.inert(held.name),
        suite=quantities.inert(file) if held.given else "",
        command=shlex.join(["shortllama", "study", file, "--out", "again"]) if held.given else "",
    )


def _named(part: Parts, held: Held, place: int) -> Parts:
    """Give names of their own to what one of several studies holds."""
    if not place:
        return part
    suffix, of = f"-{place}", f" ({quantities.inert(held.name)})"
    renamed = {one.name: f"{one.name}{suffix}" for one in part.charts}
    replace = msgspec.structs.replace
    return Parts(
        tuple(replace(one, headline=f"{held.name}: {one.headline}", figure=renamed.get(one.figure, one.figure))
              for one in part.findings),
        part.notes,
        tuple(replace(one, name=renamed[one.name], title=one.title + of) for one in part.charts),
        tuple(replace(one, name=f"{one.name}{suffix}", title=one.title + of) for one in part.tables),
        part.sources,
    )  # fmt: skip
