"""The `shapes` data: random scenes with captions that say exactly what is in them. No files.

Everything is a function of (seed, split, index): the scene, its caption, its pixels at any size.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TypeVar, overload

import numpy as np

from ldm.data.scenes import (
    BACKGROUNDS,
    COLOURS,
    INVERSE,
    OUTLINES,
    SIZES,
    Content,
    Kind,
    Scene,
    Shape,
    half_extent,
    render,
)
from ldm.errors import LdmError
from ldm.randomness import generator
from ldm.types import Example

T = TypeVar("T")


def scene(index: int, split: str, seed: int = 0, objects: int | None = None) -> Scene:
    """Scene `index` of a split; always the same one.

    Train and val never share a content (what a caption states), whatever the seeds; neither holds
    a pair of HELD_OUT_PAIRS. Every scene of unseen holds exactly one of them.

    Args:
        index: >= 0.
        split: one of SPLITS.
        seed: of the whole data set.
        objects: 1 to 3 to ask for that many; None draws it with OBJECT_COUNTS.
    Raises:
        LdmError: unknown split, or a count of objects that is never drawn.
    """
    _check_split(split)
    if objects is not None and not 1 <= objects <= len(OBJECT_COUNTS):
        raise LdmError(f"no scene has {objects} objects", where="objects", fix="use 1, 2 or 3")
    rng = generator(seed, "shapes", 0, f"{split}/{index}")
    wanted = objects or 1 + _weighted(rng, OBJECT_COUNTS)
    while True:
        content = _draw_content(rng, split, wanted)
        if split != "unseen" and _is_validation(content) != (split == "val"):
            continue
        for _ in range(20):  # three large objects in a row never fit: then another content is drawn
            places = _draw_places(rng, content)
            if places is not None:
                things = tuple(
                    Shape(k, x, y) for k, (x, y) in zip(content.kinds, places, strict=True)
                )
                return Scene(content.background, things, content.relations)


def caption(content: Content | Scene, phrasing: int = 0) -> str:
    """The caption in one of `phrasings(n)` wordings; `phrasing` counts modulo that number.

    The upper half of them tells the scene from the last object to the first.
    """
    content = content.content if isinstance(content, Scene) else content
    templates = TEMPLATES[len(content.kinds)]
    phrasing %= phrasings(len(content.kinds))
    template, backwards = templates[phrasing % len(templates)], phrasing // len(templates)
    told = content.reversed() if backwards else content
    words = {f"r{i}": name for i, name in enumerate(told.relations)}
    words |= {f"t{i}": TO_THE.get(name, name) for i, name in enumerate(told.relations)}
    words |= {f"k{i}": str(kind) for i, kind in enumerate(told.kinds)}
    return template.format(bg=told.background, **words)


def phrasings(objects: int) -> int:
    """How many wordings there are for a scene of that many objects."""
    return len(TEMPLATES[objects]) * (1 if objects == 1 else 2)


def parse(text: str) -> Content:
    """What a caption states; the inverse of `caption`.

    Raises:
        LdmError: the text is not one of our captions.
    """
    plain = " ".join(text.lower().split()).rstrip(".")
    for count, pattern in _patterns():
        match = pattern.fullmatch(plain)
        if match:
            found = match.groupdict()
            kinds = tuple(Kind(*found[f"k{i}"].split()) for i in range(count))
            told = (found[f"r{i}"].removeprefix("to the ") for i in range(count - 1))
            return Content(found["bg"], kinds, tuple(told))
    example = caption(Content("white", (Kind("small", "red", "circle"),)))
    raise LdmError(
        f"{text!r} is not a caption of the shapes data", where="caption", fix=f"e.g. {example!r}"
    )


def open_shapes(
    count: int, split: str = "train", image_px: int = 64, seed: int = 0
) -> ShapesSource:
    """The first `count` examples of a split as a Source.

    Raises:
        LdmError: unknown split, count < 1, or image_px < 16 (a small star would be a blot).
    """
    _check_split(split)
    if count < 1:
        raise LdmError(f"{count} examples asked for", where="count", fix="use at least 1")
    if image_px < 16:
        raise LdmError(
            f"shapes at {image_px} px cannot be told apart", where="image_px", fix="use >= 16"
        )
    return ShapesSource(count, split, image_px, seed)


@dataclass(frozen=True)
class ShapesSource:
    """Scenes as a Source: nothing is stored, every access draws afresh (about 0.2 ms at 64 px)."""

    count: int
    split: str
    image_px: int
    seed: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        index = range(self.count)[index]
        picture = self.scene(index)
        return Example(self._id(index), render(picture, self.image_px), self._word(index, picture))

    def scene(self, index: int) -> Scene:
        """The scene behind example `index`."""
        return scene(index, self.split, self.seed)

    @cached_property
    def ids(self) -> Sequence[str]:
        """`shapes/<split>/<index>`."""
        return _Lazy(self.count, self._id)

    @cached_property
    def captions(self) -> Sequence[str]:
        """The caption of every example, written when it is asked for."""
        return _Lazy(self.count, self._caption)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the arguments and of some examples, so that any change of drawing shows."""
        state = hashlib.blake2b(repr(self).encode(), digest_size=16)
        for index in range(min(self.count, 32)):
            example = self[index]
            state.update(example.caption.encode() + example.pixels.tobytes())
        return state.hexdigest()

    def _id(self, index: int) -> str:
        return f"shapes/{self.split}/{index}"

    def _caption(self, index: int) -> str:
        return self._word(index, self.scene(index))

    def _word(self, index: int, picture: Scene) -> str:
        rng = generator(self.seed, "shapes phrasing", 0, f"{self.split}/{index}")
        return caption(picture, int(rng.random() * phrasings(len(picture.objects))))


