"""One file a runtime. Importing this package imports none of them: most need torch, and planning must not."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from bench import runtime_rows

SIMULATED = runtime_rows.SIMULATED


def load(name: str) -> ModuleType:
    """Return the module of a runtime; it exports NAME, SIMULATED and open_session(subject, options): see `protocol`."""
    return import_module(runtime_rows.ROWS[name].module)
