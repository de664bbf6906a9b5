"""The training loss for given times and noise. Draws nothing; weightings are in `weighting`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ldm.diffusion.core import Diffusion, over
from ldm.diffusion.process import Process
from ldm.diffusion.weighting import Weighting
from ldm.types import Denoiser, TextEmbedding

VLB_STEPS = 1000
"""T, the steps of the grid on which the variance of a reverse step is learned."""
VLB_SHARE = 0.001
"""lambda in L_simple + lambda L_vlb: Nichol & Dhariwal 2021 (arXiv 2102.09672), eq. 16."""


def diffusion_loss(
    net: Denoiser,
    diffusion: Diffusion,
    x0: Tensor,
    text: TextEmbedding,
    t: Tensor,
    eps: Tensor,
    weighting: Weighting | None = None,
    counted: Tensor | None = None,
) -> Tensor:
    """Mean squared error of each sample, (B,), in x0's dtype.

    With a learned variance, times move up to the grid of VLB_STEPS, and a share of the variational
    bound is added, which teaches the variance alone.

    Args:
        net: the network.
        diffusion: what the network's numbers mean.
        x0: clean latents (B, ...), float32 or float64.
        text: B embedded captions.
        t: (B,) times; float64 on the CPU keeps schedules exact and syncs nothing.
        eps: standard normal draws of the shape of x0.
        weighting: weight of the squared error of x0, whatever is predicted; None leaves the plain
            error of the prediction.
        counted: the places (B, 1, ...) bool that the error is the mean of; None is all of them.
    """
    process = diffusion.process
    t = grid_time(process, t) if diffusion.learned_variance else t.double()
    alpha, sigma = process.coefficients(t)
    x_t = over(alpha, x0) * x0 + over(sigma, x0) * eps
    scaled = over(diffusion.input_scale(alpha, sigma), x0) * x_t
    output = net(scaled, process.told(t).to(x0.device, x0.dtype), text).to(x0.dtype)
    y, v = diffusion.split(output)
    losses = _mean((y - diffusion.target(x0, eps, alpha, sigma)).square(), counted)
    if weighting is not None:
        losses = losses * (weighting(process, t) * diffusion.x0_gain(alpha, sigma)).to(losses)
    if diffusion.learned_variance:
        guess = diffusion.x0(x_t, y.detach(), alpha, sigma)
        # one step of T drawn alike stands for the sum of all
        losses = losses + VLB_SHARE * VLB_STEPS * variance_loss(process, t, x0, guess, v, counted)
    return losses


def grid_time(process: Process, t: Tensor) -> Tensor:
    """The next of the times i / VLB_STEPS (of t_max) from t on, (B,) float64."""
    index = (t.double() * (VLB_STEPS / process.t_max) - 1e-6).ceil().clamp(1, VLB_STEPS)
    return index / VLB_STEPS * process.t_max


def variance_loss(
    process: Process,
    t: Tensor,
    x0: Tensor,
    guess: Tensor,
    v: Tensor,
    counted: Tensor | None = None,
) -> Tensor:
    """One term of the variational bound in nats per dimension, (B,), for grid times t (B,).

    KL(q(x_s | x_t, x0) || p) of the step down to s = t - 1 / T, where p has the posterior's mean
    for `guess` (B, ...) and log variance w log beta + (1 - w) log beta~, w = (v + 1) / 2: Nichol &
    Dhariwal 2021 (arXiv 2102.09672), eq. 15. The last step is the density of x0 itself; its beta~
    is 0, so the one of the step before bounds v, as theirs does. Give a `guess` without gradient.
    """
    high, low, pull, is_last = _steps(process, t)
    # relative to beta~, so that float32 keeps the digits of tiny variances
    log_ratio = over((high / low).log(), v) * ((v + 1) / 2)
    offset = torch.where(is_last, (2 * math.pi * low).log(), -1.0)
    spread = over((~is_last).double(), x0) + over(pull.square() / low, x0) * (x0 - guess).square()
    terms = (log_ratio + over(offset, x0) + spread * (-log_ratio).exp()) / 2
    return _mean(terms, counted)


def _mean(errors: Tensor, counted: Tensor | None) -> Tensor:
    """Of each sample (B, C, ...), over the places (B, 1, ...) that are counted: (B,)."""
    if counted is None:
        return errors.flatten(1).mean(1)
    total = counted.expand_as(errors).flatten(1).sum(1)
    return errors.masked_fill(~counted, 0).flatten(1).sum(1) / total


def _steps(process: Process, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """beta, beta~ and the pull of x0 on the mean, and whether it is the last, of steps from t."""
    step = process.t_max / VLB_STEPS
    is_last = t < 1.5 * step
    # the last step's own beta~ is 0: it takes the bound of the second
    alpha, sigma = process.coefficients(torch.where(is_last, 2 * step, t))
    a, s = process.coefficients(torch.where(is_last, step, t - step))
    fresh = 1 - (alpha * s / (sigma * a)).square()
    high, low, pull = sigma.square() * fresh, s.square() * fresh, a * fresh
    first = process.coefficients(t)[1].square()
    return high.where(~is_last, first), low, pull.where(~is_last, torch.ones_like(a)), is_last
