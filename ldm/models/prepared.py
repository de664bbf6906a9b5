"""What a denoiser computes from its clock alone, once per sampling run: shared by all `prepare`.

How a denoiser implements `ldm.types.Prepares`, in three parts that its plain call uses as well, so
that both paths are one formula:

1. text alone: keys and values of every text attention, from `text`, once;
2. time alone, or time and what the text adds to it: a function of clocks (n,), in a `ByClock`;
3. `forward` takes both from `text.kept` where that is its own value, and computes them otherwise.

`prepare` returns `lambda clock: replace(text, kept=Own(by_clock(clock), keys_and_values))`.
`ldm.diffusion.core` looks it up by the float that the network is told, never by a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ldm.types import TextEmbedding

OfClocks = Callable[[Tensor], Sequence[Tensor]]
"""Clocks (n,) float32 -> tensors (n, ...), such as (n, 1, width) if rows of a batch are alike."""


class ByClock:
    """The tensors of a network at one clock: computed in one batch for the announced clocks.

    Args:
        compute: see OfClocks.
        clocks: those that will come; another one is computed when it comes.
        device: where the clocks are put.
        at_once: how many clocks to compute and hold at a time, where all would take too much
            memory; None for all.
    """

    def __init__(
        self,
        compute: OfClocks,
        clocks: Sequence[float],
        device: torch.device,
        at_once: int | None = None,
    ) -> None:
        self._compute, self._device = compute, device
        self._announced, self._at_once = tuple(dict.fromkeys(clocks)), at_once
        self._known = self._values(self._announced[:at_once])

    def __call__(self, clock: float) -> tuple[Tensor, ...]:
        """What `compute` says of this clock, without the axis n."""
        if clock in self._known:
            return self._known[clock]
        if clock not in self._announced:
            return self._values((clock,))[clock]
        begin = self._announced.index(clock)
        group = self._announced[begin:][: self._at_once]
        self._known = {}  # before the next ones are computed, so that both are never held
        self._known = self._values(group)
        return self._known[clock]

    def _values(self, clocks: tuple[float, ...]) -> dict[float, tuple[Tensor, ...]]:
        if not clocks:
            return {}
        told = torch.tensor(clocks, dtype=torch.float32).to(self._device)
        rows = zip(*(values.unbind(0) for values in self._compute(told)), strict=True)
        return dict(zip(clocks, rows, strict=True))


def without_padding(text: TextEmbedding) -> TextEmbedding:
    """The embedding without the tokens that are padding in every row: nothing ever sees them.

    One look at the device. At least one token stays, so that no attention is over nothing.
    """
    seen = text.mask.any(dim=0)
    seen[:1] = True
    if bool(seen.all()):
        return text
    return replace(text, tokens=text.tokens[:, seen], mask=text.mask[:, seen])


def all_real(mask: Tensor) -> bool:
    """Whether no token is padding, where asking costs nothing: then attention needs no mask.

    A GPU would have to be waited for, and a compiled graph would break: there the mask is used
    either way, to the same result.
    """
    return mask.device.type == "cpu" and not torch.compiler.is_compiling() and bool(mask.all())
