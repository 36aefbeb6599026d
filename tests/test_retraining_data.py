"""What retraining learns from: recipes, instruction files, packing and masking, and which examples a step takes."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shortllama import hub
from shortllama.errors import InputError, UnsupportedError
from shortllama.retraining import examples, instructions, recipes
from shortllama.retraining.recipes import RECIPES, Stage, lookup, scaled

# -- recipes ----------------------------------------------------------------------------------------------------------


def test_lora_is_the_published_recipe():
    (stage,) = lookup("lora").stages
    assert (stage.rank, stage.alpha, stage.dropout) == (8, 16, 0.05)
    assert (stage.rate, stage.schedule, stage.warm_up, stage.batch, stage.epochs) == (1e-4, "linear", 100, 64, 2)
    assert (stage.length, stage.held_out, stage.weight_decay, stage.clip) == (256, 2000, 0.0, 1.0)
    assert stage.steps_over(49_760) == 1555


def test_continued_pretraining_is_what_was_published_of_it():
    (stage,) = lookup("cpt").stages
    assert (stage.trains, stage.betas, stage.weight_decay) == ("all", (0.9, 0.95), 0.1)
    assert (stage.rate, stage.batch) == (1e-4, 512)
    assert lookup("cpt-lora").stages == (*lookup("cpt").stages, *lookup("lora").stages)
    assert {stage.learns for stage in lookup("distill").stages} == {"teacher"}


@given(st.integers(1, 400), st.integers(0, 200), st.sampled_from(recipes.SCHEDULES))
def test_the_rate_rises_once_then_falls_and_is_never_zero(steps: int, warm_up: int, schedule: str):
    stage = Stage(trains="all", warm_up=warm_up, schedule=schedule)
    factors = [stage.factor(step, steps) for step in range(steps)]
    top = factors.index(max(factors))
    assert top <= min(warm_up, steps // 10)
    assert all(0 < one <= 1 for one in factors)
    assert factors[:top] == sorted(factors[:top])
    assert factors[top:] == sorted(factors[top:], reverse=True)
    assert max(factors) == 1


def test_linear_reaches_the_published_values():
    stage = Stage(trains="lora", warm_up=100)
    assert stage.factor(100, 1555) == 1
    assert stage.factor(1554, 1555) == pytest.approx(1 / 1455)
    assert stage.factor(49, 1555) == pytest.approx(50 / 101)
    assert Stage(trains="all", schedule="cosine").factor(827 + 1, 1556) == pytest.approx(0.5, abs=1e-3)


def test_scaling_changes_what_is_given_and_alpha_with_the_rank():
    (stage,) = scaled(lookup("lora"), rank=4, steps=10, batch=2, rate=None).stages
    assert (stage.rank, stage.alpha, stage.steps, stage.batch, stage.micro_batch, stage.rate) == (4, 8, 10, 2, 2, 1e-4)
    both = scaled(lookup("cpt-lora"), rank=4, length=99)
    assert [one.rank for one in both.stages] == [None, 4]
    assert [one.length for one in both.stages] == [99, 99]


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("cpt", {"rank": 4}, "recipe cpt has no rank; it belongs to lora and cpt-lora"),
        ("lora", {"temperature": 2.0}, "no temperature; it belongs to distill"),
        ("lora", {"hidden": 2.0}, "no hidden; it belongs to distill"),
        ("lora", {"batch": 0}, "batch of 0; give at least 1"),
        ("lora", {"rate": 0.0}, "learning rate 0"),
        ("lora", {"schedule": "flat"}, "'flat' is unknown; choose one of linear, cosine"),
        ("lora", {"dtype": "float16"}, "losses scaled"),
        ("distill", {"temperature": 0.0}, "temperature 0;"),
    ],
)
def test_changes_that_mean_nothing_are_refused(name: str, changes: dict, said: str):
    with pytest.raises(InputError) as caught:
        scaled(lookup(name), **changes)
    assert said in str(caught.value)


def test_an_unknown_recipe_is_answered_with_the_nearest():
    with pytest.raises(InputError, match="did you mean 'cpt-lora'"):
        lookup("cpt_lora")
    with pytest.raises(UnsupportedError):
        Stage(trains="all", dtype="int8")


def test_windows_fit_the_models_positions():
    assert [one.length for one in recipes.within(lookup("cpt-lora"), 512).stages] == [512, 256]
    assert recipes.within(lookup("cpt"), None) == lookup("cpt")


def test_recipes_survive_json():
    for row in RECIPES.values():
        assert msgspec.json.decode(msgspec.json.encode(row), type=recipes.Recipe) == row


# -- instruction files ------------------------------------------------------------------------------------------------

PLAIN = {"instruction": "Name a colour.", "input": "", "output": "Red."}
MORE = {"instruction": "Add.", "input": "1 2", "output": "3"}


def write(path: Path, *items: object) -> Path:
    lines = [json.dumps(item) for item in items]
    path.write_text("\n".join(lines) if path.suffix == ".jsonl" else "[\n" + ",\n".join(lines) + "\n]\n")
    return path


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_instructions_are_read_in_order(tmp_path: Path, suffix: str):
    file = write(tmp_path / f"a{suffix}", PLAIN, MORE, {"prompt": "Q:", "response": "A"})
    assert instructions.holds(file)
    first, second, third = instructions.read(file)
    assert first.prompt.startswith("Below is an instruction that describes a task. Write")
    assert first.prompt.endswith("### Instruction:\nName a colour.\n\n### Response:\n")
    assert "paired with an input" in second.prompt
    assert second.prompt.endswith("### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n")
    assert (second.response, third.prompt, third.response) == ("3", "Q:", "A")


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_a_line_with_missing_fields_is_named(tmp_path: Path, suffix: str):
    file = write(tmp_path / f"a{suffix}", PLAIN, {"instruction": "x"}, MORE)
    with pytest.raises(InputError) as caught:
        instructions.read(file)
    line = 3 if suffix == ".json" else 2
    assert f"a{suffix}:{line}: saw keys instruction" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[{"instruction": "a", "output": "b"},\n{"instr', "a.json:2: not JSON"),
        ('[{"instruction": "a", "output": "b"}\n', "a.json:2: the list is not closed"),
        ('{"instruction": "a"}', "expected a JSON list"),
        ("[]", "holds no instructions"),
        ("[3]", "a.json:1: saw 3"),
        ('[{"instruction": "a", "input": 5, "output": "b"}]', "a.json:1: saw keys"),
    ],
)
def test_files_that_are_not_lists_of_instructions_are_refused(tmp_path: Path, text: str, said: str):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError) as caught:
        instructions.read(tmp_path / "a.json")
    assert said in str(caught.value)


def test_text_is_not_taken_for_instructions(tmp_path: Path):
    assert not instructions.holds(write(tmp_path / "a.jsonl", {"text": "one"}))
    assert not instructions.holds(write(tmp_path / "b.jsonl", "one"))
    (tmp_path / "c.txt").write_text('[{"instruction": 1}]')
    assert not instructions.holds(tmp_path / "c.txt")


def test_instructions_on_the_hub_are_told_by_their_columns(monkeypatch: pytest.MonkeyPatch):
    asked = hub.parse("alpaca", "calibration")
    assert asked is not None
    monkeypatch.setattr(hub, "rows", lambda _: iter([PLAIN, MORE]))
    found = instructions.from_hub(asked)
    assert found is not None
    assert [one.response for one in found] == ["Red.", "3"]
    monkeypatch.setattr(hub, "rows", lambda _: iter([{"text": "a"}]))
    assert instructions.from_hub(asked) is None


# -- examples ---------------------------------------------------------------------------------------------------------


class Letters:
    """A tokenizer whose ids are the characters' code points; it has no padding token."""

    pad_token_id = None

    def __init__(self, bos: int | None = 1, eos: int | None = 2) -> None:
        self.bos_token_id, self.eos_token_id = bos, eos

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}


