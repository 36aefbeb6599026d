"""What a sweep measures: names become subjects with a known shape, without loading anything.

Grammar: MODEL, or MODEL/PLAN. MODEL is a catalogue name, `reference`, a checkpoint folder or a hub id; PLAN is a
catalogue suffix (depth-26), a blind plan (depth:26, width:24x8256@4-30, flap:...: random weights), or METHOD:RATIO
(ppl:0.25: real weights are pruned before the sweep starts; on a catalogue name, a blind plan of that shape).
"""

from __future__ import annotations

import msgspec

from shortllama.shape import ModelShape


class Subject(msgspec.Struct, frozen=True):
    """One thing to measure. `folder` holds its weights, or None for random weights of `shape`.

    `prune`: (base folder, method, ratio) of a subject that must be written first, or None. `dense`: the name of the
    subject it is compared with.
    """

    name: str
    shape: ModelShape
    dense: str
    folder: str | None = None
    prune: tuple[str, str, float] | None = None
