"""How much equal code differs on this machine: from sessions to a figure, and where the figure is kept.

Measured by running equal code in several sessions (`session_noise`), kept in a file of the user's state by fingerprint
(`remember`), and copied into the facts of every run's environment (`facts`), so that a results file says what its
machine's noise is wherever it is read. A fingerprint changes with the libraries; noise measured before is then unknown.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path
from statistics import NormalDist, median
from typing import Any, Literal

import msgspec

from bench.measurement import Measurement
from shortllama import files
from shortllama.errors import InputError

BETWEEN_FACT = "noise_between_sessions"  # what `compare` adds to a limit where there is one session a side
WITHIN_FACT = "noise_within_session"
_REACH = NormalDist().inv_cdf(0.975) * math.sqrt(2)


class Noise(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Standard deviations of log times: of sessions' medians (`between`), of the samples of a session (`within`).

    `sessions`, `cells`: what they were estimated from.
    """

    between: float
    within: float
    sessions: int
    cells: int

    @property
    def allowance(self) -> float:
        """The share by which two sessions of equal code differ in 95 of 100 cases at most (ISO 5725's limit of
        repeatability)."""
        return math.expm1(_REACH * self.between)


def session_noise(rows: Iterable[Measurement]) -> Noise:
    """Return the noise in rows of equal code: cells that were measured in several sessions, whatever their pairs.

    All sessions of a cell count alike, not only neighbours: single sessions that are compared later are far apart, so
    drift counts. Raises InputError where no cell has two sessions with two samples.
    """
    cells: dict[str, list[list[float]]] = {}
    for row in rows:
        if row.outcome == "ok" and len(row.samples.call_s) > 1:
            cells.setdefault(row.cell_id, []).append([math.log(value) for value in row.samples.call_s])
    repeated = [sessions for sessions in cells.values() if len(sessions) > 1]
    if not repeated:
        raise InputError("noise between sessions needs a cell that was measured in at least two sessions; add sessions")
    between = _spread([[median(one) for one in sessions] for sessions in repeated])
    within = _spread([one for sessions in repeated for one in sessions])
    return Noise(between, within, max(map(len, repeated)), len(repeated))


def _spread(groups: Iterable[list[float]]) -> float:
    """The standard deviation within groups, pooled over them."""
    squares, freedom = 0.0, 0
    for values in groups:
        middle = math.fsum(values) / len(values)
        squares += math.fsum((value - middle) ** 2 for value in values)
        freedom += len(values) - 1
    return math.sqrt(squares / freedom)


# -- the machine's own ------------------------------------------------------------------------------------------------


class _Known(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file: noise by the id of an environment, which is a hash of its fingerprint."""

    schema: Literal["shortllama.noise/1"] = "shortllama.noise/1"
    machines: dict[str, Noise] = {}


def file() -> Path:
    """Return where the noise is kept: $XDG_STATE_HOME/shortllama/noise.json."""
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "shortllama" / "noise.json"


def _read() -> _Known:
    path = file()
    if not path.exists():
        return _Known()
    try:
        return files.decode_json(files.read_bytes(path), _Known, str(path))
    except InputError as error:
        raise InputError(f"{error}; delete it to go on without stored noise") from None


def remember(environment: str, noise: Noise) -> Path:
    """Store the noise of the environment with that id; return the file."""
    path, known = file(), _read()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); set XDG_STATE_HOME") from error
    files.write_atomically(path, files.encode_json(_Known(machines=known.machines | {environment: noise})))
    return path


def facts(environment: str) -> dict[str, Any]:
    """Return what the stored noise adds to an environment's facts; nothing where none is stored."""
    noise = _read().machines.get(environment)
    return {} if noise is None else {BETWEEN_FACT: noise.allowance, WITHIN_FACT: noise.within}
