"""One step of VAE training: gradients of the VAE, and of the discriminator where there is one.

B batch, C latent channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ldm.config.schema import VaeExperiment
from ldm.config.vae import DetailCropConfig
from ldm.randomness import generator, normal
from ldm.training.session import Session
from ldm.training.vae_gan import Adversary, adaptive_weight, detached, generator_loss
from ldm.training.vae_loss import (
    Passed,
    Turn,
    VaePass,
    draw_turns,
    equivariance_distance,
    vae_loss,
)
from ldm.types import Batch

LAST_LAYER = "vae.decoder.conv_out.weight"
"""Of `VaePass`: where the adaptive weight compares gradients."""

Values = dict[str, Tensor | float]


@dataclass
class Networks:
    """What one optimizer step works with.

    Args:
        passes: the VAE.
        trained: `passes` as it is called in training: wrapped for distribution, compiled.
        perceptual: the frozen perceptual distance, or None.
        adversary: the discriminator and its optimizer, or None.
    """

    passes: VaePass
    trained: nn.Module
    perceptual: nn.Module | None = None
    adversary: Adversary | None = None


class Inputs(NamedTuple):
    """One micro-batch on the device."""

    pixels: Tensor
    """(B, 3, H, W)."""
    noise: Tensor
    """(B, C, h, w), of the posterior."""
    turns: tuple[Turn, ...]
    weight: Tensor
    """(B,), 0 for a sample set aside."""


def accumulate(
    session: Session,
    networks: Networks,
    batches: Iterator[Batch],
    config: VaeExperiment,
    step: int,
) -> Values:
    """Forward and backward over this rank's micro-batches of one step; returns mean terms.

    Gradients are left in the parameters that they belong to. That of the loss is the sum over
    samples over the global batch, so it does not depend on how ranks and micro-batches share the
    work; the adaptive weight is one number for all of them.
    """
    share = config.train.batch_size / session.world_size
    adversary, values = networks.adversary, Values()
    micro_batches: Iterable[Inputs] = (
        inputs_of(next(batches), session, config, step) for _ in range(config.train.accumulation)
    )
    factor = 0.0 if adversary is None else adversary.weight(step)
    adaptive: Tensor | float | None = None if config.gan.adaptive else 1.0
    if factor and adaptive is None and measures_first(config):
        micro_batches = list(micro_batches)
        adaptive = measured_weight(session, networks, micro_batches, config)
    for micro, given in enumerate(micro_batches):
        last = micro == config.train.accumulation - 1
        with session.micro_batch_context(networks.trained, last=last):
            with session.autocast():
                passed = as_float(networks.trained(given.pixels, given.noise, given.turns))
            terms = objective(given, passed, networks, config)
            loss = (terms["loss"] * given.weight).sum() / share
            if adversary is not None and factor:
                terms["gan_generator"] = opposition(session, adversary, passed.reconstruction)
                opposed = (terms["gan_generator"] * given.weight).sum() / share
                if adaptive is None:
                    layer = networks.passes.get_parameter(LAST_LAYER)
                    gradients = gradients_at(layer, loss, opposed)
                    adaptive = adaptive_weight(
                        session.summed(gradients), config.gan.max_adaptive_weight
                    )
                loss = loss + factor * adaptive * opposed
            session.accelerator.backward(loss)
        add_means(values, terms, given.weight, share)
        if adversary is not None and adversary.trains(step):
            with session.micro_batch_context(adversary.passes, last=last):
                terms = judge(session, adversary, given, passed.reconstruction, step)
                session.accelerator.backward((terms.pop("loss") * given.weight).sum() / share)
            add_means(values, terms, given.weight, share)
    if adversary is not None:
        values["gan_weight"] = factor * adaptive if adaptive is not None else 0.0
    return values


def inputs_of(batch: Batch, session: Session, config: VaeExperiment, step: int) -> Inputs:
    """What a micro-batch is trained on in `step`: pixels, noise and turns on the device."""
    assert batch.pixels is not None
    pixels, seed = batch.pixels, config.train.seed
    if config.crop.side_px is not None and step < config.crop.until * config.train.steps:
        pixels = detail_crops(pixels, config.crop, seed, batch)
    pixels = pixels.to(session.device, memory_format=torch.channels_last)
    side = pixels.shape[-1] // config.model.downsample_factor
    shape = (config.model.latent_channels, side, side)
    noise = normal(shape, seed, "posterior", batch.epochs, batch.ids).to(session.device)
    turns: tuple[Turn, ...] = ()
    if config.equivariance.weight:
        turns = draw_turns(config.equivariance, side, seed, batch.epochs, batch.ids)
    return Inputs(pixels, noise, turns, batch.weight.to(session.device))


def as_float(passed: Passed) -> Passed:
    """The reconstruction in fp32, as losses need it."""
    return passed._replace(reconstruction=passed.reconstruction.float())


def objective(
    given: Inputs, passed: Passed, networks: Networks, config: VaeExperiment
) -> dict[str, Tensor]:
    """The terms that need no adversary, (B,) each; "loss" is their weighted sum."""
    terms = vae_loss(
        given.pixels,
        passed.reconstruction,
        passed.moments,
        config.loss,
        networks.perceptual,
        passed.logvar,
    )
    if config.equivariance.weight:
        factor = config.model.downsample_factor
        terms["equivariance"] = equivariance_distance(
            given.pixels, passed.turned, given.turns, factor, config.loss
        )
        terms["loss"] = terms["loss"] + config.equivariance.weight * terms["equivariance"]
    return terms


def opposition(session: Session, adversary: Adversary, reconstruction: Tensor) -> Tensor:
    """The adversarial term of the VAE per sample, (B,), before any weight."""
    with session.autocast():
        scores = adversary.scores(reconstruction)
    return generator_loss(adversary.config.loss, scores)


def judge(
    session: Session, adversary: Adversary, given: Inputs, reconstruction: Tensor, step: int
) -> dict[str, Tensor]:
    """The discriminator's own terms, (B,) each: no gradient goes back to the VAE."""
    with session.autocast():
        verdict = adversary.passes(given.pixels, reconstruction.detach(), adversary.penalises(step))
    return adversary.losses(verdict)


