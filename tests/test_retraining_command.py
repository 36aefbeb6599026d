"""`shortllama retrain`: a checkpoint in, a verified one out; killed, in two processes, without memory, misused."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from strategies import plan_of

from shortllama import checkpoint, console, plans, surgery
from shortllama.plans import BlockKeep
from shortllama.retraining import record
from shortllama.shape import ModelShape

DENSE = ModelShape.uniform(vocabulary=61, hidden=32, head_dim=8, blocks=4, query_heads=4, kv_heads=2, neurons=48)
KEEP = (BlockKeep(0), BlockKeep(1, kv_groups="0", neurons="0-20"), BlockKeep(3, kv_groups=""))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, a pruned one of uneven widths without one attention, and ids to learn from, in one folder."""
    folder = tmp_path_factory.mktemp("retraining")
    dense = surgery.build(DENSE, std=0.2)
    everything = plan_of(DENSE, tuple(BlockKeep(index) for index in range(4)))
    checkpoint.save(dense, everything, folder / "dense")
    plan = plans.make_plan(model="dense", shape=DENSE, method="test", target=plans.Target("shape", "x"), keep=KEEP)
    checkpoint.save(surgery.apply(plan, dense), plan, folder / "pruned")
    shutil.copytree(folder / "dense", folder / "bare")
    (folder / "bare" / "plan.json").unlink()
    six = ModelShape.uniform(vocabulary=61, hidden=32, head_dim=8, blocks=6, query_heads=4, kv_heads=2, neurons=48)
    checkpoint.save(surgery.build(six), plan_of(six, tuple(map(BlockKeep, range(6)))), folder / "other")
    rng = np.random.default_rng(0)
    with (folder / "ids.jsonl").open("w") as file:
        for _ in range(80):
            start, stride = rng.integers(0, 61), rng.integers(1, 4)
            file.write(json.dumps(((start + stride * np.arange(16)) % 61).tolist()) + "\n")
    return folder


def arguments(out: str, *more: object, recipe: str = "lora", steps: int = 12) -> list[str]:
    given = ["retrain", "pruned", "--recipe", recipe, "--data", "ids:ids.jsonl", "--out", out]
    scale = ["--steps", steps, "--batch", 6, "--micro-batch", 2, "--lr", 1e-2, "--device", "cpu"]
    return [str(one) for one in (*given, *scale, *more)]


def series(folder: Path) -> list[list[float | None]]:
    found = record.read(folder)
    assert found is not None
    return [list(stage.losses) for stage in found.stages]


