"""Results made by hand for the tests of the report: small ones like `make report`, and all that could break a page.

Times follow a simple law (a launch cost per block plus bytes over bandwidth) with seeded noise, so that pictures look
like real ones and every expected number can be worked out.
"""

from __future__ import annotations

import random
from pathlib import Path

from bench.cells import Cell
from bench.measurement import Bounds, Environment, Measurement, Memory, Samples, SessionId, environment
from bench.store import Results
from shortllama.evaluation.results import Perplexity, Quality

MIB = 1 << 20
QUICK = {  # subject: (blocks, bytes of weights, parameters)
    "reference": (12, 7.4 * MIB, 1_900_000),
    "reference/ppl:0.25": (9, 5.7 * MIB, 1_470_000),
    "reference/taylor+:0.25": (9, 5.7 * MIB, 1_470_000),
    "reference/wanda-sp:0.25": (12, 5.9 * MIB, 1_520_000),
    "reference/mag-sp:0.25": (12, 5.8 * MIB, 1_490_000),
}
HOSTILE = (
    "reference",
    "reference/<script>alert(1)</script>",
    'reference/"onmouseover="alert(1)',
    "reference/$\\frac{1}{2}$ _a_ *b* `c` | d",
    "reference/" + "very-long-" * 30,
    "reference/نموذج‮evil",
    "reference/模型:🙂&amp;\x07\n=1+1",
)


def machine(name: str = "AMD EPYC 9254", date: str = "2026-11-22", threads: int = 1, **extra: object) -> Environment:
    """An environment as a sweep records it."""
    versions = {"torch": "2.13.0", "transformers": "5.23.0", "python": "3.11"}
    return environment(
        {"simulated": False, "device": name, "kind": "cpu", "threads": threads, "variables": {}, **versions, **extra},
        {"date": f"{date}T10:00:00+00:00", "commit": "0123abc4567-dirty", "load": 0.4},
    )


def row(cell: Cell, env: Environment, outcome: str = "ok", call_s: tuple[float, ...] = (), **extra) -> Measurement:
    """One row with what the harness always fills."""
    extra.setdefault("simulated", False)
    extra.setdefault("session", SessionId("s1"))
    return Measurement(cell, cell.id, env.id, outcome, samples=Samples(call_s=call_s), **extra)  # pyright: ignore


def sweep(
    subjects: dict[str, tuple[int, float, int]], runtimes: dict[str, float], batches: tuple[int, ...], *,
    env: Environment | None = None, budget: str = "48MiB", limit: float = 48 * MIB, outputs: tuple[int, ...] = (32,),
    kv: float = 6e3, launch: float = 6e-5, bandwidth: float = 6e9, simulated: bool = False, dtype: str = "float32",
    prompt: int = 12,
) -> Results:  # fmt: skip
    """A whole run. `runtimes`: a factor on the launch cost each; `kv`: bytes of cache per block and token."""
    env = env or machine()
    noise = random.Random(1)
    rows: list[Measurement] = []
    for runtime, factor in runtimes.items():
        for output in outputs:
            for subject, (blocks, weights, parameters) in subjects.items():
                witness = None
                for batch in batches:
                    cell = Cell(subject, runtime, dtype, "sdpa", prompt, output, budget, batch)
                    need = weights + batch * (prompt + output) * blocks * kv
                    memory = Memory(analytic=round(need))
                    if witness or need > limit:
                        outcome = "oom-implied" if witness else "oom"
                        reason = None if witness else "RuntimeError: DefaultCPUAllocator: can't allocate memory"
                        rows.append(row(cell, env, outcome, memory=memory, parameters=parameters, reason=reason,
                                        witness=witness, simulated=simulated))  # fmt: skip
                        witness = witness or cell.id
                        continue
                    moved = weights + batch * (prompt + output / 2) * blocks * kv
                    call = output * (blocks * launch * factor * (1 + batch / 40) + moved / bandwidth)
                    calls = tuple(float(f"{call * noise.lognormvariate(0.002, 0.012):.6g}") for _ in range(20))
                    memory = Memory(analytic=round(need), allocated=round(need * 1.02))
                    bounds = Bounds(
                        decode_bytes=round(moved), decode_flops=2 * parameters * batch, regime=None, why="x"
                    )
                    rows.append(row(cell, env, "ok", calls, memory=memory, parameters=parameters, stop="interval",
                                    bounds=bounds, simulated=simulated, warm_up=3, tokens=batch * output))  # fmt: skip
    return Results(Path("runs/quick"), {env.id: env}, tuple(rows), ())


