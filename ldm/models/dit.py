"""Diffusion transformer: patches as tokens, told of time, labels and text in several ways.

Peebles & Xie 2023 (arXiv 2212.09748); adaLN-single of Chen et al. 2023 (arXiv 2310.00426). Knows
nothing of noise processes or sampling: it maps (latents, clock, text) to a prediction.
Shapes: B batch, C latent channels, H x W latent size, N = H*W / patch**2 tokens, D width,
L text tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.errors import ExitCode, LdmError
from ldm.models.attention import RealKeys, real_keys
from ldm.models.dit_blocks import (
    NOTHING_KEPT,
    Block,
    Kept,
    KeptBlock,
    KeysValues,
    Place,
    Signal,
    text_layers,
    two_layers,
)
from ldm.models.dit_config import DiTConfig
from ldm.models.layers import timestep_embedding
from ldm.models.positions import resized_positions, rotary_positions, sincos_positions
from ldm.models.prepared import ByClock
from ldm.models.routing import Routing, put_back, taken
from ldm.types import TextEmbedding

__all__ = ["DiT", "DiTConfig"]

TIME_FEATURES = 256
"""Sinusoids that the time embedding begins with."""
KEPT_BYTES = 2**28
"""Modulations of announced clocks that would take more than this are computed as clocks come."""


class DiT(nn.Module):
    """The denoiser. Called as `Denoiser`: x (B, C, H, W), t (B,) in clock units 0..1000, text."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        width, patch = config.hidden_size, config.patch_size
        self.proj_in = nn.Conv2d(config.in_channels, width, patch, stride=patch)
        self.time = two_layers(TIME_FEATURES, width)
        self.text_norm, self.text_proj = text_layers(config)
        self.pooled_proj = nn.Linear(config.pooled_dim, width) if config.pooled_dim else None
        self.transformer_blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm_out = nn.LayerNorm(width, eps=1e-6, elementwise_affine=not config.is_modulated)
        single = config.conditioning == "adaln_single"
        plain = not config.is_modulated
        self.modulation_out = None if plain or single else nn.Linear(width, 2 * width)
        out_channels = config.out_channels or config.in_channels
        self.proj_out = nn.Linear(width, patch * patch * out_channels)
        self.modulation = nn.Linear(width, 6 * width) if single else None
        self.scale_shift_table = nn.Parameter(torch.zeros(2, width)) if single else None
        sized = config.size_conditions
        self.resolution = two_layers(TIME_FEATURES, width // 3) if sized else None
        self.aspect = two_layers(TIME_FEATURES, width // 3) if sized else None
        classes = config.num_classes
        self.labels = None if classes is None else nn.Embedding(classes + 1, width)
        self.position_table = None
        if config.positions == "learned":
            assert config.base_size is not None
            self.position_table = nn.Parameter(
                torch.zeros(config.base_size, config.base_size, width)
            )
        self.gradient_checkpointing = False
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Xavier for products, zeros wherever a residual branch or the output must start at 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.proj_in.weight.flatten(1))
        nn.init.zeros_(self.proj_in.bias)  # type: ignore[arg-type]
        for block in self.modules():
            if not isinstance(block, Block):
                continue
            if block.modulation is not None:
                nn.init.zeros_(block.modulation.weight)  # gates 0: the block is the identity
            if block.attn2 is not None:
                nn.init.zeros_(block.attn2.to_out.weight)
            if block.local is not None:
                nn.init.zeros_(block.local.weight)
                nn.init.zeros_(block.local.bias)  # type: ignore[arg-type]
        for layer in (self.modulation, self.modulation_out, self.proj_out):
            if layer is not None:
                nn.init.zeros_(layer.weight)  # the first prediction is 0, not noise
        for table in (None if self.labels is None else self.labels.weight, self.position_table):
            if table is not None:
                nn.init.normal_(table, std=0.02)

    def forward(
        self, x: Tensor, t: Tensor, text: TextEmbedding, routing: Routing | None = None
    ) -> Tensor:
        """Predicts in whatever parameterisation it was trained for.

        Args:
            x: noisy latents, (B, C, H, W); H and W multiples of the patch size.
            t: the network's clock, (B,), about 0 (data) to 1000 (noise).
            text: token states (B, L, text_dim) with their mask, and the pooled vector or one-hot
                label (B, P) that the configuration asks for.
            routing: in training, which tokens go through which blocks; None sends all through all.

        Returns:
            (B, out_channels or C, H, W).

        Raises:
            LdmError: a size that cannot be cut into patches, or text of another encoder.
        """
        if routing is not None and self.config.local_conv:
            raise LdmError(
                "local_conv needs the whole grid of tokens, and some are left out",
                where="routing",
                fix="train this DiT without masking",
            )
        rows, columns = self._grid(x)
        tokens = self.proj_in(x).flatten(2).transpose(1, 2)  # (B, N, D)
        tokens = self._with_positions(tokens, rows, columns)
        kept = text.kept if isinstance(text.kept, Kept) else self._told(t, text, x.dtype)
        place = self._place(rows, columns, kept.signal, x.device)
        if place.before:
            assert kept.signal.context is not None
            tokens = torch.cat([kept.signal.context.to(tokens.dtype), tokens], dim=1)
        tokens = self._through_blocks(tokens, kept, place, routing)[:, place.before :]
        out = self._projected(tokens, kept)  # (B, N or K, patch * patch * out_channels)
        if routing is not None and routing.last is None:
            nothing = out.new_zeros(len(out), rows * columns, out.shape[-1])
            out = put_back(out, routing.kept, nothing)
        patch = self.config.patch_size
        out = out.unflatten(1, (rows, columns)).unflatten(-1, (-1, patch, patch))
        return out.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)  # (B, C, H, W)

    def prepare(
        self, text: TextEmbedding, clocks: Sequence[float] = ()
    ) -> Callable[[float], TextEmbedding]:
        """See `ldm.types.Prepares`; true while the weights stay what they are.

        Text is projected to the keys and values of all blocks once. Time, and what labels or
        pooled text add to it, goes through each block's modulation in one product for all clocks.
        """
        if self.config.is_modulated:
            known = self._prepared_modulations(text, clocks)
        else:
            known = self._prepared_tokens(text, clocks)
        return lambda clock: replace(text, kept=known(clock))

    def published_parameters(self) -> int:
        """Parameters as papers count them: with the fixed table of positions of `base_size`."""
        side = self.config.base_size if self.config.positions == "sincos" else None
        table = 0 if side is None else side * side * self.config.hidden_size
        return sum(parameter.numel() for parameter in self.parameters()) + table

    def _prepared_modulations(
        self, text: TextEmbedding, clocks: Sequence[float]
    ) -> Callable[[float], Kept]:
        dtype, extra = self.proj_in.weight.dtype, self._extra(text, self.proj_in.weight.dtype)
        rows, layers = 1 if extra is None else len(extra), self.config.num_layers
        # looked at once per run: a GPU's fastest kernels take no mask
        signal = Signal(None, None, None if bool(text.mask.all()) else real_keys(text.mask))
        fixed = self._keys_values(self._words(text, dtype))

        def modulations(t: Tensor) -> list[Tensor]:
            time = self.time(self._time_features(t, dtype))[:, None]  # (n, 1, D)
            summed = (time if extra is None else time + extra).flatten(0, 1)
            condition = F.silu(summed)
            parts = (*self._modulations(condition), self._last(condition, summed))
            return [part.unflatten(0, (len(t), rows)) for part in parts]

        size = len(clocks) * rows * 6 * layers * self.config.hidden_size * dtype.itemsize
        known = ByClock(modulations, clocks if size <= KEPT_BYTES else (), text.tokens.device)

        def at(clock: float) -> Kept:
            *of_blocks, last = known(clock)
            return Kept(signal, tuple(map(KeptBlock, of_blocks, fixed)), last=last)

        return at

    def _prepared_tokens(
        self, text: TextEmbedding, clocks: Sequence[float]
    ) -> Callable[[float], Kept]:
        dtype, rows = self.proj_in.weight.dtype, len(text)
        rest, mask = self._tokens_but_time(text, dtype), self._token_mask(text)
        looks = self.config.looks_at_context
        fixed = self._keys_values(rest) if looks else ()

        def times(t: Tensor) -> list[Tensor]:
            time = self.time(self._time_features(t, dtype))[:, None]  # (n, 1, D)
            if not looks:
                return [time]
            return [part for pair in self._keys_values(time) if pair for part in pair]

        known = ByClock(times, clocks, text.tokens.device)

        def at(clock: float) -> Kept:
            parts = [part.expand(rows, *part.shape) for part in known(clock)]
            if not looks:
                tokens = parts[0] if rest is None else torch.cat([parts[0], rest], dim=1)
                return Kept(Signal(None, tokens, mask))
            keys, values = parts[::2], parts[1::2]
            blocks = tuple(
                KeptBlock(None, (k, v) if pair is None else _joined((k, v), pair))
                for k, v, pair in zip(keys, values, fixed, strict=True)
            )
            return Kept(Signal(None, None, mask), blocks)

        return at

    def _told(self, t: Tensor, text: TextEmbedding, dtype: torch.dtype) -> Kept:
        """What the plain call tells the blocks: the formulas of `prepare`, one clock per row."""
        time = self.time(self._time_features(t, dtype))  # (B, D)
        if self.config.is_modulated:
            extra = self._extra(text, dtype)
            summed = time if extra is None else time + extra
            condition = F.silu(summed)
            blocks: tuple[KeptBlock, ...] = ()
            if self.modulation is not None:
                blocks = tuple(KeptBlock(part, None) for part in self._modulations(condition))
            signal = Signal(condition, self._words(text, dtype), real_keys(text.mask))
            return Kept(signal, blocks, conditions=(condition, summed))
        rest = self._tokens_but_time(text, dtype)
        tokens = time[:, None] if rest is None else torch.cat([time[:, None], rest], dim=1)
        return Kept(Signal(None, tokens, self._token_mask(text)))

    def _time_features(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        shift = self.config.time_frequency_shift
        return timestep_embedding(t, TIME_FEATURES, shift).to(dtype)

    def _modulations(self, condition: Tensor) -> Sequence[Tensor]:
        """Of every block, (B, 4 or 6, 1, D), from what it makes them of, (B, D)."""
        if self.modulation is None:
            return [block.modulations(condition) for block in self._blocks]
        shared = self.modulation(condition).view(len(condition), 6, 1, -1)
        tables = torch.stack([block.scale_shift_table for block in self._blocks])
        return (tables[:, None, :, None] + shared).unbind(0)

    def _last(self, condition: Tensor, summed: Tensor) -> Tensor:
        """Shift and scale of the last norm, (B, 2, 1, D)."""
        if self.modulation_out is not None:
            return self.modulation_out(condition).view(len(condition), 2, 1, -1)
        assert self.scale_shift_table is not None
        return summed[:, None, None] + self.scale_shift_table[:, None]

    def _extra(self, text: TextEmbedding, dtype: torch.dtype) -> Tensor | None:
        """What labels, pooled text and sizes add to the time embedding, (B, D), or None."""
        config, width = self.config, self.config.pooled_dim
        if config.num_classes is not None:
            width = config.num_classes + 1
        extra = None
        if width is not None:
            if text.pooled is None or text.pooled.shape[-1] != width:
                found = "no pooled vector" if text.pooled is None else str(text.pooled.shape[-1])
                raise _other_encoder(f"a pooled vector of width {width}", found)
            pooled = text.pooled.to(dtype)
            # a product with one-hot rows: exact, and any dtype carries it
            if self.labels is not None:
                extra = pooled @ self.labels.weight
            elif self.pooled_proj is not None:
                extra = self.pooled_proj(pooled)
        if self.resolution is not None and self.aspect is not None:
            if text.sizes is None:
                raise _other_encoder("the size of the picture in TextEmbedding.sizes", "none")
            sides = text.sizes[:, 4:6].float()  # height and width of the target
            ratios = timestep_embedding(sides[:, 0] / sides[:, 1], TIME_FEATURES)
            both = timestep_embedding(sides.flatten(), TIME_FEATURES)
            resolution = self.resolution(both.to(dtype)).unflatten(0, (-1, 2)).flatten(1)
            size = torch.cat([resolution, self.aspect(ratios.to(dtype))], dim=1)
            extra = size if extra is None else extra + size
        return extra

    def _words(self, text: TextEmbedding, dtype: torch.dtype) -> Tensor | None:
        """The text as blocks see it, (B, L, context_dim), or None where none is read."""
        if self.config.text_dim is None:
            return None
        if text.tokens.shape[-1] != self.config.text_dim:
            raise _other_encoder(
                f"tokens of width {self.config.text_dim}", str(text.tokens.shape[-1])
            )
        return self.text_proj(self.text_norm(text.tokens.to(dtype)))

    def _tokens_but_time(self, text: TextEmbedding, dtype: torch.dtype) -> Tensor | None:
        extra, words = self._extra(text, dtype), self._words(text, dtype)
        parts = [
            part for part in (extra if extra is None else extra[:, None], words) if part is not None
        ]
        return torch.cat(parts, dim=1) if parts else None

    def _token_mask(self, text: TextEmbedding) -> RealKeys | None:
        """Which of time, label and text tokens (B, L) are real; None where all are."""
        if self.config.text_dim is None:
            return None
        return real_keys(F.pad(text.mask, (self._tokens_before_text, 0), value=True))

    @property
    def _tokens_before_text(self) -> int:
        config = self.config
        extra = config.pooled_dim is not None or config.num_classes is not None
        return 2 if extra else 1

    def _keys_values(self, context: Tensor | None) -> list[KeysValues | None]:
        return [
            None if block.attn2 is None or context is None else block.attn2.keys_values(context)
            for block in self._blocks
        ]

    @property
    def _blocks(self) -> tuple[Any, ...]:
        return tuple(self.transformer_blocks)

    def _grid(self, x: Tensor) -> tuple[int, int]:
        patch, (height, width) = self.config.patch_size, x.shape[-2:]
        if height % patch or width % patch:
            raise LdmError(
                f"a latent of {height}x{width} cannot be cut into patches of {patch}",
                where="size",
                fix=f"use latent sides that are multiples of {patch}",
            )
        return height // patch, width // patch

    def _with_positions(self, tokens: Tensor, rows: int, columns: int) -> Tensor:
        config = self.config
        if self.position_table is not None:
            table = resized_positions(self.position_table, rows, columns)
        elif config.positions == "sincos":
            table = sincos_positions(
                rows,
                columns,
                config.hidden_size,
                base=config.base_size,
                interpolation=config.interpolation,
                column_first=config.column_first,
                device=tokens.device,
            )
        else:
            return tokens
        return tokens + table.to(tokens.dtype)

    def _place(self, rows: int, columns: int, signal: Signal, device: torch.device) -> Place:
        """Of all tokens of the sequence: with in_context, those of time and text come first."""
        config, turns, mask = self.config, None, None
        before = 0
        if config.conditioning == "in_context":
            assert signal.context is not None
            before = signal.context.shape[1]
            if signal.mask is not None:
                visible = F.pad(signal.mask.visible, (0, rows * columns), value=True)
                mask = signal.mask._replace(visible=visible)
        if config.positions == "rope":
            cos, sin = rotary_positions(
                rows,
                columns,
                config.head_dim,
                base=config.base_size,
                scaling=config.rope_scaling,
                device=device,
            )
            turns = (cos, sin)
            if before:  # which are turned by nothing
                turns = (F.pad(cos, (0, 0, before, 0), value=1.0), F.pad(sin, (0, 0, before, 0)))
        return Place(rows, before, turns, mask)

    def _through_blocks(
        self, tokens: Tensor, kept: Kept, place: Place, routing: Routing | None
    ) -> Tensor:
        everything, whole, places = tokens, place, None
        for number, block in enumerate(self.transformer_blocks):
            if routing is not None and number == routing.first:
                everything, places = tokens, routing.sequence(place.before)
                tokens, place = taken(tokens, places), place.of(places)
            if routing is not None and number == routing.last and places is not None:
                tokens, place = put_back(tokens, places, everything), whole
            own = kept.blocks[number] if kept.blocks else NOTHING_KEPT
            if self.gradient_checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, kept.signal, place, own, use_reentrant=False)
            else:
                tokens = block(tokens, kept.signal, place, own)
        if routing is not None and routing.last == len(self.transformer_blocks):
            assert places is not None
            tokens = put_back(tokens, places, everything)
        return tokens

    def _projected(self, tokens: Tensor, kept: Kept) -> Tensor:
        """(B, N, D) -> the pixels of each patch, (B, N, out_channels * patch * patch)."""
        last = kept.last
        if last is None and kept.conditions is not None:
            last = self._last(*kept.conditions)
        if last is None:
            return self.proj_out(self.norm_out(tokens))
        shift, scale = last.to(tokens.dtype).unbind(1)
        return self.proj_out(torch.addcmul(shift, self.norm_out(tokens), 1 + scale))


def _joined(one: KeysValues, two: KeysValues) -> KeysValues:
    return torch.cat([one[0], two[0]], dim=2), torch.cat([one[1], two[1]], dim=2)


def _other_encoder(wanted: str, found: str) -> LdmError:
    return LdmError(
        f"this DiT reads {wanted}, and was given {found}",
        where="text encoder",
        fix="use the text encoder this DiT was trained with",
        code=ExitCode.CONFIG,
    )
