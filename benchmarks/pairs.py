"""The same network twice: diffusers' class and ours with its weights. `ldm` is imported first."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import ldm  # noqa: F401  before diffusers: see ldm/torchvision_guard.py
from benchmarks.measure import generator
from ldm.models.backends import choose
from ldm.types import TextEmbedding

SMOKE_SIDE, TOKENS = 8, 77


@dataclass
class Pair:
    """Two networks of equal weights and how each is called.

    Args:
        name: unet, dit, mmdit.
        ours: this project's.
        peer: diffusers'.
        call_peer: (net, x, t, text) -> prediction.
        channels: of a latent.
        text_width, pooled_width: of the text.
    """

    name: str
    ours: Any
    peer: nn.Module
    call_peer: Callable[[nn.Module, Tensor, Tensor, TextEmbedding], Tensor]
    channels: int
    text_width: int
    pooled_width: int | None = None

    def inputs(self, batch: int, side: int) -> tuple[Tensor, Tensor, TextEmbedding]:
        """Noisy latents, clocks and prompts that fill their length, equal for both."""
        draws = generator(1)
        x = torch.randn(batch, self.channels, side, side, generator=draws)
        tokens = torch.randn(batch, TOKENS, self.text_width, generator=draws)
        pooled = None
        if self.pooled_width is not None:
            pooled = torch.randn(batch, self.pooled_width, generator=draws)
        mask = torch.ones(batch, TOKENS, dtype=torch.bool)
        return x, torch.full((batch,), 500.0), TextEmbedding(tokens, mask, pooled)

    def to(self, dtype: torch.dtype) -> Pair:
        """A copy in another precision."""
        pair = deepcopy(self)
        pair.ours, pair.peer = pair.ours.to(dtype), pair.peer.to(dtype)
        return pair

    def tuned(self) -> Any:
        """A copy of ours on the kernels that a run here would choose."""
        return choose().install(deepcopy(self.ours))


def cast(text: TextEmbedding, dtype: torch.dtype) -> TextEmbedding:
    """The prompts in another precision."""
    return text.to("cpu", dtype)


def filled(net: nn.Module) -> nn.Module:
    """Fresh weights with the zeros of an untrained network filled in, from a seed of its own."""
    draws = generator(2)
    with torch.no_grad():
        for weight in net.parameters():
            if not weight.any():
                weight.normal_(0, 0.02, generator=draws)
    return net.eval()


def made(build: Callable[[], nn.Module]) -> nn.Module:
    """`build()` with seeded weights; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return filled(build())


def unet_pair(widths: tuple[int, ...] = (64, 128, 256, 256), text_width: int = 256) -> Pair:
    """A UNet of Stable Diffusion's layout; 35 M parameters by default."""
    from diffusers import UNet2DConditionModel

    from ldm.models.unet import UNet, UNetConfig

    groups = min(32, widths[0] // 4)
    peer = made(
        lambda: UNet2DConditionModel(
            sample_size=16,
            block_out_channels=widths,
            attention_head_dim=8,
            cross_attention_dim=text_width,
            norm_num_groups=groups,
        )
    )
    ours = UNet(UNetConfig.from_diffusers(dict(peer.config))).eval()
    ours.load_state_dict(peer.state_dict())
    return Pair("unet", ours, peer, call_unet, 4, text_width)


def call_unet(net: nn.Module, x: Tensor, t: Tensor, text: TextEmbedding) -> Tensor:
    """diffusers' UNet2DConditionModel, without a mask, as its pipelines call it."""
    out: Tensor = net(x, t, encoder_hidden_states=text.tokens, return_dict=False)[0]
    return out


def dit_pair(layers: int = 12, heads: int = 6, text_width: int = 384) -> Pair:
    """A DiT of PixArt's layout; 30 M parameters by default."""
    from diffusers import PixArtTransformer2DModel

    from ldm.models.dit import DiT, DiTConfig
    from ldm.models.dit_diffusers import dit_weights_from_diffusers

    peer = made(
        lambda: PixArtTransformer2DModel(
            num_attention_heads=heads,
            attention_head_dim=64,
            in_channels=4,
            out_channels=4,
            num_layers=layers,
            cross_attention_dim=64 * heads,
            caption_channels=text_width,
            sample_size=16,
        )
    )
    values = dict(peer.config) | {"_class_name": "PixArtTransformer2DModel"}
    config = DiTConfig.from_diffusers(values)
    ours = DiT(config).eval()
    ours.load_state_dict(dit_weights_from_diffusers(peer.state_dict(), config))
    return Pair("dit", ours, peer, call_pixart, 4, text_width)


def call_pixart(net: nn.Module, x: Tensor, t: Tensor, text: TextEmbedding) -> Tensor:
    """diffusers' PixArtTransformer2DModel with its mask, as its pipeline calls it."""
    out: Tensor = net(
        x,
        encoder_hidden_states=text.tokens,
        timestep=t,
        encoder_attention_mask=text.mask.to(x.dtype),
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        return_dict=False,
    )[0]
    return out


def mmdit_pair(layers: int = 12, heads: int = 6, text_width: int = 256) -> Pair:
    """An MM-DiT of SD 3's layout; 63 M parameters by default."""
    from diffusers import SD3Transformer2DModel

    from ldm.models.mmdit import MMDiT, MMDiTConfig

    config = MMDiTConfig(
        sample_size=32,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=64,
        num_attention_heads=heads,
        joint_attention_dim=text_width,
        caption_projection_dim=64 * heads,
        pooled_projection_dim=text_width,
        pos_embed_max_size=32,
    )
    peer = made(lambda: SD3Transformer2DModel.from_config(config.to_diffusers()))
    ours = MMDiT(config).eval()
    ours.load_state_dict(peer.state_dict())
    return Pair("mmdit", ours, peer, call_sd3, 4, text_width, text_width)


def call_sd3(net: nn.Module, x: Tensor, t: Tensor, text: TextEmbedding) -> Tensor:
    """diffusers' SD3Transformer2DModel, without a mask, as its pipeline calls it."""
    out: Tensor = net(
        x,
        encoder_hidden_states=text.tokens,
        pooled_projections=text.pooled,
        timestep=t,
        return_dict=False,
    )[0]
    return out


def vae_pair(widths: tuple[int, ...] = (32, 64, 128, 128)) -> tuple[Any, nn.Module]:
    """A KL-VAE of Stable Diffusion's layout, ours and the peer's; 5.3 M parameters by default."""
    from diffusers import AutoencoderKL as Peer

    from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL

    levels = len(widths)
    peer = made(
        lambda: Peer(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=widths,
            layers_per_block=2,
            latent_channels=4,
            norm_num_groups=min(32, widths[0] // 4),
        )
    )
    ours = AutoencoderKL(AutoencoderConfig.from_diffusers(dict(peer.config))).eval()
    ours.load_state_dict(peer.state_dict())
    return ours, peer
