"""Large pictures through a VAE with bounded working memory, and without seams.

Overlapping tiles, the usual way, change a picture: every tile has its own norm statistics and its
attention ends at its border. Here the network is evaluated layer by layer over horizontal strips of
the whole picture. A norm is measured over all strips before it is applied, a convolution reads the
rows beyond its strip, and attention sees every position. So the result is that of the plain call up
to rounding, at the same cost: no row is computed twice.

B batch, C channels, H, W rows and columns of an activation, h, w latent size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import LdmError
from ldm.models.autoencoder import (
    AutoencoderKL,
    Decoder,
    Encoder,
    PixelAttention,
    check_pixels,
    clamped,
)
from ldm.models.layers import Downsample, ResnetBlock, Upsample
from ldm.types import Codec

LARGE_PX = 1024 * 1024
"""Pixels that go through a VAE in one call; more are sliced, one larger picture goes in strips."""
STRIP_PX = 32
"""Height of a strip: high enough that its borders cost little, low enough for a core's cache."""
ATTENDED = 2**24
"""Weights of attention at once, where a kernel writes them out: 64 MB in float32."""


@torch.no_grad()
def decode(vae: Codec, latents: Tensor, strip_px: int | None = None) -> Tensor:
    """`vae.decode` for any size: latents (B, C, h, w) to pixels (B, 3, H, W).

    Args:
        vae: any codec; only an AutoencoderKL can be evaluated in strips.
        latents: normalised latents. Where they lie, whole activations are kept: latents on the CPU
            for a VAE on a GPU leave there only what one strip needs.
        strip_px: height of the strips; None: whole pictures up to LARGE_PX pixels at once, else
            strips of STRIP_PX; 0: everything in one plain call.

    Raises:
        LdmError: strips of another codec, or of a negative height.
    """
    factor = getattr(vae, "downsample_factor", 8)
    area = latents.shape[2] * latents.shape[3] * factor**2

    def in_strips(part: Tensor, rows: int) -> Tensor:
        assert isinstance(vae, AutoencoderKL)
        z, conv = vae.denormalise(part), vae.post_quant_conv
        return _run(vae.decoder, z if conv is None else _convolve(z, conv, rows), rows)

    return _by_size(vae, vae.decode, in_strips, latents, area, strip_px)


@torch.no_grad()
def encode(vae: Codec, pixels: Tensor, strip_px: int | None = None) -> Tensor:
    """`vae.moments` for any size: pixels (B, 3, H, W) to moments (B, 2C, h, w); as `decode`."""

    def in_strips(part: Tensor, rows: int) -> Tensor:
        assert isinstance(vae, AutoencoderKL)
        check_pixels(part, vae.config.in_channels, vae.downsample_factor)
        h, conv = _run(vae.encoder, part, rows), vae.quant_conv
        return clamped(h if conv is None else _convolve(h, conv, rows))

    area = pixels.shape[2] * pixels.shape[3]
    return _by_size(vae, vae.moments, in_strips, pixels, area, strip_px)


def check_strips(vae: Codec, strip_px: int | None) -> None:
    """Refuses strips of a negative height, or of a codec other than AutoencoderKL.

    Raises:
        LdmError: names the height and what is possible.
    """
    can_strip = isinstance(vae, AutoencoderKL)
    if strip_px is not None and strip_px < 0 or strip_px and not can_strip:
        raise LdmError(
            f"strips {strip_px} pixels high cannot be made by a {type(vae).__name__}",
            where="vae_tile",
            fix="use 32, 0 for whole pictures, or leave it out" if can_strip else "leave it out",
        )


