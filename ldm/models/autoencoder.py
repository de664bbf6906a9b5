"""KL-VAE: pixels to latents and back, with the names and numbers of diffusers' AutoencoderKL.

Source: Rombach et al. 2022 (arXiv 2112.10752), section 3.1 and appendix G; Kingma & Welling 2014.
B batch, C latent channels, H, W pixels, h, w latent size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import ExitCode, LdmError
from ldm.models.attention import attend
from ldm.models.autoencoder_config import AutoencoderConfig
from ldm.models.layers import Downsample, ResnetBlock, Upsample

__all__ = ["AutoencoderConfig", "AutoencoderKL"]

EPS = 1e-6
"""Of every norm in this model; the weights of published VAEs expect it."""


class AutoencoderKL(nn.Module):
    """The codec between pixels in [-1, 1] and latents with mean 0 and std 1 per channel.

    `state_dict` keys and shapes are those of diffusers.AutoencoderKL with `config.to_diffusers()`.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = (
            nn.Conv2d(2 * channels, 2 * channels, 1) if config.use_quant_conv else None
        )
        self.post_quant_conv = (
            nn.Conv2d(channels, channels, 1) if config.use_post_quant_conv else None
        )

    @property
    def downsample_factor(self) -> int:
        """Pixels per latent along one side."""
        return self.config.downsample_factor

    def forward(self, pixels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """One training pass: pixels (B, 3, H, W), noise (B, C, h, w) -> reconstruction, moments.

        Distributed wrappers see only this method, so training goes through it.
        """
        moments = self.moments(pixels)
        return self.decode_raw(self.sample(moments, noise)), moments

    def moments(self, pixels: Tensor) -> Tensor:
        """Posterior mean and log-variance: (B, 3, H, W) in [-1, 1] -> (B, 2C, h, w), float32 up.

        Raises:
            LdmError: pictures of other channels, or H or W is not a multiple of
                `downsample_factor`.
        """
        check_pixels(pixels, self.config.in_channels, self.downsample_factor)
        h = self.encoder(pixels)
        return clamped(h if self.quant_conv is None else self.quant_conv(h))

    def sample(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Raw posterior sample z = mean + std * noise, (B, C, h, w); noise 0 gives the mean."""
        mean, logvar = moments.chunk(2, dim=1)
        return mean + torch.exp(0.5 * logvar) * noise

    def latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Normalised posterior sample (B, C, h, w): what the denoiser learns."""
        return self.normalise(self.sample(moments, noise))

    def normalise(self, z: Tensor) -> Tensor:
        """Raw z to latents: (z - mean) * scaling_factor / std."""
        shift, scale = shift_and_scale(self.config, z)
        return (z - shift) * scale

    def denormalise(self, latents: Tensor) -> Tensor:
        """Latents to raw z, the inverse of `normalise`."""
        shift, scale = shift_and_scale(self.config, latents)
        return latents / scale + shift

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) to pixels (B, 3, H, W), about [-1, 1]."""
        return self.decode_raw(self.denormalise(latents))

    def decode_raw(self, z: Tensor) -> Tensor:
        """Raw z (B, C, h, w) to pixels (B, 3, H, W), about [-1, 1]."""
        return self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z))

    def kl(self, moments: Tensor) -> Tensor:
        """See `kl_divergence`."""
        return kl_divergence(moments)


def shift_and_scale(config: Any, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """What makes latents of raw z: (z - shift) * scale, per channel where they were measured."""
    if config.latents_mean is None or config.latents_std is None:
        return config.shift_factor or 0.0, config.scaling_factor
    # From the configuration, not from buffers: diffusers' state_dict has none of them.
    mean, std = (
        torch.tensor(row, dtype=like.dtype, device=like.device)[:, None, None]
        for row in (config.latents_mean, config.latents_std)
    )
    return mean, config.scaling_factor / std


def clamped(h: Tensor) -> Tensor:
    """What an encoder says (B, 2C, h, w) as moments: float32 up, log-variance in [-30, 20]."""
    h = h.to(torch.promote_types(h.dtype, torch.float32))  # autocast gives bf16: exp() follows
    mean, logvar = h.chunk(2, dim=1)
    return torch.cat([mean, logvar.clamp(-30.0, 20.0)], dim=1)


def kl_divergence(moments: Tensor) -> Tensor:
    """KL divergence of a posterior (B, 2C, h, w) from the standard normal, nats per sample, (B,).

    Source: Kingma & Welling 2014 (arXiv 1312.6114), appendix B.
    """
    mean, logvar = moments.chunk(2, dim=1)
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).flatten(1).sum(dim=1)


def check_pixels(pixels: Tensor, channels: int, factor: int) -> None:
    """Refuses pictures (B, C, H, W) of other channels, or of sides that `factor` does not divide.

    Raises:
        LdmError: with the nearest legal sizes.
    """
    _, found, height, width = pixels.shape
    if found != channels:
        raise LdmError(
            f"pictures have {found} channels, this autoencoder reads {channels}",
            where="vae",
            fix="use an autoencoder of RGB pictures",
            code=ExitCode.CONFIG,
        )
    if height % factor == 0 and width % factor == 0 and height and width:
        return
    below = [side // factor * factor for side in (height, width)]
    above = [-(-max(side, 1) // factor) * factor for side in (height, width)]
    legal = [above] if 0 in below else [below, above]
    raise LdmError(
        f"a picture {height} high and {width} wide cannot be made: this autoencoder works in "
        f"steps of {factor} pixels",
        where="size",
        fix="use height x width " + " or ".join(f"{h}x{w}" for h, w in legal),
    )


class Encoder(nn.Module):
    """Pixels (B, 3, H, W) to 2C channels (B, 2C, h, w)."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownBlock(before, after, config, downsample=level < len(widths) - 1)
            for level, (before, after) in enumerate(
                zip((widths[0], *widths[:-1]), widths, strict=True)
            )
        )
        self.mid_block = MidBlock(widths[-1], config)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def layers(self) -> list[nn.Module]:
        """Everything before `conv_norm_out`, in order."""
        return [self.conv_in, *_layers_of(self.down_blocks), *self.mid_block.layers()]

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 2C, h, w)."""
        for layer in self.layers():
            x = layer(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Decoder(nn.Module):
    """Raw z (B, C, h, w) to pixels (B, 3, H, W)."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], config)
        self.up_blocks = nn.ModuleList(
            UpBlock(before, after, config, upsample=level < len(widths) - 1)
            for level, (before, after) in enumerate(
                zip((widths[0], *widths[:-1]), widths, strict=True)
            )
        )
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def layers(self) -> list[nn.Module]:
        """Everything before `conv_norm_out`, in order."""
        return [self.conv_in, *self.mid_block.layers(), *_layers_of(self.up_blocks)]

    def forward(self, z: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, 3, H, W)."""
        for layer in self.layers():
            z = layer(z)
        return self.conv_out(F.silu(self.conv_norm_out(z)))


class DownBlock(nn.Module):
    """Resnet blocks of one level, then half the size unless it is the coarsest."""

    def __init__(
        self, in_channels: int, out_channels: int, config: AutoencoderConfig, downsample: bool
    ) -> None:
        super().__init__()
        self.resnets = _resnets(in_channels, out_channels, config, config.layers_per_block)
        self.downsamplers = nn.ModuleList(
            [Downsample(out_channels, asymmetric=True)] if downsample else []
        )

    def layers(self) -> list[nn.Module]:
        """In order: (B, in, H, W) -> (B, out, H / 2, W / 2), or H, W at the coarsest level."""
        return [*self.resnets, *self.downsamplers]


class UpBlock(nn.Module):
    """Resnet blocks of one level, then twice the size unless it is the finest."""

    def __init__(
        self, in_channels: int, out_channels: int, config: AutoencoderConfig, upsample: bool
    ) -> None:
        super().__init__()
        self.resnets = _resnets(in_channels, out_channels, config, config.layers_per_block + 1)
        self.upsamplers = nn.ModuleList([Upsample(out_channels)] if upsample else [])

    def layers(self) -> list[nn.Module]:
        """In order: (B, in, H, W) -> (B, out, 2H, 2W), or H, W at the finest level."""
        return [*self.resnets, *self.upsamplers]


class MidBlock(nn.Module):
    """Two resnet blocks at the coarsest level with self-attention between them."""

    def __init__(self, channels: int, config: AutoencoderConfig) -> None:
        super().__init__()
        self.resnets = _resnets(channels, channels, config, 2)
        self.attentions = nn.ModuleList(
            [PixelAttention(channels, config.norm_num_groups)]
            if config.mid_block_add_attention
            else []
        )

    def layers(self) -> list[nn.Module]:
        """In order, each (B, C, h, w) -> (B, C, h, w)."""
        return [self.resnets[0], *self.attentions, self.resnets[1]]


class PixelAttention(nn.Module):
    """Every position looks at every other with one head as wide as the channels."""

    kernel = "auto"  # of `attend`; see `use_attention`

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor, queries: int | None = None) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w), `queries` positions at a time or all at once."""
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, h * w, C)
        k, v = self.to_k(tokens)[:, None], self.to_v(tokens)[:, None]
        parts = tokens.split(queries or tokens.shape[1], dim=1)
        out = [
            self.to_out[0](attend(self.to_q(part)[:, None], k, v, None, self.kernel)[:, 0])
            for part in parts
        ]
        return x + torch.cat(out, dim=1).transpose(1, 2).reshape(x.shape)


def _layers_of(blocks: nn.ModuleList) -> list[nn.Module]:
    return [layer for block in blocks for layer in block.layers()]  # type: ignore[operator]


def _resnets(
    in_channels: int, out_channels: int, config: AutoencoderConfig, count: int
) -> nn.ModuleList:
    return nn.ModuleList(
        ResnetBlock(
            in_channels if i == 0 else out_channels, out_channels, config.norm_num_groups, EPS
        )
        for i in range(count)
    )
