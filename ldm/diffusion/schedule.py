"""Which times are visited: by a sampler (`levels`) and in training (`sample_times`). No draws.

Every function maps times or uniforms to times; the resolution shift is one function for both.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from ldm.diffusion.names import named
from ldm.diffusion.process import Process
from ldm.errors import LdmError
from ldm.types import Level

CLEAN = Level(0.0, 1.0, 0.0)
"""Where every sampler ends."""
TRAINING_STEPS = 1000
"""Length of the grid on which published discrete models were trained (DDPM, Stable Diffusion)."""
RATIO_MAX = 80.0
"""Where grids in sigma / alpha start when alpha(t_max) = 0: EDM's largest sigma."""
KARRAS_RHO = 7.0
"""Karras et al. 2022 (arXiv 2206.00364), eq. 5."""

Spacing = Callable[[Process, int, float, float], Tensor]
"""(process, steps, low, high) -> steps times from high down, all above low or, at t_min, on it."""


def shift_time(process: Process, t: Tensor, shift: float) -> Tensor:
    """Moves times towards noise for larger images: sigma / alpha is multiplied by `shift`.

    On rectified flow this is shift t / (1 + (shift - 1) t), Esser et al. 2024 (arXiv 2403.03206),
    eq. 23; on any process logsnr - 2 log(shift), Hoogeboom et al. 2023 (arXiv 2301.11093).

    Args:
        process: supplies the log-SNR and its inverse.
        t: times, any shape, float64.
        shift: > 0; 1 changes nothing, 3 is Stable Diffusion 3's value at 1024 px.

    Raises:
        LdmError: shift is not positive.
    """
    _check_shift(shift)
    if shift == 1.0:
        return t
    return process.t_at(process.logsnr(t) - 2 * math.log(shift))


def shift_domain(process: Process, shift: float) -> tuple[float, float]:
    """The times that `shift` moves to 0 and t_max; grids and laws span these, so none piles up.

    0 and t_max themselves where the process reaches pure data and pure noise (rectified flow).

    Raises:
        LdmError: shift is not positive.
    """
    _check_shift(shift)
    ends = torch.tensor([0.0, process.t_max], dtype=torch.float64)
    low, high = shift_time(process, ends, 1 / shift).tolist()
    return (low, process.t_max) if shift <= 1 else (0.0, high)


def levels(
    process: Process, steps: int, *, spacing: str = "uniform", shift: float = 1.0
) -> tuple[Level, ...]:
    """The noise levels that a sampler visits, noisiest first.

    Args:
        process: the noise process.
        steps: number of steps, >= 1; at most 1000 for the spacings trailing and leading.
        spacing: a key of SPACINGS.
        shift: resolution shift, > 0.

    Returns:
        steps + 1 levels with strictly falling sigma / alpha; the last is (0, 1, 0).

    Raises:
        LdmError: steps, spacing or shift is not legal.
    """
    if steps < 1:
        raise LdmError(f"steps must be at least 1, got {steps}", where="steps", fix="try 50")
    place = named("spacing", SPACINGS, spacing)
    times = shift_time(process, place(process, steps, *shift_domain(process, shift)), shift)
    rows = torch.stack((times, *process.coefficients(times)), dim=1).tolist()
    chosen = (*(Level(*row) for row in rows), CLEAN)
    assert all(a.sigma * b.alpha > b.sigma * a.alpha for a, b in pairwise(chosen))
    return chosen


def stratify(u: Tensor, position: Tensor, batch: int) -> Tensor:
    """Spreads uniforms evenly over one global batch: sample k of B gets (k + u) / B.

    Each is still uniform when the position is random, and a batch covers all times.
    Source: Kingma et al. 2021 (arXiv 2107.00630), appendix I.1.

    Args:
        u: (b,) uniforms in [0, 1), float64, of the samples at hand.
        position: (b,) their places in the global batch, integers in [0, batch).
        batch: size of the global batch, over all ranks and accumulation steps.
    """
    return (position + u) / batch


