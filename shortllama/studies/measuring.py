"""What all models of a study are evaluated on: texts prepared and items read once, so that all meet the same tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortllama import pruning
from shortllama.evaluation import cloze, tasks
from shortllama.evaluation.results import Quality
from shortllama.sources import Source
from shortllama.study import Evaluating

if TYPE_CHECKING:
    from shortllama.studies.work import Settings


class Meter:
    """The evaluation of a study. Text `self` is sampled from the dense model."""

    def __init__(self, dense: Source, wanted: Evaluating, settings: Settings) -> None:
        from shortllama.evaluation import perplexity, zeroshot

        if wanted.tasks:
            zeroshot.require_harness()
        self._wanted, self._settings = wanted, settings
        self._tasks = tasks.lookup(",".join(wanted.tasks)) if wanted.tasks else []
        data = None if wanted.task_data is None else _folder(wanted.task_data, settings.data_dir)
        self._items = {} if data is None else tasks.read_all(self._tasks, data)
        model, tokenizer = self._load(dense)
        if self._items:
            zeroshot.check(model, tokenizer, self._items, wanted.limit)
        self._items |= cloze.make(self._tasks, model, tokenizer, by=dense.name, limit=wanted.limit, seed=wanted.seed)
        self._texts = {
            src: perplexity.prepare(
                src, tokenizer=tokenizer, dense=model, limit=wanted.limit, seed=wanted.seed, data_dir=settings.data_dir
            )
            for src in wanted.texts
        }

    def measure(self, source: Source, step: Callable[[str, int, int], None]) -> Quality:
        """Return all that is wanted of one model."""
        from shortllama.evaluation import perplexity, zeroshot

        model, tokenizer = self._load(source)
        found: dict[str, Any] = {}
        for src, text in self._texts.items():
            told = f"perplexity on {src}"
            found[src] = perplexity.measure(
                model, text, progress=lambda done, total, told=told: step(told, done, total)
            )
        zero_shot = None
        if self._tasks:
            zero_shot = zeroshot.evaluate(
                model,
                tokenizer,
                self._tasks,
                local=self._items,
                limit=self._wanted.limit,
                progress=lambda done, total: step("zero-shot requests", done, total),
            )
        return Quality(found, zero_shot)

    def _load(self, source: Source) -> tuple[Any, Any]:
        trust = self._settings.trust_remote_code
        return pruning.load(source, device=self._settings.device, trust_remote_code=trust)


def _folder(name: str, data_dir: Path | None) -> Path:
    """A folder of tasks by its path, else by its name in the data folder."""
    path = Path(name)
    return data_dir / name if data_dir is not None and not path.is_dir() else path
