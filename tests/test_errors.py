"""Bad input through the commands: one line on stderr that helps, exit code 2, no traceback, nothing written."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bench import store
from bench.cells import read_suite
from bench.cli import app
from shortllama import blind, catalogue, console, planning
from shortllama.plans import Target, write_plan
from shortllama.scores import read_scores
from shortllama.shape import ModelShape

ROOT = Path(__file__).parent.parent

SUITE = """schema = "shortllama.suite/1"
subjects = ["llama-7b", "llama-7b/depth-26"]
runtimes = ["roofline"]
batch = [1, 2]
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoint `tiny`, the scores of it by mag, and models with which something is wrong."""
    from shortllama import surgery

    shape = ModelShape.uniform(vocabulary=97, hidden=64, head_dim=8, blocks=4, query_heads=8, kv_heads=4, neurons=96)
    path = tmp_path_factory.mktemp("models")
    model = surgery.build(shape, std=0.2)
    model.save_pretrained(path / "tiny")
    words().save_pretrained(path / "tiny")
    broken_models(path, model)
    assert console.run(app, ["score", str(path / "tiny"), "--criterion", "mag", "--out", str(path / "mag.json")]) == 0
    return path


def words() -> Any:
    """A tokenizer of whole words, without a BOS."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = Tokenizer(models.WordLevel({"<unk>": 0, "so": 1, "it": 2, "goes": 3}, unk_token="<unk>"))
    known.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=known, unk_token="<unk>")


