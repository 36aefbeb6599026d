"""Other forms of a checkpoint folder, for software that cannot take its shape: `padded` and `gguf`.

An export holds the same model: nothing is rounded or chosen here. Each form is one module with the same function;
this one knows their names without importing them. No form needs torch.

Record history: shortllama.export/1: first.
"""

from __future__ import annotations

import difflib
import importlib
from pathlib import Path
from typing import Literal

import msgspec

from shortllama.errors import InputError

MARK = "export.json"

FORMS: dict[str, str] = {"padded": "shortllama.exporting.padded", "gguf": "shortllama.exporting.gguf"}


class Export(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an exported folder is, and what the form costs. Digests are SHA-256 of whole files, by name.

    `architecture`: transformers' model type, or llama.cpp's architecture. `parameters` and `kv_bytes_per_token` (in
    `dtype`) count the zeros that were added, `source_...` are those of the exported folder.
    """

    form: Literal["padded", "gguf"]
    architecture: str
    dtype: str
    parameters: int
    source_parameters: int
    kv_bytes_per_token: int
    source_kv_bytes_per_token: int
    shape_digest: str
    source_shape_digest: str
    weights: dict[str, str]
    companions: dict[str, str]
    version: str
    schema: Literal["shortllama.export/1"] = "shortllama.export/1"

    @property
    def overhead(self) -> float:
        """The parameters added, as a share of the exported folder's (0 for none)."""
        return self.parameters / self.source_parameters - 1


def check_form(name: str) -> None:
    """Raise InputError with the nearest name unless `name` is a form that can be exported to."""
    if name not in FORMS:
        near = difflib.get_close_matches(name, FORMS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(FORMS)}"
        raise InputError(f"--to {name!r} is unknown; {hint}")


def export(model: str | Path, form: str, out: Path) -> Export:
    """Write a folder, hub id or `reference` to the folder `out` in another form; returns its record.

    Reads the source's files one tensor at a time. `out` appears complete or not at all. Raises InputError for an
    unknown form, unusable weights or an `out` that is not ours, UnsupportedError for what the form cannot express.
    """
    check_form(form)
    return importlib.import_module(FORMS[form]).export(model, out)
