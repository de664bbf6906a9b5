"""The one place where a pickle is opened, by an unpickler that knows tensors and containers only.

Published weights are sometimes pickles (.ckpt, .bin, .pth), which can run any code when read as
usual. torch's restricted unpickler knows tensors, numbers, texts and containers; whatever else a
file asks for is refused before anything of it runs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ldm.checkpoint.tensors import save_tensors
from ldm.errors import ExitCode, LdmError

WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
"""Where training programs put the weights inside what they save."""


def load_pickle_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickled state_dict, on the CPU; runs nothing that the file brings.

    A Lightning checkpoint's `state_dict` is unwrapped; what stands beside it (epochs, optimizer
    states, settings) is left out.

    Args:
        path: a file that `torch.save` wrote.

    Raises:
        LdmError: code IO, for a file that is missing or damaged, that asks for anything but tensors
            and plain values, or that holds no tensors by name.
    """
    path = Path(path)
    if not path.is_file():
        raise LdmError(
            "there is no such file", where=str(path), fix="check the path", code=ExitCode.IO
        )
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # it raises a dozen types, and a hostile file any of them
        raise _refused(path, error) from error
    for key in WRAPPERS:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping):
        raise _nothing(path, f"it holds a {type(found).__name__}")
    tensors = {str(name): value for name, value in found.items() if isinstance(value, Tensor)}
    if not tensors:
        raise _nothing(path, f"its entries are {', '.join(map(str, list(found)[:5])) or 'none'}")
    return tensors


def convert_pickle(source: Path, target: Path) -> int:
    """Writes the tensors of a pickle as safetensors; returns how many.

    Raises:
        LdmError: as `load_pickle_tensors`; code USAGE when `target` exists or has another ending.
    """
    if Path(source).suffix == ".safetensors":
        raise LdmError(
            f"{source} is no pickle: its name says safetensors",
            where="IN",
            fix="use it as it is",
        )
    if Path(target).suffix != ".safetensors":
        raise LdmError(
            f"{target} does not end in .safetensors",
            where="OUT",
            fix=f"use {Path(source).with_suffix('.safetensors').name}",
        )
    if Path(target).exists():
        raise LdmError(f"{target} exists", where="OUT", fix="name a new file, or remove it")
    tensors = load_pickle_tensors(source)
    save_tensors(Path(target), tensors, {"converted_from": Path(source).name})
    return len(tensors)


def _refused(path: Path, error: Exception) -> LdmError:
    asked = re.search(r"(?:GLOBAL|[Uu]nsupported global:?)\s+(?:GLOBAL )?([\w.]+)", str(error))
    what = f"it asks for {asked[1]}" if asked else type(error).__name__
    return LdmError(
        f"this file is no plain set of tensors ({what}); nothing of it was run",
        where=str(path),
        fix="get the model as safetensors from its author; do not load this file with other "
        "programs unless you trust it like a program",
        code=ExitCode.IO,
    )


def _nothing(path: Path, what: str) -> LdmError:
    return LdmError(
        f"there are no named tensors in this file: {what}",
        where=str(path),
        fix="give a state_dict, or a checkpoint that has one",
        code=ExitCode.IO,
    )
