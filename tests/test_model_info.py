"""`ldm model info`: published networks have the published sizes and costs; no weights needed."""

from __future__ import annotations

import json

import diffusers
import pytest
import torch
from recipes import TINY, tiny
from torch.utils.flop_counter import FlopCounterMode

from ldm.build import load_denoiser
from ldm.checkpoint import find_checkpoint
from ldm.cli import main
from ldm.errors import ExitCode, LdmError
from ldm.model_info import info_text, model_info, model_names
from ldm.models.flops import cost_of, on_meta, parameters_of
from ldm.models.presets import PRESETS
from ldm.training.diffusion import train_diffusion

PARAMETERS = {
    "sd15-unet": 859_520_964,
    "sd21-unet": 865_910_724,
    "sdxl-unet": 2_567_463_684,
    "sd-vae": 83_653_863,
    "sdxl-vae": 83_653_863,
    "sd3-vae": 83_819_683,
    "flux-vae": 83_819_683,
    "dit-s-2": 32_963_360,
    "dit-b-2": 130_512_416,
    "dit-l-2": 458_102_816,
    "dit-xl-2": 675_129_632,
    "pixart-xl-2": 610_856_096,
    "mmdit-sd3-medium": 2_028_328_000,
    "mmdit-sd35-medium": 2_243_171_520,
    "mmdit-sd35-large": 8_056_627_520,
}
"""Model cards, the papers' tables, and where those round, the parameters of diffusers' class."""

GFLOP = {
    ("sd15-unet", 32): 180,
    ("sd15-unet", 64): 803,
    ("sd21-unet", 32): 181,
    ("sd21-unet", 64): 804,
    ("sd-vae", 256): 273 + 622,
    ("sd-vae", 512): 1_117 + 2_515,
    ("dit-s-2", 32): 12.1,
    ("dit-b-2", 32): 46.0,
    ("dit-l-2", 32): 161.5,
    ("dit-xl-2", 32): 237.3,  # 119 GMAC in Peebles & Xie 2023, table 4
    ("mmdit-sd3-medium", 32): 579,
    ("mmdit-sd3-medium", 64): 1_803,
    ("mmdit-sd3-medium", 128): 8_437,
}
"""Two per multiply-add, one sample: counted on the peers' classes, not with this code."""

CLASSES = {
    "sd15-unet": diffusers.UNet2DConditionModel,
    "sd21-unet": diffusers.UNet2DConditionModel,
    "sdxl-unet": diffusers.UNet2DConditionModel,
    "sd-vae": diffusers.AutoencoderKL,
    "sd3-vae": diffusers.AutoencoderKL,
    "mmdit-sd3-medium": diffusers.SD3Transformer2DModel,
    "mmdit-sd35-medium": diffusers.SD3Transformer2DModel,
    "mmdit-sd35-large": diffusers.SD3Transformer2DModel,
}


def theirs(name: str) -> torch.nn.Module:
    """Diffusers' network of a preset, without memory for its weights."""
    with torch.device("meta"):
        return CLASSES[name].from_config(PRESETS[name].config.to_diffusers())


def empty(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, device="meta")


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_published_network_has_the_published_number_of_parameters(name: str) -> None:
    assert parameters_of(on_meta(PRESETS[name].config)) == PARAMETERS[name]


@pytest.mark.parametrize("name", CLASSES)
def test_every_weight_of_a_published_network_has_diffusers_name_and_shape(name: str) -> None:
    ours = {key: value.shape for key, value in on_meta(PRESETS[name].config).state_dict().items()}
    assert ours == {key: value.shape for key, value in theirs(name).state_dict().items()}


def test_pixart_has_as_many_parameters_as_its_diffusers_class() -> None:
    values = PRESETS["pixart-xl-2"].config.to_diffusers(64)
    with torch.device("meta"):
        net = diffusers.PixArtTransformer2DModel.from_config(values)
    assert sum(p.numel() for p in net.parameters()) == PARAMETERS["pixart-xl-2"]


@pytest.mark.parametrize(("name", "side"), GFLOP)
def test_operations_are_within_one_percent_of_published_figures(name: str, side: int) -> None:
    preset = PRESETS[name]
    counted = cost_of(on_meta(preset.config), (side, side), preset.text_tokens)
    assert counted.flops / 1e9 == pytest.approx(GFLOP[name, side], rel=0.01)
    shares = sum(part["flops"] for part in counted.layers.values())
    # a DiT's label is looked up here by a product with a one-hot row, outside all parts
    assert shares == pytest.approx(counted.flops, rel=1e-3)
    assert counted.flops == sum(counted.passes.values())


def test_operations_equal_a_count_of_diffusers_networks() -> None:
    # small latents: what is compared is each layer's formula
    vector, clock = empty(1, 2048), empty(1)
    calls = {
        "sd15-unet": lambda net: net(empty(1, 4, 16, 16), clock, empty(1, 77, 768)),
        "mmdit-sd35-medium": lambda net: net(
            empty(1, 16, 16, 16), empty(1, 154, 4096), vector, clock
        ),
        "sd-vae": lambda net: net(empty(1, 3, 128, 128)),
    }
    for name, call in calls.items():
        with FlopCounterMode(display=False) as counter:
            call(theirs(name))
        preset, side = PRESETS[name], 128 if name == "sd-vae" else 16
        ours = cost_of(on_meta(preset.config), (side, side), preset.text_tokens)
        assert ours.flops == counter.get_total_flops(), name


