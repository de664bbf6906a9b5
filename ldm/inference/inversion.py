"""Pictures to the noise they would be drawn from, and pictures from given noise.

For editing, for interpolating, and to see how far a model's path can be walked back. Settings are
those of `Pipeline.__call__`; noise is (B, C, h, w), standard normal, on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.data.decode import decode_image
from ldm.diffusion import inversion
from ldm.diffusion.inversion import slerp
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.schedule import levels
from ldm.errors import LdmError, named
from ldm.inference.guiding import guided_denoise
from ldm.inference.images import Request
from ldm.inference.pipeline import to_images
from ldm.models import tiling

if TYPE_CHECKING:
    from ldm.inference.pipeline import Pipeline


@torch.inference_mode()
def invert(
    pipeline: Pipeline,
    pictures: Image.Image | Sequence[Image.Image],
    prompt: str | Sequence[str],
    *,
    method: str = "heun",
    cfg_scale: float = 1.0,
    batch_size: int = 16,
    **settings: Any,
) -> Tensor:
    """The noise (B, C, h, w) from which `draw_from` makes these pictures again, nearly.

    What comes back is what the autoencoder keeps of a picture, and with few steps a little less.
    Without guidance, as here by default, the way back is well defined; guidance above 1 bends the
    path and needs many more steps: Mokady et al. 2022 (arXiv 2211.09794), section 3.1. Draw with
    the same settings, and with the sampler of the method.

    Args:
        pipeline: the model.
        pictures: one, or several of one size, sides multiples of `pipeline.stride`.
        prompt: what the pictures show: one text for all, or one for each; "" is no text.
        method: "heun" or "ddim", see `ldm.diffusion.inversion`.
        cfg_scale: guidance; 1 is off.
        batch_size: pictures at once; changes memory and speed, not the noise.
        settings: steps, spacing, shift and the other settings of guidance.

    Raises:
        LdmError: no pictures or of several sizes, or a setting that the model cannot serve, or that
            is settled by the pictures or the method.
    """
    _check_batch(batch_size)
    _refuse_settled(settings)
    named("method", inversion.METHODS, method)
    walked = {"sampler": method, "eta": 0.0}  # a method has the name of the sampler it undoes
    for key, value in walked.items():
        if settings.get(key, value) != value:
            raise LdmError(
                f"{key}={settings[key]} is asked for, and method {method} walks back along "
                f"{key}={value}",
                where=key,
                fix=f"leave it out; method is one of {', '.join(inversion.METHODS)}",
            )
    pixels = _pixels([pictures] if isinstance(pictures, Image.Image) else pictures)
    height, width = pixels.shape[2:]
    settings = {**settings, **walked, "cfg_scale": cfg_scale, "size": (height, width)}
    requests = _requests(pipeline, len(pixels), prompt, settings)
    first, process = requests[0], pipeline.diffusion.process
    plan = levels(process, first.steps, spacing=first.spacing, shift=first.shift)
    found = []
    for begin in range(0, len(pixels), batch_size):
        rows = slice(begin, begin + batch_size)
        x0 = encode(pipeline, pixels[rows])
        denoise = guided_denoise(pipeline, requests[rows], plan)
        x = inversion.invert(denoise, x0, plan, method=method)
        found.append(x.cpu() / math.hypot(plan[0].alpha, plan[0].sigma))
    return torch.cat(found)


def encode(pipeline: Pipeline, pixels: Tensor) -> Tensor:
    """Pixels (B, 3, H, W) in [-1, 1] to latents (B, C, h, w), the posterior's mean, float32."""
    pixels = pixels.to(next(pipeline.vae.parameters()))
    moments = tiling.encode(pipeline.vae, pixels, pipeline.vae_tile_px)
    return pipeline.vae.latents(moments, moments.new_zeros(())).float()


