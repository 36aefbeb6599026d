"""Train the reference model: `python -m shortllama.reference.train --data FOLDER --out FOLDER`.

A small Llama whose blocks are worth ranking, so that criteria, reports and tests have something real to work on
without any download. The run is deterministic for one machine, thread count and seed, shows its progress, and
resumes from its last saved step. Needs torch and transformers; nothing else in the package imports it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from shortllama.errors import InputError
from shortllama.reference import corpus
from shortllama.reference import tokenizer as tokenizers_

HELD_OUT = 0.04
WINDOW = 256
ROWS = 16
WARM_UP = 50
SAVE_EVERY = 100


def configuration(vocabulary_size: int) -> LlamaConfig:
    """Return the reference architecture: 12 blocks, 8 KV groups of 2 query heads of 16, tied embeddings."""
    return LlamaConfig(
        vocab_size=vocabulary_size,
        hidden_size=128,
        num_hidden_layers=12,
        intermediate_size=384,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=16,
        max_position_embeddings=WINDOW,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def split(texts: list[str]) -> tuple[list[str], list[str]]:
    """Return (training, held-out) texts: the last documents, or the tail of a single book, about 4 % of characters."""
    budget = HELD_OUT * sum(map(len, texts))
    held: list[str] = []
    rest = list(texts)
    while rest and budget > 0:
        last = rest.pop()
        if len(last) > 2 * budget:
            cut = last.rfind("\n", 0, len(last) - int(budget))
            cut = cut if cut > 0 else len(last) - int(budget)
            rest.append(last[:cut])
            last = last[cut:].strip()
        held.insert(0, last)
        budget -= len(last)
    return rest, held


def batches(streams: list[np.ndarray], weights: np.ndarray, seed: int, first_step: int) -> Iterator[torch.Tensor]:
    """Yield (ROWS, WINDOW) int64 token batches; step k is the same whichever step the iteration starts from."""
    step = first_step
    while True:
        random = np.random.default_rng((seed, step))
        rows = []
        for choice in random.choice(len(streams), size=ROWS, p=weights):
            start = random.integers(0, len(streams[choice]) - WINDOW)
            rows.append(streams[choice][start : start + WINDOW])
        yield torch.from_numpy(np.stack(rows).astype(np.int64))
        step += 1


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, stream: np.ndarray) -> float:
    """Return the mean cross-entropy (nats per token) over consecutive windows of `stream`, tail dropped."""
    model.eval()
    windows = torch.from_numpy(stream[: len(stream) // WINDOW * WINDOW].astype(np.int64)).view(-1, WINDOW)
    losses = [
        model(input_ids=part, labels=part, use_cache=False).loss.item() * len(part) for part in windows.split(ROWS)
    ]
    model.train()
    return sum(losses) / len(windows)


def optimizers(model: LlamaForCausalLM, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for embeddings and norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def save_state(
    path: Path, step: int, seconds: float, model: LlamaForCausalLM, optims: list[torch.optim.Optimizer]
) -> None:
    """Write everything needed to go on, atomically, as safetensors (no pickle)."""
    tensors = {f"model.{n}": p.detach() for n, p in model.named_parameters()}
    for number, optimizer in enumerate(optims):
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{index}.{key}": value for key, value in state.items()}
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary, metadata={"step": str(step), "seconds": repr(seconds)})
    os.replace(temporary, path)


def load_state(path: Path, model: LlamaForCausalLM, optims: list[torch.optim.Optimizer]) -> tuple[int, float]:
    """Restore what `save_state` wrote; return (next step, seconds spent so far)."""
    from safetensors import safe_open

    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
    for number, optimizer in enumerate(optims):
        whole = optimizer.state_dict()
        prefix = f"optimizer.{number}."
        for key, value in tensors.items():
            if key.startswith(prefix):
                index, field = key[len(prefix) :].split(".", 1)
                whole["state"].setdefault(int(index), {})[field] = value
        optimizer.load_state_dict(whole)
    return int(metadata["step"]), float(metadata["seconds"])


def rate_at(step: int, steps: int) -> float:
    """Return the learning-rate factor: linear warm-up, flat, linear decay over the last 40 %."""
    return min(1.0, (step + 1) / WARM_UP, (steps - step) / (0.4 * steps))


def train(
    data: Path,
    out: Path,
    *,
    tokens: int,
    vocabulary_size: int,
    mix: dict[str, float],
    rate: float,
    seed: int,
    threads: int,
) -> None:
    """Train, evaluate on the held-out text and write the model, its tokenizer and `training.json` into `out`."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    texts = corpus.sources(data)
    if mix and set(mix) != set(texts):
        raise InputError(f"--mix names {sorted(mix)}, but {data} holds {sorted(texts)}; name each source once")
    parts = {name: split(documents) for name, documents in texts.items()}
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizers_.train((t for kept, _ in parts.values() for t in kept), vocabulary_size)
    tokenizer.save(str(out / "tokenizer.json"))
    streams = {name: corpus.stream(kept, tokenizer) for name, (kept, _) in parts.items()}
    held = {name: corpus.stream(rest, tokenizer) for name, (_, rest) in parts.items()}
    weights = np.array([mix.get(name, len(stream)) for name, stream in streams.items()], dtype=float)
    weights /= weights.sum()

    model = LlamaForCausalLM(configuration(vocabulary_size))
    optims = optimizers(model, rate)
    steps = math.ceil(tokens / (ROWS * WINDOW))
    state = out / "state.safetensors"
    step, spent = load_state(state, model, optims) if state.exists() else (0, 0.0)
    started = time.monotonic() - spent
    source = batches(list(streams.values()), weights, seed, step)
    columns = (
        TextColumn("step {task.completed}/{task.total} loss {task.fields[loss]:.3f}"),
        BarColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        bar = progress.add_task("train", total=steps, completed=step, loss=float("nan"))
        while step < steps:
            batch = next(source)
            for optimizer in optims:
                for group in optimizer.param_groups:
                    group["lr"] = rate * rate_at(step, steps)
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optims:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            step += 1
            progress.update(bar, completed=step, loss=loss.item())
            if step % SAVE_EVERY == 0:
                save_state(state, step, time.monotonic() - started, model, optims)
                print(
                    json.dumps(
                        {"step": step, "loss": round(loss.item(), 4), "seconds": round(time.monotonic() - started)}
                    ),
                    flush=True,
                )

    model = model.half()
    losses = {name: held_out_loss(model.float(), stream) for name, stream in held.items()}
    model = model.half()
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model.save_pretrained(out)
    (out / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "backend": "tokenizers",
                "bos_token": "<s>",
                "clean_up_tokenization_spaces": False,
                "eos_token": "</s>",
                "model_max_length": WINDOW,
                "pad_token": "<unk>",
                "tokenizer_class": "TokenizersBackend",
                "unk_token": "<unk>",
            },
            indent=2,
        )
        + "\n",
        encoding="utf-8",
    )
    mixture = float(sum(w * losses[name] for w, name in zip(weights, streams, strict=True)))
    record = {
        "tokens": steps * ROWS * WINDOW,
        "steps": steps,
        "window": WINDOW,
        "rows": ROWS,
        "seed": seed,
        "threads": threads,
        "learning_rate": rate,
        "seconds": round(time.monotonic() - started),
        "torch": torch.__version__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "sources": {
            name: {
                "weight": round(float(w), 4),
                "training_tokens": len(streams[name]),
                "held_out_tokens": len(held[name]),
                "held_out_loss": round(losses[name], 4),
            }
            for w, name in zip(weights, streams, strict=True)
        },
        "held_out_loss": round(mixture, 4),
        "half_ln_vocabulary": round(math.log(vocabulary_size) / 2, 4),
    }
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    state.unlink(missing_ok=True)
    print(json.dumps(record, indent=2))


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description="Train the reference model on a folder of text.")
    parser.add_argument("--data", type=Path, required=True, help="folder of text; each entry is one source")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=float, default=8e6)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--mix", default="", help="source=weight,... (default: by size)")
    parser.add_argument("--rate", type=float, default=5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    mix = {name: float(value) for name, value in (part.split("=") for part in given.mix.split(",") if part)}
    train(
        given.data,
        given.out,
        tokens=int(given.tokens),
        vocabulary_size=given.vocabulary,
        mix=mix,
        rate=given.rate,
        seed=given.seed,
        threads=given.threads,
    )


if __name__ == "__main__":
    main()
