"""The adherence checker: right on true pictures, catches every single fault, counts honestly."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from ldm.data.scenes import BACKGROUNDS, COLOURS, OUTLINES, SIZES, Kind, Scene, Shape, render
from ldm.data.shapes import GAP, INSET, open_shapes, parse, scene
from ldm.errors import LdmError
from ldm.evaluation.adherence import (
    ATTRIBUTES,
    Verdict,
    check,
    contact_sheet,
    evaluate,
    summarise,
)
from ldm.evaluation.segmentation import look

ndimage = pytest.importorskip("scipy.ndimage")

FAULTS = ("background", "missing", "extra", "colour", "relation", "size", "shape")
RIGHT = Verdict(True, True, True, True, True, True)


def degraded(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Softer and noisier, as a VAE leaves it: blur up to 0.7 px of 64, noise up to 12/255."""
    blur, noise = rng.uniform(0, 0.7) * len(pixels) / 64, rng.uniform(0, 12)
    soft = ndimage.gaussian_filter(pixels.astype(float), (blur, blur, 0))
    return np.clip(np.rint(soft + rng.normal(0, noise, soft.shape)), 0, 255).astype(np.uint8)


def other(rng: np.random.Generator, names: Sequence[str], name: str) -> str:
    return str(rng.choice([candidate for candidate in names if candidate != name]))


def fits(objects: Sequence[Shape]) -> bool:
    """Whether all are inside and apart, as in the shapes data."""
    for item in objects:
        for centre, half in zip((item.x, item.y), item.half, strict=True):
            if not INSET + half <= centre <= 1 - INSET - half:
                return False
    return all(
        abs(a.x - b.x) >= a.half[0] + b.half[0] + GAP
        or abs(a.y - b.y) >= a.half[1] + b.half[1] + GAP
        for a, b in combinations(objects, 2)
    )


def with_fault(true: Scene, fault: str, rng: np.random.Generator) -> Scene | None:
    """The scene with one thing changed, or None if there is no room for it."""
    objects = list(true.objects)
    which = int(rng.integers(len(objects)))
    item = objects[which]
    if fault == "background":
        return replace(true, background=other(rng, list(BACKGROUNDS), true.background))
    if fault == "relation":
        if not true.relations:
            return None
        sideways = true.relations[0] in ("left of", "right of")
        mirrored = [replace(o, x=1 - o.x) if sideways else replace(o, y=1 - o.y) for o in objects]
        return replace(true, objects=tuple(mirrored))
    if fault == "missing":
        del objects[which]
    elif fault == "extra":
        kind = Kind("small", str(rng.choice(list(COLOURS))), str(rng.choice(list(OUTLINES))))
        objects.append(Shape(kind, *rng.uniform(0.15, 0.85, 2)))
    else:
        table: dict[str, Sequence[str]] = {
            "colour": list(COLOURS),
            "size": list(SIZES),
            "shape": list(OUTLINES),
        }
        changed = other(rng, table[fault], getattr(item.kind, fault))
        objects[which] = replace(item, kind=replace(item.kind, **{fault: changed}))
    return replace(true, objects=tuple(objects)) if fits(objects) else None


