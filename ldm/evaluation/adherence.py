"""Does a picture show what its caption says? Measured by image analysis alone, no learned model.

`check` compares a picture with a caption, `evaluate` does so for many. Only pictures in the manner
of the shapes data can be judged.

What each attribute means:
    background  the colour of the border is nearest, among all colours we name, to the one described
    count       as many visible objects as described; objects that touch are one object
    colour      every described object is there, in the colour described
    shape       every described object is there, and its outline is nearest to the one described
    size        every described object is there, and is as large as described
    relation    every stated relation holds between the centres; None where none is stated
    all         all of these
Which found object is which described one is decided by the reading that makes the fewest statements
false, so a single fault is charged to a single attribute. A missing object makes colour, shape,
size and its relations false; an object too many only the count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import TYPE_CHECKING, Any

import numpy as np

from ldm.data.scenes import Content, Kind, Scene
from ldm.data.shapes import open_shapes, parse
from ldm.errors import LdmError
from ldm.evaluation.segmentation import Found, look
from ldm.randomness import generator

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, slots=True)
class Verdict:
    """Which parts of a caption a picture gets right; see the head of this file."""

    background: bool
    count: bool
    colour: bool
    relation: bool | None
    size: bool
    shape: bool

    @property
    def all(self) -> bool:
        """Everything is right."""
        return not self.wrong

    @property
    def wrong(self) -> tuple[str, ...]:
        """The attributes that are wrong."""
        return tuple(name for name in ATTRIBUTES[:-1] if getattr(self, name) is False)


@dataclass(frozen=True)
class Adherence:
    """The result of `evaluate`.

    Args:
        headline: `summarise` over the scenes of one and two objects.
        by_objects: `summarise` for each number of objects that occurred.
        captions: what was asked for.
        images: what was drawn, (H, W, 3) uint8 each.
        verdicts: one for each.
    """

    headline: dict[str, Any]
    by_objects: dict[int, dict[str, Any]]
    captions: tuple[str, ...]
    images: tuple[np.ndarray, ...]
    verdicts: tuple[Verdict, ...]


def evaluate(
    draw: Callable[[list[str]], Sequence[Image | np.ndarray]],
    split: str,
    count: int,
    *,
    seed: int = 0,
    batch: int = 64,
) -> Adherence:
    """Has the first `count` captions of a split of the shapes data drawn, and checks the pictures.

    Args:
        draw: captions in, as many pictures out; called with at most `batch` at a time.
        split: "val" for captions never trained on, "unseen" for pairs never seen together.
        count: number of captions; one in five has three objects and is left out of the headline.
        seed: of the captions and of the confidence intervals.
        batch: captions handed over at a time.
    Raises:
        LdmError: unknown split, count < 1, or a picture that cannot be measured.
    """
    captions = list(open_shapes(count, split, seed=seed).captions)
    images: list[np.ndarray] = []
    for start in range(0, count, batch):
        images.extend(_pixels(picture) for picture in draw(captions[start : start + batch]))
    assert len(images) == count, f"{len(images)} pictures drawn for {count} captions"
    contents = [parse(text) for text in captions]
    verdicts = [check(*pair) for pair in zip(images, contents, strict=True)]
    groups: dict[int, list[Verdict]] = {}
    for content, verdict in zip(contents, verdicts, strict=True):
        groups.setdefault(len(content.kinds), []).append(verdict)
    few = groups.get(1, []) + groups.get(2, [])
    return Adherence(
        headline=summarise(few or verdicts, seed),
        by_objects={n: summarise(groups[n], seed) for n in sorted(groups)},
        captions=tuple(captions),
        images=tuple(images),
        verdicts=tuple(verdicts),
    )


def check(image: np.ndarray, wanted: Scene | Content | str) -> Verdict:
    """Compares a picture with a scene or caption: (S, S, 3) uint8, S >= 32; about 2 ms at 64 px.

    Raises:
        LdmError: the picture is of another kind or size, or the caption is not one of ours.
    """
    content = parse(wanted) if isinstance(wanted, str) else wanted
    content = content.content if isinstance(content, Scene) else content
    seen = look(image)
    objects = _best_reading(seen.objects, content)
    pairs = list(zip(objects, content.kinds, strict=True))
    return Verdict(
        background=seen.background == content.background,
        count=len(seen.objects) == len(content.kinds),
        colour=all(found is not None and found.colour == kind.colour for found, kind in pairs),
        relation=all(_related(objects, content)) if content.relations else None,
        size=all(found is not None and found.size == kind.size for found, kind in pairs),
        shape=all(found is not None and found.shape == kind.shape for found, kind in pairs),
    )


def summarise(verdicts: Sequence[Verdict], seed: int = 0) -> dict[str, Any]:
    """The share of right answers per attribute, with 95 % bootstrap intervals.

    Returns:
        `{attribute: {"mean", "low", "high"}, ..., "n": number of verdicts}`. The intervals are
        percentiles over RESAMPLES resamples. `relation` counts only the verdicts it applies to and
        is left out if there are none.
    Raises:
        LdmError: there are no verdicts.
    """
    if not verdicts:
        raise LdmError("no verdicts to summarise", where="verdicts", fix="check one picture")
    summary: dict[str, Any] = {"n": len(verdicts)}
    for name in ATTRIBUTES:
        answers = [getattr(verdict, name) for verdict in verdicts]
        answers = [answer for answer in answers if answer is not None]
        if not answers:
            continue
        mean, rng = float(np.mean(answers)), generator(seed, "adherence bootstrap", 0, name)
        # resampling n zeros and ones with replacement and adding them up is one binomial draw
        means = rng.binomial(len(answers), mean, RESAMPLES) / len(answers)
        low, high = np.percentile(means, (2.5, 97.5))
        summary[name] = {"mean": mean, "low": float(low), "high": float(high)}
    return summary


def contact_sheet(
    images: Sequence[Image | np.ndarray],
    captions: Sequence[str],
    verdicts: Sequence[Verdict],
    *,
    columns: int = 8,
    tile_px: int = 128,
) -> Image:
    """A grid of pictures, each over its caption and a line that says what is wrong with it."""
    from PIL import Image as images_of
    from PIL import ImageDraw, ImageFont

    font, margin = ImageFont.load_default(size=tile_px // 10), tile_px // 16
    line_px = round(font.size * 1.25)
    texts = [_wrapped(text, font, tile_px) for text in captions]
    notes = [_wrapped(_note(verdict), font, tile_px) for verdict in verdicts]
    longest = max(
        (len(text) + len(note) for text, note in zip(texts, notes, strict=True)), default=0
    )
    cell_px = tile_px + line_px * longest + 2 * margin
    columns = max(min(columns, len(images)), 1)
    rows = -(-len(images) // columns)
    size = (columns * (tile_px + margin) + margin, rows * cell_px + margin)
    sheet = images_of.new("RGB", size, "#f4f4f4")
    pen = ImageDraw.Draw(sheet)
    for i, (picture, text, verdict) in enumerate(zip(images, texts, verdicts, strict=True)):
        left, top = margin + i % columns * (tile_px + margin), margin + i // columns * cell_px
        tile = images_of.fromarray(_pixels(picture))
        # nearest neighbour: a smooth enlargement would hide what the pixels are like
        sheet.paste(tile.resize((tile_px, tile_px), images_of.Resampling.NEAREST), (left, top))
        frame = (left - 2, top - 2, left + tile_px + 1, top + tile_px + 1)
        pen.rectangle(frame, outline=RIGHT if verdict.all else WRONG, width=2)
        for row, words in enumerate([*text, *notes[i]]):
            colour = "#222222" if row < len(text) else RIGHT if verdict.all else WRONG
            pen.text((left, top + tile_px + 4 + row * line_px), words, fill=colour, font=font)
    return sheet


def _note(verdict: Verdict) -> str:
    return "all right" if verdict.all else "wrong: " + ", ".join(verdict.wrong)


def _wrapped(text: str, font: Any, width_px: int) -> list[str]:  # noqa: ANN401 - any Pillow font
    """Lines of `text` that are at most `width_px` wide, broken between words."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width_px:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _best_reading(objects: Sequence[Found], content: Content) -> tuple[Found | None, ...]:
    """For each described object the found one, so that the fewest statements are false.

    Exhaustive, as relations tie the choices together: at most 6 * 5 * 4 readings.
    """
    wanted = len(content.kinds)
    candidates: list[Found | None] = list(objects[:6])
    candidates += [None] * (wanted - len(candidates))

    def faults(reading: tuple[Found | None, ...]) -> float:
        unlike = sum(
            _unlike(found, kind) for found, kind in zip(reading, content.kinds, strict=True)
        )
        # a hair less than an attribute: a mirrored picture is a wrong relation, not two wrong sizes
        return unlike + 0.99 * sum(not holds for holds in _related(reading, content))

    return min(permutations(candidates, wanted), key=faults)


