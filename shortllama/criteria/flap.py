"""FLAP: how much the inputs of the output projections fluctuate, times the weights that read them (arXiv 2312.11983).

For an input channel j of o_proj or down_proj with fluctuation f_j over the calibration: IFV = f_j, WIFV = f_j * sum
over rows of W_ij^2 (the default), WIFN = mean over rows of |W_ij| * sqrt(mean over sequences of sum over tokens of
x_j^2). Attention's values are squared, as FLAP's code does; a query head has the sum of its channels, a KV group that
of its query heads.

The fluctuation is that of FLAP's code: with mu_k the running mean after k sequences, f_1 = 0 and

    f_k = f_(k-1) (k-2)/(k-1) + (sum over tokens of (x - mu_k)^2) / k

so the first sequence counts for the mean only, and sums over tokens are not divided by their number. (The code means
(x - mu_k)(x - mu_(k-1)), but updates the older mean in place.) `flap-exact` takes the true variance instead.

All blocks are measured in one forward pass of the dense model: unlike Wanda-sp, what feeds on is never pruned.
`details` holds what planning and bias compensation need: `attention_deviation`, the unbiased deviation of each block's
squared attention channels, and `means`, the mean inputs of `o` and `down`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from shortllama import variants
from shortllama.criteria import Measured, Task
from shortllama.criteria.weights import floats, per_group
from shortllama.errors import InputError

NAME = "flap"
UNITS = ("width",)
NEEDS = "calibration"

# The projections whose input channels are the heads' and the neurons' outputs.
OUTPUTS = ("o", "down")


class Statistic(Protocol):
    """What is known of a projection's inputs so far; each of shape (C,) float64."""

    mean_C: Tensor
    square_C: Tensor

    @property
    def fluctuation_C(self) -> Tensor:
        """How much each channel varies."""
        ...

    def add(self, x_TC: Tensor) -> None:
        """Take the inputs of one more sequence."""
        ...


class Published:
    """The running mean and fluctuation of FLAP's code; `square_C` is the mean over sequences of sum of x^2."""

    def __init__(self, channels: int, device: torch.device) -> None:
        self.mean_C, self.square_C, self.fluctuation_C = torch.zeros(3, channels, dtype=torch.float64, device=device)
        self.sequences = 0

    def add(self, x_TC: Tensor) -> None:
        """Take the inputs of one more sequence."""
        self.sequences += 1
        k = self.sequences
        self.mean_C = self.mean_C * ((k - 1) / k) + x_TC.mean(dim=0) / k
        self.square_C = self.square_C * ((k - 1) / k) + x_TC.square().sum(dim=0) / k
        if k > 1:
            centred = (x_TC - self.mean_C).square().sum(dim=0)
            self.fluctuation_C = self.fluctuation_C * ((k - 2) / (k - 1)) + centred / k


def score(task: Task) -> Measured:
    """Return scores of each block's KV groups and neurons, comparable within a block; higher = keep.

    Raises InputError for a single sequence, of which the published fluctuation is zero everywhere.
    """
    metric = variants.metric_of(task.variant)
    if task.sequences < 2 and metric != "WIFN":
        raise InputError(f"flap {metric} needs 2 calibration sequences or more, this has 1; give more --samples")
    return measure(task, Published)


@torch.no_grad()
def measure(task: Task, statistic: Callable[[int, torch.device], Statistic]) -> Measured:
    """Return scores and details from one forward pass, with inputs summed up by `statistic`."""
    metric = variants.metric_of(task.variant)
    projections = [_outputs(task, block) for block in task.adapter.blocks]
    done = 0
    with _watched(projections, statistic) as seen:
        for ids_BT in task.batches():
            task.stack.states(ids_BT)
            done += len(ids_BT)
            task.progress(done, task.sequences)
    groups, queries, neurons, deviations = [], [], [], []
    for size, linears, found in zip(task.shape.blocks, projections, seen, strict=True):
        columns = {name: _columns(metric, linears[name], found[name]) for name in linears}
        attention = columns["o"].square() if "o" in columns else torch.zeros(0)
        groups.append(floats(per_group(attention, size.kv_heads)))
        queries.append(floats(per_group(attention, size.query_heads)))
        deviations.append(attention.std().item() if len(attention) > 1 else 0.0)
        neurons.append(floats(columns["down"]) if "down" in columns else ())
    means = {name: [one[name].mean_C.tolist() if name in one else [] for one in seen] for name in OUTPUTS}
    details = {**task.variant.record(NAME), "attention_deviation": deviations, "means": means}
    return Measured(kv_groups=tuple(groups), neurons=tuple(neurons), query_heads=tuple(queries), details=details)


def _outputs(task: Task, block: nn.Module) -> dict[str, nn.Linear]:
    return {name: linear for name, linear in task.adapter.projections(block).items() if name in OUTPUTS}


@contextmanager
def _watched(
    projections: list[dict[str, nn.Linear]], statistic: Callable[[int, torch.device], Statistic]
) -> Generator[list[dict[str, Statistic]]]:
    """Collect a statistic of the inputs of each projection, sequence by sequence, while the model runs."""
    seen = [
        {name: statistic(linear.in_features, linear.weight.device) for name, linear in block.items()}
        for block in projections
    ]

    def hook(one: Statistic) -> Any:
        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            for x_TC in inputs[0]:
                one.add(x_TC.double())

        return add

    handles = [
        linear.register_forward_pre_hook(hook(found[name]))
        for block, found in zip(projections, seen, strict=True)
        for name, linear in block.items()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _columns(metric: str, linear: nn.Linear, found: Statistic) -> Tensor:
    """Return the metric of each input channel, (C,) float64."""
    if metric == "WIFN":
        return linear.weight.abs().mean(dim=0, dtype=torch.float64) * found.square_C.sqrt()
    if metric == "IFV":
        return found.fluctuation_C
    wide = torch.promote_types(linear.weight.dtype, torch.float32)
    return found.fluctuation_C * linear.weight.to(wide).square().sum(dim=0, dtype=torch.float64)
