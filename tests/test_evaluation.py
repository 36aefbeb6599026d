"""`eval`: what is asked for is checked first, figures and text come in one document, and people can read it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from shortllama import blind, checkpoint, pruning, sampling, sources
from shortllama.errors import InputError
from shortllama.evaluation import generation, named, shown
from shortllama.evaluation.named import Wanted
from shortllama.evaluation.results import Evaluation, Quality, read_evaluation, write_evaluation
from shortllama.plans import Target, make_plan


@pytest.fixture(scope="module")
def reference():
    return sources.locate(sources.REFERENCE)


@pytest.fixture(scope="module")
def loaded(reference):
    return pruning.load(reference)


@pytest.fixture(scope="module")
def pruned(reference, tmp_path_factory) -> sources.Source:
    """The reference model without its last three blocks but one."""
    folder = tmp_path_factory.mktemp("eval") / "pruned"
    kept = blind.parse("depth:9", model="reference", shape=reference.shape).keep
    plan = make_plan(model="reference", shape=reference.shape, method="last", target=Target("blocks", 3), keep=kept)
    checkpoint.write(sources.fetch(reference), plan, folder)
    return sources.from_folder(str(folder), folder)


@pytest.fixture
def story(tmp_path) -> str:
    path = tmp_path / "story.txt"
    path.write_text("Once upon a time there was a little fox who lived near a river. " * 40)
    return str(path)


# -- text -------------------------------------------------------------------------------------------------------------


def test_text_is_what_sampling_gives_and_joins_on_to_the_prompt(loaded):
    model, tokenizer = loaded
    prompt = "The little fox"
    greedy, drawn = generation.generate(model, tokenizer, [prompt], 12, seed=3)
    ids = np.array([[tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]])
    for one, temperature in ((greedy, 0.0), (drawn, 1.0)):
        whole = sampling.sample(model, ids, 12, seed=3, temperature=temperature)[0]
        assert prompt + one.text == tokenizer.decode(whole, skip_special_tokens=True)
        assert (one.prompt, one.tokens, one.temperature) == (prompt, 12, temperature)
    assert (greedy.seed, drawn.seed) == (None, 3)
    assert greedy.text[0] == " ", "the space before the first word belongs to it"
    again = generation.generate(model, tokenizer, [prompt], 12, seed=4)
    assert again[0] == greedy
    assert again[1].text != drawn.text


def test_text_ends_where_the_model_ends_it(loaded, monkeypatch):
    model, tokenizer = loaded
    letters = tokenizer("abc", add_special_tokens=False)["input_ids"]

    def ending(_model, prompt_NP, tokens, **_):
        return np.concatenate([prompt_NP, [[*letters, tokenizer.eos_token_id, *letters][:tokens]]], axis=1)

    monkeypatch.setattr(sampling, "sample", ending)
    one, _ = generation.generate(model, tokenizer, ["x"], len(letters) + 3)
    assert (one.tokens, one.ended) == (len(letters), True)
    assert one.text.strip() == "abc"
    one, _ = generation.generate(model, tokenizer, ["x"], len(letters))
    assert (one.tokens, one.ended) == (len(letters), False)


def test_prompts_have_names():
    paper = generation.expand(["@paper", "mine", "mine"])
    assert paper == [*generation.PROMPTS["@paper"], "mine"]
    assert paper[0] == "AI can create a logo in seconds"
    for prompt, message in (("@papers", "no prompts are called '@papers'; known are @paper"), (" ", "is blank")):
        with pytest.raises(InputError, match=message):
            generation.expand([prompt])


# -- by name ----------------------------------------------------------------------------------------------------------


def test_one_document_holds_figures_and_text_of_both_models(pruned, reference, story, tmp_path):
    seen: dict[str, tuple[int, int]] = {}
    wanted = Wanted(
        texts=(story, f"{story}@window=32,stride=16", "self@window=24"),
        prompts=("The fox",),
        tokens=5,
        against=reference,
        limit=4,
    )
    found = named.evaluate(pruned, wanted, lambda what, done, total: seen.update({what: (done, total)}))
    assert list(found.subjects) == ["pruned", "reference"]
    ours, theirs = found.subjects.values()
    for src in wanted.texts:
        ppl, dense = ours.perplexity[src], theirs.perplexity[src]
        assert ppl.sequences <= 4
        assert (ppl.digest, ppl.tokens) == (dense.digest, dense.tokens)
        assert ppl.divergence is not None
        assert ppl.divergence.against == "reference"
        assert 0 < ppl.divergence.agreement < 1
        assert dense.divergence is None
        assert ppl.nll > dense.nll
    # On the dense model's own text the two differ by the divergence, up to sampling noise.
    own = ours.perplexity["self@window=24"], theirs.perplexity["self@window=24"]
    assert own[0].nll - own[1].nll == pytest.approx(own[0].divergence.kl, rel=0.5)
    assert [one.prompt for one in ours.generations] == ["The fox"] * 2
    assert seen == {
        **{f"perplexity on {src}": (ours.perplexity[src].sequences,) * 2 for src in wanted.texts},
        "text by pruned": (2, 2),
        "text by reference": (2, 2),
    }
    write_evaluation(tmp_path / "e.json", found)
    assert read_evaluation(tmp_path / "e.json") == found


def test_a_model_against_itself_is_one_subject(reference, story):
    found = named.evaluate(reference, Wanted(texts=(story,), against=reference, limit=2))
    (only,) = found.subjects.values()
    assert only.perplexity[story].divergence.kl == 0


def test_two_models_of_one_name_are_told_apart(pruned, reference, story, tmp_path):
    other = tmp_path / "elsewhere" / "pruned"
    other.parent.mkdir()
    other.symlink_to(pruned.folder)
    twin = sources.from_folder(str(other), other)
    found = named.evaluate(pruned, Wanted(texts=(story,), against=twin, limit=1))
    assert list(found.subjects) == [pruned.name, twin.name]


def test_self_text_of_a_pruned_model_is_its_base_s(pruned, reference):
    alone = named.evaluate(pruned, Wanted(texts=("self@window=16",), limit=2))
    beside = named.evaluate(pruned, Wanted(texts=("self@window=16",), limit=2, against=reference))
    digests = [one.subjects["pruned"].perplexity["self@window=16"].digest for one in (alone, beside)]
    assert digests[0] == digests[1]


def test_a_window_beyond_the_model_s_positions_is_remarked_on(reference, story):
    notes: list[str] = []
    positions = reference.config["max_position_embeddings"]
    beyond = Wanted(texts=(f"{story}@window={positions + 1}", story), limit=1)
    named.evaluate(reference, beyond, note=notes.append)
    assert len(notes) == 1
    assert f"a window of {positions + 1} tokens, where reference was made for {positions}" in notes[0]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (Wanted(), "nothing to evaluate; give --ppl SRC"),
        (Wanted(prompts=("x",), task_data=Path("d")), "--task-data d: no task to read it for"),
        (Wanted(tasks=("self-word",), task_data=Path("d")), "--task-data d: no task to read it for"),
        (Wanted(texts=("self@papr",)), "no protocol is called 'papr'"),
        (Wanted(prompts=("@x",)), "no prompts are called '@x'"),
        (Wanted(texts=("self",), limit=0), "--limit 0; give at least 1"),
    ],
)
def test_what_cannot_be_done_is_refused_before_a_model_is_loaded(reference, wanted, message, monkeypatch):
    monkeypatch.setattr(pruning, "load", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(InputError, match=message):
        named.evaluate(reference, wanted)


def test_against_needs_something_to_compare(harness, reference):
    with pytest.raises(InputError, match="--against compares predictions and text"):
        named.evaluate(reference, Wanted(tasks=("piqa",), against=reference))


# -- what people see --------------------------------------------------------------------------------------------------


def test_tables_first_and_the_protocol_under_them(pruned, reference, story, capsys):
    wanted = Wanted(texts=(f"{story}@window=32",), prompts=("The fox",), tokens=5, against=reference, limit=2)
    found = named.evaluate(pruned, wanted)
    shown.show(found)
    lines = capsys.readouterr().out.splitlines()
    assert any("perplexity" in line and "bits a byte" in line and "same top token" in line for line in lines)
    assert any(line.startswith(" pruned") for line in lines)
    ours = found.subjects["pruned"].perplexity[f"{story}@window=32"]
    assert f"{story}@window=32: {ours.protocol}" in lines
    assert "KL and agreement: against reference, over the same tokens" in lines
    where = lines.index("> The fox")
    told = [line.strip().partition(":")[0] for line in lines[where + 1 :] if ":" in line]
    assert told == ["pruned, greedy", "pruned, drawn, seed 0", "reference, greedy", "reference, drawn, seed 0"]


def test_old_files_still_load_and_new_fields_have_their_own_place(tmp_path):
    old = {
        "subjects": {"dense": {"perplexity": {"c4": {
            "perplexity": 2.0, "nll": 0.693, "tokens": 10, "sequences": 1, "window": 128, "stride": 128,
            "bos": "stream", "layout": "stream", "digest": "0", "split": None,
        }}}},
        "schema": "shortllama.eval/1",
    }  # fmt: skip
    (tmp_path / "quality.json").write_text(json.dumps(old))
    found = read_evaluation(tmp_path / "quality.json")
    assert found.subjects["dense"].zero_shot is None
    assert found.subjects["dense"].perplexity["c4"].bits_per_byte is None
    assert found == Evaluation({"dense": Quality(found.subjects["dense"].perplexity)})


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command_writes_one_document(run_command, story, tmp_path):
    out = tmp_path / "q.json"
    done = run_command(
        "eval", "reference", "--ppl", f"{story}@window=32", "--generate", "The fox", "--new-tokens", 4, "--limit", 2,
        "--out", out, "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document == json.loads(out.read_text())
    assert document["schema"] == "shortllama.eval/1"
    assert [one["tokens"] for one in document["subjects"]["reference"]["generations"]] == [4, 4]


@pytest.mark.data
def test_the_command_runs_tasks_over_local_files(harness, run_command, data_dir, tmp_path):
    done = run_command(
        "eval", "reference", "--tasks", "piqa,lambada", "--task-data", data_dir / "zeroshot", "--limit", 3,
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "the harness's remarks and bars are kept back"
    assert "3 of 1838" in done.stdout
    assert "plain mean of 1 tasks" in done.stdout
    assert "0-shot, lm-eval 0.4." in done.stdout


def test_tasks_of_text_are_written_by_the_dense_model_whatever_is_evaluated(harness, reference, pruned, tmp_path):
    """A pruned folder and the dense model meet the same items; a task from a file stands beside."""
    from shortllama.evaluation import named, tasks

    (tmp_path / "piqa.jsonl").write_text('{"query": "Why?", "choices": ["so", "no"], "gold": 0}\n' * 2)
    wanted = named.Wanted(tasks=(tasks.WORD, "piqa"), task_data=tmp_path, limit=6, seed=4)
    found = [next(iter(named.evaluate(one, wanted).subjects.values())).zero_shot for one in (reference, pruned)]
    word = [one.tasks[tasks.WORD] for one in found]
    assert {one.origin for one in word} == {"text of reference, seed 4"}
    assert word[0].digest == word[1].digest
    assert word[0].metrics["perplexity"] < word[1].metrics["perplexity"]
    assert [one.tasks["piqa"].items for one in found] == [2, 2]
    assert word[0].items == word[0].published <= 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "mmlu"], "error: no task is called 'mmlu'; known are"),
        (["--ppl", "self@window=1"], "error: self@window=1: window of 1 tokens"),
        ([], "error: nothing to evaluate"),
    ],
)
def test_bad_input_is_one_line(run_command, arguments, message):
    done = run_command("eval", "reference", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1
