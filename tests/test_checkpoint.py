"""Written checkpoints: what they hold, who can load them, and what is left when something goes wrong."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from strategies import plan_of
from transformers import AutoModelForCausalLM, PreTrainedModel

from shortllama import catalogue, checkpoint, configs, console, files, sources, surgery, tensorfile
from shortllama.errors import InputError, PlanError
from shortllama.plans import BlockKeep, Plan, read_plan, shape_after
from shortllama.scores import Cost
from shortllama.shape import ModelShape

ROOT = Path(__file__).parent.parent
PROMPT = torch.tensor([[1, 30, 22, 5, 17, 8]])

DEPTH = (BlockKeep(0), BlockKeep(2), BlockKeep(3))
UNIFORM = tuple(BlockKeep(i, "0,2-3", "0-40,50-80") for i in range(4))
MIXED = (BlockKeep(0, "", "3-9"), BlockKeep(1, "1"), BlockKeep(3, None, ""))
QUERIES = tuple(BlockKeep(i, "0-2", None, "0,3,5") for i in range(4))
KEEPS = {"depth": DEPTH, "uniform": UNIFORM, "mixed": MIXED, "queries": QUERIES}
FORMS = {"depth": "llama", "uniform": "mistral", "mixed": "shortllama", "queries": "mistral"}


def shape_like(**changes: Any) -> ModelShape:
    sizes = {"vocabulary": 97, "hidden": 64, "head_dim": 8, "blocks": 4, "query_heads": 8, "kv_heads": 4, "neurons": 96}
    return ModelShape.uniform(**{**sizes, **changes})


def stock_folder(folder: Path, shape: ModelShape, dtype: str = "float32", **options: Any) -> Path:
    """A folder as transformers writes it, with companions."""
    model = surgery.build(shape, dtype=dtype, std=0.15)
    model.generation_config.update(max_length=33)
    model.save_pretrained(folder, **options)
    (folder / "tokenizer_config.json").write_text('{"note": "kept as it is"}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "LICENSE").write_text("of the weights")
    (folder / "training_args.bin").write_bytes(b"not ours to copy")
    return folder


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stock_folder(tmp_path_factory.mktemp("dense") / "model", shape_like())


def plan_for(folder: Path, keep: tuple[BlockKeep, ...]) -> Plan:
    return plan_of(sources.from_folder("m", folder).shape, keep)


def load_bare(folder: Path, **options: Any) -> PreTrainedModel:
    """Load without the tokenizer, which the folders of these tests do not really have."""
    hidden = folder / "tokenizer_config.json"
    hidden.rename(hidden.with_suffix(".off"))
    try:
        return checkpoint.load(folder, **options)[0]
    finally:
        hidden.with_suffix(".off").rename(hidden)


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        return model(PROMPT).logits


def test_our_loader_equals_stock_transformers(dense: Path):
    ours, stock = load_bare(dense), AutoModelForCausalLM.from_pretrained(dense)
    assert type(ours) is type(stock)
    assert torch.equal(logits(ours), logits(stock))
    assert ours.generation_config.max_length == stock.generation_config.max_length == 33
    assert not ours.training


@pytest.mark.parametrize("name", KEEPS)
def test_what_is_written_is_what_surgery_makes_and_stock_loads_what_it_can(dense: Path, tmp_path: Path, name: str):
    plan = plan_for(dense, KEEPS[name])
    manifest = checkpoint.write(dense, plan, tmp_path / "out")
    expected = surgery.apply(plan, load_bare(dense))
    ours = load_bare(tmp_path / "out")
    assert manifest.model_type == FORMS[name]
    assert type(ours) is type(expected)  # one class for dense and pruned, whatever stock transformers uses
    assert torch.equal(logits(ours), logits(expected))
    assert surgery.shape_of(ours) == sources.from_folder("m", tmp_path / "out").shape
    assert surgery.shape_of(ours) == shape_after(shape_like(), plan.keep)
    if manifest.form == "stock":
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert stock.config.model_type == FORMS[name]
        assert (logits(stock) - logits(expected)).abs().max() < 1e-6
        assert surgery.shape_of(stock) == surgery.shape_of(expected)
    else:
        with pytest.raises((KeyError, ValueError), match="shortllama"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_costs_that_went_before_are_in_the_manifest(dense: Path, tmp_path: Path):
    scoring = Cost(2.0, None, 64, block_passes=10.0, reasons={"peak_bytes": "not here"})
    manifest = checkpoint.write(dense, plan_for(dense, KEEPS["depth"]), tmp_path / "out", costs={"scoring": scoring})
    assert manifest.costs == {"scoring": scoring, "writing": manifest.costs["writing"]}
    assert checkpoint.read_manifest(tmp_path / "out") == manifest
    assert checkpoint.read_manifest(dense) is None


@pytest.mark.parametrize("name", KEEPS)
def test_from_file_to_file_equals_through_a_model(dense: Path, tmp_path: Path, name: str):
    plan = plan_for(dense, KEEPS[name])
    written = checkpoint.write(dense, plan, tmp_path / "files")
    saved = checkpoint.save(surgery.apply(plan, load_bare(dense)), plan, tmp_path / "model", companions=dense)
    assert written.weights == saved.weights
    assert msgspec.structs.replace(saved, costs=written.costs) == written
    assert {*written.costs} == {*saved.costs} == {"writing"}
    assert written.costs["writing"].wall_s > 0
    assert checkpoint.read_manifest(tmp_path / "files") == written


@pytest.mark.parametrize("name", KEEPS)
def test_a_pruned_folder_is_a_base_again(dense: Path, tmp_path: Path, name: str):
    checkpoint.write(dense, plan_for(dense, KEEPS[name]), tmp_path / "once")
    again = plan_for(tmp_path / "once", (BlockKeep(1), BlockKeep(2)))
    checkpoint.write(tmp_path / "once", again, tmp_path / "twice")
    expected = surgery.apply(again, load_bare(tmp_path / "once"))
    assert torch.equal(logits(load_bare(tmp_path / "twice")), logits(expected))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_dtype_and_ties_survive(tmp_path: Path, dtype: str, family: str):
    traits = {"qwen2": {"biases": ("q", "k", "v")}, "qwen3": {"qk_norm": True}}.get(family, {})
    source = stock_folder(tmp_path / "source", shape_like(family=family, tied=True, **traits), dtype)
    plan = plan_for(source, DEPTH)
    manifest = checkpoint.write(source, plan, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == manifest.dtype == dtype
    assert "torch_dtype" not in config
    assert "lm_head.weight" not in tensorfile.in_folder(tmp_path / "out")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert stock.dtype == getattr(torch, dtype)
    assert stock.lm_head.weight is stock.model.embed_tokens.weight
    ours = load_bare(tmp_path / "out", attention="sdpa")
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    assert torch.equal(logits(ours), logits(stock))
    assert load_bare(tmp_path / "out", dtype="float32").dtype == torch.float32


def test_sharded_sources_and_results(tmp_path: Path):
    source = stock_folder(tmp_path / "source", shape_like(), max_shard_size="100KB")
    assert len(list(source.glob("model-*.safetensors"))) > 2
    plan = plan_for(source, UNIFORM)
    manifest = checkpoint.write(source, plan, tmp_path / "out", shard_bytes=100_000)
    assert len(manifest.weights) > 2
    assert all((tmp_path / "out" / name).stat().st_size < 110_000 for name in manifest.weights)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = surgery.apply(plan, load_bare(source))
    assert (logits(stock) - logits(expected)).abs().max() < 1e-6


def test_companions_plan_and_manifest_travel(dense: Path, tmp_path: Path):
    plan = plan_for(dense, DEPTH)
    manifest = checkpoint.write(dense, plan, tmp_path / "out")
    copied = {"LICENSE", "chat_template.jinja", "generation_config.json", "tokenizer_config.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == copied | {
        "config.json", "manifest.json", "model.safetensors", "plan.json",
    }  # fmt: skip
    assert all((tmp_path / "out" / name).read_bytes() == (dense / name).read_bytes() for name in copied)
    assert read_plan(tmp_path / "out") == plan
    file = tmp_path / "out" / "manifest.json"
    assert files.decode_json(file.read_bytes(), checkpoint.Manifest, "manifest") == manifest
    assert {*manifest.weights, *manifest.companions} == copied | {"model.safetensors"}
    assert str(tmp_path) not in file.read_text() + (tmp_path / "out" / "config.json").read_text()
    again = checkpoint.write(dense, plan, tmp_path / "again")
    assert msgspec.structs.replace(again, costs=manifest.costs) == manifest, "only what it took may differ"
    for path in (tmp_path / "out").iterdir():
        assert path == file or path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


def test_old_files_with_torch_dtype_and_rotary_buffers(dense: Path, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    old = shutil.copytree(dense, tmp_path / "old")
    tensors = load_file(old / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, old / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((old / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")
    (old / "config.json").write_text(json.dumps(config))
    checkpoint.write(old, plan_for(old, DEPTH), tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["dtype"], "torch_dtype" in written) == ("float32", False)
    assert torch.equal(
        logits(load_bare(tmp_path / "out")), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    )


def test_real_weights_with_their_tokenizer(stories: Path, tmp_path: Path):
    plan = plan_for(stories, tuple(BlockKeep(i, "0,1,3") for i in range(5)))
    checkpoint.write(stories, plan, tmp_path / "out")
    _, expected = checkpoint.load(stories)
    model, tokenizer = checkpoint.load(tmp_path / "out")
    text = "Once upon a time, there was a tiny model."
    assert tokenizer(text)["input_ids"] == expected(text)["input_ids"]
    own = plan_for(stories, (BlockKeep(0), BlockKeep(1, "0"), BlockKeep(4)))
    checkpoint.write(stories, own, tmp_path / "own")
    _, tokenizer = checkpoint.load(tmp_path / "own")
    assert tokenizer(text)["input_ids"] == expected(text)["input_ids"]
    assert model.config.model_type == "llama"


def test_catalogue_names_have_random_weights():
    model, tokenizer = checkpoint.load("llama-7b/wanda-sp-20", dtype="float16", device="meta")
    assert tokenizer is None
    assert sum(p.numel() for p in model.parameters()) == catalogue.lookup("llama-7b/wanda-sp-20").parameters


# -- refusals and faults ----------------------------------------------------------------------------------------------


def rewritten(dense: Path, folder: Path, change: Any) -> Path:
    """A copy of `dense` whose tensors went through `change`."""
    from safetensors.torch import load_file, save_file

    copied = shutil.copytree(dense, folder)
    tensors = load_file(copied / "model.safetensors")
    change(tensors)
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    return copied


NORM, GATE = "model.norm.weight", "model.layers.1.mlp.gate_proj.weight"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda tensors: tensors.pop(NORM), r"no tensor 'model.norm.weight' in its weights \(1 of 39 missing\)"),
        (lambda tensors: tensors.update({GATE: torch.ones(95, 64)}), r"is F32 \[95, 64\], config.json says \[96, 64\]"),
        (lambda tensors: tensors.update({GATE: torch.ones(96, 64).to(torch.int8)}), r"is I8 \[96, 64\]"),
        (lambda tensors: tensors.update({"lora_A.weight": torch.ones(2)}), "'lora_A.weight' is not part of a llama"),
    ],
)
def test_weights_that_do_not_fit_the_config_are_refused(dense: Path, tmp_path: Path, change: Any, says: str):
    broken = rewritten(dense, tmp_path / "broken", change)
    with pytest.raises(InputError, match=says) as caught:
        checkpoint.load(broken)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=says):
        checkpoint.write(broken, plan_for(dense, DEPTH), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_and_pickled_weights_are_refused_and_nothing_is_left(dense: Path, tmp_path: Path):
    cut = shutil.copytree(dense, tmp_path / "cut")
    whole = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(whole[:-5])
    pickled = shutil.copytree(dense, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    for folder, says in ((cut, "not a whole safetensors file"), (pickled, "pickles are never loaded")):
        with pytest.raises(InputError, match=says):
            checkpoint.load(folder)
        with pytest.raises(InputError, match=says):
            checkpoint.write(folder, plan_for(dense, DEPTH), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "pickled"]


def test_plans_that_must_not_be_written(dense: Path, tmp_path: Path):
    plan = plan_for(dense, DEPTH)
    other = plan_of(shape_like(neurons=95), DEPTH)
    cases = [
        (msgspec.structs.replace(plan, blind=True), "is blind"),
        (msgspec.structs.replace(plan, compensation="flap"), "computed from a loaded model"),
        (other, "plan is for m@"),
    ]
    for bad, says in cases:
        with pytest.raises(PlanError, match=says):
            checkpoint.write(dense, bad, tmp_path / "out")
    with pytest.raises(InputError, match="shape without weights"):
        checkpoint.write("llama-7b", plan_of(catalogue.lookup("llama-7b"), DEPTH), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_only_a_folder_of_ours_is_replaced(dense: Path, tmp_path: Path):
    plan = plan_for(dense, DEPTH)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match=r"holds no plan.json, so it is not ours"):
        checkpoint.write(dense, plan, foreign)
    assert [path.name for path in foreign.iterdir()] == ["thesis.tex"]
    checkpoint.write(dense, plan, tmp_path / "out")
    checkpoint.write(dense, plan_for(dense, MIXED), tmp_path / "out")
    assert read_plan(tmp_path / "out").keep == MIXED
    with pytest.raises(InputError, match="is the source itself"):
        checkpoint.write(tmp_path / "out", plan_for(tmp_path / "out", DEPTH[:1]), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["foreign", "out"]


@pytest.mark.parametrize("doomed", [".safetensors", ".tmp"])
def test_a_full_disk_leaves_the_old_folder_and_no_part_of_the_new(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, doomed: str
):
    out = tmp_path / "out"
    checkpoint.write(dense, plan_for(dense, MIXED), out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    synced = os.fsync

    def full(handle: int) -> None:
        if Path(f"/proc/self/fd/{handle}").readlink().name.endswith(doomed):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        synced(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"cannot be written \(No space left on device\)"):
        checkpoint.write(dense, plan_for(dense, DEPTH), out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


KILLED = """
import os, sys
from pathlib import Path
from shortllama import checkpoint
from shortllama.plans import read_plan
calls = 0
real = os.fsync
def dying(handle):
    global calls
    calls += 1
    if calls == int(sys.argv[4]):
        os._exit(9)
    real(handle)
