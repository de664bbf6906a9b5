"""How networks are computed on this machine: every choice of kernel in one place. No mathematics.

Torch's own way is always there as `plain`. `tuned` is what a probe at the start finds as exact and
faster on a CPU:

- large fp32 products by oneDNN instead of MKL, which takes a slow path on processors of other
  makers (`onednn.py`);
- attention over few keys written out (`attention.py`), which those products make the faster;
- for inference, weights laid out once, not at each call (`packing.py`);
- freed memory is kept for the next step: returning it costs a page fault for every 4 kB.

Nothing here changes a result by more than rounding, and what belongs to the process (the switch of
oneDNN, the thresholds of the allocator) is put back.
"""

from __future__ import annotations

import ctypes
import os
import platform
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from ldm.errors import ExitCode, LdmError
from ldm.models.attention import ASKED, require, use_attention
from ldm.models.onednn import switched
from ldm.models.packing import pack

M = TypeVar("M", bound=nn.Module)
ATTENTION = ("auto", "sdpa", *ASKED)

FASTER = 1.2
"""A product must be at least this much faster by oneDNN to be left to it: on processors where MKL
has no slow path both are alike, and noise shall not decide."""


@dataclass(frozen=True)
class Backends:
    """The kernels that one network is computed with.

    Args:
        attention: of ATTENTION; auto is torch's fused kernel or whatever `cpu` means.
        cpu: plain, or tuned; without effect on other devices.
    """

    attention: str = "auto"
    cpu: Literal["plain", "tuned"] = "plain"

    def install(self, net: M) -> M:
        """Gives every layer of `net` its kernel, for training and inference; returns `net`.

        A network without an attention layer of this package stays as it is.

        Raises:
            LdmError: xformers is not installed, or the network's attention is not ours.
        """
        if self.attention in ASKED:
            require(self.attention)
        kernel = "tuned" if (self.attention, self.cpu) == ("auto", "tuned") else self.attention
        is_ours = use_attention(net, kernel) > 0
        if not is_ours and self.attention != "auto":
            raise LdmError(
                f"{type(net).__name__} has no attention layer of this package, so its kernel "
                f"cannot be {self.attention}",
                where="attention",
                fix="use auto",
                code=ExitCode.CONFIG,
            )
        return pack(net) if is_ours and self.cpu == "tuned" else net

    @contextmanager
    def keeping_memory(self) -> Iterator[None]:
        """Inside, memory that was freed stays with the process, where the choice is tuned."""
        with ExitStack() as stack:
            if self.cpu == "tuned":
                stack.enter_context(kept_memory())
            yield


def choose(
    attention: str = "auto",
    cpu: str = "auto",
    device: torch.device | str = "cpu",
) -> Backends:
    """The backends that a user's settings come to on `device`.

    Args:
        attention: of ATTENTION.
        cpu: auto is tuned where the probe recommends it; plain, or tuned where it is exact.
        device: where the network runs.

    Raises:
        LdmError: code CONFIG for an unknown name.
    """
    for name, value, known in (
        ("attention", attention, ATTENTION),
        ("cpu_kernels", cpu, ("auto", "plain", "tuned")),
    ):
        if value not in known:
            raise LdmError(
                f"unknown {name} {value!r}; known: {', '.join(known)}",
                where=name,
                fix="use auto",
                code=ExitCode.CONFIG,
            )
    if torch.device(device).type != "cpu" or cpu == "plain":
        return Backends(attention)
    found = probe_products()
    wanted = found.exact and (cpu == "tuned" or found.faster)
    return Backends(attention, "tuned" if wanted else "plain")


@dataclass(frozen=True)
class Products:
    """What a probe says of oneDNN's fp32 products: whether they are fp32, and worth it."""

    exact: bool
    speedup: float

    @property
    def faster(self) -> bool:
        """Whether they are to be used."""
        return self.speedup >= FASTER


@lru_cache(maxsize=1)
def probe_products() -> Products:
    """Compares oneDNN's products with torch's own ones on this machine, once in a process.

    All three products of a linear layer, forward and backward, must be as exact as fp32 is: where
    the processor has bf16 matrix units the flag means bf16, which no fp32 run may become unasked.
    Takes about 0.1 s.
    """
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():
        return Products(False, 1.0)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 384, generator=generator)
    weight = torch.randn(512, 384, generator=generator)
    error, plain, tuned = 0.0, [], []
    with torch.inference_mode(False), torch.no_grad():
        y = x @ weight.mT
        for a, b in ((x, weight.mT), (y, weight), (y.mT, x)):
            true = a.double() @ b.double()
            with switched():
                error = max(error, float((a @ b - true).norm() / true.norm()))
        for _ in range(6):  # the first call of each prepares its kernel
            plain.append(_seconds(x, weight))
            with switched():
                tuned.append(_seconds(x, weight))
    # sums of 384 to 512 terms in fp32 err by 1e-7 to 1e-6, in bf16 by 2e-3
    return Products(error < 1e-5, min(plain) / max(min(tuned), 1e-9))


def _seconds(x: Tensor, weight: Tensor) -> float:
    began = time.thread_time()
    x @ weight.mT
    return time.thread_time() - began


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Names of mallopt(3)."""


@contextmanager
def kept_memory() -> Iterator[None]:
    """Inside, glibc keeps freed memory for later instead of giving it back at once.

    By itself it returns every large block, and each page comes back by a fault and zeroed: a fifth
    of a training step and more. Afterwards the thresholds are those that glibc arrives at by itself
    in a process that has used large blocks, and what is free is given back. Does nothing with
    another allocator, or where the user has set the thresholds (MALLOC_...).
    """
    libc = _glibc()
    if libc is None or any(name.startswith("MALLOC_") for name in os.environ):
        yield
        return
    most = 2**31 - 1
    libc.mallopt(M_TRIM_THRESHOLD, most)
    libc.mallopt(M_MMAP_THRESHOLD, most)
    try:
        yield
    finally:
        libc.mallopt(M_MMAP_THRESHOLD, 2**25)
        libc.mallopt(M_TRIM_THRESHOLD, 2**26)
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if platform.libc_ver()[0] != "glibc":
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
