"""The core's commands: what they print and write is what the library says, for people and for programs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from shortllama import blind, catalogue, console, display, planning, sources
from shortllama.cli import app
from shortllama.difference import difference
from shortllama.errors import PlanError
from shortllama.plans import BlockKeep, Target, block_keep, compose, kept_groups, kept_neurons, make_plan, read_plan
from shortllama.scores import read_scores
from shortllama.shape import ModelShape

IDS = "\n".join(json.dumps([1, *range(start, start + 15)]) for start in range(2, 82, 16))


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]):
    """Return run(*arguments, code=0) -> (stdout, stderr) of a command in this process."""

    def run(*arguments: object, code: int = 0) -> tuple[str, str]:
        seen = console.run(app, list(map(str, arguments)))
        out, err = capfd.readouterr()
        assert seen == code, err
        return out, err

    return run


@pytest.fixture
def run_json(run):
    """Return the JSON document that a command prints; there must be nothing else on stdout."""
    return lambda *arguments, code=0: json.loads(run(*arguments, "--json", code=code)[0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder `tiny` of a 4-block GQA model with random weights large enough for tokens to differ."""
    from shortllama import surgery

    shape = ModelShape.uniform(vocabulary=97, hidden=64, head_dim=8, blocks=4, query_heads=8, kv_heads=4, neurons=96)
    path = tmp_path_factory.mktemp("models") / "tiny"
    surgery.build(shape, std=0.2).save_pretrained(path)
    (path.parent / "ids.jsonl").write_text(IDS)
    return path


@pytest.fixture
def ids(folder: Path) -> str:
    return f"ids:{folder.parent / 'ids.jsonl'}"


# -- shapes -----------------------------------------------------------------------------------------------------------


def test_shapes_lists_the_whole_catalogue(run, run_json):
    listed = {one["name"]: one["parameters"] for one in run_json("shapes")["shapes"]}
    assert listed == {name: catalogue.lookup(name).parameters for name in catalogue.names()}
    text, _ = run("shapes")
    assert all(name in text for name in catalogue.names())


def test_a_shape_is_shown_with_its_costs(run_json):
    shape = catalogue.lookup("llama-7b/flap-27")
    seen = run_json("shapes", "llama-7b/flap-27", "--dtype", "float32")
    assert seen["weight_bytes"] == shape.weight_bytes("float32")
    assert seen["kv_bytes_per_token"] == shape.kv_bytes_per_token("float32")
    assert seen["blocks"] == [msgspec.to_builtins(block) for block in shape.blocks]


def test_a_range_of_shapes_is_a_list(run_json):
    listed = run_json("shapes", "llama-7b/depth:16..18")["shapes"]
    assert [len(one["blocks"]) for one in listed] == [16, 17, 18]


def test_tables_for_pipes_are_plain_and_unbroken(run):
    text, _ = run("shapes")
    assert "\x1b" not in text
    lines = [line for line in text.splitlines() if "llama-13b/llm-pruner" in line]
    assert lines
    assert all("GiB" in line for line in lines)


# -- plans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ppl", "taylor+", "wanda-sp", "last"])
def test_a_plan_of_a_catalogue_shape_is_blind_and_equals_the_library(run_json, tmp_path: Path, method: str):
    seen = run_json("plan", "llama-7b", "--method", method, "--ratio", 0.2, "--out", tmp_path / "plan.json")
    wanted = planning.make_plan_for(
        method, model="llama-7b", shape=catalogue.lookup("llama-7b"), target=Target("ratio", 0.2)
    )
    assert read_plan(tmp_path / "plan.json") == wanted
    assert msgspec.convert(seen, type(wanted)) == wanted
    assert wanted.blind


def test_planning_without_scores_equals_scoring_first(run, tmp_path: Path, folder: Path, ids: str):
    one, two, scores = tmp_path / "one.json", tmp_path / "two.json", tmp_path / "scores.json"
    run("plan", folder, "--method", "ppl", "--blocks", 2, "--calibration", ids, "--out", one)
    run("score", folder, "--criterion", "ppl", "--calibration", ids, "--out", scores)
    run("plan", folder, "--method", "ppl", "--blocks", 2, "--scores", scores, "--out", two)
    assert one.read_bytes() == two.read_bytes()
    assert read_plan(one).provenance.scores_digest == read_scores(scores).digest()


