"""Weight files as others publish them: one file, shards with an index, variants. Never a pickle."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from ldm.checkpoint.tensors import load_tensors
from ldm.errors import ExitCode, LdmError

M = TypeVar("M", bound=nn.Module)

STEMS = ("diffusion_pytorch_model", "model")
PICKLES = (".ckpt", ".bin", ".pth", ".pt")
SHOWN = 5


def folder_tensors(folder: Path, *, variant: str | None = None) -> dict[str, Tensor]:
    """All tensors of one component of a diffusers directory.

    Args:
        folder: with STEM.safetensors, or STEM.safetensors.index.json and its shards.
        variant: take STEM.VARIANT.safetensors, such as fp16; None takes the plain file, and a
            variant where there is nothing else.

    Raises:
        LdmError: code IO, for no file, a damaged one, a shard that is missing, or pickles only.
    """
    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder, variant=variant):
        tensors |= load_tensors(path)
    return tensors


def weight_files(folder: Path, *, variant: str | None = None) -> list[Path]:
    """The files that `folder_tensors` reads; errors as there."""
    wanted = [variant] if variant else [None, "fp16", "bf16"]
    for name in wanted:
        for stem in STEMS:
            plain = folder / (f"{stem}.{name}.safetensors" if name else f"{stem}.safetensors")
            index = folder / f"{stem}.safetensors.index{f'.{name}' if name else ''}.json"
            if plain.is_file():
                return [plain]
            if index.is_file():
                return shards(index)
    for path in sorted(folder.glob("*")):
        refuse_pickle(path)
    which = f" of the variant {variant}" if variant else ""
    raise LdmError(
        f"there are no safetensors weights{which} here",
        where=str(folder),
        fix="fetch the model again, with its safetensors files",
        code=ExitCode.IO,
    )


def shards(index: Path) -> list[Path]:
    """The files that an index names, each once.

    Raises:
        LdmError: code IO, when it cannot be read or names a file outside its folder.
    """
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if not names or any(Path(name).name != name for name in names):
            raise ValueError("it names no files beside it")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LdmError(
            f"this index of shards cannot be used: {error}",
            where=str(index),
            fix="fetch the model again",
            code=ExitCode.IO,
        ) from error
    return [index.parent / name for name in names]


def refuse_pickle(path: Path) -> None:
    """Refuses a file that could run code when it is read.

    Raises:
        LdmError: code IO, with the command that converts it safely.
    """
    if path.suffix in PICKLES:
        raise LdmError(
            f"{path.name} is a pickle: reading it as others do would run any code inside it",
            where=str(path),
            fix=f"ldm convert {path} {path.with_suffix('.safetensors').name} reads its tensors "
            "only, and refuses a file that holds anything else",
            code=ExitCode.IO,
        )


def filled(make: Callable[[], M], tensors: Mapping[str, Tensor], where: str) -> M:
    """A module built without memory, holding these tensors as float32; errors as `check_names`.

    Args:
        make: () -> module; called on the meta device, so that no random numbers are drawn.
        tensors: its weights under its own names.
        where: the file, for messages.
    """
    with torch.device("meta"):
        module = make()
    state = module.state_dict()
    check_names(tensors, {name: tuple(value.shape) for name, value in state.items()}, where)
    values = {name: _in_float32(tensors[name]) for name in state}
    if module.state_dict().keys() >= {name for name, _ in module.named_buffers()}:
        module.load_state_dict(values, assign=True)
    else:  # tables that no file holds have to be computed
        with torch.random.fork_rng(devices=[]):
            module = make()
        module.load_state_dict(values)
    return module.eval().requires_grad_(False)


def check_names(
    tensors: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]], where: str
) -> None:
    """Refuses weights that lack a name, have one too many, or another shape.

    Raises:
        LdmError: code IO, with some names of each kind.
    """
    faults = {
        "missing": sorted(wanted.keys() - tensors.keys()),
        "unknown": sorted(tensors.keys() - wanted.keys()),
        "of another shape": sorted(
            name
            for name in wanted.keys() & tensors.keys()
            if tuple(tensors[name].shape) != wanted[name]
        ),
    }
    said = [f"{len(names)} {kind} ({some(names)})" for kind, names in faults.items() if names]
    if said:
        raise LdmError(
            f"these weights do not fit their configuration: {'; '.join(said)}",
            where=where,
            fix="fetch the model again; a model of another layout cannot be read",
            code=ExitCode.IO,
        )


def some(names: list[str]) -> str:
    """The first few of many names."""
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def _in_float32(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value
