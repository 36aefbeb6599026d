"""The verb that teaches a pruned model again: `retrain`."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from shortllama import console, display, options, sources
from shortllama.commands import groups
from shortllama.commands.writing import require
from shortllama.retraining import named, recipes, record

_NAMES = ", ".join(recipes.RECIPES)


class Scaling(groups.Group, frozen=True):
    """What of a recipe a person changes. None leaves the recipe's own."""

    steps: Annotated[
        int | None, typer.Option(metavar="N", help="Steps of each stage, instead of whole passes over the data.")
    ] = None
    batch: Annotated[int | None, typer.Option(metavar="N", help="Sequences that each step learns from.")] = None
    micro_batch: Annotated[
        int | None, typer.Option(metavar="N", help="Sequences computed at once: memory, never the result.")
    ] = None
    length: Annotated[
        int | None, typer.Option(metavar="T", help="Tokens of a window of text; where instructions are cut off.")
    ] = None
    lr: Annotated[float | None, typer.Option(metavar="RATE", help="Peak learning rate.")] = None
    schedule: Annotated[str | None, typer.Option(help=f"Its way to zero: {', '.join(recipes.SCHEDULES)}.")] = None
    rank: Annotated[int | None, typer.Option(metavar="R", help="Rank of the adapters (lora); alpha follows.")] = None
    temperature: Annotated[
        float | None, typer.Option(metavar="T", help="Softens teacher and student alike (distill).")
    ] = None
    hidden: Annotated[
        float | None, typer.Option(metavar="W", help="Weight of the hidden states' relative error (distill).")
    ] = None
    dtype: Annotated[
        str | None,
        typer.Option(help="What is computed in: bfloat16 (default on a GPU that has it) or float32 (elsewhere)."),
    ] = None
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Compute blocks twice instead of keeping what they computed.")
    ] = False
    seed: options.Seed = 0

    def of(self, name: str, positions: int | None) -> recipes.Recipe:
        """Return the recipe of that name with these changes; its windows fit `positions` unless a length is given."""
        found = recipes.scaled(
            recipes.lookup(name),
            steps=self.steps,
            batch=self.batch,
            micro_batch=self.micro_batch,
            length=self.length,
            rate=self.lr,
            schedule=self.schedule,
            rank=self.rank,
            temperature=self.temperature,
            hidden=self.hidden,
            dtype=self.dtype,
            checkpointing=self.checkpointing or None,
            seed=self.seed,
        )
        return found if self.length is not None else recipes.within(found, positions)


def retrain(
    model: options.Model,
    recipe: Annotated[str, typer.Option(help=f"How: {_NAMES}.", show_default=False)],
    data: Annotated[
        list[str],
        typer.Option(
            metavar="SRC",
            help="Instructions (JSON or JSONL), text, ids:FILE.jsonl, a short name, or 'self'; twice for cpt-lora, to "
            "give each stage its own.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder to write; only an older result is replaced.", show_default=False)
    ],
    *,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the state of a run that was stopped.")] = False,
    teacher: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The dense model to learn from (distill). Default: the base.")
    ] = None,
    scaling: Scaling,
    save_every: Annotated[
        float, typer.Option(min=0, metavar="MINUTES", help="How often the state is kept, beside DIR.")
    ] = 10.0,
    data_dir: options.DataDir = None,
    trust_remote_code: options.Trust = False,
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """Teach a pruned model again, by LoRA, in full, or from its dense model, and write and verify the result.

    Several processes, as `accelerate launch` starts them, share each step. Widths may differ from block to block.
    """
    options.check_output_folder(out)
    source = sources.locate(model)
    positions = (source.config or {}).get("max_position_embeddings")
    chosen = scaling.of(recipe, positions if isinstance(positions, int) else None)
    settings = named.Settings(tuple(data), teacher, resume, 60 * save_every, data_dir, trust_remote_code, device=device)
    named.check(source, chosen, settings, out)
    done = record.read(out) if resume and not named.state_folder(out).is_dir() else None
    if done is not None:
        console.say(f"{out} is complete, there is nothing to resume")
        _show(out, done, as_json)
        return
    with _bars() as (step, prepared):
        written = named.retrain(
            source,
            chosen,
            settings,
            out,
            progress=step,
            prepared=prepared,
            tell=lambda told: display.tell_retraining(told, console.say),
        )
    if written is None:
        return
    from shortllama import verification

    report = verification.verify(out)
    _show(out, written[1], as_json, manifest=written[0], verification=report)
    if not as_json:
        display.show_report(report)
    require(report)
    console.say(f"wrote {out}, verified")


def _show(out: Path, done: record.Record, as_json: bool, **more: object) -> None:
    if as_json:
        console.emit({"folder": str(out), "retraining": done, **more})
    else:
        display.show_retraining(done)


@contextmanager
def _bars() -> Generator[tuple[Callable[[str, int, int, float], None], Callable[[str, int, int], None]]]:
    """Yield a function for steps with their loss, and one for the reading of data, each shown as one bar a name."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}")
    with console.progress(*columns, TimeRemainingColumn()) as bar:
        tasks: dict[str, object] = {}

        def show(what: str, done: int, total: int, loss: float | None = None) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total, completed=done, loss="")
            told = "" if loss is None else f"loss {loss:.4f}"
            bar.update(tasks[what], completed=done, total=total, loss=told)  # type: ignore[arg-type]

        yield show, show