@pytest.mark.parametrize(
    "how", [["--unit", "module", "--ratio", 0.3], ["--blocks", 2], ["--unit", "module", "--target-params", 90e3]]
)
def test_iterative_plans_equal_those_of_a_full_iterative_order(run, tmp_path: Path, folder: Path, ids: str, how):
    one, two, scores = tmp_path / "one.json", tmp_path / "two.json", tmp_path / "scores.json"
    unit = how[:2] if how[0] == "--unit" else []
    run("plan", folder, "--method", "ppl", "--iterative", *how, "--calibration", ids, "--out", one)
    text, _ = run("score", folder, "--criterion", "ppl", "--iterative", *unit, "--calibration", ids, "--out", scores)
    assert "scored again after each removal" in text
    assert len(read_scores(scores).order or ()) == (7 if unit else 3)
    run("plan", folder, "--method", "ppl", "--iterative", *how, "--scores", scores, "--out", two)
    assert read_plan(one).keep == read_plan(two).keep


def test_modules_are_scored_planned_and_shown(run, run_json, tmp_path: Path, folder: Path, ids: str):
    text, _ = run("score", folder, "--criterion", "kl", "--unit", "module", "--calibration", ids)
    assert re.search(r"block\s+attention\s+FFN", text)
    made = run_json("plan", folder, "--method", "taylor", "--unit", "module", "--ratio", 0.4, "--calibration", ids)
    assert made["method"] == "taylor (modules)"
    assert any("" in (one["kv_groups"], one["neurons"]) for one in made["keep"])


def test_reductions_reach_the_criterion(run_json, folder: Path):
    how = ["--weight-reduction", "max", "--block-reduction", "mean"]
    seen = run_json("score", folder, "--criterion", "mag", *how)
    assert seen["details"] == {"weight_reduction": "max", "block_reduction": "mean"}
    planned = run_json("plan", folder, "--method", "mag", "--blocks", 1, *how)
    plain = run_json("plan", folder, "--method", "mag", "--blocks", 1)
    assert planned["provenance"]["scores_digest"] != plain["provenance"]["scores_digest"]


def test_a_preset_is_a_real_plan_without_data(run_json):
    seen = run_json("plan", "vicuna-7b", "--preset", "paper-vicuna-7b-ppl-20")
    assert not seen["blind"]
    assert {one["index"] for one in seen["keep"]} == set(range(32)) - {25, 27, 10, 24, 11, 20}
    cut = run_json("plan", "llama-7b", "--preset", "paper-llama-7b-taylor", "--blocks", 3, "--protect", "0,0")
    assert {one["index"] for one in cut["keep"]} == set(range(32)) - {0, 27, 24}


def test_a_cut_inside_the_interval_is_noted(run, folder: Path, ids: str):
    _, noted = run("plan", folder, "--method", "ppl", "--blocks", 1, "--calibration", ids)
    assert "note: the cut falls inside a 95 % interval of ppl" in noted.replace("\n", " ")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--method", "bi", "--unit", "module", "--ratio", 0.5], "--unit module is not for bi"),
        (["--method", "mag", "--iterative", "--blocks", 1], "--iterative is not for mag"),
        (["--method", "ppl", "--blocks", 1, "--weight-reduction", "max"], "criterion ppl reduces no weights"),
        (["--method", "mag", "--blocks", 1, "--block-reduction", "avg"], "--block-reduction 'avg' is unknown"),
        (["--preset", "paper-llama-7b-ppl-20"], "is for the blocks of llama-7b"),
        (["--preset", "paper-llama-7b-ppl-20", "--method", "ppl"], "leave out --method"),
        (["--preset", "paper-llama-7b-ppl-20", "--iterative"], "leave out --iterative"),
        (["--method", "ppl"], "give exactly one of --ratio, --blocks, --target-params; saw none"),
        (["--ratio", 0.5], "nothing says what to remove"),
    ],
)
def test_options_that_do_not_go_together_are_refused(run, folder: Path, ids: str, arguments, problem: str):
    _, said = run("plan", folder, *arguments, "--calibration", ids, code=2)
    assert problem in said.replace("\n", " ")


