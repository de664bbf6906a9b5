"""How the denoisers and autoencoders of diffusers are called, class by class: tables, no modules.

What differs between the classes is said here once: how time is counted, where text goes, whether
latents are packed. `external.py` does the calling.

B batch, C latent channels, h, w latent size, L text tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ldm.errors import LdmError
from ldm.types import TextEmbedding

Conditions = Callable[[Any, Tensor, TextEmbedding], dict[str, Any]]
"""(diffusers' config, x (B, C, h, w), text) -> further arguments of a network."""

OWN = ("guidance", "keep_variance")
"""Fields of ExternalConfig that diffusers does not have."""
KEPT = ("_class_name", "_diffusers_version")
CERTAIN = -30.0
"""Log-variance of an autoencoder without a posterior: its "sample" is its mean to 3e-7."""


@dataclass(frozen=True)
class Call:
    """How a diffusers denoiser is called.

    Args:
        time: our clock, 0 to about 1000 and larger with more noise, as the network counts it.
        mask: name of the argument for the mask of real tokens; None: padding is seen.
        pooled: name of the argument for the pooled text, or None.
        tokens: name of the argument for the token states, or None.
        packed: 2x2 latent pixels are one token of 4C numbers, (B, h w / 4, 4C).
        sign: -1 where the network predicts the opposite of our flow, data minus noise.
        conditions: what else it is told.
    """

    time: Callable[[Tensor], Tensor] = lambda clock: clock
    mask: str | None = None
    pooled: str | None = None
    tokens: str | None = "encoder_hidden_states"
    packed: bool = False
    sign: int = 1
    conditions: Conditions = lambda config, x, text: {}


def _thousandth(clock: Tensor) -> Tensor:
    return clock / 1000


def _from_noise(clock: Tensor) -> Tensor:
    return 1 - clock / 1000


def _unet(config: Any, x: Tensor, text: TextEmbedding) -> dict[str, Any]:
    if config.addition_embed_type is None:
        return {}
    if config.addition_embed_type != "text_time":
        raise LdmError(
            f"addition_embed_type={config.addition_embed_type!r} is not known here",
            where="UNet2DConditionModel",
            fix="use a model of the layout of Stable Diffusion 1, 2 or XL",
        )
    pooled, sizes = given("pooled", text.pooled), given("sizes", text.sizes)
    return {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}}


def _class_label(config: Any, x: Tensor, text: TextEmbedding) -> dict[str, Any]:
    """The pooled vector is one-hot, its last place for no label, as in our own DiT."""
    return {"class_labels": given("pooled", text.pooled).argmax(1)}


