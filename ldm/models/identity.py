"""What decides a frozen model's outputs, as a hash: equal wherever the files lie."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL


def weights_sha256(model: nn.Module) -> str:
    """Hash of all parameters by name, shape and float32 value.

    Hashed as float32, so a bfloat16 file has one identity however it is loaded.
    """
    return tensors_sha256(dict(model.named_parameters()))


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """`weights_sha256` of tensors that are in no module."""
    digest = hashlib.sha256()
    for name, weight in sorted(tensors.items()):
        # transformers dropped this prefix in 5.6; the weights did not change
        digest.update(f"{name.removeprefix('text_model.')}{list(weight.shape)}".encode())
        digest.update(weight.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def autoencoder_sha256(vae: AutoencoderKL, config: AutoencoderConfig) -> str:
    """Hash of a VAE's weights with `config`: equal weights in other norm groups are another VAE."""
    return value_sha256({"weights": weights_sha256(vae), "config": config.to_diffusers()})


def value_sha256(values: Mapping[str, Any]) -> str:
    """Hash of JSON values, independent of the order of keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