def sample_times(
    process: Process,
    u: Tensor,
    *,
    distribution: str = "uniform",
    mean: float = 0.0,
    std: float = 1.0,
    shift: float = 1.0,
) -> Tensor:
    """Turns uniforms into training times; draws nothing.

    Args:
        process: the noise process.
        u: (B,) in [0, 1), float64; see `stratify`.
        distribution: a key of DISTRIBUTIONS.
        mean: of logit(t), for logit_normal.
        std: of logit(t), > 0, for logit_normal.
        shift: resolution shift, the same as in `levels`.

    Returns:
        (B,) float64 times in [process.t_min, process.t_max].
    """
    law = named("timestep distribution", DISTRIBUTIONS, distribution)
    low, high = shift_domain(process, shift)
    t = low + (high - low) * law(u.double(), mean, std)
    return shift_time(process, t, shift).clamp(process.t_min, process.t_max)


def _uniform_law(u: Tensor, mean: float, std: float) -> Tensor:
    return u


def _logit_normal_law(u: Tensor, mean: float, std: float) -> Tensor:
    """logit(t) ~ N(mean, std^2): Esser et al. 2024 (arXiv 2403.03206), eq. 19."""
    return torch.sigmoid(mean + std * torch.special.ndtri(u))


def _uniform(process: Process, steps: int, low: float, high: float) -> Tensor:
    """Equal steps in t down to the clean end."""
    return low + (high - low) * (1 - torch.arange(steps, dtype=torch.float64) / steps)


def _trailing(process: Process, steps: int, low: float, high: float) -> Tensor:
    """As uniform, rounded to the training grid: Lin et al. 2023 (arXiv 2305.08891), table 2."""
    _check_discrete(steps)
    return low + (high - low) * (
        _uniform(process, steps, 0, TRAINING_STEPS).round() / TRAINING_STEPS
    )


def _leading(process: Process, steps: int, low: float, high: float) -> Tensor:
    """Every (1000 // steps)-th training time from the second one up, as Stable Diffusion 1 and 2.

    The noisiest time is not visited; kept because published models were tuned with it.
    """
    _check_discrete(steps)
    stride = TRAINING_STEPS // steps
    backwards = torch.arange(steps - 1, -1, -1, dtype=torch.float64)
    return low + (high - low) * (backwards * stride + min(2, stride)) / TRAINING_STEPS


def _logsnr(process: Process, steps: int, low: float, high: float) -> Tensor:
    """Equal steps in log-SNR."""
    noisy, clean = _ratio_ends(process, low, high)
    logs = torch.linspace(math.log(noisy), math.log(clean), steps, dtype=torch.float64)
    return _at_ratios(process, logs, high)


def _karras(process: Process, steps: int, low: float, high: float) -> Tensor:
    """Equal steps in (sigma / alpha)^(1 / 7): Karras et al. 2022 (arXiv 2206.00364), eq. 5."""
    noisy, clean = (ratio ** (1 / KARRAS_RHO) for ratio in _ratio_ends(process, low, high))
    roots = torch.linspace(noisy, clean, steps, dtype=torch.float64)
    return _at_ratios(process, KARRAS_RHO * roots.log(), high)


def _ratio_ends(process: Process, low: float, high: float) -> tuple[float, float]:
    """sigma / alpha at `high`, or RATIO_MAX where it is infinite, and at t_min or `low`."""
    noisy, clean = process.level(high), process.level(max(process.t_min, low))
    ratio = noisy.sigma / noisy.alpha if noisy.alpha > 0 else RATIO_MAX
    return ratio, clean.sigma / clean.alpha


def _at_ratios(process: Process, log_ratio: Tensor, high: float) -> Tensor:
    times = process.t_at(-2 * log_ratio)
    times[0] = high  # pure noise where the grid itself had to start at RATIO_MAX
    return times


def _check_shift(shift: float) -> None:
    if not 0 < shift < math.inf:
        raise LdmError(f"shift must be > 0, got {shift}", where="shift", fix="1.0 means no shift")


def _check_discrete(steps: int) -> None:
    if steps > TRAINING_STEPS:
        raise LdmError(
            f"this spacing has only {TRAINING_STEPS} times, got steps={steps}",
            where="steps",
            fix=f"use at most {TRAINING_STEPS} steps, or spacing=uniform",
        )


DISTRIBUTIONS: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "uniform": _uniform_law,
    "logit_normal": _logit_normal_law,
}

SPACINGS: dict[str, Spacing] = {
    "uniform": _uniform,
    "trailing": _trailing,
    "leading": _leading,
    "logsnr": _logsnr,
    "karras": _karras,
}