def stage(**changes: object) -> Stage:
    return msgspec.structs.replace(Stage(trains="lora", length=300, batch=4, micro_batch=2), **changes)


def test_the_prompt_is_masked_and_an_uncut_answer_ends(tmp_path: Path):
    file = write(tmp_path / "a.jsonl", PLAIN, {"prompt": "ab", "response": "cd"})
    found = examples.load(str(file), stage(), tokenizer=Letters())
    (long, short), (_, first) = found.sequences, found.first
    assert short.tolist() == [1, ord("a"), ord("b"), ord("c"), ord("d"), 2]
    assert first == 3
    assert found.data.kind == "instructions"
    assert found.targets([0, 1]) == found.data.targets == len("Red.") + 1 + 3
    cut = examples.load(str(file), stage(length=5), tokenizer=Letters(eos=None))
    assert cut.sequences[0].tolist() == [1, ord("a"), ord("b"), ord("c"), ord("d")]
    assert (cut.data.skipped, len(long)) == (1, 1 + len(instructions.prompt_of("Name a colour.")) + 5)


def test_a_prompt_that_fills_the_window_is_skipped_and_counted(tmp_path: Path):
    file = write(tmp_path / "a.jsonl", {"prompt": "a" * 10, "response": "b"}, {"prompt": "a" * 9, "response": "b"})
    found = examples.load(str(file), stage(length=11), tokenizer=Letters())
    assert (found.data.examples, found.data.skipped) == (1, 1)
    with pytest.raises(InputError, match="all 2 prompts fill the 8 tokens"):
        examples.load(str(file), stage(length=8), tokenizer=Letters())


def test_an_answer_without_tokens_is_no_example(tmp_path: Path):
    file = write(tmp_path / "a.jsonl", {"prompt": "a", "response": ""}, {"prompt": "a", "response": "b"})
    assert examples.load(str(file), stage(), tokenizer=Letters(eos=None)).data.skipped == 1


