"""The verb `eval`: what a model is worth, in perplexity, in zero-shot accuracy and in its own words."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shortllama import console, options, sources
from shortllama.evaluation import shown, tasks
from shortllama.evaluation.results import write_evaluation

Ppl = Annotated[
    list[str] | None,
    typer.Option(
        metavar="SRC[@PROTOCOL]",
        help="Perplexity on this text (as --calibration of score), under a protocol: paper (default), paper-bos, 2048, "
        "or window=512,stride=256,bos=none,layout=documents. May be repeated.",
    ),
]
TaskNames = Annotated[
    str | None,
    typer.Option(
        "--tasks", metavar="NAMES", help=f"Zero-shot tasks: {','.join(tasks.TASKS)}; or all, the paper's seven."
    ),
]
TaskData = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Read the tasks' items from files here, not from the hub.")
]
Against = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="Also: KL divergence from and agreement with this model on every text, its own text beside.",
    ),
]
Generate = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PROMPT", help="Write on from this, greedily and drawn; @paper: the paper's. May be repeated."
    ),
]
NewTokens = Annotated[int, typer.Option(min=1, help="Tokens to write after each prompt.")]
Limit = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="At most N windows of each text and N items of each task.")
]


def evaluate(
    model: options.Model,
    ppl: Ppl = None,
    against: Against = None,
    task_names: TaskNames = None,
    task_data: TaskData = None,
    generate: Generate = None,
    new_tokens: NewTokens = 64,
    limit: Limit = None,
    seed: options.Seed = 0,
    data_dir: options.DataDir = None,
    trust_remote_code: options.Trust = False,
    device: options.Device = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the evaluation here.")] = None,
    as_json: options.Json = False,
) -> None:
    """Measure what a model is worth: perplexity, zero-shot accuracy, text; with the protocol beside each number.

    MODEL+int8 and MODEL+int4 are the same model with the weights of its blocks quantised.
    """
    from shortllama.evaluation import named

    options.check_output_file(out)
    wanted = named.Wanted(
        texts=tuple(ppl or ()),
        tasks=() if task_names is None else tuple(tasks.lookup(task_names)),
        task_data=task_data,
        prompts=tuple(generate or ()),
        tokens=new_tokens,
        against=None if against is None else sources.locate_held(against),
        limit=limit,
        seed=seed,
        data_dir=data_dir,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    with console.steps() as progress:
        source = sources.locate_held(model)
        found = named.evaluate(source, wanted, progress, note=lambda text: console.say(f"note: {text}"))
    if out is not None:
        write_evaluation(out, found)
        console.say(f"wrote {out}")
    if as_json:
        console.emit(found)
    else:
        shown.show(found)
