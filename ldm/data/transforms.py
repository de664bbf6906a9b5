"""Fits decoded pixels to the model's square: resize, crop, mirror, scale to [-1, 1]."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from PIL import Image

from ldm.errors import ExitCode, LdmError
from ldm.randomness import generator

if TYPE_CHECKING:
    from torch import Tensor

MAX_ASPECT = 10.0
"""Long side over short side; a longer strip would lose over nine tenths of itself to the crop."""


class Draws(NamedTuple):
    """What crop and mirror depend on: nothing else, so any process makes the same choice."""

    seed: int
    epoch: int
    sample_id: str


def fit(
    pixels: np.ndarray,
    image_px: int,
    *,
    draws: Draws,
    crop: Literal["center", "random"] = "center",
    flip: bool = False,
    small: Literal["upscale", "error"] = "upscale",
) -> Tensor:
    """A square of a picture: its short side becomes `image_px`, with antialiasing (Lanczos).

    Args:
        pixels: (H, W, 3) uint8.
        image_px: side of the result in pixels.
        draws: whose randomness places a random crop and decides on mirroring.
        crop: the middle of the long side, or a place drawn per epoch and sample.
        flip: mirror left-right with probability 1/2; wrong for captions that say left or right.
        small: what to do with a short side below `image_px`.

    Returns:
        (3, image_px, image_px) float32 in [-1, 1].

    Raises:
        LdmError: code BAD_DATA for a picture longer than MAX_ASPECT, or too small with
            `small="error"`; code CONFIG for an unknown `crop` or `small`.
    """
    import torch

    _check_choice("crop", crop, ("center", "random"))
    _check_choice("small", small, ("upscale", "error"))
    height, width = pixels.shape[:2]
    side = min(height, width)
    _check_size(width, height, image_px, small, draws.sample_id)
    left, top = _corner(height, width, draws, crop)
    square = pixels[top : top + side, left : left + side]
    if side != image_px:
        # the crop happens inside resize, so that pixels just outside it still take part in the
        # filter; reducing_gap 3 is indistinguishable from a full filter and faster on large photos
        resized = Image.fromarray(pixels).resize(
            (image_px, image_px),
            Image.Resampling.LANCZOS,
            box=(left, top, left + side, top + side),
            reducing_gap=3.0,
        )
        square = np.asarray(resized)
    if flip and is_mirrored(draws):
        square = square[:, ::-1]
    planes = np.ascontiguousarray(square.transpose(2, 0, 1), dtype=np.float32)  # (3, px, px)
    return torch.from_numpy(planes / np.float32(127.5) - np.float32(1))


def sizes_of(
    height: int,
    width: int,
    image_px: int,
    *,
    draws: Draws,
    crop: Literal["center", "random"] = "center",
    mirrored: bool = False,
) -> tuple[float, ...]:
    """What SDXL is told of the square that `fit` makes of such a picture; arguments as there.

    Podell et al. 2023 (arXiv 2307.01952), section 2.2. `mirrored` says whether it was.

    Returns:
        Height and width of the picture, top and left of the crop, height and width of the result.
        The crop is measured in pixels of the result, in the picture as mirrored.
    """
    side = min(height, width)
    left, top = _corner(height, width, draws, crop)
    if mirrored:
        left = width - side - left
    scale = image_px / side
    return (height, width, top * scale, left * scale, image_px, image_px)


def _corner(height: int, width: int, draws: Draws, crop: str) -> tuple[int, int]:
    """Left and top of the square, in pixels of the picture."""
    free_x, free_y = width - min(height, width), height - min(height, width)
    if crop == "center":
        return free_x // 2, free_y // 2
    place = generator(draws.seed, "crop", draws.epoch, draws.sample_id).random()
    return int(place * (free_x + 1)), int(place * (free_y + 1))


def is_mirrored(draws: Draws) -> bool:
    """Whether `flip` mirrors this picture in this epoch."""
    return bool(generator(draws.seed, "flip", draws.epoch, draws.sample_id).random() < 0.5)


def _check_choice(key: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise LdmError(
            f"unknown value {value!r}", where=key, fix=" or ".join(known), code=ExitCode.CONFIG
        )


def _check_size(width: int, height: int, image_px: int, small: str, name: str) -> None:
    short, long = sorted((width, height))
    if long > MAX_ASPECT * short:
        raise LdmError(
            f"a strip of {width} x {height} pixels: one side is more than {MAX_ASPECT:g} times "
            "the other, a square crop would show almost nothing of it",
            where=name,
            fix="cut it into squarer pictures or remove it",
            code=ExitCode.BAD_DATA,
        )
    if small == "error" and short < image_px:
        raise LdmError(
            f"{width} x {height} pixels is smaller than image_px={image_px}",
            where=name,
            fix="remove it, lower image_px, or accept upscaling",
            code=ExitCode.BAD_DATA,
        )
