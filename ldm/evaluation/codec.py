"""How good a reconstruction is and what a latent channel carries: measures of `ldm vae doctor`.

B pictures, N pictures in all, C latent channels, D features, h, w latent size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.randomness import generator

WINDOW, WINDOW_STD = 11, 1.5
"""Pixels and standard deviation of the Gaussian window of SSIM."""
RANDOM_FEATURES = "random-conv-64"
"""Name of the features of `random_features`; another network would be another name."""
HALF_NYQUIST = 0.25
"""Cycles per latent pixel from which a frequency counts as high."""

Features = Callable[[Tensor], Tensor]
"""Pixels (B, 3, H, W) in [-1, 1] -> (B, D)."""


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each picture (B, 3, H, W) in [-1, 1]; inf where equal."""
    error = (x.clamp(-1, 1) - y.clamp(-1, 1)).double().square().flatten(1).mean(1)
    return 10 * torch.log10(4 / error)


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity of each picture (B, 3, H, W) in [-1, 1], sides of 11 pixels or more.

    The mean over channels and over all places where the window fits. Own code, so that it needs no
    extra package and runs where the pictures are; it equals scikit-image's Gaussian variant.
    Source: Wang et al. 2004 (doi 10.1109/TIP.2003.819861), eq. 13, K = (0.01, 0.03).
    """
    places = torch.arange(WINDOW, dtype=torch.float64, device=x.device) - WINDOW // 2
    line = torch.exp(-places.square() / (2 * WINDOW_STD**2))
    line = line / line.sum()

    def blurred(z: Tensor) -> Tensor:
        z = F.conv2d(z.flatten(0, 1)[:, None], line[None, None, :, None])
        return F.conv2d(z, line[None, None, None]).unflatten(0, x.shape[:2])[:, :, 0]

    x, y = x.clamp(-1, 1).double(), y.clamp(-1, 1).double()
    mean_x, mean_y = blurred(x), blurred(y)
    var_x, var_y = blurred(x * x) - mean_x**2, blurred(y * y) - mean_y**2
    covariance = blurred(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2  # values range over 2
    likeness = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return (likeness / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).flatten(1).mean(1)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Squared Frechet distance between Gaussians with the moments of a (N, D) and b (M, D).

    |mean_a - mean_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)). The last trace is the nuclear norm of
    R_a R_b^T for factors S = R^T R of centred data, so nothing is lost to the square root of small
    or negative eigenvalues, and fewer pictures than features are no fault.
    Source: Dowson & Landau 1982, eq. 4; Heusel et al. 2017 (arXiv 1706.08500), eq. 6.
    """
    factors, means = [], []
    for rows in (a.double(), b.double()):
        means.append(rows.mean(0))
        centred = (rows - means[-1]) / math.sqrt(max(len(rows) - 1, 1))
        factors.append(torch.linalg.qr(centred, mode="r")[1])
    cross = torch.linalg.svdvals(factors[0] @ factors[1].T).sum()
    spread = factors[0].square().sum() + factors[1].square().sum()
    return max(float((means[0] - means[1]).square().sum() + spread - 2 * cross), 0.0)


def random_features(pixels: Tensor) -> Tensor:
    """Means of 64 fixed random features, (B, 64): three convolutions of stride 2 with ReLU.

    Untrained convolutions see blur, noise and colour, not meaning, and need no download. Distances
    compare codecs with each other, never with published FID.
    """
    x, width = pixels.float(), 3
    for layer, wider in enumerate((32, 64, 64)):
        draw = generator(0, RANDOM_FEATURES, layer).standard_normal((wider, width, 3, 3))
        weight = torch.from_numpy(draw).to(x) * math.sqrt(2 / (9 * width))  # keeps the variance
        x, width = F.relu(F.conv2d(x, weight, stride=2, padding=1)), wider
    return x.mean((2, 3))


def high_frequency_share(x: Tensor) -> float:
    """Share of the energy of (B, C, h, w), means taken off, above half of Nyquist; 0 when flat.

    White noise has 0.80. Pictures have little, and latents with little are easier to generate:
    Skorokhodov et al. 2025 (arXiv 2502.14831), section 3.
    """
    x = x.double() - x.double().mean((2, 3), keepdim=True)
    energy = torch.fft.fft2(x).abs().square().sum((0, 1))
    rows, columns = (torch.fft.fftfreq(side, device=x.device) for side in energy.shape)
    high = torch.hypot(rows[:, None], columns[None]) > HALF_NYQUIST
    total = energy.sum()
    return float(energy[high].sum() / total) if total > 0 else 0.0


@dataclass(frozen=True)
class LatentStatistics:
    """Of normalised latents, per channel (C,) float64 unless said otherwise.

    Args:
        mean, std: of posterior samples; 0 and 1 where the stored statistics fit the pictures.
        mean_error, std_error: their standard errors, from how pictures differ.
        signal_std: standard deviation of posterior means alone.
        kl: divergence from the standard normal in nats per latent position, of raw z.
        correlation: between posterior means of channels, (C, C).
        certain: whether the codec has no posterior, so that `kl` says nothing.
    """

    mean: Tensor
    std: Tensor
    mean_error: Tensor
    std_error: Tensor
    signal_std: Tensor
    kl: Tensor
    correlation: Tensor
    certain: bool


class LatentMeter:
    """Collects LatentStatistics over batches."""

    def __init__(self) -> None:
        self.first: list[Tensor] = []  # of each picture: mean, mean square, mean variance, kl
        self.products: list[Tensor] = []
        self.certain = True

    def add(self, moments: Tensor, mean: Tensor, plus_one_std: Tensor) -> None:
        """A batch.

        Args:
            moments: posterior mean and log-variance of raw z, (B, 2C, h, w).
            mean: latents of the posterior mean, (B, C, h, w).
            plus_one_std: latents one posterior standard deviation above it.
        """
        raw, logvar = moments.double().chunk(2, dim=1)
        self.certain &= bool(logvar.max() < -25)
        mean, std = mean.double(), (plus_one_std - mean).double().abs()
        kl = 0.5 * (raw.square() + logvar.exp() - 1 - logvar)
        parts = (mean, mean.square(), std.square(), kl)
        self.first.append(torch.stack([part.mean((2, 3)) for part in parts]).cpu())
        flat = mean.flatten(2)
        self.products.append((flat @ flat.mT / flat.shape[2]).cpu())

    def result(self) -> LatentStatistics:
        """The statistics of all batches."""
        mean, square, noise, kl = torch.cat(self.first, dim=1)  # each (N, C)
        pictures = max(len(mean) - 1, 1)
        centre = mean.mean(0)
        covariance = torch.cat(self.products).mean(0) - torch.outer(centre, centre)
        signal = covariance.diagonal().clamp(min=0).sqrt()
        variance = (square + noise).mean(0) - centre.square()
        spread = (square + noise - 2 * mean * centre).std(0, correction=0)
        std = variance.clamp(min=0).sqrt()
        scale = signal.clamp(min=1e-30)
        return LatentStatistics(
            mean=centre,
            std=std,
            mean_error=mean.std(0, correction=0) / math.sqrt(pictures),
            std_error=spread / math.sqrt(pictures) / (2 * std.clamp(min=1e-30)),
            signal_std=signal,
            kl=kl.mean(0),
            correlation=covariance / torch.outer(scale, scale),
            certain=self.certain,
        )
