"""The blocks of a diffusion transformer, for every way in which it is conditioned.

B batch, N tokens, L context tokens, D width, d head width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ldm.models.attention import RealKeys, attend
from ldm.models.dit_config import DiTConfig
from ldm.models.positions import rotated

KeysValues = tuple[Tensor, Tensor]
"""Of one attention to the context, each (B, heads, L, d)."""


class Place(NamedTuple):
    """Where the tokens of a sequence stand, and which are real.

    Args:
        rows: of the token grid; a local convolution needs the whole grid.
        before: tokens of time, labels and text before those of the picture.
        turns: cosines and sines of rotary positions, or None.
        mask: which tokens of the sequence (B, N) are real; None where all are.
    """

    rows: int
    before: int = 0
    turns: tuple[Tensor, Tensor] | None = None
    mask: RealKeys | None = None

    def of(self, places: Tensor) -> Place:
        """Of the tokens at places (B, K) alone."""
        turns = self.turns
        if turns is not None:
            turns = turns[0][places][:, None], turns[1][places][:, None]  # (B, 1, K, d / 2)
        mask = self.mask
        if mask is not None:
            mask = mask._replace(visible=mask.visible.gather(3, places[:, None, None]))
        return Place(self.rows, self.before, turns, mask)


class Signal(NamedTuple):
    """What a block is told besides its tokens.

    Args:
        condition: (B, D) after its SiLU; None where norms are not modulated by it.
        context: (B, L, D) to look at, or None.
        mask: which tokens of the context (B, L) are real; None where all are.
    """

    condition: Tensor | None
    context: Tensor | None
    mask: RealKeys | None


class KeptBlock(NamedTuple):
    """A block's modulations (B or 1, 4 or 6, 1, D) and the keys and values of its context."""

    modulation: Tensor | None
    keys_values: KeysValues | None


NOTHING_KEPT = KeptBlock(None, None)


class Kept(NamedTuple):
    """What depends on time and text only.

    Args:
        signal: what the blocks are told; without what `blocks` hold already. With in_context its
            context joins the sequence.
        blocks: what is computed already of each block, or () where blocks compute it.
        conditions: what the last norm is modulated by: time and the rest summed, after and before
            a SiLU, (B, D) each.
        last: its modulation (B or 1, 2, 1, D) where `prepare` computed that.
    """

    signal: Signal
    blocks: tuple[KeptBlock, ...] = ()
    conditions: tuple[Tensor, Tensor] | None = None
    last: Tensor | None = None


