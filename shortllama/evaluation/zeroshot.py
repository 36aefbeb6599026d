"""Zero-shot accuracy through lm-evaluation-harness (extra `eval`), for a model in memory, whatever its shape.

The harness's own tasks fetch their data sets from the hub; with local files (`tasks`) our definitions of the same
prompts run through the same harness, and nothing is fetched. No examples, no chat template, log-probabilities in
float32. Imports the harness only when it is used.
"""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import logging
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from shortllama import calibration
from shortllama.errors import InputError, UnsupportedError
from shortllama.evaluation.results import Accuracy, ZeroShot
from shortllama.evaluation.tasks import LOCAL_VERSION, TASKS, Item, Items

Progress = Callable[[int, int], None]

# What requests are assumed to be long, for the bound on the logits' memory; most are shorter.
TOKENS = 512
ROWS = 16
HUB = "hub"


def require_harness() -> None:
    """Raise UnsupportedError where lm-evaluation-harness is not installed."""
    _version()


def check(model: Any, tokenizer: Any, local: Mapping[str, Items], limit: int | None = None) -> None:
    """Raise InputError for an item with a candidate that no window of the model holds; `limit` as in `evaluate`.

    Of the harness's own tasks this is found when their items are there, before the model has answered any.
    """
    if tokenizer is None:
        raise _no_tokenizer()
    with _silent():
        wrapped = _wrapped(model, tokenizer, None)
    for name, items in local.items():
        for number, item in enumerate(items.items[:limit]):
            for context in item.contexts:
                for more in item.continuations:
                    # No token is less than a byte, so most texts are short enough at sight.
                    if len(more.encode()) >= wrapped.max_length:
                        _require_room(wrapped, name, number, wrapped._encode_pair(context, f" {more}")[1])


def _require_room(wrapped: Any, name: str, number: int, candidate: Sequence[int]) -> None:
    if len(candidate) > wrapped.max_length:
        fewer = f", or take fewer items (--limit {number})" if number else ""
        raise InputError(
            f"task {name!r}: item {number + 1} has a candidate of {len(candidate)} tokens, the model has positions for "
            f"{wrapped.max_length}; leave {name} out of --tasks{fewer}"
        )


def _no_tokenizer() -> InputError:
    return InputError("tasks are text, but this model comes without a tokenizer; put its files into the folder")


def evaluate(
    model: Any,
    tokenizer: Any,
    names: Sequence[str],
    *,
    local: Mapping[str, Items] | None = None,
    limit: int | None = None,
    progress: Progress | None = None,
) -> ZeroShot:
    """Return the accuracy of a model on the named tasks, over the items in `local`, and where it has none, the hub's.

    `limit` is the most items taken of each task, from its start. Raises UnsupportedError without the harness, and
    InputError without a tokenizer, where a task cannot be fetched, or as `check` does.
    """
    version = _version()
    if tokenizer is None:
        raise _no_tokenizer()
    with _silent():
        given = local or {}
        ours = {name: _local_task(name, given[name]) for name in names if name in given}
        loaded = _from_hub([name for name in names if name not in given]) | ours
        wrapped = _wrapped(model, tokenizer, progress)
        found: Any = importlib.import_module("lm_eval").evaluate(
            lm=wrapped, task_dict=dict(loaded), limit=limit, bootstrap_iters=0, log_samples=False
        )
    results = {name: _accuracy(name, found, given.get(name)) for name in names}
    averaged = [one.value for name, one in results.items() if TASKS[name].averaged]
    return ZeroShot(
        results,
        harness=f"lm-eval {version}",
        bos=wrapped.begins_with_bos,
        truncated=wrapped.truncated,
        mean=math.fsum(averaged) / len(averaged) if averaged else None,
        limit=limit,
    )


def _version() -> str:
    try:
        return importlib.metadata.version("lm-eval")
    except importlib.metadata.PackageNotFoundError:
        raise UnsupportedError(
            "zero-shot tasks run through lm-evaluation-harness, which is not installed; pip install 'shortllama[eval]'"
        ) from None


# -- tasks ------------------------------------------------------------------------------------------------------------


def _harness_name(name: str) -> str:
    return TASKS[name].hub or name


def _from_hub(names: Sequence[str]) -> dict[str, Any]:
    """Return the harness's own tasks. Raises InputError where their data cannot be fetched.

    The errors of the libraries that fetch them have no common base.
    """
    if not names:
        return {}
    manager = importlib.import_module("lm_eval.tasks").TaskManager()
    found: dict[str, Any] = {}
    for name in names:
        try:
            (found[name],) = manager.load([_harness_name(name)])["tasks"].values()
        except Exception as error:
            said = " ".join(str(error).split())[:160]
            raise InputError(
                f"task {name!r}: its data set cannot be fetched from the hub ({type(error).__name__}: {said}); "
                "give --task-data DIR, a folder with its file"
            ) from error
        found[name].set_config(key="num_fewshot", value=0)
    return found


