"""The UNet of Stable Diffusion 1, 2 and XL: diffusers' UNet2DConditionModel, name for name.

Source: Rombach et al. 2022 (arXiv 2112.10752), section 3.3; Ho et al. 2020 (arXiv 2006.11239);
Podell et al. 2023 (arXiv 2307.01952).
B batch, C channels, H height, W width of a latent, L text tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any, NamedTuple

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
from ldm.models.prepared import ByClock, all_real, without_padding
from ldm.models.unet_config import UNetConfig
from ldm.types import TextEmbedding

__all__ = ["UNet", "UNetConfig"]


HELD = 64
"""Clocks whose shifts are held at a time: of SDXL and 32 rows, 110 MB in float32."""
KeysValues = tuple[Tensor, Tensor]
"""Of one attention to the text, each (B, heads, L, C / heads)."""


class Signal(NamedTuple):
    """All that the layers are told besides the latent; depends on time and text only.

    Args:
        shifts: what each resnet block adds to its channels, (B or 1, C), in the order of calls.
        texts: of each transformer in the order of calls, the keys and values of its blocks.
        mask: True where a token is real, (B, L) bool; None when all are.
    """

    shifts: tuple[Tensor, ...]
    texts: tuple[tuple[KeysValues, ...], ...]
    mask: Tensor | None


class Calls(NamedTuple):
    """The signal as the layers take it, one after the other, and how they are called.

    Args:
        shifts, texts, mask: see `Signal`; each layer takes the next.
        run: calls a layer directly, or so that backward recomputes its activations.
    """

    shifts: Iterator[Tensor]
    texts: Iterator[tuple[KeysValues, ...]]
    mask: Tensor | None
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
        self.add_embedding = None
        if config.addition_embed_type is not None:
            added = config.projection_class_embeddings_input_dim
            assert added is not None, "checked by the configuration"
            self.add_embedding = TimestepEmbedding(added, 4 * widths[0])

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
            text: tokens (B, L, cross_attention_dim) and their mask; for SDXL also the pooled
                vector and the sizes.

        Returns:
            (B, out_channels, H, W).

        Raises:
            LdmError: the text encoder has another width than `cross_attention_dim`, or gives less
                than this UNet reads.
        """
        known = text.kept if isinstance(text.kept, Signal) else self._signal(t, text, x.dtype)
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        run = _recomputed if recompute else _direct
        calls = Calls(iter(known.shifts), iter(known.texts), known.mask, run)

        x = self.conv_in(x)
        skips = [x]
        for down in self.down_blocks:
            skips += down(skips[-1], calls)
        x = self.mid_block(skips[-1], calls)
        for up in self.up_blocks:
            x = up(x, skips, calls)
        return self.conv_out(F.silu(self.conv_norm_out(x)))

    def prepare(
        self, text: TextEmbedding, clocks: Sequence[float] = ()
    ) -> Callable[[float], TextEmbedding]:
        """See `ldm.types.Prepares`; true while the weights stay what they are."""
        text, dtype = without_padding(text), self.conv_in.weight.dtype
        texts, added = self._texts(text, dtype), self._added(text, dtype)

        def shifts(t: Tensor) -> list[Tensor]:
            time = self._time(t, dtype)[:, None]  # (n, 1, E), with `added` (n, B, E)
            return self._shifts(time if added is None else time + added)

        by_clock = ByClock(shifts, clocks, text.tokens.device, at_once=HELD)
        mask = None if bool(text.mask.all()) else text.mask  # one look at the device in a run
        return lambda clock: replace(text, kept=Signal(by_clock(clock), texts, mask))

    def _signal(self, t: Tensor, text: TextEmbedding, dtype: torch.dtype) -> Signal:
        time, added = self._time(t, dtype), self._added(text, dtype)
        shifts = self._shifts(time if added is None else time + added)
        mask = None if all_real(text.mask) else text.mask
        return Signal(tuple(shifts), self._texts(text, dtype), mask)

    def _time(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """The time signal (B, E) of clocks (B,)."""
        features = timestep_embedding(t, self.config.block_out_channels[0])
        return self.time_embedding(features.to(dtype))

    def _added(self, text: TextEmbedding, dtype: torch.dtype) -> Tensor | None:
        """What SDXL adds to the time signal, (B, E): of the pooled vector and of the sizes."""
        if self.add_embedding is None:
            return None
        width = self.config.addition_time_embed_dim
        total = self.config.projection_class_embeddings_input_dim
        assert width is not None, "checked by the configuration"
        if text.pooled is None or text.sizes is None:
            missing = "a pooled vector" if text.pooled is None else "sizes"
            raise _misfit(
                f"this UNet reads {missing} with each text, and none came with it",
                "give TextEmbedding(tokens, mask, pooled=(B, P), sizes=(B, 6))",
            )
        sizes = timestep_embedding(text.sizes.flatten(), width).unflatten(0, text.sizes.shape)
        given = torch.cat([text.pooled.to(dtype), sizes.flatten(1).to(dtype)], dim=1)
        if given.shape[1] != total:
            raise _misfit(
                f"a pooled vector of width {text.pooled.shape[1]} and {text.sizes.shape[1]} sizes "
                f"make {given.shape[1]} features, this UNet reads {total}",
                "use the text encoders this UNet was trained with",
            )
        return self.add_embedding(given)

    def _shifts(self, time: Tensor) -> list[Tensor]:
        """What each resnet block makes of the time signal (..., E)."""
        active = F.silu(time)  # the same in every block: once is enough
        return [resnet.time_emb_proj(active) for block in self._blocks for resnet in block.resnets]

    def _texts(self, text: TextEmbedding, dtype: torch.dtype) -> tuple[tuple[KeysValues, ...], ...]:
        if text.tokens.shape[-1] != self.config.cross_attention_dim:
            raise _misfit(
                f"the text encoder gives tokens of width {text.tokens.shape[-1]}, this UNet reads "
                f"width {self.config.cross_attention_dim}",
                "use the text encoder this UNet was trained with, or set cross_attention_dim",
            )
        tokens = text.tokens.to(dtype)
        return tuple(
            tuple(block.attn2.keys_values(tokens) for block in transformer.transformer_blocks)
            for level in self._blocks
            for transformer in level.attentions
        )

    @property
    def _blocks(self) -> tuple[Any, ...]:
        return (*self.down_blocks, self.mid_block, *self.up_blocks)


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

    def forward(self, x: Tensor, calls: Calls) -> list[Tensor]:
        """(B, in, H, W) -> the states for the way up, the last (B, out, H / 2, W / 2) goes on."""
        states = []
        for resnet, transformer in zip_longest(self.resnets, self.attentions):
            x = _layer(x, resnet, transformer, calls)
            states.append(x)
        return states + [downsample(x) for downsample in self.downsamplers]


class MidBlock(nn.Module):
    """Two resnet blocks at the coarsest level with a transformer between them."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        level = len(config.block_out_channels) - 1
        self.resnets = _resnets(config, level, [config.block_out_channels[level]] * 2)
        self.attentions = _transformers(config, level, 1)

    def forward(self, x: Tensor, calls: Calls) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        x = _layer(x, self.resnets[0], self.attentions[0], calls)
        return _layer(x, self.resnets[1], None, calls)


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

    def forward(self, x: Tensor, skips: list[Tensor], calls: Calls) -> Tensor:
        """(B, in, H, W) -> (B, out, 2H, 2W); takes its states off the end of `skips`."""
        for resnet, transformer in zip_longest(self.resnets, self.attentions):
            x = _layer(torch.cat([x, skips.pop()], dim=1), resnet, transformer, calls)
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

    def forward(self, x: Tensor, texts: tuple[KeysValues, ...], mask: Tensor | None) -> Tensor:
        """(B, C, H, W), keys and values for each block, mask (B, L) -> (B, C, H, W)."""
        h = self.norm(x)
        h = self.proj_in(_to_tokens(h)) if self.is_linear else _to_tokens(self.proj_in(h))
        for block, keys_values in zip(self.transformer_blocks, texts, strict=True):
            h = block(h, keys_values, mask)
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

    def forward(self, x: Tensor, keys_values: KeysValues, mask: Tensor | None) -> Tensor:
        """(B, N, C), keys and values of the text, mask (B, L) -> (B, N, C)."""
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), keys_values, mask)
        return x + self.ff(self.norm3(x))


def _misfit(what: str, fix: str) -> LdmError:
    return LdmError(what, where="text encoder", fix=fix, code=ExitCode.CONFIG)


def _layer(x: Tensor, resnet: nn.Module, transformer: nn.Module | None, calls: Calls) -> Tensor:
    x = calls.run(resnet, x, next(calls.shifts))
    return x if transformer is None else calls.run(transformer, x, next(calls.texts), calls.mask)


def _direct(layer: nn.Module, *inputs: Any) -> Tensor:
    return layer(*inputs)


def _recomputed(layer: nn.Module, *inputs: Any) -> Tensor:
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