class Attention(nn.Module):
    """Multi-head attention from x (B, N, D) to a context (B, L, context_dim), or to x itself."""

    kernel = "auto"  # of `attend`; see `use_attention`

    def __init__(self, config: DiTConfig, *, cross: bool) -> None:
        super().__init__()
        width, self.head_dim = config.hidden_size, config.head_dim
        if cross:
            self.to_q = nn.Linear(width, width)
            self.to_kv = nn.Linear(config.context_dim, 2 * width)
        else:
            self.to_qkv = nn.Linear(width, 3 * width)
        self.to_out = nn.Linear(width, width)
        self.norm_q, self.norm_k = (
            nn.LayerNorm(self.head_dim, eps=1e-6, bias=False) if config.qk_norm else None
            for _ in range(2)
        )

    def keys_values(self, context: Tensor) -> KeysValues:
        """What a context (B, L, context_dim) is looked at by: depends on nothing else."""
        k, v = self._heads(self.to_kv(context), 2)
        return (k if self.norm_k is None else self.norm_k(k)), v

    def to_context(self, x: Tensor, keys_values: KeysValues, mask: RealKeys | None) -> Tensor:
        """x (B, N, D) looks at the context, of which `mask` tells the real tokens."""
        (q,) = self._heads(self.to_q(x), 1)
        q = q if self.norm_q is None else self.norm_q(q)
        return self._joined(attend(q, *keys_values, mask, self.kernel))

    def to_itself(self, x: Tensor, place: Place) -> Tensor:
        """x (B, N, D) looks at its own tokens."""
        q, k, v = self._heads(self.to_qkv(x), 3)
        if self.norm_q is not None and self.norm_k is not None:
            q, k = self.norm_q(q), self.norm_k(k)
        if place.turns is not None:
            q, k = rotated(q, place.turns), rotated(k, place.turns)
        return self._joined(attend(q, k, v, place.mask, self.kernel))

    def _heads(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """(B, N, parts * D) -> parts of (B, heads, N, d)."""
        batch, count, _ = x.shape
        split = x.view(batch, count, parts, -1, self.head_dim)
        return split.permute(2, 0, 3, 1, 4).unbind(0)

    def _joined(self, out: Tensor) -> Tensor:
        return self.to_out(out.transpose(1, 2).flatten(2))  # (B, heads, N, d) -> (B, N, D)


class LocalConv(nn.Conv2d):
    """A 3x3 convolution over the token grid, for tokens (B, N, D) in row-major order.

    Source: the convolutional position encoding of Chu et al. 2021 (arXiv 2102.10882), with groups
    of channels in place of single ones.
    """

    def __init__(self, config: DiTConfig) -> None:
        width = config.hidden_size
        super().__init__(width, width, 3, padding=1, groups=width // config.head_dim)

    def on_grid(self, tokens: Tensor, rows: int) -> Tensor:
        """(B, rows * columns, D) -> the same shape."""
        pixels = tokens.unflatten(1, (rows, -1)).permute(0, 3, 1, 2)  # (B, D, rows, columns)
        return self(pixels).permute(0, 2, 3, 1).flatten(1, 2)


class Block(nn.Module):
    """Convolution if asked for, self-attention, attention to the context, feed-forward.

    Peebles & Xie 2023, section 3.2. `adaln_zero` and `adaln_single` gate self-attention and
    feed-forward by what time says, which is 0 at first; the convolution and the attention to the
    context, which time does not modulate, start from zero kernels and a zero output projection. So
    such a block starts as the identity.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, int(config.hidden_size * config.mlp_ratio)
        plain, conditioning = not config.is_modulated, config.conditioning
        self.parts = {"adaln": 4, "adaln_zero": 6, "adaln_single": 6}.get(conditioning, 0)
        self.local = LocalConv(config) if config.local_conv else None
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=plain)
        self.attn1 = Attention(config, cross=False)
        self.norm2, self.attn2 = None, None
        if config.looks_at_context:
            self.norm2 = nn.LayerNorm(width, eps=1e-6) if config.cross_norm else None
            self.attn2 = Attention(config, cross=True)
        self.norm3 = nn.LayerNorm(width, eps=config.ff_norm_eps, elementwise_affine=plain)
        gelu = nn.GELU(approximate="tanh" if config.activation == "gelu_tanh" else "none")
        self.ff = nn.Sequential(nn.Linear(width, inner), gelu, nn.Linear(inner, width))
        self.modulation, self.scale_shift_table = None, None
        if conditioning == "adaln_single":
            self.scale_shift_table = nn.Parameter(torch.zeros(self.parts, width))
        elif config.is_modulated:
            self.modulation = nn.Linear(width, self.parts * width)

    def modulations(self, condition: Tensor) -> Tensor:
        """(B, D) -> shifts, scales and gates, (B, parts, 1, D)."""
        assert self.modulation is not None
        return self.modulation(condition).view(len(condition), self.parts, 1, -1)

    def forward(
        self, x: Tensor, signal: Signal, place: Place, kept: KeptBlock = NOTHING_KEPT
    ) -> Tensor:
        """Tokens (B, N, D) -> (B, N, D); what is `kept` is not computed from the signal."""
        if self.local is not None:
            x = x + self.local.on_grid(x, place.rows)
        shifts = kept.modulation
        if shifts is None and signal.condition is not None:
            shifts = self.modulations(signal.condition)
        if shifts is None:
            x = x + self.attn1.to_itself(self.norm1(x), place)
            x = self._looked(x, signal, kept)
            return x + self.ff(self.norm3(x))
        shift1, scale1, *rest = shifts.to(x.dtype).unbind(1)
        if self.parts == 4:
            shift3, scale3 = rest
            x = x + self.attn1.to_itself(torch.addcmul(shift1, self.norm1(x), 1 + scale1), place)
            x = self._looked(x, signal, kept)
            return x + self.ff(torch.addcmul(shift3, self.norm3(x), 1 + scale3))
        gate1, shift3, scale3, gate3 = rest
        inner = torch.addcmul(shift1, self.norm1(x), 1 + scale1)
        x = x + gate1 * self.attn1.to_itself(inner, place)
        x = self._looked(x, signal, kept)
        return x + gate3 * self.ff(torch.addcmul(shift3, self.norm3(x), 1 + scale3))

    def _looked(self, x: Tensor, signal: Signal, kept: KeptBlock) -> Tensor:
        if self.attn2 is None:
            return x
        keys_values = kept.keys_values
        if keys_values is None:
            assert signal.context is not None
            keys_values = self.attn2.keys_values(signal.context)
        inner = x if self.norm2 is None else self.norm2(x)
        return x + self.attn2.to_context(inner, keys_values, signal.mask)


def two_layers(inner: int, width: int) -> nn.Sequential:
    """From sinusoids to a vector of `width`, as time and sizes are embedded."""
    return nn.Sequential(nn.Linear(inner, width), nn.SiLU(), nn.Linear(width, width))


def text_layers(config: DiTConfig) -> tuple[nn.Module, nn.Module]:
    """The norm of text tokens and their projection to the width of the context."""
    if config.text_dim is None or config.text_projection == "none":
        return nn.Identity(), nn.Identity()
    first = nn.Linear(config.text_dim, config.hidden_size)
    if config.text_projection == "linear":
        return nn.LayerNorm(config.text_dim, eps=1e-6), first
    second = nn.Linear(config.hidden_size, config.hidden_size)
    return nn.Identity(), nn.Sequential(first, nn.GELU(approximate="tanh"), second)
