"""The denoiser as guidance asks it: float32 in and out, whatever its weights are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ldm.diffusion.core import at_clock, prepared
from ldm.types import TextEmbedding


@dataclass(frozen=True)
class Network:
    """A denoiser that is handed everything on its own device and in its own precision.

    Args:
        net: the denoiser.
    """

    net: nn.Module

    def __call__(self, x: Tensor, t: Tensor, text: TextEmbedding) -> Tensor:
        """x (B, C, H, W), t (B,) -> the prediction, float32."""
        if text.kept is None or callable(text.kept):
            text = self._fitting(text)
        weight = next(self.net.parameters())
        prediction: Tensor = self.net(x.to(weight.dtype), t, text)
        return prediction.float()

    def prepare(
        self, text: TextEmbedding, clocks: Sequence[float] = ()
    ) -> Callable[[float], TextEmbedding]:
        """See `ldm.types.Prepares`; of a network that keeps nothing, the text in its precision."""
        ready = prepared(self.net, self._fitting(text), clocks)
        return lambda clock: at_clock(ready, clock)

    def _fitting(self, text: TextEmbedding) -> TextEmbedding:
        weight = next(self.net.parameters())
        return text.to(weight.device, weight.dtype)
