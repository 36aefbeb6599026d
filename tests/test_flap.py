"""FLAP's statistics against its own lines, exact ones against numpy, and its biases against a masked model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

import shortllama as sl
from shortllama import calibration, checkpoint, compensation, console, scoring, sources, surgery, verification
from shortllama.cli import app
from shortllama.criteria import flap
from shortllama.errors import InputError, PlanError
from shortllama.families import adapter
from shortllama.planning import make_plan_for
from shortllama.plans import (
    BlockKeep,
    Plan,
    Provenance,
    Target,
    kept_groups,
    kept_neurons,
    make_plan,
    read_plan,
    shape_of,
)
from shortllama.scores import Scores, read_scores
from shortllama.shape import BlockShape, ModelShape
from shortllama.variants import METRICS, Variant

FAMILIES = {"llama": {}, "mistral": {}, "qwen2": {"biases": ("q", "k", "v")}, "qwen3": {"qk_norm": True}}
METHODS = ("flap", "flap-exact")


def build(family: str = "llama", **changes: Any):
    sizes = {"vocabulary": 41, "hidden": 24, "head_dim": 6, "blocks": 4, "query_heads": 6, "kv_heads": 3, "neurons": 20}
    shape = ModelShape.uniform(family=family, **{**sizes, **FAMILIES[family], **changes})
    return surgery.build(shape, dtype="float64", std=0.2, seed=1)


def tokens(rows: int = 5, length: int = 9) -> calibration.Calibration:
    ids = np.random.default_rng(0).integers(0, 41, size=(rows, length))
    return calibration.describe(ids, "made", seed=None, bos=None)


def recorder(rows: list[np.ndarray]) -> Any:
    return lambda _, inputs: rows.append(inputs[0][0].numpy())


def inputs_of(model: Any, used: calibration.Calibration) -> list[dict[str, list[np.ndarray]]]:
    """The inputs (T, C) of o and down of every block, sequence by sequence, of the model run as users run it."""
    parts, seen, hooks = adapter(model), [], []
    for block in parts.blocks:
        found: dict[str, list[np.ndarray]] = {"o": [], "down": []}
        for name, rows in found.items():
            linear = parts.projections(block)[name]
            hooks.append(linear.register_forward_pre_hook(recorder(rows)))
        seen.append(found)
    for sequence in used.sequences:
        with torch.no_grad():
            model(torch.from_numpy(sequence)[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


class LayerOfFlap:
    """BiasGPT of FLAP's lib/layerwrapper.py: its statements, with the old mean that is updated in place."""

    def __init__(self, channels: int) -> None:
        self.baseline_inp = torch.zeros(channels, dtype=torch.float64)
        self.fluc_inp = torch.zeros(channels, dtype=torch.float64)
        self.scaler_inp = torch.zeros(channels, dtype=torch.float64)
        self.nsamples = 0

    def add_batch(self, inp: torch.Tensor) -> None:
        batch_size, inp = 1, inp.t()
        old_baseline_inp = self.baseline_inp
        self.baseline_inp *= self.nsamples / (self.nsamples + batch_size)
        self.baseline_inp += torch.mean(inp, dim=1) / (self.nsamples + batch_size)
        if self.nsamples == 0:
            self.fluc_inp = torch.zeros_like(self.fluc_inp)
        else:
            self.fluc_inp *= (self.nsamples - 1) / (self.nsamples + batch_size - 1)
            self.fluc_inp += torch.sum(
                (inp - self.baseline_inp.unsqueeze(1)) * (inp - old_baseline_inp.unsqueeze(1)), dim=1
            ) / (self.nsamples + batch_size)
        self.scaler_inp *= self.nsamples / (self.nsamples + batch_size)
        self.scaler_inp += torch.norm(inp, p=2, dim=1) ** 2 / (self.nsamples + batch_size)
        self.nsamples += batch_size


