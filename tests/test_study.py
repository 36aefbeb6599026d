"""`shortllama study`: grids as values, what is refused, runs that are never repeated, and the tables that come out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
import pytest
from conftest import ROOT
from strategies import plan_of

from shortllama import checkpoint, console, criteria, files, methods, plans, study, study_checks, surgery
from shortllama.errors import InputError
from shortllama.evaluation.results import Accuracy, Perplexity, Quality, ZeroShot, read_evaluation
from shortllama.plans import BlockKeep
from shortllama.retraining import record
from shortllama.shape import ModelShape
from shortllama.studies import rows, summary
from shortllama.study import Study
from shortllama.variants import Variant

DENSE = ModelShape.uniform(vocabulary=61, hidden=32, head_dim=8, blocks=4, query_heads=4, kv_heads=2, neurons=48)
HEAD = """
schema = "shortllama.study/1"
model = "dense"
ratios = [0.25, 0.5]
"""
TAIL = """
[[recipes]]
recipe = "none"
[[recipes]]
recipe = "lora"
name = "short"
data = ["ids:ids.jsonl"]
steps = 3
batch = 4
lr = 1e-2
[evaluation]
texts = ["ids:ids.jsonl"]
limit = 8
"""
SMALL = HEAD + '[[calibrations]]\nsamples = 2\nlength = 8\n[[methods]]\nmethod = "ppl"\n' + TAIL
STEPS = (
    HEAD.replace("[0.25, 0.5]", "[0.5]")
    + '[[calibrations]]\nsamples = 2\nlength = 8\n[[methods]]\nmethod = "ppl"\nsteps = 2\nbetween = "short"\n'
    + TAIL
)


def parse(text: str) -> Study:
    return files.decode_toml(text.encode(), Study, "s.toml")


def checked(text: str) -> Study:
    found = parse(text)
    study_checks.check(found, DENSE, 64, "s.toml")
    return found


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a dense model, ids and two studies, worked in."""
    checkpoint.save(surgery.build(DENSE, std=0.2), plan_of(DENSE, tuple(map(BlockKeep, range(4)))), tmp_path / "dense")
    (tmp_path / "dense" / "plan.json").unlink()
    rng = np.random.default_rng(0)
    lines = [((rng.integers(0, 61) + rng.integers(1, 4) * np.arange(16)) % 61).tolist() for _ in range(40)]
    (tmp_path / "ids.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "small.toml").write_text(SMALL)
    (tmp_path / "steps.toml").write_text(STEPS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]):
    """Return run(*arguments) -> (exit code, stdout, stderr), in this process."""
    from bench.cli import app

    def run(*given: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = console.run(app, [str(one) for one in given])
        return code, *capfd.readouterr()

    return run


# -- the grid ---------------------------------------------------------------------------------------------------------


def test_what_a_method_does_not_read_is_no_part_of_its_runs():
    both = HEAD + 'seeds = [0, 1]\n[[methods]]\nmethod = "ppl"\n[[methods]]\nmethod = "last"\n' + TAIL
    runs = study.grid(checked(both + "[[calibrations]]\n[[calibrations]]\nsamples = 3\n"))
    pruned = {run.pruned for run in runs}
    # ppl: 2 ratios x 2 calibrations x 2 seeds; last: 2 ratios.
    assert len(pruned) == 8 + 2
    # Each pruned model as it is, and retrained: once with the seed of its text, with both seeds where it has none.
    assert len(runs) == 8 * 2 + 2 * 3
    assert len({run.id for run in runs}) == len({run.subject for run in runs}) == len(runs)
    # Those of one pruned model follow each other: it is made once, and its weights can go.
    changes = sum(a.pruned != b.pruned for a, b in pairwise(runs))
    assert changes == len(pruned) - 1


def test_a_method_has_its_own_seeds_and_a_recipe_its_own_ratios():
    text = SMALL.replace('method = "ppl"', 'method = "ppl"\nseeds = [3, 4]')
    text = text.replace("steps = 3", "steps = 3\nratios = [0.5]")
    runs = study.grid(checked(text))
    assert [(run.pruned.ratio, run.pruned.seed, run.recipe is None) for run in runs] == [
        (0.25, 3, True), (0.25, 4, True), (0.5, 3, True), (0.5, 3, False), (0.5, 4, True), (0.5, 4, False),
    ]  # fmt: skip
    # What the grid leaves out says nothing about the runs that it has.
    plain = SMALL.replace("[[calibrations]]", "seeds = [3, 4]\n[[calibrations]]", 1)
    assert {run.id for run in runs} < {run.id for run in study.grid(parse(plain))}


def test_ids_change_with_whatever_changes_a_run():
    ids = [run.id for run in study.grid(parse(SMALL))]
    assert ids == [run.id for run in study.grid(parse(SMALL))]
    assert all(run == run.replace("/", "") and len(run) < 120 for run in ids)
    for old, new in (("steps = 3", "steps = 4"), ("limit = 8", "limit = 9"), ("length = 8", "length = 9")):
        changed = [run.id for run in study.grid(parse(SMALL.replace(old, new)))]
        assert [a != b for a, b in zip(ids, changed, strict=True)] in ([True] * 4, [False, True] * 2)


def test_plain_subjects_are_called_as_a_sweep_calls_them():
    plain = study.grid(parse(HEAD + '[[methods]]\nmethod = "taylor+"\n[evaluation]\ntexts = ["self"]\n'))
    assert [run.subject for run in plain] == ["dense/taylor+:0.25", "dense/taylor+:0.5"]


def test_methods_without_text_are_those_whose_criteria_say_so():
    for name, row in methods.METHODS.items():
        needs = criteria.needs(criteria.lookup(row.criterion), Variant())
        assert study.reads_text(study.Method(method=name)) == (needs == "calibration"), name
    assert not study.reads_text(study.Method(method="llm-pruner", estimator="l1"))


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_parts_of_a_way_in_steps_remove_what_the_ratio_removes(ratio: float):
    row = study.Method(method="ppl", steps=2, between="x")
    assert sum(int(one.value) for one in study.targets(row, ratio, 12)) == round(ratio * 12)
    left = 1.0
    for one in study.targets(study.Method(method="wanda-sp", steps=3, between="x"), ratio, 12):
        left *= 1 - float(one.value)
    assert left == pytest.approx(1 - ratio)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('method = "ppl"', 'method = "pll"', r"\$.methods\[0\]: method 'pll' is unknown; did you mean ppl"),
        ('method = "ppl"', 'method = "ppl"\nalign = 64', r"\$.methods\[0\]: --align"),
        ('method = "ppl"', 'metod = "ppl"', "unknown key .*metod; did you mean 'method'"),
        ('method = "ppl"', 'method = "ppl"\nsteps = 3', r"\$.methods\[0\]: --steps 3 is not for ppl"),
        ('method = "ppl"', 'method = "ppl"\nsteps = 2\nbetween = "long"', "'long' is no recipe of this study.*short"),
        ('method = "ppl"', 'method = "ppl"\nsteps = 4\nbetween = "short"', "removes 1 of 4 blocks; take fewer steps"),
        ('method = "ppl"', 'method = "ppl"\nbetween = "short"', "needs steps of 2 or more"),
        ('method = "ppl"', 'method = "flap"\nsteps = 2\nbetween = "short"', "adds biases"),
        ('method = "ppl"', 'method = "ppl"\nseeds = []', r"\$.methods\[0\].seeds is empty"),
        ("steps = 3", "steps = 3\nratios = [0.3]", r"\$.recipes\[1\].ratios: 0.3 is no ratio.* has 0.25, 0.5"),
        ("[0.25, 0.5]", "[1.5]", "1.5 is outside"),
        ("[0.25, 0.5]", "[]", r"\$.ratios is empty"),
        ("[0.25, 0.5]", "[0.5]\nquantised = []", r"\$.quantised is empty"),
        ("[0.25, 0.5]", '[0.5]\nquantised = ["int3"]', r"\$.quantised\[0\] is 'int3'; expected one of none, int8"),
        ('recipe = "lora"', 'recipe = "lroa"', r"\$.recipes\[1\]: recipe 'lroa' is unknown; did you mean 'lora'"),
        ('name = "short"', 'name = "none"', "called 'none'"),
        ('data = ["ids:ids.jsonl"]\n', "", "0 sources in data"),
        ("steps = 3", "temperature = 2.0", "no temperature"),
        ('recipe = "none"', 'recipe = "none"\nsteps = 2', "retrains nothing; leave out steps"),
        ("limit = 8", "limit = 0", r"\$.evaluation.limit is 0"),
        ("limit = 8", 'tasks = ["lambda"]', "did you mean 'lambada'"),
        (
            'ids.jsonl"]\nlimit = 8',
            'ids.jsonl", "self"]\nseed = 0',
            "the very text that is calibrated and retrained on",
        ),
        ("limit = 8", 'tasks = ["self-word"]\nseed = 0', "the very text that is calibrated and retrained on"),
    ],
)
def test_bad_studies_are_refused_with_the_key(old: str, new: str, said: str):
    assert SMALL.count(old) >= 1
    with pytest.raises(InputError, match=said):
        checked(SMALL.replace(old, new))


