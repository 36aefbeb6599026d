"""A causal language model as a stack of residual blocks: trace it once, then resume anywhere.

Every forward criterion needs the hidden state that enters a block, and to go on from it with some blocks left out.
Both are done through the model's own forward, with the skipped blocks made transparent for the call, so that masks,
positions, per-layer types, the final norm and any scaling of the logits stay the family's own code. The tail (final
norm and output head) runs as part of it. Knows no criterion and no scores.

Legend: B batch, T tokens, D hidden, V vocabulary, L blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from shortllama import families
from shortllama.families import check_steady, lookup

if TYPE_CHECKING:
    from shortllama.families import Adapter


class _Stop(Exception):
    """Leaves a forward pass early, carrying the hidden state."""

    def __init__(self, hidden_BTD: Tensor) -> None:
        super().__init__()
        self.hidden_BTD = hidden_BTD


def _entering(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the hidden state that a module is called with."""
    return args[0] if args else kwargs["hidden_states"]


def hidden_of(output: Any) -> Tensor:
    """Return the hidden state of a block's output, which is a tensor or a tuple that begins with it."""
    return output[0] if isinstance(output, tuple) else output


def _returned(hidden_BTD: Tensor | None, outputs: int) -> Any:
    """Return a hidden state as a block of so many outputs does, the others empty."""
    return hidden_BTD if outputs == 1 else (hidden_BTD, *[None] * (outputs - 1))