class _Lazy(Sequence[str]):
    """A sequence of `count` strings, each made when it is read."""

    def __init__(self, count: int, make: Callable[[int], str]) -> None:
        self._range, self._make = range(count), make

    def __len__(self) -> int:
        return len(self._range)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        if isinstance(index, slice):
            return [self._make(i) for i in self._range[index]]
        return self._make(self._range[index])


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise LdmError(
            f"unknown split {split!r}", where="split", fix=f"use one of {', '.join(SPLITS)}"
        )


def _pick(rng: np.random.Generator, items: Sequence[T]) -> T:
    return items[int(rng.random() * len(items))]


def _weighted(rng: np.random.Generator, weights: Sequence[float]) -> int:
    return int(np.searchsorted(np.cumsum(weights), rng.random() * sum(weights), side="right"))


def _draw_content(rng: np.random.Generator, split: str, count: int) -> Content:
    """Draws what the caption will state; no two objects of a scene are described alike."""
    background, sizes = _pick(rng, tuple(BACKGROUNDS)), tuple(SIZES)
    held_out = int(rng.random() * count) if split == "unseen" else -1
    kinds: list[Kind] = []
    while len(kinds) < count:
        pairs = HELD_OUT_PAIRS if len(kinds) == held_out else SEEN_PAIRS
        kind = Kind(_pick(rng, sizes), *_pick(rng, pairs))
        if kind not in kinds:
            kinds.append(kind)
    relations = tuple(_pick(rng, tuple(INVERSE)) for _ in range(count - 1))
    return Content(background, tuple(kinds), relations)


def _is_validation(content: Content) -> bool:
    """Whether a content belongs to val; a hash, so that no list of contents is needed."""
    key = min(repr(content), repr(content.reversed()))
    return hashlib.blake2b(key.encode(), digest_size=1).digest()[0] % VALIDATION_ONE_IN == 0


def _draw_places(rng: np.random.Generator, content: Content) -> list[tuple[float, float]] | None:
    """Centres that satisfy every relation, keep the gaps and stay inside, or None.

    The hub (object 1, or the only one) is in every relation, so its range on each axis, narrowed by
    what its neighbours need, is exact; a neighbour is then drawn in what is left.
    """
    halves = [half_extent(kind) for kind in content.kinds]
    hub = min(1, len(halves) - 1)
    low = [[INSET + half for half in pair] for pair in halves]
    high = [[1 - INSET - half for half in pair] for pair in halves]
    links = [(2 * i, *_AXIS[name]) for i, name in enumerate(content.relations)]
    # seen from the hub, object 0 lies where relation 0 says and object 2 opposite to relation 1
    links = [(who, axis, sign if who == 0 else -sign) for who, axis, sign in links]
    for who, axis, sign in links:
        reach = halves[who][axis] + halves[hub][axis] + GAP
        if sign < 0:
            low[hub][axis] = max(low[hub][axis], low[who][axis] + reach)
        else:
            high[hub][axis] = min(high[hub][axis], high[who][axis] - reach)
    hub_x, hub_y = (_between(rng, low[hub][axis], high[hub][axis], SCATTER) for axis in (0, 1))
    # two neighbours on one side of the hub must part across it, so they need all the room there is
    scatter = 1.0 if len(links) == 2 and links[0][1:] == links[1][1:] else SCATTER
    if hub_x is None or hub_y is None:
        return None
    centre = (hub_x, hub_y)
    places = {hub: centre}
    for who, axis, sign in links:
        reach = halves[who][axis] + halves[hub][axis] + GAP
        near, far = centre[axis] + sign * reach, (low if sign < 0 else high)[who][axis]
        along = _between(rng, min(near, far), max(near, far), SCATTER)
        if along is None:
            return None
        slack = abs(along - centre[axis]) / RELATION_RATIO
        floor = max(low[who][1 - axis], centre[1 - axis] - slack)
        ceiling = min(high[who][1 - axis], centre[1 - axis] + slack)
        across = _between(rng, floor, ceiling, scatter)
        if across is None:
            return None
        places[who] = (along, across) if axis == 0 else (across, along)
    if len(places) == 3 and _touch(places[0], places[2], halves[0], halves[2]):
        return None
    return [places[i] for i in range(len(halves))]


