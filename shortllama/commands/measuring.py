"""The verbs that measure a model: `score` what matters in it, `eval` what it is worth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shortllama import console, display, options, pruning, sources
from shortllama import scores as score_files
from shortllama.commands import groups
from shortllama.errors import InputError
from shortllama.evaluation.results import Evaluation, write_evaluation


def score(
    model: options.Model,
    criterion: options.Criterion,
    *,
    measuring: groups.Measuring,
    calibrating: groups.Calibrating,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the scores here.")] = None,
    as_json: options.Json = False,
) -> None:
    """Measure how important each block, module, or KV group and neuron of a model is; higher = keep.

    --iterative removes one after the other until one is left; plan takes as many of them as it needs.
    """
    options.check_output_file(out)
    with console.steps() as progress:
        scores = pruning.score(
            sources.locate(model),
            criterion,
            groups.scoring(measuring, calibrating),
            unit=measuring.unit,
            steps=pruning.Steps() if measuring.iterative else None,
            variant=groups.variant(measuring),
            progress=progress,
        )
    if out is not None:
        score_files.write_scores(out, scores)
        console.say(f"wrote {out}")
    if as_json:
        console.emit(scores)
    else:
        display.show_scores(scores)


def evaluate(
    model: options.Model,
    ppl: Annotated[
        list[str] | None,
        typer.Option(metavar="SRC", help="Perplexity on this text (as --calibration of score); may be repeated."),
    ] = None,
    seed: options.Seed = 0,
    data_dir: options.DataDir = None,
    trust_remote_code: options.Trust = False,
    device: options.Device = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the evaluation here.")] = None,
    as_json: options.Json = False,
) -> None:
    """Measure what a model is worth: perplexity, with the protocol (window, stride, BOS, tokens) beside each number."""
    options.check_output_file(out)
    if not ppl:
        raise InputError("nothing to evaluate; give --ppl SRC, for example --ppl self")
    source = sources.locate(model)
    with console.steps() as progress:
        quality = pruning.evaluate(
            source,
            ppl,
            seed=seed,
            data_dir=data_dir,
            device=device,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    found = Evaluation({pruning.base_name(source): quality})
    if out is not None:
        write_evaluation(out, found)
        console.say(f"wrote {out}")
    if as_json:
        console.emit(found)
    else:
        display.show_evaluation(found)