def published(rows: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    layer = LayerOfFlap(rows[0].shape[1])
    for x_TC in rows:
        layer.add_batch(torch.from_numpy(x_TC))
    return layer.baseline_inp, layer.fluc_inp, layer.scaler_inp


def exact(rows: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    everything = np.concatenate(rows)
    squares = np.mean([(x_TC**2).sum(axis=0) for x_TC in rows], axis=0)
    return torch.from_numpy(everything.mean(0)), torch.from_numpy(everything.var(0, ddof=1)), torch.from_numpy(squares)


def metric_by_hand(metric: str, weight: torch.Tensor, fluctuation: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
    if metric == "IFV":
        return fluctuation
    if metric == "WIFV":
        return fluctuation * torch.sum(weight**2, dim=0)
    return torch.mean(torch.abs(weight) * torch.sqrt(squares.reshape(1, -1)), dim=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("metric", [None, *METRICS])
@pytest.mark.parametrize("method", METHODS)
def test_scores_are_those_of_flaps_statements(method: str, metric: str | None, family: str) -> None:
    model, used = build(family), tokens()
    scores = scoring.score(model, method, used, variant=Variant(metric=metric))
    assert scores.kv_groups is not None
    assert scores.neurons is not None
    assert scores.details is not None
    assert scores.details["metric"] == (metric or "WIFV")
    statistic = published if method == "flap" else exact
    for index, found in enumerate(inputs_of(model, used)):
        block = model.model.layers[index]
        for name, linear in (("o", block.self_attn.o_proj), ("down", block.mlp.down_proj)):
            mean, fluctuation, squares = statistic(found[name])
            columns = metric_by_hand(metric or "WIFV", linear.weight.detach(), fluctuation, squares)
            assert scores.details["means"][name][index] == pytest.approx(mean.tolist(), rel=1e-9, abs=1e-12)
            if name == "down":
                assert scores.neurons[index] == pytest.approx(columns.tolist(), rel=1e-9)
                continue
            columns = columns**2
            heads = columns.reshape(6, 6).sum(dim=1)
            groups = [(heads[2 * g] + heads[2 * g + 1]).item() for g in range(3)]
            assert scores.kv_groups[index] == pytest.approx(groups, rel=1e-9)
            assert scores.details["attention_deviation"][index] == pytest.approx(columns.std().item(), rel=1e-9)


def test_the_closed_form_of_the_published_fluctuation() -> None:
    """f_N = 1/(N-1) sum over k >= 2 of (k-1)/k S_k, with S_k around the mean after k sequences."""
    rows = torch.from_numpy(np.random.default_rng(3).normal(2, 1, size=(7, 5, 4)))
    found = flap.Published(4, torch.device("cpu"))
    expected = torch.zeros(4, dtype=torch.float64)
    for k, x_TC in enumerate(rows, 1):
        found.add(x_TC)
        centred = ((x_TC - rows[:k].mean(dim=(0, 1))) ** 2).sum(dim=0)
        expected += (k - 1) / k * centred / (len(rows) - 1)
    torch.testing.assert_close(found.fluctuation_C, expected, rtol=1e-12, atol=0)


def test_batches_do_not_matter(monkeypatch) -> None:
    model, used = build(), tokens(rows=7)
    whole = [scoring.score(model, method, used) for method in METHODS]
    monkeypatch.setattr(calibration, "rows_within", lambda length, vocabulary: 2)
    for one, method in zip(whole, METHODS, strict=True):
        again = scoring.score(model, method, used)
        assert again.neurons is not None
        assert one.neurons is not None
        np.testing.assert_allclose(again.neurons, one.neurons, rtol=1e-10)


def test_one_sequence_has_no_published_fluctuation() -> None:
    with pytest.raises(InputError, match="flap WIFV needs 2 calibration sequences or more, this has 1"):
        scoring.score(build(), "flap", tokens(rows=1))
    for method, metric in (("flap", "WIFN"), ("flap-exact", "WIFV")):
        assert scoring.score(build(), method, tokens(rows=1), variant=Variant(metric=metric)).neurons


# -- compensation -----------------------------------------------------------------------------------------------------


def compensated(model: Any, scores: Scores, keep: tuple[BlockKeep, ...]) -> Plan:
    return make_plan(
        model="m",
        shape=surgery.shape_of(model),
        method="flap",
        target=Target("shape", "drawn"),
        keep=keep,
        compensation="flap",
        provenance=Provenance(scores_digest=scores.digest()),
    )


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]]), use_cache=False).logits


