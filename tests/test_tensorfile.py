"""Our safetensors reader and writer against the safetensors library, and against damaged files."""

from __future__ import annotations

import hashlib
import io
import json
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from shortllama import digests, tensorfile
from shortllama.digests import digest_of
from shortllama.errors import InputError
from shortllama.tensorfile import Planned

ARRAYS = {
    "matrix": np.arange(5 * 7, dtype=np.float32).reshape(5, 7),
    "halves": np.linspace(-1, 1, 24, dtype=np.float16).reshape(4, 6),
    "vector": np.arange(9, dtype=np.float64),
    "empty": np.zeros((3, 0), dtype=np.float32),
}
CODES = {"float64": "F64", "float32": "F32", "float16": "F16"}


def planned(arrays: dict[str, np.ndarray]) -> list[Planned]:
    return [
        Planned(name, CODES[array.dtype.name], array.shape, partial(lambda data: [data], array.tobytes()))
        for name, array in arrays.items()
    ]


def content(one: tensorfile.Stored) -> bytes:
    target = bytearray(one.end - one.start)
    tensorfile.read(one, memoryview(target))
    return bytes(target)


def test_the_library_reads_what_we_write(tmp_path: Path):
    written = tensorfile.write_folder(tmp_path, planned(ARRAYS), 10**9)
    read = load_file(tmp_path / tensorfile.SINGLE)
    assert read.keys() == ARRAYS.keys()
    assert all(np.array_equal(read[name], ARRAYS[name]) and read[name].dtype == ARRAYS[name].dtype for name in ARRAYS)
    assert written == {tensorfile.SINGLE: digest_of(tmp_path / tensorfile.SINGLE)}


def test_we_read_what_the_library_writes(tmp_path: Path):
    save_file(ARRAYS, tmp_path / tensorfile.SINGLE, metadata={"format": "pt"})
    found = tensorfile.in_folder(tmp_path)
    assert {name: (one.code, one.dimensions) for name, one in found.items()} == {
        name: (CODES[array.dtype.name], array.shape) for name, array in ARRAYS.items()
    }
    assert all(content(found[name]) == ARRAYS[name].tobytes() for name in ARRAYS)


def test_shards_are_indexed_and_read_as_one(tmp_path: Path):
    tensorfile.write_folder(tmp_path, planned(ARRAYS), 150)
    index = json.loads((tmp_path / tensorfile.INDEX).read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert shards == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in ARRAYS.values())
    found = tensorfile.in_folder(tmp_path)
    assert all(content(found[name]) == ARRAYS[name].tobytes() for name in ARRAYS)
    assert all(load_file(tmp_path / shard) for shard in shards)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), rows=st.integers(1, 9), columns=st.integers(1, 6), chunk=st.integers(1, 80))
def test_cut_equals_indexing_in_pieces_of_any_size(
    tmp_path: Path, data: st.DataObject, rows: int, columns: int, chunk: int
):
    array = np.arange(rows * columns, dtype=np.float32).reshape(rows, columns)
    save_file({"x": array}, tmp_path / tensorfile.SINGLE)
    one = tensorfile.in_folder(tmp_path)["x"]
    kept = [data.draw(st.none() | st.sets(st.integers(0, n - 1)).map(sorted).map(tuple)) for n in (rows, columns)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensorfile.rows, "__defaults__", (chunk,))
        found = b"".join(bytes(piece) for piece in tensorfile.cut(one, *kept))
    taken = array[list(range(rows) if kept[0] is None else kept[0])]
    assert found == taken[:, list(range(columns) if kept[1] is None else kept[1])].tobytes()


class Slow:
    """A digest that lags behind the writing."""

    def __init__(self) -> None:
        self.real = hashlib.sha256()

    def update(self, piece: bytes) -> None:
        time.sleep(0.003)
        self.real.update(piece)

    def hexdigest(self) -> str:
        return self.real.hexdigest()


