"""Write a checkpoint of any widths as a uniform one that stock transformers loads: the same function, more zeros.

From file to file, one tensor in memory at a time; no model exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from shortllama import checkpoint, configs, files, tensorfile
from shortllama.exporting import MARK, Export
from shortllama.exporting.arrays import Opened, load, opened
from shortllama.exporting.padding import Placed, placements, uniform
from shortllama.tensorfile import Planned


def export(model: str | Path, out: Path) -> Export:
    """Write a folder's model padded to a uniform shape; returns the record. See `exporting.export`."""
    source = opened(model)
    after, config = uniform(source.shape, source.config)
    final = configs.finished(config, source.dtype)
    checkpoint.refuse_own_folder(out, source.folder)
    planned = [_planned(source, name, one) for name, one in placements(source.shape, after).items()]
    with files.new_folder(out, MARK) as folder:
        record = Export(
            form="padded",
            architecture=final["model_type"],
            dtype=source.dtype,
            parameters=after.parameters,
            source_parameters=source.shape.parameters,
            kv_bytes_per_token=after.kv_bytes_per_token(source.dtype),
            source_kv_bytes_per_token=source.shape.kv_bytes_per_token(source.dtype),
            shape_digest=after.digest(),
            source_shape_digest=source.shape.digest(),
            weights=tensorfile.write_folder(folder, planned, checkpoint.SHARD_BYTES),
            companions=checkpoint.copy_companions(source.folder, folder),
            version=checkpoint.package_version(),
        )
        files.write_atomically(folder / "config.json", files.encode_json(final))
        files.write_atomically(folder / MARK, files.encode_json(record))
    return record


def _planned(source: Opened, name: str, one: Placed) -> Planned:
    stored = source.tensors.get(one.source or "")
    code = stored.code if stored else tensorfile.NAMES[source.dtype]
    if stored is not None and stored.dimensions == one.dimensions:
        return Planned(name, code, one.dimensions, partial(tensorfile.cut, stored))
    return Planned(name, code, one.dimensions, partial(_pieces, source, one))


def _pieces(source: Opened, one: Placed) -> Iterator[memoryview]:
    values = load(source, one)
    if values.size:
        yield values.data.cast("B")
