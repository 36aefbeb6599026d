from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shortllama import catalogue, sources
from shortllama.errors import InputError, UnsupportedError
from shortllama.shape import BlockShape

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "intermediate_size": 48,
    "tie_word_embeddings": True,
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty local cache of the hub, in the layout that huggingface_hub keeps."""
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return cache


def test_catalogue_names_are_shapes_without_weights() -> None:
    for name in ("llama-7b", "llama-7b/depth-26", "llama-7b/width:24x8256@4-30", "vicuna-13b"):
        found = sources.locate(name)
        assert (found.name, found.folder, found.config) == (name, None, None)
        assert found.shape == catalogue.lookup(name)


def test_a_folder_is_read_from_its_config(checkpoint: Path) -> None:
    found = sources.locate(str(checkpoint))
    assert found.folder == checkpoint
    assert found.config == CONFIG
    assert found.shape.blocks == (BlockShape(4, 2, 48),) * 3
    assert found.shape.tied
    assert sources.fetch(found) == checkpoint


def test_a_relative_folder_needs_a_dot_only_when_the_catalogue_has_its_name(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkpoint.parent)
    checkpoint.rename("llama-7b")
    assert sources.locate("llama-7b").folder is None
    assert sources.locate("./llama-7b").shape.vocabulary == 100
    Path("llama-7b").rename("mine")
    assert sources.locate("mine").shape.vocabulary == 100


def test_reference_is_the_model_that_ships_with_the_package(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sources.REFERENCE_FOLDER == Path(sources.__file__).parent / "reference" / "model"
    monkeypatch.setattr(sources, "REFERENCE_FOLDER", checkpoint)
    found = sources.locate("reference")
    assert (found.name, found.folder) == ("reference", checkpoint)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("llama7b", "did you mean llama-7b"),
        ("lama-13b", "did you mean llama-13b"),
        ("nothing-like-it", "`shortllama shapes` lists"),
        ("llama-7b/dept-26", "did you mean llama-7b/depth-26"),
        ("llama-7b/depth:33", "between 1 and 32 blocks"),
        ("./nowhere", "is not there; give a folder"),
        ("/no/where", "is not there; give a folder"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(name: str, problem: str) -> None:
    with pytest.raises(InputError) as caught:
        sources.locate(name)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


def test_broken_folders_say_what_is_wrong(checkpoint: Path) -> None:
    file = checkpoint / "config.json"
    file.write_text(json.dumps(CONFIG)[:40])
    with pytest.raises(InputError, match=r"config\.json: not readable"):
        sources.locate(str(checkpoint))
    file.write_text("[]")
    with pytest.raises(InputError, match=r"config\.json: \$: Expected `object`"):
        sources.locate(str(checkpoint))
    file.write_text(json.dumps(CONFIG | {"model_type": "xlstm"}))
    with pytest.raises(UnsupportedError, match=r"config\.json: .*'xlstm'"):
        sources.locate(str(checkpoint))
    file.write_text(json.dumps({key: CONFIG[key] for key in CONFIG if key != "hidden_size"}))
    with pytest.raises(InputError, match=r"config\.json: .*'hidden_size'"):
        sources.locate(str(checkpoint))
    with pytest.raises(InputError, match="is a file; give a folder"):
        sources.locate(str(file))
    file.unlink()
    with pytest.raises(InputError, match=r"no config\.json in"):
        sources.locate(str(checkpoint))


def test_a_shape_without_weights_cannot_be_fetched() -> None:
    with pytest.raises(InputError, match="llama-7b is a shape without weights"):
        sources.fetch(sources.locate("llama-7b"))


def test_a_hub_model_that_is_cached_works_offline(hub_cache: Path) -> None:
    commit = "0" * 40
    snapshot = hub_cache / "models--someone--tiny" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(CONFIG))
    refs = hub_cache / "models--someone--tiny" / "refs"
    refs.mkdir()
    (refs / "main").write_text(commit)
    found = sources.locate("someone/tiny")
    assert found.on_hub
    assert found.shape.vocabulary == 100
    assert found.folder == snapshot
    assert sources.fetch(found) == snapshot


@pytest.mark.usefixtures("hub_cache")
def test_a_hub_model_that_is_not_cached_is_one_line_offline() -> None:
    with pytest.raises(InputError) as caught:
        sources.locate("someone/absent")
    assert "'someone/absent': no folder here, not in the local cache, and the hub cannot be reached" in str(
        caught.value
    )
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "problem"),
    [("RepositoryNotFoundError", "no such model on the hub"), ("GatedRepoError", "access must be granted on the hub")],
)
def test_what_the_hub_refuses_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, kind: str, problem: str) -> None:
    import huggingface_hub
    from huggingface_hub import errors

    def refuse(*_: object, **__: object) -> None:
        # Built without __init__: the response it wants is of another HTTP library in every major release.
        raise getattr(errors, kind).__new__(getattr(errors, kind), "401\nwith a long explanation")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(InputError) as caught:
        sources.locate("llama-7bs/llama-7b")
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


def test_only_safe_files_are_asked_of_the_hub(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    import huggingface_hub

    asked: list[list[str]] = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(checkpoint)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    sources.fetch(sources.locate("someone/tiny"))
    assert asked[0] == ["config.json"]  # the shape costs one small file
    assert "*.safetensors" in asked[1]
    assert not any(pattern.endswith((".bin", ".py", ".pt", ".pth", "*")) for pattern in asked[1])


def test_locating_imports_nothing_heavy(checkpoint: Path) -> None:
    code = (
        "import sys; from shortllama import sources, planning, blind\n"
        "for name in sys.argv[1:]: sources.locate(name)\n"
        "heavy = {'torch', 'transformers', 'numpy', 'scipy', 'matplotlib', 'huggingface_hub', 'safetensors'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    names = ["llama-7b/flap-27", "qwen3-8b", str(checkpoint)]
    done = subprocess.run(
        [sys.executable, "-c", code, *names],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(sources.__file__).parent.parent)},
    )
    assert done.stdout.strip() == "[]"