os.fsync = dying
checkpoint.write(Path(sys.argv[1]), read_plan(Path(sys.argv[2])), Path(sys.argv[3]), shard_bytes=100_000)
"""


def in_process(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@pytest.mark.parametrize("death", [1, 3, 5])
def test_a_killed_writer_leaves_nothing_that_looks_finished(dense: Path, tmp_path: Path, death: int):
    (tmp_path / "plan.json").write_bytes(files.encode_json(plan_for(dense, DEPTH)))
    done = in_process(KILLED, dense, tmp_path / "plan.json", tmp_path / "out", death)
    assert done.returncode == 9, done.stderr
    assert not (tmp_path / "out").exists()
    left = [path.name for path in tmp_path.iterdir() if path.name != "plan.json"]
    assert all(name.startswith(".out.") and name.endswith(".tmp") for name in left)


# Writes as in life, but stops a moment after each piece and says how far it is.
SLOW = """
import resource, sys, time
from pathlib import Path
from shortllama import checkpoint, console, tensorfile
from shortllama.plans import read_plan
def progress(done, total):
    print(done, total, flush=True)
    time.sleep(0.2)
if len(sys.argv) > 4:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]),) * 2)
class App:
    def __call__(self, *given, **options):
        checkpoint.write(*map(Path, sys.argv[1:2]), read_plan(Path(sys.argv[2])), Path(sys.argv[3]), progress=progress)
