"""Training that begins with somebody's weights: the denoiser of a run or of a published model."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch import nn

from ldm import storage
from ldm.checkpoint import Contract, find_checkpoint, load_contract
from ldm.config.models import PretrainedConfig
from ldm.config.schema import DiffusionConfig
from ldm.errors import ExitCode, LdmError
from ldm.exchange.adapters import merge_trained
from ldm.exchange.directory import denoiser_folder, load_denoiser_folder
from ldm.exchange.opening import Options, open_denoiser, schedule_of
from ldm.exchange.schedulers import Schedule
from ldm.exchange.sources import is_published
from ldm.models.text import FrozenTextEncoder

log = logging.getLogger(__name__)

TEXT_WIDTHS = ("cross_attention_dim", "joint_attention_dim", "text_dim")


def initial_denoiser(
    config: PretrainedConfig,
    channels: int,
    out_channels: int,
    text: FrozenTextEncoder,
    checkpointing: bool = False,
) -> nn.Module:
    """The denoiser of `config.path` with its weights, ready to train.

    Args:
        config: where it is.
        channels: of the latents.
        out_channels: of the prediction, twice as many with a learned variance.
        text: the encoder it will be trained with.
        checkpointing: recompute activations in the backward pass.

    Raises:
        LdmError: code CONFIG, when it does not fit the latents or the text encoder; code IO when
            there is none.
    """
    if is_published(config.path):
        net = open_denoiser(config.path, _options(config))
    else:
        folder = find_checkpoint(Path(config.path))
        with storage.hold(folder):
            net = load_denoiser_folder(denoiser_folder(folder))
            merge_trained(net, folder)
    shape: Any = net.config
    faults = []
    if (found := getattr(shape, "in_channels", channels)) != channels:
        faults.append(f"it takes {found} channels, and the latents have {channels} (vae.path)")
    given = getattr(shape, "out_channels", None) or found
    if given == 2 * channels != out_channels:
        faults.append("it predicts a variance, too: set diffusion.learned_variance=true")
    elif given != out_channels and hasattr(shape, "out_channels"):
        faults.append(f"it returns {given} channels, {out_channels} are wanted")
    for name in TEXT_WIDTHS:
        width = getattr(shape, name, None)
        if width is not None and width != text.width:
            faults.append(f"it reads text of width {width}, the encoder gives {text.width}")
    if faults:
        raise LdmError(
            f"the pretrained denoiser does not fit: {'; '.join(faults)}",
            where="model.path",
            fix=f"use its own parts: vae.path={config.path} and text.path={config.path}",
            code=ExitCode.CONFIG,
        )
    trained: Any = net.train().requires_grad_(True)
    trained.gradient_checkpointing = checkpointing
    return net


def check_objective(model: Any, diffusion: DiffusionConfig) -> None:
    """Refuses to go on training with another objective than the weights were made with.

    Raises:
        LdmError: code CONFIG, with what they were trained with.
    """
    if not isinstance(model, PretrainedConfig) or model.other_objective:
        return
    found: Contract | Schedule
    if is_published(model.path):
        found = schedule_of(model.path, _options(model))
    else:
        found = load_contract(find_checkpoint(Path(model.path)))
    now = (diffusion.process, diffusion.prediction)
    if (found.process, found.prediction) != now:
        raise LdmError(
            f"the pretrained denoiser predicts {found.prediction} on process {found.process}, the "
            f"configuration wants {diffusion.prediction} on {diffusion.process}",
            where="model.path",
            fix=f"diffusion.process={found.process} diffusion.prediction={found.prediction}, or "
            "model.other_objective=true to train it over",
            code=ExitCode.CONFIG,
        )


def _options(config: PretrainedConfig) -> Options:
    return Options(config.prediction, config.variant)