def share_right(count: int) -> float:
    rng, right = np.random.default_rng(0), 0
    for i in range(count):
        true = scene(i, ("val", "unseen")[i % 2], seed=7)
        pixels = degraded(render(true, (64, 128)[i // 2 % 2]), rng)
        right += check(pixels, true).all
    return right / count


def share_caught(fault: str, count: int) -> float:
    """How often the fault is found, and found to be that fault."""
    rng, caught, tried, i = np.random.default_rng(1), 0, 0, 0
    while tried < count:
        true = scene(i, ("val", "unseen")[i % 2], seed=11)
        wrong, i = with_fault(true, fault, rng), i + 1
        if wrong is None:
            continue
        tried += 1
        verdict = check(degraded(render(wrong, (64, 128)[i // 2 % 2]), rng), true)
        if fault == "missing":
            expected = ["count", "colour", "size", "shape"] + ["relation"] * bool(true.relations)
        else:
            expected = ["count"] if fault == "extra" else [fault]
        caught += sorted(verdict.wrong) == sorted(expected)
    return caught / count


def test_true_scenes_are_found_right() -> None:
    assert share_right(250) >= 0.99


@pytest.mark.parametrize("fault", FAULTS)
def test_a_single_fault_is_caught_and_charged_to_its_attribute(fault: str) -> None:
    assert share_caught(fault, 40) >= 0.99


@pytest.mark.slow
def test_two_thousand_true_scenes_are_found_right() -> None:
    assert share_right(2000) >= 0.99


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_two_thousand_single_faults_are_caught_and_charged(fault: str) -> None:
    assert share_caught(fault, 2000) >= 0.99


def drawn(background: str, *objects: tuple[str, float, float]) -> np.ndarray:
    items = tuple(Shape(Kind(*words.split()), x, y) for words, x, y in objects)
    return render(Scene(background, items), 64)


def test_what_is_seen_is_what_was_drawn() -> None:
    pixels = drawn("grey", ("large pink star", 0.3, 0.4), ("small cyan cross", 0.7, 0.8))

    seen = look(pixels)

    assert seen.background == "grey"
    words = [f"{found.size} {found.colour} {found.shape}" for found in seen.objects]
    assert words == ["large pink star", "small cyan cross"]
    places = [(0.3, 0.4, SIZES["large"]), (0.7, 0.8, SIZES["small"])]
    for found, place in zip(seen.objects, places, strict=True):
        # a fifth of a pixel of 64
        np.testing.assert_allclose((found.x, found.y, found.diameter), place, atol=0.2 / 64)


def test_one_object_has_no_relation() -> None:
    verdict = check(
        drawn("white", ("small red star", 0.5, 0.5)), "a small red star on a white background"
    )
    assert verdict.relation is None
    assert verdict.all


TWINS = "a small red circle left of a small blue circle on a white background"


def test_exchanged_places_are_a_wrong_relation_and_nothing_else() -> None:
    pixels = drawn("white", ("small blue circle", 0.25, 0.5), ("small red circle", 0.75, 0.5))
    assert check(pixels, TWINS).wrong == ("relation",)


@pytest.mark.parametrize("relation", ["left of", "right of"])
@pytest.mark.parametrize("colour", ["red", "blue"])
def test_two_objects_of_one_colour_are_a_wrong_colour_and_nothing_else(
    relation: str, colour: str
) -> None:
    # either could be the one described in that colour: only the relation tells which
    name = f"small {colour} circle"
    pixels = drawn("white", (name, 0.25, 0.5), (name, 0.75, 0.5))
    assert check(pixels, TWINS.replace("left of", relation)).wrong == ("colour",)


def test_a_diagonal_is_not_left_of() -> None:
    pixels = drawn("white", ("small red circle", 0.3, 0.3), ("small blue circle", 0.65, 0.65))
    assert check(pixels, TWINS).wrong == ("relation",)


def test_both_relations_of_three_objects_are_judged() -> None:
    text = (
        "a small red circle left of a small blue circle that is above a small green circle "
        "on a white background"
    )
    red, blue = ("small red circle", 0.2, 0.3), ("small blue circle", 0.7, 0.3)
    assert check(drawn("white", red, blue, ("small green circle", 0.7, 0.8)), text).all
    level = drawn("white", red, blue, ("small green circle", 0.2, 0.8))
    assert check(level, text).wrong == ("relation",)


def test_a_missing_object_makes_everything_said_of_it_false() -> None:
    verdict = check(drawn("white", ("small red circle", 0.25, 0.5)), TWINS)
    assert verdict.wrong == ("count", "colour", "relation", "size", "shape")


def test_specks_are_ignored_and_visible_blobs_are_counted() -> None:
    text = "a small red star on a white background"
    pixels = drawn("white", ("small red star", 0.3, 0.3))
    pixels[50, 50] = pixels[10, 55:57] = (0, 0, 0)
    assert check(pixels, text).all
    pixels[48:52, 48:52] = (120, 120, 120)
    assert check(pixels, text).wrong == ("count",)


def test_objects_that_touch_are_one_object() -> None:
    pixels = drawn("white", ("small red square", 0.4, 0.5), ("small blue square", 0.6, 0.5))
    assert len(look(pixels).objects) == 1


def test_a_two_coloured_object_has_no_colour() -> None:
    pixels = drawn("white", ("large red square", 0.5, 0.5))
    pixels[:, :30][(pixels[:, :30] != 255).any(-1)] = COLOURS["blue"]
    assert check(pixels, "a large red square on a white background").wrong == ("colour",)


def test_a_bar_is_none_of_the_shapes() -> None:
    pixels = np.full((64, 64, 3), 255, np.uint8)
    pixels[28:36, 12:52] = COLOURS["red"]
    assert [found.shape for found in look(pixels).objects] == [None]


def test_a_ring_is_not_a_circle() -> None:
    pixels = drawn("white", ("large red circle", 0.5, 0.5))
    y, x = np.mgrid[:64, :64] - 31.5
    pixels[x * x + y * y < 8**2] = 255
    assert "shape" in check(pixels, "a large red circle on a white background").wrong


def test_an_object_of_no_known_size_is_the_wrong_size() -> None:
    pixels = np.full((64, 64, 3), 255, np.uint8)
    pixels[30:36, 30:36] = COLOURS["red"]
    assert check(pixels, "a small red square on a white background").wrong == ("size",)


def test_a_coloured_background_is_no_background() -> None:
    pixels = np.full((64, 64, 3), COLOURS["pink"], np.uint8)
    assert look(pixels).background is None


def test_the_size_of_the_picture_does_not_matter() -> None:
    for image_px in (32, 48, 96, 256):
        right = [check(render(scene(i, "val"), image_px), scene(i, "val")).all for i in range(12)]
        assert all(right)


@pytest.mark.parametrize("kind", ["noise", "empty", "all foreground"])
def test_a_picture_of_nothing_is_never_right(kind: str) -> None:
    rng = np.random.default_rng(0)
    for i in range(10):
        pixels = np.full((64, 64, 3), 255, np.uint8)
        if kind == "noise":
            pixels = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        elif kind == "all foreground":
            pixels[1:-1, 1:-1] = COLOURS["red"]
        assert not check(pixels, scene(i, "val")).all


def test_a_summary_is_the_share_of_right_answers_with_a_binomial_interval() -> None:
    verdicts = [replace(RIGHT, shape=i % 4 != 0) for i in range(400)]

    summary = summarise(verdicts)

    assert summary["n"] == 400
    assert set(summary) == {"n", *ATTRIBUTES}
    assert summary["colour"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    assert summary["all"]["mean"] == summary["shape"]["mean"] == 0.75
    half = 1.96 * (0.75 * 0.25 / 400) ** 0.5
    # the percentiles of 2000 resamples of steps of 1/400 scatter by a few steps
    assert summary["shape"]["low"] == pytest.approx(0.75 - half, abs=0.01)
    assert summary["shape"]["high"] == pytest.approx(0.75 + half, abs=0.01)
    assert summarise(verdicts) == summary


def test_verdicts_without_relation_do_not_count_for_it() -> None:
    alone = replace(RIGHT, relation=None)
    mixed = summarise([alone, alone, replace(RIGHT, relation=False), RIGHT])
    assert mixed["relation"]["mean"] == 0.5
    assert mixed["all"]["mean"] == 0.75
    assert "relation" not in summarise([alone])
    with pytest.raises(LdmError, match="no verdicts"):
        summarise([])


def faithful(captions: list[str]) -> list[np.ndarray]:
    """Draws what was asked for, in places that satisfy every chain of relations."""
    steps = {"left of": (1, 0), "right of": (-1, 0), "above": (0, 1), "below": (0, -1)}
    pictures = []
    for text in captions:
        content, places = parse(text), [np.zeros(2)]
        for name in content.relations:
            places.append(places[-1] + steps[name])
        grid = np.array(places) - (np.min(places, 0) + np.max(places, 0)) / 2
        objects = [
            Shape(kind, *(0.5 + 0.62 / max(len(grid) - 1, 1) * place))
            for kind, place in zip(content.kinds, grid, strict=True)
        ]
        pictures.append(render(Scene(content.background, tuple(objects)), 64))
    return pictures


def test_a_model_that_draws_what_is_asked_scores_one() -> None:
    sizes = []

    def draw(captions: list[str]) -> list[Image.Image]:
        sizes.append(len(captions))
        return [Image.fromarray(picture) for picture in faithful(captions)]

    result = evaluate(draw, "val", 60, batch=25)

    assert sizes == [25, 25, 10]
    assert result.captions == tuple(open_shapes(60, "val").captions)
    assert set(result.by_objects) == {1, 2, 3}
    assert result.headline["n"] == result.by_objects[1]["n"] + result.by_objects[2]["n"] < 60
    assert all(result.headline[name]["mean"] == 1.0 for name in ATTRIBUTES)
    assert "relation" not in result.by_objects[1]


def test_a_model_that_draws_the_wrong_shape_fails_by_shape_alone() -> None:
    def draw(captions: list[str]) -> list[np.ndarray]:
        swap = {"circle": "square", "square": "circle", "star": "circle", "cross": "star"}
        swap["triangle"] = "circle"
        return faithful(
            [" ".join(swap.get(word, word) for word in text.split()) for text in captions]
        )

    result = evaluate(draw, "val", 30)

    means = {name: result.headline[name]["mean"] for name in ATTRIBUTES}
    assert means == dict.fromkeys(ATTRIBUTES, 1.0) | {"shape": 0.0, "all": 0.0}


def test_a_contact_sheet_frames_right_pictures_green_and_wrong_ones_red() -> None:
    images = [render(scene(i, "val"), 64) for i in range(3)]
    captions = list(open_shapes(3, "val").captions)
    verdicts = [RIGHT, replace(RIGHT, shape=False), RIGHT]

    sheet = contact_sheet(images, captions, verdicts, columns=2)

    assert sheet.size[0] == 2 * 128 + 3 * 8
    pixels = np.asarray(sheet).astype(int)
    greenish = pixels[7, 72, 1] > pixels[7, 72, 0] + 50
    reddish = pixels[7, 208, 0] > pixels[7, 208, 1] + 50
    assert greenish
    assert reddish
    np.testing.assert_array_equal(pixels[8:136:2, 8:136:2], images[0])
    under = pixels[140:170, 8:136]
    assert (under.max(-1) < 100).any(), "no caption under the first picture"


@pytest.mark.parametrize(
    ("pixels", "rule"),
    [
        (np.zeros((64, 64, 3), np.float32), "float32"),
        (np.zeros((64, 64), np.uint8), "64, 64"),
        (np.zeros((64, 48, 3), np.uint8), "48 x 64"),
        (np.zeros((16, 16, 3), np.uint8), "16 x 16"),
    ],
)
def test_what_cannot_be_measured_is_refused(pixels: np.ndarray, rule: str) -> None:
    with pytest.raises(LdmError, match=rule):
        check(pixels, TWINS)


def test_importing_the_checker_loads_neither_torch_nor_scipy() -> None:
    code = (
        "import sys, ldm.evaluation.adherence\n"
        "print([name for name in ('torch', 'scipy', 'PIL') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