def with_means(model: Any, scores: Scores, keep: tuple[BlockKeep, ...]) -> Any:
    """The oracle: a dense model in whose output projections every pruned input channel is its mean.

    The means of what comes before the first module left are dropped, as `compensation` documents.
    """
    parts, shape = adapter(model), surgery.shape_of(model)
    kept, started = {one.index: one for one in keep}, False
    assert scores.details is not None
    for index, block in enumerate(parts.blocks):
        one = kept.get(index, BlockKeep(index, "", ""))
        groups = kept_groups(one, shape.blocks[index])
        channels = {
            "o": [c for g in groups for c in range(g * 12, g * 12 + 12)],
            "down": list(kept_neurons(one, shape.blocks[index])),
        }
        for name, linear in parts.projections(block).items():
            if name not in channels:
                continue
            started = started or bool(channels[name])
            mask = torch.zeros(linear.in_features, dtype=torch.float64)
            mask[channels[name]] = 1
            mean = torch.tensor(scores.details["means"][name][index], dtype=torch.float64) * (1 - mask) * started
            linear.register_forward_pre_hook(lambda _, args, mask=mask, mean=mean: (args[0] * mask + mean,))
    return model


KEEPS = {
    "some": tuple(BlockKeep(i, "0,2", "0-8,11-15") for i in range(4)),
    "no-attention": (BlockKeep(0, "1", "0-9"), BlockKeep(1), BlockKeep(2, "", "3-9"), BlockKeep(3)),
    "no-attention-first": (BlockKeep(0, "", "2-9"), BlockKeep(1, "0-1"), BlockKeep(2), BlockKeep(3)),
    "no-ffn": (BlockKeep(0, None, ""), BlockKeep(1), BlockKeep(2, "1", ""), BlockKeep(3, "0", "0-3")),
    "blocks-gone": (BlockKeep(0, "0-1", "0-3"), BlockKeep(3)),
    "first-block-gone": (BlockKeep(1, "0-1", "0-3"), BlockKeep(3)),
}


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_biases_stand_in_for_the_means_of_what_is_gone(family: str, keep: str) -> None:
    model, used = build(family), tokens()
    scores = scoring.score(model, "flap", used)
    plan = compensated(model, scores, KEEPS[keep])
    pruned = surgery.apply(plan, model, compensation=compensation.biases(plan, model, scores))
    assert (
        sum(parameter.numel() for parameter in pruned.parameters())
        == shape_of(plan, surgery.shape_of(model)).parameters
    )
    found, bare = logits(pruned), logits(surgery.apply(msgspec.structs.replace(plan, compensation=None), model))
    expected = logits(with_means(model, scores, KEEPS[keep]))
    assert (found - expected).abs().max() < 1e-9
    assert (bare - expected).abs().max() > 1e-4, "the biases make no difference"


def test_a_bias_of_the_base_is_kept_and_of_a_removed_module_moves_with_its_mean() -> None:
    model, used = build(biases=("q", "k", "v", "o", "gate", "up", "down")), tokens()
    scores = scoring.score(model, "flap", used)
    for keep in KEEPS.values():
        if keep[0].index or keep[0].kv_groups == "":
            continue
        plan = compensated(model, scores, keep)
        pruned = surgery.apply(plan, model, compensation=compensation.biases(plan, model, scores))
        fresh = build(biases=("q", "k", "v", "o", "gate", "up", "down"))
        assert (logits(pruned) - logits(with_means(fresh, scores, keep))).abs().max() < 1e-9


def test_a_removed_first_attention_leaves_its_mean_behind() -> None:
    """Nothing before it adds to the stream, so there is no bias to move to: documented, and nothing else is lost."""
    model, used = build(), tokens()
    scores = scoring.score(model, "flap", used)
    plan = compensated(model, scores, (BlockKeep(0, ""), BlockKeep(1), BlockKeep(2), BlockKeep(3)))
    found = compensation.biases(plan, model, scores)
    assert found is not None
    assert all((bias == 0).all() for bias in found.values())


