"""Verification passes what is right and fails what was planted, each fault by the check that should see it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import msgspec
import pytest
from strategies import plan_of

from shortllama import checkpoint, display, sources, surgery, verification
from shortllama.errors import InputError, PlanError
from shortllama.plans import BlockKeep, write_plan
from shortllama.shape import ModelShape

STOCK = "stock transformers in a fresh process"
MASKED = "masked dense model"
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
    assert passed(report).keys() == {"files", "shape", STOCK, "shape of the plan", MASKED}
    assert report.failures == ""


def test_our_own_form_is_verified_by_the_mask(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    report = verification.verify(written(dense, tmp_path / "out", MIXED), dense)
    assert {fit.engine: fit.can for fit in report.engines} == {"transformers": False, "vLLM": False, "llama.cpp": True}
    display.show_report(report)
    assert "as deci, by export --to gguf" in capsys.readouterr().out
    assert report.ok, report.failures
    assert (report.form, report.loaded_as) == ("shortllama", None)
    assert passed(report).keys() == {"files", "shape", "shape of the plan", MASKED}


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