sys.exit(console.run(App(), []))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("existed", [False, True])
def test_a_writer_stopped_in_the_middle_leaves_nothing_that_looks_finished(
    dense: Path, tmp_path: Path, number: signal.Signals, existed: bool
):
    out = tmp_path / "out"
    if existed:
        checkpoint.write(dense, plan_for(dense, MIXED), out)
    before = {path.name: path.read_bytes() for path in out.iterdir()} if existed else {}
    (tmp_path / "plan.json").write_bytes(files.encode_json(plan_for(dense, DEPTH)))
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, dense, tmp_path / "plan.json", out],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    done, total = map(int, process.stdout.readline().split())
    assert 0 < done < total
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    left = [path.name for path in tmp_path.iterdir() if path.name not in ("plan.json", "out")]
    if number == signal.SIGINT:
        assert (process.returncode, errors) == (130, "error: interrupted\n")
        assert not left
    else:
        assert process.returncode == -number
        assert all(name.startswith(".out.") and name.endswith(".tmp") for name in left)
        assert not any((tmp_path / name / "manifest.json").exists() for name in left)
    assert out.exists() == existed
    assert ({path.name: path.read_bytes() for path in out.iterdir()} if existed else {}) == before


def test_a_disk_that_fills_up_while_weights_are_written_is_one_line(dense: Path, tmp_path: Path):
    (tmp_path / "plan.json").write_bytes(files.encode_json(plan_for(dense, DEPTH)))
    done = in_process(SLOW, dense, tmp_path / "plan.json", tmp_path / "out", 50_000)
    assert (done.returncode, done.stderr) == (2, "error: model.safetensors: cannot be written (File too large)\n")
    assert done.stdout, "some of it was written"
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_a_disk_without_room_is_noticed_before_anything_is_written(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    plan = plan_for(dense, DEPTH)
    wanted = shape_after(shape_like(), plan.keep).weight_bytes("float32")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=wanted - 1))
    steps: list[tuple[int, int]] = []
    with pytest.raises(InputError, match=rf"{wanted - 1:,} bytes are free, the weights need {wanted:,};") as caught:
        checkpoint.write(dense, plan, tmp_path / "out", progress=lambda *step: steps.append(step))
    assert "\n" not in str(caught.value)
    assert ".out." not in str(caught.value)
    assert not steps
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=wanted))
    checkpoint.write(dense, plan, tmp_path / "out")


