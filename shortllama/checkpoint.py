"""Checkpoint folders: load any into a model, write a pruned one. Safetensors only; no remote modelling code.

`write` rewrites tensors by name, from file to file: no model exists, memory is that of one piece of a tensor. What it
writes loads in stock transformers wherever a stock class has the shape (`configs.stock_config`), and with `load`
always. Torch is imported only by what makes or takes a model.

A folder holds config.json, weights, the source's tokenizer files, plan.json and manifest.json.
Manifest history: shortllama.manifest/1: first. `costs` came later: older files read the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from shortllama import configs, files, layout, sources, tensorfile
from shortllama.costs import start
from shortllama.digests import digest_of, write_digested
from shortllama.errors import InputError, PlanError
from shortllama.families import lookup
from shortllama.plans import Plan, check_base, shape_after, write_plan
from shortllama.scores import Cost
from shortllama.shape import ModelShape
from shortllama.tensorfile import Planned, Stored

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

# Called with the bytes of weights written so far, and those to write.
Progress = Callable[[int, int], None]

MARK = "plan.json"
MANIFEST = "manifest.json"
SHARD_BYTES = 5_000_000_000

# What belongs to a model beside config and weights: copied as it is.
COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "chat_template.*",
    "additional_chat_templates/*",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)

# Buffers that old checkpoints carry and every later transformers computes itself.
_COMPUTED = "rotary_emb.inv_freq"


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a written folder is, and what it took. Digests are SHA-256 of whole files, by name; no paths of a machine.

    `form`: "stock" loads in transformers as `model_type`, "shortllama" with `checkpoint.load` only. `costs`: that of
    `writing` the weights, and where known those of `scoring` for the plan and of `applying` it to a loaded model.
    """

    form: Literal["stock", "shortllama"]
    model_type: str
    dtype: str
    parameters: int
    shape_digest: str
    base: str
    base_shape_digest: str
    plan_digest: str
    weights: dict[str, str]
    companions: dict[str, str]
    version: str
    costs: dict[str, Cost] = {}
    schema: Literal["shortllama.manifest/1"] = "shortllama.manifest/1"


# -- loading ----------------------------------------------------------------------------------------------------------


def load(
    model: str | Path,
    *,
    dtype: str | None = None,
    device: str = "cpu",
    attention: str = "sdpa",
    trust_remote_code: bool = False,
    quantised: str = "",
) -> tuple[PreTrainedModel, Any]:
    """Return (model in eval mode, tokenizer or None) of a folder, hub id, `reference` or catalogue name.

    `dtype` None means that of the files (float32 for a catalogue name, whose weights are random with seed 0).
    `trust_remote_code` concerns the tokenizer only: modelling code is always transformers' own. Weights are read into
    memory that the process allocates, tensor by tensor, so that memory budgets see them; and quantised as they are read
    where `quantised` is int8 or int4 (see `quantisation`).
    Raises InputError for weights that are missing, cut off, pickled or not of the config's shape.
    """
    from shortllama import quantisation, surgery

    source = sources.from_folder(str(model), model) if isinstance(model, Path) else sources.locate(model)
    shape = msgspec.structs.replace(source.shape, quantised=quantised)
    if source.folder is None:
        return surgery.build(shape, dtype=dtype or "float32", device=device, attention=attention), None
    surgery.check_device(device)
    folder = sources.fetch(source)
    assert source.config is not None
    stored = stored_tensors(folder, source.shape)
    dtype = dtype or stored_dtype(stored)
    hold = quantisation.holder(shape, dtype, device)
    config = configs.base_config(source.config)
    made = surgery.skeleton(source.shape, config, dtype=dtype, attention=attention)
    wanted = surgery.torch_dtype(dtype)
    tensors = {name: hold(name, read_tensor(one).to(device, wanted)) for name, one in stored.items()}
    surgery.put(made, tensors, device)
    _take_generation_config(made, folder)
    return made, _tokenizer(folder, made, trust_remote_code)


