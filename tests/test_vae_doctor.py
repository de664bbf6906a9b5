"""`ldm vae doctor`: its measures against others' and closed forms, and faults planted in a VAE."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from recipes import tiny
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import CLIPVisionConfig, CLIPVisionModel

from ldm.build import build_vae
from ldm.checkpoint import save_module, save_tensors
from ldm.checkpoint.perceptual_files import save_vision_tower
from ldm.cli import main
from ldm.config.models import VaeModelConfig
from ldm.data.shapes import open_shapes
from ldm.errors import ExitCode, LdmError
from ldm.evaluation.codec import (
    LatentMeter,
    frechet_distance,
    high_frequency_share,
    psnr,
    random_features,
    ssim,
)
from ldm.evaluation.codec_doctor import Pictures, Settings, equivariance, examine
from ldm.evaluation.codec_numerics import in_precision, watched
from ldm.evaluation.codec_report import FAULT, OK, WARNING, as_json, sheet, text
from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.models.perceptual import Lpips
from ldm.training.vae import train_vae

PX = 16


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------- measures


def test_psnr_and_ssim_are_those_of_scikit_image_and_perfect_for_equal_pictures() -> None:
    x = noise(3, 3, 24, 19).clamp(-1, 1)
    y = (x + 0.3 * noise(3, 3, 24, 19, seed=1)).clamp(-1, 1)
    ours_psnr, ours_ssim = psnr(y, x), ssim(y, x)
    for k in range(3):
        a, b = x[k].permute(1, 2, 0).double().numpy(), y[k].permute(1, 2, 0).double().numpy()
        expected = peak_signal_noise_ratio(a, b, data_range=2)
        assert float(ours_psnr[k]) == pytest.approx(expected, abs=1e-6)
        settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
        expected = structural_similarity(a, b, data_range=2, channel_axis=2, **settings)
        assert float(ours_ssim[k]) == pytest.approx(expected, abs=1e-6)
    assert psnr(x, x).tolist() == [math.inf] * 3
    assert_close(ssim(x, x), torch.ones(3, dtype=torch.float64))


def test_the_frechet_distance_is_the_closed_form_of_gaussians_and_that_of_scipy() -> None:
    # data with exactly these moments: whitened noise, scaled and shifted
    z = noise(50, 4).double()
    z = z - z.mean(0)
    z = z @ torch.linalg.inv(torch.linalg.cholesky(z.T @ z / 49)).T
    a, b = z * torch.tensor([1.0, 2, 3, 0.5]), z * torch.tensor([2.0, 2, 1, 0.1]) + 1.5
    closed = 4 * 1.5**2 + (1 - 2) ** 2 + 0 + (3 - 1) ** 2 + (0.5 - 0.1) ** 2
    assert frechet_distance(a, b) == pytest.approx(closed, rel=1e-9)

    a, b = noise(60, 7) @ noise(7, 7, seed=1), noise(80, 7, seed=2) @ noise(7, 7, seed=3) + 0.4
    s_a, s_b = np.cov(a.double().numpy().T), np.cov(b.double().numpy().T)
    root = scipy.linalg.sqrtm(s_a @ s_b).real
    expected = ((a - b.mean(0)).double().mean(0) ** 2).sum() + np.trace(s_a + s_b - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-6)
    assert frechet_distance(b, a) == pytest.approx(float(expected), rel=1e-6)


def test_the_frechet_distance_needs_no_more_pictures_than_features() -> None:
    a = noise(5, 30).double()
    assert frechet_distance(a, a) < 1e-12
    turn = torch.linalg.qr(noise(30, 30, seed=1).double())[0]
    b = noise(6, 30, seed=2).double()
    assert frechet_distance(a @ turn, b @ turn) == pytest.approx(frechet_distance(a, b), rel=1e-9)
    # moving every row moves the mean alone
    assert frechet_distance(a, a + 0.5) == pytest.approx(30 * 0.25, rel=1e-9)


def pixels_of(count: int, split: str = "train") -> Tensor:
    source = open_shapes(count, split, PX)
    rows = [torch.from_numpy(source[k].pixels.copy()) for k in range(count)]
    return torch.stack(rows).permute(0, 3, 1, 2).float() / 127.5 - 1


def test_random_features_are_fixed_and_see_more_damage_as_a_larger_distance() -> None:
    x = pixels_of(24)
    clean = random_features(x)
    assert clean.shape == (24, 64)
    assert torch.equal(clean, random_features(x))
    for damage in (
        lambda s: nn.functional.avg_pool2d(x, 2 * s + 1, 1, s, count_include_pad=False),
        lambda s: x + 0.1 * s * noise(*x.shape),
        lambda s: x * (1 - 0.1 * s),
    ):
        distances = [frechet_distance(clean, random_features(damage(s))) for s in (1, 2, 3)]
        assert 0 < distances[0] < distances[1] < distances[2]


def test_the_share_of_high_frequencies_is_that_of_waves_and_of_white_noise() -> None:
    row = torch.arange(64.0)
    for cycles, share in ((4, 0.0), (15, 0.0), (17, 1.0), (30, 1.0)):
        wave = torch.cos(2 * math.pi * cycles * row / 64).expand(2, 3, 64, 64)
        assert high_frequency_share(wave + 5) == pytest.approx(share, abs=1e-9)
    # the disc of half Nyquist covers pi / 16 of all frequencies
    assert high_frequency_share(noise(8, 4, 64, 64)) == pytest.approx(1 - math.pi / 16, abs=0.01)
    assert high_frequency_share(torch.ones(1, 1, 8, 8)) == 0


def test_latent_statistics_are_those_of_all_pictures_at_once() -> None:
    moments = noise(20, 6, 4, 5).double()
    moments[:, 1] = 2 * moments[:, 0] + 0.1 * moments[:, 1]
    mean, logvar = moments.chunk(2, dim=1)
    # latents are (z - 0.5) * 2
    latents, up = (mean - 0.5) * 2, (mean + torch.exp(0.5 * logvar) - 0.5) * 2
    meter = LatentMeter()
    for rows in (slice(0, 7), slice(7, 20)):
        meter.add(moments[rows], latents[rows], up[rows])
    found = meter.result()
    axes = (0, 2, 3)
    assert_close(found.mean, latents.mean(axes))
    assert_close(found.signal_std, latents.std(axes, correction=0))
    variance = latents.var(axes, correction=0) + 4 * logvar.exp().mean(axes)
    assert_close(found.std, variance.sqrt())
    kl = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, torch.exp(0.5 * logvar)),
        torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean)),
    )
    assert_close(found.kl, kl.mean(axes))
    assert_close(found.correlation, torch.corrcoef(latents.transpose(0, 1).flatten(1)))
    assert not found.certain


def test_standard_errors_are_how_much_statistics_of_other_pictures_would_differ() -> None:
    means, stds, errors = [], [], []
    for seed in range(200):
        brightness = noise(30, 1, 1, 1, seed=seed)  # pictures differ as wholes
        mean = brightness + 0.3 * noise(30, 1, 4, 4, seed=1000 + seed)
        moments = torch.cat([mean, torch.full_like(mean, -9)], dim=1)
        meter = LatentMeter()
        meter.add(moments, mean, mean + math.exp(-4.5))
        found = meter.result()
        means.append(found.mean)
        stds.append(found.std)
        errors.append(torch.stack([found.mean_error, found.std_error]))
    typical = torch.stack(errors).mean(0).flatten()
    # 200 trials know a deviation to 5 %; 30 pictures estimate their own error a little low
    assert_close(torch.cat(means).std(), typical[0], rtol=0.15, atol=0.0)
    assert_close(torch.cat(stds).std(), typical[1], rtol=0.15, atol=0.0)


# --------------------------------------------------------------------------------------- faults


class Perfect(nn.Module):
    """A codec that keeps every pixel."""

    downsample_factor = 1

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.encoder, self.decoder = nn.Identity(), nn.Identity()
        self.config = AutoencoderConfig(
            latent_channels=3, latents_mean=(0.0,) * 3, latents_std=(1.0,) * 3
        )

    def moments(self, pixels: Tensor) -> Tensor:
        return torch.cat([self.encoder(self.scale * pixels), torch.full_like(pixels, -30)], dim=1)

    def latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        mean, logvar = moments.chunk(2, dim=1)
        return mean + torch.exp(0.5 * logvar) * noise

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder(self.scale * latents)


@pytest.fixture(scope="module")
def chosen() -> Pictures:
    return Pictures(open_shapes(24, "val", PX), "held out", PX)


def test_a_perfect_codec_is_called_perfect(chosen: Pictures) -> None:
    found = examine(Perfect(), chosen, Settings(24))
    facts = as_json(found)
    assert facts["reconstruction"]["identical"] is True
    assert facts["reconstruction"]["psnr"] is None
    assert facts["reconstruction"]["ssim"] == pytest.approx(1)
    assert facts["reconstruction"]["frechet"]["distance"] < 1e-12
    assert facts["latents"]["equivariance"] == {"mirror_psnr": None, "half_psnr": None}
    assert facts["latents"]["deterministic"] is True
    assert "inf (identical)" in text(facts)
    json.dumps(facts, allow_nan=False)  # no Infinity, which is no JSON
    assert sheet(found).size[0] > 500


def small_vae() -> AutoencoderKL:
    shape = VaeModelConfig(block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8)
    vae = build_vae(shape, 0).eval().requires_grad_(False)
    with torch.no_grad():
        vae.quant_conv.weight[4:] *= 0.01  # a posterior nearly as certain everywhere
    return vae


@pytest.fixture(scope="module")
def statistics(chosen: Pictures) -> dict[str, Any]:
    raw = examine(small_vae(), chosen, Settings(24)).latents
    return {"latents_mean": tuple(raw.mean.tolist()), "latents_std": tuple(raw.std.tolist())}


@pytest.fixture
def healthy(statistics: dict[str, Any]) -> AutoencoderKL:
    vae = small_vae()
    vae.config = replace(vae.config, **statistics)
    return vae


def faults(vae: nn.Module, chosen: Pictures, level: str = FAULT) -> dict[str, str]:
    facts = as_json(examine(vae, chosen, Settings(24)))
    return {v["about"]: v["text"] for v in facts["verdicts"] if v["level"] == level}


def test_a_sound_autoencoder_gets_no_fault(healthy: AutoencoderKL, chosen: Pictures) -> None:
    assert faults(healthy, chosen) == {}
    assert {"channels", "statistics", "bf16", "fp16"} <= faults(healthy, chosen, OK).keys()


@pytest.mark.parametrize("constant", [0.0, 0.7])
def test_a_dead_channel_is_found_also_where_its_constant_gives_it_kl(
    healthy: AutoencoderKL, chosen: Pictures, constant: float
) -> None:
    for row in (2, 6):  # mean and log-variance of channel 2
        healthy.quant_conv.weight[row] = 0
        healthy.quant_conv.bias[row] = 0
    healthy.quant_conv.bias[2] = constant
    mean, std = list(healthy.config.latents_mean), list(healthy.config.latents_std)
    mean[2], std[2] = constant, 1.0  # as training would have measured it
    healthy.config = replace(healthy.config, latents_mean=tuple(mean), latents_std=tuple(std))
    found = faults(healthy, chosen)
    assert found.keys() == {"channel 2"}
    assert found["channel 2"].startswith(f"carries nothing: KL {constant**2 / 2:.2f} nats")


def test_statistics_of_other_data_are_found_with_the_channel(
    healthy: AutoencoderKL, chosen: Pictures
) -> None:
    mean, std = list(healthy.config.latents_mean), list(healthy.config.latents_std)
    std[1] *= 2
    mean[3] += 5 * std[3]
    healthy.config = replace(healthy.config, latents_mean=tuple(mean), latents_std=tuple(std))
    found = faults(healthy, chosen)
    assert found.keys() == {"channel 1", "channel 3"}
    assert "std 0.50" in found["channel 1"]
    assert "mean -5.0" in found["channel 3"]


def test_one_scaling_factor_is_judged_by_all_channels_together(
    healthy: AutoencoderKL, chosen: Pictures
) -> None:
    plain = replace(healthy.config, latents_mean=None, latents_std=None)
    std = as_json(examine(small_vae(), chosen, Settings(24)))["latents"]["std"]
    healthy.config = replace(plain, scaling_factor=1 / std)
    assert "scaling_factor" in faults(healthy, chosen, OK)
    healthy.config = replace(plain, scaling_factor=3 / std)
    assert faults(healthy, chosen)["scaling_factor"].startswith("latents have std 3.0")


def test_two_channels_that_say_the_same_are_named(healthy: AutoencoderKL, chosen: Pictures) -> None:
    healthy.quant_conv.weight[3] = -2 * healthy.quant_conv.weight[0]
    assert "correlation is -1.00" in faults(healthy, chosen, WARNING)["channels 0 and 3"]


def test_a_layer_that_explodes_is_found_and_named_though_float32_is_fine(
    healthy: AutoencoderKL, chosen: Pictures
) -> None:
    before = as_json(examine(healthy, chosen, Settings(24)))
    layer = healthy.decoder.up_blocks[1].resnets[0].conv1  # the norm after it hides the scale
    layer.weight *= 1e6
    layer.bias *= 1e6
    after = as_json(examine(healthy, chosen, Settings(24)))
    assert after["reconstruction"]["psnr"] == pytest.approx(
        before["reconstruction"]["psnr"], abs=0.1
    )
    assert (
        after["precision"]["largest"]["decoder"]["layer"] == "decoder.up_blocks.1.resnets.0.conv1"
    )
    assert after["precision"]["largest"]["decoder"]["fp16_headroom"] < 1
    assert after["precision"]["fp16"]["finite"] is False
    assert after["precision"]["bf16"]["finite"] is True
    (fault,) = (v for v in after["verdicts"] if v["level"] == FAULT)
    assert fault["about"] == "fp16"
    assert "up_blocks.1.resnets.0.conv1 reaches" in fault["text"]


def test_little_room_in_fp16_is_a_warning_before_it_overflows(
    healthy: AutoencoderKL, chosen: Pictures
) -> None:
    seen = as_json(examine(healthy, chosen, Settings(24)))["precision"]["layers"]["decoder"]
    layer = healthy.decoder.up_blocks[1].resnets[0].conv1
    factor = 40_000 / seen["decoder.up_blocks.1.resnets.0.conv1"]
    layer.weight *= factor
    layer.bias *= factor
    assert "reaches 4e+04, 1.6 times below" in faults(healthy, chosen, WARNING)["fp16"]


@pytest.mark.parametrize(
    ("layer", "factor", "named"),
    [
        ("encoder.conv_in", 1e39, "encoder.conv_in"),  # beyond float32: infinity
        # squares of 1e30 are beyond it: the norm that follows divides infinities
        ("decoder.conv_in", 1e30, "decoder.mid_block.resnets.0.norm1"),
    ],
)
def test_a_codec_that_leaves_float32_is_refused_by_its_first_layer_that_does(
    layer: str, factor: float, named: str, healthy: AutoencoderKL, chosen: Pictures
) -> None:
    healthy.get_submodule(layer).weight.mul_(factor)
    with pytest.raises(LdmError, match=rf"{named} puts out infinity or NaN") as caught:
        examine(healthy, chosen, Settings(4))
    assert caught.value.code == ExitCode.BAD_DATA


def test_a_codec_whose_weights_are_all_zero_is_examined_to_the_end(
    healthy: AutoencoderKL, chosen: Pictures
) -> None:
    for parameter in healthy.parameters():
        parameter.zero_()
    found = examine(healthy, chosen, Settings(4))
    facts = as_json(found)
    assert all(row["dead"] for row in facts["latents"]["channels"])
    assert facts["precision"]["largest"]["decoder"]["fp16_headroom"] is None
    assert "channel 0: carries nothing" in text(facts)
    json.dumps(facts, allow_nan=False)
    assert sheet(found).size[0] > 500


def test_a_codec_of_gray_pictures_is_refused(chosen: Pictures) -> None:
    config = AutoencoderConfig(
        in_channels=1, out_channels=1, block_out_channels=(16, 32), norm_num_groups=8
    )
    with pytest.raises(LdmError, match="pictures have 3 channels, this autoencoder reads 1"):
        examine(AutoencoderKL(config), chosen, Settings(4))


def test_the_largest_output_of_every_layer_is_seen_and_hooks_are_gone_afterwards() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 2)))
    net.requires_grad_(False)
    x = noise(5, 3)
    with watched(net) as seen:
        net(x)
    assert seen["0"] == pytest.approx(float(net[0](x).abs().max()))
    assert seen["1.0"] == pytest.approx(float(net[0](x).relu().max()))
    assert list(seen) == ["0", "1.0", "1.1", "1"]  # a block after what is inside it
    net(100 * x)
    assert seen["0"] == pytest.approx(float(net[0](x).abs().max()))


def test_half_precision_is_compared_on_the_same_latents() -> None:
    pixels = pixels_of(2)
    found = in_precision(Perfect(), pixels, torch.bfloat16)
    rounded = pixels.bfloat16().float()
    assert found.max_error == pytest.approx(float((rounded - pixels).abs().max()) * 127.5)
    assert found.psnr == pytest.approx(float(psnr(rounded, pixels).min()))
    assert found.finite


def test_equivariance_sees_latents_that_cannot_be_mirrored() -> None:
    class Tilted(Perfect):
        """Latents that know their place: brighter to the right."""

        tilt = torch.linspace(0, 1, PX)

        def moments(self, pixels: Tensor) -> Tensor:
            return super().moments(pixels + self.tilt)

        def decode(self, latents: Tensor) -> Tensor:
            return latents - self.tilt[: latents.shape[3]]

    pixels = pixels_of(2)
    assert equivariance(Perfect(), pixels)["mirror_psnr"] == math.inf
    assert equivariance(Tilted(), pixels)["mirror_psnr"] < 20


# -------------------------------------------------------------------------------------- command


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vae") / "run"
    train_vae(tiny("vae", folder, "train.steps=2", "run.save_every_steps=2"))
    return folder


def test_the_command_examines_the_pictures_that_a_run_kept_out(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = tmp_path / "elsewhere.json"
    command = ["vae", "doctor", "--model", str(run), "-n", "6", "--device", "cpu"]
    assert main([*command, "--out", str(tmp_path / "out"), "--json", str(extra)]) == 0
    printed = capsys.readouterr().out
    facts = json.loads((tmp_path / "out" / "vae-doctor.json").read_text())
    assert facts == json.loads(extra.read_text())
    assert facts["pictures"]["kind"] == "held out"
    assert facts["pictures"]["count"] == 6
    assert facts["reconstruction"]["lpips"] is None
    assert "vgg16" in facts["missing"]["lpips"]
    assert f"PSNR     {facts['reconstruction']['psnr']:.2f} dB" in printed
    assert "LPIPS    not measured: LPIPS needs the ImageNet weights" in printed
    assert len(printed.splitlines()) < 45  # a page
    channels = facts["latents"]["shape"][0]
    page = Image.open(tmp_path / "out" / "vae-doctor.png")
    assert page.width == (3 + channels) * 116 + 4


def test_any_directory_of_a_vae_is_examined_on_any_pictures(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for k in range(3):
        pixels = open_shapes(3, "train", PX)[k].pixels
        Image.fromarray(pixels).save(folder / f"{k}.png")
    (folder / "bad.png").write_bytes(b"no picture")
    vae = small_vae()
    save_module(tmp_path / "vae", vae.state_dict(), vae.config.to_diffusers())
    command = ["vae", "doctor", "--model", str(tmp_path / "vae"), "--device", "cpu", "--px", "16"]
    tower = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        )
    )
    save_vision_tower(tmp_path / "clip", tower)
    given = [*command, "--pictures", str(folder), "--features", str(tmp_path / "clip")]
    assert main([*given, "--json", str(tmp_path / "a.json")]) == 0
    facts = json.loads((tmp_path / "a.json").read_text())
    assert facts["pictures"]["kind"] == "given"
    assert (facts["pictures"]["count"], facts["pictures"]["image_px"]) == (3, 16)
    assert list(facts["pictures"]["unreadable"]) == ["bad.png"]
    assert "clip vision tower" in facts["reconstruction"]["frechet"]["features"]
    assert "1 pictures could not be read; bad.png" in capsys.readouterr().out

    assert main(command) == 2  # it lies in no run, so pictures must be named
    assert "--pictures DIR" in capsys.readouterr().err
    config = Path(__file__).parent.parent / "configs/tiny/vae.yaml"
    assert main([*command, "--config", str(config), "-n", "2"]) == 0
    assert main([*given, "-n", "1"]) == 2
    assert main([*given, "--px", "2048"]) == 2
    assert main([*given, "--lpips", str(tmp_path / "none.pth")]) == 74


def test_lpips_is_measured_where_its_weights_are(tmp_path: Path, chosen: Pictures) -> None:
    torch.manual_seed(0)
    save_tensors(tmp_path / "vgg.safetensors", Lpips("vgg").state_dict())
    found = examine(Perfect(), chosen, Settings(2, lpips=str(tmp_path / "vgg.safetensors")))
    assert found.lpips == pytest.approx(0, abs=1e-7)
    assert "lpips" not in found.missing


def test_too_few_readable_pictures_are_refused_with_the_reason(tmp_path: Path) -> None:
    class Broken:
        ids = ("a", "b")
        captions = ("", "")
        fingerprint = ""

        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> Any:
            raise LdmError("it is torn", where=self.ids[index], code=65)  # type: ignore[arg-type]

    with pytest.raises(LdmError, match="0 pictures could be read"):
        examine(Perfect(), Pictures(Broken(), "given", PX), Settings(2))
