"""Studies made by hand for the tests of the report: folders as `shortllama study` leaves them, of known numbers.

The dense model has perplexity 10 on the text. A method's perplexity follows from one number, its loss in nats a token,
so that every share and order in a report can be worked out.
"""

from __future__ import annotations

import math
from pathlib import Path

import msgspec

from shortllama import files, plans, study
from shortllama.evaluation.results import (
    Accuracy,
    Evaluation,
    Generation,
    Perplexity,
    Quality,
    ZeroShot,
    write_evaluation,
)
from shortllama.evaluation.tasks import TASKS
from shortllama.indices import format_indices
from shortllama.plans import Achieved, Base, BlockKeep, Plan, Target
from shortllama.scores import Cost, Scores, write_scores
from shortllama.studies import rows
from shortllama.studies.rows import Row
from shortllama.study import Calibration, Run, Study

BLOCKS = 12
DENSE_NATS = math.log(10.0)
PARAMETERS = 3_000_000
FILE = """
schema = "shortllama.study/1"
model = "reference"
ratios = [0.2, 0.35]
seeds = [0]
calibrations = [{ samples = 10 }, { samples = 100 }]

methods = [
  { method = "ppl", seeds = [0, 1, 2] },
  { method = "taylor+" },
  { method = "mag+" },
  { method = "ppl", unit = "module" },
  { method = "wanda-sp" },
  { method = "ppl", steps = 2, between = "lora" },
]

recipes = [
  { recipe = "none" },
  { recipe = "lora", data = ["self"], steps = 500, batch = 16, length = 128, lr = 2e-3, ratios = [0.2] },
]

[evaluation]
texts = ["self"]
tasks = ["hellaswag", "lambada"]
"""
# Nats a token that each label loses at 0.2 (at 0.35: twice as much); retraining wins back half of them.
LOSS = {
    "ppl": 0.2, "taylor+": 0.4, "mag+": 0.3, "ppl (modules)": 0.5, "wanda-sp": 0.25,
    "ppl (2 steps, lora between)": 0.15,
}  # fmt: skip
BACK = 0.5
HOSTILE = "<script>alert(1)</script>‮evil|`x`"


def quality(loss: float = 0.0, *, text: str = "self", digest: str = "d" * 16, tasks: bool = True) -> Quality:
    """What a model with this loss is worth; accuracies fall with it, LAMBADA's twice as fast."""
    nll = DENSE_NATS + loss
    one = Perplexity(math.exp(nll), nll, 4096, 32, None, None, "given", "documents", digest)
    known = {"hellaswag": 0.6 * (1 - loss / 2), "lambada": 0.4 * (1 - loss)} if tasks else {}
    made = {name: accuracy(name, value) for name, value in known.items()}
    shot = ZeroShot(made, "lm-eval 0.4.13", True, mean=known.get("hellaswag")) if made else None
    return Quality({text: one}, shot)


def accuracy(task: str, value: float) -> Accuracy:
    """A task's accuracy over 1000 items."""
    error = math.sqrt(value * (1 - value) / 1000)
    return Accuracy(TASKS[task].metric, value, 1000, TASKS[task].published, "1", "x.jsonl", {}, error, "e" * 16)


def wrote(prompt: str, text: str) -> Quality:
    """A quality that holds text alone."""
    return Quality({}, None, (Generation(prompt, text, 5, 0.0, True), Generation(prompt, f"{text}?", 5, 1.0, False, 7)))


def loss_of(run: Run) -> float:
    """The loss of a pruned model: the label's, a hair more for every seed, a hair less with more calibration."""
    one = run.pruned
    more = 0.01 * (one.seed or 0) - (0.02 if one.calibration and one.calibration.samples > 10 else 0.0)
    return LOSS[one.method.label] * (one.ratio / 0.2 if one.ratio == 0.2 else 2.0) + more


def row_of(run: Run) -> Row:
    """The finished row of a run."""
    one, loss = run.pruned, loss_of(run)
    costs = {"scoring": Cost(2.0, 1 << 20, 1280)}
    costs |= {"between": Cost(30.0, 1 << 26, 4096)} if one.between else {}
    costs |= {"retraining": Cost(60.0, 1 << 27, 8192)} if run.recipe else {}
    kept = BLOCKS if one.method.method == "wanda-sp" else BLOCKS - round(one.ratio * BLOCKS)
    return Row(
        id=run.id, pruned=one.id, subject=run.subject, model=one.model, method=one.method.method,
        label=one.method.label, unit=one.method.unit or ("width" if one.method.method == "wanda-sp" else "block"),
        iterative=False, steps=one.method.steps, ratio=one.ratio, achieved=Achieved(one.ratio, kept),
        parameters=round(PARAMETERS * (1 - one.ratio)), calibration=one.calibration,
        recipe="none" if run.recipe is None else run.recipe.label, seed=run.seed or one.seed,
        before=quality(loss), after=None if run.recipe is None else quality(loss * (1 - BACK)), costs=costs,
    )  # fmt: skip


