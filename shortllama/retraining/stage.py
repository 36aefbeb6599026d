"""One stage at work: a model made trainable, steps, evaluations, states, and the model as it came but for its weights.

Legend: B sequences, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from shortllama import costs, texts
from shortllama.errors import InputError
from shortllama.families import adapter
from shortllama.retraining import adapters, examples, objectives, state, weights
from shortllama.retraining.examples import Examples
from shortllama.retraining.objectives import Objective, Teacher
from shortllama.retraining.processes import Team
from shortllama.retraining.recipes import Recipe, Stage
from shortllama.retraining.record import Done, HeldOut
from shortllama.scores import Cost
from shortllama.stack import quiet

# progress(what, steps done, steps in all, loss of the last one)
Progress = Callable[[str, int, int, float], None]

# The held-out examples are evaluated before each of so many parts of a run, and at its end.
_EVALUATIONS = 4
# Steps in a row whose loss or gradient is not finite, after which a run is given up.
_PATIENCE = 5
# How far the first loss in training may be from that of the same examples evaluated one by one, relatively.
_AGREEMENT = {"float32": 1e-3, "bfloat16": 3e-2}
# How many examples of the first micro-batch that comparison takes.
_CHECKED = 8


@dataclass
class Run:
    """One stage on one model. `number`: which stage of its recipe, from 0; `folder`: where its state is kept."""

    model: Any
    stage: Stage
    data: Examples
    teacher: Teacher | None
    team: Team
    number: int
    folder: Path | None
    step: int = 0
    updates: int = 0
    refused: int = 0
    tokens: int = 0
    losses: list[float | None] = field(default_factory=list)
    held_out: list[HeldOut] = field(default_factory=list)
    trained: dict[str, nn.Parameter] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return adapter(self.model).embedding.weight.device

    def at(self) -> int:
        """How many steps are done."""
        return self.step

    def check(self) -> None:
        """Refuse what cannot work, before any work."""
        vocabulary = len(adapter(self.model).embedding.weight)
        if max(int(ids.max()) for ids in self.data.sequences) >= vocabulary:
            texts.check_vocabulary((ids.tolist() for ids in self.data.sequences), vocabulary, self.data.data.source)
        positions = getattr(self.model.config, "max_position_embeddings", None)
        if positions is not None and self.data.longest > positions:
            raise InputError(
                f"{self.data.data.source}: sequences of {self.data.longest} tokens, the model has positions for "
                f"{positions}; give --length {positions} or less, or shorter ids"
            )
        if (self.teacher is not None) != (self.stage.learns == "teacher"):
            raise InputError("a teacher is needed by recipes that learn from one, and by no other")
        if self.teacher is not None:
            self.teacher.check(self.model)

    # -- the whole stage ----------------------------------------------------------------------------------------------

    def go(self, recipe: Recipe, save_every_s: float, progress: Progress, *, last: bool) -> Done:
        """Prepare, train, and leave the model as it came but for its weights."""
        cost = costs.start(self.device)
        steps = self.stage.steps_over(len(self.data.training))
        stored = {name: parameter.dtype for name, parameter in self.model.named_parameters()}
        asked = {name: parameter.requires_grad for name, parameter in self.model.named_parameters()}
        identity = state.Identity(
            # What only divides the work differently may change when a run goes on.
            msgspec.structs.replace(self.stage, micro_batch=1, checkpointing=False),
            self.data.data.digest,
            weights.fingerprint(self.model),
            self.teacher and weights.fingerprint(self.teacher.model),
        )
        self.team.require_equal(identity.data, "data", self.device)
        objective = self._objective()
        with self._prepared(objective):
            optimizer = self._optimizer()
            before = self._resume(identity, optimizer)
            if not self.held_out:
                self._evaluate()

            def now() -> Cost:
                return msgspec.structs.replace(costs.joined(before, cost()), tokens=self.tokens)

            began, saved_s = self.step, 0.0
            try:
                while self.step < steps:
                    loss = self._take_step(objective, optimizer, steps)
                    progress(f"{recipe.name}: stage {self.number + 1} of {len(recipe.stages)}", self.step, steps, loss)
                    if (
                        self.step < steps
                        and self.step * _EVALUATIONS // steps > (self.step - 1) * _EVALUATIONS // steps
                    ):
                        self._evaluate()
                    spent_s = cost().wall_s
                    if spent_s - saved_s >= save_every_s and self.step < steps:
                        self._save(identity, optimizer, now())
                        saved_s = spent_s
            except KeyboardInterrupt:
                if self.updates == state.updates_of(optimizer):  # the weights are those of a whole step
                    self._save(identity, optimizer, now())
                raise
            if not last and self.step > began:
                self._save(identity, None, now())
            count = sum(parameter.numel() for parameter in self.trained.values())
        self._put_back(stored, asked)
        self._evaluate()
        weights.cast(self.model, stored)
        return Done(
            recipe=recipe.name,
            stage=self.stage,
            data=self.data.data,
            losses=tuple(self.losses),
            held_out=tuple(self.held_out),
            cost=now(),
            trained_parameters=count,
            processes=self.team.size,
            device=_device_name(self.device),
            torch=str(torch.__version__),
            teacher=self.teacher.name if self.teacher else None,
        )

    def _objective(self) -> Objective:
        if self.teacher is None:
            return objectives.tokens
        assert self.stage.temperature is not None
        return objectives.divergence(self.teacher, self.stage.temperature, self.stage.hidden or 0.0)

    @contextmanager
    def _prepared(self, objective: Objective) -> Generator[None]:
        """Make the model trainable for the block: types, adapters, checkpointing. Its outputs are then the same."""
        model, stage = self.model, self.stage
        if stage.trains == "all" or stage.dtype == "float32":
            weights.cast(model, {name: torch.float32 for name, _ in model.named_parameters()})
        first = self._micro_batches(0)[0][:_CHECKED]
        expected = self._evaluated(objective, examples.alone(first, self.data), self.data.targets(first))
        self._draw_from(stage.seed)
        if stage.trains == "lora":
            adapters.attach(model, stage)
        else:
            model.requires_grad_(True)
        self.trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
        if stage.checkpointing:
            weights.recompute_blocks(model, True)
        try:
            self._check_start(objective, first, expected)
            self.model.train()  # once: evaluations put modes back, and walking all modules is a share of a small step
            yield
        finally:
            if stage.checkpointing:
                weights.recompute_blocks(model, False)
            if stage.trains == "lora":
                adapters.merge(model)

    def _check_start(self, objective: Objective, first: list[int], expected: float) -> None:
        """Compare the loss that training begins with, padding and adapters included, with that of plain evaluation."""
        self.model.train()
        for module in self.model.modules():
            module.training = module.training and not isinstance(module, nn.Dropout)
        with torch.no_grad(), self._computing():
            seen = float(objective(self.model, *self._tensors(*examples.collate(first, self.data))))
        seen /= self.data.targets(first)
        assert self.stage.dtype is not None
        if not math.isfinite(expected) or abs(seen - expected) > _AGREEMENT[self.stage.dtype] * max(1.0, abs(expected)):
            raise InputError(
                f"before any update the loss in training is {seen:.6g}, in evaluation {expected:.6g}; they must agree, "
                "so this model cannot be retrained here; check its weights, or give --dtype float32"
            )

    def _put_back(self, stored: dict[str, torch.dtype], asked: dict[str, bool]) -> None:
        """Round what was trained to the dtypes that the model came in, and restore what asks for gradients."""
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(asked[name])
            parameter.grad = None
            parameter.data = parameter.data.to(stored[name]).to(parameter.dtype)

    # -- one step -----------------------------------------------------------------------------------------------------

    def _micro_batches(self, step: int) -> list[list[int]]:
        chosen = examples.batch_at(step, self.data.training, self.stage)
        return examples.micro_batches(chosen, self.data, self.stage.micro_batch)

    def _take_step(self, objective: Objective, optimizer: torch.optim.Optimizer, steps: int) -> float:
        """Do one step; return its loss, NaN where the step was refused."""
        pieces = self._micro_batches(self.step)
        targets = sum(map(self.data.targets, pieces))
        self.tokens += sum(len(self.data.sequences[one]) for chosen in pieces for one in chosen)
        loss = torch.zeros((), device=self.device)
        for index, chosen in enumerate(pieces):
            if index % self.team.size == self.team.rank:
                self._draw_from(_seed(self.stage.seed, self.step, index))
                with self._computing():
                    part = objective(self.model, *self._tensors(*examples.collate(chosen, self.data))) / targets
                part.backward()
                loss += part.detach()
        parameters = list(self.trained.values())
        self.team.add_gradients(parameters)
        self.team.add([loss])
        norm = nn.utils.clip_grad_norm_(parameters, self.stage.clip)
        value, size = torch.stack((loss, norm)).tolist()
        good = math.isfinite(value) and math.isfinite(size)
        if good:
            for group in optimizer.param_groups:
                group["lr"] = self.stage.rate * self.stage.factor(self.step, steps)
            optimizer.step()
            self.updates += 1
        optimizer.zero_grad(set_to_none=True)
        self.losses.append(value if good else None)
        self.step += 1
        self.refused = 0 if good else self.refused + 1
        if self.refused >= _PATIENCE:
            raise InputError(
                f"the loss ({value:g}) or its gradient ({size:g}) was not finite in {self.refused} steps in a row, "
                f"from step {self.step - self.refused}; nothing was written; give a lower --lr than "
                f"{self.stage.rate:g}, or --dtype float32"
            )
        return value if good else math.nan

    def _draw_from(self, seed: int) -> None:
        """Seed the generators in use; torch.manual_seed asks every kind of device, which takes longer than seeding."""
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _tensors(self, ids_BT: np.ndarray, counts_BT: np.ndarray) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(ids_BT).to(self.device), torch.from_numpy(counts_BT).to(self.device)

    def _computing(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.stage.dtype == "bfloat16")

    def _optimizer(self) -> torch.optim.Optimizer:
        decayed = [one for one in self.trained.values() if one.ndim >= 2]
        others = [one for one in self.trained.values() if one.ndim < 2]
        groups = [
            {"params": decayed, "weight_decay": self.stage.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        return torch.optim.AdamW(groups, lr=self.stage.rate, betas=self.stage.betas, fused=True)

    # -- evaluation ---------------------------------------------------------------------------------------------------

    def _evaluate(self) -> None:
        """Add the held-out cross-entropy at this step, if anything is held out."""
        held = [int(one) for one in self.data.held_out]
        if held:
            pieces = examples.micro_batches(held, self.data, self.stage.micro_batch)[self.team.rank :: self.team.size]
            batches = (examples.collate(piece, self.data) for piece in pieces)
            nll = self._evaluated(objectives.tokens, batches, self.data.targets(held), together=True)
            self.held_out.append(HeldOut(self.step, nll))

    def _evaluated(
        self,
        objective: Objective,
        batches: Iterable[tuple[np.ndarray, np.ndarray]],
        targets: int,
        *,
        together: bool = False,
    ) -> float:
        """Return an objective's mean over `targets` tokens in eval mode, summed over all processes if `together`."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        with quiet(self.model), torch.no_grad(), self._computing():
            for batch in batches:
                total += objective(self.model, *self._tensors(*batch)).double()
        if together:
            self.team.add([total])
        return float(total) / targets

    # -- going on later -----------------------------------------------------------------------------------------------

    def _save(self, identity: state.Identity, optimizer: torch.optim.Optimizer | None, cost: Cost) -> None:
        if self.folder is None or not self.team.leads:
            return
        now = state.State(identity, self.step, self.updates, tuple(self.losses), tuple(self.held_out), cost)
        state.write(self.folder, self.number, now, state.tensors_of(self.trained, optimizer))

    def _resume(self, identity: state.Identity, optimizer: torch.optim.Optimizer) -> Cost | None:
        """Go on from the newest state of this stage, if there is one; return what it has cost so far."""
        found = None if self.folder is None else state.read(self.folder, self.number, identity)
        if found is None:
            return None
        was, tensors = found
        self.step, self.updates, self.tokens = was.step, was.updates, was.cost.tokens
        self.losses, self.held_out = list(was.losses), list(was.held_out)
        state.restore(self.trained, optimizer, tensors, self.updates)
        return was.cost


def _seed(seed: int, step: int, index: int) -> int:
    """Return the seed of one micro-batch: the same whichever process runs it."""
    return int(np.random.SeedSequence((seed, 3, step, index)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
