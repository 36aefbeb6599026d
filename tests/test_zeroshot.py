"""Zero-shot tasks: local files checked item by item, and accuracies equal to those of a short scorer."""

from __future__ import annotations

import bz2
import copy
import json
import math

import pytest
import torch

from shortllama import surgery
from shortllama.errors import InputError, UnsupportedError
from shortllama.evaluation import cloze, tasks, zeroshot
from shortllama.evaluation.tasks import TASKS, Item, lookup, read

FROM_FILES = [name for name, task in TASKS.items() if task.files]

# -- the oracle -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def log_likelihood(model, tokenizer, context: str, continuation: str) -> float:
    """The log-probability of a continuation, by one pass over context and continuation, cut at the window's start."""
    whole = tokenizer(f"{context} {continuation}")["input_ids"]
    first = len(tokenizer(context)["input_ids"])
    cut = max(0, len(whole) - 1 - model.config.max_position_embeddings)
    logs = torch.log_softmax(model(input_ids=torch.tensor([whole[cut:-1]])).logits[0].float(), dim=-1)
    return sum(logs[at - 1 - cut, whole[at]].item() for at in range(first, len(whole)))


def by_hand(model, tokenizer, items, by_length: bool) -> float:
    """The share of items whose right candidate is likeliest, by log-probability a character where asked."""
    right = 0
    for item in items:
        scores = [
            log_likelihood(model, tokenizer, context, more) / (len(more) if by_length else 1)
            for context in item.contexts
            for more in item.continuations
        ]
        right += scores.index(max(scores)) == item.gold
    return right / len(items)


def greedy_share(model, tokenizer, items) -> float:
    """The share of items whose continuation the model would write by itself."""
    right = 0
    for item in items:
        context, more = item.contexts[0], item.continuations[0]
        whole = tokenizer(f"{context} {more}")["input_ids"]
        first = len(tokenizer(context)["input_ids"])
        with torch.no_grad():
            best = model(input_ids=torch.tensor([whole[:-1]])).logits[0].argmax(dim=-1).tolist()
        right += best[first - 1 :] == whole[first:]
    return right / len(items)


@pytest.mark.data
def test_accuracies_equal_those_of_a_short_scorer(harness, data_dir, stories):
    """On the dense model and on one whose blocks are all of different width."""
    from shortllama import blind, checkpoint
    from shortllama.plans import Target, make_plan

    dense, tokenizer = checkpoint.load(stories, dtype="float32")
    shape = surgery.shape_of(dense)
    keep = blind.parse("flap:3±0.5x120±20", model="m", shape=shape, seed=1).keep
    uneven = surgery.apply(make_plan(model="m", shape=shape, method="x", target=Target("shape", "x"), keep=keep), dense)
    assert not surgery.shape_of(uneven).is_uniform
    local = tasks.read_all(TASKS, data_dir / "zeroshot")
    assert [*local] == FROM_FILES
    local |= cloze.make([*TASKS], dense, tokenizer, by="dense", limit=30, seed=3)
    for model, limit in ((dense, 12), (uneven, 6)):
        seen: list[tuple[int, int]] = []

        def step(done: int, total: int, seen: list[tuple[int, int]] = seen) -> None:
            seen.append((done, total))

        found = zeroshot.evaluate(model, tokenizer, list(TASKS), local=local, limit=limit, progress=step)
        for name, result in found.tasks.items():
            items = local[name].items[:limit]
            if TASKS[name].choices == (1, 1):
                assert result.value == greedy_share(model, tokenizer, items), name
                nats = [-log_likelihood(model, tokenizer, one.contexts[0], one.continuations[0]) for one in items]
                assert result.metrics["perplexity"] == pytest.approx(math.exp(sum(nats) / len(nats)), rel=1e-4)
                continue
            assert result.metrics["acc"] == by_hand(model, tokenizer, items, False), name
            assert result.value == by_hand(model, tokenizer, items, result.metric == "acc_norm"), name
            assert (result.items, result.published) == (limit, TASKS[name].published or len(local[name].items))
            assert (result.version, result.origin) == (tasks.LOCAL_VERSION, local[name].origin)
        seven = [one.value for name, one in found.tasks.items() if TASKS[name].averaged]
        assert len(seven) == 7
        assert found.mean == pytest.approx(sum(seven) / 7)
        assert (found.bos, found.limit) == (True, limit)
        assert found.harness.startswith("lm-eval 0.4.")
        longest = model.config.max_position_embeddings + 1
        lengths = [
            len(tokenizer(f"{context} {more}")["input_ids"])
            for one in local.values()
            for item in one.items[:limit]
            for context in item.contexts
            for more in item.continuations
        ]
        assert seen[-1] == (len(lengths), len(lengths))
        assert found.truncated == sum(length > longest for length in lengths) > 0