def given(text: str = FILE) -> Study:
    """The study of a file."""
    return files.decode_toml(text.encode(), Study, "study.toml")


def save(folder: Path, text: str = FILE, found: tuple[Row, ...] | None = None, dense: Quality | None = None) -> Path:
    """Write the folder of a study whose runs are finished; `found`: other rows than the study's own."""
    folder.mkdir(parents=True)
    (folder / "study.toml").write_text(text, encoding="utf-8")
    made = tuple(map(row_of, study.grid(given(text)))) if found is None else found
    (folder / rows.FILE).write_bytes(b"".join(msgspec.json.encode(row) + b"\n" for row in made))
    base = dense or quality()
    model = made[0].model if made else "reference"
    write_evaluation(folder / "dense.json", Evaluation({model: base}))
    subjects = {model: base} | {row.subject.partition(" + ")[0]: row.before for row in made}
    write_evaluation(folder / "quality.json", Evaluation(subjects | {row.subject: row.result for row in made}))
    for row in made:
        if "/" not in row.pruned and "between" not in row.costs:
            _pruned(folder / "pruned" / row.pruned, row)
    return folder


def _pruned(folder: Path, row: Row) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    count = round(row.ratio * BLOCKS)
    gone = set(range(4, 4 + count))
    # The removed blocks are the least important ones, the first block the most.
    values = tuple(12.0 + (place not in gone) * (place + 1) + 500.0 * (place == 0) for place in range(BLOCKS))
    if row.unit == "module":
        scores = Scores("ppl", "module", "b" * 16, attention=values, mlp=values[::-1])
        keep = tuple(BlockKeep(i, "" if i in gone else None, None) for i in range(BLOCKS))
    elif row.unit == "block":
        details = {"dense": 10.0} if row.method == "ppl" else None
        scores = Scores(row.method.rstrip("+"), "block", "b" * 16, blocks=values, details=details)
        keep = tuple(BlockKeep(i) for i in range(BLOCKS) if i not in gone)
    else:
        groups = tuple((1.0, 2.0) for _ in range(BLOCKS))
        scores = Scores("wanda-sp", "width", "b" * 16, kv_groups=groups, neurons=groups)
        keep = tuple(BlockKeep(i, format_indices((1,)), None) for i in range(BLOCKS))
    write_scores(folder / "scores.json", scores)
    plans.write_plan(
        folder / "plan.json", Plan(Base(row.model, "b" * 16), row.label, Target("ratio", row.ratio), row.achieved, keep)
    )


def with_text() -> tuple[Row, ...]:
    """Rows whose models wrote something, one of them a page that a browser must not run."""
    first, second = (row_of(run) for run in study.grid(given())[:2])
    said = wrote("AI can", "do <b>this</b>")
    before = msgspec.structs.replace(first.before, generations=said.generations)
    after = msgspec.structs.replace(quality(0.1), generations=wrote("AI can", HOSTILE).generations)
    return msgspec.structs.replace(first, before=before), msgspec.structs.replace(
        second, before=before, recipe="lora", after=after, id="other"
    )


def strange() -> Quality:
    """The dense model's quality beside `hostile` rows."""
    return quality(text=HOSTILE)


def hostile() -> tuple[Row, ...]:
    """Rows whose every name is hostile; their folders must not be left either."""
    made = []
    for number, run in enumerate(study.grid(given())[:6]):
        row = row_of(run)
        made.append(msgspec.structs.replace(
            row, id=f"../{HOSTILE}{number}", pruned=f"../../{number}", model=HOSTILE, subject=f"{HOSTILE}/x{number}",
            label=f"{HOSTILE}{number}", recipe="lora" if number % 2 else "none",
            after=quality(0.1, text=HOSTILE) if number % 2 else None, before=quality(0.2, text=HOSTILE),
            calibration=Calibration(f"ids:{HOSTILE}"),
        ))  # fmt: skip
    return tuple(made)
