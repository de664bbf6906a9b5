"""How a row is measured: both sides take turns in one process, on one core, in CPU time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

Arm = Callable[[], object]
"""One call of one side; what it returns is ignored."""


@dataclass(frozen=True)
class Budget:
    """How long a comparison may take.

    Args:
        seconds: of CPU time per comparison, about; at least `least` turns are made.
        least: turns of every arm that count.
        most: turns at most.
        warm: turns of every arm before.
        is_smoke: tiny shapes, whose times mean nothing.
    """

    seconds: float = 6.0
    least: int = 5
    most: int = 25
    warm: int = 2
    is_smoke: bool = False


SMOKE = Budget(seconds=0.0, least=1, most=1, warm=0, is_smoke=True)


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        name: what was measured; stable.
        peer: what it is held against.
        ratio: how many times as fast as the peer; for a limit, limit over measured.
        goal: the least ratio wanted, or None where a row only informs.
        ours_ms, peer_ms: medians; of rows that are no times, see `note`.
        iqr: quartiles of the ratio over the turns.
        shape: what was computed.
        note: what else is to be known.
    """

    name: str
    peer: str
    ratio: float
    goal: float | None
    ours_ms: float | None = None
    peer_ms: float | None = None
    iqr: tuple[float, float] | None = None
    shape: str = ""
    note: str = ""


@dataclass
class Times:
    """Milliseconds of every turn, by arm."""

    of: dict[str, list[float]] = field(default_factory=dict)

    def median(self, arm: str) -> float:
        """The median of an arm."""
        return statistics.median(self.of[arm])

    def row(
        self,
        name: str,
        ours: str,
        peer: str,
        goal: float | None,
        *,
        shape: str = "",
        note: str = "",
    ) -> Row:
        """A row of two arms."""
        mine, theirs = self.of[ours], self.of[peer]
        ratios = sorted(b / a for a, b in zip(mine, theirs, strict=True))
        low, high = _quartile(ratios, 0.25), _quartile(ratios, 0.75)
        # of neighbours in time, so that a load that comes and goes meets both sides of a ratio
        ratio = statistics.median(ratios)
        return Row(
            name, peer, ratio, goal, self.median(ours), self.median(peer), (low, high), shape, note
        )


def in_turns(arms: dict[str, Arm], budget: Budget) -> Times:
    """A B A B ...: every arm once per turn, in alternating order, so that drift meets all alike."""
    for _ in range(budget.warm):
        for arm in arms.values():
            arm()
    times = Times({name: [] for name in arms})
    began, turn = time.process_time(), 0
    while turn < budget.least or (
        turn < budget.most and time.process_time() - began < budget.seconds
    ):
        names = list(arms) if turn % 2 == 0 else list(arms)[::-1]
        for name in names:
            start = time.process_time()
            arms[name]()
            times.of[name].append((time.process_time() - start) * 1e3)
        turn += 1
    return times


def assert_equal(ours: Tensor, peer: Tensor, relative: float, what: str) -> None:
    """Refuses to time two things that are not the same.

    `relative` is to the largest entry: rounding is of the size of what is summed.
    """
    off = float((ours.float() - peer.float()).abs().max() / peer.float().abs().max())
    assert off <= relative, f"{what}: results differ by {off:.1e}, so there is nothing to compare"


def generator(seed: int = 0) -> torch.Generator:
    """Draws that leave the global generator alone."""
    return torch.Generator().manual_seed(seed)


def _quartile(values: list[float], share: float) -> float:
    place = share * (len(values) - 1)
    low = int(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (place - low) * (values[high] - values[low])
