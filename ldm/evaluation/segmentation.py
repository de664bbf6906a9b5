"""Finds the background and the objects of a picture in the manner of the shapes data.

Nothing is learned: objects are what differs from the border, and each is compared with the five
outlines. Knows nothing of captions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from ldm.data.scenes import BACKGROUNDS, COLOURS, OUTLINES, SIZES
from ldm.errors import LdmError, missing_package


@dataclass(frozen=True, slots=True)
class Found:
    """One object seen in a picture; lengths are fractions of its side.

    Args:
        colour: the nearest colour, or None if it has none of ours or several.
        shape: the nearest outline, or None if it is like none of ours.
        size: its size class, or None if it is far too small or too large for any.
        x: centre of the bounding box of that outline.
        y: as x.
        diameter: of that outline, comparable with SIZES.
        likeness: overlap with that outline, intersection over union in [0, 1].
    """

    colour: str | None
    shape: str | None
    size: str | None
    x: float
    y: float
    diameter: float
    likeness: float


@dataclass(frozen=True, slots=True)
class Seen:
    """What a picture shows; objects from the largest to the smallest."""

    background: str | None
    objects: tuple[Found, ...]


def look(image: np.ndarray) -> Seen:
    """Finds the background and the objects of a picture, (S, S, 3) uint8, S >= 32.

    Raises:
        LdmError: another shape or type, or SciPy is not installed.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise LdmError(
            f"cannot measure an array {image.dtype} {image.shape}", where="image", fix="RGB uint8"
        )
    side = image.shape[0]
    if image.shape[1] != side or side < 32:
        raise LdmError(
            f"cannot measure a picture of {image.shape[1]} x {side} pixels",
            where="image",
            fix="use a square picture of at least 32 x 32",
        )
    ndimage = _ndimage()
    blur = SMOOTHING * side / 64
    smooth = ndimage.gaussian_filter(image.astype(np.float32), (blur, blur, 0))
    border = np.concatenate([smooth[0], smooth[-1], smooth[:, 0], smooth[:, -1]])
    ground = np.median(border, axis=0)
    away = np.linalg.norm(_lab(smooth) - _lab(ground), axis=-1)
    labels, _ = ndimage.label(away > VISIBLE, np.ones((3, 3)))
    objects = [
        (area, found)
        for label, window in enumerate(ndimage.find_objects(labels), 1)
        for area, found in _measure(smooth, ground, labels, label, window)
    ]
    objects.sort(key=lambda pair: -pair[0])
    name = _nearest(ground[None])[0]
    return Seen(name if name in BACKGROUNDS else None, tuple(found for _, found in objects))


def _measure(
    smooth: np.ndarray,
    ground: np.ndarray,
    labels: np.ndarray,
    label: int,
    window: tuple[slice, slice],
) -> Iterator[tuple[float, Found]]:
    """The area and description of one component; nothing if it is a speck."""
    ndimage, side = _ndimage(), labels.shape[0]
    scale = side / 64
    reach = int(np.ceil(3 * scale))
    rows, columns = (
        slice(max(part.start - reach, 0), min(part.stop + reach, side)) for part in window
    )
    here, pixels = labels[rows, columns], smooth[rows, columns]
    mine = here == label
    core = ndimage.binary_erosion(mine, iterations=max(round(2 * scale), 1))
    core = core if core.any() else mine
    colour = np.median(pixels[core], axis=0)
    # a blurred edge is a blend of object and ground, so the share of the object is a projection
    axis = colour - ground
    share = np.clip((pixels - ground) @ (axis / (axis @ axis)), 0.0, 1.0)
    near = ndimage.binary_dilation(mine, iterations=max(round(1.5 * scale), 1))
    share *= near & (mine | (here == 0))
    area = float(share.sum()) / side**2
    if area < SPECK:
        return
    shape, likeness, diameter, x, y = _fit(share, rows.start, columns.start, side)
    names = _nearest(pixels[core])
    colour_name = _nearest(colour[None])[0]
    plain = colour_name in COLOURS and names.count(colour_name) >= PLAIN * len(names)
    yield (
        area,
        Found(
            colour=colour_name if plain else None,
            shape=shape if likeness >= LIKENESS else None,
            size=_size(diameter),
            x=x,
            y=y,
            diameter=diameter,
            likeness=likeness,
        ),
    )