def stored_tensors(folder: Path, shape: ModelShape) -> dict[str, Stored]:
    """Return the tensors that a model of `shape` needs, as they lie in `folder`.

    Raises InputError naming the first tensor that is missing, not part of such a model, or of other dimensions.
    """
    family = lookup(shape.family)
    found = {family.renamed.get(name, name): one for name, one in tensorfile.in_folder(folder).items()}
    wanted = layout.tensors(shape)
    missing = [name for name in wanted if name not in found]
    if missing:
        raise InputError(
            f"{folder}: no tensor {missing[0]!r} in its weights ({len(missing)} of {len(wanted)} missing); expected a "
            f"whole {shape.family} causal language model as config.json describes it"
        )
    for name, one in found.items():
        ignored = name.endswith((_COMPUTED, *family.ignored)) or (shape.tied and name == f"{family.head}.weight")
        if name not in wanted and not ignored:
            raise InputError(
                f"{folder}: tensor {name!r} is not part of a {shape.family} model of the shape in config.json; "
                "adapters must be merged and quantized weights restored first"
            )
        if name in wanted and (one.dimensions != wanted[name] or one.code not in tensorfile.DTYPES):
            raise InputError(
                f"{folder}: tensor {name!r} is {one.code} {list(one.dimensions)}, config.json says "
                f"{list(wanted[name])}, of {', '.join(tensorfile.DTYPES)}; do config and weights belong together?"
            )
    return {name: found[name] for name in wanted}


def stored_dtype(stored: dict[str, Stored]) -> str:
    """Return the dtype that most of the tensors' bytes have."""
    sizes: dict[str, int] = {}
    for one in stored.values():
        sizes[one.code] = sizes.get(one.code, 0) + one.end - one.start
    return tensorfile.DTYPES[max(sizes, key=lambda code: sizes[code])]


def read_tensor(one: Stored) -> Tensor:
    """Return a tensor as it lies in its file, in memory of its own."""
    import torch

    tensor = torch.empty(one.dimensions, dtype=getattr(torch, tensorfile.DTYPES[one.code]))
    tensorfile.read(one, tensor.view(torch.uint8).numpy().data.cast("B"))
    return tensor


def _take_generation_config(model: PreTrainedModel, folder: Path) -> None:
    from transformers import GenerationConfig

    if (folder / "generation_config.json").is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise InputError(f"{folder}/generation_config.json: cannot be used ({error})") from error


