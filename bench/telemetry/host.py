"""Reads the host and one process on it with psutil: CPU time, resident memory, clocks."""

from __future__ import annotations

from collections.abc import Callable

import psutil

Read = tuple[dict[str, float], dict[str, str]]


class Host:
    """Reads a process, if one is named, and the machine around it."""

    def __init__(self, pid: int | None) -> None:
        self._pid = pid
        self._process: psutil.Process | None = None

    def read(self, *, slow: bool) -> Read:
        """Return quantities, and why others could not be read; `slow` asks for what costs more, too."""
        values: dict[str, float] = {}
        missing: dict[str, str] = {}
        questions: list[tuple[tuple[str, ...], Callable[[], tuple[float, ...]]]] = []
        if self._pid is not None:
            questions.append((("cpu_s", "rss_bytes"), self._of_process))
        if slow:
            questions += [(("host_busy_s", "host_s"), _of_host), (("cpu_mhz",), _clock)]
        for names, ask in questions:
            try:
                values.update(zip(names, ask(), strict=True))
            except psutil.NoSuchProcess:
                missing.update(dict.fromkeys(names, "the measured process ended"))
            except (psutil.Error, OSError, NotImplementedError) as error:
                missing.update(dict.fromkeys(names, f"psutil: {error}"))
        return values, missing

    def _of_process(self) -> tuple[float, float]:
        if self._process is None:
            self._process = psutil.Process(self._pid)
        with self._process.oneshot():
            times = self._process.cpu_times()
            return times.user + times.system, float(self._process.memory_info().rss)


def _of_host() -> tuple[float, float]:
    times = psutil.cpu_times()
    # Linux counts guests in user and nice already.
    every = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
    return every - times.idle - getattr(times, "iowait", 0.0), every


def _clock() -> tuple[float]:
    found = psutil.cpu_freq()
    if found is None or not found.current:
        raise OSError("this host does not say its clocks")
    return (float(found.current),)
