"""Whether a written checkpoint is what it should be: read back and compared, before anyone is told it is fine.

Two independent oracles: stock transformers in a fresh process (the folder really loads elsewhere), and the dense model
with the pruned parts zeroed (the right parts were kept). Both must agree with our own loader in logits and in greedy
tokens. Nothing here is shared with surgery: masking works by zeroing outputs, never by slicing.
"""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from shortllama import checkpoint, configs, engines, files, sources, stock_reload
from shortllama.compensation import OUTPUTS
from shortllama.digests import digest_of
from shortllama.errors import InputError, VerificationError
from shortllama.exporting import MARK as EXPORT_MARK
from shortllama.exporting import Export
from shortllama.families import Adapter, adapter
from shortllama.plans import BlockKeep, Plan, check_base, kept_neurons, kept_queries, read_plan, shape_of
from shortllama.retraining.record import FILE as RETRAINING
from shortllama.shape import BlockShape, ModelShape

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

PROMPT_TOKENS = 16
NEW_TOKENS = 16

# Largest difference of two logits, as a share of the largest logit. float32 sums in another order differ by some 1e-6
# after 32 blocks; a wrong head or neuron shows in the first digits.
TOLERANCE = 1e-4

# The same with a cache and without, which run other kernels, and where weights and activations have 16 bits. A cache
# that is read wrongly shows in the first digit.
CACHE_TOLERANCE = 1e-3
COARSE_TOLERANCE = 5e-2

# A run that is short, but reads what a step wrote to the cache.
FEW_PROMPT_TOKENS, FEW_NEW_TOKENS = 6, 3

_UNCACHED = "what it generates with a cache is wrong: set use_cache to false in config.json"


class Check(msgspec.Struct, frozen=True):
    """One comparison: its name, whether it passed, and what was seen."""

    name: str
    passed: bool
    seen: str