def test_a_plan_from_scores_is_compensated_and_applies() -> None:
    model, used = build(), tokens()
    for method in METHODS:
        scores = scoring.score(model, method, used)
        target = Target("ratio", 0.4)
        plan = make_plan_for(method, model="m", shape=surgery.shape_of(model), target=target, scores=scores)
        assert plan.compensation == "flap"
        pruned = surgery.apply(plan, model, compensation=compensation.biases(plan, model, scores))
        assert surgery.shape_of(pruned) == shape_of(plan, surgery.shape_of(model))
        removed = 1 - sum(p.numel() for p in pruned.parameters()) / sum(p.numel() for p in model.parameters())
        assert removed == pytest.approx(plan.achieved.parameters, abs=1e-6)


def test_biases_belong_to_the_scores_of_their_plan() -> None:
    model = build()
    scores = scoring.score(model, "flap", tokens())
    plan = compensated(model, scores, KEEPS["some"])
    with pytest.raises(PlanError, match=r"whose means are in the scores it was made from; give them too"):
        compensation.biases(plan, model, None)
    with pytest.raises(PlanError, match="needs the same scores"):
        compensation.biases(plan, model, scoring.score(model, "flap", tokens(rows=6)))
    assert compensation.biases(msgspec.structs.replace(plan, compensation=None), model, None) is None


def test_masking_alone_is_another_model() -> None:
    """The oracle of `verify` needs the biases: without them it must not pass."""
    model, used = build(), tokens()
    scores = scoring.score(model, "flap", used)
    plan = compensated(model, scores, KEEPS["some"])
    pruned = surgery.apply(plan, model, compensation=compensation.biases(plan, model, scores))
    assert (logits(pruned) - logits(verification.mask(model, plan))).abs().max() > 1e-4


