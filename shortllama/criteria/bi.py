"""Block Influence (ShortGPT eq. 1, arXiv 2403.03853): how far a block turns the hidden state of a token.

One forward pass. The output of the last block is taken before the final norm (`hidden_states[-1]` of transformers is
after it, and would make the last block look important).
"""

from __future__ import annotations

import torch
from torch import Tensor

from shortllama.criteria import Measured, Task

NAME = "bi"
UNIT = "block"
NEEDS = "calibration"


@torch.no_grad()
def score(task: Task) -> Measured:
    """Return 1 - mean over all tokens of cos(input, output) of each block, in [0, 2]; higher = keep."""
    blocks = len(task.stack)
    total_L = torch.zeros(blocks, dtype=torch.float64)
    tokens = done = 0
    for ids_BT in task.batches():
        states, _ = task.stack.trace(ids_BT)
        for block in range(blocks):
            total_L[block] += cosine(states[block], states[block + 1]).sum(dtype=torch.float64).item()
        tokens += ids_BT.numel()
        done += len(ids_BT)
        task.progress(done, task.sequences)
    return Measured(blocks=tuple((1 - total_L / tokens).tolist()))


def cosine(left_BTD: Tensor, right_BTD: Tensor) -> Tensor:
    """Return (B, T) cosines, at least in float32; 0 where a vector is zero."""
    wide = torch.promote_types(left_BTD.dtype, torch.float32)
    return torch.nn.functional.cosine_similarity(left_BTD.to(wide), right_BTD.to(wide), dim=-1)