def test_the_shipped_study_has_at_most_40_runs():
    from shortllama import sources

    given, source = study.read(study.path_of("reference")), sources.locate("reference")
    study_checks.check(given, source.shape, 256, "reference")
    assert 16 < len(study.grid(given)) <= 40
    with pytest.raises(InputError, match=r"shipped: .*reference"):
        study.path_of("refrence")


# -- the work ---------------------------------------------------------------------------------------------------------


def test_a_study_ends_in_rows_tables_and_no_weights(folder: Path, command):
    code, out, said = command("study", "small.toml", "--out", "out", "--device", "cpu")
    assert code == 0, said
    assert "perplexity on ids:ids.jsonl" in out
    found = rows.read(folder / "out")
    assert [row.id for row in found] == [run.id for run in study.grid(parse(SMALL))]
    plain, taught = found[:2]
    assert (plain.after, taught.before) == (None, plain.before)
    assert taught.after is not None
    assert taught.after.perplexity != taught.before.perplexity
    assert taught.costs["retraining"].tokens == 3 * 4 * 16
    assert taught.costs["scoring"] == plain.costs["scoring"]
    assert plain.costs["scoring"].tokens == 16
    assert plain.achieved.blocks == 3
    for run in found:
        kept = {path.name for path in (folder / "out" / "runs" / run.id).iterdir()}
        assert kept == {"plan.json", "eval.json"} | ({"retraining.json"} if run.after else set())
        assert (folder / "out" / "pruned" / run.pruned / "scores.json").exists()
    assert not list((folder / "out").rglob("*.safetensors"))
    # Scores do not depend on the ratio: they were made once.
    both = [(folder / "out" / "pruned" / row.pruned / "scores.json").read_bytes() for row in (found[0], found[2])]
    assert both[0] == both[1]
    subjects = read_evaluation(folder / "out" / "quality.json").subjects
    assert next(iter(subjects)) == "dense"
    assert {row.subject for row in found} < set(subjects)
    assert subjects[taught.subject] == taught.after
    assert command("show", "out")[1] == out
    document = json.loads(command("show", "out", "--json")[1])
    assert [line["runs"] for line in document["summary"]["perplexity"]] == [1, 1, 1, 1]


