"""Low-rank adapters of a user, merged into a model when it is loaded, and kept in its metadata."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from ldm import storage
from ldm.errors import ExitCode, LdmError
from ldm.exchange.adapters import merge_file
from ldm.models.lora import WEIGHTS

if TYPE_CHECKING:
    from ldm.inference.images import Request
    from ldm.inference.pipeline import Pipeline


@dataclass(frozen=True)
class Merged:
    """The adapters in a model.

    Args:
        identity: hash and strength of each file, as metadata keep it; None without adapters.
        given: whole path and strength of each, as `--lora` takes it, one a line; None without
            adapters.
    """

    identity: str | None = None
    given: str | None = None


def merge_files(net: nn.Module, given: Sequence[str]) -> Merged:
    """Merges adapters into `net`, in place.

    Args:
        net: the denoiser.
        given: files, or directories with pytorch_lora_weights.safetensors, each PATH or
            PATH=STRENGTH; strength 1 is what was trained.

    Raises:
        LdmError: code IO for a file that is missing, damaged or for another network; code USAGE
            for a strength that is no number.
    """
    identities, places = [], []
    for text in given:
        path, strength = located(text)
        merge_file(net, path, strength)
        identities.append(f"{storage.sha256(path)}={strength:g}")
        places.append(f"{path.resolve()}={strength:g}")
    return Merged("\n".join(identities), "\n".join(places)) if identities else Merged()


def located(text: str) -> tuple[Path, float]:
    """The file and the strength of PATH or PATH=STRENGTH."""
    name, equals, number = text.rpartition("=")
    if Path(text).exists():  # a name may have a "=" of its own
        name, equals = text, ""
    path, strength = Path(name if equals else text), 1.0
    if equals:
        try:
            strength = float(number)
        except ValueError:
            strength = math.nan
    if not math.isfinite(strength):
        raise LdmError(
            f"{number!r} is not a strength", where="lora", fix=f"use --lora {name}=0.8, for example"
        )
    if not path.exists() and path.suffix != ".safetensors":
        raise LdmError(
            "there are no adapters", where=str(path), fix="check the path", code=ExitCode.IO
        )
    return (path / WEIGHTS if path.is_dir() else path), strength


def check_adapters(pipeline: Pipeline, request: Request) -> None:
    """Refuses a request of a picture that was drawn with other adapters.

    Raises:
        LdmError: says which ones.
    """
    if request.lora != pipeline.lora.identity:
        theirs = (request.lora_path or "none").replace("\n", ", ")
        ours = (pipeline.lora.given or "none").replace("\n", ", ")
        raise LdmError(
            f"the request was made with the adapters {theirs}; the model at hand has {ours}",
            where="lora",
            fix="load the model with the same files and strengths (--lora PATH=STRENGTH)",
        )