def test_a_plan_holds_no_path_of_this_machine(run, tmp_path: Path, folder: Path):
    run("plan", folder, "--method", "mag", "--ratio", 0.5, "--out", tmp_path / "plan.json")
    assert str(folder.parent) not in (tmp_path / "plan.json").read_text()
    assert read_plan(tmp_path / "plan.json").base.model == "tiny"


def test_options_reach_the_plan(run_json, folder: Path):
    kept = run_json("plan", folder, "--method", "mag", "--blocks", 1, "--protect", "1,2")["keep"]
    assert [one["index"] for one in kept] == [0, 2, 3]
    aligned = run_json("plan", folder, "--method", "mag-sp", "--ratio", 0.4, "--align", 32)
    block = sources.locate(str(folder)).shape.blocks[0]
    assert len(kept_neurons(msgspec.convert(aligned["keep"][0], BlockKeep), block)) == 64
    plans = [run_json("plan", folder, "--method", "random", "--blocks", 2, "--seed", seed) for seed in range(6)]
    assert len({json.dumps(plan["keep"]) for plan in plans}) > 1
    assert plans[1] == run_json("plan", folder, "--method", "random", "--blocks", 2, "--seed", 1)


def test_a_parameter_target_that_is_passed_says_so(run):
    options = ("plan", "llama-7b", "--method", "ppl", "--target-params", "5.4230e9")
    assert re.fullmatch(r"note: the result has [^\n]* more than asked[^\n]*--at-most[^\n]*\n", run(*options)[1])
    assert run(*options, "--at-most")[1] == ""


def test_composing_equals_the_library(run_json, tmp_path: Path):
    shape = catalogue.lookup("llama-7b")
    depth = blind.parse("depth:26", model="llama-7b", shape=shape)
    width = blind.parse("width:24x8256", model="between", shape=catalogue.lookup("llama-7b/depth:26"))
    for name, plan in (("depth", depth), ("width", width)):
        (tmp_path / f"{name}.json").write_bytes(msgspec.json.encode(plan))
    seen = run_json("compose", tmp_path / "depth.json", tmp_path / "width.json", "--out", tmp_path / "both.json")
    both = compose(depth, width, shape)
    assert read_plan(tmp_path / "both.json") == both
    assert seen["achieved"] == msgspec.to_builtins(both.achieved)


def test_show_is_stable_text(run, tmp_path: Path):
    run("plan", "llama-7b", "--method", "wanda-sp", "--ratio", 0.2, "--protect", "1,0", "--out", tmp_path / "plan.json")
    text, _ = run("show", tmp_path / "plan.json")
    seen = [" ".join(line.split()) for line in text.splitlines() if line.strip() and "─" not in line]
    assert seen[:12] == [
        "plan",
        "base llama-7b@657ea6c2dbfc1b3c",
        "method wanda-sp (blind: shapes and random weights only)",
        "target ratio 0.2",
        "blocks kept 32: 0-31",
        "parameters removed 18.23 %",
        "blocks removed none",
        "parameters 6.738 B -> 5.510 B",
        f"digest {read_plan(tmp_path / 'plan.json').digest()}",
        "blocks KV groups kept neurons kept",
        "1-31 0-25 8,807",
        str(tmp_path / "plan.json"),
    ]


def test_show_of_a_plan_whose_base_is_elsewhere_shows_the_plan(run_json, run, tmp_path: Path, folder: Path):
    run("plan", folder, "--method", "mag", "--ratio", 0.5, "--out", tmp_path / "plan.json")
    seen = run_json("show", tmp_path / "plan.json")
    assert seen["shape"] is None
    assert seen["plan"]["achieved"]["blocks"] == 2
    assert "blocks kept" in run("show", tmp_path / "plan.json")[0]


def test_diff_of_a_plan_with_itself_is_empty(run_json, run, tmp_path: Path):
    run("plan", "llama-7b", "--method", "wanda-sp", "--ratio", 0.2, "--out", tmp_path / "a.json")
    assert run_json("diff", tmp_path / "a.json", tmp_path / "a.json") == {
        "blocks": {"only_a": "", "only_b": ""},
        "equal": True,
        "inside": [],
    }


