"""The loop on models in memory: beside plain loops and sums, on every kind of pruned model, killed and gone on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from strategies import plan_of
from torch import nn

from shortllama import surgery
from shortllama.errors import InputError, UnsupportedError
from shortllama.families import adapter
from shortllama.plans import BlockKeep
from shortllama.retraining import adapters, examples, loop, memory, objectives, recipes
from shortllama.retraining.examples import Examples
from shortllama.retraining.objectives import Teacher
from shortllama.retraining.recipes import Recipe, Stage
from shortllama.retraining.record import Done
from shortllama.shape import BlockShape, ModelShape
from shortllama.stack import token_nll

SHAPE = ModelShape.uniform(vocabulary=97, hidden=64, head_dim=8, blocks=4, query_heads=8, kv_heads=4, neurons=96)

FULL = Stage(trains="all", rate=1e-2, batch=6, micro_batch=4, length=12, steps=8, weight_decay=0.1, betas=(0.9, 0.95))
LORA = Stage(trains="lora", rate=1e-2, batch=6, micro_batch=4, length=12, steps=8, rank=4, alpha=8, dropout=0.1)


def build(shape: ModelShape = SHAPE, seed: int = 0):
    return surgery.build(shape, std=0.1, seed=seed)


def data(count: int = 60, *, ragged: bool = True, vocabulary: int = 97, seed: int = 0) -> Examples:
    """Sequences that can be learned: each token is the one before it plus a step of its own."""
    rng = np.random.default_rng(seed)
    sequences, first = [], []
    for _ in range(count):
        length = int(rng.integers(4, 13)) if ragged else 12
        sequences.append(((rng.integers(0, 97) + rng.integers(1, 4) * np.arange(length)) % vocabulary).astype(np.int32))
        first.append(int(rng.integers(1, 3)) if ragged else 1)
    return examples._divided(sequences, first, "drawn", "ids", FULL)


def run(model, *stages: Stage, on: Examples | None = None, **more) -> tuple[Done, ...]:
    return loop.retrain(model, Recipe("test", stages), [on or data()], **more)


def losses(model, *stages: Stage, **more) -> list[float | None]:
    return [loss for done in run(model, *stages, **more) for loss in done.losses]


def plain_nll(model, chosen: list[int], found: Examples) -> float:
    """Mean cross-entropy of the targets, each sequence alone."""
    total = 0.0
    with torch.no_grad():
        for one in chosen:
            ids_BT = torch.from_numpy(found.sequences[one][None].astype(np.int64))
            total += float(token_nll(model(input_ids=ids_BT).logits, ids_BT)[:, found.first[one] - 1 :].sum())
    return total / found.targets(chosen)


# -- oracles ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [FULL, LORA], ids=["all", "lora"])
def test_the_first_loss_is_that_of_the_model_as_it_came(stage: Stage):
    model, found = build(), data()
    chosen = examples.batch_at(0, found.training, stage)
    expected = plain_nll(model, chosen, found)
    held = plain_nll(model, found.held_out.tolist(), found)
    (done,) = run(model, stage, on=found)
    assert done.losses[0] == pytest.approx(expected, rel=1e-5)
    assert done.held_out[0].step == 0
    assert done.held_out[0].nll == pytest.approx(held, rel=1e-5)
    assert (done.held_out[-1].step, done.held_out[-1].nll) == (
        8,
        pytest.approx(plain_nll(model, found.held_out, found)),
    )


def test_full_training_is_a_plain_loop():
    """Against torch's own pieces: one batch at once, the model's own loss with masked labels, a schedule by hand."""
    model, found, other = build(), data(), build()
    seen = losses(model, FULL, on=found)
    matrices = [one for one in other.parameters() if one.ndim > 1]
    vectors = [one for one in other.parameters() if one.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    expected = []
    for step in range(8):
        ids_BT, counts_BT = examples.collate(examples.batch_at(step, found.training, FULL), found)
        labels_BT = torch.where(torch.from_numpy(counts_BT), torch.from_numpy(ids_BT), -100)
        loss = other(input_ids=torch.from_numpy(ids_BT), labels=labels_BT).loss
        loss.backward()
        nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (8 - step) / 8
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    assert seen == pytest.approx(expected, rel=1e-4)
    assert seen[-1] < 0.9 * seen[0]
    for mine, plain in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-3, atol=1e-4)


def test_adapters_change_nothing_before_training_and_merge_into_what_they_computed():
    model = build()
    ids_BT = torch.arange(20)[None]
    before = model(input_ids=ids_BT).logits
    shape, names = surgery.shape_of(model), [name for name, _ in model.named_parameters()]
    adapters.attach(model, LORA)
    assert torch.equal(model(input_ids=ids_BT).logits, before)
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    assert len(trained) == 4 * 7 * 2
    assert sum(one.numel() for one in trained.values()) == memory.trained_parameters(shape, LORA)
    with torch.no_grad():
        for one in trained.values():
            one.normal_(0, 0.1)
    adapted = model.eval()(input_ids=ids_BT).logits
    adapters.merge(model)
    merged = model(input_ids=ids_BT).logits
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-4)
    assert (merged - before).abs().max() > 0.1
    assert surgery.shape_of(model) == shape
    assert [name for name, _ in model.named_parameters()] == names
    assert not hasattr(model, "peft_config")


@pytest.mark.parametrize("changes", [{"micro_batch": 1}, {"micro_batch": 6}, {"checkpointing": True}], ids=str)
def test_how_memory_is_saved_changes_no_loss(changes: dict):
    stage = msgspec.structs.replace(FULL, **changes)
    assert losses(build(), stage) == pytest.approx(losses(build(), FULL), rel=1e-4)


def test_dropout_is_the_same_however_often_a_run_is_repeated_and_leaves_the_random_state():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = losses(build(), LORA)
    assert torch.rand(1) == expected
    torch.rand(7)
    assert losses(build(), LORA) == first
    assert losses(build(), msgspec.structs.replace(LORA, dropout=0.0)) != first
    assert losses(build(), msgspec.structs.replace(LORA, seed=1)) != first


def test_only_what_is_adapted_changes():
    model = build()
    before = {name: one.detach().clone() for name, one in model.named_parameters()}
    run(model, LORA)
    changed = {name for name, one in model.named_parameters() if not torch.equal(one, before[name])}
    assert changed == {name for name in before if "_proj." in name}


@pytest.mark.parametrize("stage", [FULL, LORA], ids=["all", "lora"])
def test_the_model_comes_back_in_the_form_it_had(stage: Stage):
    model = surgery.build(SHAPE, std=0.1, dtype="float16")
    frequencies = model.model.rotary_emb.inv_freq.clone()
    model.model.embed_tokens.weight.requires_grad_(False)
    (done,) = run(model, stage)
    assert {one.dtype for one in model.parameters()} == {torch.float16}
    assert not model.model.embed_tokens.weight.requires_grad
    assert model.lm_head.weight.requires_grad
    assert all(one.grad is None for one in model.parameters())
    assert not model.training
    assert not any(module.training for module in model.modules())
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)
    assert surgery.shape_of(model) == SHAPE
    # The last held-out loss is that of the stored weights, not of what they were rounded from.
    found = data()
    kept = plain_nll(model.float(), found.held_out.tolist(), found)
    assert done.held_out[-1].nll == pytest.approx(kept, rel=1e-6)


def test_bfloat16_trains_float32_weights():
    model, found = build(), data()
    (done,) = run(model, msgspec.structs.replace(FULL, dtype="bfloat16"), on=found)
    assert {one.dtype for one in model.parameters()} == {torch.float32}
    assert done.stage.dtype == "bfloat16"
    assert done.losses == pytest.approx(losses(build(), FULL), rel=0.05)
    assert done.losses != pytest.approx(losses(build(), FULL), rel=1e-5)


# -- every kind of model ----------------------------------------------------------------------------------------------


def uneven(family: str = "llama", **more) -> ModelShape:
    blocks = (BlockShape(8, 4, 96), BlockShape(4, 2, 30), BlockShape(2, 1, 7), BlockShape(8, 4, 1))
    return msgspec.structs.replace(SHAPE, blocks=blocks, family=family, **more)


PARTS = msgspec.structs.replace(
    SHAPE, blocks=(BlockShape(8, 4, 96), BlockShape(0, 0, 96), BlockShape(8, 4, 0), BlockShape(0, 0, 40))
)
KINDS = {
    "depth": msgspec.structs.replace(SHAPE, blocks=SHAPE.blocks[:3]),
    "uniform width": ModelShape.uniform(
        vocabulary=97, hidden=64, head_dim=8, blocks=4, query_heads=6, kv_heads=3, neurons=50
    ),
    "uneven widths": uneven(),
    "removed modules": PARTS,
    "flap biases": uneven(biases=("o", "down")),
    "qwen2": uneven("qwen2", biases=("q", "k", "v")),
    "qwen3": uneven("qwen3", qk_norm=True),
    "mistral tied": uneven("mistral", tied=True),
}


@pytest.mark.parametrize("stage", [FULL, LORA], ids=["all", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_models_of_every_method_learn(kind: str, stage: Stage):
    shape = KINDS[kind]
    model = build(shape)
    stage = msgspec.structs.replace(stage, steps=15, rate=2e-2, checkpointing=kind == "removed modules")
    (done,) = run(model, stage)
    assert surgery.shape_of(model) == shape
    assert sum(done.losses[-3:]) < 0.98 * sum(done.losses[:3])  # type: ignore[arg-type, operator]
    assert done.trained_parameters == memory.trained_parameters(shape, stage)


def test_blocks_of_gpt_neox_learn_by_their_own_projections():
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=97, max_position_embeddings=32, **sizes)).eval()
    (done,) = run(model, msgspec.structs.replace(LORA, steps=15, rate=5e-2))
    assert done.trained_parameters == memory.trained_parameters(surgery.shape_of(model), LORA)
    assert sum(done.losses[-3:]) < sum(done.losses[:3])  # type: ignore[arg-type, operator]


def test_lora_refuses_blocks_without_projections():
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=97, hidden_size=16, num_hidden_layers=2, state_size=4, intermediate_size=32)
    model = MambaForCausalLM(config).eval()
    with pytest.raises(UnsupportedError, match="use recipe cpt"):
        run(model, LORA)
    seen = losses(model, FULL)
    assert seen[-1] < seen[0]  # type: ignore[operator]


# -- from a teacher ---------------------------------------------------------------------------------------------------

TAUGHT = msgspec.structs.replace(FULL, learns="teacher", temperature=2.0, hidden=0.0)


def taught(teacher, *keep: int) -> tuple[object, Teacher]:
    """The teacher pruned to the blocks kept, and the teacher of it."""
    pruned = surgery.apply(plan_of(SHAPE, tuple(map(BlockKeep, keep))), teacher)
    return pruned, Teacher(teacher, "dense", keep)


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
    student, teacher = taught(build(), 0, 1, 2, 3)
    (done,) = run(student, msgspec.structs.replace(TAUGHT, hidden=1.0), teacher=teacher)
    assert done.losses[0] == pytest.approx(0, abs=1e-5)
    assert done.teacher == "dense"


def test_a_student_comes_nearer_to_its_teacher_and_leaves_it_alone():
    dense = build()
    before = [one.detach().clone() for one in dense.parameters()]
    student, teacher = taught(dense, 0, 3)
    seen = losses(student, msgspec.structs.replace(TAUGHT, steps=20), teacher=teacher)
    assert seen[-1] < 0.8 * seen[0]  # type: ignore[operator]
    assert all(torch.equal(one, was) for one, was in zip(dense.parameters(), before, strict=True))


def test_the_divergence_is_the_sum_by_hand():
    student, teacher = taught(build(), 1, 3)
    ids_BT = torch.randint(97, (2, 6), generator=torch.Generator().manual_seed(0))
    counts_BT = torch.tensor([[False, False, True, True, True, True], [False, True, True, False, False, False]])
    with torch.no_grad():
        found = objectives.divergence(teacher, 2.0, 0.5)(student, ids_BT, counts_BT)
        known = teacher.model(input_ids=ids_BT, output_hidden_states=True)
        own = student(input_ids=ids_BT, output_hidden_states=True)
        total = 0.0
        told = (known.logits / 2).softmax(-1)
        divergence_BT = 4 * (told * (told.log() - (own.logits / 2).log_softmax(-1))).sum(-1)
        last = []
        for model in (teacher.model, student):
            hook = adapter(model).blocks[-1].register_forward_hook(lambda *call: last.append(call[-1]))
            model(input_ids=ids_BT)
            hook.remove()
        # Block 1 is followed by block 3: it must give what entered that; the last must give what the last gave.
        pairs = [(own.hidden_states[1], known.hidden_states[3]), (last[1], last[0])]
        for batch in range(2):
            for token in range(1, 6):
                if counts_BT[batch, token]:
                    total += float(divergence_BT[batch, token - 1])
                    for mine, its in pairs:
                        mine, its = mine[batch, token - 1], its[batch, token - 1]
                        total += 0.5 / 2 * float(((mine - its) ** 2).sum() / (its**2).sum())
    assert float(found) == pytest.approx(total, rel=1e-4)


def test_a_teacher_of_another_vocabulary_is_refused():
    other = build(msgspec.structs.replace(SHAPE, vocabulary=50))
    with pytest.raises(InputError, match="a vocabulary of 50, the student 97"):
        run(build(), TAUGHT, teacher=Teacher(other, "other", range(4)))
    with pytest.raises(InputError, match="a teacher is needed"):
        run(build(), TAUGHT)
    with pytest.raises(InputError, match="a teacher is needed"):
        run(build(), FULL, teacher=Teacher(build(), "other", range(4)))


# -- stopping and going on --------------------------------------------------------------------------------------------


class Killed(Exception):
    """Stands for whatever ends a process."""


def killed_after(steps: int) -> Callable[..., None]:
    seen: list[float] = []

    def progress(*_: object) -> None:
        seen.append(0)
        if len(seen) == steps:
            raise Killed

    return progress


@pytest.mark.parametrize("at", [1, 4, 7, 8, 9, 13, 16])
def test_losses_go_on_as_if_nothing_had_happened(tmp_path: Path, at: int):
    """Full training, then LoRA with dropout; the state is kept after every step and each may be the last."""
    expected = losses(build(), FULL, LORA)
    with pytest.raises(Killed):
        run(build(), FULL, LORA, folder=tmp_path, save_every_s=0, progress=killed_after(at))
    model = build()
    done = run(model, FULL, LORA, folder=tmp_path, save_every_s=0)
    assert [loss for one in done for loss in one.losses] == expected
    whole = build()
    other = run(whole, FULL, LORA)
    assert [one.held_out for one in done] == [one.held_out for one in other]
    assert [one.cost.tokens for one in done] == [one.cost.tokens for one in other]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole.parameters(), strict=True))


def test_ctrl_c_keeps_the_last_whole_step(tmp_path: Path):
    def progress(_: str, done: int, *more: object) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(build(), FULL, folder=tmp_path, progress=progress)
    assert [path.name for path in tmp_path.iterdir()] == ["stage-0-step-00000003"]
    assert [done.losses for done in run(build(), FULL, folder=tmp_path)] == [tuple(losses(build(), FULL))]


@pytest.mark.parametrize(
    ("stage", "model", "on", "said"),
    [
        (msgspec.structs.replace(FULL, rate=2e-2), {}, {}, "began with rate 0.01, not 0.02"),
        (msgspec.structs.replace(FULL, steps=9), {}, {}, "began with steps 8, not 9"),
        (FULL, {"seed": 1}, {}, "began with other weights"),
        (FULL, {}, {"seed": 1}, "began with other data"),
    ],
)
def test_the_state_of_another_run_is_refused(tmp_path: Path, stage: Stage, model: dict, on: dict, said: str):
    with pytest.raises(Killed):
        run(build(), FULL, folder=tmp_path, save_every_s=0, progress=killed_after(3))
    with pytest.raises(InputError) as caught:
        run(build(**model), stage, on=data(**on), folder=tmp_path)
    assert said in str(caught.value)


def test_a_run_may_go_on_with_smaller_micro_batches(tmp_path: Path):
    with pytest.raises(Killed):
        run(build(), FULL, folder=tmp_path, save_every_s=0, progress=killed_after(3))
    smaller = msgspec.structs.replace(FULL, micro_batch=1, checkpointing=True)
    assert losses(build(), smaller, folder=tmp_path) == pytest.approx(losses(build(), FULL), rel=1e-4)


def test_a_state_that_was_cut_off_is_told(tmp_path: Path):
    with pytest.raises(Killed):
        run(build(), FULL, folder=tmp_path, save_every_s=0, progress=killed_after(3))
    (held,) = tmp_path.iterdir()
    weights = held / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        run(build(), FULL, folder=tmp_path)


# -- what goes wrong --------------------------------------------------------------------------------------------------


def broken_from(step: int, until: int, monkeypatch: pytest.MonkeyPatch, value: float = float("nan")) -> None:
    """Let the loss of some steps be `value`."""
    real, calls = objectives.tokens, []

    def tokens(model, ids_BT, counts_BT):
        loss = real(model, ids_BT, counts_BT)
        if not torch.is_grad_enabled():
            return loss
        calls.append(0)
        return loss * value if step < len(calls) <= until else loss

    monkeypatch.setattr(objectives, "tokens", tokens)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_nothing(monkeypatch: pytest.MonkeyPatch, value: float):
    broken_from(2, 3, monkeypatch, value)
    model = build()
    (done,) = run(model, msgspec.structs.replace(FULL, micro_batch=6))
    assert [loss is None for loss in done.losses] == [step == 2 for step in range(8)]
    assert all(torch.isfinite(one).all() for one in model.parameters())
    assert b"null" in msgspec.json.encode(done)


def test_losses_that_stay_nan_end_the_run(monkeypatch: pytest.MonkeyPatch):
    broken_from(1, 99, monkeypatch)
    with pytest.raises(InputError, match=r"not finite in 5 steps in a row, from step 1; .* lower --lr than 0.01"):
        run(build(), msgspec.structs.replace(FULL, micro_batch=6))


def test_a_model_that_computes_something_else_in_training_is_refused():
    model = build()
    forward = model.model.forward

    def different(*args, **kwargs):
        output = forward(*args, **kwargs)
        if model.training:
            output.last_hidden_state = output.last_hidden_state * 1.5
        return output

    model.model.forward = different
    with pytest.raises(InputError, match="before any update the loss in training is"):
        run(model, FULL)


def test_weights_that_are_nan_are_refused_before_the_first_step():
    model = build()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(InputError, match="in evaluation nan; they must agree"):
        run(model, LORA)


def test_ids_and_lengths_beyond_the_model_are_refused():
    with pytest.raises(InputError, match=r"token id .* vocabulary has 97"):
        run(build(), FULL, on=data(vocabulary=10_000))
    model = build()
    model.config.max_position_embeddings = 8
    with pytest.raises(InputError, match="sequences of 12 tokens, the model has positions for 8; give --length 8"):
        run(model, FULL)


def test_data_must_match_the_stages():
    with pytest.raises(InputError, match="1 stages, 2 data sources"):
        loop.retrain(build(), Recipe("test", (FULL,)), [data(), data()])


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        (FULL, r"in 4 sequences of up to 12 tokens at once; lower --micro-batch \(now 4"),
        (msgspec.structs.replace(FULL, micro_batch=1), r"give --checkpointing, or lower --length .*recipe lora"),
        (msgspec.structs.replace(LORA, micro_batch=1, checkpointing=True), r"at once; lower --length \(now 12\)$"),
    ],
)
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("x"), MemoryError(), RuntimeError("can't allocate memory")])
def test_out_of_memory_says_what_to_lower(monkeypatch: pytest.MonkeyPatch, error: Exception, stage: Stage, said: str):
    def tokens(model, ids_BT, counts_BT):
        raise error

    monkeypatch.setattr(objectives, "tokens", tokens)
    with pytest.raises(InputError, match=said):
        run(build(), stage)


def test_other_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch):
    def tokens(model, ids_BT, counts_BT):
        raise RuntimeError("a bug")

    monkeypatch.setattr(objectives, "tokens", tokens)
    with pytest.raises(RuntimeError, match="a bug"):
        run(build(), FULL)


# -- memory -----------------------------------------------------------------------------------------------------------


def kept_bytes(model, stage: Stage, ids_BT: torch.Tensor) -> int:
    """Bytes that the backward pass of one micro-batch really keeps, each storage once, weights left out."""
    own = {one.untyped_storage().data_ptr() for one in model.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model.model(input_ids=ids_BT, use_cache=False).last_hidden_state
    assert output.requires_grad
    return sum(seen.values())


@pytest.mark.parametrize("stage", [FULL, LORA, msgspec.structs.replace(LORA, dropout=0.0)], ids=["all", "lora", "dry"])
@pytest.mark.parametrize("kind", ["depth", "uniform width", "uneven widths", "removed modules"])
def test_what_is_kept_for_the_backward_pass_is_estimated(kind: str, stage: Stage):
    shape = KINDS[kind]
    model = build(shape)
    if stage.trains == "lora":
        adapters.attach(model, stage)
    rows, length = 8, 64
    stage = msgspec.structs.replace(stage, dtype="float32", micro_batch=rows)
    ids_BT = torch.randint(97, (rows, length), generator=torch.Generator().manual_seed(0))
    seen = kept_bytes(model, stage, ids_BT)
    estimated = memory.estimate(shape, stage, length=length, stored="float32").kept
    assert estimated == pytest.approx(seen, rel=0.25)


def test_weights_and_optimizer_are_exact():
    model = build()
    stage = msgspec.structs.replace(FULL, dtype="float32")
    need = memory.estimate(SHAPE, stage, length=12, stored="float16")
    count = sum(one.numel() for one in model.parameters())
    assert (need.weights, need.training) == (4 * count, 12 * count)
    lora = msgspec.structs.replace(LORA, dtype="bfloat16")
    need = memory.estimate(SHAPE, lora, length=12, stored="float16")
    assert need.weights == 2 * count
    assert need.training == 16 * memory.trained_parameters(SHAPE, lora)
    less = memory.estimate(SHAPE, msgspec.structs.replace(stage, checkpointing=True), length=12, stored="float16")
    assert less.kept < memory.estimate(SHAPE, stage, length=12, stored="float16").kept
    taught = memory.estimate(SHAPE, stage, length=12, stored="float16", teacher=SHAPE)
    assert taught.teacher == 4 * count
    assert taught.total - taught.weights - taught.teacher == max(
        8 * count + taught.kept + max(taught.logits, taught.working), 12 * count + taught.block
    )


def test_recipes_run_as_they_stand():
    """Every row, scaled down by its options alone."""
    dense = build()
    for name in recipes.RECIPES:
        student, teacher = taught(dense, 0, 1, 3)
        recipe = recipes.scaled(recipes.lookup(name), steps=2, batch=4, length=12)
        needs = any(stage.learns == "teacher" for stage in recipe.stages)
        done = loop.retrain(student, recipe, [data()], teacher=teacher if needs else None)
        assert [one.recipe for one in done] == [name] * len(recipe.stages)
        assert [len(one.losses) for one in done] == [2] * len(recipe.stages)