def test_an_interruption_while_the_old_folder_is_replaced_brings_it_back(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "out"
    checkpoint.write(dense, plan_for(dense, MIXED), out)
    replace = os.replace

    def interrupted(source: Path, target: Path) -> None:
        if target == out and source.name.endswith(".tmp"):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.write(dense, plan_for(dense, DEPTH), out)
    assert read_plan(out).keep == MIXED
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("shard_bytes", [100_000, 10**9])
def test_progress_counts_every_byte_of_the_weights(dense: Path, tmp_path: Path, shard_bytes: int):
    steps: list[tuple[int, int]] = []
    plan = plan_for(dense, DEPTH)
    options = {"shard_bytes": shard_bytes, "progress": lambda *step: steps.append(step)}
    checkpoint.write(dense, plan, tmp_path / "files", **options)
    wanted = shape_after(shape_like(), plan.keep).weight_bytes("float32")
    assert {total for _, total in steps} == {wanted}
    assert [done for done, _ in steps] == sorted({done for done, _ in steps})
    assert steps[0][0] < steps[-1][0] == wanted
    written = steps.copy()
    steps.clear()
    checkpoint.save(surgery.apply(plan, load_bare(dense)), plan, tmp_path / "model", companions=dense, **options)
    assert steps == written


def test_a_terminal_shows_the_bytes_of_what_is_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    with console.steps(in_bytes=True) as progress:
        progress("writing out", 5_000_000, 20_000_000)
    assert "writing out" in (seen := capsys.readouterr().err)
    assert "5.0/20.0 MB" in seen


MEASURED = """
import re, sys
from pathlib import Path
from shortllama import checkpoint
from shortllama.plans import read_plan
import numpy
def peak():  # not getrusage's, which a child inherits from the process that started it
    return int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) / 1024
before = peak()
checkpoint.write(Path(sys.argv[1]), read_plan(Path(sys.argv[2])), Path(sys.argv[3]))
print(peak() - before)
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""


def sparse_folder(folder: Path, shape: ModelShape) -> Path:
    """A checkpoint of zeros that takes no disk space: a header and a hole."""
    from shortllama import layout

    entries: dict[str, Any] = {}
    offset = 0
    for name, size in layout.tensors(shape).items():
        count = size[0] * (size[1] if len(size) > 1 else 1) * 4
        entries[name] = {"dtype": "F32", "shape": size, "data_offsets": [offset, offset + count]}
        offset += count
    text = json.dumps(entries).encode()
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    (folder / "config.json").write_bytes(files.encode_json(configs.config_of(shape)))
    return folder


@pytest.mark.parametrize("keep", ["depth", "uniform"])
def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path, keep: str):
    shape = shape_like(vocabulary=40_000, hidden=512, neurons=4096)
    folder = sparse_folder(tmp_path / "large", shape)
    assert (folder / "model.safetensors").stat().st_size > 250e6
    plan = plan_for(folder, KEEPS[keep])
    (tmp_path / "plan.json").write_bytes(files.encode_json(plan))
    done = in_process(MEASURED, folder, tmp_path / "plan.json", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 48, f"{done.stdout} MiB for tensors of 80 MB in a file of 250 MB"
