"""How every command speaks: one-line errors, exit codes, one JSON document on stdout, progress on stderr.

Exit codes: 0 fine; 1 regression, failed verification or cells, nothing fits; 2 bad input; 3 incomparable; 130 Ctrl-C.
Imports neither torch nor matplotlib; commands import those inside themselves.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from shortllama import files, quiet  # noqa: F401  before transformers is imported
from shortllama.errors import ShortllamaError

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

# Newer typer carries its own copy of click, so the base class of all usage mistakes is found through typer.
ClickError: type[Exception] = typer.BadParameter.__mro__[2]


def run(app: typer.Typer, arguments: list[str] | None = None) -> int:
    """Run `app` and return its exit code; every expected failure is one line on stderr, a traceback with --debug."""
    # Before anything loads torch: idle OpenMP threads that spin make a busy small machine many times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    try:
        code = app(given, standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except ShortllamaError as error:
        if debug:
            raise
        return _fail(str(error), error.exit_code)
    except typer.Exit as error:
        return error.exit_code
    except ClickError as error:
        context: Any = getattr(error, "ctx", None)
        message: str = getattr(error, "format_message", error.__str__)()
        if not message.strip():  # no arguments: the help has just been printed
            return 2
        help_of = context.command_path if context else "shortllama"
        return _fail(f"{message}{_unsaid_value(error, message)} (see {help_of} --help)", 2)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", 130)
    except BrokenPipeError:
        # The reader of our output has gone (`| head`): not an error, and nothing more can be said on stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _unsaid_value(error: Exception, message: str) -> str:
    """Return the value that typer refused where its message leaves it out, to be said after the message."""
    details: Any = getattr(error.__cause__, "errors", list)()
    seen = [repr(one["input"]) for one in details if "input" in one]
    return f"; saw {', '.join(seen)}" if seen and not all(value in message for value in seen) else ""


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    return code


def emit(document: Any) -> None:
    """Write one JSON document to stdout."""
    sys.stdout.write(files.encode_json(document).decode())


def say(message: str) -> None:
    """Write one line for people to stderr."""
    sys.stderr.write(f"{message}\n")


def note(message: str) -> None:
    """Write one line that the user should know about to stderr."""
    say(f"note: {message}")


@contextmanager
def progress(*columns: Any) -> Generator[Progress]:
    """Yield a rich progress display on stderr; silent where stderr is not a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    shown = columns or (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*shown, console=console, disable=not console.is_terminal, transient=True) as bar:
        yield bar


def _byte_columns() -> tuple[Any, ...]:
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn

    return (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())


@contextmanager
def steps(*, in_bytes: bool = False) -> Generator[Callable[[str, int, int], None]]:
    """Yield step(what, done, total), shown as one bar for each `what`; `in_bytes`: what is counted are bytes."""
    with progress(*(_byte_columns() if in_bytes else ())) as bar:
        tasks: dict[str, TaskID] = {}

        def step(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield step
