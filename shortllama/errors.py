"""The project's errors: one base, so that a command can answer every user mistake in one line.

    ShortllamaError                  exit code 2 unless said otherwise
    +-- InputError                   a file, option or name that cannot be used as given
    |   +-- PlanError                a plan that does not fit its base or the model at hand
    |   +-- UnsupportedError         understood, but not something this project or machine can do
    +-- VerificationError            a written result differs from what it should be (exit code 1)
    +-- IncomparableError            results that must not be compared (exit code 3)

Internal invariants use `assert`; anything else that escapes is a bug and keeps its traceback.
"""

from __future__ import annotations


class ShortllamaError(Exception):
    """Base of all expected failures. The message is one line: what, value seen, what was expected, next step."""

    exit_code = 2


class InputError(ShortllamaError):
    """A file, option or name given by the user cannot be used."""


class PlanError(InputError):
    """A plan does not fit its base shape or the model it is applied to."""


class UnsupportedError(InputError):
    """The request is understood but this project, model family or machine cannot do it."""


class VerificationError(ShortllamaError):
    """A written result was read back and differs from what it should be."""

    exit_code = 1


class IncomparableError(ShortllamaError):
    """Two results come from environments whose figures must not be compared."""

    exit_code = 3
