"""What a scene of plain shapes is, and how it is drawn. No randomness, no captions, no torch.

Lengths are fractions of the picture's side; x grows to the right and y downwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Kind:
    """How a caption describes one object: the keys of SIZES, COLOURS and OUTLINES."""

    size: str
    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{self.size} {self.colour} {self.shape}"


@dataclass(frozen=True, slots=True)
class Content:
    """All that a caption states: `relations[i]` says where object i lies, seen from i + 1."""

    background: str
    kinds: tuple[Kind, ...]
    relations: tuple[str, ...] = ()

    def reversed(self) -> Content:
        """The same content, told from the last object to the first."""
        turned = tuple(INVERSE[name] for name in reversed(self.relations))
        return Content(self.background, self.kinds[::-1], turned)


@dataclass(frozen=True, slots=True)
class Shape:
    """One object; (x, y) is the centre of its bounding box."""

    kind: Kind
    x: float
    y: float

    @property
    def half(self) -> tuple[float, float]:
        """Half the width and half the height of the bounding box."""
        return half_extent(self.kind)


@dataclass(frozen=True, slots=True)
class Scene:
    """One picture: `relations[i]` holds between objects i and i + 1."""

    background: str
    objects: tuple[Shape, ...]
    relations: tuple[str, ...] = ()

    @property
    def content(self) -> Content:
        """What a caption of this scene states."""
        kinds = tuple(item.kind for item in self.objects)
        return Content(self.background, kinds, self.relations)


def half_extent(kind: Kind) -> tuple[float, float]:
    """Half the width and height of the bounding box, as fractions of the picture's side."""
    wide, high, _ = OUTLINES[kind.shape]
    return SIZES[kind.size] * wide / 2, SIZES[kind.size] * high / 2


def render(picture: Scene, image_px: int = 64) -> np.ndarray:
    """Draws a scene: (image_px, image_px, 3) uint8 RGB, anti-aliased by signed distance.

    A larger `image_px` gives a finer picture of the same scene.
    """
    canvas = np.empty((image_px, image_px, 3), dtype=np.uint8)
    canvas[:] = BACKGROUNDS[picture.background]
    for item in picture.objects:
        (half_x, half_y), (x, y) = item.half, (item.x * image_px, item.y * image_px)
        columns, along = _window(x, half_x * image_px, image_px)
        rows, down = _window(y, half_y * image_px, image_px)
        distance = OUTLINES[item.kind.shape][2](
            along[None, :], down[:, None], half_x * image_px, half_y * image_px
        )
        cover = np.clip(0.5 - distance, 0.0, 1.0)[..., None]
        under = canvas[rows, columns].astype(np.float32)
        colour = np.asarray(COLOURS[item.kind.colour], dtype=np.float32)
        canvas[rows, columns] = np.rint(under + cover * (colour - under)).astype(np.uint8)
    return canvas


def _window(centre: float, half: float, image_px: int) -> tuple[slice, np.ndarray]:
    """The pixels an object can reach on one axis, and their distances from its centre (px)."""
    first = max(int(centre - half) - 1, 0)
    last = min(int(centre + half) + 2, image_px)
    return slice(first, last), np.arange(first, last, dtype=np.float32) + np.float32(0.5 - centre)


# Outlines: signed distance in pixels, negative inside, of (x, y) from the centre of a bounding box
# with half extents (w, h). Near a corner it is a bound, which only rounds the corner differently.
# x is (1, N), y is (M, 1); the result broadcasts to (M, N).


def _circle(x: np.ndarray, y: np.ndarray, w: float, h: float) -> np.ndarray:
    return np.sqrt(x * x + y * y) - w


def _square(x: np.ndarray, y: np.ndarray, w: float, h: float) -> np.ndarray:
    return np.maximum(np.abs(x) - w, np.abs(y) - h)


def _triangle(x: np.ndarray, y: np.ndarray, w: float, h: float) -> np.ndarray:
    length = (4 * h * h + w * w) ** 0.5
    return np.maximum(y - h, (np.abs(x) * (2 * h / length)) + (y + h) * (-w / length))


def _cross(x: np.ndarray, y: np.ndarray, w: float, h: float) -> np.ndarray:
    wide, high, bar = np.abs(x), np.abs(y), CROSS_BAR * w
    return np.minimum(np.maximum(wide - w, high - bar), np.maximum(wide - bar, high - h))


def _star(x: np.ndarray, y: np.ndarray, w: float, h: float) -> np.ndarray:
    """Folds the plane onto one tenth of the star, where a single edge is left."""
    radius = w / math.sin(math.radians(72))
    across, up = np.broadcast_arrays(np.abs(x), radius - h - y)  # from the star's own centre
    for notch in (108, 36):  # mirror what lies beyond a notch back to this side of it
        sine, cosine = math.sin(math.radians(notch)), math.cos(math.radians(notch))
        beyond = np.maximum(across * cosine - up * sine, 0.0)
        across, up = across - beyond * (2 * cosine), up + beyond * (2 * sine)
    inner = STAR_NOTCH * radius
    rise, run = radius - inner * math.cos(math.pi / 5), inner * math.sin(math.pi / 5)
    length = math.hypot(rise, run)
    return np.abs(across) * (rise / length) + (up - radius) * (run / length)


BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "grey": (128, 128, 128),
    "beige": (220, 192, 145),
}
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 25, 30),
    "green": (25, 145, 45),
    "blue": (15, 80, 210),
    "yellow": (250, 225, 25),
    "orange": (245, 125, 0),
    "purple": (140, 30, 150),
    "cyan": (0, 210, 230),
    "pink": (250, 125, 195),
}
SIZES: dict[str, float] = {"small": 0.28, "large": 0.42}
"""The diameter of a circle; 18 and 27 px at 64 px. The others are scaled to look as big."""

CROSS_BAR = 0.36
"""Width of a cross's bar over the width of the cross."""
STAR_NOTCH = 0.5
"""Inner over outer radius; a pentagram has 0.38, whose points vanish when the star is small."""

Outline = Callable[[np.ndarray, np.ndarray, float, float], np.ndarray]
OUTLINES: dict[str, tuple[float, float, Outline]] = {
    "circle": (1.0, 1.0, _circle),
    "square": (0.9, 0.9, _square),
    "triangle": (1.08, 0.96, _triangle),
    "star": (1.08, 1.08 * 0.9511, _star),
    "cross": (1.04, 1.04, _cross),
}
"""Shape -> width and height over its size, and its signed distance."""


INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