@pytest.mark.data
def test_nothing_of_the_model_or_tokenizer_is_changed(harness, data_dir, stories):
    from shortllama import checkpoint

    model, tokenizer = checkpoint.load(stories, dtype="float32")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings = copy.deepcopy(tokenizer.init_kwargs), tokenizer.pad_token, len(tokenizer)
    items = {"piqa": read("piqa", data_dir / "zeroshot")}
    first = zeroshot.evaluate(model, tokenizer, ["piqa"], local=items, limit=8)
    assert first == zeroshot.evaluate(model, tokenizer, ["piqa"], local=items, limit=8)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert settings == (tokenizer.init_kwargs, tokenizer.pad_token, len(tokenizer))
    assert first.tasks["piqa"].standard_error == pytest.approx(
        (first.tasks["piqa"].value * (1 - first.tasks["piqa"].value) / 7) ** 0.5
    )


@pytest.mark.data
def test_tasks_on_the_hub_without_a_network_name_the_local_alternative(harness, stories):
    from shortllama import checkpoint

    model, tokenizer = checkpoint.load(stories)
    with pytest.raises(InputError, match=r"task 'piqa': its data set cannot be fetched.*give --task-data DIR") as error:
        zeroshot.evaluate(model, tokenizer, ["piqa"])
    assert "\n" not in str(error.value)


def test_without_the_harness_the_extra_is_named(monkeypatch):
    from importlib import metadata

    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(UnsupportedError, match=r"pip install 'shortllama\[eval\]'"):
        zeroshot.require_harness()


# -- rows and names ---------------------------------------------------------------------------------------------------


def test_the_seven_tasks_have_the_paper_s_metrics():
    averaged = {name: task.metric for name, task in TASKS.items() if task.averaged}
    plain = dict.fromkeys(("boolq", "piqa", "winogrande", "arc_easy"), "acc")
    assert averaged == plain | dict.fromkeys(("hellaswag", "arc_challenge", "openbookqa"), "acc_norm")
    assert lookup("all") == list(averaged)
    assert lookup("piqa, lambada,piqa") == ["piqa", "lambada"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("piqua", "no task is called 'piqua'; did you mean 'piqa'"),
        ("boolq,mmlu", "no task is called 'mmlu'; known are boolq"),
        ("", "no task is called ''"),
    ],
)
def test_unknown_tasks_are_named(names, message):
    with pytest.raises(InputError, match=message):
        lookup(names)


# -- local files ------------------------------------------------------------------------------------------------------


@pytest.mark.data
@pytest.mark.parametrize("name", FROM_FILES)
def test_the_local_sets_are_complete(data_dir, name):
    assert len(read(name, data_dir / "zeroshot").items) == TASKS[name].published


def write(folder, name: str, *records) -> None:
    (folder / TASKS[name].files[0]).write_text("".join(json.dumps(record) + "\n" for record in records))


def test_prompts_are_those_of_the_harness(tmp_path):
    write(tmp_path, "boolq", {"query": "Passage: It is.\nQuestion: is it?", "choices": ["no", "yes"], "gold": 1})
    write(tmp_path, "piqa", {"query": "Question: dresser\n", "choices": ["a", "b"], "gold": 0})
    write(tmp_path, "arc_easy", {"query": "Question: why?", "choices": ["a", "b", "c"], "gold": 2})
    write(tmp_path, "openbookqa", {"query": "Fog is", "choices": ["a", "b", "c", "d"], "gold": 3})
    write(tmp_path, "winogrande", {"context_options": ["S so S", "S so M"], "continuation": "won.", "gold": 0})
    write(tmp_path, "lambada", {"context": "about", "continuation": "signs"})
    found = {name: read(name, tmp_path).items[0] for name in FROM_FILES if name not in ("hellaswag", "arc_challenge")}
    assert found == {
        "boolq": Item(("It is.\nQuestion: is it?\nAnswer:",), ("no", "yes"), 1),
        "piqa": Item(("Question: dresser\nAnswer:",), ("a", "b"), 0),
        "winogrande": Item(("S so S", "S so M"), ("won.",), 0),
        "arc_easy": Item(("Question: why?\nAnswer:",), ("a", "b", "c"), 2),
        "openbookqa": Item(("Fog is",), ("a", "b", "c", "d"), 3),
        "lambada": Item(("about",), ("signs",), 0),
    }


