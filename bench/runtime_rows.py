"""The runtimes as rows of data: what planning and predicting need to know of them. Pure, and needs no torch."""

from __future__ import annotations

import os
import shutil
from typing import Literal

import msgspec


class Runtime(msgspec.Struct, frozen=True):
    """A runtime's row: its `module` (exports NAME, SIMULATED, open_session: see `runtimes.protocol`) and cache."""

    module: str
    cache: Literal["dynamic", "static"]
    simulated: bool = False


ROWS = {
    "paper": Runtime("bench.runtimes.paper", "dynamic"),
    "eager": Runtime("bench.runtimes.eager", "dynamic"),
    "static": Runtime("bench.runtimes.static", "static"),
    "compile": Runtime("bench.runtimes.compile", "static"),
    "cudagraph": Runtime("bench.runtimes.cudagraph", "static"),
    "roofline": Runtime("bench.runtimes.roofline", "static", simulated=True),
}
SIMULATED = frozenset(name for name, row in ROWS.items() if row.simulated)


def refusal(name: str, kind: str) -> str | None:
    """Return why a runtime cannot run here on a device of `kind` (cpu, cuda), with the next step; None where it can."""
    if name == "cudagraph" and kind != "cuda":
        return "runtime cudagraph needs a CUDA device, and this is a CPU; give --runtime eager,static"
    if name == "compile":
        variable, default = ("CC", "gcc") if kind == "cuda" else ("CXX", "g++")
        compiler = os.environ.get(variable) or default
        if shutil.which(compiler) is None:
            language = "C" if kind == "cuda" else "C++"
            missing = f"runtime compile needs a {language} compiler, and {compiler} is not found"
            return f"{missing}; install it, or name yours in {variable}"
    return None