def _unlike(found: Found | None, kind: Kind) -> int:
    """How many attributes of a described object the found one does not have."""
    if found is None:
        return 3
    return (found.colour != kind.colour) + (found.shape != kind.shape) + (found.size != kind.size)


def _related(reading: Sequence[Found | None], content: Content) -> list[bool]:
    """Whether each stated relation holds between the centres of the objects."""
    answers = []
    for name, one, two in zip(content.relations, reading, reading[1:], strict=False):
        if one is None or two is None:
            answers.append(False)
            continue
        right, down = one.x - two.x, one.y - two.y
        along, across = {
            "left of": (-right, down),
            "right of": (right, down),
            "above": (-down, right),
            "below": (down, right),
        }[name]
        answers.append(along >= RELATION_DISTANCE and along >= RELATION_RATIO * abs(across))
    return answers


def _pixels(picture: Image | np.ndarray) -> np.ndarray:
    if isinstance(picture, np.ndarray):
        return picture
    return np.asarray(picture.convert("RGB"))


ATTRIBUTES = ("background", "count", "colour", "relation", "size", "shape", "all")
RESAMPLES = 2000

RELATION_DISTANCE = 0.14
"""Least distance of two centres along a relation; drawn ones are at least 0.25 apart."""
RELATION_RATIO = 1.3
"""Least ratio of the distances along and across; drawn ones have at least 1.5."""
RIGHT, WRONG = "#1a7f37", "#c62828"
"""Green and red of a contact sheet."""
