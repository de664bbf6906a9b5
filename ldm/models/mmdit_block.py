"""The blocks of an MM-DiT: picture and text tokens, each with its own weights, in one attention.

Source: Esser et al. 2024 (arXiv 2403.03206), figure 2 b; QK-norm and the second attention as in the
released Stable Diffusion 3.5. Names are those of diffusers.
B batch, N picture tokens, L text tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.attention import attend
from ldm.models.mmdit_config import MMDiTConfig

HALF = ("shift", "scale", "gate")
"""What modulates one layer: its normalised input is scaled and shifted, its result gated."""


class Modulation(nn.Module):
    """Vectors that scale, shift and gate, from time and text (Peebles & Xie 2023, adaLN-zero).

    Args:
        width: D.
        parts: what the vectors are, in the order of the weights.
    """

    def __init__(self, width: int, parts: tuple[str, ...]) -> None:
        super().__init__()
        self.parts = parts
        self.linear = nn.Linear(width, len(parts) * width)

    def forward(self, condition: Tensor) -> list[Tensor]:
        """(..., D) after its SiLU -> for each part (..., 1, D), scales with their 1 added."""
        vectors = self.linear(condition).unsqueeze(-2).chunk(len(self.parts), dim=-1)
        pairs = zip(self.parts, vectors, strict=True)
        return [1 + vector if part == "scale" else vector for part, vector in pairs]


class JointBlock(nn.Module):
    """Joint attention and a feed-forward layer for each half, all gated by `Modulation`.

    Args:
        config: of the network.
        dual: the picture half attends to itself as well, by weights of its own.
        last: the text half ends with this block; only its keys and values are used.
    """

    def __init__(self, config: MMDiTConfig, *, dual: bool, last: bool) -> None:
        super().__init__()
        width = config.width
        self.norm1 = Modulation(width, HALF * (3 if dual else 2))
        self.norm1_context = Modulation(width, ("scale", "shift") if last else HALF * 2)
        self.attn = JointAttention(config, last=last)
        self.attn2 = SelfAttention(config) if dual else None
        self.ff = FeedForward(width)
        self.ff_context = None if last else FeedForward(width)

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        picture: Sequence[Tensor],
        words: Sequence[Tensor],
        visible: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Picture tokens (B, N, D) and text tokens (B, L, D) -> the same shapes.

        `picture` and `words` are what `norm1` and `norm1_context` say; `visible` (B, N + L) is True
        where a token may be looked at, None for all.
        """
        shift, scale, gate, ff_shift, ff_scale, ff_gate, *dual = picture
        normed = normalised(x)
        if self.ff_context is None:
            text_scale, text_shift = words
        else:
            text_shift, text_scale, text_gate, text_ff_shift, text_ff_scale, text_ff_gate = words
        looked, text_looked = self.attn(
            torch.addcmul(shift, normed, scale),
            torch.addcmul(text_shift, normalised(context), text_scale),
            visible,
        )
        x = torch.addcmul(x, gate, looked)
        if self.attn2 is not None:
            shift, scale, gate = dual
            x = torch.addcmul(x, gate, self.attn2(torch.addcmul(shift, normed, scale)))
        fed = self.ff(torch.addcmul(ff_shift, normalised(x), ff_scale))
        x = torch.addcmul(x, ff_gate, fed)
        if self.ff_context is not None:
            context = torch.addcmul(context, text_gate, text_looked)
            fed = self.ff_context(torch.addcmul(text_ff_shift, normalised(context), text_ff_scale))
            context = torch.addcmul(context, text_ff_gate, fed)
        return x, context


class SelfAttention(nn.Module):
    """Multi-head attention of picture tokens to themselves, with diffusers' names."""

    kernel = "auto"  # of `attend`; see `use_attention`

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = (config.num_attention_heads, config.attention_head_dim)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.norm_q, self.norm_k = _head_norm(config), _head_norm(config)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        q, k, v = (
            layer(x).unflatten(-1, self.heads) for layer in (self.to_q, self.to_k, self.to_v)
        )
        q, k = _normed(self.norm_q, q), _normed(self.norm_k, k)
        out = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None, self.kernel)
        return self.to_out[0](out.transpose(1, 2).flatten(2))


class JointAttention(nn.Module):
    """One attention over picture and text tokens, each with projections of their own."""

    kernel = "auto"  # of `attend`; see `use_attention`

    def __init__(self, config: MMDiTConfig, *, last: bool) -> None:
        super().__init__()
        width = config.width
        self.heads = (config.num_attention_heads, config.attention_head_dim)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.norm_q, self.norm_k = _head_norm(config), _head_norm(config)
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (
            nn.Linear(width, width) for _ in range(3)
        )
        self.norm_added_q, self.norm_added_k = _head_norm(config), _head_norm(config)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.to_add_out = None if last else nn.Linear(width, width)

    def forward(
        self, x: Tensor, context: Tensor, visible: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """(B, N, D), (B, L, D), visible (B, N + L) or None -> the same shapes."""
        q = self._joined(self.to_q(x), self.add_q_proj(context), self.norm_q, self.norm_added_q)
        k = self._joined(self.to_k(x), self.add_k_proj(context), self.norm_k, self.norm_added_k)
        v = self._joined(self.to_v(x), self.add_v_proj(context), None, None)
        out = attend(q, k, v, visible, self.kernel).transpose(1, 2).flatten(2)
        looked, text_looked = out.split([x.shape[1], context.shape[1]], dim=1)
        if self.to_add_out is None:
            return self.to_out[0](looked), None
        return self.to_out[0](looked), self.to_add_out(text_looked)

    def _joined(
        self, picture: Tensor, text: Tensor, norm: nn.Module | None, text_norm: nn.Module | None
    ) -> Tensor:
        """(B, N, D) and (B, L, D) -> (B, heads, N + L, head_dim)."""
        if norm is None or text_norm is None:
            return torch.cat([picture, text], dim=1).unflatten(-1, self.heads).transpose(1, 2)
        picture, text = picture.unflatten(-1, self.heads), text.unflatten(-1, self.heads)
        parts = [_normed(norm, picture), _normed(text_norm, text)]
        return torch.cat(parts, dim=1).transpose(1, 2)


class GELU(nn.Module):
    """A linear layer and the tanh form of GELU."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, inner)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, width) -> (B, L, inner)."""
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """To four times the width and back; `net.0.proj` and `net.2` as in diffusers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # the place in the middle is diffusers' dropout; it keeps the last layer's name `net.2`
        self.net = nn.Sequential(GELU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        return self.net(x)


def normalised(x: Tensor) -> Tensor:
    """Mean 0 and variance 1 of every token (B, L, D)."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


class HeadNorm(nn.Module):
    """RMS norm of the queries or keys of each head (Zhang & Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.attention_head_dim))

    def forward(self, x: Tensor) -> Tensor:
        """(..., head_dim) -> the same shape and dtype."""
        # one dtype for both, or torch does not fuse it; autocast may return float32 all the same
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), 1e-6).to(x.dtype)


def _head_norm(config: MMDiTConfig) -> nn.Module | None:
    return None if config.qk_norm is None else HeadNorm(config)


def _normed(norm: nn.Module | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)