def _fit(
    share: np.ndarray, top: int, left: int, side: int
) -> tuple[str, float, float, float, float]:
    """The outline with the same area and centroid that overlaps `share` best.

    Returns: shape, likeness, diameter, x, y; lengths as fractions of the side.
    """
    ndimage = _ndimage()
    x = np.arange(share.shape[1], dtype=np.float32)[None, :] + (left + 0.5)
    y = np.arange(share.shape[0], dtype=np.float32)[:, None] + (top + 0.5)
    total = float(share.sum())
    mean_x, mean_y = float((share * x).sum()) / total, float((share * y).sum()) / total
    fits = []
    for shape, (wide, high, outline) in OUTLINES.items():
        unit_area, below = _unit(shape)
        diameter = (total / unit_area) ** 0.5
        middle = mean_y - below * diameter
        distance = outline(x - mean_x, y - middle, wide * diameter / 2, high * diameter / 2)
        cover = np.clip(0.5 - distance, 0.0, 1.0)
        cover = ndimage.gaussian_filter(cover, TEMPLATE_SMOOTHING * side / 64)
        both, either = np.minimum(cover, share).sum(), np.maximum(cover, share).sum()
        fits.append((float(both / either), shape, diameter, middle))
    likeness, shape, diameter, middle = max(fits)
    return shape, likeness, diameter / side, mean_x / side, middle / side


def _size(diameter: float) -> str | None:
    """The size class: the border is the geometric mean, the outer limits are generous."""
    name = min(SIZES, key=lambda size: abs(np.log(diameter / SIZES[size])))
    return name if abs(np.log(diameter / SIZES[name])) <= np.log(SIZE_FACTOR) else None


def _nearest(colours: np.ndarray) -> list[str]:
    """The name of the nearest palette colour in Lab for each row of (N, 3) RGB in 0..255."""
    names, palette = _palette()
    distances = ((_lab(colours)[:, None] - palette) ** 2).sum(-1)
    return [names[i] for i in distances.argmin(-1)]


@lru_cache(maxsize=1)
def _palette() -> tuple[tuple[str, ...], np.ndarray]:
    table = COLOURS | BACKGROUNDS
    return tuple(table), _lab(np.array(list(table.values()), dtype=np.float32))


@lru_cache(maxsize=16)
def _unit(shape: str) -> tuple[float, float]:
    """Area of an outline of diameter 1, and how far its centroid lies below the box's centre."""
    wide, high, outline = OUTLINES[shape]
    grid = 400  # pixels per unit: the area is exact to 1e-4
    line = (np.arange(1.2 * grid, dtype=np.float32) + 0.5) / grid - 0.6
    distance = outline(line[None] * grid, line[:, None] * grid, wide * grid / 2, high * grid / 2)
    cover = np.clip(0.5 - distance, 0, 1)
    area = float(cover.sum())
    return area / grid**2, float((cover * line[:, None]).sum()) / area


def _lab(colours: np.ndarray) -> np.ndarray:
    """CIE L*a*b* (D65) of sRGB in 0..255, (..., 3). Source: CIE 15:2004; IEC 61966-2-1."""
    part = colours.astype(np.float32) / 255
    linear = np.where(part > 0.04045, ((part + 0.055) / 1.055) ** 2.4, part / 12.92)
    xyz = linear @ (_RGB_TO_XYZ / _RGB_TO_XYZ.sum(1, keepdims=True)).T.astype(np.float32)
    bent = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    x, y, z = bent[..., 0], bent[..., 1], bent[..., 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def _ndimage() -> Any:  # noqa: ANN401 - SciPy is optional and untyped
    try:
        from scipy import ndimage
    except ImportError:
        raise missing_package("scipy", "eval", "measuring prompt adherence") from None
    return ndimage


SMOOTHING = 0.6
"""Standard deviation of the blur against noise, in pixels of a 64-pixel picture."""
TEMPLATE_SMOOTHING = 0.8
"""The same for the outlines: SMOOTHING and the softness of a decoded picture."""
VISIBLE = 20.0
"""Lab distance from the background at which a pixel belongs to an object."""
SPECK = 8 / 64**2
"""Share of the picture below which an object is a speck that nobody would count."""
PLAIN = 0.75
"""Share of an object's core that must have its colour."""
LIKENESS = 0.7
"""Least overlap with an outline; below it the object is like none."""
SIZE_FACTOR = 1.45
"""How many times smaller than small, or larger than large, an object may be."""

_RGB_TO_XYZ = np.array(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
)
