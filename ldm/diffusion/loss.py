"""The training loss for given times and noise, and its weightings. Draws nothing."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ldm.diffusion.core import Diffusion, over
from ldm.types import Denoiser, TextEmbedding

Weighting = Callable[[Tensor], Tensor]
"""snr = alpha^2 / sigma^2 (B,) -> weight (B,) of the squared error of x0."""

MIN_SNR_GAMMA = 5.0
"""The gamma that Hang et al. 2023 (arXiv 2303.09556) recommend."""


def diffusion_loss(
    net: Denoiser,
    diffusion: Diffusion,
    x0: Tensor,
    text: TextEmbedding,
    t: Tensor,
    eps: Tensor,
    weighting: Weighting | None = None,
) -> Tensor:
    """Mean squared error of each sample, (B,), in x0's dtype.

    Args:
        net: the network.
        diffusion: what the network's numbers mean.
        x0: clean latents (B, ...), float32 or float64.
        text: B embedded captions.
        t: (B,) times; float64 on the CPU keeps schedules exact and syncs nothing.
        eps: standard normal draws of the shape of x0.
        weighting: weight of the squared error of x0 by SNR, whatever is predicted; None leaves
            the plain error of the prediction.
    """
    alpha, sigma = diffusion.process.coefficients(t.double())
    x_t = over(alpha, x0) * x0 + over(sigma, x0) * eps
    scaled = over(diffusion.input_scale(alpha, sigma), x0) * x_t
    y = net(scaled, diffusion.process.told(t).to(x0.device, x0.dtype), text).to(x0.dtype)
    errors = (y - diffusion.target(x0, eps, alpha, sigma)).square().flatten(1).mean(1)
    if weighting is None:
        return errors
    weight = weighting((alpha / sigma).square()) * diffusion.x0_gain(alpha, sigma)
    return errors * weight.to(errors)


def min_snr(snr: Tensor) -> Tensor:
    """min(SNR, 5) on x0: Hang et al. 2023 (arXiv 2303.09556), whatever is predicted."""
    return snr.clamp(max=MIN_SNR_GAMMA)


WEIGHTINGS: dict[str, Weighting | None] = {"none": None, "min_snr": min_snr}