def _local_task(name: str, items: Items) -> Any:
    """Return our definition of a task over local items, as the harness's own kind of task."""
    configurable = importlib.import_module("lm_eval.api.task").ConfigurableTask
    datasets = importlib.import_module("datasets")
    rows = [_row(item) for item in items.items]
    choosing = {"output_type": "multiple_choice", "doc_to_text": "context", "doc_to_choice": "choices"}
    form = {**choosing, "doc_to_target": "gold"}
    if len(items.items[0].contexts) > 1:  # the choice is of contexts, and the text to go on with is the target
        form = {**choosing, "doc_to_text": "gold", "doc_to_target": "continuation"}
    aggregations = dict.fromkeys(("acc", TASKS[name].metric), "mean")
    if TASKS[name].choices == (1, 1):
        form = {"output_type": "loglikelihood", "doc_to_text": "context", "doc_to_target": "continuation"}
        aggregations["perplexity"] = "perplexity"  # of the whole continuation, as the harness's own task has it
    return configurable(
        config={
            "task": name,
            "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(rows)},
            "test_split": "test",
            "num_fewshot": 0,
            "metric_list": [
                {"metric": metric, "aggregation": how, "higher_is_better": metric != "perplexity"}
                for metric, how in aggregations.items()
            ],
            "metadata": {"version": LOCAL_VERSION},
            **form,
        }
    )


def _row(item: Item) -> dict[str, Any]:
    context, continuation = next(iter(item.contexts)), next(iter(item.continuations))
    if len(item.contexts) > 1:
        return {"choices": list(item.contexts), "continuation": continuation, "gold": item.gold}
    if len(item.continuations) > 1:
        return {"context": context, "choices": list(item.continuations), "gold": item.gold}
    return {"context": context, "continuation": f" {continuation}"}


# -- the model --------------------------------------------------------------------------------------------------------


def _wrapped(model: Any, tokenizer: Any, progress: Progress | None) -> Any:
    """Return the model as the harness takes it, counting what it answers and what it has to cut."""
    wrapper: Any = importlib.import_module("lm_eval.models.huggingface").HFLM

    class Counting(wrapper):
        truncated = 0

        def loglikelihood(self, requests: Any, *arguments: Any, **options: Any) -> Any:
            self.asked = [(one.task_name, one.doc_id) for one in requests]
            return super().loglikelihood(requests, *arguments, **options)

        def _loglikelihood_tokens(self, requests: Any, *_: Any, **__: Any) -> Any:
            for (name, number), (_, _, more) in zip(self.asked, requests, strict=True):
                _require_room(self, name, number, more)
            self.truncated += sum(len(context) + len(more) > self.max_length + 1 for _, context, more in requests)
            self.set_cache_hook(_Answers(len(requests), progress))
            return super()._loglikelihood_tokens(requests, disable_tqdm=True)

        @property
        def begins_with_bos(self) -> bool:
            return self.tok_encode("a")[0] == calibration.bos_id(self.tokenizer)

    vocabulary = model.get_input_embeddings().num_embeddings
    return Counting(
        pretrained=model,
        tokenizer=copy.deepcopy(tokenizer),  # a padding token may be added to it
        backend="causal",
        batch_size=min(ROWS, calibration.rows_within(TOKENS, vocabulary)),
        softmax_dtype="float32",
    )


class _Answers:
    """Told of every answer, as the harness's cache of answers is: it keeps none and counts them."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total, self._progress, self._done = total, progress, 0

    def add_partial(self, *_: Any) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total)


@contextmanager
def _silent() -> Generator[None]:
    """Keep the harness's remarks and its own progress bars off the terminal."""
    bars: Any = importlib.import_module("tqdm").tqdm
    original = bars.__init__

    def disabled(self: Any, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **{**options, "disable": True})

    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "huggingface_hub", "transformers")]
    levels = [logger.level for logger in loggers]
    bars.__init__ = disabled
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        bars.__init__ = original
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


# -- results ----------------------------------------------------------------------------------------------------------


def _accuracy(name: str, found: Mapping[str, Any], items: Items | None) -> Accuracy:
    """Return one task's figures; the standard error is that of a mean of zeros and ones."""
    task = TASKS[name]
    metrics = {
        key.partition(",")[0]: float(value)
        for key, value in found["results"][name].items()
        if key.endswith(",none") and isinstance(value, int | float) and "_stderr" not in key
    }
    value, count = metrics[task.metric], int(found["n-samples"][name]["effective"])
    return Accuracy(
        metric=task.metric,
        value=value,
        items=count,
        published=task.published or (count if items is None else len(items.items)),
        version=str(found["versions"][name]),
        origin=HUB if items is None else items.origin,
        metrics=metrics,
        standard_error=math.sqrt(value * (1 - value) / (count - 1)) if count > 1 else None,
        digest=None if items is None else items.digest,
    )