def test_a_quantised_result_is_one_more_run_on_the_same_weights(torchao, folder: Path, command):
    """Retrained once, and held in two ways; the dense model is too."""
    text = SMALL.replace("[0.25, 0.5]", '[0.25]\nquantised = ["none", "int8"]')
    runs = study.grid(parse(text))
    assert [run.made for run in runs] == ["none", "none+int8", "short", "short+int8"]
    assert [run.plain.id for run in runs] == [runs[0].id] * 2 + [runs[2].id] * 2
    assert {run.id for run in study.grid(parse(SMALL))} > {runs[0].id, runs[2].id}
    (folder / "held.toml").write_text(text)
    code, out, said = command("study", "held.toml", "--out", "out", "--device", "cpu")
    assert code == 0, said
    plain, eighth, taught, taught_eighth = rows.read(folder / "out")
    assert [row.recipe for row in (eighth, taught_eighth)] == ["none+int8", "short+int8"]
    assert eighth.before == plain.before
    assert eighth.after is not None
    assert taught.after is not None
    assert taught_eighth.after is not None
    (name,) = plain.before.perplexity
    before, after = plain.before.perplexity[name].nll, eighth.after.perplexity[name].nll
    assert 0 < abs(after - before) < 0.05
    assert abs(taught_eighth.after.perplexity[name].nll - taught.after.perplexity[name].nll) < 0.05
    assert taught_eighth.costs["retraining"] == taught.costs["retraining"]
    assert not list((folder / "out").rglob("*.safetensors"))
    subjects = read_evaluation(folder / "out" / "quality.json").subjects
    assert (eighth.subject, taught_eighth.subject) == (f"{plain.subject}+int8", f"{taught.subject}+int8")
    assert {"dense", "dense+int8", eighth.subject, taught_eighth.subject} <= set(subjects)
    assert "short+int8" in out