SMALL = ModelShape.uniform(vocabulary=11, hidden=8, head_dim=2, blocks=4, query_heads=4, kv_heads=4, neurons=6)


@st.composite
def small_plans(draw: st.DrawFn):
    blocks = sorted(draw(st.sets(st.integers(0, 3), min_size=1)))
    subsets = lambda size: st.sets(st.integers(0, size - 1)).map(sorted).map(tuple)  # noqa: E731
    keep = [block_keep(index, SMALL.blocks[index], draw(subsets(4)), draw(subsets(6))) for index in blocks]
    return make_plan(model="small", shape=SMALL, method="x", target=Target("shape", "x"), keep=tuple(keep))


@given(small_plans(), small_plans())
def test_difference_equals_set_difference(a, b):
    found = difference(a, b)
    one, two = ({keep.index: keep for keep in plan.keep} for plan in (a, b))
    assert expand(found.blocks.only_a, 4) == one.keys() - two.keys()
    assert expand(found.blocks.only_b, 4) == two.keys() - one.keys()
    inside = {block.index: block for block in found.inside}
    for index in one.keys() & two.keys():
        for size, part, kept in ((4, "kv_groups", kept_groups), (6, "neurons", kept_neurons)):
            left, right = (set(kept(plan[index], SMALL.blocks[index])) for plan in (one, two))
            sets = getattr(inside.get(index), part, None)
            assert (expand(sets.only_a, size) if sets else set()) == left - right
            assert (expand(sets.only_b, size) if sets else set()) == right - left
    assert found.equal == (a.keep == b.keep)


def expand(text: str, size: int) -> set[int]:
    from shortllama.indices import parse_indices

    if text == "all":
        return set(range(size))
    if text.startswith("all but "):
        return set(range(size)) - set(parse_indices(text.removeprefix("all but "), size))
    return set(parse_indices(text, size))


def test_plans_for_different_bases_have_no_difference():
    other = msgspec.structs.replace(SMALL, vocabulary=12)
    a, b = (blind.parse("depth:2", model="m", shape=shape) for shape in (SMALL, other))
    with pytest.raises(PlanError, match="different bases"):
        difference(a, b)


# -- scores, checkpoints, evaluation ----------------------------------------------------------------------------------


def test_scores_are_printed_as_they_are_written(run_json, run, tmp_path: Path, folder: Path, ids: str):
    out = tmp_path / "scores.json"
    seen = run_json("score", folder, "--criterion", "bi", "--calibration", ids, "--out", out)
    assert seen == json.loads(out.read_text())
    assert seen["calibration"]["samples"] == 5
    text, _ = run("score", folder, "--criterion", "mag-sp")
    assert "KV groups" in text
    assert "neurons" in text


def test_scores_of_positions_need_no_weights(run_json):
    assert run_json("score", "llama-7b", "--criterion", "last")["unit"] == "block"


@pytest.mark.slow
def test_prune_writes_a_verified_checkpoint(run_json, run, tmp_path: Path, folder: Path):
    out = tmp_path / "pruned"
    seen = run_json("prune", folder, "--method", "mag-sp", "--ratio", 0.25, "--out", out)
    assert all(check["passed"] for check in seen["verification"]["checks"])
    assert {check["name"] for check in seen["verification"]["checks"]} >= {"masked dense model", "files"}
    shape = sources.locate(str(out)).shape
    assert [block.kv_heads for block in shape.blocks] == [3] * 4
    assert seen["plan"] == json.loads((out / "plan.json").read_text())
    shown = run_json("show", out)
    assert shown["shape"]["parameters"] == shape.parameters == seen["manifest"]["parameters"]

    # A result of ours is replaced; what is not ours never is (test_errors).
    text, said = run("prune", folder, "--plan", out / "plan.json", "--out", out)
    assert f"wrote {out}, verified" in said
    assert "before" in text

    weights = out / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-64:] = bytes(64)
    weights.write_bytes(data)
    seen = run("verify", out, "--against", folder, "--json", code=1)
    assert not all(check["passed"] for check in json.loads(seen[0])["checks"])
    assert seen[1].startswith(f"error: {out} is not what it should be")
    assert seen[1].count("\n") == 1


