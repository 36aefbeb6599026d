"""How text becomes the windows of a perplexity: four choices, the named sets of them, and how a source names one.

A source may carry its protocol: `wikitext2@2048`, `book.txt@window=512,stride=256`. Without one it is the paper's:
consecutive 128-token windows of one stream that begins with one BOS and joins documents by a blank line (section 4.1 of
Shortened LLaMA, arXiv 2402.02834). Short windows give larger values than the usual 2048 tokens: a difference of
context, not a defect. No torch, no text.
"""

from __future__ import annotations

import difflib
from typing import Literal

import msgspec

from shortllama import files
from shortllama.errors import InputError

Bos = Literal["stream", "window", "none"]
Layout = Literal["stream", "documents"]

MARK = "@"


class Protocol(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`window` tokens together, `stride` (default: `window`) tokens from one window to the next.

    With a smaller stride only tokens not yet predicted count, so that each is predicted once, with more context. `bos`:
    "stream" begins each text with one, "window" puts one before every window (which then predicts its first token too),
    "none"; by default "stream" where the tokenizer has a BOS. `layout`: "stream" joins documents by a blank line and
    cuts full windows; "documents" takes the first `window` tokens (a "stream" BOS included) of each.
    """

    window: int = 128
    stride: int | None = None
    bos: Bos | None = None
    layout: Layout = "stream"

    @property
    def step(self) -> int:
        """Tokens from the start of one window to the next."""
        return self.window if self.stride is None else self.stride


PROTOCOLS: dict[str, Protocol] = {
    "paper": Protocol(),
    "paper-bos": Protocol(bos="window"),  # the official code's second file; what Gemma's published values used
    "2048": Protocol(window=2048),  # what most later work reports
}
DEFAULT = PROTOCOLS["paper"]


def parse(src: str) -> tuple[str, Protocol]:
    """Return a source without its protocol, and the protocol: the paper's where none is named.

    Raises InputError for a name that is none of PROTOCOLS, an unknown key and a bad value.
    """
    bare, mark, text = src.rpartition(MARK)
    if not mark or "/" in text:  # an @ inside a path
        return src, DEFAULT
    if "=" not in text:
        if text not in PROTOCOLS:
            near = difflib.get_close_matches(text, PROTOCOLS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"use {', '.join(PROTOCOLS)} or window=512,stride=256"
            raise InputError(f"{src}: no protocol is called {text!r}; {hint}")
        return bare, PROTOCOLS[text]
    pairs = [part.partition("=") for part in text.split(",")]
    given = {key: value for key, _, value in pairs}
    try:
        found = msgspec.convert(given, Protocol, strict=False)
    except msgspec.ValidationError as error:
        raise InputError(f"{src}: {files.explain(error, given, Protocol)}") from error
    check(found, src)
    return bare, found


def check(protocol: Protocol, src: str) -> None:
    """Raise InputError where a protocol would predict nothing, or lose tokens."""
    window, stride = protocol.window, protocol.step
    if window < 2:
        raise InputError(f"{src}: window of {window} tokens; at least 2 are needed to predict one")
    if not 1 <= stride <= window:
        raise InputError(
            f"{src}: stride {stride} with window {window}; it must be between 1 and the window, or tokens are lost"
        )
    if protocol.layout == "documents" and stride != window:
        raise InputError(f"{src}: stride {stride}: documents are evaluated one window each; leave the stride out")
