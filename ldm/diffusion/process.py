"""Noise processes x_t = alpha(t) x0 + sigma(t) eps, t in [0, 1], t = 0 data and t = 1 noise.

A process is a value, not a class: to add one, write its coefficients and one line of PROCESSES.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.types import Level

BISECTIONS = 64
"""Halvings of [0, t_max] in the inverse: below the spacing of float64."""


@dataclass(frozen=True)
class Process:
    """How data turns into noise.

    Args:
        name: its key in PROCESSES.
        coefficients: t (any shape, float64, in [0, 1]) -> alpha, sigma of the same shape;
            sigma / alpha must increase with t.
        t_max: the noisiest time in use; below 1 where alpha would come too close to 0.
        clock: (scale, offset): a network is told scale * t + offset, never below 0.
        t_min: the least noisy time that is trained, and the last one of a grid in log-SNR.
    """

    name: str
    coefficients: Callable[[Tensor], tuple[Tensor, Tensor]]
    t_max: float = 1.0
    clock: tuple[float, float] = (1000.0, 0.0)
    t_min: float = 1e-3

    def level(self, t: float) -> Level:
        """The noise level at time t, as plain floats."""
        alpha, sigma = self.coefficients(torch.tensor(t, dtype=torch.float64))
        return Level(float(t), float(alpha), float(sigma))

    def logsnr(self, t: Tensor) -> Tensor:
        """log(alpha^2 / sigma^2) at times t; infinite at an end where one of them is 0."""
        alpha, sigma = self.coefficients(t.double())
        return 2 * (alpha.log() - sigma.log())

    def t_at(self, logsnr: Tensor) -> Tensor:
        """The time with this log-SNR, by bisection: inverse of `logsnr`, any shape, float64.

        Values that the process does not reach give the nearer end of [0, t_max].
        """
        wanted = logsnr.double()
        low = torch.zeros_like(wanted)
        high = torch.full_like(wanted, self.t_max)
        least, most = self.logsnr(high), self.logsnr(low)
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            cleaner = self.logsnr(middle) > wanted
            low, high = torch.where(cleaner, middle, low), torch.where(cleaner, high, middle)
        t = torch.where(wanted <= least, self.t_max, (low + high) / 2)
        return torch.where(wanted >= most, 0.0, t)

    def told(self, t: Tensor) -> Tensor:
        """What a network is told instead of t: the clock, any shape."""
        scale, offset = self.clock
        return (scale * t + offset).clamp(min=0.0)


def _rectified_flow(t: Tensor) -> tuple[Tensor, Tensor]:
    """A straight line: Liu et al. 2022 (arXiv 2209.03003), eq. 1, with t = 1 noise."""
    return 1 - t, t


def _cosine(t: Tensor) -> tuple[Tensor, Tensor]:
    """Nichol & Dhariwal 2021 (arXiv 2102.09672), eq. 17: alpha^2 = f(t) / f(0), s = 0.008."""
    s = 0.008
    start = s / (1 + s) * math.pi / 2
    angle = (t + s) / (1 + s) * math.pi / 2
    alpha = angle.cos() / math.cos(start)
    # sin^2 a - sin^2 b = sin(a - b) sin(a + b): 1 - alpha^2 would lose every digit near t = 0
    sigma = ((angle - start).sin() * (angle + start).sin()).clamp(min=0).sqrt() / math.cos(start)
    return alpha, sigma


def _table(betas: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """The process of a discrete DDPM table, made continuous: exact at t = (i + 1) / len(betas).

    log(alpha^2) is interpolated linearly, that is, beta is constant within a step; t = 0 is data.
    Source: Ho et al. 2020 (arXiv 2006.11239), eq. 4.
    """
    log_alpha_bar = torch.cat([betas.new_zeros(1), torch.log1p(-betas).cumsum(0)])
    steps = len(betas)

    def coefficients(t: Tensor) -> tuple[Tensor, Tensor]:
        knots = log_alpha_bar.to(t.device)
        position = t * steps
        index = position.floor().clamp(0, steps - 1).long()
        log_square = torch.lerp(knots[index], knots[index + 1], position - index)
        return (log_square / 2).exp(), (-torch.expm1(log_square)).clamp(min=0).sqrt()

    return coefficients


def _edm(t: Tensor) -> tuple[Tensor, Tensor]:
    """Variance exploding, sigma from 0.002 to 80 and log sigma linear in t.

    So the clock is, up to scale and offset, the log(sigma) / 4 of Karras et al. 2022
    (arXiv 2206.00364), table 1, and a normal law on log sigma is nearly one on logit t.
    """
    low, high = math.log(0.002), math.log(80.0)
    return torch.ones_like(t), (low + (high - low) * t).exp()


_LINEAR_BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
_SD_BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2

TABLE_CLOCK = (1000.0, -1.0)
"""Published DDPM and Stable Diffusion networks are told the index of the table, from 0."""

PROCESSES: dict[str, Process] = {
    "rectified_flow": Process("rectified_flow", _rectified_flow),
    "vp_linear": Process("vp_linear", _table(_LINEAR_BETAS), clock=TABLE_CLOCK),
    # alpha(1) = 0; at 0.999 it is 0.0016, so that eps prediction remains possible
    "vp_cosine": Process("vp_cosine", _cosine, t_max=0.999),
    "sd": Process("sd", _table(_SD_BETAS), clock=TABLE_CLOCK),
    "edm": Process("edm", _edm, t_min=0.0),
}
