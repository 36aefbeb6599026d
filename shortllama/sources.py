"""What a MODEL argument means: a name becomes a shape and, where there are weights, a folder. Loads no weights.

Free of torch and transformers, so that every planning command answers at once.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec

from shortllama import catalogue, configs, files
from shortllama.errors import InputError, ShortllamaError
from shortllama.shape import QUANTISED, ModelShape

REFERENCE = "reference"
REFERENCE_FOLDER = Path(__file__).parent / "reference" / "model"

# Pickled weights are never fetched, and neither is code.
_HUB_FILES = ("*.json", "*.safetensors", "*.model", "merges.txt", "vocab.txt", "*.jinja")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HELD = re.compile(rf"(.+)\+({'|'.join(QUANTISED)})")


class Source(msgspec.Struct, frozen=True):
    """A model that can be named. `folder` holds config.json and weights; None means random weights of `shape`.

    `config` is the decoded config.json, None for catalogue shapes. A model from the hub has `on_hub`: its folder holds
    config.json only, until `fetch` has been called. One that is to be held quantised says so in its shape.
    """

    name: str
    shape: ModelShape
    folder: Path | None = None
    config: dict[str, Any] | None = None
    on_hub: bool = False


def locate(name: str) -> Source:
    """Return what `name` stands for, looked up in this order.

    A catalogue name (`llama-7b`, `llama-7b/depth-26`, `llama-7b/depth:26`), `reference`, a folder with config.json
    (write ./llama-7b for a folder that is called like a catalogue name), a hub id OWNER/NAME, whose config.json alone
    is fetched. Raises InputError that names close catalogue names, or what is wrong with the folder.
    """
    base, held = split(name)
    if held:
        raise InputError(f"model {name!r}: quantised models are only evaluated and measured (eval, sweep); give {base}")
    if catalogue.knows(name):
        return Source(name, catalogue.lookup(name))
    if name == REFERENCE:
        return from_folder(name, REFERENCE_FOLDER)
    path = Path(name).expanduser()
    if path.exists() or name.startswith((".", "/", "~")):
        return from_folder(name, path)
    if _HUB_ID.fullmatch(name):
        return _from_hub(name)
    raise InputError(
        f"model {name!r} is not in the catalogue, not a folder here and no hub id OWNER/NAME; {catalogue.near(name)}"
    )


def split(name: str) -> tuple[str, str]:
    """Return a model's name without +int8 or +int4, and which of them was behind it; "" where none was."""
    found = None if Path(name).exists() else _HELD.fullmatch(name)
    return (found[1], found[2]) if found else (name, "")


def locate_held(name: str) -> Source:
    """Return what `name` stands for, where +int8 or +int4 may follow: its weights are then to be held so."""
    base, held = split(name)
    source = locate(base)
    if not held:
        return source
    return msgspec.structs.replace(source, name=name, shape=msgspec.structs.replace(source.shape, quantised=held))


def from_folder(name: str, folder: Path) -> Source:
    """Return the model in a folder, under `name`. Raises InputError for a missing or unreadable config.json."""
    if not folder.is_dir():
        raise InputError(f"model {name!r}: {folder} is {'a file' if folder.exists() else 'not there'}; give a folder")
    file = folder / "config.json"
    if not file.is_file():
        raise InputError(f"model {name!r}: no config.json in {folder}; give the folder that save_pretrained wrote")
    config = files.decode_json(files.read_bytes(file), dict[str, Any], str(file))
    try:
        return Source(name, configs.shape_of(config), folder, config)
    except ShortllamaError as error:
        raise type(error)(f"{file}: {error}") from error


def _from_hub(name: str) -> Source:
    folder = _ask_hub(name, ("config.json",))
    return msgspec.structs.replace(from_folder(name, folder), on_hub=True)


def fetch(source: Source) -> Path:
    """Return the folder with the weights of `source`, downloading them first where they are on the hub.

    Raises InputError where that fails, or for a catalogue shape, which has no weights.
    """
    if source.folder is None:
        raise InputError(f"{source.name} is a shape without weights; give a folder, a hub id or {REFERENCE!r}")
    return _ask_hub(source.name, _HUB_FILES) if source.on_hub else source.folder


def _ask_hub(name: str, patterns: tuple[str, ...]) -> Path:
    """The local snapshot of a hub model, holding at least its files that match; from the cache when offline."""
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(patterns)))
    except GatedRepoError as error:
        raise InputError(
            f"model {name!r}: access must be granted on the hub first; then log in with hf auth login"
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"model {name!r}: no folder here, and no such model on the hub; {catalogue.near(name)}"
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise InputError(
            f"model {name!r}: no folder here, not in the local cache, and the hub cannot be reached "
            f"({type(error).__name__}); check the name or the network"
        ) from error
