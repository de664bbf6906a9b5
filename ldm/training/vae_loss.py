"""What a VAE minimises, term by term, and the one forward pass that all terms come from.

The adversarial term is in `vae_gan.py`. B batch, C latent channels, f pixels per latent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.config.vae import EquivarianceConfig, VaeLossConfig
from ldm.models.autoencoder import AutoencoderKL, kl_divergence
from ldm.randomness import generator


class Turn(NamedTuple):
    """How the latent of one sample is changed: `quarters` turns of 90 degrees, then `side`."""

    row: int
    """Which sample of the micro-batch."""
    quarters: int
    side: int
    """Side of the changed latent."""


class Passed(NamedTuple):
    """What one forward pass gives."""

    reconstruction: Tensor
    """(B, 3, H, W)."""
    moments: Tensor
    """(B, 2C, h, w)."""
    logvar: Tensor | None
    """Log-variance of the reconstruction, (), where it is learnt."""
    turned: tuple[Tensor, ...]
    """Pictures decoded from changed latents, one batch per size, in the order of `by_side`."""


class VaePass(nn.Module):
    """All that training computes with trained parameters, in one forward.

    Distributed wrappers exchange the gradients of what their own forward computed and of nothing
    else, so no term may reach past it.

    Args:
        vae: what is trained.
        learn_logvar: give it the log-variance of the reconstruction, one number that begins at 0.
    """

    def __init__(self, vae: AutoencoderKL, *, learn_logvar: bool = False) -> None:
        super().__init__()
        self.vae = vae
        self.logvar = nn.Parameter(torch.zeros(())) if learn_logvar else None

    def forward(self, pixels: Tensor, noise: Tensor, turns: Sequence[Turn] = ()) -> Passed:
        """Pixels (B, 3, H, W), noise (B, C, h, w) -> what every term needs."""
        moments = self.vae.moments(pixels)
        z = self.vae.sample(moments, noise)
        turned = tuple(
            self.vae.decode_raw(changed(z, group, group[0].side)) for group in by_side(turns)
        )
        return Passed(self.vae.decode_raw(z), moments, self.logvar, turned)


def trained_part(passes: VaePass) -> nn.Module:
    """What is averaged and checkpointed: the VAE itself, as ever, where nothing else is learnt."""
    return passes.vae if passes.logvar is None else passes


def vae_loss(
    pixels: Tensor,
    reconstruction: Tensor,
    moments: Tensor,
    config: VaeLossConfig,
    perceptual: nn.Module | None = None,
    logvar: Tensor | None = None,
) -> dict[str, Tensor]:
    """The terms of the objective, one value per sample (B,); "loss" is what is minimised.

    All terms are per pixel value, so weights do not depend on the picture size. With
    d = mean |x - x_hat| (its square, or both) + perceptual_weight * perceptual distance:

        d + kl_weight * KL / (number of pixel values), or with a learnt log-variance s
        d / exp(s) + s + kl_weight * KL / (number of pixel values)

    Source: Rombach et al. 2022 (arXiv 2112.10752), section 3.1 and appendix G; s as in Dai & Wipf
    2019 (arXiv 1903.05789).
    """
    distance = pixel_distance(pixels, reconstruction, config)
    terms = {"reconstruction": distance, "kl": kl_divergence(moments.float()) / pixels[0].numel()}
    total = distance
    if perceptual is not None:
        terms["perceptual"] = perceptual(reconstruction, pixels)
        total = total + config.perceptual_weight * terms["perceptual"]
    if logvar is not None:
        terms["logvar"] = logvar.float().expand(len(pixels))
        total = total / terms["logvar"].exp() + terms["logvar"]
    return {"loss": total + config.kl_weight * terms["kl"], **terms}


def pixel_distance(pixels: Tensor, reconstruction: Tensor, config: VaeLossConfig) -> Tensor:
    """Mean |x - x_hat|, its square, or the sum of both, per sample (B,)."""
    errors = (reconstruction - pixels).flatten(1)
    distance = pixels.new_zeros(len(pixels))
    if "l1" in config.reconstruction:
        distance = distance + errors.abs().mean(1)
    if "l2" in config.reconstruction:
        distance = distance + errors.square().mean(1)
    return distance


def draw_turns(
    config: EquivarianceConfig, side: int, seed: int, epochs: Sequence[int], ids: Sequence[str]
) -> tuple[Turn, ...]:
    """Which latents of a micro-batch are changed, and how: functions of (seed, epoch, sample id).

    Args:
        config: how often and how much.
        side: of the latents, which are squares.
        seed: the run's.
        epochs: of the samples.
        ids: of the samples.
    """
    turns = []
    least = min(side, max(2, math.ceil(config.min_scale * side)))
    for row, (epoch, name) in enumerate(zip(epochs, ids, strict=True)):
        draws = generator(seed, "equivariance", epoch, name)
        chosen = draws.random() < config.probability
        quarters = int(draws.integers(4)) if config.rotate else 0
        smaller = int(draws.integers(least, side + 1))
        if chosen and (quarters or smaller != side):  # the identity is trained anyway
            turns.append(Turn(row, quarters, smaller))
    return tuple(turns)


def by_side(turns: Sequence[Turn]) -> list[list[Turn]]:
    """The turns of equal sides together: a batch has one size."""
    sides = sorted({turn.side for turn in turns})
    return [[turn for turn in turns if turn.side == side] for side in sides]


def changed(batch: Tensor, group: Sequence[Turn], side: int) -> Tensor:
    """The rows of `group`, turned and resized to `side`: of latents or of their pictures alike.

    (B, C, s, s) -> (len(group), C, side, side); shrinking averages over what it leaves out.
    """
    rows = torch.stack([torch.rot90(batch[turn.row], turn.quarters, (1, 2)) for turn in group])
    if side == batch.shape[-1]:
        return rows
    return F.interpolate(rows, (side, side), mode="bilinear", antialias=True)


def equivariance_distance(
    pixels: Tensor,
    turned: Sequence[Tensor],
    turns: Sequence[Turn],
    factor: int,
    loss: VaeLossConfig,
) -> Tensor:
    """How far pictures from changed latents are from the changed pictures, per sample (B,).

    0 for a sample whose latent was not changed. The change is the same for latents and pictures, at
    `factor` pixels per latent. EQ-VAE trains on this in place of the plain reconstruction for a
    share of the samples; here it is added for that share, as in Skorokhodov et al. 2025 (arXiv
    2502.14831), so that whole pictures are seen in every step. It is a pixel distance only: small
    pictures are below what perceptual networks can see.

    Source: Kouzelis et al. 2025 (arXiv 2502.09509), section 3.
    """
    total = pixels.new_zeros(len(pixels))
    for group, pictures in zip(by_side(turns), turned, strict=True):
        target = changed(pixels, group, group[0].side * factor)
        rows = torch.tensor([turn.row for turn in group], device=pixels.device)
        total = total.index_add(0, rows, pixel_distance(target, pictures.float(), loss))
    return total