def test_hellaswag_comes_in_six_lines_an_item_packed_or_not(tmp_path):
    lines = "A man sits. he\n2\nis a.\nis b.\nis c.\nis d.\n"
    (tmp_path / "hellaswag.txt").write_text(lines * 2)
    expected = Item(("A man sits. he",), ("is a.", "is b.", "is c.", "is d."), 2)
    assert read("hellaswag", tmp_path).items == (expected, expected)
    (tmp_path / "hellaswag_val_full.txt.bz2").write_bytes(bz2.compress(lines.encode()))
    assert read("hellaswag", tmp_path).items == (expected,)
    (tmp_path / "hellaswag_val_full.txt.bz2").write_bytes(bz2.compress(lines.encode())[:-4])
    with pytest.raises(InputError, match=r"bz2: is not a whole bz2 file"):
        read("hellaswag", tmp_path)


# -- tasks made of text ------------------------------------------------------------------------------------------------


def text_of(number: int, words: int) -> str:
    return " ".join(f"w{number}.{place}" for place in range(words))


def test_items_are_made_of_the_middle_of_texts():
    """The first half, the twelve words after it, never the last word: the text may end within it."""
    texts = [text_of(number, words) for number, words in enumerate((25, 24, 40, 25, 25))]
    endings = cloze.items(tasks.ENDING, texts, "here")
    assert len(endings.items) == 4  # the second text is too short
    first, second = endings.items[:2]
    assert first.contexts == (text_of(0, 12),)
    assert second.contexts == (text_of(2, 19),)
    starts = [one.split()[0] for one in second.continuations]
    assert (starts, second.gold) == (["w3.12", "w2.19", "w4.12", "w0.12"], 1)
    assert {len(one.split()) for item in endings.items for one in item.continuations} == {12}
    words = cloze.items(tasks.WORD, texts, "here")
    assert words.items[1] == Item((text_of(2, 19),), ("w2.19",), 0)
    assert len({endings.digest, words.digest}) == 2
    with pytest.raises(InputError, match=r"task 'self-word': only 3 of 4 texts that the model wrote have 25 words"):
        cloze.items(tasks.WORD, texts[:4], "here")


def test_both_tasks_are_of_one_sample_which_ends_with_the_text(harness, reference):
    model, tokenizer = reference
    made = cloze.make([tasks.WORD, "piqa", tasks.ENDING], model, tokenizer, by="reference", limit=8, seed=2)
    assert [*made] == [tasks.WORD, tasks.ENDING]
    assert {one.origin for one in made.values()} == {"text of reference, seed 2"}
    for word, ending in zip(made[tasks.WORD].items, made[tasks.ENDING].items, strict=True):
        assert word.contexts == ending.contexts
        assert ending.continuations[ending.gold].split()[0] == word.continuations[0]
    assert made == cloze.make([*made], model, tokenizer, by="reference", limit=8, seed=2)
    assert cloze.make(["piqa"], model, None, by="reference") == {}
    with pytest.raises(InputError, match="comes without a tokenizer"):
        cloze.make([*made], model, None, by="reference")
    assert cloze._until([5, 2, 7, 2], 2) == [5]
    assert cloze._until([5, 7], 2) == [5, 7]


# -- candidates that no window holds ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference():
    from shortllama import pruning, sources

    return pruning.load(sources.locate("reference"), device="cpu")


def long_items(tmp_path, words: int):
    """Two good items, and one of which the second choice has so many words."""
    short = {"query": "Question: why?", "choices": ["so", "no"], "gold": 0}
    write(tmp_path, "piqa", short, short, {**short, "choices": ["so", "so" + " so" * (words - 1)]}, short)
    return {"piqa": read("piqa", tmp_path)}


