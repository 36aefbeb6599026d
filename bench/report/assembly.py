"""Results into a Report: the pure middle of the package. Nothing is read, drawn or written here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from bench import findings, regimes
from bench.report import hardware, holdings, paper_causes, paper_tables, series, trend, verdicts
from bench.report.predictions import errors
from bench.report.sources import Origin, combine, describe
from bench.report.summaries import Grid, grid, setting_of
from bench.report.tables import tables
from bench.report.values import Report, Source
from bench.report.wording import Commands
from bench.store import Results
from shortllama.evaluation.results import Perplexity, Quality
from shortllama.shape import ModelShape

SIMULATED = "Rows marked simulated come from an analytic model with a virtual clock; no device ran them."
EMULATED = "Memory budgets are emulated on a device that has more: kernels, cores and bandwidth are its own."


def build(
    results: Sequence[Results],
    quality: Mapping[str, Quality] | None = None,
    origins: Sequence[Origin] = (),
    shapes: Mapping[str, ModelShape] | None = None,
) -> Report:
    """Return the report on these runs; `quality` is by subject, `origins` is parallel to `results` where given.

    `shapes`: of the subjects that are at hand, for which the error of predictions can be told.

    Time and memory grow linearly with the rows.
    """
    origins = [*origins, *(Origin(run=r.path.name) for r in results[len(origins) :])]
    judged = verdicts.judged(results)
    keys = verdicts.keys(judged, results)
    sources: dict[str, Source] = {}
    for place, (run, origin) in enumerate(zip(results, origins, strict=True)):
        for environment in run.environments.values():
            source = verdicts.named(describe(environment, origin), verdicts.side(judged, place))
            sources.setdefault(keys[place][environment.id], source)
    rows = [row for run in results for row in run.measurements]
    environments = {key: one for run in results for key, one in run.environments.items()}
    measured = grid(
        rows,
        [
            msgspec.structs.replace(row, environment=keys[place][row.environment])
            for place, run in enumerate(results) for row in run.frontiers
        ],
        sources,
        _perplexities(quality or {}),
        regimes.joined(rows, environments),
        errors(rows, environments, shapes or {}),
        shapes,
        [keys[place][row.environment] for place, run in enumerate(results) for row in run.measurements],
        verdicts.marks(judged, results, lambda place, row: setting_of(row, keys[place][row.environment])),
    )  # fmt: skip
    first = origins[0]
    history = trend.histories(results)
    found = findings.findings(measured, Commands(first.suite or "SUITE.toml", first.run or "RUN"))
    told = verdicts.findings(judged, [origin.run for origin in origins])
    found = (*told, *trend.findings(history, measured), *found)
    return Report(
        title=_title(measured, origins),
        source=combine(list(sources.values()), simulated=any(setting.simulated for setting in measured.groups)),
        verdict=findings.verdict(measured, found),
        findings=found,
        notes=_notes(measured),
        charts=(
            *series.charts(measured, (*series.CHARTS, *hardware.CHARTS, *holdings.CHARTS)),
            *trend.charts(history, measured),
        ),
        tables=(
            *verdicts.tables(judged, measured),
            *tables(measured),
            *paper_tables.tables(measured),
            *paper_causes.tables(measured),
            *trend.tables(history, measured),
        ),
        sources=tuple(sources.values()),
    )


def _perplexities(quality: Mapping[str, Quality]) -> dict[str, dict[str, Perplexity]]:
    return {subject: dict(result.perplexity) for subject, result in quality.items() if result.perplexity}


def _title(measured: Grid, origins: Sequence[Origin]) -> str:
    """Name the models and the machine: what a reader looks for among many reports."""
    dense = [measured.labels[s] for s in measured.subjects if s in measured.dense] or [
        measured.labels[s] for s in measured.subjects[:1]
    ]
    names = dense[0] if len(dense) == 1 else f"{dense[0]} and {len(dense) - 1} more"
    pruned = len(measured.subjects) - len(dense)
    devices = list(dict.fromkeys(source.device.partition(" · ")[0] for source in measured.sources.values()))
    where = devices[0] if len(devices) == 1 else f"{len(devices)} devices"
    simulated = all(setting.simulated for setting in measured.groups)
    what = f"{names} and {pruned} pruned shape{'' if pruned == 1 else 's'}" if pruned else names
    return f"{what} on {where}{' (simulated)' if simulated else ''}"


def _notes(measured: Grid) -> tuple[str, ...]:
    notes: list[str] = []
    if any(setting.simulated for setting in measured.groups):
        notes.append(SIMULATED)
    if any(row.row.emulated for row in measured.rows):
        notes.append(EMULATED)
    return tuple(notes)