def test_finished_runs_are_not_repeated_and_a_torn_line_is_cut(folder: Path, command):
    assert command("study", "small.toml", "--out", "out", "--device", "cpu")[0] == 0
    file = folder / "out" / "study.jsonl"
    whole = file.read_bytes()
    lines = whole.splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:3]) + lines[3][:50])
    code, _, said = command("study", "small.toml", "--out", "out")
    assert code == 2
    assert "--resume" in said
    assert command("study", "small.toml", "--out", "out", "--resume", "--device", "cpu")[0] == 0
    again = file.read_bytes().splitlines(keepends=True)
    assert again[:3] == lines[:3]
    before, after = (msgspec.json.decode(line, type=rows.Row) for line in (lines[3], again[3]))
    assert after.result == before.result  # weights made anew, retrained with the same losses
    dry = json.loads(command("study", "small.toml", "--out", "out", "--dry-run", "--json")[1])["runs"]
    assert [one["finished"] for one in dry] == [True] * 4
    assert dry[0]["retraining_s"] == 0 < dry[1]["retraining_s"]
    changed = SMALL.replace("steps = 3", "steps = 4")
    (folder / "small.toml").write_text(changed)
    code, _, said = command("study", "small.toml", "--out", "out", "--resume")
    assert (code, "no part of this study" in said) == (2, True)


def test_a_line_that_is_no_row_is_named(tmp_path: Path):
    (tmp_path / rows.FILE).write_text('{"id": 1}\n')
    with pytest.raises(InputError, match="line 1: "):
        rows.read(tmp_path)


def test_two_processes_do_not_write_one_study(tmp_path: Path):
    with rows.writer(tmp_path), pytest.raises(InputError, match="another process"), rows.writer(tmp_path):
        pass


