"""Running out of memory is told apart from everything else that ends a cell."""

from __future__ import annotations

import signal

import pytest

from bench import outcomes

MIB = 1 << 20


CUBLAS = "RuntimeError: CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"
CASES = [
    ("RuntimeError: [enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory", {}, "oom"),
    ("OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.", {}, "oom"),
    ("AcceleratorError: CUDA error: out of memory", {}, "oom"),
    ("RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", {}, "oom"),
    (CUBLAS, {}, "oom"),
    ("RuntimeError: CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`", {}, "failed"),
    ("MemoryError: ", {}, "oom"),
    ("RuntimeError: could not create a primitive", {"limit_bytes": 8 * MIB}, "oom"),
    ("RuntimeError: could not create a primitive", {}, "failed"),
    ("RuntimeError: The size of tensor a (3) must match", {"limit_bytes": 8 * MIB}, "failed"),
    ("terminate called after throwing an instance of 'std::bad_alloc'", {"signal": signal.SIGABRT}, "oom"),
    (None, {"signal": signal.SIGABRT, "limit_bytes": 64 * MIB}, "oom"),
    (None, {"signal": signal.SIGABRT}, "failed"),
    (None, {"exit_code": 134, "limit_bytes": 64 * MIB}, "oom"),
    (None, {"signal": signal.SIGSEGV, "limit_bytes": 8 * MIB}, "oom"),
    (None, {"signal": signal.SIGSEGV, "limit_bytes": 64 * MIB}, "failed"),
    (None, {"signal": signal.SIGSEGV}, "failed"),
    (None, {"signal": signal.SIGKILL}, "oom"),
    (None, {"exit_code": 137}, "oom"),
    (None, {"exit_code": 70}, "failed"),
    ("", {"exit_code": 1}, "failed"),
    ("ValueError: out of range", {"exit_code": 1}, "failed"),
]


@pytest.mark.parametrize(("text", "more", "outcome"), CASES, ids=[f"{text}-{more}"[:60] for text, more, _ in CASES])
def test_failures_are_classified(text: str | None, more: dict, outcome: str) -> None:
    verdict = outcomes.classify(text, more.get("exit_code"), more.get("signal"), limit_bytes=more.get("limit_bytes"))
    assert verdict.outcome == outcome
    assert verdict.reason
    assert "\n" not in verdict.reason


def test_a_reason_is_one_line_of_bounded_length() -> None:
    assert outcomes.one_line(" a\n\tb  c ") == "a b c"
    assert len(outcomes.one_line("x" * 9999)) == 300
