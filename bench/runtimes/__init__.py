"""One file a runtime. Importing this package imports none of them: most need torch, and planning must not."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

# Every runtime exports NAME, SIMULATED and open_session(subject, options): see `protocol`.
MODULES = {
    "paper": "bench.runtimes.paper",
    "eager": "bench.runtimes.eager",
    "static": "bench.runtimes.static",
    "roofline": "bench.runtimes.roofline",
}
SIMULATED = frozenset({"roofline"})


def load(name: str) -> ModuleType:
    """Return the module of a runtime."""
    return import_module(MODULES[name])
