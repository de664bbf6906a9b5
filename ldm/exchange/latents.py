"""Latent statistics folded into a VAE, for programs that know one scale for all channels.

Ours normalises every channel; a StableDiffusionPipeline divides by scaling_factor and no more. The
1x1 convolutions beside the latent take up any affine map per channel without an error.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from ldm.models.autoencoder import AutoencoderKL


def folded(vae: AutoencoderKL, scale: float, shift: float | None) -> AutoencoderKL:
    """The same codec with latents (z - shift) * scale, without statistics per channel.

    Decoding is equal up to rounding; so is the posterior, but for log-variances that its bounds
    [-30, 20] cut, which move by the change of scale.

    With our latents (z - m) r, the new raw latent is z' = a z + c with a = r / scale and
    c = shift - a m. quant_conv makes z' of z, post_quant_conv z of z'; either is added where the
    codec has none. A codec that has this scale and shift already is returned as it is.

    Args:
        vae: with or without statistics.
        scale: its new scaling_factor.
        shift: its new shift_factor; None is 0 and left out of its configuration.
    """
    config = vae.config
    law = (config.scaling_factor, config.shift_factor or 0.0)
    if config.latents_mean is None and law == (scale, shift or 0.0):
        same = config.shift_factor == shift  # or one of them is None, the other 0
        return vae if same else _rebuilt(vae, scale, shift, dict(vae.state_dict()))
    channels = config.latent_channels
    mean = torch.tensor(config.latents_mean or [config.shift_factor or 0.0] * channels).double()
    std = torch.tensor(config.latents_std or [1.0] * channels).double()
    a = config.scaling_factor / std / scale
    c = (shift or 0.0) - a * mean
    state = dict(vae.state_dict())
    weight, bias = _convolution(vae.quant_conv, 2 * channels)
    gain = torch.cat([a, torch.ones(channels).double()])
    offset = torch.cat([c, 2 * a.log()])  # of the mean, of the log-variance
    state |= _stored("quant_conv", weight * gain[:, None], bias * gain + offset)
    weight, bias = _convolution(vae.post_quant_conv, channels)
    state |= _stored("post_quant_conv", weight / a, bias - weight @ (c / a))
    return _rebuilt(vae, scale, shift, state)


def _rebuilt(
    vae: AutoencoderKL, scale: float, shift: float | None, state: dict[str, Tensor]
) -> AutoencoderKL:
    config = replace(
        vae.config,
        scaling_factor=scale,
        shift_factor=shift,
        latents_mean=None,
        latents_std=None,
        use_quant_conv="quant_conv.weight" in state,
        use_post_quant_conv="post_quant_conv.weight" in state,
    )
    with torch.device("meta"):
        other = AutoencoderKL(config)
    other.load_state_dict(state, assign=True)
    return other.eval().requires_grad_(False)


def _convolution(layer: nn.Conv2d | None, channels: int) -> tuple[Tensor, Tensor]:
    """Matrix and bias of a 1x1 convolution in float64; of none, the identity."""
    if layer is None:
        return torch.eye(channels).double(), torch.zeros(channels).double()
    assert layer.bias is not None
    return layer.weight.detach().cpu().double()[:, :, 0, 0], layer.bias.detach().cpu().double()


def _stored(name: str, weight: Tensor, bias: Tensor) -> dict[str, Tensor]:
    return {f"{name}.weight": weight.float()[:, :, None, None], f"{name}.bias": bias.float()}
