"""The tables of the original layouts: every tensor of the published shapes, as diffusers reads it.

Full-size models live on the meta device, where a tensor has a shape and no memory.
"""

import copy

import pytest
import torch
from torch.testing import assert_close

import ldm  # noqa: F401  (before anything that imports torchvision)
from ldm.exchange import original
from ldm.exchange.keymap import FORMS, from_original, kept, to_original
from ldm.models.autoencoder_config import AutoencoderConfig
from ldm.models.unet_config import UNetConfig

diffusers = pytest.importorskip("diffusers")
converters = pytest.importorskip("diffusers.loaders.single_file_utils")
transformers = pytest.importorskip("transformers")

SD2 = {
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
SDXL = {
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": [5, 10, 20],
    "transformer_layers_per_block": [1, 2, 10],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
UNETS = {"sd1": {"cross_attention_dim": 768}, "sd2": SD2, "sdxl": SDXL}
TINY_UNET = {"block_out_channels": [32, 64], "attention_head_dim": 2, "cross_attention_dim": 24}
TINY_UNET |= {
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
}
SD_VAE = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2}
SD_VAE |= {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
TINY_VAE = {"block_out_channels": [32, 64], "layers_per_block": 1}
TINY_VAE |= {
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
}
SD3 = {"num_layers": 24, "num_attention_heads": 24, "attention_head_dim": 64, "patch_size": 2}
SD3 |= {"in_channels": 16, "out_channels": 16, "pos_embed_max_size": 192, "sample_size": 128}
SD3 |= {"caption_projection_dim": 1536, "joint_attention_dim": 4096, "pooled_projection_dim": 2048}
TINY_SD3 = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "patch_size": 2}
TINY_SD3 |= {"in_channels": 4, "out_channels": 4, "pos_embed_max_size": 8, "sample_size": 8}
TINY_SD3 |= {"caption_projection_dim": 16, "joint_attention_dim": 24, "pooled_projection_dim": 12}
SD35_PARTS = {"qk_norm": "rms_norm", "dual_attention_layers": (0,)}


class Levels:
    """What the table of SD3 asks of a configuration."""

    def __init__(self, num_layers):
        self.num_layers = num_layers


def tensors_of(kind, device="meta", **config):
    with torch.device(device):
        return dict(getattr(diffusers, kind)(**config).state_dict())


def clip(device, projected, **shape):
    config = transformers.CLIPTextConfig(vocab_size=60, max_position_embeddings=9, **shape)
    name = "CLIPTextModelWithProjection" if projected else "CLIPTextModel"
    with torch.device(device):
        return getattr(transformers, name)(config)


def unet_rows(config):
    return original.unet_rows(UNetConfig(**{k: _frozen(v) for k, v in config.items() if k in KEYS}))


PLAIN = {"layers_per_block": 2, "class_embed_type": None, "addition_embed_type": None}
"""What diffusers' converter of UNets asks of a configuration."""
KEYS = set(UNetConfig.__dataclass_fields__)


def _frozen(value):
    return tuple(value) if isinstance(value, list) else value


def assert_reads_as_diffusers(rows, tensors, convert):
    """Written by our table and read by diffusers' converter, the tensors are what they were."""
    rows = kept(rows, tensors)
    theirs = to_original(rows, tensors)
    again = convert(copy.copy(theirs))
    assert again.keys() == tensors.keys()
    for name, value in tensors.items():
        assert again[name].shape == value.shape, name
        if value.device.type != "meta":
            assert_close(again[name], value, rtol=0, atol=0, msg=name)
    return theirs


@pytest.mark.parametrize("kind", UNETS)
def test_every_tensor_of_a_published_unet_has_its_original_name(kind):
    tensors = tensors_of("UNet2DConditionModel", **UNETS[kind])
    theirs = assert_reads_as_diffusers(
        unet_rows(UNETS[kind]),
        tensors,
        lambda file: converters.convert_ldm_unet_checkpoint(file, PLAIN | UNETS[kind]),
    )
    assert theirs["model.diffusion_model.input_blocks.0.0.weight"].shape == (320, 4, 3, 3)
    count = sum(value.numel() for value in theirs.values())
    assert count == {"sd1": 859_520_964, "sd2": 865_910_724, "sdxl": 2_567_463_684}[kind]


def test_every_tensor_of_the_published_vae_has_its_original_name():
    tensors = tensors_of("AutoencoderKL", **SD_VAE)
    theirs = assert_reads_as_diffusers(
        original.vae_rows(AutoencoderConfig()),
        tensors,
        lambda file: converters.convert_ldm_vae_checkpoint(file, SD_VAE),
    )
    assert sum(value.numel() for value in theirs.values()) == 83_653_863
    assert theirs["first_stage_model.encoder.mid.attn_1.q.weight"].shape == (512, 512, 1, 1)


def test_every_tensor_of_sd3_has_its_original_name():
    tensors = tensors_of("SD3Transformer2DModel", **SD3)
    theirs = assert_reads_as_diffusers(
        original.sd3_rows(Levels(24)),
        tensors,
        converters.convert_sd3_transformer_checkpoint_to_diffusers,
    )
    qkv = theirs["model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight"]
    assert qkv.shape == (3 * 1536, 1536)


@pytest.mark.parametrize("more", [{}, SD35_PARTS])
def test_values_go_where_diffusers_puts_them(more):
    """Random weights of small models: a transpose, a half or an order that is wrong shows."""
    torch.manual_seed(0)
    tensors = tensors_of("SD3Transformer2DModel", "cpu", **TINY_SD3, **more)
    convert = converters.convert_sd3_transformer_checkpoint_to_diffusers
    assert_reads_as_diffusers(original.sd3_rows(Levels(2)), tensors, convert)
    tensors = tensors_of("UNet2DConditionModel", "cpu", **TINY_UNET)
    assert_reads_as_diffusers(
        unet_rows(TINY_UNET),
        tensors,
        lambda file: converters.convert_ldm_unet_checkpoint(file, PLAIN | TINY_UNET),
    )
    tensors = tensors_of("AutoencoderKL", "cpu", **TINY_VAE)
    shape = AutoencoderConfig(block_out_channels=(32, 64), layers_per_block=1)
    assert_reads_as_diffusers(
        original.vae_rows(shape),
        tensors,
        lambda file: converters.convert_ldm_vae_checkpoint(file, TINY_VAE),
    )


@pytest.mark.parametrize("projected", [False, True])
def test_an_open_clip_tower_is_read_as_diffusers_reads_it(projected):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    model = clip("cpu", projected, **sizes, num_attention_heads=2, projection_dim=32)
    tensors, wrapper = dict(model.state_dict()), "text_model." if projected else ""

    def convert(file):
        found = converters.convert_open_clip_checkpoint(model, file, "x.")
        return {k if projected else k.removeprefix("text_model."): v for k, v in found.items()}

    rows = original.open_clip_rows(2, "x.", wrapper)
    theirs = assert_reads_as_diffusers(rows, tensors, convert)
    assert theirs["x.transformer.resblocks.1.attn.in_proj_weight"].shape == (96, 32)


def test_our_open_clip_table_is_that_of_the_text_encoders():
    """Two tables of one layout: ours for files, and that of `ldm.models.text.openclip`."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    model = clip("cpu", True, **sizes, num_attention_heads=2, projection_dim=16)
    tensors = dict(model.state_dict())
    theirs = to_original(kept(original.open_clip_rows(2, "", "text_model."), tensors), tensors)
    from ldm.models.text import open_clip_to_transformers

    again = open_clip_to_transformers(theirs, 2, projection=True)
    for name, value in tensors.items():
        match = again[name] if name in again else again[name.removeprefix("text_model.")]
        assert_close(match, value, rtol=0, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_its_own_inverse(form):
    write, read = FORMS[form]
    count = 3 if form == "stacked" else 1
    parts = [torch.randn(4, 6, generator=torch.Generator().manual_seed(k)) for k in range(count)]
    again = read(write(parts), count)
    assert all(one.equal(other) for one, other in zip(again, parts, strict=True))


def test_a_model_that_the_table_does_not_cover_is_noticed():
    tensors = {"conv_in.weight": torch.ones(1), "conv_in.new": torch.ones(1)}
    with pytest.raises(AssertionError, match="conv_in.new"):
        kept(unet_rows(UNETS["sd1"]), tensors)


def test_missing_tensors_are_named():
    rows = kept(unet_rows(TINY_UNET), ["conv_in.weight", "conv_in.bias"])
    there = {"model.diffusion_model.input_blocks.0.0.bias": torch.ones(1)}
    found, missing = from_original(rows, there)
    assert list(found) == ["conv_in.bias"]
    assert missing == ["model.diffusion_model.input_blocks.0.0.weight"]