def _tokenizer(folder: Path, model: PreTrainedModel, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        return None
    try:
        # The config is given because our own form's model type means nothing to transformers.
        return AutoTokenizer.from_pretrained(folder, config=model.config, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(f"{folder}: its tokenizer cannot be loaded ({error})") from error


# -- writing ----------------------------------------------------------------------------------------------------------


def write(
    source: str | Path,
    plan: Plan,
    out: Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    costs: Mapping[str, Cost] | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Write what `plan` keeps of a source's weights to the folder `out`; returns its manifest.

    From file to file, a few MiB at a time, in the source's dtype; `progress(done, total)` counts bytes of weights.
    `costs`: what went before, for the manifest. `out` appears complete or not at all.
    Raises PlanError for a blind plan, one of another base, or one with compensation (which needs a model: `apply`
    and `save`); InputError for unusable weights or an `out` that is not ours.
    """
    found = sources.from_folder(str(source), source) if isinstance(source, Path) else sources.locate(source)
    check_base(plan, found.shape)
    refuse_unwritable(plan)
    folder = sources.fetch(found)
    assert found.config is not None
    refuse_own_folder(out, folder)
    stored = stored_tensors(folder, found.shape)
    after = shape_after(found.shape, plan.keep)
    dimensions, taken = layout.tensors(after), layout.slices(found.shape, plan.keep)
    planned: list[Planned] = []
    for name, size in dimensions.items():
        one, part = stored[taken[name].source], taken[name]
        planned.append(Planned(name, one.code, size, partial(tensorfile.cut, one, part.rows, part.columns)))
    config = configs.pruned_config(configs.base_config(found.config), plan.keep)
    return _write_folder(out, plan, after, config, planned, folder, shard_bytes, costs=costs, progress=progress)


def save(
    model: PreTrainedModel,
    plan: Plan,
    out: Path,
    *,
    companions: Path | None = None,
    documents: Mapping[str, bytes] | None = None,
    shard_bytes: int = SHARD_BYTES,
    costs: Mapping[str, Cost] | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Write a model in memory, as `surgery.apply` or retraining left it, to the folder `out`; returns its manifest.

    `plan` is how it was made from its base and travels along; tokenizer files are copied from the folder `companions`.
    `documents` are written beside them, by file name, and digested like them. `costs` and `progress` are those of
    `write`.
    """
    from shortllama import surgery

    shape = surgery.shape_of(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    dimensions = layout.tensors(shape)
    code = tensorfile.NAMES[surgery.dtype_name(model)]
    planned = [Planned(name, code, size, partial(raw_pieces, parameters[name])) for name, size in dimensions.items()]
    config = surgery.config_dict(model)
    return _write_folder(
        out,
        plan,
        shape,
        config,
        planned,
        companions,
        shard_bytes,
        documents=documents,
        costs=costs,
        progress=progress,
    )


def refuse_own_folder(out: Path, source: Path) -> None:
    """Raise InputError where the folder to write is the one that is read."""
    if out.exists() and out.resolve() == source.resolve():
        raise InputError(f"{out}: is the source itself; give another --out")


def refuse_unwritable(plan: Plan) -> None:
    """Raise PlanError for a plan that `write` cannot follow: a blind one, or one with compensation."""
    if plan.blind:
        raise PlanError(
            f"plan of method {plan.method!r} is blind (it reproduces a shape, its indices mean nothing); real weights "
            "need a plan made from scores"
        )
    if plan.compensation:
        raise PlanError(
            f"plan needs {plan.compensation!r} compensation, which is computed from a loaded model; use surgery.apply "
            "and checkpoint.save"
        )


def _write_folder(
    out: Path,
    plan: Plan,
    shape: ModelShape,
    config: configs.Config,
    planned: list[Planned],
    companions: Path | None,
    shard_bytes: int,
    *,
    documents: Mapping[str, bytes] | None = None,
    costs: Mapping[str, Cost] | None = None,
    progress: Progress | None = None,
) -> Manifest:
    writing = start()
    dtype = tensorfile.DTYPES[max(planned, key=lambda one: one.size).code]
    if lookup(shape.family).cache is None:
        config, documents = {**config, "use_cache": False}, {**_uncached(companions), **(documents or {})}
    stock = configs.stock_config(config, shape)
    final = configs.finished(stock or configs.own_config(config, shape), dtype)
    with files.new_folder(out, MARK) as folder:
        weights = tensorfile.write_folder(folder, planned, shard_bytes, progress)
        copied = copy_companions(companions, folder) if companions else {}
        for name, data in (documents or {}).items():
            files.write_atomically(folder / name, data)
            copied[name] = digest_of(folder / name)
        manifest = Manifest(
            form="stock" if stock else "shortllama",
            model_type=final["model_type"],
            dtype=dtype,
            parameters=shape.parameters,
            shape_digest=shape.digest(),
            base=plan.base.model,
            base_shape_digest=plan.base.shape_digest,
            plan_digest=plan.digest(),
            weights=weights,
            companions=copied,
            version=package_version(),
            costs={**(costs or {}), "writing": writing()},
        )
        files.write_atomically(folder / "config.json", files.encode_json(final))
        files.write_atomically(folder / MANIFEST, files.encode_json(manifest))
        write_plan(folder / MARK, plan)
    return manifest


def _uncached(companions: Path | None) -> dict[str, bytes]:
    """Return the generation config of a model that must generate without a cache: its own settings would use one."""
    file = companions / "generation_config.json" if companions else None
    found = files.decode_json(files.read_bytes(file), dict[str, Any], str(file)) if file and file.is_file() else {}
    return {"generation_config.json": files.encode_json({**found, "use_cache": False})}


def read_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of a folder, None where it has none. Raises InputError naming the offending key."""
    path = folder / MANIFEST
    return files.decode_json(files.read_bytes(path), Manifest, str(path)) if path.is_file() else None


def raw_pieces(tensor: Tensor) -> Iterator[memoryview]:
    """Yield the bytes of a tensor of at least one dimension, some rows at a time, wherever it lies."""
    import torch

    rows = tensor.detach()
    step = max(1, tensorfile.CHUNK_BYTES // max(1, rows[0].numel() * rows.element_size()))
    for part in rows.split(step):
        yield part.cpu().contiguous().view(torch.uint8).numpy().data.cast("B")


def copy_companions(source: Path, folder: Path) -> dict[str, str]:
    """Copy what belongs to a model beside config and weights; returns the SHA-256 of each file by name."""
    digests: dict[str, str] = {}
    for path in _companions(source):
        name = path.relative_to(source).as_posix()
        target = folder / name
        try:
            target.parent.mkdir(exist_ok=True)
        except OSError as error:
            raise InputError(f"{target.parent}: cannot be made ({error.strerror})") from error
        digests[name] = write_digested(target, [files.read_bytes(path)])
    return digests


def _companions(source: Path) -> Iterable[Path]:
    return sorted({path for pattern in COMPANIONS for path in source.glob(pattern) if path.is_file()})


def package_version() -> str:
    """Return this package's version."""
    from importlib.metadata import version

    return version("shortllama")