def measures_first(config: VaeExperiment) -> bool:
    """Whether the adaptive weight needs a pass of its own, a third more time for the VAE.

    With several micro-batches their gradients must be added up before the first is followed back; a
    compiled network cannot be followed back twice.
    """
    return config.train.accumulation > 1 or config.train.compile


def measured_weight(
    session: Session, networks: Networks, micro_batches: Sequence[Inputs], config: VaeExperiment
) -> Tensor:
    """The adaptive weight of a step, before its gradients: forward passes that end in the last
    layer's weights and keep nothing else."""
    adversary = networks.adversary
    assert adversary is not None
    weights = detached(networks.passes)
    layer = weights[LAST_LAYER] = weights[LAST_LAYER].clone().requires_grad_()
    total = torch.zeros((2, *layer.shape), device=layer.device)
    for given in micro_batches:
        with session.autocast():
            passed = as_float(
                functional_call(networks.passes, weights, (given.pixels, given.noise, given.turns))
            )
        loss = (objective(given, passed, networks, config)["loss"] * given.weight).sum()
        opposed = (opposition(session, adversary, passed.reconstruction) * given.weight).sum()
        total += gradients_at(layer, loss, opposed)
    return adaptive_weight(session.summed(total), config.gan.max_adaptive_weight)


def gradients_at(layer: Tensor, loss: Tensor, opposed: Tensor) -> Tensor:
    """Gradients of both terms at one layer's weights, (2, *layer.shape); the graph stays."""
    found = [torch.autograd.grad(term, layer, retain_graph=True)[0] for term in (loss, opposed)]
    return torch.stack(found)


def add_means(values: Values, terms: dict[str, Tensor], weight: Tensor, share: float) -> None:
    """Adds the terms of a micro-batch to the step's means."""
    for name, term in terms.items():
        values[name] = values.get(name, 0.0) + (term.detach() * weight).sum() / share


def detail_crops(pixels: Tensor, config: DetailCropConfig, seed: int, batch: Batch) -> Tensor:
    """The most detailed of a few random crops of each picture, (B, 3, side_px, side_px).

    Plain backgrounds teach a codec little; a crop with much variance has edges in it. Where crops
    lie is a function of (seed, epoch, sample id), like every other draw.
    """
    side = config.side_px
    assert side is not None
    room = pixels.shape[-1] - side + 1
    found = [
        picture[:, y : y + side, x : x + side]
        for picture, epoch, name in zip(pixels, batch.epochs, batch.ids, strict=True)
        for y, x in generator(seed, "detail crop", epoch, name)
        .integers(room, size=(config.candidates, 2))
        .tolist()
    ]
    crops = torch.stack(found).unflatten(0, (len(pixels), config.candidates))
    best = crops.var(dim=(3, 4)).sum(2).argmax(1)
    return crops[torch.arange(len(pixels)), best]
