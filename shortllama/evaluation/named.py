"""Evaluating a model by name: what `eval` asks for, checked before anything is loaded, then measured in turn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from shortllama import calibration, pruning, quantisation
from shortllama.errors import InputError
from shortllama.evaluation import cloze, generation, protocol, tasks
from shortllama.evaluation.results import Evaluation, Perplexity, Quality, ZeroShot
from shortllama.sources import Source

Progress = Callable[[str, int, int], None]


class Wanted(msgspec.Struct, frozen=True):
    """What to evaluate. `texts` are sources with their protocols, `tasks` names, `prompts` texts or named sets.

    `against` is a model whose predictions are compared with, and which gets every figure but the tasks. `limit` is the
    most windows of each text and items of each task; `tokens` are generated after each prompt.
    """

    texts: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    task_data: Path | None = None
    prompts: tuple[str, ...] = ()
    tokens: int = 64
    against: Source | None = None
    limit: int | None = None
    seed: int = 0
    data_dir: Path | None = None
    device: str | None = None
    trust_remote_code: bool = False


def evaluate(
    source: Source, wanted: Wanted, progress: Progress | None = None, note: Callable[[str], None] | None = None
) -> Evaluation:
    """Return all that is wanted of a named model, and of the one it is compared with; tell `note` what to beware of.

    Text `self` is sampled from the dense model: the one compared with, else, for a pruned folder, the base that its
    plan names, and for a quantised model the one that it was made from. Raises InputError for whatever cannot be done,
    most of it before a model is loaded.
    """
    report = progress or (lambda what, done, total: None)
    _require_something(wanted)
    prompts = generation.expand(wanted.prompts)
    sources = [protocol.parse(src)[0] for src in wanted.texts]
    local = _local(wanted)
    made = set(wanted.tasks) & set(cloze.MAKERS)
    names = _names(source, wanted.against)
    if any(one.shape.quantised for one in (source, wanted.against) if one is not None):
        quantisation.require()
    for remark in _remarks(source, wanted):
        if note is not None:
            note(remark)
    model, tokenizer = _load(source, wanted)
    if local:
        from shortllama.evaluation import zeroshot

        zeroshot.check(model, tokenizer, local, wanted.limit)
    other = None if wanted.against is None else _load(wanted.against, wanted)[0]
    dense = other or model
    base = _base(source) if other is None and (made or calibration.SELF in sources) else None
    if base is not None:
        dense = _load(base, wanted)[0]
    if made:
        by = (base or wanted.against or source).name
        local = local | _made(wanted, dense, tokenizer, by, report)
    ours, theirs = _perplexities(model, tokenizer, dense, (names[-1], other), wanted, report)
    found = {names[0]: Quality(ours, generations=_write(model, tokenizer, prompts, wanted, names[0], report))}
    if wanted.tasks:
        zero_shot = _accuracies(model, tokenizer, local, wanted, report)
        found[names[0]] = msgspec.structs.replace(found[names[0]], zero_shot=zero_shot)
    if other is not None and names[0] != names[1]:
        found[names[1]] = Quality(theirs, generations=_write(other, tokenizer, prompts, wanted, names[1], report))
    return Evaluation(found)


def _base(source: Source) -> Source | None:
    """Return the model that a pruned or quantised one was made from, which writes its text `self`; None for others."""
    found = pruning.dense_base(source)
    if found is None and source.shape.quantised:
        return msgspec.structs.replace(source, shape=msgspec.structs.replace(source.shape, quantised=""))
    return found


def _require_something(wanted: Wanted) -> None:
    if not (wanted.texts or wanted.tasks or wanted.prompts):
        raise InputError(
            "nothing to evaluate; give --ppl SRC (for example --ppl self), --tasks NAMES or --generate PROMPT"
        )
    if wanted.task_data is not None and not set(wanted.tasks) - set(cloze.MAKERS):
        raise InputError(f"--task-data {wanted.task_data}: no task to read it for; give --tasks NAMES that have files")
    if wanted.against is not None and not (wanted.texts or wanted.prompts):
        raise InputError("--against compares predictions and text; give --ppl SRC or --generate PROMPT as well")
    if wanted.limit is not None and wanted.limit < 1:
        raise InputError(f"--limit {wanted.limit}; give at least 1")


def _local(wanted: Wanted) -> dict[str, tasks.Items]:
    """Read the local items, and look for the harness, before a model is loaded."""
    if wanted.tasks:
        from shortllama.evaluation import zeroshot

        zeroshot.require_harness()
    return {} if wanted.task_data is None else tasks.read_all(wanted.tasks, wanted.task_data)


def _made(wanted: Wanted, dense: Any, tokenizer: Any, by: str, report: Progress) -> dict[str, tasks.Items]:
    """Return the items of the tasks that are made of the dense model's text."""
    return cloze.make(
        wanted.tasks,
        dense,
        tokenizer,
        by=by,
        limit=wanted.limit,
        seed=wanted.seed,
        progress=lambda done, total: report("text for tasks", done, total),
    )


