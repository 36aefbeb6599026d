"""The options that several commands share, declared once, and what they mean as values. Light imports only.

What is checked here is what a single option can get wrong; what depends on the model is checked by the library.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from shortllama import criteria, files, methods, removals, variants
from shortllama.errors import InputError
from shortllama.plans import Target

MODEL_HELP = "A folder, a Hugging Face id, 'reference' (ships with the package) or a catalogue name such as llama-7b."

Model = Annotated[str, typer.Argument(help=MODEL_HELP, show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout; everything else on stderr.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random: sampled text, random choices.")]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Let a model folder run the Python code of its tokenizer.")
]
Device = Annotated[
    str | None,
    typer.Option(metavar="cpu|cuda:N", help="Where to compute. Default: the first CUDA device, else the CPU."),
]

Criterion = Annotated[
    str,
    typer.Option(
        metavar="NAME[,NAME...]", help=f"What to measure: {', '.join(criteria.CRITERIA)}.", show_default=False
    ),
]

# -- calibration: what `score` takes, and `plan` and `prune` where they score first -----------------------------------

Calibration = Annotated[
    str,
    typer.Option(
        metavar="SRC",
        help="Text or JSONL file, ids:FILE.jsonl, a short name (wikitext2, ptb, c4, bookcorpus, alpaca: in --data-dir, "
        "else on the hub), hf:NAME[:CONFIG[:SPLIT]], or 'self' (sampled from the model).",
    ),
]
Samples = Annotated[int, typer.Option(min=1, help="Number of calibration sequences.")]
Length = Annotated[int, typer.Option(min=2, help="Tokens in each calibration sequence.")]
DataDir = Annotated[
    Path | None,
    typer.Option(envvar="SHORTLLAMA_DATA", help="Where short names such as wikitext2 are looked up.", metavar="DIR"),
]

Unit = Annotated[
    removals.Unit | None,
    typer.Option(help="Whole blocks, or attention and FFNs apart (module). Default: what the criterion is for."),
]
Iterative = Annotated[
    bool, typer.Option("--iterative", help="Score what is left again after each removal, instead of once.")
]
_REDUCTIONS = f"{', '.join(criteria.REDUCTIONS)} (mag and taylor)."
WeightReduction = Annotated[str, typer.Option(help=f"Over the output neurons of each weight: {_REDUCTIONS}")]
BlockReduction = Annotated[str, typer.Option(help=f"Over the weights of each block or module: {_REDUCTIONS}")]

Metric = Annotated[str | None, typer.Option(help=f"What flap measures: {', '.join(variants.METRICS)}.")]
Estimator = Annotated[
    str | None, typer.Option(help=f"What llm-pruner measures of a weight: {', '.join(variants.ESTIMATORS)}.")
]
GroupReduction = Annotated[
    str | None, typer.Option(help=f"Over llm-pruner's coupled weights: {', '.join(variants.GROUP_REDUCTIONS)}.")
]

# -- choosing: what `plan` takes, and `prune` where no plan is given --------------------------------------------------

_METHODS = f"How to choose: {', '.join(methods.METHODS)}."
Method = Annotated[str | None, typer.Option(help=_METHODS)]
Preset = Annotated[
    str | None,
    typer.Option(help="Remove the blocks that were published for this model, such as paper-llama-7b-taylor-20."),
]
Ratio = Annotated[
    float | None,
    typer.Option(help="Share to remove, between 0 and 1: of the blocks, or of heads and neurons for width methods."),
]
Blocks = Annotated[int | None, typer.Option(help="Number of blocks to remove.")]
TargetParams = Annotated[float | None, typer.Option(metavar="P", help="Parameters to come down to, such as 5.4e9.")]
AtMost = Annotated[bool, typer.Option("--at-most", help="With --target-params: never leave more than P.")]
Protect = Annotated[
    str | None,
    typer.Option(metavar="FIRST,LAST", help="Blocks at either end that must stay, such as 4,2. Default: the method's."),
]
Align = Annotated[int, typer.Option(min=1, help="Round kept widths up to a multiple of this (width methods).")]
_ALLOTTED = (
    f"{', '.join(variants.STRUCTURES['flap'])} (flap: adaptive, manual or uniform layers, modules), "
    f"{', '.join(variants.STRUCTURES['llm-pruner'])} (llm-pruner)"
)
Structure = Annotated[str | None, typer.Option(help=f"How widths are allotted to blocks and modules: {_ALLOTTED}.")]
Axis = Annotated[
    str | None,
    typer.Option(
        metavar="|".join(variants.AXES),
        help="What goes of attentions: KV heads with their query heads, or as many query heads of every KV head.",
    ),
]
VariantSteps = Annotated[
    int | None, typer.Option("--steps", metavar="N", help="Prune in N steps, each scored anew (llm-pruner).")
]
RemoveHeads = Annotated[
    int | None, typer.Option(metavar="N", help="KV heads to remove over all blocks (structures AL-MM and UL-MM).")
]
ScoresFile = Annotated[
    Path | None, typer.Option("--scores", metavar="FILE", help="Use these scores (from score --out), score nothing.")
]


def optional_target(ratio: float | None, blocks: int | None, target_params: float | None) -> Target | None:
    """Return the one target given (planning checks its range), None for none. Raises InputError for several."""
    given = {"--ratio": ratio, "--blocks": blocks, "--target-params": target_params}
    chosen = [(name, value) for name, value in given.items() if value is not None]
    if len(chosen) > 1:
        seen = " and ".join(f"{name} {value:g}" for name, value in chosen)
        raise InputError(f"give exactly one of {', '.join(given)}; saw {seen}")
    return Target(chosen[0][0].removeprefix("--"), chosen[0][1]) if chosen else None


def required(target: Target | None) -> Target:
    """Return the target. Raises InputError for None."""
    if target is None:
        raise InputError("give exactly one of --ratio, --blocks, --target-params; saw none")
    return target


def protection(text: str | None) -> tuple[int, int] | None:
    """Return FIRST,LAST as two counts; None for None. Raises InputError for anything else."""
    if text is None:
        return None
    parts = text.split(",")
    if len(parts) != 2 or not all(part.strip().isdecimal() for part in parts):
        raise InputError(f"--protect {text!r} is not two counts; write FIRST,LAST such as 4,2")
    return int(parts[0]), int(parts[1])


def check_output_file(path: Path | None) -> None:
    """Raise InputError where `path` could not be written, before any long work. None is fine."""
    if path is None:
        return
    if path.is_dir():
        raise InputError(f"{path}: is a folder; give --out a file name")
    if not path.parent.is_dir():
        raise InputError(f"{path}: there is no folder {path.parent}; create it or give another --out")
    _check_writable(path, path.parent)


def check_output_folder(path: Path, mark: str = "plan.json") -> None:
    """Raise InputError where `path` could not become a folder of ours, marked by `mark`, before any long work."""
    files.check_folder(path, mark)
    _check_writable(path, next(above for above in path.absolute().parents if above.exists()))


def _check_writable(path: Path, above: Path) -> None:
    if not above.is_dir():
        raise InputError(f"{path}: {above} is a file; give another --out")
    if not os.access(above, os.W_OK):
        raise InputError(f"{path}: cannot be written (no permission for {above}); give another --out")
