"""One process and one prediction together: targets for training, x0 for sampling.

The only place that knows how a network's output relates to x0. No randomness, no loops.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from ldm.diffusion.names import missing_std_error, singular_error
from ldm.diffusion.prediction import PREDICTIONS, Prediction
from ldm.diffusion.process import Process
from ldm.types import Denoiser, Level, Prepares, TextEmbedding

SIGMA_FLOOR = 1e-12
"""Stands for sigma = 0, where the solutions of some rows are 0 / 0 with a finite limit."""
GAIN_CEILING = 1e6
"""A pair that multiplies the network's error by more than this anywhere is singular."""
INPUT_STD_CEILING = 10.0
"""Without data_std a network sees x_t itself; beyond this scale it cannot be trained."""


def over(coefficients: Tensor, x: Tensor) -> Tensor:
    """Coefficients (B,) or () shaped to multiply x (B, ...), on its device and in its dtype."""
    return coefficients.to(x.device, x.dtype).reshape(-1, *[1] * (x.ndim - 1))


@dataclass(frozen=True)
class Diffusion:
    """What a network's numbers mean.

    Args:
        process: how data turns into noise.
        prediction: what the network predicts.
        data_std: standard deviation of x0. When given, the network's input is scaled to unit
            variance (EDM's c_in); None feeds x_t itself.
        learned_variance: whether the network has 2C channels: y, then v, which chooses the
            variance of a reverse step between its bounds (`loss.variance_loss`).
    """

    process: Process
    prediction: Prediction
    data_std: float | None = None
    learned_variance: bool = False

    def row(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) of y = a x0 + b eps, of the shape of alpha, float64."""
        sigma = sigma.clamp(min=SIGMA_FLOOR)
        return self.prediction.row(alpha, sigma, 1.0 if self.data_std is None else self.data_std)

    def solution(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(c, d) of x0 = c x_t + d y: the first line of the inverse of the 2x2 system.

        c = b / det and d = -sigma / det with det = alpha b - sigma a; finite at both ends of every
        admissible pair.
        """
        a, b = self.row(alpha, sigma)
        sigma = sigma.clamp(min=SIGMA_FLOOR)
        determinant = alpha * b - sigma * a
        return b / determinant, -sigma / determinant

    def target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """What the network should say: y (B, ...) for x0, eps (B, ...) at alpha, sigma (B,)."""
        a, b = self.row(alpha, sigma)
        return over(a, x0) * x0 + over(b, x0) * eps

    def x0(self, x: Tensor, y: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The clean data (B, ...) implied by x_t and the network's y at alpha, sigma (B,)."""
        c, d = self.solution(alpha, sigma)
        return over(c, x) * x + over(d, x) * y

    def x0_gain(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Squared error of x0 per squared error of y, (B,): 1 / SNR for eps, 1 for x0."""
        return self.solution(alpha, sigma)[1].square()

    def input_scale(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """EDM's c_in, (B,): what x_t is multiplied by before the network sees it."""
        if self.data_std is None:
            return torch.ones_like(alpha)
        return 1 / torch.hypot(alpha * self.data_std, sigma)

    def denoise(self, net: Denoiser, x: Tensor, level: Level, text: TextEmbedding) -> Tensor:
        """The network's x0 for x_t (B, ...) at one level: float64 for float64, else float32."""
        return self._x0_and_rest(net, x, level, text)[0]

    def denoise_with_variance(
        self, net: Denoiser, x: Tensor, level: Level, text: TextEmbedding
    ) -> Tensor:
        """The network's x0 and its v in [-1, 1] for x_t (B, C, ...): (B, 2C, ...).

        What the sampler ddpm_learned sees; v beyond its bounds is cut to them.
        """
        assert self.learned_variance, "this network has no variance"
        x0, v = self._x0_and_rest(net, x, level, text)
        return torch.cat([x0, v.to(x0.dtype).clamp(-1, 1)], dim=1)

    def _x0_and_rest(
        self, net: Denoiser, x: Tensor, level: Level, text: TextEmbedding
    ) -> tuple[Tensor, Tensor]:
        x = x if x.dtype == torch.float64 else x.float()
        c, d, scale, told = _numbers(self, level)
        t = torch.full((len(x),), told, device=x.device, dtype=x.dtype)
        y, v = self.split(net(scale * x, t, at_clock(text, told)))
        return c * x + d * y.to(x.dtype), v

    def told(self, level: Level) -> float:
        """The clock that a network is told at this level."""
        return _numbers(self, level)[3]

    def split(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """A network's output as y (B, C, ...) and v: as many channels, or none."""
        channels = output.shape[1]
        if self.learned_variance:
            channels //= 2
        return output[:, :channels], output[:, channels:]

    def check(self) -> None:
        """Refuses a pair from which x0 cannot be recovered at every time.

        Raises:
            LdmError: the determinant vanishes, or data_std is missing; names a legal choice.
        """
        alpha, sigma = self.process.coefficients(_times(self.process))
        loud = bool(torch.hypot(alpha, sigma).max() > INPUT_STD_CEILING)
        if self.data_std is None and (loud or self.prediction.needs_data_std):
            raise missing_std_error(self.process.name, self.prediction.name)
        gain, t = _worst(self)
        if gain > GAIN_CEILING:
            reason = f"alpha({t:g})={self.process.level(t).alpha:g}"
            legal = tuple(p.name for p in PREDICTIONS.values() if admissible(self.process, p))
            raise singular_error(self.process.name, self.prediction.name, reason, legal)


def prepared(net: Denoiser, text: TextEmbedding, clocks: Sequence[float] = ()) -> TextEmbedding:
    """`text` for many calls of `net` with unchanged weights: what it can compute once is kept.

    `denoise` then hands the network what belongs to the clock it is told (`at_clock`); anything
    else may read the embedding as before. See `ldm.types.Prepares`.
    """
    return replace(text, kept=net.prepare(text, clocks)) if isinstance(net, Prepares) else text


def at_clock(text: TextEmbedding, clock: float) -> TextEmbedding:
    """What a network is called with at this clock: the text itself, unless it was `prepared`."""
    found: TextEmbedding = text.kept(clock) if callable(text.kept) else text
    return found


@lru_cache(maxsize=4096)
def _numbers(diffusion: Diffusion, level: Level) -> tuple[float, float, float, float]:
    """c and d of x0 = c x_t + d y, the scale of the input, and what the network is told of t.

    Plain numbers from CPU scalars: a device tensor here would make every step wait. Kept, since a
    run visits the same levels for every batch.
    """
    alpha, sigma = (torch.tensor(value, dtype=torch.float64) for value in level[1:])
    c, d = (float(part) for part in diffusion.solution(alpha, sigma))
    told = float(diffusion.process.told(torch.tensor(level.t, dtype=torch.float64)))
    return c, d, float(diffusion.input_scale(alpha, sigma)), told


def admissible(process: Process, prediction: Prediction) -> bool:
    """Whether the determinant lets x0 be recovered at every time, given a data_std."""
    return _worst(Diffusion(process, prediction, data_std=1.0))[0] <= GAIN_CEILING


def _worst(diffusion: Diffusion) -> tuple[float, float]:
    """The largest factor between x_t or y and x0, and the time where it occurs."""
    times = _times(diffusion.process)
    solution = diffusion.solution(*diffusion.process.coefficients(times))
    gains = torch.stack(solution).abs().amax(0).nan_to_num(nan=torch.inf)
    worst = int(gains.argmax())
    return float(gains[worst]), float(times[worst])


def _times(process: Process) -> Tensor:
    return torch.linspace(0, process.t_max, 1001, dtype=torch.float64)
