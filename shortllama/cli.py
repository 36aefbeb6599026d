"""The core's verbs as one typer application, which `bench.cli` mounts beside its own."""

from __future__ import annotations

from collections.abc import Callable

import typer

from shortllama.commands import evaluating, groups, measuring, planning, retraining, shapes, studying, writing

# In the order of `--help`: the name, the verb, an example of it.
VERBS: list[tuple[str, Callable[..., None], str]] = [
    ("shapes", shapes.shapes, "llama-7b/depth-26"),
    ("score", measuring.score, "reference --criterion ppl --out scores.json"),
    ("plan", planning.plan, "llama-7b --method wanda-sp --ratio 0.2 --out plan.json"),
    ("compose", planning.compose, "depth.json width.json --out both.json"),
    ("show", planning.show, "plan.json"),
    ("diff", planning.diff, "taylor.json ppl.json"),
    ("prune", writing.prune, "reference --method ppl --ratio 0.25 --out pruned"),
    ("verify", writing.verify, "pruned --against reference"),
    ("export", writing.export, "pruned --to padded --out uniform"),
    ("retrain", retraining.retrain, "pruned --recipe lora --data alpaca.json --out retrained"),
    ("eval", evaluating.evaluate, "pruned --ppl wikitext2 --against reference --generate @paper --out quality.json"),
    ("study", studying.study, "reference --dry-run"),
]

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
for name, verb, example in VERBS:
    app.command(name, epilog=f"Example: shortllama {name} {example}")(groups.flat(verb))
