"""`make report`: sweep the suite `quick` on this machine, then write the report on it.

The run goes to runs/, the report to reports/, both named quick_<device>_<date>; a second one of a day is numbered. The
report's folder keeps the rows it was made from, so that it can be committed and drawn again.
"""

from __future__ import annotations

import itertools
import shutil
import sys
from pathlib import Path

import typer

from bench import environment, report, run_folder
from bench.sweep import sweep
from shortllama import console

SUITE = "quick"
KEPT = ("measurements.jsonl", "quality.json", "suite.toml")


def quick() -> int:
    """Measure and report; example: python -m bench.quick"""
    run = _free(run_folder.default(SUITE, environment.machine(None).slug))
    code = sweep(SUITE, out=run)
    out = Path("reports") / run.name
    report.write([run], out)
    (out / "run").mkdir()
    for name in KEPT:
        shutil.copyfile(run / name, out / "run" / name)
    console.say(f"open {out / 'index.html'}")
    return code


def _free(folder: Path) -> Path:
    """The folder, or the first numbered one that does not exist: what was measured before stays."""
    numbered = (folder.with_name(f"{folder.name}_{number}") for number in itertools.count(2))
    return next(one for one in itertools.chain((folder,), numbered) if not one.exists())


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(quick)
    sys.exit(console.run(app))
