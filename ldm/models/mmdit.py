"""MM-DiT of Stable Diffusion 3, with diffusers' SD3Transformer2DModel names and numbers.

Picture and text tokens have weights of their own and meet in one attention.
Source: Esser et al. 2024 (arXiv 2403.03206), section 4; QK-norm and the second attention as in the
released Stable Diffusion 3.5.
B batch, C channels, H x W latent size, N = H * W / patch**2 picture tokens, L text tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.errors import ExitCode, LdmError
from ldm.models.layers import TimestepEmbedding, timestep_embedding
from ldm.models.mmdit_block import JointBlock, Modulation, normalised
from ldm.models.mmdit_config import MMDiTConfig
from ldm.models.prepared import ByClock, all_real, without_padding
from ldm.types import TextEmbedding

__all__ = ["MMDiT", "MMDiTConfig"]

TIME_FEATURES = 256
"""Sinusoids that the time embedding begins with."""
KEPT_BYTES = 256 * 2**20
"""Most memory for the modulations that `prepare` computes ahead: 20 steps of two prompts take
71 MB in SD 3 medium, fp32. More steps or prompts are computed in groups of this size."""


@dataclass(frozen=True)
class Kept:
    """What does not change within a call of the network.

    Args:
        context: embedded text, (B, L, D).
        modulations: what every `Modulation` says of this clock and these prompts, one after the
            other, (B, 1, D) each.
        mask: True where a text token is real, (B, L); None where all are.
    """

    context: Tensor
    modulations: tuple[Tensor, ...]
    mask: Tensor | None


class MMDiT(nn.Module):
    """The denoiser: noisy latent, the network's clock and the text in, prediction out.

    `state_dict` keys and shapes are those of diffusers.SD3Transformer2DModel with
    `config.to_diffusers()`. Set `gradient_checkpointing` to keep only the inputs of blocks during
    training and compute the rest again in backward.
    """

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        width, layers = config.width, config.num_layers
        self.pos_embed = PatchEmbedding(config)
        self.time_text_embed = TimeTextEmbedding(config)
        self.context_embedder = nn.Linear(config.joint_attention_dim, width)
        self.transformer_blocks = nn.ModuleList(
            JointBlock(config, dual=i in config.dual_attention_layers, last=i == layers - 1)
            for i in range(layers)
        )
        self.norm_out = Modulation(width, ("scale", "shift"))
        self.proj_out = nn.Linear(width, config.patch_size**2 * config.out_channels)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Every block begins as the identity and the first prediction is 0 (adaLN-zero).

        Source: Peebles & Xie 2023 (arXiv 2212.09748), section 3.2 and released code.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.time_text_embed.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        for layer in (*(modulation.linear for modulation in self._layers), self.proj_out):
            nn.init.zeros_(layer.weight)

    def forward(self, x: Tensor, t: Tensor, text: TextEmbedding) -> Tensor:
        """Predicts from a noisy latent.

        Args:
            x: noisy latent, (B, in_channels, H, W); H and W multiples of the patch size.
            t: the network's clock, (B,), 0 (data) to 1000 (noise).
            text: tokens (B, L, joint_attention_dim), their mask, and pooled text where the
                configuration has one. A text token that is not real is seen by no other token.

        Returns:
            (B, out_channels, H, W).

        Raises:
            LdmError: a size that cannot be cut into patches or exceeds the position table, or
                text of another width.
        """
        kept = text.kept if isinstance(text.kept, Kept) else self._kept(t, text)
        rows, columns = self.pos_embed.grid(x)
        tokens, context, visible = self.pos_embed(x), kept.context, None
        if kept.mask is not None:
            real = kept.mask.new_ones(len(kept.mask), rows * columns)
            visible = torch.cat([real, kept.mask], dim=1)  # (B, N + L)
        vectors = iter(kept.modulations)
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        for block in self._blocks:
            picture = list(islice(vectors, len(block.norm1.parts)))
            words = list(islice(vectors, len(block.norm1_context.parts)))
            inputs = (tokens, context, picture, words, visible)
            if recompute:
                tokens, context = checkpoint(block, *inputs, use_reentrant=False)
            else:
                tokens, context = block(*inputs)
        scale, shift = vectors
        out = self.proj_out(torch.addcmul(shift, normalised(tokens), scale))
        patch = self.config.patch_size
        out = out.unflatten(1, (rows, columns)).unflatten(-1, (patch, patch, -1))
        return out.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)  # (B, C, H, W)

    def prepare(
        self, text: TextEmbedding, clocks: Sequence[float] = ()
    ) -> Callable[[float], TextEmbedding]:
        """See `ldm.types.Prepares`; true while the weights stay what they are.

        Modulations hold a third of the weights of a published model, which a small batch otherwise
        reads from memory at every step.
        """
        text = without_padding(text)
        context, pooled = self._embed(text)
        kept = Kept(context, (), None if bool(text.mask.all()) else text.mask)

        def modulations(t: Tensor) -> list[Tensor]:
            return self._modulations(self._time(t)[:, None].expand(-1, len(text), -1), pooled)

        size = sum(layer.linear.out_features for layer in self._layers)
        at_once = max(1, KEPT_BYTES // (len(text) * size * context.element_size()))
        known = ByClock(modulations, clocks, context.device, at_once)
        return lambda clock: replace(text, kept=replace(kept, modulations=known(clock)))

    def _kept(self, t: Tensor, text: TextEmbedding) -> Kept:
        context, pooled = self._embed(text)
        modulations = tuple(self._modulations(self._time(t), pooled))
        return Kept(context, modulations, None if all_real(text.mask) else text.mask)

    def _embed(self, text: TextEmbedding) -> tuple[Tensor, Tensor | None]:
        """Embedded tokens (B, L, D), and pooled text (B, D) where the configuration has one."""
        config, dtype = self.config, self.proj_out.weight.dtype
        given = (text.tokens.shape[-1], None if text.pooled is None else text.pooled.shape[-1])
        reads = (config.joint_attention_dim, config.pooled_projection_dim)
        if given[0] != reads[0] or (reads[1] is not None and given[1] != reads[1]):
            raise LdmError(
                f"the text encoder gives tokens of width {given[0]} and pooled text of width "
                f"{given[1]}, this MM-DiT reads {reads[0]} and {reads[1]}",
                where="text encoder",
                fix="use the text encoders that this MM-DiT was trained with",
                code=ExitCode.CONFIG,
            )
        context = self.context_embedder(text.tokens.to(dtype))
        embedder = self.time_text_embed.text_embedder
        if embedder is None or text.pooled is None:
            return context, None
        return context, embedder(text.pooled.to(dtype))

    def _time(self, t: Tensor) -> Tensor:
        """Embedded clocks, (B, D)."""
        features = timestep_embedding(t, TIME_FEATURES).to(self.proj_out.weight.dtype)
        return self.time_text_embed.timestep_embedder(features)

    def _modulations(self, time: Tensor, pooled: Tensor | None) -> list[Tensor]:
        """All that embedded time (..., B, D) and pooled text (B, D) modulate."""
        condition = F.silu(time if pooled is None else time + pooled)  # the same for every layer
        return [vector for layer in self._layers for vector in layer(condition)]

    @property
    def _blocks(self) -> list[Any]:  # of JointBlock, which a ModuleList forgets
        return list(self.transformer_blocks)

    @property
    def _layers(self) -> list[Modulation]:
        """In the order of `Kept.modulations`."""
        pairs = [layer for block in self._blocks for layer in (block.norm1, block.norm1_context)]
        return [*pairs, self.norm_out]


class TimeTextEmbedding(nn.Module):
    """Sinusoids of time, and the pooled text, each to the width; they are added."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        pooled = config.pooled_projection_dim
        self.timestep_embedder = TimestepEmbedding(TIME_FEATURES, config.width)
        self.text_embedder = None if pooled is None else TimestepEmbedding(pooled, config.width)