class Report(msgspec.Struct, frozen=True):
    """What was verified of a folder. `loaded_as`: the stock class that loads it, None for our own form.

    `engines`: which engines can take it, by its shape; told, not tried.
    """

    folder: str
    form: str
    loaded_as: str | None
    parameters: int
    checks: tuple[Check, ...]
    engines: tuple[engines.Fit, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    @property
    def failures(self) -> str:
        """The failed checks in one line; empty if there are none."""
        return "; ".join(f"{check.name}: {check.seen}" for check in self.checks if not check.passed)


def verify(folder: str | Path, against: str | Path | None = None, *, device: str = "cpu") -> Report:
    """Return what reading `folder` back showed; the caller raises VerificationError where it is not `ok`.

    Computes in float32 on seeded random tokens. `against`: the base model that the folder's plan was made for; its
    masked self is then compared too. One model is in memory at a time. Raises InputError for a folder that cannot be
    read at all, PlanError where `against` is not the plan's base.
    """
    folder = Path(folder)
    source = sources.from_folder(str(folder), folder)
    assert source.config is not None
    plan = _plan_for(folder, against)
    checks = [*_recorded(folder, source.shape)]
    prompt = random.Random(0).choices(range(source.shape.vocabulary), k=PROMPT_TOKENS)
    own = _own_outputs(folder, prompt, device)
    decoded = own
    stock = source.config.get("model_type") != configs.OWN_MODEL_TYPE
    loaded_as = None
    if stock:
        seen = _stock_outputs(folder, prompt, own["attention"])
        loaded_as = seen.get("class")
        decoded = seen if loaded_as else own
        checks.append(_compare("stock transformers in a fresh process", own, seen))
    checks.append(_cache_check(decoded["cache"]))
    if against is not None and plan is not None:
        base = sources.from_folder(str(against), against) if isinstance(against, Path) else sources.locate(against)
        check_base(plan, base.shape)
        after = shape_of(plan, base.shape)
        same = (after.blocks, after.parameters) == (source.shape.blocks, source.shape.parameters)
        seen = "as planned" if same else "blocks or biases differ from the plan's"
        checks.append(Check("shape of the plan", same, seen))
        if same:
            biases = _biases(folder, device) if plan.compensation else {}
            masked = _masked_outputs(sources.fetch(base), plan, biases, prompt, device)
            checks.append(_compare(f"masked dense model{' with its biases' if biases else ''}", own, masked))
    form = "stock" if stock else configs.OWN_MODEL_TYPE
    fits = engines.fits(source.shape, source.config)
    return Report(str(folder), form, loaded_as, source.shape.parameters, tuple(checks), fits)


def _plan_for(folder: Path, against: str | Path | None) -> Plan | None:
    if against is None:
        return None
    if not (folder / checkpoint.MARK).is_file():
        raise InputError(f"{folder}: no {checkpoint.MARK}, so there is nothing to compare with {against}")
    if (folder / RETRAINING).is_file():
        raise InputError(
            f"{folder}: was retrained ({RETRAINING}), so its outputs are no longer those of {against}; verify it alone"
        )
    return read_plan(folder)


def verify_padded(folder: Path, source: str | Path) -> Report:
    """Return what `verify` shows of a padded export, and whether it computes what the folder it was made from does."""
    report = verify(folder)
    origin = sources.from_folder(str(source), source) if isinstance(source, Path) else sources.locate(source)
    prompt = random.Random(0).choices(range(origin.shape.vocabulary), k=PROMPT_TOKENS)
    own, other = _own_outputs(folder, prompt, "cpu"), _own_outputs(sources.fetch(origin), prompt, "cpu")
    same = _compare("the folder it was made from", own, other)
    return msgspec.structs.replace(report, checks=(*report.checks, same))


def _recorded(folder: Path, shape: ModelShape) -> list[Check]:
    """Compare the folder with its manifest, or the record of an export, where it has one."""
    records = {checkpoint.MANIFEST: checkpoint.Manifest, EXPORT_MARK: Export}
    file = next((folder / name for name in records if (folder / name).is_file()), None)
    if file is None:
        return []
    record = files.decode_json(files.read_bytes(file), records[file.name], str(file))
    recorded = {**record.weights, **record.companions}
    changed = [name for name, digest in recorded.items() if digest_of(folder / name) != digest]
    seen = f"changed since written: {', '.join(changed)}" if changed else f"{len(recorded)} files as written"
    same = record.shape_digest == shape.digest()
    return [
        Check("files", not changed, seen),
        Check("shape", same, "as recorded" if same else "config.json says another shape than its record"),
    ]


def _own_outputs(folder: Path, prompt: list[int], device: str) -> dict[str, Any]:
    model, _ = checkpoint.load(folder, dtype="float32", device=device)
    return stock_reload.outputs(model, prompt, NEW_TOKENS)


def _stock_outputs(folder: Path, prompt: list[int], attention: str | None) -> dict[str, Any]:
    where = str(folder.resolve())
    asked = json.dumps({"folder": where, "prompt": prompt, "steps": NEW_TOKENS, "attention": attention})
    done = subprocess.run(
        # -P keeps this package's folder off sys.path, where its module names would shadow others'.
        [sys.executable, "-P", stock_reload.__file__],
        input=asked + "\n",
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"},
        check=False,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {"error": lines[-1]}
    return json.loads(done.stdout)


def _biases(folder: Path, device: str) -> dict[str, nn.Parameter]:
    """Return the biases of a checkpoint's output projections, by name."""
    model, _ = checkpoint.load(folder, dtype="float32", device=device)
    ends = tuple(f".{path}.bias" for short, path in adapter(model).family.projections.items() if short in OUTPUTS)
    return {name: parameter for name, parameter in model.named_parameters() if name.endswith(ends)}


def _masked_outputs(
    folder: Path, plan: Plan, biases: dict[str, nn.Parameter], prompt: list[int], device: str
) -> dict[str, Any]:
    model, _ = checkpoint.load(folder, dtype="float32", device=device)
    mask(model, plan)
    if biases:
        _put_biases(adapter(model), plan, biases)
    return stock_reload.outputs(model, prompt, NEW_TOKENS)


def _compare(name: str, own: dict[str, Any], other: dict[str, Any]) -> Check:
    if "error" in other:
        return Check(name, False, f"does not load: {other['error']}")
    difference = relative_difference(own["logits"], other["logits"])
    tokens = own["tokens"] == other["tokens"]
    agreement = "equal" if tokens else "differ"
    seen = f"largest logit difference {difference:.1e} of the largest logit, greedy tokens {agreement}"
    return Check(name, tokens and difference <= TOLERANCE, seen)


def _cache_check(seen: dict[str, Any] | None, limit: float = CACHE_TOLERANCE) -> Check:
    """Compare decoding with a cache, where the config asks for one, with decoding without."""
    name = "decoding with a cache"
    if seen is None:
        return Check(name, True, "not used: use_cache is false in the config")
    if seen["error"] is not None:
        return Check(name, False, f"fails ({seen['error']}); {_UNCACHED}")
    difference = seen["difference"]
    text = f"largest logit difference {difference:.1e} of the largest logit from decoding without"
    return Check(name, difference <= limit, text if difference <= limit else f"{text}; {_UNCACHED}")


def check_cache(model: PreTrainedModel) -> None:
    """Raise VerificationError where a model decodes otherwise with its cache than without, whatever its config asks.

    Two sequences of a few tokens: as much work as some five steps of decoding.
    """
    prompt = random.Random(0).choices(range(model.config.vocab_size), k=FEW_PROMPT_TOKENS)
    seen = stock_reload.cached_decoding(model, prompt, FEW_NEW_TOKENS)
    check = _cache_check(seen, CACHE_TOLERANCE if model.dtype.itemsize > 2 else COARSE_TOLERANCE)
    if not check.passed:
        raise VerificationError(f"{type(model).__name__}: {check.name}: {check.seen}")


def relative_difference(left: list[list[float]], right: list[list[float]]) -> float:
    """Return the largest difference of two tables as a share of the largest value; infinite for other sizes or NaN."""
    import numpy as np

    a, b = np.asarray(left, np.float64), np.asarray(right, np.float64)
    if a.shape != b.shape or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return math.inf
    return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30))


