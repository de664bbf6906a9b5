"""The VAE's objective, its detailed crops, and the statistics of its latents."""

import json

import pytest
import torch
from recipes import tiny

from ldm import storage
from ldm.build import load_vae, open_data
from ldm.config.schema import DetailCropConfig, VaeLossConfig, VaeRef
from ldm.data.transforms import Draws, fit
from ldm.training.checkpoints import latent_statistics
from ldm.training.preview import psnr
from ldm.training.vae import train_vae
from ldm.training.vae_loss import vae_loss
from ldm.training.vae_step import detail_crops
from ldm.types import Batch


def batch(count=3):
    return Batch(
        ids=tuple(map(str, range(count))),
        weight=torch.ones(count),
        epochs=(0,) * count,
        positions=tuple(range(count)),
    )


@pytest.mark.parametrize(("name", "expected"), [("l1", 0.5), ("l2", 0.25), ("l1+l2", 0.75)])
def test_the_terms_are_per_pixel_value(name, expected):
    pixels = torch.zeros(2, 3, 8, 8)
    moments = torch.cat([torch.full((2, 4, 2, 2), 2.0), torch.zeros(2, 4, 2, 2)], 1)
    terms = vae_loss(
        pixels, pixels + 0.5, moments, VaeLossConfig(reconstruction=name, kl_weight=0.1)
    )
    kl = 16 * 0.5 * 4.0 / (3 * 64)  # 16 latent values, KL of N(2, 1) from N(0, 1) is 2 each
    torch.testing.assert_close(terms["kl"], torch.full((2,), kl))
    torch.testing.assert_close(terms["loss"], torch.full((2,), expected + 0.1 * kl))


def test_detailed_crops_find_the_object_and_depend_on_the_sample_alone():
    pixels = torch.zeros(3, 3, 64, 64)
    pixels[:, :, 40:50, 10:20] = 1.0
    config = DetailCropConfig(side_px=32, candidates=16)
    crops = detail_crops(pixels, config, 0, batch())
    assert crops.shape == (3, 3, 32, 32)
    assert (crops.flatten(1).sum(1) == 300).all(), "the whole square is inside"
    alone = detail_crops(pixels[1:2], config, 0, Batch(("1",), torch.ones(1), (0,), (0,)))
    assert alone.equal(crops[1:2])


def test_latents_have_mean_0_and_std_1_per_channel_after_training(tmp_path):
    config = tiny("vae", tmp_path / "run", "data.count=200")
    last = train_vae(config)
    vae = load_vae(VaeRef(path=str(tmp_path / "run")), 0)
    assert last.name == "step-00000006"
    source, _ = open_data(config.data)
    pixels = torch.stack(
        [fit(source[k].pixels, 32, draws=Draws(0, 0, source.ids[k])) for k in range(200)]
    )
    with torch.no_grad():
        moments = vae.moments(pixels)
        generator = torch.Generator().manual_seed(0)
        latents = vae.latents(moments, torch.randn(200, 4, 8, 8, generator=generator))
    assert latents.mean((0, 2, 3)).abs().max() < 0.05
    assert (latents.std((0, 2, 3)) - 1).abs().max() < 0.05


def test_statistics_skip_pictures_that_cannot_be_read(tmp_path):
    from PIL import Image

    for number in range(6):
        Image.new("RGB", (40, 40), (40 * number, 90, 10)).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text("a hat")
    (tmp_path / "3.png").write_bytes(b"nothing")
    config = tiny("vae", tmp_path / "run", "data.source=imagefolder", f"data.path={tmp_path}")
    source, _ = open_data(config.data)
    vae = load_vae(VaeRef(), 0)
    mean, std = latent_statistics(vae, source, config.data, torch.device("cpu"))
    assert len(mean) == len(std) == 4
    assert min(std) > 0


def test_psnr_of_a_known_error():
    assert psnr(torch.zeros(1, 3, 4, 4), torch.full((1, 3, 4, 4), 0.2)) == pytest.approx(20.0)


def test_the_preview_writes_a_picture_and_the_held_out_psnr(tmp_path):
    train_vae(tiny("vae", tmp_path / "run", "preview.every_steps=3"))
    assert (tmp_path / "run/samples/step-00000006.png").exists()
    rows = map(json.loads, storage.read_lines(tmp_path / "run/metrics.jsonl"))
    assert [row["step"] for row in rows if "heldout_psnr" in row] == [3, 6]
