"""Denoisers and autoencoders of diffusers that have no module here, seen through our protocols.

Samplers, trainer, cache and evaluation then work on them as on our own networks. How each class is
called stands in `external_calls.py`. Padding is seen or masked as each model was trained.

B batch, C latent channels, h, w latent size, H, W pixels.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import ExitCode, LdmError, missing_package
from ldm.models.autoencoder import check_pixels, kl_divergence, shift_and_scale
from ldm.models.external_calls import AUTOENCODERS, DENOISERS, ExternalConfig, given
from ldm.types import TextEmbedding


class ExternalDenoiser(nn.Module):
    """A diffusers denoiser as ours: (x (B, C, h, w), clock (B,), text) -> (B, C, h, w).

    `state_dict` has diffusers' own names. `gradient_checkpointing` switches that of the network.
    """

    def __init__(self, module: Any, config: ExternalConfig) -> None:
        super().__init__()
        self.config, self.module = config, module
        _own_names(self)
        for part in module.modules():
            if type(part).__name__ == "LabelEmbedding":
                part.dropout_prob = 0.0  # it would draw from the global generator; we drop captions

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether activations are computed again in the backward pass."""
        return bool(self.module.is_gradient_checkpointing)

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, wanted: bool) -> None:
        if wanted:
            self.module.enable_gradient_checkpointing()
        else:
            self.module.disable_gradient_checkpointing()

    def forward(self, x: Tensor, t: Tensor, text: TextEmbedding) -> Tensor:
        """See the class; 2C channels come out with `keep_variance`."""
        call = DENOISERS[self.config.class_name]
        told = call.conditions(self.module.config, x, text)
        if "guidance" in told:
            told["guidance"] = self.config.guidance * told["guidance"]
        named = {call.tokens: text.tokens, call.mask: text.mask}
        if call.pooled is not None:
            named[call.pooled] = given("pooled", text.pooled)
        told |= {name: value for name, value in named.items() if name is not None}
        z = F.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2) if call.packed else x
        (y,) = self.module(z, timestep=call.time(t), return_dict=False, **told)
        if call.packed:
            sides = (x.shape[2] // 2, x.shape[3] // 2)
            y = F.pixel_shuffle(y.transpose(1, 2).unflatten(2, sides), 2)
        if y.shape[1] == 2 * x.shape[1] and not self.config.keep_variance:
            y = y[:, : x.shape[1]]
        return call.sign * y if call.sign != 1 else y

    def save(self, folder: Path | str) -> None:
        """Writes config.json and safetensors in diffusers' layout."""
        _save(self.module, folder, self.config)


class ExternalCodec(nn.Module):
    """A diffusers autoencoder as ours; see `AutoencoderKL` for what each method does.

    One without a posterior has log-variance CERTAIN everywhere.
    """

    def __init__(self, module: Any, config: ExternalConfig) -> None:
        super().__init__()
        self.config, self.module = config, module
        _own_names(self)

    @property
    def downsample_factor(self) -> int:
        """Pixels per latent along one side."""
        return self.config.downsample_factor

    def moments(self, pixels: Tensor) -> Tensor:
        """Posterior mean and log-variance: (B, 3, H, W) in [-1, 1] -> (B, 2C, h, w), float32 up."""
        check_pixels(pixels, self.module.config.in_channels, self.downsample_factor)
        moments = AUTOENCODERS[self.config.class_name].encode(self.module, pixels)
        return moments.to(torch.promote_types(moments.dtype, torch.float32))

    def sample(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Raw posterior sample z (B, C, h, w)."""
        mean, logvar = moments.chunk(2, dim=1)
        return mean + torch.exp(0.5 * logvar) * noise

    def latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Normalised posterior sample (B, C, h, w): what a denoiser learns."""
        shift, scale = shift_and_scale(self.config, moments)
        return (self.sample(moments, noise) - shift) * scale

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) to pixels (B, 3, H, W), about [-1, 1]."""
        shift, scale = shift_and_scale(self.config, latents)
        (pixels,) = self.module.decode(latents / scale + shift, return_dict=False)
        return pixels

    def kl(self, moments: Tensor) -> Tensor:
        """See `kl_divergence`; says nothing of an autoencoder without a posterior."""
        return kl_divergence(moments)

    def save(self, folder: Path | str) -> None:
        """Writes config.json and safetensors in diffusers' layout."""
        _save(self.module, folder, self.config)


def external_denoiser(
    module: Any, *, guidance: float = 3.5, keep_variance: bool = False
) -> ExternalDenoiser:
    """A diffusers denoiser, its weights shared, as a Denoiser.

    Args:
        module: an instance of a class in DENOISERS.
        guidance: what a guidance-distilled model is told.
        keep_variance: for training or sampling with a learned variance.

    Raises:
        LdmError: a class that is not known; lists those that are.
    """
    config = ExternalConfig.from_diffusers(_config_of(module, DENOISERS, "denoiser"))
    return ExternalDenoiser(module, replace(config, guidance=guidance, keep_variance=keep_variance))


def external_codec(module: Any) -> ExternalCodec:
    """A diffusers autoencoder, its weights shared, as a Codec.

    Raises:
        LdmError: a class that is not known; lists those that are.
    """
    values = _config_of(module, AUTOENCODERS, "autoencoder")
    return ExternalCodec(module, ExternalConfig.from_diffusers(values))


def fresh_denoiser(values: Mapping[str, Any]) -> ExternalDenoiser:
    """The denoiser of a config.json, with new weights; raises as `load_external_denoiser`."""
    config = ExternalConfig.from_diffusers(values)
    _check_class(config.class_name, DENOISERS, "denoiser")
    return ExternalDenoiser(_class(config.class_name).from_config(dict(config.values)), config)


def fresh_codec(values: Mapping[str, Any]) -> ExternalCodec:
    """The autoencoder of a config.json, with new weights; raises as `load_external_denoiser`."""
    config = ExternalConfig.from_diffusers(values)
    _check_class(config.class_name, AUTOENCODERS, "autoencoder")
    return ExternalCodec(_class(config.class_name).from_config(dict(config.values)), config)


def load_external_denoiser(folder: Path | str, **options: Any) -> ExternalDenoiser:
    """A denoiser from a directory in diffusers' layout, sharded or not; options as above.

    Raises:
        LdmError: code IO when there is none; the class is not known; diffusers is not installed.
    """
    module, values = _load(folder, DENOISERS, "denoiser")
    config = ExternalConfig.from_diffusers(values)
    return ExternalDenoiser(module, replace(config, **options))


def load_external_codec(folder: Path | str) -> ExternalCodec:
    """An autoencoder from a directory in diffusers' layout; raises as `load_external_denoiser`."""
    module, values = _load(folder, AUTOENCODERS, "autoencoder")
    return ExternalCodec(module, ExternalConfig.from_diffusers(values))


def _config_of(module: Any, table: Mapping[str, object], kind: str) -> dict[str, Any]:
    name = type(module).__name__
    _check_class(name, table, kind)
    return {**module.config, "_class_name": name}


def _check_class(name: str, table: Mapping[str, object], kind: str) -> None:
    if name not in table:
        raise LdmError(
            f"the {kind} class {name!r} of diffusers is not known here; known: {', '.join(table)}",
            where="_class_name",
            fix=f"add how it is called to ldm/models/external_calls.py, or use a known {kind}",
            code=ExitCode.CONFIG,
        )


def _load(folder: Path | str, table: Mapping[str, object], kind: str) -> tuple[Any, dict[str, Any]]:
    path = Path(folder) / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        name = str(values["_class_name"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LdmError(
            f"no configuration of a diffusers {kind} can be read ({error})",
            where=str(path),
            fix="give the directory with its config.json, such as MODEL/transformer or MODEL/vae",
            code=ExitCode.IO,
        ) from None
    _check_class(name, table, kind)
    class_ = _class(name)
    try:
        module = class_.from_pretrained(str(folder), use_safetensors=True, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise LdmError(
            f"the {name} cannot be loaded ({str(error).partition(chr(10))[0]})",
            where=str(folder),
            fix="copy or download it again, with its .safetensors",
            code=ExitCode.IO,
        ) from None
    # defaults that the file left out, and what diffusers does not know
    return module, {**values, **_config_of(module, table, kind)}


def _class(name: str) -> Any:
    try:
        import diffusers
    except ImportError:
        raise missing_package("diffusers", "diffusers", f"a {name}") from None
    return getattr(diffusers, name)


def _save(module: Any, folder: Path | str, config: ExternalConfig) -> None:
    module.save_pretrained(str(folder), safe_serialization=True)
    path = Path(folder) / "config.json"
    path.write_text(json.dumps(config.to_diffusers(), indent=2) + "\n", encoding="utf-8")


def _own_names(wrapper: nn.Module) -> None:
    """Lets a wrapper read and write the state of its `module` without a prefix of its own."""

    def without(_: Any, state: dict[str, Any], prefix: str, __: Any) -> None:
        for name in [name for name in state if name.startswith(f"{prefix}module.")]:
            state[prefix + name.removeprefix(f"{prefix}module.")] = state.pop(name)

    def again(_: Any, state: dict[str, Any], prefix: str, *__: Any) -> None:
        for name in [name for name in state if name.startswith(prefix)]:
            state[f"{prefix}module.{name.removeprefix(prefix)}"] = state.pop(name)

    wrapper.register_state_dict_post_hook(without)
    wrapper.register_load_state_dict_pre_hook(again)