# -- the masked dense model -------------------------------------------------------------------------------------------


def _put_biases(parts: Adapter, plan: Plan, biases: dict[str, nn.Parameter]) -> None:
    """Give a dense model's blocks, in place, the biases that those of the pruned one have."""
    for number, keep in enumerate(plan.keep):
        for short, linear in parts.projections(parts.blocks[keep.index]).items():
            bias = biases.get(f"{parts.family.blocks}.{number}.{parts.family.projections[short]}.bias")
            linear.bias = linear.bias if bias is None else bias


def mask(model: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    """Zero, in place, everything of a dense model that `plan` removes; returns `model`, which then is the oracle.

    A removed unit's outgoing weights are zeroed (columns of o and down; of a whole module also its outgoing bias), so
    that what it computes adds nothing to the residual stream. Sizes and KV cache stay the dense model's.
    """
    import torch

    from shortllama import surgery

    shape = surgery.shape_of(model)
    check_base(plan, shape)
    parts = adapter(model)
    kept = {one.index: one for one in plan.keep}
    with torch.no_grad():
        for index, block in enumerate(parts.blocks):
            keep = kept.get(index, BlockKeep(index, "", ""))
            if shape.mixer:
                if index not in kept:
                    _silence(parts, block)
            else:
                _mask_block(parts, block, shape.blocks[index], keep)
    return model


def _silence(parts: Adapter, block: nn.Module) -> None:
    """Zero everything through which a block adds to the residual stream."""
    for path in parts.family.outgoing:
        for parameter in block.get_submodule(path).parameters():
            parameter.zero_()


def _mask_block(parts: Adapter, block: nn.Module, size: BlockShape, keep: BlockKeep) -> None:
    projections = parts.projections(block)
    queries, neurons = set(kept_queries(keep, size)), set(kept_neurons(keep, size))
    if "o" in projections:
        width = projections["o"].in_features // size.query_heads
        for head in range(size.query_heads):
            if head not in queries:
                projections["o"].weight[:, head * width : (head + 1) * width] = 0
    if "down" in projections:
        gone = [neuron for neuron in range(size.neurons) if neuron not in neurons]
        projections["down"].weight[:, gone] = 0
    for name, left in (("o", queries), ("down", neurons)):
        if name in projections and not left and projections[name].bias is not None:
            projections[name].bias.zero_()
