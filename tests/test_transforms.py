"""Fitting a picture to the model's square."""

import numpy as np
import pytest
import torch

from ldm.data.transforms import MAX_ASPECT, Draws, fit
from ldm.errors import ExitCode, LdmError

DRAWS = Draws(seed=0, epoch=0, sample_id="a")


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def uint8(fitted: torch.Tensor) -> np.ndarray:
    return ((fitted + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()


def columns(width: int) -> np.ndarray:
    """A picture 8 high whose red value tells the column."""
    pixels = np.zeros((8, width, 3), dtype=np.uint8)
    pixels[..., 0] = np.arange(width)
    return pixels


def test_black_is_minus_one_and_white_is_one_exactly():
    pixels = np.zeros((4, 4, 3), dtype=np.uint8)
    pixels[:, 2:] = 255
    fitted = fit(pixels, 4, draws=DRAWS)
    assert fitted.dtype == torch.float32
    assert fitted.shape == (3, 4, 4)
    assert fitted[:, :, :2].eq(-1).all()
    assert fitted[:, :, 2:].eq(1).all()


def test_a_picture_of_the_right_size_is_not_resampled():
    pixels = noise(16, 16)
    np.testing.assert_array_equal(uint8(fit(pixels, 16, draws=DRAWS)), pixels)


@pytest.mark.parametrize("width", [30, 31])
def test_the_centre_crop_takes_the_middle(width):
    left = (width - 8) // 2
    fitted = uint8(fit(columns(width), 8, draws=DRAWS))
    np.testing.assert_array_equal(fitted, columns(width)[:, left : left + 8])
    tall = columns(width).transpose(1, 0, 2)
    np.testing.assert_array_equal(uint8(fit(tall, 8, draws=DRAWS)), tall[left : left + 8])


def test_shrinking_averages_instead_of_skipping_pixels():
    checkerboard = (np.indices((256, 256)).sum(axis=0) % 2 * 255).astype(np.uint8)
    fitted = fit(np.repeat(checkerboard[..., None], 3, axis=2), 16, draws=DRAWS)
    assert fitted.abs().max() < 0.05  # grey; nearest neighbour gives only -1 and 1


@pytest.mark.parametrize("side", [100, 700])
def test_resizing_then_cropping_equals_the_combined_step(side):
    from PIL import Image

    ramp = np.linspace(0, 255, 2 * side)[None, :, None]
    pixels = np.broadcast_to(ramp, (side, 2 * side, 3)).astype(np.uint8)
    slow = Image.fromarray(pixels).resize((64, 32), Image.Resampling.LANCZOS)
    fitted = uint8(fit(pixels, 32, draws=DRAWS)).astype(int)
    # the combined step sees the real neighbours of the crop, so its edges are not special
    assert np.abs(fitted - np.asarray(slow)[:, 16:48]).max() <= 1


def test_crops_are_drawn_per_epoch_and_sample_and_cover_the_long_side():
    def left(epoch: int, name: str, seed: int = 0) -> int:
        fitted = fit(columns(20), 8, crop="random", draws=Draws(seed, epoch, name))
        return int(uint8(fitted)[0, 0, 0])

    assert left(3, "a") == left(3, "a")
    lefts = {left(epoch, "a") for epoch in range(200)}
    assert lefts == set(range(13))
    assert [left(e, "a") for e in range(20)] != [left(e, "b") for e in range(20)]
    assert [left(e, "a") for e in range(20)] != [left(e, "a", seed=1) for e in range(20)]


def test_half_of_the_pictures_are_mirrored_when_asked_and_none_otherwise():
    pixels = columns(8)
    mirrored = 0
    for epoch in range(400):
        fitted = uint8(fit(pixels, 8, flip=True, draws=Draws(0, epoch, "a")))
        is_mirrored = fitted[0, 0, 0] == 7
        np.testing.assert_array_equal(fitted, pixels[:, ::-1] if is_mirrored else pixels)
        mirrored += is_mirrored
        np.testing.assert_array_equal(uint8(fit(pixels, 8, draws=Draws(0, epoch, "a"))), pixels)
    assert abs(mirrored - 200) < 50  # five standard deviations


def test_small_pictures_are_enlarged_or_refused_as_asked():
    assert fit(noise(5, 7), 16, draws=DRAWS).shape == (3, 16, 16)
    with pytest.raises(LdmError, match=r"a: 7 x 5 pixels is smaller than image_px=16") as caught:
        fit(noise(5, 7), 16, small="error", draws=DRAWS)
    assert caught.value.code == ExitCode.BAD_DATA
    assert fit(noise(16, 17), 16, small="error", draws=DRAWS).shape == (3, 16, 16)


@pytest.mark.parametrize(("height", "width"), [(1, 4000), (4000, 1)])
def test_a_strip_is_refused_by_name(height, width):
    with pytest.raises(LdmError, match="a: a strip of") as caught:
        fit(noise(height, width), 16, draws=DRAWS)
    assert caught.value.code == ExitCode.BAD_DATA
    longest = int(MAX_ASPECT) * 4
    assert fit(noise(4, longest), 4, draws=DRAWS).shape == (3, 4, 4)


def test_unknown_choices_name_the_known_ones():
    with pytest.raises(LdmError, match="center or random"):
        fit(noise(4, 4), 4, crop="centre", draws=DRAWS)
    with pytest.raises(LdmError, match="upscale or error"):
        fit(noise(4, 4), 4, small="skip", draws=DRAWS)
