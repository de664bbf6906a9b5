"""SDXL's conditioning on size and crop, from the data set to the picture that is drawn."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from ldm.build import load_text, load_vae, open_data
from ldm.data.loader import Loader
from ldm.data.transforms import Draws, fit, sizes_of
from ldm.errors import LdmError
from ldm.inference.pipeline import Pipeline
from ldm.models.unet_config import UNetConfig
from ldm.training.cache import CachedLoader, build_cache, load_cache
from ldm.training.diffusion import train_diffusion
from tests.recipes import state, tiny

SIZES = (
    "model.size_conditioning=true",
    "model.linear_projection=true",
    "model.head_dim=16",
    "model.transformer_depth=[1, 2]",
    "train.precision=fp32",
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures of other shapes than a square, whose colours say where a pixel was."""
    folder = tmp_path_factory.mktemp("pictures")
    for k in range(12):
        height, width = (40, 64 + k) if k % 2 else (50 + k, 32)
        rows, columns = np.indices((height, width), dtype=np.uint8)
        pixels = np.stack([2 * rows, 2 * columns, np.full_like(rows, 9 * k)], axis=-1)
        Image.fromarray(pixels).save(folder / f"{k:02}.png")
        (folder / f"{k:02}.txt").write_text(f"a red circle number {k}")
    return folder


def settings(pictures: Path) -> tuple[str, ...]:
    return (*SIZES, "data.source=imagefolder", f"data.path={pictures}", "data.flip=true")


@pytest.mark.parametrize("crop", ["center", "random"])
@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("shape", [(32, 80), (80, 32), (32, 32)])
def test_the_crop_that_is_told_is_the_crop_that_was_made(
    shape: tuple[int, int], crop: str, mirrored: bool
) -> None:
    height, width = shape
    rows, columns = np.indices(shape, dtype=np.uint8)
    pixels = np.stack([rows, columns, rows], axis=-1)
    for epoch in range(5):
        draws = Draws(3, epoch, "a")
        square = fit(pixels, 32, draws=draws, crop=crop)  # not resized: colours are places
        if mirrored:
            square = square.flip(-1)
        corner = ((square[:, 0, 0] + 1) * 127.5).round()  # row and column of the first pixel
        told = sizes_of(height, width, 32, draws=draws, crop=crop, mirrored=mirrored)
        left = width - 1 - corner[1] if mirrored else corner[1]
        assert told == (height, width, float(corner[0]), float(left), 32, 32)


def test_the_crop_is_measured_in_pixels_of_the_result() -> None:
    told = sizes_of(100, 300, 50, draws=Draws(0, 0, "a"))
    assert told == (100, 300, 0, 50, 50, 50)  # 100 of 300 columns left out on the left, halved


def test_a_cache_tells_what_the_live_loader_tells(pictures: Path, tmp_path: Path) -> None:
    config = tiny("unet", tmp_path / "run", *settings(pictures))
    source, _ = open_data(config.data)
    vae, text = load_vae(config.vae, 0), load_text(config.text, source.captions, 0)
    cache = load_cache(config, source, build_cache(config, source, vae, text))
    live = Loader(source, seed=0, batch_size=4, image_px=config.data.image_px, flip=True)
    cached = CachedLoader(cache, live.share, seed=0, flip=True)
    seen = []
    for one, other in islice(zip(live.batches(), cached.batches(), strict=False), 6):
        assert one.ids == other.ids
        assert one.sizes is not None
        assert_close(one.sizes, other.sizes, rtol=0, atol=0)
        seen += one.sizes.tolist()
    assert any(top > 0 for _, _, top, _, _, _ in seen)
    assert any(left > 0 for _, _, _, left, _, _ in seen)


def test_a_cache_without_sizes_serves_a_denoiser_that_reads_none(
    pictures: Path, tmp_path: Path
) -> None:
    plain, told = (
        tiny("unet", tmp_path / "run", *settings(pictures), f"model.size_conditioning={value}")
        for value in ("false", "true")
    )
    source, _ = open_data(plain.data)
    vae, text = load_vae(plain.vae, 0), load_text(plain.text, source.captions, 0)
    folders = [build_cache(config, source, vae, text) for config in (plain, told)]
    assert folders[0] != folders[1]


def test_cached_and_live_training_of_an_sdxl_layout_are_the_same_run(
    pictures: Path, tmp_path: Path
) -> None:
    runs = [
        train_diffusion(tiny("unet", tmp_path / name, *settings(pictures), "train.steps=2", more))
        for name, more in (("cached", "cache.enabled=true"), ("live", "cache.enabled=false"))
    ]
    one, two = (state(run) for run in runs)
    assert any("add_embedding" in key for key in one)
    for key in one:  # captions of a live batch are padded to its own longest: other sum orders
        assert_close(one[key], two[key], rtol=1e-4, atol=1e-5)

    pipeline = Pipeline.from_pretrained(runs[0].parent)
    shape = pipeline.net.config
    assert (shape.heads, shape.depths, shape.use_linear_projection) == ((2, 4), (1, 2), True)
    with torch.no_grad():
        for parameter in pipeline.net.parameters():
            parameter.add_(0.05)
    seen = []
    pipeline.net.register_forward_pre_hook(lambda net, given: seen.append(given[2].sizes))
    pipeline("a red circle", steps=1, size=(32, 64))
    assert seen[0].tolist() == [[32, 64, 0, 0, 32, 64]] * 2


def test_a_text_encoder_without_a_pooled_vector_is_refused() -> None:
    with pytest.raises(LdmError, match="no pooled vector") as caught:
        UNetConfig().with_sizes(None)
    assert "model.size_conditioning=false" in str(caught.value)


def test_the_layout_of_sdxl_can_be_asked_for(tmp_path: Path) -> None:
    config = tiny(
        "unet",
        tmp_path,
        "model.block_out_channels=[32, 64, 128]",
        "model.attention_levels=[false, true, true]",
        "model.head_dim=16",
        "model.transformer_depth=[1, 2, 3]",
    )
    assert config.model.heads_per_level == (2, 4, 8)
    for bad, part in (
        ("model.heads=[2, 4, 8]", "2 levels of model.block_out_channels"),
        ("model.transformer_depth=[1]", "1 entries for 2 levels"),
        ("model.head_dim=24", "not a multiple of model.norm_num_groups=8 and of model.head_dim=24"),
    ):
        with pytest.raises(LdmError, match=part.replace(".", r"\.")):
            tiny("unet", tmp_path, bad)