def test_a_run_in_steps_is_one_plan_for_the_dense_model_and_goes_on_at_a_step(folder: Path, command):
    code, _, said = command("study", "steps.toml", "--out", "whole", "--device", "cpu")
    assert code == 0, said
    plain, taught = rows.read(folder / "whole")
    assert plain.achieved.blocks == 2
    assert plain.costs["between"].tokens == 3 * 4 * 16
    assert plain.costs["scoring"].tokens == 2 * 16
    plan = plans.read_plan(folder / "whole" / "pruned" / plain.pruned)
    plans.check_base(plan, DENSE)
    assert taught.costs["retraining"].tokens == 3 * 4 * 16
    known = record.read(folder / "whole" / "runs" / taught.id)
    assert known is not None
    assert len(known.stages) == 2
    # Killed after the first part was retrained: that part stays as it is.
    code, _, _ = command("study", "steps.toml", "--out", "parts", "--device", "cpu")
    assert code == 0
    kept = parse(STEPS.replace("ratios", "keep_weights = true\nratios"))
    (folder / "kept.toml").write_text(STEPS.replace("ratios", "keep_weights = true\nratios"))
    assert study.grid(kept) == study.grid(parse(STEPS))
    assert command("study", "kept.toml", "--out", "kept", "--device", "cpu")[0] == 0
    base = folder / "kept" / "pruned" / plain.pruned
    stamp = (base / "step-1" / "model" / "model.safetensors").stat().st_mtime_ns
    (folder / "kept" / "study.jsonl").write_bytes(b"")
    for path in (base / "model", base / "step-2"):
        files.remove_folder(path)
    (base / "eval.json").unlink()
    files.remove_folder(folder / "kept" / "runs")
    assert command("study", "kept.toml", "--out", "kept", "--resume", "--device", "cpu")[0] == 0
    assert (base / "step-1" / "model" / "model.safetensors").stat().st_mtime_ns == stamp
    assert [row.result for row in rows.read(folder / "kept")] == [plain.result, taught.result]