def test_parts_carry_their_own_operations() -> None:
    cost = cost_of(on_meta(PRESETS["mmdit-sd3-medium"].config), (16, 16), 10)
    # one 2x2 patch of 16 channels to 1536, 64 tokens; 10 words of 4096 to 1536
    assert cost.layers["pos_embed"]["flops"] == 2 * 64 * (16 * 4) * 1536
    assert cost.layers["context_embedder"]["flops"] == 2 * 10 * 4096 * 1536
    # modulations are computed outside the blocks' forward, and are theirs all the same
    width = 1536
    modulations = 2 * width * width * (24 * 6 + 23 * 6 + 2)
    blocks = 2 * (64 + 10) * 24 * 12 * width * width
    blocks -= 2 * 10 * (1 + 8) * width * width  # the last block ends the text half
    attention = 24 * 4 * (64 + 10) ** 2 * width
    assert cost.layers["transformer_blocks"]["flops"] == modulations + blocks + attention


def test_json_states_what_was_counted(capsys) -> None:
    assert main(["model", "info", "dit-s-2", "--json", "--size", "16x8"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["name"] == "dit-s-2"
    assert info["class"] == "DiT"
    assert info["parameters"] == 32_963_360
    assert info["shape"] == {"latent": [1, 4, 8, 16], "pooled": [1, 1001]}
    assert info["memory_bytes"]["weights_float32"] == 4 * 32_963_360
    assert info["memory_bytes"]["training_float32"] == 16 * 32_963_360
    assert 0 < info["flops"] < 2e9
    assert sum(part["parameters"] for part in info["layers"].values()) == 32_963_360 - 256 * 384


def test_the_text_names_every_part_and_both_passes_of_a_vae(capsys) -> None:
    assert main(["model", "info", "sd-vae", "--size", "64"]) == 0
    text = capsys.readouterr().out
    for words in ("83,653,863", "encode", "decode", "pixels 1x3x64x64", "quant_conv", "bfloat16"):
        assert words in text


def test_every_listed_name_has_info_and_an_unknown_one_is_refused_with_the_nearest(capsys) -> None:
    assert main(["model", "list"]) == 0
    listed = capsys.readouterr().out.split()
    assert listed == model_names()
    assert {*PARAMETERS, "clip-l", "t5-v1.1-xxl"} <= set(listed)
    assert main(["model", "info", "sd15-unett"]) == ExitCode.USAGE
    assert "use sd15-unet" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["0", "64x0", "-8", "8x8x8", "big"])
def test_a_size_of_nothing_is_refused(size: str, capsys) -> None:
    assert main(["model", "info", "dit-s-2", f"--size={size}"]) == ExitCode.USAGE
    assert f"{size!r} is not a size" in capsys.readouterr().err


def test_a_text_encoder_is_counted_at_77_tokens() -> None:
    info = model_info("clip-l")
    assert info["parameters"] == 123_060_480
    # 12 blocks of 12 D^2 weights, and attention over 77 tokens
    assert info["flops"] == 12 * (2 * 12 * 768**2 * 77 + 4 * 77**2 * 768)
    with pytest.raises(LdmError, match="no picture size"):
        model_info("clip-l", (64, 64))


@pytest.mark.parametrize("name", ["dit", "mmdit", "unet", "vae"])
def test_an_experiment_is_counted_before_it_is_run(name: str) -> None:
    info = model_info(str(TINY[name]))
    assert info["parameters"] > 10_000
    side = [3, 32, 32] if name == "vae" else [4, 8, 8]
    assert next(iter(info["shape"].values())) == [1, *side]
    assert info_text(info).startswith(str(TINY[name]))


def test_a_run_shows_its_denoiser_and_its_vae(tmp_path, capsys) -> None:
    checkpoint = find_checkpoint(
        train_diffusion(tiny("mmdit", tmp_path / "run", "train.steps=2", "run.save_every_steps=2"))
    )
    info = model_info(str(tmp_path / "run"))
    net, _ = load_denoiser(checkpoint)
    assert info["class"] == "MMDiT"
    assert info["parameters"] == sum(p.numel() for p in net.parameters())
    assert info["shape"]["latent"] == [1, 4, 8, 8]
    assert info["components"][0]["class"] == "AutoencoderKL"
    assert info["components"][0]["shape"]["pixels"] == [1, 3, 32, 32]
    alone = model_info(str(checkpoint / "transformer"), (4, 4))
    assert alone["flops"] < info["flops"]
    config = json.loads((checkpoint / "vae/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"_class_name": "VQModel"}))
    assert main(["model", "info", str(tmp_path)]) == ExitCode.USAGE
    assert "a VQModel has no module here" in capsys.readouterr().err