def test_a_digest_that_lags_behind_still_sees_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Buffers are used in turn; one that is filled again before it was digested would change the digest."""
    array = np.random.default_rng(0).random((40, 16), dtype=np.float32)
    save_file({"x": array, "y": array[::-1].copy()}, tmp_path / tensorfile.SINGLE)
    found = tensorfile.in_folder(tmp_path)
    monkeypatch.setattr(tensorfile.rows, "__defaults__", (2 * found["x"].row_bytes,))
    monkeypatch.setattr(digests, "hashlib", SimpleNamespace(sha256=Slow))
    monkeypatch.setattr(digests, "_SENT_BYTES", 300)
    cut = [Planned(name, one.code, one.dimensions, partial(tensorfile.cut, one)) for name, one in found.items()]
    (tmp_path / "out").mkdir()
    written = tensorfile.write_folder(tmp_path / "out", cut, 10**9)
    monkeypatch.undo()
    file = tmp_path / "out" / tensorfile.SINGLE
    assert written == {tensorfile.SINGLE: hashlib.sha256(file.read_bytes()).hexdigest()}
    assert np.array_equal(load_file(file)["y"], array[::-1])


def test_a_write_that_takes_part_of_a_piece_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Sipping(io.FileIO):
        def write(self, data: Any) -> int:
            return super().write(memoryview(data)[:5])

    monkeypatch.setattr(Path, "open", lambda path, *_, **__: Sipping(path, "w"))
    assert (
        digests.write_digested(tmp_path / "file", [b"some bytes ", b"more"])
        == hashlib.sha256(b"some bytes more").hexdigest()
    )
    monkeypatch.undo()
    assert (tmp_path / "file").read_bytes() == b"some bytes more"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_file_that_was_cut_off_anywhere_is_refused_in_one_line(tmp_path: Path, share: float):
    save_file(ARRAYS, tmp_path / tensorfile.SINGLE)
    whole = (tmp_path / tensorfile.SINGLE).read_bytes()
    (tmp_path / tensorfile.SINGLE).write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(InputError, match="not a whole safetensors file") as caught:
        tensorfile.in_folder(tmp_path)
    assert "\n" not in str(caught.value)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 250), value=st.integers(0, 255))
def test_a_damaged_header_is_refused_or_harmless(tmp_path: Path, position: int, value: int):
    save_file(ARRAYS, tmp_path / tensorfile.SINGLE)
    damaged = bytearray((tmp_path / tensorfile.SINGLE).read_bytes())
    damaged[position] = value
    (tmp_path / tensorfile.SINGLE).write_bytes(damaged)
    try:
        found = tensorfile.in_folder(tmp_path)
    except InputError:
        return
    for one in found.values():
        if one.code in tensorfile.DTYPES:
            content(one)


@pytest.mark.parametrize(
    "text",
    [
        b"[]",
        b'{"x":3}',
        b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0]}}',
        b'{"x":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}',
        b'{"x":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}',
        b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}',
        b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"y":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        b"\xff\xfe",
    ],
)
def test_headers_that_lie_are_refused(tmp_path: Path, text: bytes):
    (tmp_path / tensorfile.SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(InputError, match="not a whole safetensors file"):
        tensorfile.in_folder(tmp_path)


def test_pickled_weights_are_never_read(tmp_path: Path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(InputError, match=r"holds pytorch_model.bin but no safetensors; pickles are never loaded"):
        tensorfile.in_folder(tmp_path)
    with pytest.raises(InputError, match="expected a folder with safetensors weights"):
        tensorfile.in_folder(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("document", "says"),
    [
        ('{"weight_map": {"x": "absent.safetensors"}}', "absent.safetensors: cannot be read"),
        ('{"weight_map": {"x": "../model.safetensors"}}', "not a plain file name"),
        ('{"weight_map": {"x": "one.safetensors"}}', "tensor 'x' is not in one.safetensors"),
        ('{"weight_map": {}}', "no weight_map"),
        ('{"weight_map"', "not readable"),
    ],
)
def test_a_bad_index_is_refused(tmp_path: Path, document: str, says: str):
    save_file(ARRAYS, tmp_path / "one.safetensors")
    (tmp_path / tensorfile.INDEX).write_text(document)
    with pytest.raises(InputError, match=says):
        tensorfile.in_folder(tmp_path)


def test_a_file_that_shrinks_while_it_is_read_is_noticed(tmp_path: Path):
    save_file(ARRAYS, tmp_path / tensorfile.SINGLE)
    found = tensorfile.in_folder(tmp_path)
    (tmp_path / tensorfile.SINGLE).write_bytes(b"")
    with pytest.raises(InputError, match="bytes early"):
        list(tensorfile.cut(found["matrix"]))
