"""How far the predictions for a device are from what was measured on it: the table `prediction-error`. Pure.

Two predictions of the same cells: the shipped one, which `sweep --dry-run` makes with nothing measured, and one by
factors fitted to half of the cells and tested on the other half, which is what `--calibrated-by` can be expected to do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from bench import devices, fitting, regimes
from bench.fitting import Error
from bench.measurement import Environment, Measurement
from shortllama.shape import ModelShape


class Predicted(msgspec.Struct, frozen=True):
    """The errors for one runtime and dtype in one environment; None where there were too few cells to tell."""

    environment: str
    runtime: str
    dtype: str
    shipped: Error | None
    fitted: Error | None


def errors(
    rows: Sequence[Measurement], environments: Mapping[str, Environment], shapes: Mapping[str, ModelShape]
) -> tuple[Predicted, ...]:
    """Return the errors of every environment, runtime and dtype with cells that can be predicted."""
    roofs = regimes.devices_of(environments.values())
    found: list[Predicted] = []
    for key, environment in environments.items():
        if key not in roofs:
            continue
        # What is shipped for a CPU goes with its nominal row, whatever was measured since.
        planned = devices.lookup("cpu") if environment.fingerprint.get("kind") == "cpu" else roofs[key]
        cells = fitting.observed([row for row in rows if row.environment == key], shapes)
        for runtime, dtype in dict.fromkeys((one.cell.runtime, one.cell.dtype) for one in cells):
            group = [one for one in cells if (one.cell.runtime, one.cell.dtype) == (runtime, dtype)]
            shipped, fitted = fitting.error(group, planned), fitting.held_out(group, roofs[key])
            if shipped or fitted:
                found.append(Predicted(key, runtime, dtype, shipped, fitted))
    return tuple(found)
