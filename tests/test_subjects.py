"""Names become subjects: every form of the grammar, without torch and without weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import subjects
from bench.subjects import Subject
from shortllama import blind, catalogue, files
from shortllama.configs import config_of
from shortllama.errors import InputError
from shortllama.plans import shape_after
from shortllama.shape import ModelShape


@pytest.fixture
def folder(tmp_path: Path, tiny_shape: ModelShape) -> Path:
    """A checkpoint folder with a config only: no subject needs more to be resolved."""
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config_of(tiny_shape)))
    return path


def test_a_catalogue_name_has_random_weights_and_is_its_own_dense() -> None:
    assert subjects.resolve("llama-7b") == Subject("llama-7b", catalogue.lookup("llama-7b"), "llama-7b")


@pytest.mark.parametrize("name", ["llama-7b/depth-26", "llama-7b/depth:26", "llama-7b/flap-20", "llama-7b/ppl:0.25"])
def test_a_pruned_catalogue_shape_is_compared_with_its_model(name: str) -> None:
    found = subjects.resolve(name)
    assert (found.shape, found.dense) == (catalogue.lookup(name), "llama-7b")
    assert (found.folder, found.prune) == (None, None)


@pytest.mark.parametrize(("name", "neurons"), [("llama-7b/wanda-sp-20", 8832), ("llama-7b/width:26x10990", 11008)])
def test_the_aligned_twin_of_a_shape_has_its_neurons_rounded_up(name: str, neurons: int) -> None:
    plain, twin = subjects.resolve(name), subjects.resolve(f"{name}~64")
    assert {block.neurons for block in twin.shape.blocks} == {neurons}
    assert [block.query_heads for block in twin.shape.blocks] == [block.query_heads for block in plain.shape.blocks]
    assert (twin.name, twin.dense, twin.folder) == (f"{name}~64", "llama-7b", None)


def test_a_non_uniform_shape_is_aligned_block_by_block() -> None:
    plain, twin = (subjects.resolve(f"llama-7b/flap-27{end}").shape.blocks for end in ("", "~128"))
    for before, after in zip(plain, twin, strict=True):
        assert after.neurons % 128 == 0
        assert 0 <= after.neurons - before.neurons < 128
        assert after.query_heads == before.query_heads


def test_real_weights_are_not_aligned_by_name(folder: Path) -> None:
    with pytest.raises(InputError, match="--align"):
        subjects.resolve(f"{folder}~64")
    assert subjects.resolve(f"{folder}/width:2x40~64").folder is None


def test_a_folder_has_its_weights(folder: Path, tiny_shape: ModelShape) -> None:
    assert subjects.resolve(str(folder)) == Subject(str(folder), tiny_shape, str(folder), str(folder))


def test_a_blind_plan_on_real_weights_means_random_weights_of_that_shape(folder: Path, tiny_shape: ModelShape) -> None:
    found = subjects.resolve(f"{folder}/depth:3")
    assert len(found.shape.blocks) == 3
    assert (found.dense, found.folder, found.prune) == (str(folder), None, None)


@pytest.mark.parametrize(
    ("text", "method", "ratio"), [("ppl:0.25", "ppl", 0.25), ("wanda-sp:0.5", "wanda-sp", 0.5), ("mag:.5", "mag", 0.5)]
)
def test_a_method_on_real_weights_must_be_pruned_first(
    folder: Path, tiny_shape: ModelShape, text: str, method: str, ratio: float
) -> None:
    found = subjects.resolve(f"{folder}/{text}")
    plan = blind.parse(text, model="m", shape=tiny_shape)
    assert found.shape == shape_after(tiny_shape, plan.keep)
    assert found.prune == (str(folder), method, ratio)
    assert (found.dense, found.folder) == (str(folder), None)


def test_a_pruned_checkpoint_is_compared_with_the_base_of_its_plan(folder: Path, tiny_shape: ModelShape) -> None:
    plan = blind.parse("depth:3", model="some-base", shape=tiny_shape)
    (folder / "plan.json").write_bytes(files.encode_json(plan))
    assert subjects.resolve(str(folder)).dense == "some-base"


def test_a_folder_whose_name_looks_like_a_plan_is_a_folder(folder: Path) -> None:
    odd = folder.rename(folder.parent / "depth:3")
    assert subjects.resolve(str(odd)).folder == str(odd)


def test_ranges_are_written_out_and_names_met_twice_are_kept_once() -> None:
    names = ("llama-7b/depth:24..26", "llama-7b", "llama-7b/depth:25")
    assert subjects.expand(names) == ("llama-7b/depth:24", "llama-7b/depth:25", "llama-7b/depth:26", "llama-7b")
    assert list(subjects.resolve_all(names)) == list(subjects.expand(names))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lama-7b", "did you mean llama-7b"),
        ("llama-7b/depth:99", "between 1 and 32"),
        ("llama-7b/depth-27", "did you mean llama-7b/depth-26"),
        ("llama-7b/pplx:0.2", "pplx"),
        ("llama-7b/ppl:1.5", "1.5"),
        ("./nowhere", "not there"),
    ],
)
def test_what_is_not_understood_is_one_line_that_names_the_subject(name: str, expected: str) -> None:
    with pytest.raises(InputError) as error:
        subjects.resolve_all([name])
    assert f"subject {name!r}" in str(error.value)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)
