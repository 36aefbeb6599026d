"""Several processes that train one model: started by `accelerate launch` or torchrun, and told so by the environment.

Every process holds the whole model and takes every n-th micro-batch of each step. Gradients are added up once a step,
so that n processes do what one does, to the rounding of a sum. Nothing else of the project knows of it.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from shortllama.errors import InputError


@dataclass(frozen=True)
class Team:
    """This process among those that train together; the leader alone writes and speaks."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor, in place, by its sum over all processes."""
        if self.size > 1:
            from torch import distributed

            for work in [distributed.all_reduce(one, async_op=True) for one in tensors]:
                if work is not None:
                    work.wait()

    def add_gradients(self, parameters: Sequence[Parameter]) -> None:
        """Give every parameter the sum of its gradients; a process without a micro-batch has none of its own."""
        if self.size > 1:
            for parameter in parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            self.add(parameter.grad for parameter in parameters if parameter.grad is not None)

    def require_equal(self, digest: str, what: str, device: torch.device) -> None:
        """Raise InputError where the processes do not have the same thing, named by its digest."""
        if self.size > 1:
            number = int(digest[:12], 16)
            total = torch.tensor([number, number * self.rank], dtype=torch.int64, device=device)
            self.add([total])
            ranks = self.size * (self.size - 1) // 2
            if total.tolist() != [number * self.size, number * ranks]:
                raise InputError(f"the {self.size} processes see different {what}; give all of them the same files")

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            from torch import distributed

            distributed.barrier()


ALONE = Team()


def device_here() -> str:
    """Return the device of this process: its own CUDA device if there is one, else the CPU."""
    if not torch.cuda.is_available():
        return "cpu"
    index = int(os.environ.get("LOCAL_RANK", "0"))
    if index >= torch.cuda.device_count():
        raise InputError(
            f"process {index} on this machine has no GPU of its own: torch sees {torch.cuda.device_count()}; "
            "start as many processes as there are GPUs"
        )
    torch.cuda.set_device(index)
    return f"cuda:{index}"


@contextmanager
def joined(device: str) -> Generator[Team]:
    """Yield this process's team, for as long as the block lasts; a process started alone is one."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "MASTER_ADDR" not in os.environ:
        yield ALONE
        return
    from torch import distributed

    distributed.init_process_group("gloo" if device == "cpu" else "nccl")
    try:
        yield Team(distributed.get_rank(), distributed.get_world_size())
    finally:
        distributed.destroy_process_group()
