"""What a pipeline is made of, from a run of ours or from a published model. Draws nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm import storage
from ldm.build import load_denoiser, load_vae_directory
from ldm.checkpoint import Contract, find_checkpoint, load_contract, load_null
from ldm.checkpoint.contract import CONTRACT
from ldm.errors import LdmError
from ldm.exchange.adapters import merge_trained
from ldm.exchange.opening import Options, open_published, refuse_useless
from ldm.exchange.sources import is_published
from ldm.models.text import FrozenTextEncoder, restore_text_encoder
from ldm.types import TextEmbedding


@dataclass(frozen=True)
class Loaded:
    """The parts of a pipeline, on the CPU; see `Pipeline` for each."""

    vae: Any
    encoder: FrozenTextEncoder
    net: nn.Module
    null: TextEmbedding
    contract: Contract
    name: str
    identity: str


def load_model(source: Path | str, options: Options = Options()) -> Loaded:  # noqa: B008, frozen
    """The newest verified checkpoint of a run, one checkpoint, or a published model.

    Raises:
        LdmError: code IO or USAGE when there is no model at `source`, or it is damaged; code CONFIG
            for a published one that has no counterpart here.
    """
    refuse_useless(source, options)
    if is_published(source):
        found = open_published(source, options)
        return Loaded(
            found.vae,
            found.encoder,
            found.net,
            found.null,
            found.contract,
            found.name,
            found.identity,
        )
    folder = find_checkpoint(Path(source))
    if not (folder / CONTRACT).is_file():
        raise LdmError(
            "this checkpoint has no denoiser to draw with",
            where=str(folder),
            fix="give the run directory of train_diffusion.py",
        )
    with storage.hold(folder):  # a run that trains on does not delete it meanwhile
        contract = load_contract(folder)
        net, _ = load_denoiser(folder)
        merge_trained(net, folder)
        null = load_null(folder)
        settings, limit = contract.text_settings, contract.max_tokens
        encoder = restore_text_encoder(folder, settings, max_tokens=limit)
        encoder.zero_null = not bool(null.tokens.any())  # no contract says it, the tokens do
        return Loaded(
            load_vae_directory(folder / "vae"),
            encoder,
            net,
            null,
            contract,
            str(folder.resolve()),
            storage.sha256(folder / storage.MANIFEST),
        )


def usable_device(wanted: torch.device | str | None) -> torch.device:
    """The device to draw on; None is a GPU when there is one.

    Raises:
        LdmError: code USAGE for a device that does not exist here.
    """
    if wanted is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise LdmError(
            f"there is no device {str(wanted)!r} here", where="device", fix="use cpu"
        ) from None
    return device