@pytest.mark.slow
def test_a_killed_study_goes_on_to_the_same_results(folder: Path):
    given = [sys.executable, "-m", "bench", "study", "small.toml", "--device", "cpu", "--resume", "--out"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([*given, "killed"], env=env, stderr=subprocess.PIPE)
    limit = time.monotonic() + 300
    while len(rows.read(folder / "killed")) < 1 and time.monotonic() < limit and process.poll() is None:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    first = rows.read(folder / "killed")
    assert 1 <= len(first) < 4
    for name in ("killed", "whole"):
        done = subprocess.run([*given, name], env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    killed, whole = rows.read(folder / "killed"), rows.read(folder / "whole")
    assert killed[: len(first)] == first
    assert [row.id for row in killed] == [row.id for row in whole]
    for ours, theirs in zip(killed, whole, strict=True):
        assert [one.nll for one in ours.result.perplexity.values()] == pytest.approx(
            [one.nll for one in theirs.result.perplexity.values()], rel=1e-5
        )


def test_a_run_that_fails_is_told_and_the_others_go_on(folder: Path, command):
    broken = SMALL + '[[recipes]]\nrecipe = "lora"\nname = "broken"\ndata = ["absent.txt"]\nsteps = 1\n'
    (folder / "broken.toml").write_text(broken)
    code, _, said = command("study", "broken.toml", "--out", "out", "--device", "cpu")
    assert code == 1
    assert said.count("absent.txt") >= 2
    assert len(rows.read(folder / "out")) == 4
    assert "4 runs in out, 2 failed" in said


def test_bad_commands_are_one_line(folder: Path, command):
    for given, said in (
        (("small.toml",), "give --out DIR, or --dry-run"),
        (("absent.toml", "--dry-run"), "cannot be read"),
        (("small.toml", "--out", "dense"), "is not ours to replace"),
    ):
        code, out, error = command("study", *given)
        assert (code, out, error.count("\n")) == (2, "", 1)
        assert said in error
    (folder / "shape.toml").write_text(SMALL.replace('"dense"', '"llama-7b"'))
    assert "without weights" in command("study", "shape.toml", "--dry-run")[2]


def test_ctrl_c_keeps_what_is_finished(folder: Path, command, monkeypatch: pytest.MonkeyPatch):
    from shortllama.studies import work

    once = work.Work._run

    def second_is_interrupted(self: work.Work, run: study.Run) -> rows.Row:
        if run.recipe is not None:
            raise KeyboardInterrupt
        return once(self, run)

    monkeypatch.setattr(work.Work, "_run", second_is_interrupted)
    code, _, said = command("study", "small.toml", "--out", "out", "--device", "cpu")
    assert (code, "note: out keeps what is finished; --resume goes on from there" in said) == (130, True)
    assert len(rows.read(folder / "out")) == 1
    assert len(read_evaluation(folder / "out" / "quality.json").subjects) == 2


def test_reports_take_what_a_study_found_beside_a_run(folder: Path, command):
    from bench import store
    from bench.recommend import perplexities

    assert command("study", "small.toml", "--out", "out", "--device", "cpu")[0] == 0
    (folder / "run").mkdir()
    (folder / "run" / store.FILE_NAME).touch()
    both = [folder / "run", folder / "out"]
    assert store.measured(both) == both[:1]
    with pytest.raises(InputError, match="a study without measurements"):
        store.measured(both[1:])
    found = rows.read(folder / "out")[0]
    assert perplexities(both, None)[found.subject] == found.before.perplexity["ids:ids.jsonl"].perplexity


# -- what it amounts to -----------------------------------------------------------------------------------------------


def perplexity(value: float, digest: str = "same") -> Perplexity:
    return Perplexity(value, float(np.log(value)), 10, 1, 128, 128, "none", "stream", digest)


def test_the_share_of_the_gap_closed():
    assert summary.closed(perplexity(10), perplexity(30), perplexity(15)) == pytest.approx(0.75)
    assert summary.closed(perplexity(10), perplexity(30), perplexity(40)) == pytest.approx(-0.5)
    assert summary.closed(perplexity(10, "other"), perplexity(30), perplexity(15)) is None
    assert summary.closed(perplexity(10), perplexity(9), perplexity(8)) is None
    assert summary.closed(None, perplexity(9), perplexity(8)) is None


def tasks(**values: float) -> ZeroShot:
    return ZeroShot({name: Accuracy("acc", one, 10, 10, "1", "x", {}) for name, one in values.items()}, "x", True)


def test_choosing_and_generating_are_lost_apart():
    """As shares of what the dense model has above guessing: 0.5 for two choices, 0 for a word."""
    dense = Quality({"t": perplexity(10)}, tasks(piqa=0.8, boolq=0.6, lambada=0.5))
    now = Quality({"t": perplexity(20)}, tasks(piqa=0.65, boolq=0.55, lambada=0.1))
    row = rows.Row(
        id="a", pruned="p", subject="s", model="m", method="ppl", label="ppl", unit="block", iterative=False,
        steps=None,
        ratio=0.25, achieved=plans.Achieved(0.2, 3), parameters=1, calibration=None, recipe="none", seed=None,
        before=now, after=None, costs={},
    )  # fmt: skip
    (found,) = summary.losses([row], dense)
    assert (found.choosing, found.generating) == (pytest.approx(0.5), pytest.approx(0.8))
    assert found.nats == pytest.approx(np.log(2))
    other = msgspec.structs.replace(row, after=dense)
    lines = summary.lines([other, msgspec.structs.replace(other, after=now)], dense)
    assert [(line.runs, line.closed, line.closed_range) for line in lines] == [(2, 0.5, (0.0, 1.0))]
    assert summary.losses([row], Quality({"t": perplexity(10)})) == ()
    # Two standard errors are the least lead that counts: here 0.1.
    unsure = {
        name: msgspec.structs.replace(one, value=value, standard_error=0.05)
        for (name, one), value in zip(dense.zero_shot.tasks.items(), (0.61, 0.59, 0.09), strict=True)
    }
    guessing = msgspec.structs.replace(dense, zero_shot=msgspec.structs.replace(dense.zero_shot, tasks=unsure))
    assert [*summary.telling(guessing)] == ["piqa"]
    (found,) = summary.losses([row], guessing)
    assert (found.choosing, found.generating) == (pytest.approx(1 - 0.15 / 0.11), None)
