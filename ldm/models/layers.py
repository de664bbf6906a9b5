"""Layers shared by the autoencoder and the denoisers, with diffusers' parameter names.

B batch, C channels, H height, W width, L tokens, D width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.attention import attend


def timestep_embedding(t: Tensor, dim: int, frequency_shift: int = 0) -> Tensor:
    """Sinusoidal features of time: cosines first, frequencies 10000^(-i / (dim / 2)).

    Source: Vaswani et al. 2017, section 3.5, in the order that Stable Diffusion was trained with
    (`flip_sin_to_cos=True`, `freq_shift=0`).

    Args:
        t: the network's clock, (B,), usually 0..999; fractions are allowed.
        dim: even width of the result.
        frequency_shift: subtracted from dim / 2 in the exponent, as some diffusers models have it.

    Returns:
        (B, dim) float32.
    """
    assert dim % 2 == 0, f"dim must be even, got {dim}"
    steps = torch.arange(dim // 2, dtype=torch.float32, device=t.device)
    # float32 whatever the autocast: bf16 cannot tell t = 998 from t = 999
    decay = -math.log(10_000) / (dim // 2 - frequency_shift)
    angles = t.float()[:, None] * torch.exp(decay * steps)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class TimestepEmbedding(nn.Module):
    """Two linear layers from the sinusoidal features (B, D) to the width of the time signal."""

    def __init__(self, in_width: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_width, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, features: Tensor) -> Tensor:
        """(B, in_width) -> (B, width)."""
        return self.linear_2(F.silu(self.linear_1(features)))


class ResnetBlock(nn.Module):
    """Norm, SiLU, convolution, twice, plus the input (He et al. 2016; Ho et al. 2020).

    Args:
        in_channels: channels of the input.
        out_channels: channels of the result; another number adds a 1x1 `conv_shortcut`.
        groups: groups of both norms.
        eps: of both norms: 1e-6 in the VAE, 1e-5 in the UNet.
        time_width: width of the time signal, None for a block that knows no time.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        groups: int,
        eps: float,
        time_width: int | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = None if time_width is None else nn.Linear(time_width, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.conv_shortcut = None if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        """(B, in, H, W) -> (B, out, H, W); `shift` is what `time_emb_proj` says, (B or 1, out)."""
        h = self.conv1(F.silu(self.norm1(x)))
        if shift is not None:
            h = h + shift[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample(nn.Module):
    """A 3x3 convolution of stride 2.

    Args:
        channels: of input and result.
        asymmetric: pad right and bottom only, as the VAE was trained; the UNet pads all sides.
    """

    def __init__(self, channels: int, asymmetric: bool) -> None:
        super().__init__()
        self.asymmetric = asymmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if asymmetric else 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H / 2, W / 2), rounded up where it pads all sides."""
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)


class Upsample(nn.Module):
    """Nearest-neighbour doubling and a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """(B, C, H, W) -> (B, C, *size), twice the size by default."""
        size = size or (2 * x.shape[2], 2 * x.shape[3])
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


class Attention(nn.Module):
    """Multi-head attention with diffusers' names: `to_q`, `to_k`, `to_v`, `to_out.0`.

    Args:
        width: of the queries and the result.
        heads: number of heads; divides `width`.
        context_width: of the tokens looked at, None for self-attention.
        bias: whether q, k and v have biases; `to_out.0` always has one.
    """

    kernel = "auto"  # of `attend`; see `use_attention`

    def __init__(
        self, width: int, heads: int, context_width: int | None = None, bias: bool = False
    ) -> None:
        super().__init__()
        assert width % heads == 0, f"{heads} heads do not divide the width {width}"
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=bias)
        self.to_k = nn.Linear(context_width or width, width, bias=bias)
        self.to_v = nn.Linear(context_width or width, width, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, Lk, context_width) -> keys and values, each (B, heads, Lk, width / heads)."""
        return self._split(self.to_k(context)), self._split(self.to_v(context))

    def forward(
        self,
        x: Tensor,
        keys_values: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """(B, L, width) looks at what `keys_values` were made of, or at itself -> (B, L, width).

        `mask` is (B, Lk) bool, True where a token is real.
        """
        q = self._split(self.to_q(x))  # first: backward adds up in the reverse order of calls
        k, v = self.keys_values(x) if keys_values is None else keys_values
        out = attend(q, k, v, mask, self.kernel)
        return self.to_out[0](out.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        return x.view(batch, length, self.heads, -1).transpose(1, 2)


class GEGLU(nn.Module):
    """A GELU-gated linear unit (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, width) -> (B, L, inner)."""
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU to four times the width and back; `net.0.proj` and `net.2` as in diffusers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # the place in the middle is diffusers' dropout; it keeps the last layer's name `net.2`
        self.net = nn.Sequential(
            GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, width) -> (B, L, width)."""
        gated, _, out = self.net
        return out(gated(x))