def quick() -> tuple[Results, dict[str, Quality]]:
    """What `make report` measures: 5 subjects, 2 runtimes, 3 batches, a budget that ends in an OOM."""
    perplexities = dict(zip(QUICK, (18.3, 22.9, 21.4, 26.8, 41.2), strict=True))
    return sweep(QUICK, {"eager": 1.0, "static": 0.72}, (1, 8, 64), kv=1.7e3), {
        subject: Quality({"self": perplexity(value)}) for subject, value in perplexities.items()
    }


def perplexity(value: float) -> Perplexity:
    """A perplexity with a protocol."""
    import math

    return Perplexity(value, math.log(value), 4096, 32, 128, 128, "stream", "documents", "d" * 16)


def llama() -> tuple[Results, dict[str, Quality]]:
    """Shapes and batches of the paper's Figure 6 on a large card."""
    subjects = {
        "llama-7b": (32, 13.5e9, 6_738_000_000), "llama-7b/depth-26": (26, 11.0e9, 5_520_000_000),
        "llama-7b/depth-21": (21, 9.0e9, 4_510_000_000), "llama-7b/wanda-sp-20": (32, 10.9e9, 5_470_000_000),
        "llama-7b/flap-20": (32, 10.9e9, 5_440_000_000), "llama-7b/llm-pruner-20": (32, 10.8e9, 5_423_000_000),
    }  # fmt: skip
    env = machine("NVIDIA H100 80GB HBM3", threads=4)
    results = sweep(
        subjects, {"eager": 1.0, "static": 1.1, "paper": 1.35}, (1, 4, 16, 64, 128, 256), env=env, budget="none",
        limit=80e9, outputs=(128, 512), kv=16384, launch=4e-4, bandwidth=2.4e12, dtype="float16",
    )  # fmt: skip
    values = {"llama-7b": 12.6, "llama-7b/depth-26": 17.7, "llama-7b/wanda-sp-20": 21.4, "llama-7b/flap-20": 17.0}
    return results, {s: Quality({"wikitext2": perplexity(v), "ptb": perplexity(2 * v)}) for s, v in values.items()}


def hostile() -> tuple[Results, dict[str, Quality]]:
    """Names that would break a page that trusted them."""
    subjects = {name: (12 - i, 7e6, 1_900_000 - 100_000 * i) for i, name in enumerate(HOSTILE)}
    results = sweep(subjects, {"eager": 1.0}, (1, 8, 64), kv=1.7e3)
    return results, {name: Quality({"<b>text</b>": perplexity(20.0 + i)}) for i, name in enumerate(HOSTILE)}


def only_oom() -> Results:
    """A budget too small for anything."""
    return sweep(QUICK, {"eager": 1.0}, (1, 8), limit=1.0, budget="1MiB")


def one_cell() -> Results:
    """One subject, one batch, three repeats."""
    env = machine()
    cell = Cell("reference", "eager", "float32", "sdpa", 12, 32, "none", 1)
    return Results(Path("runs/one"), {env.id: env}, (row(cell, env, "ok", (0.2, 0.21, 0.22), tokens=32),), ())


def troubled() -> Results:
    """One cell of every outcome, and noise."""
    env = machine()
    outcomes = ("ok", "failed", "timed-out", "unstable", "skipped", "oom", "oom-implied")
    rows = []
    for i, outcome in enumerate(outcomes):
        cell = Cell("reference", "eager", "float32", "sdpa", 12, 32, "none", 2**i)
        calls = (0.2, 0.5, 0.3, 0.25, 0.4, 0.22, 0.6) if outcome in ("ok", "unstable") else ()
        reason = None if outcome == "ok" else f"why it was {outcome}"
        rows.append(row(cell, env, outcome, calls, reason=reason))
    return Results(Path("runs/troubled"), {env.id: env}, tuple(rows), ())


def two_devices() -> tuple[Results, Results]:
    """The same suite on two machines, one of them simulated."""
    subjects = dict(list(QUICK.items())[:3])
    first = sweep(subjects, {"eager": 1.0}, (1, 8, 64), kv=1.7e3)
    other = environment(
        {"simulated": True, "device": "NVIDIA L4", "kind": "simulated"}, {"date": "2026-11-20T09:00:00"}
    )
    second = sweep(subjects, {"roofline": 0.1}, (1, 8, 64), kv=1.7e3, env=other, simulated=True, bandwidth=3e11)
    return first, second
