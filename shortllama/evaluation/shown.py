"""An evaluation as tables for people: figures first, the protocol under them, text beside text."""

from __future__ import annotations

import sys
import textwrap

from shortllama import display
from shortllama.evaluation.results import Evaluation, Generation
from shortllama.evaluation.tasks import TASKS

WIDTH = 100


def show(evaluation: Evaluation) -> None:
    """Print all that an evaluation holds."""
    _show_perplexities(evaluation)
    _show_accuracies(evaluation)
    _show_generations(evaluation)


def _show_perplexities(evaluation: Evaluation) -> None:
    results = [
        (subject, source, result)
        for subject, quality in evaluation.subjects.items()
        for source, result in quality.perplexity.items()
    ]
    if not results:
        return
    found = [result for _, _, result in results]
    columns = ["model ", "text ", "perplexity", "nats a token"]
    optional = {
        "bits a byte": [_number(one.bits_per_byte) for one in found],
        "word perplexity": [_number(one.word_perplexity) for one in found],
        "KL, nats a token": [_number(one.divergence and one.divergence.kl) for one in found],
        "same top token": [_share(one.divergence and one.divergence.agreement) for one in found],
    }
    shown = {name: cells for name, cells in optional.items() if any(cells)}
    rows = [
        (subject, source, _number(one.perplexity), f"{one.nll:.4f}", *(cells[index] for cells in shown.values()))
        for index, (subject, source, one) in enumerate(results)
    ]
    display.table([*columns, *shown], rows)
    for source, one in {source: one for _, source, one in results}.items():
        _write(f"{source}: {one.protocol}")
    against = {one.divergence.against for one in found if one.divergence}
    _write(*(f"KL and agreement: against {name}, over the same tokens" for name in against))
    _write("")


def _show_accuracies(evaluation: Evaluation) -> None:
    for subject, quality in evaluation.subjects.items():
        found = quality.zero_shot
        if found is None:
            continue
        rows = [
            (name, one.metric, f"{one.value:.4f}", "" if one.standard_error is None else f"{one.standard_error:.4f}",
             f"{one.items} of {one.published}", f"{one.origin}, version {one.version}")
            for name, one in found.tasks.items()
        ]  # fmt: skip
        display.table(("task ", "metric ", "accuracy", "standard error", "items", "from "), rows, title=subject)
        if found.mean is not None:
            _write(f"plain mean of {sum(TASKS[name].averaged for name in found.tasks)} tasks: {found.mean:.4f}")
        _write(found.protocol, "")


def _show_generations(evaluation: Evaluation) -> None:
    prompts = [one.prompt for quality in evaluation.subjects.values() for one in quality.generations]
    for prompt in dict.fromkeys(prompts):
        _write(f"> {prompt}")
        for subject, quality in evaluation.subjects.items():
            for one in quality.generations:
                if one.prompt == prompt:
                    _show_text(subject, one)
        _write("")


def _show_text(subject: str, one: Generation) -> None:
    how = "greedy" if one.seed is None else f"drawn, seed {one.seed}"
    text = " ".join(one.text.split()) + (" (ends)" if one.ended else " ...")
    label = f"  {subject}, {how}: "
    _write(*textwrap.wrap(label + text, WIDTH, subsequent_indent="    ", drop_whitespace=True))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _write(*lines: str) -> None:
    """Write lines to stdout."""
    sys.stdout.writelines(f"{line}\n" for line in lines)
