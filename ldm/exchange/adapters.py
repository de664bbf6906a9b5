"""Adapters from files, merged into the network that they are for."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn

from ldm.checkpoint import load_tensors
from ldm.errors import ExitCode, LdmError
from ldm.models.lora import FOLDER, WEIGHTS, from_tensors, merge, stated_alphas


def merge_trained(net: nn.Module, checkpoint: Path) -> None:
    """Merges the adapters that the run of a checkpoint trained, where it trained adapters."""
    if (path := checkpoint / FOLDER / WEIGHTS).is_file():
        merge_file(net, path)


def merge_file(net: nn.Module, path: Path, strength: float = 1.0) -> None:
    """Merges the adapters in one safetensors file into `net`; raises as `from_tensors`."""
    tensors = load_tensors(path)
    try:
        with safe_open(path, "pt") as file:
            alphas = stated_alphas(file.metadata() or {}, str(path))
    except (SafetensorError, ValueError, AttributeError, TypeError) as error:
        raise LdmError(
            f"its metadata cannot be read ({error})",
            where=str(path),
            fix="write or fetch the adapters again",
            code=ExitCode.IO,
        ) from None
    merge(net, from_tensors(tensors, net, str(path), alphas), strength)
