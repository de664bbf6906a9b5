"""The UNet of Stable Diffusion 1 and 2, with diffusers' UNet2DConditionModel names and numbers.

Source: Rombach et al. 2022 (arXiv 2112.10752), section 3.3; Ho et al. 2020 (arXiv 2006.11239).
B batch, C channels, H height, W width of a latent, L text tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import zip_longest
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.errors import ExitCode, LdmError
from ldm.models.layers import (
    Attention,
    Downsample,
    FeedForward,
    ResnetBlock,
    TimestepEmbedding,
    Upsample,
    timestep_embedding,
)
from ldm.models.unet_config import UNetConfig
from ldm.types import TextEmbedding

__all__ = ["UNet", "UNetConfig"]


class Signal(NamedTuple):
    """What every layer is told besides the latent, and how it is called.

    Args:
        time: embedded time after its SiLU, (B, E).
        tokens: text tokens, (B, L, D).
        mask: True where a token is real, (B, L) bool.
        run: calls a layer directly, or so that backward recomputes its activations.
    """

    time: Tensor
    tokens: Tensor
    mask: Tensor
    run: Callable[..., Tensor]


class UNet(nn.Module):
    """The denoiser: noisy latent, the network's clock and the text in, prediction out.

    `state_dict` keys and shapes are those of diffusers.UNet2DConditionModel with
    `config.to_diffusers()`. Set `gradient_checkpointing` to keep only the inputs of layers during
    training and compute the rest again in backward: less memory, about a third more time.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        widths = config.block_out_channels
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(widths[0], 4 * widths[0])

        skips, self.down_blocks = [widths[0]], nn.ModuleList()
        for level, width in enumerate(widths):
            self.down_blocks.append(DownBlock(config, level, skips[-1]))
            is_last = level == len(widths) - 1
            skips += [width] * (config.layers_per_block + (0 if is_last else 1))

        self.mid_block = MidBlock(config)

        before, self.up_blocks = widths[-1], nn.ModuleList()
        for level in reversed(range(len(widths))):
            taken = [skips.pop() for _ in range(config.layers_per_block + 1)]
            self.up_blocks.append(UpBlock(config, level, before, taken))
            before = widths[level]
        assert not skips, "every skip connection is used once"

        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], config.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)
        # Training starts from the prediction 0, whose error is the variance of the target, and
        # not from random noise that has to be unlearned first (Ho et al. 2020, released code).
        for parameter in self.conv_out.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, t: Tensor, text: TextEmbedding) -> Tensor:
        """Predicts from a noisy latent.

        Args:
            x: noisy latent, (B, in_channels, H, W); any H and W.
            t: the network's clock, (B,), 0..999 in Stable Diffusion.
            text: tokens (B, L, cross_attention_dim) and their mask.

        Returns:
            (B, out_channels, H, W).

        Raises:
            LdmError: the text encoder has another width than `cross_attention_dim`.
        """
        if text.tokens.shape[-1] != self.config.cross_attention_dim:
            raise LdmError(
                f"the text encoder gives tokens of width {text.tokens.shape[-1]}, this UNet reads "
                f"width {self.config.cross_attention_dim}",
                where="text encoder",
                fix="use the text encoder this UNet was trained with, or set cross_attention_dim",
                code=ExitCode.CONFIG,
            )
        features = timestep_embedding(t, self.config.block_out_channels[0]).to(x.dtype)
        # every resnet block begins with the same SiLU of the time signal: once is enough
        time = F.silu(self.time_embedding(features))
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        signal = Signal(time, text.tokens, text.mask, _recomputed if recompute else _direct)

        x = self.conv_in(x)
        skips = [x]
        for down in self.down_blocks:
            skips += down(skips[-1], signal)
        x = self.mid_block(skips[-1], signal)
        for up in self.up_blocks:
            x = up(x, skips, signal)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class DownBlock(nn.Module):
    """Resnet and transformer blocks of one level, then half the size unless it is the coarsest."""

    def __init__(self, config: UNetConfig, level: int, in_channels: int) -> None:
        super().__init__()
        width, is_last = config.block_out_channels[level], level == len(config.heads) - 1
        inputs = [in_channels] + [width] * (config.layers_per_block - 1)
        self.resnets = _resnets(config, level, inputs)
        attends = config.down_block_types[level].startswith("CrossAttn")
        self.attentions = _transformers(config, level, len(inputs) if attends else 0)
        self.downsamplers = nn.ModuleList([] if is_last else [Downsample(width, asymmetric=False)])

    def forward(self, x: Tensor, signal: Signal) -> list[Tensor]:
        """(B, in, H, W) -> the states for the way up, the last (B, out, H / 2, W / 2) goes on."""
        states = []
        for resnet, transformer in zip_longest(self.resnets, self.attentions):
            x = _layer(x, resnet, transformer, signal)
            states.append(x)
        return states + [downsample(x) for downsample in self.downsamplers]


