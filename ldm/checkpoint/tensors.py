"""Tensors on disk: safetensors only, written atomically and read strictly. Never pickle."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ldm import storage
from ldm.errors import ExitCode, LdmError

WEIGHTS = "diffusion_pytorch_model.safetensors"
CONFIG = "config.json"


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a safetensors file atomically, one tensor at a time: no second copy in memory.

    The container is written here because `safetensors.torch.save_file` leaves files that only
    their owner can read (mode 0600) and hides the cause of a failed write. The bytes are the same.
    Format: https://github.com/huggingface/safetensors#format

    Args:
        path: the file; its directory must exist.
        tensors: any shape and device; views and tied tensors are stored in full.
        metadata: text facts; `format: pt` is always there.

    Raises:
        LdmError: code IO, e.g. when the disk is full; `path` is as it was.
    """
    assert sys.byteorder == "little", "safetensors is little-endian"
    # Wide types first keep every tensor aligned.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name in order:
        value, start = tensors[name], end
        end += value.numel() * value.element_size()
        dtype = _DTYPES[value.dtype]
        header[name] = {"dtype": dtype, "shape": list(value.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def write(target: Path) -> None:
        with open(target, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in order:
                flat = tensors[name].detach().cpu().reshape(-1)
                file.write(flat.view(torch.uint8).numpy().data)

    storage.write_file(path, write, need=8 + len(text) + end)


def load_tensors(path: Path, *, finite: bool = True) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU, independent of the file afterwards.

    Args:
        path: the file.
        finite: refuse NaN and infinity (one pass over the floating-point values).

    Raises:
        LdmError: code IO, if the file is missing, truncated, not safetensors or not finite; it
            names the file and the expected and actual bytes.
    """
    path = Path(path)
    if not path.is_file():
        raise LdmError(
            "there is no such file", where=str(path), fix="check the path", code=ExitCode.IO
        )
    try:
        _check_size(path)
        with safe_open(path, framework="pt") as file:
            # Copies: a mapping would keep a deleted checkpoint on disk, and die with a short file.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except _UNREADABLE as error:
        raise _damaged(path, f"cannot be read as safetensors: {error}") from error
    for name, value in tensors.items() if finite else ():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise _damaged(path, f"holds NaN or infinity in {name!r}")
    return tensors


def load_strict(module: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Copies `tensors` into `module` if names, shapes and types fit exactly; else changes nothing.

    The prefixes of torch.compile and of data-parallel wrappers are ignored. A narrower
    floating-point type is widened, which loses nothing; any other difference of type is an error.

    Args:
        module: the model, possibly wrapped.
        tensors: its weights, as of `load_tensors`.
        where: the file, for the message.

    Raises:
        LdmError: code IO, with at most five names of each kind.
    """
    given = plain_names(tensors)
    wanted = plain_names(module.state_dict())
    faults = [
        _listing("missing", sorted(wanted.keys() - given.keys()), str),
        _listing("unexpected", sorted(given.keys() - wanted.keys()), str),
    ]
    both = sorted(wanted.keys() & given.keys())
    shapes = [name for name in both if wanted[name].shape != given[name].shape]
    types = [name for name in both if not _widens(given[name].dtype, wanted[name].dtype)]
    faults += [
        _listing(
            "of another shape",
            shapes,
            lambda n: f"{n} {tuple(given[n].shape)}, the model has {tuple(wanted[n].shape)}",
        ),
        _listing(
            "of another type",
            types,
            lambda n: f"{n} {given[n].dtype}, the model has {wanted[n].dtype}",
        ),
    ]
    if any(faults):
        raise LdmError(
            f"these weights do not fit {type(module).__name__}: {'; '.join(filter(None, faults))}",
            where=where,
            fix="use the configuration that the weights were trained with, or other weights",
            code=ExitCode.IO,
        )
    with torch.no_grad():
        for name, value in wanted.items():  # shares memory with the module
            value.copy_(given[name])


def save_module(directory: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Writes config.json and the weights in diffusers' layout; the directory is made if missing.

    Args:
        directory: e.g. `<checkpoint>/transformer`.
        tensors: a state_dict; prefixes of wrappers are dropped.
        config: diffusers' config with `_class_name`.

    Raises:
        LdmError: code IO.
    """
    assert "_class_name" in config, "diffusers finds the class by its name"
    storage.make_directory(directory)
    storage.write_json(Path(directory) / CONFIG, dict(config))
    save_tensors(Path(directory) / WEIGHTS, plain_names(tensors))


def load_module(directory: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights and the config of a directory in diffusers' layout.

    Raises:
        LdmError: code IO.
    """
    config = storage.read_json(Path(directory) / CONFIG)
    if not isinstance(config, dict):
        raise _damaged(Path(directory) / CONFIG, "is not a JSON object")
    return load_tensors(Path(directory) / WEIGHTS), config


def plain_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors without the prefixes of torch.compile and of data-parallel wrappers."""
    names = [name.replace("_orig_mod.", "") for name in tensors]
    while names and all(name.startswith("module.") for name in names):
        names = [name.removeprefix("module.") for name in names]
    assert len(set(names)) == len(tensors), "two tensors differ by their wrapper's prefix only"
    return dict(zip(names, tensors.values(), strict=True))


def _widens(source: torch.dtype, target: torch.dtype) -> bool:
    both_float = source.is_floating_point and target.is_floating_point
    return source == target or (both_float and torch.promote_types(source, target) == target)


def _listing(kind: str, names: Sequence[str], describe: Callable[[str], str]) -> str:
    if not names:
        return ""
    shown: Iterable[str] = (describe(name) for name in names[:_NAMES_SHOWN])
    more = ", ..." if len(names) > _NAMES_SHOWN else ""
    return f"{len(names)} {kind} ({', '.join(shown)}{more})"


def _check_size(path: Path) -> None:
    """Compares the file's size with what its header promises: the usual fault is a short file."""
    actual = path.stat().st_size
    with open(path, "rb") as file:
        expected = 8 + _header_length(file)
        if expected > 8 + _HEADER_LIMIT:
            raise ValueError(f"its header claims {expected - 8:,} bytes")
        if actual >= expected:
            header = json.loads(file.read(expected - 8))
            offsets = [
                entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"
            ]
            expected += max(offsets, default=0)
    if actual != expected:
        raise ValueError(f"it has {actual:,} bytes, expected {expected:,}")


def _header_length(file: BinaryIO) -> int:
    head = file.read(8)
    return int.from_bytes(head, "little") if len(head) == 8 else 0


def _damaged(path: Path, what: str) -> LdmError:
    fix = "copy or download it again, or use an older checkpoint"
    return LdmError(what, where=str(path), fix=fix, code=ExitCode.IO)


# A hostile header reaches these by its nesting and by entries that describe no tensor.
_UNREADABLE = (
    SafetensorError,
    OSError,
    RuntimeError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
)
_NAMES_SHOWN = 5
_HEADER_LIMIT = 8 * 2**20
"""Bytes; the header of Stable Diffusion XL's UNet has 0.2 MB."""
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