# -- the commands -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder `tiny` of a 4-block GQA model, beside token ids to calibrate on."""
    shape = ModelShape.uniform(vocabulary=97, hidden=64, head_dim=8, blocks=4, query_heads=8, kv_heads=4, neurons=96)
    path = tmp_path_factory.mktemp("models") / "tiny"
    surgery.build(shape, std=0.2).save_pretrained(path)
    rows = np.random.default_rng(5).integers(0, 97, size=(6, 16)).tolist()
    (path.parent / "ids.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Return run(*arguments, code=0) -> (stdout, stderr) of a command in this process, beside the model."""
    monkeypatch.chdir(folder.parent)

    def run(*arguments: object, code: int = 0) -> tuple[str, str]:
        seen = console.run(app, list(map(str, arguments)))
        out, err = capfd.readouterr()
        assert seen == code, err
        return out, err

    return run


CALIBRATION = ("--calibration", "ids:ids.jsonl", "--samples", 6, "--length", 16)


def test_prune_scores_compensates_writes_and_verifies(run: Any, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "pruned"
    report = json.loads(
        run("prune", folder, "--method", "flap", "--ratio", 0.4, *CALIBRATION, "--out", out, "--json")[0]
    )
    assert report["plan"]["compensation"] == "flap"
    checks = {check["name"]: check["passed"] for check in report["verification"]["checks"]}
    assert checks["masked dense model with its biases"]
    model, _ = checkpoint.load(out)
    assert surgery.shape_of(model).parameters == report["manifest"]["parameters"]
    assert any(bias.abs().max() > 1e-4 for name, bias in model.named_parameters() if name.endswith("o_proj.bias"))
    shape = sources.from_folder("tiny", folder).shape
    assert report["plan"]["achieved"]["parameters"] == pytest.approx(
        1 - report["manifest"]["parameters"] / shape.parameters, abs=1e-6
    )


def test_planted_biases_fail_the_verification(run: Any, folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """The masked dense model gets the biases written, so it must be the slices that are proven: plant a wrong one."""
    take = surgery._take
    monkeypatch.setattr(
        surgery, "_take", lambda tensor, one: take(tensor, one).flip(-1) if one.columns else take(tensor, one)
    )
    _, err = run("prune", folder, "--method", "flap", "--ratio", 0.4, *CALIBRATION, "--out", tmp_path / "wrong", code=1)
    assert "masked dense model with its biases" in err


def test_a_plan_is_applied_with_the_scores_it_was_made_from(run: Any, folder: Path, tmp_path: Path) -> None:
    scores, other, plan = tmp_path / "scores.json", tmp_path / "other.json", tmp_path / "plan.json"
    run("score", folder, "--criterion", "flap-exact", "--metric", "WIFN", *CALIBRATION, "--out", scores)
    run("score", folder, "--criterion", "flap-exact", *CALIBRATION, "--out", other)
    _, err = run(
        "plan", folder, "--method", "flap-exact", "--structure", "AL-MM", "--remove-heads", 3, "--ratio", 0.4,
        "--scores", scores, "--out", plan,
    )  # fmt: skip
    assert "note" not in err
    made = read_plan(plan)
    assert made.method == "flap-exact (AL-MM, 3 heads)"
    assert sum(4 - len(kept_groups(keep, BlockShape(8, 4, 96))) for keep in made.keep) == 3
    _, err = run("prune", folder, "--plan", plan, "--out", tmp_path / "out", code=2)
    assert "whose means are in the scores it was made from" in err
    _, err = run("prune", folder, "--plan", plan, "--scores", other, "--out", tmp_path / "out", code=2)
    assert "its compensation needs the same scores" in err
    run("prune", folder, "--plan", plan, "--scores", scores, "--out", tmp_path / "out")
    model, _ = checkpoint.load(folder, dtype="float32")
    found = read_scores(scores)
    pruned = sl.apply(made, model, scores=found)
    again, _ = checkpoint.load(tmp_path / "out")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in pruned.state_dict().items())


def test_planning_without_a_scores_file_says_what_is_lost(run: Any, folder: Path) -> None:
    _, err = run("plan", folder, "--method", "flap", "--ratio", 0.3, *CALIBRATION)
    assert "note: the biases of this plan come from its scores, which are not kept" in err
    _, err = run(
        "plan", folder, "--method", "flap", "--ratio", 0.3, "--metric", "WIFN", "--structure", "UL-UM", *CALIBRATION
    )
    assert "note" in err


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("plan", "llama-7b", "--method", "flap", "--ratio", 0.2), "only scores tell"),
        (("plan", "llama-7b", "--method", "ppl", "--ratio", 0.2, "--metric", "IFV"), "--metric IFV is not for ppl"),
        (("score", "tiny", "--criterion", "ppl", "--metric", "IFV"), "--metric IFV is not for ppl"),
        (("plan", "tiny", "--method", "flap", "--ratio", 1.2), "--ratio 1.2 is outside"),
        (("plan", "tiny", "--method", "flap", "--ratio", 0.2, "--structure", "UL-MM"), "add --remove-heads N"),
    ],
)
def test_bad_requests_are_refused_before_any_work(run: Any, arguments: tuple[Any, ...], problem: str) -> None:
    out, err = run(*arguments, code=2)
    assert problem in err
    assert out == ""
    assert err.count("\n") == 1


def test_blind_plans_of_uniform_structures_have_a_shape(run: Any) -> None:
    out, _ = run("plan", "llama-7b", "--method", "flap", "--ratio", 0.2, "--structure", "UL-UM", "--json")
    assert json.loads(out)["blind"]
    assert json.loads(out)["compensation"] is None


def test_the_library_does_the_same_in_memory() -> None:
    model, used = build(), tokens()
    scores = sl.score(model, "flap", calibration=used, variant=Variant(metric="IFV"))
    plan = sl.plan(model, method="flap", ratio=0.4, scores=scores)
    pruned = sl.apply(plan, model, scores=scores)
    assert surgery.shape_of(pruned).biases == ("o", "down")
    with pytest.raises(PlanError, match="give them too"):
        sl.apply(plan, model)
    again = sl.plan(model, method="flap", ratio=0.4, calibration=used, variant=Variant(metric="IFV"))
    assert again.keep == plan.keep
    assert again.method == "flap (IFV)"