def test_a_candidate_longer_than_the_window_is_named(harness, reference, tmp_path):
    """As many tokens as there are positions are scored; one more is refused, before anything is computed."""
    model, tokenizer = reference
    words = model.config.max_position_embeddings
    while len(tokenizer(" so" * words, add_special_tokens=False)["input_ids"]) > model.config.max_position_embeddings:
        words -= 1
    fits, too_long = long_items(tmp_path, words), long_items(tmp_path, words + 300)
    zeroshot.check(model, tokenizer, fits)
    assert zeroshot.evaluate(model, tokenizer, ["piqa"], local=fits).tasks["piqa"].items == 4
    message = r"^task 'piqa': item 3 has a candidate of \d+ tokens, the model has positions for 256; leave piqa out of "
    passes = []
    for attempt in (zeroshot.check, lambda *given: zeroshot.evaluate(*given[:2], ["piqa"], local=given[2])):
        hook = model.register_forward_pre_hook(lambda *_: passes.append(1))
        try:
            with pytest.raises(InputError, match=message + r"--tasks, or take fewer items \(--limit 2\)$"):
                attempt(model, tokenizer, too_long)
        finally:
            hook.remove()
        assert not passes
    zeroshot.check(model, tokenizer, too_long, limit=2)


def test_it_is_found_before_texts_are_measured(harness, reference, tmp_path, monkeypatch):
    from shortllama import pruning, sources
    from shortllama.evaluation import named

    long_items(tmp_path, 600)
    monkeypatch.setattr(pruning, "load", lambda *_, **__: reference)
    monkeypatch.setattr(named, "_perplexities", lambda *_: pytest.fail("measured texts first"))
    wanted = named.Wanted(texts=("self",), tasks=("piqa",), task_data=tmp_path)
    with pytest.raises(InputError, match="item 3"):
        named.evaluate(sources.locate("reference"), wanted)


GOOD = {"query": "Question: x\n", "choices": ["a", "b"], "gold": 0}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({**GOOD, "choices": ["a", "b", "c"]}, r"piqa\.jsonl:2: 3 choices; an item of piqa has 2"),
        ({**GOOD, "choices": ["a"]}, r"piqa\.jsonl:2: 1 choices"),
        ({**GOOD, "choices": "ab"}, r"piqa\.jsonl:2: saw 'ab' as 'choices'; expected a list of texts"),
        ({**GOOD, "choices": ["a", 3]}, r"expected a list of texts"),
        ({**GOOD, "choices": ["a", ""]}, r"expected a list of texts"),
        ({**GOOD, "gold": 2}, r"piqa\.jsonl:2: gold is 2; expected the index of one of the 2 choices"),
        ({**GOOD, "gold": -1}, r"gold is -1"),
        ({**GOOD, "gold": True}, r"gold is True"),
        ({"choices": ["a", "b"], "gold": 0}, r"piqa\.jsonl:2: no text in 'query' \(keys are choices, gold\)"),
        ({**GOOD, "query": ""}, r"no text in 'query' \(saw ''\)"),
        ([1], r"piqa\.jsonl:2: saw '\[1\]'; expected an object"),
    ],
)
def test_bad_items_are_named_by_line(tmp_path, record, message):
    write(tmp_path, "piqa", GOOD, record)
    with pytest.raises(InputError, match=message):
        read("piqa", tmp_path)


def test_files_that_are_missing_or_broken_are_named(tmp_path):
    with pytest.raises(
        InputError, match=r"task 'openbookqa': .* holds no openbookqa\.jsonl or openbook_qa\.jsonl; put"
    ):
        read("openbookqa", tmp_path)
    with pytest.raises(InputError, match=r"gone is no folder"):
        read("piqa", tmp_path / "gone")
    (tmp_path / "piqa.jsonl").write_text("{\n")
    with pytest.raises(InputError, match=r"piqa\.jsonl:1: not JSON"):
        read("piqa", tmp_path)
    (tmp_path / "piqa.jsonl").write_text("\n")
    with pytest.raises(InputError, match=r"piqa\.jsonl: holds no items"):
        read("piqa", tmp_path)
    (tmp_path / "piqa.jsonl").write_bytes(b"\xff\n")
    with pytest.raises(InputError, match=r"piqa\.jsonl: not UTF-8 text \(byte 0\)"):
        read("piqa", tmp_path)
    (tmp_path / "hellaswag.txt").write_text("context\n1\na\nb\nc\n")
    with pytest.raises(InputError, match=r"hellaswag\.txt:1: saw '1' after the context; expected 6 lines an item"):
        read("hellaswag", tmp_path)


def test_the_digest_is_of_the_items_not_of_the_file(tmp_path):
    write(tmp_path, "piqa", GOOD)
    first = read("piqa", tmp_path)
    (tmp_path / "piqa.jsonl").write_text("\n" + json.dumps(dict(reversed(GOOD.items()))) + "\n\n")
    assert read("piqa", tmp_path) == first
    write(tmp_path, "piqa", {**GOOD, "gold": 1})
    assert read("piqa", tmp_path).digest != first.digest
