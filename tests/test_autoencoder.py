"""The KL-VAE computes what diffusers' AutoencoderKL computes, and refuses what it cannot do."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import diffusers
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from ldm.errors import LdmError
from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL

CONFIGS = {
    "one level": AutoencoderConfig(block_out_channels=(16,), layers_per_block=1, norm_num_groups=4),
    "two levels, no attention, 16 channels, no quant convs": AutoencoderConfig(
        block_out_channels=(16, 32),
        latent_channels=16,
        norm_num_groups=8,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ),
    "four levels": AutoencoderConfig(
        block_out_channels=(8, 16, 24, 24), norm_num_groups=8, layers_per_block=2
    ),
    "equal widths": AutoencoderConfig(
        in_channels=1, out_channels=1, block_out_channels=(16, 16, 16), norm_num_groups=4
    ),
}
STABLE_DIFFUSION_1 = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}


def twins(config: AutoencoderConfig, dtype: torch.dtype) -> tuple[AutoencoderKL, nn.Module]:
    """Ours and diffusers' model with equal weights, none of them at its initial value."""
    torch.manual_seed(0)
    ours = AutoencoderKL(config)
    with torch.no_grad():
        for parameter in ours.parameters():
            # norms start at 1 and 0, where a swapped or forgotten one would not show
            parameter.add_(0.05 * torch.randn_like(parameter))
    theirs = diffusers.AutoencoderKL.from_config(json.loads(json.dumps(config.to_diffusers())))
    theirs.load_state_dict(ours.state_dict())
    return ours.to(dtype), theirs.to(dtype)


def pixels_for(config: AutoencoderConfig, dtype: torch.dtype) -> Tensor:
    factor = config.downsample_factor
    return torch.rand(2, config.in_channels, 2 * factor, 4 * factor, dtype=dtype) * 2 - 1


@pytest.mark.parametrize("name", CONFIGS)
def test_encoder_and_decoder_equal_diffusers_to_1e_5(name: str) -> None:
    config = CONFIGS[name]
    ours, theirs = twins(config, torch.float32)
    pixels = pixels_for(config, torch.float32)
    with torch.no_grad():
        posterior = theirs.encode(pixels).latent_dist
        moments = ours.moments(pixels)
        assert_close(moments[:, : config.latent_channels], posterior.mean, atol=1e-5, rtol=1e-5)
        assert_close(moments[:, config.latent_channels :], posterior.logvar, atol=1e-5, rtol=1e-5)
        z = torch.randn(2, config.latent_channels, 2, 4)
        assert_close(ours.decode_raw(z), theirs.decode(z).sample, atol=1e-5, rtol=1e-5)
        # diffusers sums over channels and positions, as we do
        assert_close(ours.kl(moments), posterior.kl(), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_equal_diffusers(name: str) -> None:
    # float64: the claim is that the formula is the same, at any tolerance rounding allows
    config = CONFIGS[name]
    ours, theirs = twins(config, torch.float64)
    pixels = pixels_for(config, torch.float64)
    noise = torch.randn(2, config.latent_channels, 2, 4, dtype=torch.float64)

    rebuilt, moments = ours(pixels, noise)
    ((rebuilt - pixels).square().mean() + 1e-3 * ours.kl(moments).mean()).backward()

    posterior = theirs.encode(pixels).latent_dist
    rebuilt = theirs.decode(posterior.mean + posterior.std * noise).sample
    ((rebuilt - pixels).square().mean() + 1e-3 * posterior.kl().mean()).backward()

    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert_close(parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-10, msg=name)


@pytest.mark.parametrize("name", CONFIGS)
def test_state_dict_has_the_keys_and_shapes_of_diffusers(name: str) -> None:
    with torch.device("meta"):
        ours = AutoencoderKL(CONFIGS[name]).state_dict()
        theirs = diffusers.AutoencoderKL.from_config(CONFIGS[name].to_diffusers()).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


def test_the_stable_diffusion_vae_is_built_from_its_own_config_file() -> None:
    config = AutoencoderConfig.from_diffusers(STABLE_DIFFUSION_1)
    assert config.scaling_factor == 0.18215  # absent in the file, known to everyone
    assert config.downsample_factor == 8
    with torch.device("meta"):
        ours = AutoencoderKL(config)
        theirs = diffusers.AutoencoderKL.from_config(STABLE_DIFFUSION_1)
    assert sum(p.numel() for p in ours.parameters()) == 83_653_863
    assert set(ours.state_dict()) == set(theirs.state_dict())


def test_absent_keys_mean_what_diffusers_means() -> None:
    theirs = diffusers.AutoencoderKL.from_config({}).config
    ours = dataclasses.asdict(AutoencoderConfig.from_diffusers({}))
    assert {k: v if not isinstance(v, tuple) else list(v) for k, v in ours.items()} == {
        k: list(theirs[k]) if isinstance(theirs[k], tuple) else theirs[k] for k in ours
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_configuration_survives_the_round_trip_through_diffusers(name: str) -> None:
    written = json.loads(json.dumps(CONFIGS[name].to_diffusers()))
    saved_by_diffusers = dict(diffusers.AutoencoderKL.from_config(written).config)
    assert AutoencoderConfig.from_diffusers(written) == CONFIGS[name]
    assert AutoencoderConfig.from_diffusers(saved_by_diffusers) == CONFIGS[name]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 4}, "down_block_types"),
        ({"act_fn": "mish"}, "act_fn"),
        ({"norm_type": "spatial"}, "norm_type"),
        ({"_class_name": "AutoencoderTiny"}, "AutoencoderTiny"),
        ({"down_block_types": ["DownEncoderBlock2D"]}, "down_block_types"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(change: dict, words: str) -> None:
    with pytest.raises(LdmError, match=words):
        AutoencoderConfig.from_diffusers(STABLE_DIFFUSION_1 | change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"block_out_channels": ()}, "block_out_channels"),
        (
            {"block_out_channels": (48, 64), "norm_num_groups": 32},
            "32 does not divide the width 48",
        ),
        ({"latent_channels": 0}, "latent_channels is 0"),
        ({"layers_per_block": 0}, "layers_per_block"),
        ({"latents_mean": (0.0,) * 4}, "latents_mean and latents_std need each other"),
        ({"latents_mean": (0.0,), "latents_std": (1.0,)}, "4 latent channels"),
        ({"latents_mean": (0.0,) * 4, "latents_std": (1.0, 1.0, 0.0, 1.0)}, "above 0"),
        (
            {"latents_mean": (0.0,) * 4, "latents_std": (1.0,) * 4, "shift_factor": 0.1},
            "shift_factor",
        ),
        ({"scaling_factor": float("nan")}, "scaling_factor"),
    ],
)
def test_an_impossible_configuration_is_refused_with_its_field(change: dict, words: str) -> None:
    with pytest.raises(LdmError, match=words):
        dataclasses.replace(AutoencoderConfig(), **change)


