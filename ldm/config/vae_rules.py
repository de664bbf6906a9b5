"""The rules between fields that only a VAE experiment has, each with a legal value. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from ldm.config.schema import VaeExperiment

SMALLEST = {"lpips": 16, "lpips_alex": 31}
"""Sides in pixels below which the backbone of a perceptual distance has nothing left."""


def vae_conflicts(config: VaeExperiment) -> Iterator[tuple[str, str, str]]:
    """Every such rule that is broken, as (key, what, fix)."""
    yield from _crop_conflicts(config)
    yield from _perceptual_conflicts(config)
    if config.gan.loss != "none":
        yield from _gan_conflicts(config)
    if config.train.only == "decoder":
        yield from _decoder_conflicts(config)


def _smallest_side(config: VaeExperiment) -> tuple[str, int]:
    """The smallest square that training sees, and the key that sets it."""
    crop = config.crop.side_px
    if crop is not None and crop < config.data.image_px:
        return "crop.side_px", crop
    return "data.image_px", config.data.image_px


def _crop_conflicts(config: VaeExperiment) -> Iterator[tuple[str, str, str]]:
    side, factor = config.crop.side_px, config.model.downsample_factor
    if side is not None and (side % factor or side > config.data.image_px):
        yield (
            "crop.side_px",
            f"{side} is not a multiple of {factor} up to data.image_px={config.data.image_px}",
            f"crop.side_px={max(factor, config.data.image_px // 2 // factor * factor)}",
        )


def _perceptual_conflicts(config: VaeExperiment) -> Iterator[tuple[str, str, str]]:
    loss = config.loss
    key, side = _smallest_side(config)
    if side < (least := SMALLEST.get(loss.perceptual, 1)):
        yield (
            "loss.perceptual",
            f"{loss.perceptual} needs {least} pixels or more, and {key}={side}",
            f"loss.perceptual=gradients, or {key} of {least} or more",
        )
    if loss.perceptual == "clip" and loss.perceptual_path is None:
        yield (
            "loss.perceptual_path",
            "clip compares features of a CLIP that you trained",
            "loss.perceptual_path=RUN of `ldm train-clip`",
        )
    if loss.perceptual == "gradients" and loss.perceptual_path is not None:
        yield "loss.perceptual_path", "gradients has no weights", "loss.perceptual_path=null"


def _gan_conflicts(config: VaeExperiment) -> Iterator[tuple[str, str, str]]:
    gan, steps = config.gan, config.train.steps
    if gan.start_step >= steps:
        yield (
            "gan.start_step",
            f"{gan.start_step} is not before the last of train.steps={steps}",
            f"gan.start_step={steps // 2}, or gan.loss=none",
        )
    if gan.discriminator_first_steps > gan.start_step:
        yield (
            "gan.discriminator_first_steps",
            f"{gan.discriminator_first_steps} steps do not fit before "
            f"gan.start_step={gan.start_step}",
            f"gan.discriminator_first_steps={gan.start_step}",
        )
    key, side = _smallest_side(config)
    least = 3 * 2**gan.layers
    if side < least:
        layers = max((n for n in range(1, gan.layers) if 3 * 2**n <= side), default=1)
        yield (
            "gan.layers",
            f"{gan.layers} layers need {least} pixels or more, and {key}={side}",
            f"gan.layers={layers}",
        )


def _decoder_conflicts(config: VaeExperiment) -> Iterator[tuple[str, str, str]]:
    if config.model.pretrained is None:
        yield (
            "train.only",
            "decoder keeps the encoder as it is, and a random one is not worth keeping",
            "model.pretrained=PATH, or train.only=all",
        )
    if config.equivariance.weight > 0:
        yield (
            "equivariance.weight",
            "it changes latents, which train.only=decoder keeps",
            "equivariance.weight=0",
        )
