"""A simulated device: the analytic model behind the runtimes' protocol, with a virtual clock and a memory limit.

It is the planner for hardware that is not at hand (`--device rtx3090`), and the test double of the runner: a `Script`
injects noise and faults, seeded. Times are predictions and every row made with them says `simulated`.
"""

from __future__ import annotations

import fnmatch
import math
import os
import random
import signal
import time

import msgspec

from bench import memory, physics, prediction
from bench.cells import Cell
from bench.devices import Device, lookup
from bench.measurement import Graphs
from bench.runtimes.protocol import Call, Options, OutOfMemory
from bench.subjects import Subject
from shortllama import files

NAME = "roofline"
SIMULATED = True
SCRIPT_VARIABLE = "SHORTLLAMA_ROOFLINE"  # a Script as JSON, for faults in child processes


class Script(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What goes wrong, and how noisy the device is. Batches are those at and above which a fault strikes; 0 = never.

    `noise`: standard deviation of the log of each call; `drift`: the same for a whole session; `slow`: factor on every
    time; `tail`: share of calls stretched by an exponential of mean 5 noise. `oom_from` fails as an allocation does,
    `fail_from` raises RuntimeError, `hang_from` never returns, `crash_from` ends the process: with exit code
    `crash_code`, or by signal -crash_code where it is negative. `subject` limits all of it to names of that pattern.
    """

    seed: int = 0
    noise: float = 0.0
    drift: float = 0.0
    tail: float = 0.0
    slow: float = 1.0
    oom_from: int = 0
    fail_from: int = 0
    hang_from: int = 0
    crash_from: int = 0
    crash_code: int = 70
    subject: str = "*"


def script_from_environment() -> Script:
    """Return the Script in the variable SHORTLLAMA_ROOFLINE; the faultless one where it is not set."""
    text = os.environ.get(SCRIPT_VARIABLE)
    return files.decode_json(text.encode(), Script, SCRIPT_VARIABLE) if text else Script()


def open_session(subject: Subject, options: Options, script: Script | None = None) -> RooflineSession:
    """Return a session of `subject` on the device that `options.device` names in the table.

    Raises OutOfMemory where not even the weights fit, InputError for an unknown device.
    """
    chosen = script_from_environment() if script is None else script
    if not fnmatch.fnmatchcase(subject.name, chosen.subject):
        chosen = Script(seed=chosen.seed)
    return RooflineSession(subject, options, lookup(options.device), chosen)


class RooflineSession:
    """A subject on a simulated device."""

    def __init__(self, subject: Subject, options: Options, device: Device, script: Script) -> None:
        self._subject, self._options, self._device, self._script = subject, options, device, script
        budget = options.budget_bytes
        self._limit = device.memory_bytes if budget is None else min(budget, device.memory_bytes)
        self._rate = device.rate(options.dtype)
        self._overheads = prediction.overheads(NAME, device)
        self._random = random.Random(f"{script.seed} {subject.name} {options}")
        self._session_factor = math.exp(self._random.gauss(0, script.drift)) * script.slow
        self._now = 0.0
        self._cell: Cell | None = None
        self._allocate(subject.shape.weight_bytes(options.dtype))

    def clock(self) -> float:
        """Return the virtual seconds spent so far."""
        return self._now

    def prepare(self, batch: int, prompt: int, output: int) -> None:
        """Choose the cell. Raises OutOfMemory where its inputs and cache do not fit beside the weights."""
        options = self._options
        self._cell = Cell(self._subject.name, NAME, options.dtype, options.attention, prompt, output, "none", batch)
        cache = batch * (prompt + output - 1) * self._subject.shape.kv_bytes_per_token(options.dtype)
        self._strike(batch)
        self._allocate(self._subject.shape.weight_bytes(options.dtype) + cache)

    def call(self) -> Call:
        """Advance the virtual clock by one generation and return its times."""
        cell = self._reach_peak()
        factor = self._session_factor * self._noise()
        prefill = self._prefill_s(cell) * factor
        steps = tuple(self._step_s(cell, cell.prompt + i) * factor for i in range(cell.output - 1))
        total = prefill + math.fsum(steps)
        self._now += total
        return Call(total, prefill, steps, cell.batch * cell.output, total)

    def probe(self) -> None:
        """Reach the cell's peak memory and advance the clock by one prefill and one step."""
        cell = self._reach_peak()
        self._now += self._prefill_s(cell) + self._step_s(cell, cell.prompt + cell.output - 2)

    def graphs(self) -> Graphs | None:
        """Nothing runs here."""
        return None

    def kernel_seconds(self) -> float | None:
        """Nothing runs here."""
        return None

    def operations(self) -> dict[str, int] | None:
        """Nothing runs here."""
        return None

    def generate(self, prompt_ids: list[list[int]], output: int) -> list[list[int]]:
        """Return token ids that depend on the prompt alone: there is no model here, so they mean nothing."""
        vocabulary = self._subject.shape.vocabulary
        return [[(sum(row) + 7919 * (i + 1)) % vocabulary for i in range(output)] for row in prompt_ids]

    def close(self) -> None:
        """Forget the cell."""
        self._cell = None

    def peak_bytes(self) -> int:
        """Return the analytic peak of the prepared cell: what a device would report as allocated."""
        assert self._cell is not None, "prepare() comes first"
        cell = self._cell
        return memory.of_cell(self._subject.shape, cell)

    # -- the model -----------------------------------------------------------------------------------------------------

    def _reach_peak(self) -> Cell:
        assert self._cell is not None, "prepare() comes first"
        self._allocate(self.peak_bytes())
        return self._cell

    def _prefill_s(self, cell: Cell) -> float:
        cost = physics.costs(self._subject.shape, cell.dtype)
        roof = max(physics.prefill_s(cost, self._device.bandwidth, self._rate, cell.batch, cell.prompt))
        return roof / self._overheads.efficiency + self._launch_s()

    def _step_s(self, cell: Cell, context: int) -> float:
        cost = physics.costs(self._subject.shape, cell.dtype)
        roof = max(physics.step_s(cost, self._device.bandwidth, self._rate, cell.batch, context))
        return roof / self._overheads.efficiency + self._launch_s()

    def _launch_s(self) -> float:
        return self._overheads.block_s * len(self._subject.shape.blocks) + self._overheads.step_s

    def _noise(self) -> float:
        script = self._script
        log_factor = self._random.gauss(0, script.noise)
        if script.tail and self._random.random() < script.tail:
            log_factor += self._random.expovariate(1 / (5 * script.noise)) if script.noise else 0.0
        return math.exp(log_factor)

    def _allocate(self, size: int) -> None:
        if size > self._limit:
            raise OutOfMemory(f"simulated {self._device.short}: out of memory: {size} bytes of {self._limit}")

    def _strike(self, batch: int) -> None:
        """Do what the script has for this batch."""
        script = self._script
        if script.oom_from and batch >= script.oom_from:
            raise OutOfMemory(f"simulated {self._device.short}: out of memory: injected at batch {batch}")
        if script.fail_from and batch >= script.fail_from:
            raise RuntimeError(f"simulated failure at batch {batch}")
        if script.crash_from and batch >= script.crash_from:
            if script.crash_code < 0:
                os.kill(os.getpid(), -script.crash_code)
                signal.pause()
            os._exit(script.crash_code)
        while script.hang_from and batch >= script.hang_from:
            time.sleep(60)