def test_eval_carries_its_protocol(run_json, run, tmp_path: Path, folder: Path, ids: str):
    out = tmp_path / "quality.json"
    seen = run_json("eval", folder, "--ppl", ids, "--ppl", "self", "--out", out)
    assert seen == json.loads(out.read_text())
    assert seen["schema"] == "shortllama.eval/1"
    found = seen["subjects"]["tiny"]["perplexity"]
    assert set(found) == {ids, "self"}
    assert found[ids]["tokens"] == 5 * 15
    text, _ = run("eval", folder, "--ppl", ids)
    assert "75 tokens" in text


def test_self_text_of_a_pruned_model_comes_from_its_base(run_json, run, tmp_path: Path, folder: Path, monkeypatch):
    from shortllama import checkpoint

    base = sources.locate(str(folder))
    made = planning.make_plan_for(
        "last",
        model="tiny",
        shape=base.shape,
        target=Target("blocks", 1),
        scores=None,
    )
    checkpoint.write(folder, msgspec.structs.replace(made, blind=False), tmp_path / "pruned")
    monkeypatch.chdir(tmp_path)
    assert "its base 'tiny' is not found from here" in run("eval", "./pruned", "--ppl", "self", code=2)[1]
    monkeypatch.chdir(folder.parent)
    dense = run_json("eval", folder, "--ppl", "self")["subjects"]["tiny"]["perplexity"]["self"]
    pruned = run_json("eval", tmp_path / "pruned", "--ppl", "self")["subjects"]["pruned"]["perplexity"]["self"]
    assert pruned["digest"] == dense["digest"]
    assert pruned["perplexity"] > dense["perplexity"]


@pytest.mark.parametrize(("cuda", "chosen"), [(False, "cpu"), (True, "cuda")])
def test_where_to_compute_is_decided_in_one_place(run, folder: Path, ids: str, monkeypatch, cuda: bool, chosen: str):
    import torch

    from shortllama import checkpoint

    asked: list[tuple[str, str | None]] = []

    def load(*_: object, device: str, dtype: str | None, **__: object):
        asked.append((device, dtype))
        raise PlanError("seen enough")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(checkpoint, "load", load)
    score = ["score", folder, "--criterion", "bi", "--calibration", ids]
    choose = ["--method", "bi", "--blocks", 1, "--calibration", ids]
    verbs = [score, ["plan", folder, *choose], ["eval", folder, "--ppl", ids]]
    for verb in [*verbs, ["prune", folder, *choose, "--out", folder.parent / "never"]]:
        run(*verb, code=2)
        run(*verb, "--device", "cpu", code=2)
        if cuda:
            run(*verb, "--device", "cuda:1", code=2)
            assert "'cuda:2' cannot be used: torch" in run(*verb, "--device", "cuda:2", code=2)[1]
    dtypes = {"cpu": "float32", "cuda": None, "cuda:1": None}
    wanted = [chosen, "cpu", *(["cuda:1"] if cuda else [])] * 4
    assert asked == [(device, dtypes[device]) for device in wanted]


def test_plan_and_prune_take_every_option_of_score():
    group: Any = typer.main.get_command(app)
    options = {
        name: {option: (one.default, one.help) for one in command.params for option in one.opts}
        for name, command in group.commands.items()
    }
    own = {"--criterion", "--out", "--resume"}
    for option in options["score"].keys() - own:
        assert options["score"][option] == options["plan"][option] == options["prune"][option], option
    for option in options["plan"].keys() - own:
        assert options["plan"][option] == options["prune"][option], option


# -- how figures are written ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (999, "999"), (1000, "1.000 k"), (6_738_415_616, "6.738 B"), (2.5e12, "2.500 T")],
)
def test_counts_for_people(value: float, text: str):
    assert display.count(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0 B"), (1023, "1023 B"), (1 << 20, "1.00 MiB"), (3 << 39, "1.50 TiB")]
)
def test_sizes_for_people(value: float, text: str):
    assert display.size(value) == text