def _remarks(source: Source, wanted: Wanted) -> list[str]:
    positions = (source.config or {}).get("max_position_embeddings")
    windows = {src: protocol.parse(src)[1].window for src in wanted.texts}
    held = [quantisation.remark(one.shape, one.name) for one in (source, wanted.against) if one is not None]
    return [
        f"{src}: a window of {window} tokens, where {source.name} was made for {positions}: beyond those it may fail"
        for src, window in windows.items()
        if isinstance(positions, int) and window > positions
    ] + [one for one in held if one is not None]


def _names(source: Source, against: Source | None) -> list[str]:
    """Return what the results call the models: as given, where their usual names would be one for two models."""
    if against is None:
        return [pruning.base_name(source)]
    short = [pruning.base_name(source), pruning.base_name(against)]
    same = source.name == against.name or short[0] != short[1]
    return short if same else [source.name, against.name]


def _load(source: Source, wanted: Wanted) -> tuple[Any, Any]:
    return pruning.load(source, device=wanted.device, trust_remote_code=wanted.trust_remote_code)


def _perplexities(
    model: Any, tokenizer: Any, dense: Any, other: tuple[str, Any], wanted: Wanted, report: Progress
) -> tuple[dict[str, Perplexity], dict[str, Perplexity]]:
    """Return the perplexities of the model and of the one beside it; none of the latter where there is none."""
    from shortllama.evaluation import perplexity

    ours: dict[str, Perplexity] = {}
    theirs: dict[str, Perplexity] = {}
    for src in wanted.texts:
        text = perplexity.prepare(
            src, tokenizer=tokenizer, dense=dense, limit=wanted.limit, seed=wanted.seed, data_dir=wanted.data_dir
        )

        def step(done: int, total: int, src: str = src) -> None:
            report(f"perplexity on {src}", done, total)

        if other[1] is None:
            ours[src] = perplexity.measure(model, text, progress=step)
        else:
            ours[src], theirs[src] = perplexity.compare(model, perplexity.Beside(*other), text, progress=step)
    return ours, theirs


def _write(model: Any, tokenizer: Any, prompts: list[str], wanted: Wanted, name: str, report: Progress) -> Any:
    return generation.generate(
        model,
        tokenizer,
        prompts,
        wanted.tokens,
        seed=wanted.seed,
        progress=lambda done, total: report(f"text by {name}", done, total),
    )


def _accuracies(
    model: Any, tokenizer: Any, local: dict[str, tasks.Items], wanted: Wanted, report: Progress
) -> ZeroShot:
    from shortllama.evaluation import zeroshot

    return zeroshot.evaluate(
        model,
        tokenizer,
        wanted.tasks,
        local=local,
        limit=wanted.limit,
        progress=lambda done, total: report("zero-shot requests", done, total),
    )