class MidBlock(nn.Module):
    """Two resnet blocks at the coarsest level with a transformer between them."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        level = len(config.block_out_channels) - 1
        self.resnets = _resnets(config, level, [config.block_out_channels[level]] * 2)
        self.attentions = _transformers(config, level, 1)

    def forward(self, x: Tensor, signal: Signal) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        x = _layer(x, self.resnets[0], self.attentions[0], signal)
        return _layer(x, self.resnets[1], None, signal)


class UpBlock(nn.Module):
    """Resnet blocks that also read the way down, transformers, then twice the size.

    Args:
        config: of the UNet.
        level: resolution level, 0 is the finest.
        in_channels: channels that come from below.
        skips: channels of the states taken from the way down, in the order they are taken.
    """

    def __init__(self, config: UNetConfig, level: int, in_channels: int, skips: list[int]) -> None:
        super().__init__()
        width = config.block_out_channels[level]
        inputs = [in_channels] + [width] * (len(skips) - 1)
        self.resnets = _resnets(config, level, [a + b for a, b in zip(inputs, skips, strict=True)])
        attends = config.up_block_types[-1 - level].startswith("CrossAttn")
        self.attentions = _transformers(config, level, len(inputs) if attends else 0)
        self.upsamplers = nn.ModuleList([Upsample(width)] if level else [])

    def forward(self, x: Tensor, skips: list[Tensor], signal: Signal) -> Tensor:
        """(B, in, H, W) -> (B, out, 2H, 2W); takes its states off the end of `skips`."""
        for resnet, transformer in zip_longest(self.resnets, self.attentions):
            x = _layer(torch.cat([x, skips.pop()], dim=1), resnet, transformer, signal)
        for upsample in self.upsamplers:
            # the size of the next state: an odd size was rounded up on the way down
            x = upsample(x, skips[-1].shape[2:])
        return x


class SpatialTransformer(nn.Module):
    """Transformer blocks over the positions of a feature map, added to it."""

    def __init__(self, config: UNetConfig, level: int) -> None:
        super().__init__()
        width = config.block_out_channels[level]
        self.is_linear = config.use_linear_projection
        self.norm = nn.GroupNorm(config.norm_num_groups, width, 1e-6)
        self.proj_in = nn.Linear(width, width) if self.is_linear else nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(width, config.heads[level], config.cross_attention_dim)
            for _ in range(config.depths[level])
        )
        self.proj_out = nn.Linear(width, width) if self.is_linear else nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """(B, C, H, W), text (B, L, D), mask (B, L) -> (B, C, H, W)."""
        h = self.norm(x)
        h = self.proj_in(_to_tokens(h)) if self.is_linear else _to_tokens(self.proj_in(h))
        for block in self.transformer_blocks:
            h = block(h, tokens, mask)
        if self.is_linear:
            return x + _to_map(self.proj_out(h), x.shape)
        return x + self.proj_out(_to_map(h, x.shape))


class TransformerBlock(nn.Module):
    """Self-attention, attention to the text, feed-forward, each normalised first and added."""

    def __init__(self, width: int, heads: int, text_width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = Attention(width, heads, context_width=text_width)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(self, x: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """(B, N, C), text (B, L, D), mask (B, L) -> (B, N, C)."""
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), tokens, mask)
        return x + self.ff(self.norm3(x))


def _layer(x: Tensor, resnet: nn.Module, transformer: nn.Module | None, signal: Signal) -> Tensor:
    x = signal.run(resnet, x, signal.time)
    return x if transformer is None else signal.run(transformer, x, signal.tokens, signal.mask)


def _direct(layer: nn.Module, *inputs: Tensor) -> Tensor:
    return layer(*inputs)


def _recomputed(layer: nn.Module, *inputs: Tensor) -> Tensor:
    return checkpoint(layer, *inputs, use_reentrant=False)


def _resnets(config: UNetConfig, level: int, inputs: list[int]) -> nn.ModuleList:
    widths = config.block_out_channels
    return nn.ModuleList(
        ResnetBlock(channels, widths[level], config.norm_num_groups, config.norm_eps, 4 * widths[0])
        for channels in inputs
    )


def _transformers(config: UNetConfig, level: int, count: int) -> nn.ModuleList:
    return nn.ModuleList(SpatialTransformer(config, level) for _ in range(count))


def _to_tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)  # (B, C, H, W) -> (B, H * W, C)


def _to_map(tokens: Tensor, shape: torch.Size) -> Tensor:
    return tokens.transpose(1, 2).reshape(shape)  # (B, H * W, C) -> (B, C, H, W)