def _by_size(
    vae: Codec,
    whole: Callable[[Tensor], Tensor],
    in_strips: Callable[[Tensor, int], Tensor],
    x: Tensor,
    area: int,
    strip_px: int | None,
) -> Tensor:
    """All at once, some pictures at a time, or each picture in strips; `area` is of one picture."""
    check_strips(vae, strip_px)
    can_strip = isinstance(vae, AutoencoderKL)
    if strip_px == 0 or strip_px is None and len(x) * area <= LARGE_PX:
        return whole(x)
    if strip_px is None and (area <= LARGE_PX or not can_strip):
        return torch.cat([whole(part) for part in x.split(max(1, LARGE_PX // area))])
    return torch.cat([in_strips(one, strip_px or STRIP_PX) for one in x.split(1)])


def _run(coder: Encoder | Decoder, x: Tensor, rows: int) -> Tensor:
    """An encoder or decoder, `rows` rows of every activation at a time."""
    for layer in coder.layers():
        x = _layer(layer, x, rows)
    return _convolve(x, coder.conv_out, rows, norm=_normalisation(x, coder.conv_norm_out, rows))


def _layer(layer: nn.Module, x: Tensor, rows: int) -> Tensor:
    match layer:
        case ResnetBlock():
            return _resnet(layer, x, rows)
        case Upsample():
            return _convolve(x, layer.conv, rows, enlarge=2)
        case Downsample():
            return _convolve(x, layer.conv, rows, pad=(0, 1))
        case PixelAttention():  # at the coarsest level, where an activation is small
            where = layer.to_q.weight.device
            return layer(x.to(where), queries=max(1, ATTENDED // x[0, 0].numel())).to(x.device)
        case nn.Conv2d():
            return _convolve(x, layer, rows)
    raise AssertionError(f"{type(layer).__name__} has no evaluation in strips")


def _resnet(block: ResnetBlock, x: Tensor, rows: int) -> Tensor:
    """Two activations are whole at a time: the input, and the result in the making."""
    shortcut = block.conv_shortcut
    h = _convolve(x, block.conv1, rows, norm=_normalisation(x, block.norm1, rows))
    norm2 = _normalisation(h, block.norm2, rows)
    _convolve(h, block.conv2, rows, norm=norm2, into=h)
    for top in range(0, h.shape[2], rows):
        part = x[:, :, top : top + rows]
        if shortcut is not None:
            part = shortcut(part.to(shortcut.weight.device)).to(h.device)
        h[:, :, top : top + rows] += part
    return h


def _normalisation(x: Tensor, norm: nn.GroupNorm, rows: int) -> tuple[Tensor, Tensor]:
    """Factor and summand of a group norm over the whole of x, (B, C, 1, 1), float32 up.

    Means and squared deviations of strips are merged, not sums of squares: Chan et al. 1979, eq. 2.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    count, mean, deviations = 0, torch.zeros(()), torch.zeros(())
    for part in x.split(rows, dim=2):
        grouped = part.to(norm.weight.device, wide).unflatten(1, (norm.num_groups, -1))
        own_var, own_mean = torch.var_mean(grouped.flatten(2), dim=2, correction=0)
        own_var, own_mean = own_var.double().cpu(), own_mean.double().cpu()  # (B, groups)
        more = grouped[0, 0].numel()
        step = own_mean - mean
        mean = mean + step * (more / (count + more))
        deviations = deviations + more * own_var + step**2 * (count * more / (count + more))
        count += more
    scale = (deviations / count + norm.eps).rsqrt().to(norm.weight.device, wide)
    width = x.shape[1] // norm.num_groups
    factor = scale.repeat_interleave(width, 1) * norm.weight
    shift = norm.bias - mean.to(factor).repeat_interleave(width, 1) * factor
    return factor[:, :, None, None], shift[:, :, None, None]


def _convolve(
    x: Tensor,
    conv: nn.Conv2d,
    rows: int,
    *,
    norm: tuple[Tensor, Tensor] | None = None,
    enlarge: int = 1,
    pad: tuple[int, int] | None = None,
    into: Tensor | None = None,
) -> Tensor:
    """conv(silu(norm(x)) enlarged), `rows` rows of the result at a time.

    Args:
        x: (B, C, H, W), possibly on another device than `conv`.
        conv: the convolution.
        rows: of a strip.
        norm: of `_normalisation`; None leaves x as it is.
        enlarge: nearest-neighbour factor before the convolution.
        pad: zeros before and after each side; None takes those of `conv`.
        into: x itself, to be replaced by the result.
    """
    (kernel, _), (stride, _) = conv.kernel_size, conv.stride
    before, after = pad or (int(conv.padding[0]), int(conv.padding[0]))
    height, width = x.shape[2] * enlarge, x.shape[3] * enlarge
    sizes = [(side + before + after - kernel) // stride + 1 for side in (height, width)]
    out = x.new_empty(len(x), conv.out_channels, *sizes) if into is None else into
    kept = x[:, :, :0]
    for top in range(0, sizes[0], rows):
        bottom = min(top + rows, sizes[0])
        first, last = top * stride - before, (bottom - 1) * stride - before + kernel  # of the input
        begin, end = max(first, 0) // enlarge, -(-min(last, height) // enlarge)
        if into is None:
            part = x[:, :, begin:end]
        else:  # the row above has been overwritten by the strip before
            part = torch.cat([kept, x[:, :, top:end]], dim=2)
            kept = x[:, :, bottom - before : bottom].clone()
        part = part.to(conv.weight.device)
        if norm is not None:
            part = torch.addcmul(norm[1], part.to(norm[0].dtype), norm[0])
            part = F.silu(part, inplace=True).to(x.dtype)
        if enlarge > 1:
            part = F.interpolate(part, scale_factor=enlarge, mode="nearest")
            skipped = max(first, 0) - begin * enlarge
            part = part[:, :, skipped : min(last, height) - begin * enlarge]
        part = F.pad(part, (before, after, max(0, -first), max(0, last - height)))
        strip = F.conv2d(part, conv.weight, conv.bias, stride)
        out[:, :, top:bottom] = strip.to(out.device)
    return out
