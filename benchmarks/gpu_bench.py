"""What the groups of `gpu.py` share: timing, JSON lines, and failures that are lines too."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

import ldm.errors

Arm = Callable[[], object]
PEAK_TFLOPS = 790.0
"""bf16 products of an H200 as measured with random data; `calibrate` says what this one does."""


@dataclass
class Bench:
    """Where and how things are measured."""

    device: torch.device
    is_smoke: bool
    repeats: int
    peak: float = PEAK_TFLOPS

    @property
    def has_gpu(self) -> bool:
        """Whether graphs, events and the kernels of GPUs exist here."""
        return self.device.type == "cuda"

    def size(self, full: Any, small: Any) -> Any:
        """The full size, or the small one in a smoke run."""
        return small if self.is_smoke else full

    def timed(self, arms: dict[str, Arm]) -> dict[str, float]:
        """Median milliseconds of every arm, A B B A ..., after five calls of each."""
        for arm in arms.values():
            for _ in range(1 if self.is_smoke else 5):
                arm()
        found: dict[str, list[float]] = {name: [] for name in arms}
        for turn in range(self.repeats):
            for name in list(arms)[:: 1 if turn % 2 == 0 else -1]:
                found[name].append(self._milliseconds(arms[name]))
        return {name: statistics.median(values) for name, values in found.items()}

    def _milliseconds(self, arm: Arm) -> float:
        if not self.has_gpu:
            began = time.perf_counter()
            arm()
            return (time.perf_counter() - began) * 1e3
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        arm()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))

    def peak_gb(self, arm: Arm) -> float | None:
        """Most memory that one call holds, in GB; None without a GPU."""
        if not self.has_gpu:
            return None
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        arm()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / 1e9


def emit(group: str, name: str, **values: Any) -> None:
    """One line of the result."""
    print(json.dumps({"group": group, "name": name, **values}), flush=True)


@contextmanager
def tried(group: str, name: str) -> Iterator[None]:
    """A failure inside is a line of its own, with its reason, and the rest goes on."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, NotImplementedError, ldm.errors.LdmError) as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        emit(group, name, failed=reason)
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
