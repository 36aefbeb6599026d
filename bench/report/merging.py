"""Qualities of several runs and studies into one, only where they are of the same weights on the same tokens. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from bench.report import wording
from bench.report.quantities import inert
from bench.report.summaries import baselines
from shortllama.evaluation.results import Quality
from shortllama.plans import Plan


class Given(msgspec.Struct, frozen=True):
    """What one folder says: qualities by subject, and of some subjects a digest of what their weights are."""

    name: str
    quality: Mapping[str, Quality]
    weights: Mapping[str, str] = {}


def weights(plan: Plan) -> str:
    """Return 16 hexadecimal digits, equal for plans that leave the same weights of one base.

    Where a bias stands in for what went, it depends on the text that was calibrated on, and so the digest does.
    """
    origin = plan.provenance if plan.compensation else None
    value = (plan.base.shape_digest, plan.keep, plan.compensation, origin)
    return hashlib.sha256(msgspec.json.encode(value, order="sorted")).hexdigest()[:16]


def merged(given: Sequence[Given]) -> tuple[dict[str, Quality], tuple[str, ...]]:
    """Return the qualities by subject, those of earlier folders first, and a note on each that was left out.

    A text is left out where an earlier folder has other tokens of it for the same dense model; a subject where an
    earlier folder has other weights under its name.
    """
    dense = baselines(tuple(dict.fromkeys(subject for one in given for subject in one.quality)), {})
    found: dict[str, Quality] = {}
    known: dict[str, str] = {}
    tokens: dict[tuple[str, str], set[str]] = {}
    notes: list[str] = []
    for one in given:
        other = [s for s in one.quality if s in known and s in one.weights and known[s] != one.weights[s]]
        kept = {subject: quality for subject, quality in one.quality.items() if subject not in other}
        strange = dict.fromkeys(
            text for subject, quality in kept.items() for text, result in quality.perplexity.items()
            if result.digest not in tokens.get((dense.get(subject, subject), text), {result.digest})
        )  # fmt: skip
        for subject, quality in kept.items():
            base = dense.get(subject, subject)
            same = {
                text: result for text, result in quality.perplexity.items()
                if result.digest in tokens.get((base, text), {result.digest})
            }  # fmt: skip
            found[subject] = _joined(found.get(subject), msgspec.structs.replace(quality, perplexity=same))
        for subject, quality in kept.items():
            for text, result in quality.perplexity.items():
                tokens.setdefault((dense.get(subject, subject), text), set()).add(result.digest)
        known |= {subject: digest for subject, digest in one.weights.items() if subject not in known}
        notes += _notes(one.name, strange, other)
    return found, tuple(notes)


def _joined(first: Quality | None, second: Quality) -> Quality:
    if first is None:
        return second
    return Quality(
        {**second.perplexity, **first.perplexity},
        second.zero_shot if first.zero_shot is None else first.zero_shot,
        first.generations or second.generations,
    )


def _notes(name: str, strange: Iterable[str], other: Sequence[str]) -> list[str]:
    texts, notes = list(strange), []
    if texts:
        notes.append(f"Perplexity on {wording.join(texts)} of {name} is on other tokens than before; it is not merged.")
    if other:
        notes.append(
            f"{wording.join(other)} of {name} has other weights than before under that name; it is not merged."
        )
    return [inert(note) for note in notes]
