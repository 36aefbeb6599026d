"""Predictions by factors of a run that was measured: reads the run, finds its subjects' shapes, refuses what would not
carry over. Imports no torch.

Factors are shares of a roof and seconds of a host. On GPUs the roof is the datasheet's, which every device of the table
has, so factors carry over from one to another as far as hosts are alike. A CPU has no datasheet here: its factors hold
for the machine they were measured on.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import msgspec

from bench import fitting, regimes, store, subjects
from bench.devices import Device
from bench.environment import Machine
from bench.fitting import Error, Key
from bench.measurement import Environment, Measurement
from bench.prediction import Overheads
from shortllama import catalogue, sources
from shortllama.errors import InputError, ShortllamaError
from shortllama.shape import ModelShape


class Calibration(msgspec.Struct, frozen=True):
    """Factors by runtime and dtype, the device to predict for, and where they come from: device and number of cells.

    `unseen`: the error on cells left out of the fit, None where there are too few to leave any out.
    """

    factors: dict[Key, Overheads]
    device: Device
    measured_on: str
    cells: int
    unseen: Error | None


def shapes(rows: Iterable[Measurement], *, hub: bool = False) -> dict[str, ModelShape]:
    """Return the shape of every subject that its name still leads to: one that is gone or has changed is left out.

    With `hub`, models that are nowhere else are asked of the hub; without it, nothing leaves this machine.
    """
    found: dict[str, ModelShape] = {}
    for name, digest in {row.cell.subject: row.subject_digest for row in rows}.items():
        try:
            shape = subjects.resolve(name).shape if hub or _is_here(name) else None
        except (ShortllamaError, OSError, ValueError):  # the latter two: a name that no file can have
            continue
        if shape is not None and digest in (None, shape.digest()):
            found[name] = shape
    return found


def _is_here(name: str) -> bool:
    name, _ = sources.split(name)
    places = [part for part in (name, name.rpartition("/")[0]) if part]
    return any(one == sources.REFERENCE or catalogue.knows(one) or Path(one).expanduser().exists() for one in places)


def read(run: Path, machine: Machine) -> Calibration:
    """Return the factors of a run for predictions on `machine`.

    Raises InputError where the run has no cells that could tell, was measured on several machines, or on one whose
    factors say nothing of this one.
    """
    results = store.read(run)
    rows = [row for row in results.measurements if row.outcome == "ok" and not row.simulated]
    if not rows:
        raise InputError(
            f"--calibrated-by {run}: no cell of it was measured on a device; give a run that is not simulated"
        )
    environments = [results.environments[key] for key in dict.fromkeys(row.environment for row in rows)]
    if len(environments) > 1:
        raise InputError(f"--calibrated-by {run}: holds rows of {len(environments)} environments; give a run of one")
    (environment,) = environments
    name = str(environment.fingerprint.get("device", "unknown device"))
    roof = _roof(environment, machine, f"--calibrated-by {run}: was measured on {name}")
    cells = fitting.observed(rows, shapes(rows, hub=True))
    factors = fitting.calibrate(cells, roof)
    if not factors:
        raise InputError(
            f"--calibrated-by {run}: needs {fitting.LEAST_CELLS} measured cells of a runtime and dtype, whose "
            f"subjects are still there; it has {len(cells)} in all"
        )
    target = machine.device if environment.fingerprint.get("kind") != "cpu" else _at(roof, machine.device)
    return Calibration(factors, target, name, len(cells), fitting.held_out(cells, roof))


def _roof(environment: Environment, machine: Machine, what: str) -> Device:
    """The device whose roof the run's times are shares of."""
    kind = environment.fingerprint.get("kind")
    found = regimes.devices_of([environment]).get(environment.id)
    if found is None:
        raise InputError(f"{what}, whose peaks the device table lacks; its times are shares of nothing known")
    if kind == "cpu" and (machine.kind != "cpu" or machine.name != environment.fingerprint.get("device")):
        raise InputError(
            f"{what}, and a CPU's factors say nothing of {machine.name}; give a run of that kind of device"
        )
    if kind == "cuda" and machine.device.nominal:
        raise InputError(f"{what}, and a GPU's factors say nothing of {machine.name}; give a run of that device")
    return found


def _at(roof: Device, known: Device) -> Device:
    """The measured roof, with the memory of the machine at hand."""
    return msgspec.structs.replace(roof, memory_bytes=known.memory_bytes)
