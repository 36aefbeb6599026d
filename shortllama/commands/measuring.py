"""The verb that measures what matters in a model: `score`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shortllama import console, display, journal, options, pruning, sources
from shortllama import scores as score_files
from shortllama.commands import groups
from shortllama.commands.resuming import resumable
from shortllama.errors import InputError

Out = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Write the scores here; for several criteria a folder, with NAME.json for each."),
]


def score(
    model: options.Model,
    criterion: options.Criterion,
    *,
    measuring: groups.Measuring,
    calibrating: groups.Calibrating,
    out: Out = None,
    as_json: options.Json = False,
) -> None:
    """Measure how important each block, module, or KV group and neuron of a model is; higher = keep.

    Several criteria, as in `bi,angular`, share the model, the calibration and, where they only watch it, one pass over
    it. --iterative removes one after the other until one is left; plan takes as many of them as it needs. A run with
    --out that is killed goes on from its last finished part when it is started again.
    """
    names = tuple(dict.fromkeys(one.strip() for one in criterion.split(",")))
    source = sources.locate(model)
    files = _outputs(out, names)
    journals = {name: journal.beside(path) for name, path in files.items()}
    with resumable(files.values()):
        with console.steps() as progress:
            found = pruning.score_all(
                source,
                names,
                groups.scoring(measuring, calibrating),
                unit=measuring.unit,
                steps=pruning.Steps() if measuring.iterative else None,
                variant=groups.variant(measuring),
                progress=progress,
                journals=journals,
                note=console.note,
            )
        for name, path in files.items():
            path.parent.mkdir(exist_ok=True)
            score_files.write_scores(path, found[name])
            console.say(f"wrote {path}")
    if as_json:
        console.emit(found[names[0]] if len(names) == 1 else {"scores": found})
        return
    for scores in found.values():
        display.show_scores(scores)


def _outputs(out: Path | None, names: tuple[str, ...]) -> dict[str, Path]:
    """Return the file for each criterion's scores, after checking that it can be written; none without `out`."""
    if out is None:
        return {}
    if len(names) == 1:
        options.check_output_file(out)
        return {names[0]: out}
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file, and {len(names)} criteria make {len(names)}; give --out a folder")
    paths = {name: out / f"{name}.json" for name in names}
    for path in paths.values() if out.is_dir() else [out]:
        options.check_output_file(path)
    return paths