class PatchEmbedding(nn.Module):
    """Patches to tokens, plus a window of a fixed table of positions."""

    pos_embed: Tensor

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        patch = config.patch_size
        self.patch, self.side = patch, config.pos_embed_max_size
        self.proj = nn.Conv2d(config.in_channels, config.width, patch, stride=patch)
        spacing = config.sample_size // patch / self.side
        table = position_table(self.side, config.width, spacing)
        self.register_buffer(
            "pos_embed", table[None]
        )  # (1, side * side, D), saved with the weights

    def grid(self, x: Tensor) -> tuple[int, int]:
        """Rows and columns of tokens.

        Raises:
            LdmError: a size that is not whole patches, or larger than the table.
        """
        height, width = x.shape[-2:]
        most = self.side * self.patch
        if height % self.patch or width % self.patch or max(height, width) > most:
            raise LdmError(
                f"a latent of {height}x{width} cannot be cut into patches of {self.patch} that the "
                f"position table of {self.side}x{self.side} holds",
                where="size",
                fix=f"use latent sides that are multiples of {self.patch}, at most {most}",
            )
        return height // self.patch, width // self.patch

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N, D)."""
        rows, columns = self.grid(x)
        top, left = (self.side - rows) // 2, (self.side - columns) // 2
        table = self.pos_embed.unflatten(1, (self.side, self.side))
        window = table[:, top : top + rows, left : left + columns].flatten(1, 2)
        tokens = self.proj(x).flatten(2).transpose(1, 2)
        return (tokens + window).to(tokens.dtype)  # contiguous, unlike the transposed view


def position_table(side: int, width: int, spacing: float) -> Tensor:
    """Sines and cosines of the column, then of the row, (side * side, width) float32.

    Source: He et al. 2022 (arXiv 2111.06377) in the form of the released Stable Diffusion 3.

    Args:
        side: tokens along each side.
        width: a multiple of 4.
        spacing: distance of neighbours.
    """
    rates = 10_000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    # rounded to float32 where the released code does, so that the table is the same
    places = torch.arange(side, dtype=torch.float32) / (1 / spacing)
    angles = places.double()[:, None] * rates
    axis = torch.cat([angles.sin(), angles.cos()], dim=1).float()  # (side, width / 2)
    columns, rows = axis[None].expand(side, -1, -1), axis[:, None].expand(-1, side, -1)
    return torch.cat([columns, rows], dim=-1).flatten(0, 1)