def _between(rng: np.random.Generator, low: float, high: float, scatter: float) -> float | None:
    """A draw from the middle of the room, from that share of it, or None if there is none."""
    if low > high:
        return None
    return (low + high) / 2 + scatter * (rng.random() - 0.5) * (high - low)


def _touch(
    one: Sequence[float], two: Sequence[float], half1: Sequence[float], half2: Sequence[float]
) -> bool:
    """Whether two bounding boxes come closer than GAP."""
    return all(abs(one[i] - two[i]) < half1[i] + half2[i] + GAP for i in (0, 1))


@lru_cache(maxsize=1)
def _patterns() -> tuple[tuple[int, re.Pattern[str]], ...]:
    """(objects, pattern) of every template, made from the templates themselves."""
    kind = " ".join(f"(?:{'|'.join(words)})" for words in (SIZES, COLOURS, OUTLINES))
    near, long = "|".join(INVERSE), "|".join(TO_THE.get(name, name) for name in INVERSE)
    slots = {f"k{i}": f"(?P<k{i}>{kind})" for i in range(3)} | {
        "bg": f"(?P<bg>{'|'.join(BACKGROUNDS)})"
    }
    slots |= {f"r{i}": f"(?P<r{i}>{near})" for i in range(2)}
    slots |= {f"t{i}": f"(?P<r{i}>{long})" for i in range(2)}
    return tuple(
        (count, re.compile(template.format(**slots)))
        for count, templates in TEMPLATES.items()
        for template in templates
    )


SPLITS = ("train", "val", "unseen")

HELD_OUT_PAIRS = (
    ("purple", "circle"),
    ("yellow", "square"),
    ("green", "triangle"),
    ("red", "star"),
    ("blue", "cross"),
    ("orange", "star"),
)
"""(colour, shape) that train and val never show: every shape and six colours lose one or two."""
SEEN_PAIRS = tuple((c, s) for c in COLOURS for s in OUTLINES if (c, s) not in HELD_OUT_PAIRS)

OBJECT_COUNTS = (0.35, 0.45, 0.2)
"""How often a scene has 1, 2 or 3 objects."""
VALIDATION_ONE_IN = 8
"""One content in so many belongs to val and never to train."""

INSET = 1.5 / 64
"""Least distance of an object from the edge."""
GAP = 3.2 / 64
"""Least distance between the bounding boxes of two objects, on the axis that parts them."""
SCATTER = 0.4
"""The share of the room it has, around its middle, in which an object may lie. Captions say no more
about places than the relations; all further freedom is noise to them, and slow to learn. Only two
objects on one side of a third ("a left of b that is right of c") part over all the room."""
RELATION_RATIO = 1.5
"""Centres are at least so many times farther apart along a relation than across it."""

TO_THE = {"left of": "to the left of", "right of": "to the right of"}
_AXIS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}

TEMPLATES: dict[int, tuple[str, ...]] = {
    1: (
        "a {k0} on a {bg} background",
        "{bg} background, {k0}",
        "on a {bg} background: a {k0}",
        "one {k0} on {bg}",
        "a picture of a {k0} on a {bg} background",
        "there is a {k0} and the background is {bg}",
    ),
    2: (
        "a {k0} {r0} a {k1} on a {bg} background",
        "{bg} background, {k0} {t0} a {k1}",
        "on a {bg} background: a {k0} {t0} a {k1}",
        "a {k0} is {r0} a {k1} on {bg}",
        "a picture of a {k0} {t0} a {k1} on a {bg} background",
        "there is a {k0} {r0} a {k1} and the background is {bg}",
    ),
    3: (
        "a {k0} {r0} a {k1} that is {r1} a {k2} on a {bg} background",
        "{bg} background, {k0} {t0} a {k1} that is {t1} a {k2}",
        "on a {bg} background: a {k0} {t0} a {k1}, which is {t1} a {k2}",
        "a {k0} is {r0} a {k1} that is {r1} a {k2} on {bg}",
        "a picture of a {k0} {t0} a {k1} that is {t1} a {k2} on a {bg} background",
        "there is a {k0} {r0} a {k1} that is {r1} a {k2} and the background is {bg}",
    ),
}
"""Number of objects -> wordings: k kinds, r and t short and long relations, bg the background."""