def _pixart(config: Any, x: Tensor, text: TextEmbedding) -> dict[str, Any]:
    """PixArt-alpha at 1024 pixels is told size and aspect ratio; its VAE shrinks by 8."""
    told = config.use_additional_conditions
    if not (config.sample_size == 128 if told is None else told):
        return {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    sides = x.new_tensor([[8 * x.shape[2], 8 * x.shape[3]]]).expand(len(x), 2)
    sides = sides if text.sizes is None else text.sizes[:, 4:6].to(x)
    return {"added_cond_kwargs": {"resolution": sides, "aspect_ratio": sides[:, :1] / sides[:, 1:]}}


def _sana(config: Any, x: Tensor, text: TextEmbedding) -> dict[str, Any]:
    if config.guidance_embeds:
        raise LdmError(
            "the clock of this distilled model (Sana-Sprint) is not known here",
            where="SanaTransformer2DModel",
            fix="use a Sana model without guidance_embeds",
        )
    return {}


def _flux(config: Any, x: Tensor, text: TextEmbedding) -> dict[str, Any]:
    """Places of text tokens, all zero, and of packed latents: (0, row, column)."""
    rows, columns = x.shape[2] // 2, x.shape[3] // 2
    places = x.new_zeros(rows, columns, 3)
    places[..., 1] = torch.arange(rows, device=x.device)[:, None]
    places[..., 2] = torch.arange(columns, device=x.device)
    ids = {"img_ids": places.flatten(0, 1), "txt_ids": x.new_zeros(text.tokens.shape[1], 3)}
    return ids | ({"guidance": x.new_ones(len(x))} if config.guidance_embeds else {})


DENOISERS: dict[str, Call] = {
    "UNet2DConditionModel": Call(conditions=_unet),
    "DiTTransformer2DModel": Call(tokens=None, conditions=_class_label),
    "PixArtTransformer2DModel": Call(mask="encoder_attention_mask", conditions=_pixart),
    "SanaTransformer2DModel": Call(mask="encoder_attention_mask", conditions=_sana),
    "SD3Transformer2DModel": Call(pooled="pooled_projections"),
    "FluxTransformer2DModel": Call(
        time=_thousandth, pooled="pooled_projections", packed=True, conditions=_flux
    ),
    "AuraFlowTransformer2DModel": Call(time=_thousandth),
    "Lumina2Transformer2DModel": Call(time=_from_noise, mask="encoder_attention_mask", sign=-1),
}
"""The denoisers known, by their class in diffusers."""


@dataclass(frozen=True)
class Coding:
    """How a diffusers autoencoder is called.

    Args:
        widths: key of its configuration with one entry per resolution level.
        encode: (module, pixels) -> moments (B, 2C, h, w).
    """

    widths: str
    encode: Callable[[Any, Tensor], Tensor]


def _posterior(module: Any, pixels: Tensor) -> Tensor:
    posterior = module.encode(pixels).latent_dist
    return torch.cat([posterior.mean, posterior.logvar], dim=1)


def _latent(module: Any, pixels: Tensor) -> Tensor:
    (z,) = module.encode(pixels, return_dict=False)
    return torch.cat([z, torch.full_like(z, CERTAIN)], dim=1)


AUTOENCODERS: dict[str, Coding] = {
    "AutoencoderKL": Coding("block_out_channels", _posterior),
    "AsymmetricAutoencoderKL": Coding("down_block_out_channels", _posterior),
    "AutoencoderDC": Coding("encoder_block_out_channels", _latent),
    "AutoencoderTiny": Coding("encoder_block_out_channels", _latent),
}
"""The autoencoders known, by their class in diffusers."""


@dataclass(frozen=True)
class ExternalConfig:
    """A diffusers configuration, and what we add to it.

    Args:
        values: the `config.json` with its `_class_name`.
        guidance: the scale that a guidance-distilled model (FLUX.1-dev) is told.
        keep_variance: hand out the channels of a learned variance as well; else they are dropped,
            as the published pipelines do.
        latents_mean, latents_std: of an autoencoder, measured per channel, or None.
    """

    values: Mapping[str, Any] = field(hash=False)
    guidance: float = 3.5
    keep_variance: bool = False
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None

    @classmethod
    def from_diffusers(cls, values: Mapping[str, Any]) -> ExternalConfig:
        """The inverse of `to_diffusers`; also reads a file that diffusers wrote."""
        own = {key: values[f"_ldm_{key}"] for key in OWN if f"_ldm_{key}" in values}
        # diffusers' own notes name keys "left at their default", which it then resets, and paths
        rest = {key: values[key] for key in values if key[0] != "_" or key in KEPT}
        mean, std = (
            None if rest.get(key) is None else tuple(map(float, rest[key]))
            for key in ("latents_mean", "latents_std")
        )
        plain = json.loads(json.dumps(rest))  # diffusers keeps tuples where a file has lists
        return cls(plain, **own, latents_mean=mean, latents_std=std)

    def to_diffusers(self) -> dict[str, Any]:
        """A `config.json` that diffusers reads too: it passes over keys that begin with `_`."""
        own = {f"_ldm_{key}": getattr(self, key) for key in OWN if self.class_name in DENOISERS}
        measured = {
            key: None if row is None else list(row)
            for key, row in (("latents_mean", self.latents_mean), ("latents_std", self.latents_std))
            if row is not None or key in self.values
        }
        return {**self.values, **own, **measured}

    @property
    def class_name(self) -> str:
        """The class in diffusers."""
        return str(self.values.get("_class_name"))

    @property
    def in_channels(self) -> int:
        """Channels of the latents that a denoiser takes."""
        channels = int(self.values["in_channels"])
        return channels // 4 if DENOISERS[self.class_name].packed else channels

    @property
    def patch_size(self) -> int:
        """Latent sides of a denoiser are multiples of this."""
        if DENOISERS[self.class_name].packed:
            return 2
        if "block_out_channels" in self.values:
            return int(2 ** (len(self.values["block_out_channels"]) - 1))
        return int(self.values["patch_size"])

    @property
    def latent_channels(self) -> int:
        """C of an autoencoder."""
        return int(self.values["latent_channels"])

    @property
    def downsample_factor(self) -> int:
        """Pixels per latent along one side of an autoencoder."""
        return int(2 ** (len(self.values[AUTOENCODERS[self.class_name].widths]) - 1))

    @property
    def scaling_factor(self) -> float:
        """What raw latents are multiplied by."""
        return float(self.values.get("scaling_factor") or 1.0)

    @property
    def shift_factor(self) -> float | None:
        """What is subtracted before."""
        return self.values.get("shift_factor")


def given(part: str, value: Tensor | None) -> Tensor:
    """The part of a text embedding.

    Raises:
        LdmError: the text encoder gives none.
    """
    if value is None:
        raise LdmError(
            f"this denoiser needs TextEmbedding.{part}, and the text encoder gives none",
            where="text",
            fix="use the text encoders that the model was trained with",
        )
    return value
