"""The verb `shapes`: what models cost, from integers alone."""

from __future__ import annotations

from typing import Annotated

import typer

from shortllama import blind, catalogue, console, display, options, sources
from shortllama.shape import item_bytes


def shapes(
    name: Annotated[
        str | None,
        typer.Argument(help="A model, a row of the catalogue, or a range such as llama-7b/depth:16..32."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="The type that weights and KV cache are priced in.")] = "float16",
    as_json: options.Json = False,
) -> None:
    """List the catalogue, or show what one shape costs: parameters, bytes, FLOPs, alignment. Needs no weights."""
    item_bytes(dtype)
    names = catalogue.names() if name is None else blind.expand(name)
    found = [(one, sources.locate(one).shape) for one in names]
    single = name is not None and len(found) == 1
    if as_json:
        documents = [display.shape_document(one, shape, dtype) for one, shape in found]
        console.emit(documents[0] if single else {"shapes": documents})
    elif single:
        display.show_shape(*found[0], dtype)
    else:
        display.show_shapes(found, dtype)
