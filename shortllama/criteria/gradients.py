"""The gradients of one block's weights, collected as the backward pass makes them, and nothing else of them.

A matrix's gradient is a product of what flows back into its output and what went into it. It is added up where it is
kept, (O, I), instead of being made first and then added, and the matrix need not ask autograd for anything: 16-bit
weights stay as they are, and are widened one at a time while they are used. Norms are few values: autograd has them.

Legend: B batch, T tokens, O outputs, I inputs, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from shortllama.stack import entering_replaced, forward_replaced


class Gradients(Protocol):
    """What becomes of the gradients of one block's weights, which come batch by batch, each at least in float32."""

    def add_product(self, weight: Tensor, back_BTO: Tensor, into_BTI: Tensor) -> None:
        """Take a matrix's gradient of one batch, (O, I): the sum over its positions of `back` times `into`."""
        ...

    def add(self, weight: Tensor, gradient: Tensor) -> None:
        """Take a norm's gradient of one batch."""
        ...

    def clear(self) -> None:
        """Let go of all gradients."""
        ...


class Sums:
    """The sum over batches: one block's gradients, and no other copy of any."""

    def __init__(self) -> None:
        self._sums: dict[Tensor, Tensor] = {}

    def add_product(self, weight: Tensor, back_BTO: Tensor, into_BTI: Tensor) -> None:
        """Add a matrix's gradient."""
        back, into = back_BTO.flatten(0, 1).T, into_BTI.flatten(0, 1)
        if weight in self._sums:
            self._sums[weight].addmm_(back, into)
        else:
            self._sums[weight] = back @ into

    def add(self, weight: Tensor, gradient: Tensor) -> None:
        """Add a norm's gradient."""
        self._sums[weight] = self._sums[weight] + gradient if weight in self._sums else gradient

    def of(self, weight: Tensor) -> Tensor:
        """Return the sum of a weight's gradients, of its shape and at least float32."""
        assert weight in self._sums, "every scored weight takes part in the forward pass"
        return self._sums[weight]

    def clear(self) -> None:
        """Let go of all gradients."""
        self._sums.clear()


class _Product(torch.autograd.Function):
    """A linear layer, in the precision of its inputs, that hands its weight's gradient over instead of returning it."""

    @staticmethod
    def forward(ctx: Any, into: Tensor, linear: nn.Linear, gradients: Gradients) -> Tensor:
        ctx.save_for_backward(into)
        ctx.linear, ctx.gradients = linear, gradients
        bias = None if linear.bias is None else linear.bias.to(into.dtype)
        return nn.functional.linear(into, linear.weight.to(into.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        (into,), (back,) = ctx.saved_tensors, outputs
        ctx.gradients.add_product(ctx.linear.weight, back, into)
        return back @ ctx.linear.weight.to(back.dtype), None, None


@contextmanager
def collected(block: nn.Module, weights: Iterable[nn.Parameter], gradients: Gradients) -> Generator[Callable[[], None]]:
    """Let `gradients` have those of the block's `weights` from every backward pass, made in float32 at least.

    Yields what must be called after each pass: it hands over those of the norms. The block is as it was afterwards.
    """
    scored = set(weights)
    linears = [module for module in block.modules() if isinstance(module, nn.Linear) and module.weight in scored]
    vectors = scored - {linear.weight for linear in linears}

    def take_vectors() -> None:
        for vector in vectors:
            if vector.grad is not None:
                gradients.add(vector, vector.grad)
                vector.grad = None

    with ExitStack() as restore:
        restore.enter_context(entering_replaced(block, _widen))
        for linear in linears:
            handed = _handing(linear, gradients)
            restore.enter_context(forward_replaced(linear, handed))
        for vector in vectors:
            restore.enter_context(_differentiable(vector))
        yield take_vectors


def _handing(linear: nn.Linear, gradients: Gradients) -> Callable[[Tensor], Tensor]:
    return lambda into: _Product.apply(into, linear, gradients)  # type: ignore[no-any-return]


def _widen(state_BTD: Tensor) -> Tensor:
    return state_BTD.to(torch.promote_types(state_BTD.dtype, torch.float32))


@contextmanager
def _differentiable(parameter: nn.Parameter) -> Generator[None]:
    """Let a parameter collect its gradient, in float32 where it is narrower; restore it afterwards."""
    data, gradient = parameter.data, parameter.grad
    try:
        parameter.grad = None
        parameter.data = _widen(data)
        parameter.requires_grad_(True)
        yield
    finally:
        parameter.requires_grad_(False)
        parameter.grad = None  # before the data: a gradient must have its parameter's dtype
        parameter.data = data
        parameter.grad = gradient