def broken_models(path: Path, model: Any) -> None:
    """Write checkpoints: weights not finite, pickled weights, a later revision, a family that needs a BOS."""
    import torch
    from transformers import AutoModelForCausalLM, Gemma2Config

    from shortllama import surgery

    shutil.copytree(path / "tiny", path / "pickled")
    (path / "pickled" / "model.safetensors").unlink()
    torch.save(model.state_dict(), path / "pickled" / "pytorch_model.bin")
    fewer = blind.parse("depth:3", model="tiny", shape=surgery.shape_of(model))
    surgery.apply(fewer, model).save_pretrained(path / "newer" / "tiny")
    weight = model.model.layers[1].mlp.down_proj.weight
    weight.data[0, 0] = float("nan")
    model.save_pretrained(path / "infected")
    words().save_pretrained(path / "infected")
    weight.data[0, 0] = 0.1
    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_attention_heads": 4, "head_dim": 4}
    config = Gemma2Config(vocab_size=97, num_hidden_layers=2, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(path / "gemma")
    words().save_pretrained(path / "gemma")


@pytest.fixture
def place(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with one of everything, good and bad."""
    shutil.copytree(models, tmp_path, dirs_exist_ok=True)
    shape = catalogue.lookup("llama-7b")
    write_plan(tmp_path / "llama.json", blind.parse("depth:26", model="llama-7b", shape=shape))
    from shortllama.configs import shape_of

    tiny = shape_of(json.loads((tmp_path / "tiny" / "config.json").read_text()))
    write_plan(tmp_path / "blind.json", blind.parse("depth:3", model="tiny", shape=tiny))
    (tmp_path / "torn.json").write_bytes((tmp_path / "llama.json").read_bytes()[:200])
    shutil.copytree(tmp_path / "tiny", tmp_path / "torn")
    weights = tmp_path / "torn" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (tmp_path / "bad_ids.jsonl").write_text("[1, 2, 3]\n[1, 2,\n")
    (tmp_path / "few.txt").write_text("so it goes")
    (tmp_path / "many.txt").write_text("so it goes " * 1000)
    (tmp_path / "blank.txt").write_text(" \n\n")
    (tmp_path / "nothing").write_text("")
    write_scores_and_plans(tmp_path, tiny)
    (tmp_path / "large_ids.jsonl").write_text("[1, 2, 97]\n")
    for name, text in suites().items():
        (tmp_path / f"{name}.toml").write_text(text)
    broken_run(tmp_path / "broken")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_scores_and_plans(folder: Path, tiny: ModelShape) -> None:
    """Write scores that rank nothing, and a plan of real scores."""
    scores = read_scores(folder / "mag.json")
    fields = json.loads((folder / "mag.json").read_text())
    text = json.dumps({**fields, "blocks": [1.0] * 4})
    assert text.count("1.0,") == 3
    (folder / "equal.json").write_text(text)
    (folder / "nan.json").write_text(text.replace("1.0,", "NaN,", 1))
    (folder / "huge.json").write_text(text.replace("1.0,", "1e999,", 1))
    target = Target("blocks", 1)
    write_plan(
        folder / "one.json", planning.make_plan_for("mag", model="tiny", shape=tiny, target=target, scores=scores)
    )


def suites() -> dict[str, str]:
    return {
        "good": SUITE,
        "unknown_key": SUITE + 'runtime = ["eager"]\n',
        "nested_key": SUITE.replace("[1, 2]", "{from = 1, factr = 4}"),
        "unknown_runtime": SUITE.replace("roofline", "rooflin"),
        "unknown_shape": SUITE.replace("depth-26", "depth-99"),
        "no_cells": SUITE.replace('["roofline"]', "[]"),
        "syntax": SUITE + "batch = [",
    }


def broken_run(folder: Path) -> None:
    folder.mkdir()
    (folder / "measurements.jsonl").write_text('{"kind":"environment","id":"x","fingerprint":{}}\n{"kind":"meas\n{}\n')


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in sorted(folder.rglob("*"))}


PRUNE = "prune tiny --method mag --ratio 0.25 --scores mag.json --out"

# The command, and what its one line must contain: what was wrong, and where it helps the value or the next step.
CASES = {
    "unknown model": ("plan lama-7b --method ppl --ratio 0.2 --out p.json", ["'lama-7b'", "llama-7b"]),
    "unknown shape": ("shapes llama-7b/depth-99", ["depth-99"]),
    "shape of no grammar": ("shapes llama-7b/width:24", ["width:24"]),
    "unknown method": ("plan llama-7b --method tailor --ratio 0.2 --out p.json", ["'tailor'", "taylor"]),
    "unknown criterion": ("score tiny --criterion pplx --out s.json", ["'pplx'", "ppl"]),
    "unknown dtype": ("shapes llama-7b --dtype float15", ["'float15'", "float16"]),
    "unknown option": ("plan llama-7b --method ppl --ration 0.2", ["--ration", "plan --help"]),
    "unknown verb": ("pruen tiny", ["pruen"]),
    "ratio 0": ("plan llama-7b --method ppl --ratio 0 --out p.json", ["--ratio 0", "(0, 1)"]),
    "ratio 1": ("prune tiny --method ppl --ratio 1 --out new", ["--ratio 1", "(0, 1)"]),
    "ratio in percent": ("plan llama-7b --method wanda-sp --ratio 20 --out p.json", ["--ratio 20", "0.25"]),
    "ratio negative": ("plan llama-7b --method ppl --ratio -0.2 --out p.json", ["-0.2"]),
    "ratio no number": ("plan llama-7b --method ppl --ratio half", ["--ratio", "number", "'half'"]),
    "blocks no whole number": ("plan llama-7b --method ppl --blocks 2.5", ["--blocks", "integer", "'2.5'"]),
    "samples below one": ("score tiny --criterion ppl --samples 0", ["--samples", "saw '0'"]),
    "unit of no kind": ("plan tiny --method mag --ratio 0.3 --unit blok", ["'blok'", "'module'"]),
    "ratio not a number": ("plan llama-7b --method ppl --ratio nan", ["nan"]),
    "no target": ("plan llama-7b --method ppl", ["exactly one", "--ratio"]),
    "two targets": ("plan llama-7b --method ppl --ratio 0.2 --blocks 3", ["--ratio 0.2", "--blocks 3"]),
    "too many blocks": ("plan llama-7b --method ppl --blocks 32 --out p.json", ["32", "31"]),
    "too many unprotected blocks": ("plan llama-7b --method taylor+ --blocks 27", ["27", "26", "--protect 4,2"]),
    "all blocks protected": ("plan tiny --method mag --blocks 1 --protect 2,2", ["--protect 2,2"]),
    "protection of one number": ("plan llama-7b --method ppl --ratio 0.2 --protect 4", ["'4'", "4,2"]),
    "width by blocks": ("plan llama-7b --method wanda-sp --blocks 3", ["--blocks", "wanda-sp"]),
    "alignment of depth": ("plan llama-7b --method ppl --ratio 0.2 --align 64", ["--align"]),
    "scores of another criterion": ("plan tiny --method ppl --ratio 0.5 --scores mag.json", ["'mag'", "'ppl'"]),
    "scores of another model": (
        "plan llama-7b --method mag --ratio 0.5 --scores mag.json --out p.json",
        ["4 blocks", "32 blocks"],
    ),
    "scores that are a plan": ("plan tiny --method mag --ratio 0.5 --scores llama.json", ["llama.json", "$."]),
    "scores of a shape": ("score llama-7b --criterion mag", ["llama-7b", "without weights"]),
    "plan for another base": ("prune tiny --plan llama.json --out new", ["llama-7b@", "4 blocks"]),
    "blind plan on real weights": ("prune tiny --plan blind.json --out new", ["blind", "real weights"]),
    "shape pruned": ("prune llama-7b --method ppl --ratio 0.2 --out new", ["llama-7b", "without weights"]),
    "plan and method": ("prune tiny --plan llama.json --method mag --ratio 0.2 --out new", ["--plan", "--method"]),
    "plan and limits": (
        "prune tiny --plan llama.json --at-most --protect 1,1 --align 8 --length 64 --out new",
        ["leave out --at-most, --protect, --align, --length"],
    ),
    "preset and reductions": (
        "plan llama-7b --preset paper-llama-7b-taylor-20 --weight-reduction max --steps 2 --out p.json",
        ["leave out --weight-reduction, --steps"],
    ),
    "device that is not there": ("score tiny --criterion bi --device cuda:99", ["'cuda:99'", "cpu"]),
    "device that nobody has": ("eval tiny --ppl self --device tpu", ["'tpu'", "cpu"]),
    "device without values": ("prune tiny --method bi --ratio 0.3 --device meta --out new", ["'meta'", "cpu"]),
    "neither plan nor method": ("prune tiny --out new", ["--plan", "--method"]),
    "truncated plan": ("show torn.json", ["torn.json", "cut off"]),
    "missing plan": ("show none.json", ["none.json", "No such file"]),
    "folder that is no checkpoint": ("show empty", ["config.json"]),
    "difference of bases": ("diff llama.json blind.json", ["llama-7b@", "tiny@"]),
    "composed the wrong way": ("compose llama.json blind.json --out p.json", ["tiny@"]),
    "truncated weights": ("prune torn --method mag --ratio 0.25 --scores mag.json --out new", ["model.safetensors"]),
    "truncated weights scored": ("score torn --criterion mag --out s.json", ["model.safetensors"]),
    "truncated weights verified": ("verify torn", ["model.safetensors"]),
    "verified against nothing": ("verify tiny --against llama-7b", ["plan.json"]),
    "calibration JSONL cut off": (
        "score tiny --criterion ppl --calibration text.jsonl --out s.json",
        ["text.jsonl", "2"],
    ),
    "calibration ids cut off": (
        "score tiny --criterion ppl --calibration ids:bad_ids.jsonl --out s.json",
        ["bad_ids.jsonl", "2"],
    ),
    "calibration ids too large": ("eval tiny --ppl ids:large_ids.jsonl --out q.json", ["97"]),
    "calibration shorter than a sequence": (
        "score tiny --criterion ppl --calibration few.txt --out s.json",
        ["few.txt", "0 windows of 128 tokens", "10 were asked for", "shorter length"],
    ),
    "calibration with too few sequences": (
        "score tiny --criterion ppl --calibration many.txt --samples 24 --out s.json",
        ["many.txt", "23 windows of 128 tokens", "24 were asked for"],
    ),
    "calibration of blank text": ("prune tiny --method ppl --ratio 0.3 --calibration blank.txt --out new", ["no text"]),
    "calibration of an empty file": ("score tiny --criterion bi --calibration nothing", ["nothing", "no text"]),
    "evaluation of an empty file": ("eval tiny --ppl nothing --out q.json", ["nothing"]),
    "calibration without the BOS that the family needs": (
        "score gemma --criterion bi --calibration many.txt --out s.json",
        ["many.txt", "gemma2 models need a BOS", "bos_token"],
    ),
    "calibration from the hub in a wrong form": ("score tiny --criterion bi --calibration hf:a:b:c:d", ["hf:NAME"]),
    "scores that are not numbers": ("plan tiny --method mag --blocks 1 --scores nan.json", ["nan.json", "JSON"]),
    "scores that are not finite": ("plan tiny --method mag --blocks 1 --scores huge.json", ["huge.json", "range"]),
    "scores that are all equal": (
        "prune tiny --method mag --blocks 1 --scores equal.json --out new",
        ["all 4 values equal 1.0", "ranks nothing"],
    ),
    "weights that are not finite": ("score infected --criterion mag --out s.json", ["scores.blocks[1] is nan"]),
    "logits that are not finite": (
        "prune infected --method bi --blocks 1 --calibration many.txt --length 8 --out new",
        ["not finite"],
    ),
    "pickled weights scored": ("score pickled --criterion mag --out s.json", ["pytorch_model.bin", "never loaded"]),
    "pickled weights pruned": ("prune pickled --plan one.json --out new", ["pytorch_model.bin", "safetensors"]),
    "pickled weights verified": ("verify pickled", ["pytorch_model.bin", "safetensors"]),
    "plan of another revision": ("prune newer/tiny --plan one.json --out new", ["tiny@", "3 blocks"]),
    "scores of another revision": (
        "prune newer/tiny --method mag --blocks 1 --scores mag.json --out new",
        ["4 blocks", "3 blocks"],
    ),
    "calibration missing": ("eval tiny --ppl nothing.txt --out q.json", ["nothing.txt"]),
    "nothing to evaluate": ("eval tiny", ["--ppl"]),
    "output folder not ours": (f"{PRUNE} theirs", ["theirs", "plan.json", "--out"]),
    "output folder is a file": (f"{PRUNE} file", ["file"]),
    "output folder cannot be made": (f"{PRUNE} file/new", ["file"]),
    "output file in no folder": ("plan llama-7b --method ppl --ratio 0.2 --out no/p.json", ["no"]),
    "output file is a folder": ("plan llama-7b --method ppl --ratio 0.2 --out theirs", ["theirs"]),
    "output where nothing can be written": ("plan llama-7b --method ppl --ratio 0.2 --out /proc/p.json", ["/proc"]),
    "suite missing": ("sweep nosuch --dry-run", ["nosuch", "quick"]),
    "suite with an unknown key": ("sweep unknown_key.toml --out run", ["$.runtime", "'runtimes'"]),
    "suite with an unknown inner key": ("sweep nested_key.toml --out run", ["factr", "'factor'"]),
    "suite with an unknown runtime": ("sweep unknown_runtime.toml --out run", ["$.runtimes[0]", "rooflin"]),
    "suite with an unknown shape": ("sweep unknown_shape.toml --out run", ["depth-99"]),
    "suite without cells": ("sweep no_cells.toml --out run", ["$.runtimes", "empty"]),
    "suite with a syntax error": ("sweep syntax.toml --out run", ["syntax.toml"]),
    "runtime on the command line": ("sweep good.toml --runtime egaer --out run", ["egaer", "eager"]),
    "budget on the command line": ("sweep good.toml --budget 24GB --out run", ["24GB", "24GiB"]),
    "sweep into a folder not ours": ("sweep good.toml --device rtx3090 --out theirs", ["theirs"]),
    "report of no rows": ("report empty --out out", ["empty"]),
    "report of a broken run": ("report broken --out out", ["measurements.jsonl"]),
    "report into a folder not ours": ("report broken --out theirs", ["theirs"]),
    "comparison of no rows": ("compare empty empty", ["empty"]),
    "comparison of a broken run": ("compare broken broken", ["measurements.jsonl", "2"]),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_answered_in_one_line(place: Path, capfd: pytest.CaptureFixture[str], case: str):
    command, says = CASES[case]
    before = snapshot(place)
    code = console.run(app, command.split())
    out, err = capfd.readouterr()
    assert code == 2, err
    assert out == ""
    said = [line for line in err.splitlines() if not line.startswith("note: ")]  # what work needs is said before it
    assert len(said) == 1
    assert said[0].startswith("error: ")
    for part in says:
        assert part in said[0]
    assert snapshot(place) == before


def test_debug_shows_where_it_came_from(place: Path):
    with pytest.raises(Exception, match="lama"):
        console.run(app, ["--debug", "shapes", "lama-7b"])


def test_a_fresh_process_answers_alike(place: Path, run_command):
    done = run_command("plan", "lama-7b", "--method", "ppl", "--ratio", "0.2", cwd=place)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1


def obey_permissions() -> None:
    """Before exec: root must not write where the file mode forbids it (drop CAP_DAC_OVERRIDE)."""
    pr_capbset_drop, cap_dac_override = 24, 1
    ctypes.CDLL(None).prctl(pr_capbset_drop, cap_dac_override, 0, 0, 0)


@pytest.mark.parametrize("command", ["plan llama-7b --method ppl --ratio 0.2 --out locked/p", f"{PRUNE} locked/new"])
def test_no_write_permission(place: Path, command: str):
    locked = place / "locked"
    locked.mkdir(mode=0o500)
    options = {"cwd": place, "capture_output": True, "text": True, "preexec_fn": obey_permissions}
    if subprocess.run(["touch", "locked/probe"], **options).returncode == 0:
        pytest.skip("this user writes where permissions forbid it")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "bench", *command.split()], env=environment, **options)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "no permission for" in done.stderr
    assert list(locked.iterdir()) == []


def test_a_disk_that_fills_up_during_a_sweep(place: Path, run_command):
    """The kernel refuses bytes beyond a file size limit as it refuses them on a full disk: part of a line fits."""
    many = SUITE.replace("[1, 2]", "[1, 2, 3, 4, 5, 6, 7, 8]")
    (place / "many.toml").write_text(many)
    command = ["sweep", "many.toml", "--device", "rtx3090", "--out", "run"]
    done = subprocess.run(
        [sys.executable, "-m", "bench", *command],
        capture_output=True,
        text=True,
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000)),
    )
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert "--resume" in last
    assert "Traceback" not in done.stderr
    kept = store.read(place / "run").measurements
    cells = 2 * len(msgspec.structs.asdict(read_suite(str(place / "many.toml")))["batch"])
    assert 0 < len(kept) < cells

    done = run_command(*command, "--resume", cwd=place)
    assert done.returncode == 0, done.stderr
    rows = store.read(place / "run").measurements
    assert len(rows) == len({row.cell_id for row in rows}) == cells
    assert rows[: len(kept)] == kept
