"""From noise to data: loops over pairs of levels that share one primitive, `transition`.

A sampler sees `denoise(x, level) -> x0` and plain-float levels, nothing else: no process, no
prediction, no guidance, no text. Along the probability-flow ODE dx = x0 d(alpha) + eps d(sigma),
so x / w for any linear w(alpha, sigma) moves straight while x0 and eps stay put; the samplers
differ in the order to which they follow how these change.

`euler` is `ddim` without noise: Euler's method in x / alpha over sigma / alpha (k-diffusion's and
diffusers' variable), in x over t on rectified flow and in x over sigma on EDM are one and the same
`transition`. It is listed under its own name because people look for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from torch import Tensor

from ldm.errors import LdmError
from ldm.types import Denoise, Level

Noise = Callable[[int], Tensor]
"""step -> standard normal draws of the shape of x, each picture's own."""
OnStep = Callable[[int, Tensor], None]
"""Called with the number of steps done, from 1, and x."""

HEUN_RATIO_MAX = 200.0
"""First sigma / alpha up to which `heun` works in x / alpha, as published: DDPM's is 157, EDM's 80.

Beyond (vp_cosine: 641) that variable costs ten times the error of x / (alpha + sigma) at 20 steps.
"""


class Run(Protocol):
    """What every sampler is called like; returns x at the last level."""

    def __call__(
        self,
        denoise: Denoise,
        x: Tensor,
        levels: Sequence[Level],
        *,
        noise: Noise | None = None,
        eta: float = 0.0,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """See `ddim`."""
        ...


@dataclass(frozen=True)
class Sampler:
    """A sampler and what is promised of it.

    Args:
        name: its key in SAMPLERS.
        run: the loop.
        order: of convergence in the number of steps, without noise.
        stochastic: whether eta > 0 is allowed.
        eta: the value that `run` uses when none is given.
    """

    name: str
    run: Run
    order: int
    stochastic: bool
    eta: float = 0.0


def start(noise: Tensor, level: Level) -> Tensor:
    """The state at the first level for standard normal draws (B, ...) and data of unit variance."""
    return math.hypot(level.alpha, level.sigma) * noise


def transition(x: Tensor, x0: Tensor, now: Level, nxt: Level) -> Tensor:
    """x at `nxt` on the line through x and x0: exact while x0 stays what it is.

    nxt.alpha x0 + nxt.sigma eps with eps = (x - now.alpha x0) / now.sigma, written without a
    division by alpha. DDIM, Song et al. 2020 (arXiv 2010.02502), eq. 12 with sigma = 0.
    """
    r = nxt.sigma / now.sigma
    return r * x + (nxt.alpha - now.alpha * r) * x0


def ddim(
    denoise: Denoise,
    x: Tensor,
    levels: Sequence[Level],
    *,
    noise: Noise | None = None,
    eta: float = 0.0,
    on_step: OnStep | None = None,
) -> Tensor:
    """DDIM; eta = 0 draws nothing, eta = 1 is DDPM's ancestral sampling.

    Source: Song et al. 2020 (arXiv 2010.02502), eq. 12 and 16, for any alpha and sigma.

    Args:
        denoise: (x_t, level) -> x0.
        x: (B, ...) at levels[0]; see `start`.
        levels: noisiest first.
        noise: draws for eta > 0.
        eta: share of the posterior's standard deviation that is drawn anew, in [0, 1].
        on_step: told of progress.

    Raises:
        LdmError: eta is out of range, or > 0 without noise.
    """
    _check_eta(eta, noise)
    for step, (now, nxt) in enumerate(pairwise(levels)):
        kept = math.sqrt(1 - eta**2 * (1 - _memory(now, nxt) ** 2))
        x = transition(x, denoise(x, now), now, _quieter(nxt, kept))
        x = _renoised(x, nxt.sigma * math.sqrt(1 - kept**2), step, noise)
        _tell(on_step, step, x)
    return x


def euler(
    denoise: Denoise,
    x: Tensor,
    levels: Sequence[Level],
    *,
    noise: Noise | None = None,
    eta: float = 0.0,
    on_step: OnStep | None = None,
) -> Tensor:
    """Euler's method, order 1; arguments as in `ddim`, eta must be 0 (see the file's head)."""
    _check_deterministic("euler", eta)
    return ddim(denoise, x, levels, on_step=on_step)


def heun(
    denoise: Denoise,
    x: Tensor,
    levels: Sequence[Level],
    *,
    noise: Noise | None = None,
    eta: float = 0.0,
    on_step: OnStep | None = None,
) -> Tensor:
    """Heun's method, order 2, two evaluations a step but the last; arguments as in `ddim`.

    The trapezoid rule in x / w over sigma / w with w = alpha + q sigma, whose slope is eps - q x0.
    q = 0 is Karras et al. 2022 (arXiv 2206.00364), algorithm 1 without churn. From pure noise,
    where sigma / alpha is infinite, q = 1: on rectified flow the plain Heun method in t on the
    velocity. The step to sigma = 0 is Euler's.
    """
    _check_deterministic("heun", eta)
    q = 0.0 if levels[0].sigma < HEUN_RATIO_MAX * levels[0].alpha else 1.0
    for step, (now, nxt) in enumerate(pairwise(levels)):
        x0 = denoise(x, now)
        ahead = transition(x, x0, now, nxt)
        if nxt.sigma > 0:
            change = _slope(ahead, denoise(ahead, nxt), nxt, q) - _slope(x, x0, now, q)
            w_now, w_nxt = now.alpha + q * now.sigma, nxt.alpha + q * nxt.sigma
            ahead = ahead + 0.5 * (nxt.sigma - now.sigma * w_nxt / w_now) * change
        x = ahead
        _tell(on_step, step, x)
    return x


def dpmpp_2m(
    denoise: Denoise,
    x: Tensor,
    levels: Sequence[Level],
    *,
    noise: Noise | None = None,
    eta: float = 0.0,
    on_step: OnStep | None = None,
) -> Tensor:
    """DPM-Solver++(2M), order 2, one evaluation a step; arguments as in `ddim`, eta must be 0.

    Source: Lu et al. 2022 (arXiv 2211.01095), algorithm 2. First and last steps are of order 1.
    """
    _check_deterministic("dpmpp_2m", eta)
    return dpmpp_2m_sde(denoise, x, levels, eta=0.0, on_step=on_step)


def dpmpp_2m_sde(
    denoise: Denoise,
    x: Tensor,
    levels: Sequence[Level],
    *,
    noise: Noise | None = None,
    eta: float = 1.0,
    on_step: OnStep | None = None,
) -> Tensor:
    """SDE-DPM-Solver++(2M), midpoint form; eta = 0 is `dpmpp_2m`. Arguments as in `ddim`.

    Source: Lu et al. 2022 (arXiv 2211.01095), section 6; eta scales the noise of the reverse SDE.
    """
    _check_eta(eta, noise)
    before: Level | None = None
    x0_before = x
    for step, (now, nxt) in enumerate(pairwise(levels)):
        x0 = denoise(x, now)
        ahead = x0
        if before is not None and nxt.sigma > 0:
            # 0 right after pure noise, where the last step in log(alpha / sigma) was infinite
            ratio = _log_step(now, nxt) / _log_step(before, now)
            ahead = x0 + 0.5 * ratio * (x0 - x0_before)
        kept = _memory(now, nxt) ** eta
        x = transition(x, ahead, now, _quieter(nxt, kept))
        x = _renoised(x, nxt.sigma * math.sqrt(1 - kept**2), step, noise)
        before, x0_before = now, x0
        _tell(on_step, step, x)
    return x


def _quieter(level: Level, kept: float) -> Level:
    """The level with only the share `kept` of its noise, the part that is not drawn anew."""
    return Level(level.t, level.alpha, kept * level.sigma)


def _renoised(x: Tensor, fresh: float, step: int, noise: Noise | None) -> Tensor:
    """x with draws of standard deviation `fresh`; draws nothing where that is 0."""
    return x if noise is None or fresh == 0 else x + fresh * noise(step).to(x)


def _memory(now: Level, nxt: Level) -> float:
    """exp(-h) = (now.alpha / now.sigma) (nxt.sigma / nxt.alpha) in [0, 1]: 0 from pure noise.

    Its square is one less the share of the variance at `nxt` that `now` and x0 leave open.
    """
    return now.alpha * nxt.sigma / (now.sigma * nxt.alpha)


def _log_step(now: Level, nxt: Level) -> float:
    """h, the step in log(alpha / sigma) > 0; infinite from pure noise."""
    memory = _memory(now, nxt)
    return -math.log(memory) if memory > 0 else math.inf


def _slope(x: Tensor, x0: Tensor, level: Level, q: float) -> Tensor:
    """eps - q x0."""
    return (x - level.alpha * x0) / level.sigma - q * x0


def _tell(on_step: OnStep | None, step: int, x: Tensor) -> None:
    if on_step is not None:
        on_step(step + 1, x)


def _check_eta(eta: float, noise: Noise | None) -> None:
    if not 0 <= eta <= 1:
        raise LdmError(f"eta must lie in [0, 1], got {eta}", where="eta", fix="use 0 or 1")
    if eta > 0 and noise is None:
        raise LdmError(f"eta={eta} needs noise, and none was given", where="noise", fix="use eta=0")


def _check_deterministic(name: str, eta: float) -> None:
    if eta != 0:
        able = ", ".join(sampler.name for sampler in SAMPLERS.values() if sampler.stochastic)
        raise LdmError(
            f"sampler {name} takes no noise, got eta={eta}",
            where="eta",
            fix=f"use eta=0 or one of {able}",
        )


SAMPLERS: dict[str, Sampler] = {
    "ddim": Sampler("ddim", ddim, order=1, stochastic=True),
    "euler": Sampler("euler", euler, order=1, stochastic=False),
    "heun": Sampler("heun", heun, order=2, stochastic=False),
    "dpmpp_2m": Sampler("dpmpp_2m", dpmpp_2m, order=2, stochastic=False),
    "dpmpp_2m_sde": Sampler("dpmpp_2m_sde", dpmpp_2m_sde, order=2, stochastic=True, eta=1.0),
}
