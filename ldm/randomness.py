"""Randomness and order as functions, not streams: (seed, purpose, epoch, sample id) -> draw.

Nothing here keeps state, so a resumed run, another number of ranks, workers or accumulation steps
sees the same draws. Draws are made on the CPU with numpy's Philox, whose output does not depend on
the device, the batch size or the number of threads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


def generator(seed: int, purpose: str, epoch: int = 0, sample_id: str = "") -> np.random.Generator:
    """A fresh generator whose whole state is a hash of its arguments."""
    key = hashlib.blake2b(f"{seed}|{purpose}|{epoch}|{sample_id}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(key, dtype=np.uint64)))


def normal(
    shape: Sequence[int], seed: int, purpose: str, epochs: Sequence[int], ids: Sequence[str]
) -> Tensor:
    """Standard normal draws, one row per (epoch, sample id): (len(ids), *shape) float32, CPU."""
    import torch

    rows = np.empty((len(ids), *shape), dtype=np.float32)
    for row, epoch, sample_id in zip(rows, epochs, ids, strict=True):
        generator(seed, purpose, epoch, sample_id).standard_normal(out=row, dtype=np.float32)
    return torch.from_numpy(rows)


def uniform(seed: int, purpose: str, epochs: Sequence[int], ids: Sequence[str]) -> Tensor:
    """One draw in [0, 1) per (epoch, sample id): (len(ids),) float64 on the CPU."""
    import torch

    pairs = zip(epochs, ids, strict=True)
    draws = [generator(seed, purpose, epoch, sample_id).random() for epoch, sample_id in pairs]
    return torch.tensor(draws, dtype=torch.float64)


@lru_cache(maxsize=4)
def permutation(length: int, seed: int, epoch: int) -> np.ndarray:
    """The order of epoch `epoch`: a permutation of range(length)."""
    return generator(seed, "order", epoch).permutation(length)


def positions(cursor: int, count: int, length: int, seed: int) -> list[tuple[int, int]]:
    """The next `count` (epoch, index) pairs after `cursor` samples were consumed globally.

    Args:
        cursor: samples consumed so far by all ranks together; the whole state of the data order.
        count: samples wanted.
        length: size of the data set.
        seed: the run's seed.
    """
    places = (divmod(cursor + offset, length) for offset in range(count))
    return [(epoch, int(permutation(length, seed, epoch)[place])) for epoch, place in places]