@pytest.mark.parametrize(
    ("height", "width", "advice"),
    [
        (70, 64, "64x64 or 72x64"),
        (64, 65, "64x64 or 64x72"),
        (70, 90, "64x88 or 72x96"),
        (4, 64, "use height x width 8x64$"),
    ],
)
def test_a_size_it_cannot_make_names_the_nearest_legal_sizes(
    height: int, width: int, advice: str
) -> None:
    model = AutoencoderKL(CONFIGS["four levels"])
    with pytest.raises(LdmError, match=advice):
        model.moments(torch.zeros(1, 3, height, width))


STATISTICS = {"latents_mean": (1.0, -2.0, 0.0, 0.5), "latents_std": (2.0, 0.5, 1.0, 3.0)}


def with_statistics(**changes: object) -> AutoencoderKL:
    return AutoencoderKL(dataclasses.replace(CONFIGS["one level"], **changes))


def test_measured_statistics_give_latents_with_mean_0_and_std_1() -> None:
    model = with_statistics(**STATISTICS)
    moments = torch.zeros(1, 8, 100, 100)
    moments[:, :4] = torch.tensor(STATISTICS["latents_mean"])[:, None, None]
    moments[:, 4:] = 2 * torch.tensor(STATISTICS["latents_std"]).log()[:, None, None]
    noise = torch.randn(1, 4, 100, 100)
    assert_close(model.latents(moments, noise), noise)


def test_one_scale_and_shift_for_all_channels_are_those_of_the_published_pipelines() -> None:
    # FLUX and Stable Diffusion 3: (z - shift_factor) * scaling_factor
    model = with_statistics(scaling_factor=0.3611, shift_factor=0.1159)
    z = torch.randn(2, 4, 3, 3)
    moments = torch.cat([z, torch.full_like(z, -30.0)], dim=1)
    assert_close(model.latents(moments, torch.zeros_like(z)), (z - 0.1159) * 0.3611)


def test_statistics_and_scale_combine_as_in_the_published_pipelines() -> None:
    # Stable Diffusion XL: (z - latents_mean) * scaling_factor / latents_std
    model = with_statistics(**STATISTICS, scaling_factor=0.5)
    z = torch.tensor([3.0, -1.0, 2.0, 6.5])[None, :, None, None]
    assert_close(model.normalise(z).flatten(), torch.tensor([0.5, 1.0, 1.0, 1.0]))


@pytest.mark.parametrize(
    "changes", [STATISTICS, STATISTICS | {"scaling_factor": 0.5}, {"scaling_factor": 0.18215}, {}]
)
def test_decoding_undoes_the_normalisation(changes: dict) -> None:
    model = with_statistics(**changes).double()
    z = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    assert_close(model.denormalise(model.normalise(z)), z)
    with torch.no_grad():
        assert_close(model.decode(model.normalise(z)), model.decode_raw(z))


def test_log_variance_is_clamped_where_diffusers_clamps_it() -> None:
    model = with_statistics()
    with torch.no_grad():
        model.quant_conv.weight.zero_()
        model.quant_conv.bias.copy_(torch.tensor([0.0] * 4 + [-99.0, 99.0, -30.0, 20.0]))
        logvar = model.moments(torch.zeros(1, 3, 2, 2))[0, 4:, 0, 0]
    assert logvar.tolist() == [-30.0, 20.0, -30.0, 20.0]


def test_moments_are_float32_under_bf16_autocast() -> None:
    model = with_statistics()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.moments(torch.zeros(1, 3, 4, 4)).dtype == torch.float32


def test_memory_layout_does_not_change_the_picture() -> None:
    config = CONFIGS["four levels"]
    model, pixels = AutoencoderKL(config), pixels_for(config, torch.float32)
    noise = torch.zeros(2, 4, 2, 4)
    with torch.no_grad():
        expected, _ = model(pixels, noise)
        model.to(memory_format=torch.channels_last)
        rebuilt, _ = model(pixels.contiguous(memory_format=torch.channels_last), noise)
    assert rebuilt.is_contiguous(memory_format=torch.channels_last)  # no layer fell out of it
    assert_close(rebuilt, expected, atol=1e-5, rtol=1e-5)


def test_the_configuration_is_checked_without_loading_torch() -> None:
    code = (
        "import sys; from ldm.models.autoencoder_config import AutoencoderConfig;"
        "from ldm.models.unet_config import UNetConfig; AutoencoderConfig(); UNetConfig();"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