class Stack:
    """A model and its blocks, in order. The model is used as it is: call it inside `quiet` to score."""

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module]) -> None:
        self.model = model
        self.blocks = tuple(blocks)
        self._outputs = lookup(model.config.model_type).block_outputs  # type: ignore[union-attr]

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def device(self) -> torch.device:
        """The device that token ids must be on: the embedding's."""
        embedding: Any = self.model.get_input_embeddings()  # type: ignore[operator]
        return embedding.weight.device

    def trace(self, ids_BT: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the L + 1 hidden states (B, T, D) and the logits (B, T, V) of one full pass.

        State i enters block i; state L leaves the last block, before the final norm (unlike `hidden_states[-1]` of
        transformers, which is after it).
        """
        states: list[Tensor] = []

        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states.append(_entering(args, kwargs))

        def leave(_: nn.Module, __: Any, output: Any) -> None:
            states.append(hidden_of(output))

        with ExitStack() as hooks:
            for block in self.blocks:
                handle = block.register_forward_pre_hook(enter, with_kwargs=True)
                hooks.callback(handle.remove)
            hooks.callback(self.blocks[-1].register_forward_hook(leave).remove)
            logits_BTV = self._call(ids_BT)
        assert len(states) == len(self) + 1, "a block ran more than once or not at all"
        return states, logits_BTV

    def states(self, ids_BT: Tensor) -> list[Tensor]:
        """Return the L + 1 hidden states of `trace` from one pass that ends with the last block: no tail, no logits."""
        states: list[Tensor] = []
        self.watch(ids_BT, states.append)
        return states

    def watch(self, ids_BT: Tensor, see: Callable[[Tensor], None]) -> None:
        """Call `see` with each of the L + 1 hidden states, in order, while that pass goes on; none is kept here."""

        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            see(_entering(args, kwargs))

        with ExitStack() as hooks:
            for block in self.blocks:
                hooks.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
            see(self._until(ids_BT, len(self) - 1))

    def resume(self, ids_BT: Tensor, hidden_BTD: Tensor | None, at: int) -> Tensor:
        """Return the logits (B, T, V) of going on at block `at` as if `hidden_BTD` entered it; L runs only the tail.

        At 0 the hidden state is the embedding's own and must be None. Exactly L - `at` blocks are computed.
        """
        with self._enter_at(hidden_BTD, at):
            return self._call(ids_BT)

    def advance(self, ids_BT: Tensor, hidden_BTD: Tensor | None, at: int) -> Tensor:
        """Return what leaves block `at`, as (B, T, D), when `hidden_BTD` enters it; no other block and no tail runs."""

        with self._enter_at(hidden_BTD, at):
            return self._until(ids_BT, at)

    def _until(self, ids_BT: Tensor, last: int) -> Tensor:
        """Return what leaves block `last` of a pass that ends there."""

        def leave(_: nn.Module, __: Any, output: Any) -> None:
            raise _Stop(hidden_of(output))

        handle = self.blocks[last].register_forward_hook(leave)
        try:
            self._call(ids_BT)
        except _Stop as stop:
            return stop.hidden_BTD
        finally:
            handle.remove()
        raise AssertionError("the block did not run")

    def _call(self, ids_BT: Tensor) -> Tensor:
        return self.model(input_ids=ids_BT, use_cache=False).logits

    @contextmanager
    def _enter_at(self, hidden_BTD: Tensor | None, at: int) -> Generator[None]:
        """Make the first `at` blocks return `hidden_BTD` without computing anything."""
        assert (hidden_BTD is None) == (at == 0), "a hidden state enters every block but the first"

        def transparent(*_: Any, **__: Any) -> Any:
            return _returned(hidden_BTD, self._outputs)

        with ExitStack() as restore:
            for block in self.blocks[:at]:
                restore.enter_context(forward_replaced(block, transparent))
            yield


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Generator[None]:
    """Shadow the module's forward; its type, attributes and hooks stay, which families read while they iterate."""
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.forward  # type: ignore[misc]


@contextmanager
def entering_replaced(block: nn.Module, change: Callable[[Tensor], Tensor]) -> Generator[None]:
    """Let a block be called with `change` of the hidden state that enters it."""

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden_BTD = change(_entering(args, kwargs))
        return ((hidden_BTD, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden_BTD})

    handle = block.register_forward_pre_hook(enter, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def left_out(adapter: Adapter, block: nn.Module, part: str) -> Generator[None]:
    """Let a block ("block"), or only its "attention" or "mlp", compute nothing and add nothing to the residual stream.

    The outputs are exactly those of the model without that part and its norm: x + 0 is x.
    """
    module: Any = {"block": lambda _: block, "attention": adapter.attention, "mlp": adapter.mlp}[part](block)
    assert module is not None, f"the block has no {part} to leave out"

    def nothing(*args: Any, **kwargs: Any) -> Any:
        hidden_BTD = _entering(args, kwargs)
        if part == "block":
            return _returned(hidden_BTD, adapter.family.block_outputs)
        added_BTD = torch.zeros_like(hidden_BTD)
        return (added_BTD, None) if part == "attention" else added_BTD

    with forward_replaced(module, nothing):
        yield


@contextmanager
def quiet(model: nn.Module) -> Generator[None]:
    """Put the model in eval mode with no gradients asked for, and restore training mode and every flag afterwards.

    A norm that the first block applies to the embeddings runs with them, so that all blocks are alike. Raises
    UnsupportedError for a model whose forward would change its weights.
    """
    check_steady(model)
    training = {module: module.training for module in model.modules()}
    asked = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    for parameter in asked:
        parameter.requires_grad_(False)
    try:
        with _embeddings_normed(model):
            yield
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)
        for module, flag in training.items():
            module.training = flag


@contextmanager
def counted(blocks: Sequence[nn.Module]) -> Generator[Callable[[], int]]:
    """Yield a function that returns how many tokens have gone through the blocks: a token in one block counts 1.

    Blocks that are made transparent compute nothing and do not count: their forward is not the one they had.
    """
    tokens = 0
    own = {block: vars(block).get("forward") for block in blocks}

    def count(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal tokens
        if vars(block).get("forward") is own[block]:
            tokens += _entering(args, kwargs)[..., 0].numel()

    with ExitStack() as hooks:
        for block in blocks:
            hooks.callback(block.register_forward_pre_hook(count, with_kwargs=True).remove)
        yield lambda: tokens


@contextmanager
def _embeddings_normed(model: nn.Module) -> Generator[None]:
    """Let the norm that the first block applies to the embeddings, if there is one, run behind the embedding."""
    parts = families.adapter(model)
    name = parts.family.entry_norm
    if name is None:
        yield
        return
    first = parts.blocks[0]
    norm = first.get_submodule(name)
    handle = parts.embedding.register_forward_hook(lambda _, __, output: norm(output))
    setattr(first, name, nn.Identity())
    try:
        yield
    finally:
        setattr(first, name, norm)
        handle.remove()


def token_nll(logits_BTV: Tensor, ids_BT: Tensor) -> Tensor:
    """Return the negative log-likelihood in nats of each token but the first, (B, T - 1), at least in float32."""
    wide = torch.promote_types(logits_BTV.dtype, torch.float32)
    flat = logits_BTV[:, :-1].to(wide).flatten(0, 1)
    targets = ids_BT[:, 1:].to(flat.device)
    return nn.functional.cross_entropy(flat, targets.flatten(), reduction="none").view(targets.shape)
