"""Denoisers and autoencoders of diffusers, seen through our protocols: equal, trainable, kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ldm.build import load_denoiser, load_vae_directory
from ldm.checkpoint import load_strict, load_tensors, save_module
from ldm.diffusion.core import Diffusion
from ldm.diffusion.loss import diffusion_loss
from ldm.diffusion.prediction import PREDICTIONS
from ldm.diffusion.process import PROCESSES
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.schedule import levels
from ldm.errors import ExitCode, LdmError
from ldm.models.external import (
    ExternalCodec,
    ExternalDenoiser,
    external_codec,
    external_denoiser,
    load_external_codec,
    load_external_denoiser,
)
from ldm.models.external_calls import AUTOENCODERS, CERTAIN, DENOISERS, ExternalConfig
from ldm.models.identity import autoencoder_sha256
from ldm.training.checkpoints import denoiser_facts
from ldm.types import TextEmbedding

TEXT, POOLED = 12, 10
SHAPES: dict[str, dict[str, Any]] = {
    "PixArtTransformer2DModel": {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
        "cross_attention_dim": 16,
        "caption_channels": TEXT,
        "sample_size": 8,
    },
    "SanaTransformer2DModel": {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 8,
        "cross_attention_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "caption_channels": TEXT,
        "sample_size": 8,
    },
    "SD3Transformer2DModel": {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "caption_projection_dim": 16,
        "joint_attention_dim": TEXT,
        "pooled_projection_dim": POOLED,
        "sample_size": 8,
        "pos_embed_max_size": 8,
    },
    "FluxTransformer2DModel": {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "joint_attention_dim": TEXT,
        "pooled_projection_dim": POOLED,
        "guidance_embeds": True,
        "axes_dims_rope": (4, 6, 6),
    },
    "AuraFlowTransformer2DModel": {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 4,
        "out_channels": 4,
        "num_mmdit_layers": 1,
        "num_single_dit_layers": 1,
        "caption_projection_dim": 16,
        "joint_attention_dim": TEXT,
        "sample_size": 8,
        "pos_embed_max_size": 64,
    },
    "Lumina2Transformer2DModel": {
        "hidden_size": 24,
        "num_attention_heads": 2,
        "num_kv_heads": 1,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 1,
        "num_refiner_layers": 1,
        "multiple_of": 8,
        "cap_feat_dim": TEXT,
        "sample_size": 8,
        "axes_dim_rope": (4, 4, 4),
        "axes_lens": (32, 32, 32),
    },
    "DiTTransformer2DModel": {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
        "sample_size": 8,
        "num_embeds_ada_norm": POOLED - 1,
    },
    "UNet2DConditionModel": {
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "cross_attention_dim": TEXT,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": POOLED + 6 * 4,
    },
}
EVERY_CLASS = pytest.mark.parametrize("name", SHAPES)


def network(name: str, **changes: Any) -> Any:
    """A small one of the real class, no weight at its initial value."""
    torch.manual_seed(0)
    module = getattr(diffusers, name)(**(SHAPES[name] | changes)).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            # the last layers start at zero, where everything would be equal
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def some_text(rows: int = 2) -> TextEmbedding:
    torch.manual_seed(1)
    mask = torch.ones(rows, 5, dtype=torch.bool)
    mask[-1, 3:] = False
    sizes = torch.tensor([[64.0, 48, 0, 8, 64, 64]]).expand(rows, 6)
    one_hot = torch.eye(POOLED)[torch.arange(rows) + 3]
    return TextEmbedding(torch.randn(rows, 5, TEXT), mask, one_hot, sizes)


def some_x(rows: int = 2) -> Tensor:
    torch.manual_seed(2)
    return torch.randn(rows, 4, 8, 6 if rows == 2 else 8)


CLOCK = torch.tensor([250.0, 900.0])


def packed(x: Tensor) -> Tensor:
    """(B, C, h, w) to (B, h w / 4, 4C), written as the pipeline of FLUX does."""
    b, c, h, w = x.shape
    x = x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(b, h // 2 * (w // 2), 4 * c)


def unpacked(y: Tensor, h: int, w: int) -> Tensor:
    b, _, c = y.shape
    y = y.view(b, h // 2, w // 2, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return y.reshape(b, c // 4, h, w)


def pixart(net: Any, x: Tensor, text: TextEmbedding) -> Tensor:
    told = {"resolution": None, "aspect_ratio": None}
    y = net(x, text.tokens, CLOCK, told, encoder_attention_mask=text.mask, return_dict=False)[0]
    return y[:, :4]


def flux(net: Any, x: Tensor, text: TextEmbedding) -> Tensor:
    h, w = x.shape[2:]
    ids = torch.tensor([[0.0, i, j] for i in range(h // 2) for j in range(w // 2)])
    y = net(
        hidden_states=packed(x),
        encoder_hidden_states=text.tokens,
        pooled_projections=text.pooled,
        timestep=CLOCK / 1000,
        img_ids=ids,
        txt_ids=torch.zeros(5, 3),
        guidance=torch.full((2,), 2.5),
        return_dict=False,
    )[0]
    return unpacked(y, h, w)


def unet(net: Any, x: Tensor, text: TextEmbedding) -> Tensor:
    told = {"text_embeds": text.pooled, "time_ids": text.sizes}
    return net(x, CLOCK, text.tokens, added_cond_kwargs=told, return_dict=False)[0]


DIRECT: dict[str, Callable[[Any, Tensor, TextEmbedding], Tensor]] = {
    "PixArtTransformer2DModel": pixart,
    "SanaTransformer2DModel": lambda net, x, text: net(
        x, text.tokens, CLOCK, encoder_attention_mask=text.mask, return_dict=False
    )[0],
    "SD3Transformer2DModel": lambda net, x, text: net(
        x, text.tokens, text.pooled, CLOCK, return_dict=False
    )[0],
    "FluxTransformer2DModel": flux,
    "AuraFlowTransformer2DModel": lambda net, x, text: net(
        x, text.tokens, CLOCK / 1000, return_dict=False
    )[0],
    "Lumina2Transformer2DModel": lambda net, x, text: (
        -net(x, 1 - CLOCK / 1000, text.tokens, text.mask, return_dict=False)[0]
    ),
    "DiTTransformer2DModel": lambda net, x, text: net(
        x, CLOCK, torch.tensor([3, 4]), return_dict=False
    )[0][:, :4],
    "UNet2DConditionModel": unet,
}
"""Each class as its pipeline in diffusers calls it."""


def test_every_class_of_the_table_is_tried_here() -> None:
    assert SHAPES.keys() == DIRECT.keys() == DENOISERS.keys()


@EVERY_CLASS
@torch.no_grad()
def test_the_output_is_that_of_calling_diffusers_with_the_right_arguments(name: str) -> None:
    net, x, text = network(name), some_x(), some_text()
    if name == "DiTTransformer2DModel":
        x = some_x(2)[..., :6].repeat(1, 1, 1, 2)[..., :8]  # its positions are of one size
    expected = DIRECT[name](net, x, text)
    ours = external_denoiser(net, guidance=2.5)
    assert_close(ours(x, CLOCK, text), expected, atol=1e-6, rtol=1e-5)
    assert expected.abs().mean() > 1e-3
    # time, text and noise all reach it
    assert (ours(x, CLOCK.flip(0), text) - expected).abs().max() > 1e-5
    other = replace(text, tokens=text.tokens + 1, pooled=text.pooled.roll(1, 1))
    assert (ours(x, CLOCK, other) - expected).abs().max() > 1e-5


@pytest.mark.parametrize("name", [n for n, call in DENOISERS.items() if call.mask])
@torch.no_grad()
def test_padding_is_not_seen_by_models_trained_with_a_mask(name: str) -> None:
    net, x, text = external_denoiser(network(name)), some_x(), some_text()
    tokens = text.tokens.clone()
    tokens[-1, 3:] = 77.0
    seen = net(x, CLOCK, replace(text, tokens=tokens))
    assert_close(seen, net(x, CLOCK, text), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_learned_variance_is_dropped_as_in_the_pipelines_or_kept_when_asked_for() -> None:
    net, x, text = network("PixArtTransformer2DModel"), some_x(), some_text()
    kept = external_denoiser(net, keep_variance=True)(x, CLOCK, text)
    assert kept.shape[1] == 8
    assert_close(kept[:, :4], external_denoiser(net)(x, CLOCK, text))


@torch.no_grad()
def test_pixart_at_1024_pixels_is_told_its_size() -> None:
    wide = {"attention_head_dim": 12, "cross_attention_dim": 24}  # three numbers share a width
    net = network("PixArtTransformer2DModel", sample_size=128, **wide)
    x, text = some_x(), replace(some_text(), sizes=None)
    told = {
        "resolution": torch.tensor([[64.0, 48.0]] * 2),
        "aspect_ratio": torch.tensor([[64 / 48]] * 2),
    }
    expected = net(x, text.tokens, CLOCK, told, encoder_attention_mask=text.mask).sample[:, :4]
    assert_close(external_denoiser(net)(x, CLOCK, text), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "process", "prediction", "sampler"),
    [
        ("FluxTransformer2DModel", "rectified_flow", "flow", "euler"),
        ("SanaTransformer2DModel", "rectified_flow", "flow", "euler"),
        ("PixArtTransformer2DModel", "sd", "eps", "ddim"),
    ],
)
@torch.no_grad()
def test_our_sampler_walks_the_path_of_a_loop_written_by_hand(
    name: str, process: str, prediction: str, sampler: str
) -> None:
    net, text = network(name), some_text()
    ours = external_denoiser(net, guidance=2.5)
    diffusion = Diffusion(PROCESSES[process], PREDICTIONS[prediction])
    plan = levels(diffusion.process, 4, spacing="uniform", shift=1.0)
    x1 = some_x()
    drawn = SAMPLERS[sampler].run(
        lambda x, level: diffusion.denoise(ours, x, level, text), x1, plan
    )

    scale, offset = diffusion.process.clock
    x = x1
    for now, after in zip(plan[:-1], plan[1:], strict=True):
        CLOCK.fill_(max(scale * now.t + offset, 0.0))
        y = DIRECT[name](net, x, text)
        if prediction == "flow":  # x_t = (1 - t) x0 + t eps; dx / dt = eps - x0
            x = x + (after.t - now.t) * y
        else:
            x0 = (x - now.sigma * y) / now.alpha
            x = after.alpha * x0 + after.sigma * y
    CLOCK.copy_(torch.tensor([250.0, 900.0]))
    assert_close(drawn, x, atol=1e-4, rtol=1e-4)


@EVERY_CLASS
def test_a_training_step_reaches_the_weights_with_and_without_checkpointing(name: str) -> None:
    torch.manual_seed(3)
    variance = SHAPES[name].get("out_channels", 4) == 8
    diffusion = Diffusion(PROCESSES["sd"], PREDICTIONS["v"])
    x0, eps, t = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.7])
    gradients = []
    for checkpointing in (False, True):
        net = external_denoiser(network(name)).train()
        net.gradient_checkpointing = checkpointing
        assert net.gradient_checkpointing is checkpointing
        loss = diffusion_loss(net, diffusion, x0, some_text(), t, eps, None).mean()
        loss.backward()
        gradients.append({n: p.grad for n, p in net.named_parameters() if p.grad is not None})
        before = net.state_dict()
        before = {n: p.clone() for n, p in before.items()}
        torch.optim.SGD(net.parameters(), lr=0.1).step()
        changed = [n for n, p in net.state_dict().items() if not torch.equal(p, before[n])]
        assert len(changed) > 0.8 * len(gradients[-1])
    assert gradients[0].keys() == gradients[1].keys()
    for one, other in zip(*(g.values() for g in gradients), strict=True):
        assert_close(one, other, atol=1e-6, rtol=1e-4)
    unused = {n for n, _ in net.named_parameters()} - gradients[0].keys()
    assert not unused or variance or name in ("SD3Transformer2DModel", "FluxTransformer2DModel")


@EVERY_CLASS
@torch.no_grad()
def test_weights_have_the_names_of_diffusers_and_survive_saving_both_ways(
    name: str, tmp_path: Path
) -> None:
    net, x, text = network(name), some_x(1), some_text(1)
    ours = external_denoiser(net, guidance=7.0)
    assert ours.state_dict().keys() == net.state_dict().keys()
    ours.save(tmp_path / "saved")
    save_module(tmp_path / "checkpoint", ours.state_dict(), ours.config.to_diffusers())
    expected = ours(x, CLOCK[:1], text)
    for folder in (tmp_path / "saved", tmp_path / "checkpoint"):
        again = load_external_denoiser(folder)
        assert again.config.guidance == 7.0
        assert_close(again(x, CLOCK[:1], text), expected)
        theirs = getattr(diffusers, name).from_pretrained(folder)
        for key, value in net.state_dict().items():
            assert torch.equal(theirs.state_dict()[key], value)
    fresh = external_denoiser(network(name), guidance=7.0)
    for parameter in fresh.parameters():
        parameter.zero_()
    weights = tmp_path / "checkpoint" / "diffusion_pytorch_model.safetensors"
    load_strict(fresh, load_tensors(weights), "here")
    assert_close(fresh(x, CLOCK[:1], text), expected)
    assert fresh.load_state_dict(ours.state_dict()).missing_keys == []


def test_the_trained_wrapper_is_saved_as_the_plain_one() -> None:
    # the averages are kept by parameter name; a data-parallel wrapper adds one prefix more
    net = external_denoiser(network("SanaTransformer2DModel"))
    wrapped = torch.nn.Sequential(net)
    assert {f"0.{n}" for n in net.state_dict()} == wrapped.state_dict().keys()
    assert {n for n, _ in net.named_parameters()} == {f"module.{n}" for n in net.state_dict()}


def test_sizes_and_channels_are_those_of_the_latents() -> None:
    sizes = {name: external_denoiser(network(name)).config for name in SHAPES}
    assert {c.in_channels for c in sizes.values()} == {4}
    assert {name: c.patch_size for name, c in sizes.items()} == {
        **dict.fromkeys(SHAPES, 2),
        "SanaTransformer2DModel": 1,
    }


CODECS: dict[str, dict[str, Any]] = {
    "AutoencoderKL": {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        "norm_num_groups": 4,
        "scaling_factor": 0.3,
        "shift_factor": 0.1,
    },
    "AsymmetricAutoencoderKL": {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "down_block_out_channels": (8, 16),
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "up_block_out_channels": (16, 24),
        "norm_num_groups": 4,
    },
    "AutoencoderDC": {
        "latent_channels": 4,
        "attention_head_dim": 4,
        "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
        "decoder_block_types": ("ResBlock", "EfficientViTBlock"),
        "encoder_block_out_channels": (8, 16),
        "decoder_block_out_channels": (8, 16),
        "encoder_layers_per_block": (1, 1),
        "decoder_layers_per_block": (1, 1),
        "encoder_qkv_multiscales": ((), (5,)),
        "decoder_qkv_multiscales": ((), (5,)),
        "scaling_factor": 0.4,
    },
    "AutoencoderTiny": {
        "encoder_block_out_channels": (8, 8),
        "decoder_block_out_channels": (8, 8),
        "num_encoder_blocks": (1, 1),
        "num_decoder_blocks": (1, 1),
    },
}


def codec(name: str) -> Any:
    torch.manual_seed(0)
    return getattr(diffusers, name)(**CODECS[name]).eval()


@pytest.mark.parametrize("name", CODECS)
@torch.no_grad()
def test_an_autoencoder_gives_what_its_pipeline_would(name: str, tmp_path: Path) -> None:
    module, pixels = codec(name), torch.rand(2, 3, 16, 24) * 2 - 1
    ours = external_codec(module)
    moments = ours.moments(pixels)
    encoded = module.encode(pixels)
    if hasattr(encoded, "latent_dist"):
        z = encoded.latent_dist.mean
        assert_close(moments[:, 4:], encoded.latent_dist.logvar)
    else:
        z = encoded[0]
        assert (moments[:, 4:] == CERTAIN).all()
    shift, scale = module.config.get("shift_factor") or 0.0, module.config.scaling_factor
    latents = ours.latents(moments, torch.zeros(()))
    assert_close(latents, (z - shift) * scale)
    assert_close(ours.decode(latents), module.decode(z).sample, atol=1e-5, rtol=1e-5)
    assert pixels.shape[2] // latents.shape[2] == ours.downsample_factor == 2

    measured = replace(ours.config, latents_mean=(0.5,) * 4, latents_std=(2.0,) * 4)
    standard = ExternalCodec(module, measured)
    assert_close(standard.latents(moments, torch.zeros(())), (z - 0.5) * scale / 2)
    standard.save(tmp_path)
    again = load_external_codec(tmp_path)
    assert again.config.latents_std == (2.0,) * 4
    assert_close(again.decode(latents), standard.decode(latents))
    assert again.state_dict().keys() == module.state_dict().keys()
    with pytest.raises(LdmError, match="16x24"):
        ours.moments(torch.zeros(1, 3, 17, 24))


def test_every_autoencoder_of_the_table_is_tried_here() -> None:
    assert CODECS.keys() == AUTOENCODERS.keys()


def test_a_class_that_is_not_known_is_refused_with_those_that_are(tmp_path: Path) -> None:
    unknown = diffusers.UNet2DModel(
        block_out_channels=(8,),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    with pytest.raises(LdmError, match=r"'UNet2DModel'.*known: .*PixArtTransformer2DModel"):
        external_denoiser(unknown)
    with pytest.raises(LdmError, match=r"autoencoder class 'UNet2DModel'.*known: AutoencoderKL"):
        external_codec(unknown)
    unknown.save_pretrained(tmp_path)
    with pytest.raises(LdmError, match=r"'UNet2DModel'"):
        load_external_denoiser(tmp_path)


def test_a_directory_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(LdmError, match=r"config\.json") as caught:
        load_external_denoiser(tmp_path / "nothing")
    assert caught.value.code == ExitCode.IO
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderTiny"}))
    with pytest.raises(LdmError, match="cannot be loaded") as caught:
        load_external_codec(tmp_path)
    assert caught.value.code == ExitCode.IO


@pytest.mark.parametrize("part", ["pooled", "sizes"])
def test_text_that_lacks_what_the_model_was_trained_with_is_refused(part: str) -> None:
    net = external_denoiser(network("UNet2DConditionModel"))
    with pytest.raises(LdmError, match=rf"TextEmbedding\.{part}"):
        net(some_x(), CLOCK, replace(some_text(), **{part: None}))


def test_a_distilled_sana_is_refused_because_its_clock_is_another() -> None:
    net = external_denoiser(network("SanaTransformer2DModel", guidance_embeds=True))
    with pytest.raises(LdmError, match="Sana-Sprint"):
        net(some_x(), CLOCK, some_text())


def test_a_configuration_rebuilds_itself() -> None:
    net = external_denoiser(network("FluxTransformer2DModel"), guidance=1.5, keep_variance=True)
    assert isinstance(net, ExternalDenoiser)
    written = json.loads(json.dumps(net.config.to_diffusers()))
    assert ExternalConfig.from_diffusers(written) == net.config


@torch.no_grad()
def test_a_checkpoint_with_them_is_loaded_like_any_other(tmp_path: Path) -> None:
    net = external_denoiser(network("SanaTransformer2DModel"))
    folder, config, (library, class_) = denoiser_facts(net)
    assert (folder, library, class_) == ("transformer", "diffusers", "SanaTransformer2DModel")
    save_module(tmp_path / folder, net.state_dict(), config)
    again, name = load_denoiser(tmp_path)
    x, text = some_x(1), some_text(1)
    assert (name, type(again)) == ("transformer", ExternalDenoiser)
    assert_close(again(x, CLOCK[:1], text), net(x, CLOCK[:1], text))

    vae = external_codec(codec("AutoencoderDC"))
    save_module(tmp_path / "vae", vae.state_dict(), vae.config.to_diffusers())
    read = load_vae_directory(tmp_path / "vae")
    assert_close(read.decode(x[:, :, :4, :4]), vae.decode(x[:, :, :4, :4]))
    assert autoencoder_sha256(read, read.config) == autoencoder_sha256(vae, vae.config)
    assert not any(parameter.requires_grad for parameter in read.parameters())


@torch.no_grad()
def test_a_class_conditional_model_drops_no_labels_of_its_own() -> None:
    # it would draw them from torch's global generator, beside our caption dropout
    net = external_denoiser(network("DiTTransformer2DModel"))
    x, t, text = torch.randn(64, 4, 8, 8), CLOCK[:1].expand(64), some_text(2)[torch.arange(64) % 2]
    trained = net.train()(x, t, text)
    assert_close(trained, net.eval()(x, t, text))
