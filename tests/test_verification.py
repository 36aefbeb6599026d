"""Verification passes what is right and fails what was planted, each fault by the check that should see it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from strategies import plan_of
from transformers import AutoModelForCausalLM

from bench.runtimes import loading
from bench.runtimes.protocol import Options
from bench.subjects import Subject
from shortllama import checkpoint, console, display, sources, stock_reload, surgery, verification
from shortllama.cli import app
from shortllama.errors import InputError, PlanError, VerificationError
from shortllama.plans import BlockKeep, write_plan
from shortllama.shape import ModelShape

STOCK = "stock transformers in a fresh process"
MASKED = "masked dense model"
CACHE = "decoding with a cache"
UNIFORM = tuple(BlockKeep(i, "0,2-3", "0-40,50-80") for i in range(4))
MIXED = (BlockKeep(0, "", "3-9"), BlockKeep(1, "1"), BlockKeep(3, None, ""))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = ModelShape.uniform(vocabulary=97, hidden=64, head_dim=8, blocks=4, query_heads=8, kv_heads=4, neurons=96)
    folder = tmp_path_factory.mktemp("dense") / "model"
    surgery.build(shape, std=0.15).save_pretrained(folder)
    return folder


def written(dense: Path, out: Path, keep: tuple[BlockKeep, ...]) -> Path:
    checkpoint.write(dense, plan_of(sources.from_folder("m", dense).shape, keep), out)
    return out


def passed(report: verification.Report) -> dict[str, bool]:
    return {check.name: check.passed for check in report.checks}


def test_a_uniform_width_is_verified_by_stock_transformers_and_by_the_mask(dense: Path, tmp_path: Path):
    report = verification.verify(written(dense, tmp_path / "out", UNIFORM), dense)
    assert report.ok, report.failures
    assert (report.form, report.loaded_as) == ("stock", "MistralForCausalLM")
    assert passed(report).keys() == {"files", "shape", STOCK, CACHE, "shape of the plan", MASKED}
    assert report.failures == ""


def test_our_own_form_is_verified_by_the_mask(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    report = verification.verify(written(dense, tmp_path / "out", MIXED), dense)
    assert {fit.engine: fit.can for fit in report.engines} == {"transformers": False, "vLLM": False, "llama.cpp": True}
    display.show_report(report)
    assert "as deci, by export --to gguf" in capsys.readouterr().out
    assert report.ok, report.failures
    assert (report.form, report.loaded_as) == ("shortllama", None)
    assert passed(report).keys() == {"files", "shape", CACHE, "shape of the plan", MASKED}


def test_the_wrong_units_are_noticed(dense: Path, tmp_path: Path):
    out = written(dense, tmp_path / "out", MIXED)
    claimed = (MIXED[0], BlockKeep(1, "2"), MIXED[2])  # as many groups, but another one
    write_plan(out / "plan.json", plan_of(sources.from_folder("m", dense).shape, claimed))
    report = verification.verify(out, dense)
    assert [name for name, fine in passed(report).items() if not fine] == [MASKED]
    assert "greedy tokens differ" in report.failures


def test_another_shape_than_the_plans_is_noticed(dense: Path, tmp_path: Path):
    out = written(dense, tmp_path / "out", MIXED)
    write_plan(out / "plan.json", plan_of(sources.from_folder("m", dense).shape, UNIFORM))
    assert [name for name, fine in passed(verification.verify(out, dense)).items() if not fine] == ["shape of the plan"]


def test_missing_biases_are_noticed(dense: Path, tmp_path: Path):
    out = written(dense, tmp_path / "out", MIXED)
    plan = plan_of(sources.from_folder("m", dense).shape, MIXED)
    write_plan(out / "plan.json", msgspec.structs.replace(plan, compensation="flap"))
    report = verification.verify(out, dense)
    assert [name for name, fine in passed(report).items() if not fine] == ["shape of the plan"]
    assert "blocks or biases differ" in report.failures


def test_bytes_that_changed_are_noticed(dense: Path, tmp_path: Path):
    out = written(dense, tmp_path / "out", MIXED)
    weights = bytearray((out / "model.safetensors").read_bytes())
    weights[-2] ^= 1
    (out / "model.safetensors").write_bytes(weights)
    report = verification.verify(out)
    assert [name for name, fine in passed(report).items() if not fine] == ["files"]
    assert "changed since written: model.safetensors" in report.failures


def test_a_folder_that_stock_transformers_reads_otherwise_fails(dense: Path, tmp_path: Path):
    out = written(dense, tmp_path / "out", (BlockKeep(0), BlockKeep(2)))
    config = json.loads((out / "config.json").read_text())
    # Our loader goes by the family, which has no window; stock transformers by the model type, which has one.
    config |= {"model_type": "mistral", "shortllama_family": "llama", "sliding_window": 2}
    (out / "config.json").write_text(json.dumps(config))
    report = verification.verify(out)
    assert passed(report)[STOCK] is False
    assert "largest logit difference" in report.failures


def test_what_cannot_be_verified_is_refused(dense: Path, tmp_path: Path):
    out = written(dense, tmp_path / "out", MIXED)
    with pytest.raises(PlanError, match="plan is for"):
        verification.verify(out, "llama-7b")
    (out / "plan.json").unlink()
    with pytest.raises(InputError, match=r"no plan.json"):
        verification.verify(out, dense)
    shutil.copyfile(dense / "config.json", out / "config.json")
    with pytest.raises(InputError, match=r"do config and weights belong together|missing"):
        verification.verify(out)


def test_differences_of_what_cannot_be_compared_are_infinite():
    assert verification.relative_difference([[1.0]], [[1.0, 2.0]]) == float("inf")
    assert verification.relative_difference([[float("nan")]], [[1.0]]) == float("inf")
    assert verification.relative_difference([[1.0, -4.0]], [[1.0, -3.0]]) == pytest.approx(1 / 3)


def rwkv(folder: Path, **config: Any) -> Path:
    """A folder of a family whose cached decoding is wrong in transformers, for more than one sequence."""
    from transformers import RwkvConfig, RwkvForCausalLM

    sizes = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 3, "rescale_every": 0}
    torch.manual_seed(0)
    model = RwkvForCausalLM(RwkvConfig(**sizes, **config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("config", "says"), [({}, "largest logit difference"), ({"attention_hidden_size": 48}, r"fails \(RuntimeError: ")]
)
def test_a_cache_with_which_decoding_is_wrong_is_noticed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], config: dict[str, int], says: str
):
    folder = rwkv(tmp_path / "rwkv", **config)
    report = verification.verify(folder)
    assert [name for name, fine in passed(report).items() if not fine] == [CACHE]
    assert re.search(says, report.failures)
    assert "set use_cache to false in config.json" in report.failures
    capsys.readouterr()
    assert console.run(app, ["verify", str(folder)]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert CACHE in line
    loaded, _ = checkpoint.load(folder)
    with pytest.raises(VerificationError, match=rf"RwkvForCausalLM: {CACHE}: .*{says}"):
        verification.check_cache(loaded)


def test_a_folder_written_of_such_a_family_decodes_without_a_cache(tmp_path: Path):
    dense = rwkv(tmp_path / "rwkv")
    report = verification.verify(written(dense, tmp_path / "out", (BlockKeep(0), BlockKeep(2))), dense)
    assert report.ok, report.failures
    assert json.loads((tmp_path / "out" / "config.json").read_text())["use_cache"] is False
    assert next(check.seen for check in report.checks if check.name == CACHE).startswith("not used")
    model, _ = checkpoint.load(tmp_path / "out")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    prompt = torch.tensor([[5, 17, 30], [2, 60, 41]])
    for one in (model, stock):
        expected = one.generate(prompt, max_new_tokens=8, do_sample=False, use_cache=False)
        assert torch.equal(one.generate(prompt, max_new_tokens=8, do_sample=False), expected)
    with pytest.raises(VerificationError, match=CACHE):  # with a cache, as it would be measured
        verification.check_cache(model)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cache_that_is_numbered_wrongly_is_noticed(dense: Path, dtype: str):
    model, _ = checkpoint.load(dense, dtype=dtype)
    verification.check_cache(model)
    first, second = model.model.layers[:2]
    second.self_attn.layer_idx = first.self_attn.layer_idx
    with pytest.raises(VerificationError, match="what it generates with a cache is wrong"):
        verification.check_cache(model)


def test_nan_in_cached_logits_is_an_infinite_difference(dense: Path):
    model, _ = checkpoint.load(dense)
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    assert stock_reload.cached_decoding(model, [1, 2, 3], 2) == {"difference": float("inf"), "error": None}


def test_a_model_whose_cache_is_wrong_is_not_measured(tmp_path: Path):
    folder = rwkv(tmp_path / "rwkv")
    subject = Subject("rwkv", sources.from_folder("rwkv", folder).shape, "rwkv", folder=str(folder))
    with pytest.raises(VerificationError, match=f"{CACHE}: largest logit difference"):
        loading.load(subject, Options(dtype="float32", attention="eager", device="cpu", threads=1, seed=0))