@torch.inference_mode()
def draw_from(
    pipeline: Pipeline,
    noise: Tensor,
    prompt: str | Sequence[str],
    *,
    batch_size: int = 16,
    **settings: Any,
) -> tuple[Image.Image, ...]:
    """Pictures from given noise; they carry no request, since no seed makes them.

    Args:
        pipeline: the model.
        noise: (B, C, h, w), standard normal: what `invert` gives, or `slerp` of two.
        prompt: one text for all, or one for each.
        batch_size: pictures drawn at once; changes memory and speed, not the pictures.
        settings: as for `Pipeline.__call__`, but n and size; seed is that of samplers that draw
            noise on the way.

    Raises:
        LdmError: noise of another shape, or a setting that the model cannot serve.
    """
    _check_batch(batch_size)
    _refuse_settled(settings)
    channels, factor = pipeline.contract.latent_channels, pipeline.vae.downsample_factor
    if noise.ndim != 4 or noise.shape[1] != channels or not len(noise):
        raise LdmError(
            f"noise of shape {tuple(noise.shape)} does not fit this model",
            where="noise",
            fix=f"give (pictures, {channels}, height / {factor}, width / {factor})",
        )
    settings = {**settings, "size": (noise.shape[2] * factor, noise.shape[3] * factor)}
    requests = _requests(pipeline, len(noise), prompt, settings)
    size = 1 if SAMPLERS[requests[0].sampler].adaptive else batch_size
    images: list[Image.Image] = []
    for begin in range(0, len(noise), size):
        rows = slice(begin, begin + size)
        images += to_images(pipeline._draw_batch(requests[rows], noise[rows].float()))
    return tuple(images)


def interpolate(
    pipeline: Pipeline,
    first: Tensor,
    second: Tensor,
    prompt: str | Sequence[str],
    *,
    count: int = 5,
    **settings: Any,
) -> tuple[Image.Image, ...]:
    """Pictures on the way from one noise (C, h, w) to another, ends included.

    Along the arc between them: Song et al. 2020 (arXiv 2010.02502), section 5.3.

    Args:
        pipeline, prompt, settings: as for `draw_from`; of several prompts, one for each picture.
        first, second: noises, such as rows of what `invert` gives for two pictures.
        count: number of pictures, at least 2.

    Raises:
        LdmError: count is below 2, the noises differ in shape, or as `draw_from`.
    """
    if first.shape != second.shape:
        raise LdmError(
            f"noises of shapes {tuple(first.shape)} and {tuple(second.shape)} have no way between",
            where="noise",
            fix="give two of one shape",
        )
    if count < 2:
        raise LdmError(f"count={count} leaves nothing between", where="count", fix="use 5")
    path = [slerp(first[None], second[None], k / (count - 1)) for k in range(count)]
    return draw_from(pipeline, torch.cat(path), prompt, **settings)


def _requests(
    pipeline: Pipeline, count: int, prompt: str | Sequence[str], settings: dict[str, Any]
) -> list[Request]:
    """One checked request for each picture."""
    prompts = [prompt] * count if isinstance(prompt, str) else list(prompt)
    if len(prompts) != count:
        raise LdmError(
            f"{len(prompts)} prompts for {count} pictures",
            where="prompt",
            fix=f"give one, or {count}",
        )
    requests = pipeline.requests(prompts, **settings)
    pipeline.check(requests[0])  # they differ in prompt and seed alone
    return requests


def _refuse_settled(settings: dict[str, Any]) -> None:
    if extra := settings.keys() & {"n", "size"}:
        raise LdmError(
            f"{' and '.join(sorted(extra))} is settled by the pictures or the noise",
            where="settings",
            fix="leave it out",
        )


def _check_batch(size: int) -> None:
    if size < 1:
        raise LdmError(f"a batch of {size} is empty", where="batch_size", fix="use 16")


def _pixels(pictures: Sequence[Image.Image]) -> Tensor:
    """(B, 3, H, W) in [-1, 1]."""
    decoded = [decode_image(picture) for picture in pictures]
    sizes = sorted({(pixels.shape[1], pixels.shape[0]) for pixels in decoded})
    if len(sizes) != 1:
        found = ", ".join(f"{width}x{height}" for width, height in sizes) or "none"
        raise LdmError(
            f"pictures of one size are needed, got {found}",
            where="pictures",
            fix="resize them, or invert them one by one",
        )
    return torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2).float() / 127.5 - 1
