"""A study's folder as values: the only module here that reads files. It knows nothing of tables and figures.

What the folder lacks is missing, never guessed: scores of methods that measure nothing, a study that stopped half way.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import msgspec

from bench.report.quantities import inert
from shortllama import plans, study
from shortllama.errors import InputError
from shortllama.evaluation.results import Quality, read_evaluation
from shortllama.plans import Plan
from shortllama.retraining import record
from shortllama.scores import Scores, read_scores
from shortllama.studies import rows
from shortllama.studies.rows import Row
from shortllama.study import Study

DENSE, PLAN, SCORES, STUDY = "dense.json", "plan.json", "scores.json", "study.toml"


class Held(msgspec.Struct, frozen=True):
    """One study: its finished runs and the dense model's evaluation (None: not there).

    `scores` and `plans` are by the id of a pruned model. `given` is the file that asked for the runs, of which
    `wanted` are to be done; None where it is missing or cannot be read by this version. `device` and `torch` are those
    of retraining, "" where nothing was retrained.
    """

    name: str
    rows: tuple[Row, ...]
    dense: Quality | None
    scores: Mapping[str, Scores] = {}
    plans: Mapping[str, Plan] = {}
    given: Study | None = None
    wanted: int | None = None
    device: str = ""
    torch: str = ""

    @property
    def model(self) -> str:
        """The dense model's name."""
        return self.rows[0].model

    @property
    def parameters(self) -> int:
        """The dense model's parameters, from what a run left of them (to 1 in 1e6, which is how shares are kept)."""
        row = self.rows[0]
        return round(row.parameters / (1 - row.achieved.parameters))

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts that perplexity was measured on."""
        found = [*([self.dense] if self.dense else []), *(row.before for row in self.rows)]
        return tuple(dict.fromkeys(text for quality in found for text in quality.perplexity))

    @property
    def tasks(self) -> tuple[str, ...]:
        """The zero-shot tasks that anything was evaluated on."""
        found = [*([self.dense] if self.dense else []), *(row.result for row in self.rows)]
        return tuple(dict.fromkeys(name for one in found if one.zero_shot for name in one.zero_shot.tasks))

    @property
    def harness(self) -> str:
        """What ran the tasks, "" without tasks."""
        found = [*([self.dense] if self.dense else []), *(row.result for row in self.rows)]
        return next((one.zero_shot.harness for one in found if one.zero_shot), "")

    @property
    def line(self) -> str:
        """Where the numbers are from, in one line."""
        device = f"retrained on {self.device}" if self.device else ""
        parts = (f"study {self.name}", device, f"torch {self.torch}" if self.torch else "", self.harness)
        return inert(" · ".join(part for part in parts if part))


def subject(row: Row) -> str:
    """Return the name of a row's pruned model, as a sweep has it: that of the row without its recipe."""
    return row.subject.partition(" + ")[0]


def is_study(folder: Path) -> bool:
    """Return whether a folder holds the rows of a study."""
    return folder.is_dir() and (folder / rows.FILE).is_file()


def read(folder: Path, name: str) -> Held:
    """Return the study in a folder, under the name that a report may show.

    Raises InputError for what cannot be read, and for a study without a finished run.
    """
    found = rows.read(folder)
    if not found:
        raise InputError(
            f"{folder / rows.FILE}: a study without a finished run; go on with shortllama study STUDY.toml "
            f"--out {folder} --resume"
        )
    dense = read_evaluation(folder / DENSE).subjects if (folder / DENSE).exists() else {}
    pruned = {row.pruned: folder / "pruned" / row.pruned for row in found if _plain(row.pruned)}
    given = _given(folder / STUDY)
    where = _retrained(folder / "runs" / row.id for row in found if _plain(row.id))
    return Held(
        name,
        found,
        next(iter(dense.values()), None),
        {key: read_scores(path / SCORES) for key, path in pruned.items() if (path / SCORES).is_file()},
        {key: plans.read_plan(path) for key, path in pruned.items() if (path / PLAN).is_file()},
        given,
        None if given is None else len(study.grid(given)),
        *where,
    )


def _plain(name: str) -> bool:
    """Return whether a name out of a file is one of a folder, and no way out of it."""
    return name not in ("", ".", "..") and Path(name).name == name


def _given(file: Path) -> Study | None:
    """Return the study file; none where another version wrote it: the rows are still worth a report."""
    try:
        return study.read(file) if file.is_file() else None
    except InputError:
        return None


def _retrained(folders: Iterable[Path]) -> tuple[str, str]:
    """Return the devices and versions of torch that retrained, as their records say."""
    known = [done for folder in folders if (done := record.read(folder)) is not None]
    stages = [stage for one in known for stage in one.stages]
    return _listed([one.device for one in stages]), _listed([one.torch for one in stages])


def _listed(names: Sequence[str]) -> str:
    return " and ".join(dict.fromkeys(names))