@pytest.fixture
def command(folders: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """Return run(*arguments) -> (exit code, stdout, stderr), in this process, in the folder of the models."""
    from bench.cli import app

    monkeypatch.chdir(folders)

    def run(*given: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = console.run(app, [str(one) for one in given])
        return code, *capfd.readouterr()

    return run


def test_a_retrained_checkpoint_is_verified_and_says_what_was_done(folders: Path, command):
    code, _, said = command(*arguments("out"))
    assert code == 0, said
    assert "memory: about" in said
    assert "are free" in said
    assert "wrote out, verified" in said
    assert not (folders / "out.state").exists()
    assert plans.read_plan(folders / "out") == plans.read_plan(folders / "pruned")
    manifest = json.loads((folders / "out" / "manifest.json").read_text())
    assert record.FILE in manifest["companions"]
    assert command("verify", "out")[0] == 0
    (stage,) = json.loads(command("show", "out", "--json")[1])["retraining"]["stages"]
    assert (stage["recipe"], len(stage["losses"]), stage["data"]["source"]) == ("lora", 12, "ids:ids.jsonl")
    assert stage["cost"]["wall_s"] > 0
    assert stage["cost"]["tokens"] == 12 * 6 * 16
    assert stage["held_out"][-1]["nll"] < stage["held_out"][0]["nll"]
    assert "ids:ids.jsonl" in command("show", "out")[1]
    # Its outputs are its own now, whatever its plan says.
    code, _, said = command("verify", "out", "--against", "dense")
    assert code == 2
    assert "was retrained" in said


def test_a_retrained_checkpoint_remembers_what_it_was_retrained_before(folders: Path, command):
    assert command(*arguments("first", steps=2))[0] == 0
    given = ["--recipe", "cpt", "--data", "self", "--out", "twice", "--steps", 3, "--batch", 2, "--length", 8]
    code, out, said = command("retrain", "first", *given, "--json")
    assert code == 0, said
    document = json.loads(out)
    assert [one["recipe"] for one in document["retraining"]["stages"]] == ["lora", "cpt"]
    assert all(check["passed"] for check in document["verification"]["checks"])
    assert record.read(folders / "twice") is not None


def test_the_plan_names_the_teacher_and_its_blocks(command):
    code, out, said = command(*arguments("taught", "--hidden", 0.5, "--json", recipe="distill"))
    assert code == 0, said
    (stage,) = json.loads(out)["retraining"]["stages"]
    assert stage["teacher"] == "dense"
    assert stage["losses"][-1] < stage["losses"][0]


def start(folder: Path, *given: str, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "bench", *given],
        cwd=folder,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
    )


def test_a_killed_run_goes_on_to_the_same_losses(folders: Path, command):
    assert command(*arguments("whole", steps=150))[0] == 0
    child = start(folders, *arguments("killed", "--save-every", "0", steps=150))
    state = folders / "killed.state"
    deadline = time.monotonic() + 200
    while not any(state.glob("stage-0-step-000000[1-9]*")) and time.monotonic() < deadline and child.poll() is None:
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert child.returncode == -signal.SIGKILL, "it was over before it could be killed"
    assert not (folders / "killed").exists()
    code, _, said = command(*arguments("killed", steps=150))
    assert code == 2
    assert "give --resume to go on" in said
    code, _, said = command(*arguments("killed", "--resume", steps=150))
    assert code == 0, said
    assert series(folders / "killed") == series(folders / "whole")
    found = record.read(folders / "killed")
    assert found is not None
    assert found.stages[0].cost.runs == 2, "it must have gone on, not begun again"
    assert not state.exists()
    code, _, said = command(*arguments("killed", "--resume", steps=150))
    assert code == 0
    assert "nothing to resume" in said


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.mark.parametrize("recipe", ["lora", "cpt"])
def test_two_processes_do_what_one_does(folders: Path, command, recipe: str):
    """As launchers start them: told by the environment. Dropout and a last, odd micro-batch included."""
    assert command(*arguments(f"one-{recipe}", "--batch", "5", recipe=recipe))[0] == 0
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    given = arguments(f"two-{recipe}", "--batch", "5", recipe=recipe)
    both = [start(folders, *given, RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in range(2)]
    said = [child.communicate(timeout=300)[1] for child in both]
    assert [child.returncode for child in both] == [0, 0], said
    (one,), (two,) = series(folders / f"one-{recipe}"), series(folders / f"two-{recipe}")
    assert two == pytest.approx(one, rel=1e-5)
    assert one[-1] != one[0]
    found = record.read(folders / f"two-{recipe}")
    assert found is not None
    assert found.stages[0].processes == 2
    assert "wrote" in said[0]
    assert "wrote" not in said[1]


def test_processes_with_different_data_are_told(folders: Path):
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    (folders / "other.jsonl").write_text("[1, 2, 3]\n" * 80)
    other = [one.replace("ids:ids.jsonl", "ids:other.jsonl") for one in arguments("different")]
    both = [
        start(folders, *given, RANK=str(rank), LOCAL_RANK=str(rank), **shared)
        for rank, given in enumerate((arguments("different"), other))
    ]
    said = [child.communicate(timeout=300)[1] for child in both]
    assert [child.returncode for child in both] == [2, 2]
    assert all("see different data" in one for one in said)


def test_running_out_of_memory_is_one_line(folders: Path):
    """A real limit: logits of so many sequences at once do not fit into it."""
    given = arguments("large", "--batch", "300000", "--micro-batch", "300000", recipe="cpt", steps=1)
    limit = 3 << 30
    child = subprocess.run(
        [sys.executable, "-m", "bench", *given],
        cwd=folders,
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert child.returncode == 2, child.stderr
    assert "note: that may not fit" in child.stderr or "out of memory" in child.stderr
    last = child.stderr.strip().splitlines()[-1]
    assert last.startswith(
        "error: out of memory at step 0, in 300000 sequences of up to 16 tokens at once; lower --micro"
    )
    assert "Traceback" not in child.stderr


BAD = [
    ("pruned --recipe sft --data self --out x", "recipe 'sft' is unknown"),
    ("pruned --recipe lora --data self --out x", "give --steps"),
    ("pruned --recipe lora --data self --out pruned", "is the source itself"),
    ("pruned --recipe lora --data self --out good.jsonl", "is a file"),
    ("llama-7b --recipe lora --data self --out x", "a shape without weights"),
    ("pruned --recipe cpt --data a --data b --out x", "takes one --data"),
    ("pruned --recipe cpt --rank 2 --data a --out x", "recipe cpt has no rank"),
    ("pruned --recipe lora --data no.json --out x", "no such file"),
    ("pruned --recipe lora --data bad.jsonl --out x", "bad.jsonl:2: saw keys output"),
    ("pruned --recipe lora --data good.jsonl --out x", "without a tokenizer"),
    ("pruned --recipe lora --teacher dense --data a --out x", "use recipe distill"),
    ("bare --recipe distill --data ids:ids.jsonl --out x", "give --teacher MODEL"),
    ("pruned --recipe distill --teacher other --hidden 1 --data ids:ids.jsonl --out x", "leave out --hidden"),
    ("pruned --recipe lora --data ids:ids.jsonl --device cuda:9 --out x", "cuda:9"),
]


@pytest.mark.parametrize(("given", "said"), BAD, ids=[given for given, _ in BAD])
def test_bad_input_is_one_line_and_writes_nothing(folders: Path, command, given: str, said: str):
    good = json.dumps({"instruction": "a", "output": "b"})
    (folders / "good.jsonl").write_text(good + "\n")
    (folders / "bad.jsonl").write_text(good + '\n{"output": "b"}\n')
    code, _, error = command("retrain", *given.split())
    assert code == 2, error
    assert said in error
    assert len(error.strip().splitlines()) == 1
    assert not (folders / "x").exists()
    assert not (folders / "x.state").exists()