@pytest.mark.parametrize(("bos", "eos", "mark"), [(1, 2, 1), (None, 2, 2), (None, None, None)])
def test_text_is_packed_with_one_separator_and_nothing_is_lost(tmp_path: Path, bos, eos, mark):
    texts = ["abc" * 30, "defg" * 20, "h" * 7]
    file = write(tmp_path / "a.jsonl", *({"text": text} for text in texts))
    found = examples.load(str(file), stage(length=16), tokenizer=Letters(bos, eos))
    stream = np.concatenate(found.sequences)
    assert all(len(window) == 16 for window in found.sequences)
    marks = 0 if mark is None else 3
    assert len(stream) == (sum(map(len, texts)) + marks) // 16 * 16
    counts = {letter: sum(text.count(letter) for text in texts) for letter in "abcdefgh"}
    seen = {letter: int((stream == ord(letter)).sum()) for letter in "abcdefgh"}
    assert sum(counts.values()) - sum(seen.values()) <= 16
    assert all(seen[letter] <= counts[letter] for letter in counts)
    if bos is not None:
        assert stream[0] == 1
    assert found.first == (1,) * len(found.sequences)


def test_a_run_of_few_steps_tokenizes_no_more_than_it_needs(tmp_path: Path):
    file = write(tmp_path / "a.jsonl", *({"text": "a" * 40} for _ in range(1000)))
    calls: list[str] = []
    read = examples.load(str(file), stage(length=16, steps=10), tokenizer=CountingLetters(calls))
    assert len(read.training) >= 40
    assert len(calls) < 60


class CountingLetters(Letters):
    def __init__(self, calls: list[str]) -> None:
        super().__init__()
        self.calls = calls

    def __call__(self, text: str, **more: object) -> dict[str, list[int]]:
        self.calls.append(text)
        return super().__call__(text, **more)


def test_ids_are_used_as_given(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text("[5, 6, 7]\n[1, 2]\n")
    found = examples.load(f"ids:{tmp_path / 'a.jsonl'}", stage())
    assert [one.tolist() for one in found.sequences] == [[5, 6, 7], [1, 2]]
    assert (found.data.source, found.data.targets, found.data.held_out) == ("ids:a.jsonl", 3, 0)


def test_text_without_a_tokenizer_or_too_short_is_refused(tmp_path: Path):
    file = write(tmp_path / "a.jsonl", {"text": "abc"})
    with pytest.raises(InputError, match="without a tokenizer"):
        examples.load(str(file), stage())
    with pytest.raises(InputError, match="4 tokens fill no window of 300"):
        examples.load(str(file), stage(), tokenizer=Letters())
    with pytest.raises(InputError, match="give --steps"):
        examples.load("self", stage())


def of(count: int, rng: np.random.Generator, **changes: object) -> examples.Examples:
    sequences = [rng.integers(0, 90, rng.integers(2, 12)).astype(np.int32) for _ in range(count)]
    return examples._divided(sequences, [1] * count, "drawn", "ids", stage(**changes))


def test_what_is_held_out_is_never_trained_on():
    found = of(200, np.random.default_rng(0), held_out=7)
    assert len(found.held_out) == 7
    assert sorted([*found.training, *found.held_out]) == list(range(200))
    assert len(of(200, np.random.default_rng(0)).held_out) == 10
    assert len(of(19, np.random.default_rng(0)).held_out) == 0


def test_text_is_held_out_at_its_end(tmp_path: Path):
    file = write(tmp_path / "a.jsonl", {"text": "abcdefgh" * 100})
    found = examples.load(str(file), stage(length=16), tokenizer=Letters())
    assert found.held_out.tolist() == [48, 49]


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 5))
def test_every_pass_takes_every_example_once(count: int, batch: int, seed: int):
    of_stage = stage(batch=batch, seed=seed)
    steps = -(-3 * count // batch)
    taken = [one for step in range(steps) for one in examples.batch_at(step, np.arange(count) + 5, of_stage)]
    for number in range(3):
        assert sorted(taken[number * count : (number + 1) * count]) == list(range(5, count + 5))


def test_every_pass_has_an_order_of_its_own():
    first, second = (examples.shuffled(50, 0, number).tolist() for number in range(2))
    assert first != second != examples.shuffled(50, 1, 1).tolist()


@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 99))
def test_collation_pads_right_and_counts_targets_only(count: int, rows: int, seed: int):
    found = of(count, np.random.default_rng(seed))
    pieces = examples.micro_batches(range(count), found, rows)
    assert sorted(one for piece in pieces for one in piece) == list(range(count))
    for piece in pieces:
        ids_BT, counts_BT = examples.collate(piece, found)
        assert counts_BT.sum() == found.targets(piece)
        for row, one in enumerate(piece):
            length = len(found.sequences[one])
            assert ids_BT[row, :length].tolist() == found.sequences[one].tolist()
            assert not ids_BT[row, length:].any()
            assert not counts_BT[row, length:].any()
            assert not counts_BT[row, 0]
