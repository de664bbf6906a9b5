"""The adversary of a VAE: a discriminator, its losses, and how much its verdict counts.

Both networks step once per optimizer step of the run, on the same pictures: first the VAE's
gradient is taken against the discriminator as it is, then the discriminator's on the detached
reconstructions. Neither gradient reaches the other network. B batch, h, w patches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ldm.config.vae import GanConfig
from ldm.models.discriminator import PatchDiscriminator
from ldm.training.optim import learning_rate
from ldm.training.session import Update

DELTA = 1e-6
"""Keeps the adaptive weight finite (VQGAN, eq. 7)."""


class Verdict(NamedTuple):
    """What the discriminator's own pass gives."""

    real: Tensor
    """Scores of pictures, (B, 1, h, w)."""
    fake: Tensor
    """Scores of reconstructions, (B, 1, h, w)."""
    penalty: Tensor | None
    """|grad D|^2 at the pictures, (B,), where it was asked for."""


class DiscriminatorPass(nn.Module):
    """All that training the discriminator computes with its parameters, in one forward."""

    def __init__(self, net: PatchDiscriminator) -> None:
        super().__init__()
        self.net = net

    def forward(self, real: Tensor, fake: Tensor, penalise: bool = False) -> Verdict:
        """Pictures and detached reconstructions, (B, 3, H, W) each."""
        scores = self.net(torch.cat([real, fake])).float()
        penalty = gradient_penalty(self.net, real) if penalise else None
        return Verdict(scores[: len(real)], scores[len(real) :], penalty)


def gradient_penalty(net: nn.Module, real: Tensor) -> Tensor:
    """R1: |d D(x) / dx|^2 at real pictures, (B,), D the mean score over the patches of a picture.

    In fp32 whatever the surroundings: a gradient of a gradient has no bits to spare.

    Source: Mescheder et al. 2018 (arXiv 1801.04406), section 4.1, without gamma / 2.
    """
    with torch.autocast(real.device.type, enabled=False):
        real = real.detach().float().requires_grad_()
        score = net(real).flatten(1).mean(1).sum()
        (gradient,) = torch.autograd.grad(score, real, create_graph=True)
    return gradient.square().flatten(1).sum(1)


def discriminator_loss(kind: str, real: Tensor, fake: Tensor) -> Tensor:
    """What the discriminator minimises, (B,) from scores (B, 1, h, w): the mean of both halves.

    Knowing nothing costs 1 (hinge) or log 2. hinge: Lim & Ye 2017 (arXiv 1705.02894); the
    others: Goodfellow et al. 2014 (arXiv 1406.2661), eq. 1, with D = sigmoid(score).
    """
    if kind == "hinge":
        halves = F.relu(1 - real), F.relu(1 + fake)
    else:
        halves = F.softplus(-real), F.softplus(fake)
    return 0.5 * (halves[0].flatten(1).mean(1) + halves[1].flatten(1).mean(1))


def generator_loss(kind: str, fake: Tensor) -> Tensor:
    """What the VAE minimises against the discriminator, (B,) from scores (B, 1, h, w).

    hinge: -score. vanilla: log(1 - D), the minimax game, whose gradient vanishes where the
    discriminator is sure. non_saturating: -log D (Goodfellow et al. 2014, section 3).
    """
    if kind == "hinge":
        loss = -fake
    elif kind == "vanilla":
        loss = -F.softplus(fake)
    else:
        loss = F.softplus(-fake)
    return loss.flatten(1).mean(1)


@dataclass
class Adversary:
    """The discriminator of a run, with what decides when and how much it counts.

    Everything about time is a function of the run's optimizer step, the one counter there is.
    """

    config: GanConfig
    net: PatchDiscriminator
    passes: nn.Module
    """`DiscriminatorPass` of `net`, wrapped for distribution."""
    optimizer: torch.optim.Optimizer
    steps: int
    """Optimizer steps of the whole run."""

    @property
    def first_step(self) -> int:
        """The step at which the discriminator begins to train."""
        return self.config.start_step - self.config.discriminator_first_steps

    def trains(self, step: int) -> bool:
        """Whether the discriminator trains in `step` (0-based)."""
        return step >= self.first_step

    def update(self, step: int) -> Update:
        """Its part of the optimizer step; the schedule begins where its training begins."""
        first, optim = self.first_step, self.config.optim
        rate = learning_rate(step - first, self.steps - first, optim)
        return Update(self.passes, self.optimizer, rate, optim.clip_norm)

    def weight(self, step: int) -> float:
        """Weight of the adversarial term in `step`, before the adaptive one: 0 until it counts."""
        done = step - self.config.start_step + 1
        if done <= 0:
            return 0.0
        return self.config.weight * min(1.0, done / max(1, self.config.ramp_steps))

    def penalises(self, step: int) -> bool:
        """Whether `step` has an R1 penalty."""
        return self.config.r1_weight > 0 and step % self.config.r1_every == 0

    def scores(self, pictures: Tensor) -> Tensor:
        """Scores (B, 1, h, w) that the VAE is judged by: no gradient reaches a parameter here.

        The bare network, not the wrapped one: all ranks hold the same, and a wrapper would wait for
        gradients of its parameters that never come.
        """
        scores: Tensor = functional_call(self.net, detached(self.net), pictures)
        return scores.float()

    def losses(self, verdict: Verdict) -> dict[str, Tensor]:
        """The terms of the discriminator's objective per sample, (B,); "loss" is minimised."""
        config = self.config
        terms = {
            "loss": discriminator_loss(config.loss, verdict.real, verdict.fake),
            "gan_real": verdict.real.flatten(1).mean(1),
            "gan_fake": verdict.fake.flatten(1).mean(1),
        }
        terms["gan_discriminator"] = terms["loss"]
        if verdict.penalty is not None:
            terms["gan_r1"] = verdict.penalty
            # lazy: one stands for the steps in between (StyleGAN2, arXiv 1912.04958, appendix B)
            scale = 0.5 * config.r1_weight * config.r1_every
            terms["loss"] = terms["loss"] + scale * verdict.penalty
        return terms


def detached(net: nn.Module) -> dict[str, Tensor]:
    """The parameters of `net` cut off from their gradients, for `functional_call`."""
    return {name: parameter.detach() for name, parameter in net.named_parameters()}


def adaptive_weight(gradients: Tensor, largest: float) -> Tensor:
    """|grad of the reconstruction| / (|grad of the adversarial term| + delta), at most `largest`.

    Both gradients are those of the whole global batch at the decoder's last layer, summed over
    ranks and micro-batches before their lengths are taken: lengths of parts do not add up, and
    ranks with weights of their own would train different networks.

    Source: Esser et al. 2021 (arXiv 2012.09841), eq. 7.

    Args:
        gradients: (2, ...), of the reconstruction and of the adversarial term.
        largest: the clamp.

    Returns:
        (), not finite where a gradient is not, so that the step is skipped.
    """
    reconstruction, adversarial = gradients.float().flatten(1).norm(dim=1)
    return (reconstruction / (adversarial + DELTA)).clamp(max=largest)
