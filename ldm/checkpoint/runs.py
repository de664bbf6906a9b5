"""Saving a checkpoint of a run, by one rank for all, and finding the one to load."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ldm import storage
from ldm.errors import ExitCode, LdmError


def save_checkpoint(
    run_dir: Path,
    step: int,
    write: Callable[[Path], object],
    *,
    latest: bool = True,
    keep: int = 2,
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """Publishes `<run_dir>/step-<step>`, then LATEST, and only then deletes older checkpoints.

    Every rank calls it; rank 0 writes, and all raise the same error if that fails. Afterwards
    nothing that was there before is lost, whether it failed, was killed or the power went.

    Args:
        run_dir: the run.
        step: optimizer steps done.
        write: fills the directory it is given.
        latest: point LATEST at the new checkpoint.
        keep: verified checkpoints to keep, >= 1.
        facts: JSON facts for the manifest, beside the step.

    Raises:
        LdmError: code IO, on every rank; the run can go on and try again later.
    """
    final = Path(run_dir) / storage.step_name(step)
    fault: Exception | None = None
    if not _is_distributed() or dist.get_rank() == 0:
        try:
            need = _size_of_newest(final.parent)
            with storage.publish(final, {"step": step, **(facts or {})}, need=need) as directory:
                write(directory)
            if latest:
                storage.write_latest(final.parent, final.name)
            storage.retire(final.parent, keep, trusted=final)
        except Exception as error:
            fault = error
    agree(fault)
    return final


def agree(fault: Exception | None) -> None:
    """Exchanges the outcome of a step that may fail on some ranks: all go on, or all raise.

    Without it the others would wait in their next collective for a rank that has left.

    Args:
        fault: what happened on this rank, None if it succeeded.

    Raises:
        Exception: `fault` on the rank that had it; elsewhere an LdmError with its text and code.
    """
    if _is_distributed():
        rank, world = dist.get_rank(), dist.get_world_size()
        uses_gpu = dist.get_backend() == "nccl"
        device = torch.device("cuda" if uses_gpu else "cpu")
        first = torch.tensor(world if fault is None else rank, device=device)
        dist.all_reduce(first, op=dist.ReduceOp.MIN)
        culprit = int(first)
        if culprit < world:
            message = _encode(fault).to(device)
            dist.broadcast(message, src=culprit)
            if fault is None:
                raise _decode(message, culprit)
    if fault is not None:
        raise fault


def find_checkpoint(path: Path) -> Path:
    """The verified checkpoint to load: `path` itself if it is one, else the newest of a run.

    A damaged newest one is skipped with a warning that names the bad file.

    Raises:
        LdmError: code USAGE if `path` is no run and no checkpoint, code IO if all are damaged.
    """
    path = Path(path)
    if storage.step_of(path.resolve()) is not None or (path / storage.MANIFEST).is_file():
        storage.verify(path)
        return path
    candidates = storage.step_directories(path)
    if found := storage.newest_verified(path):
        return found
    if candidates:
        raise LdmError(
            f"all checkpoints of this run are damaged ({', '.join(c.name for c in candidates)})",
            where=str(path),
            fix="the warnings above name the bad files: copy them again (vae/ and text_encoder/ "
            "are one file in all checkpoints of a run), or train anew in another run.dir",
            code=ExitCode.IO,
        )
    found_there = "it has no step-*/ with a MANIFEST.json" if path.is_dir() else "it does not exist"
    raise LdmError(
        f"is not a run directory: {found_there}",
        where=str(path),
        fix="give the run.dir of a training run that has saved, or one of its step-*/ directories",
    )


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _size_of_newest(run_dir: Path) -> int:
    """Bytes that the newest checkpoint takes for itself; hard-linked files cost nothing again."""
    newest = next(iter(storage.step_directories(run_dir)), None)
    files = newest.rglob("*") if newest else ()
    own = [found.st_size for found in map(Path.lstat, files) if found.st_nlink == 1]
    return sum(own)


def _encode(fault: Exception | None) -> torch.Tensor:
    """An error as a fixed number of bytes: (_MESSAGE_BYTES,) uint8."""
    known = fault if isinstance(fault, LdmError) else None
    fields = {
        "what": (known.what if known else f"{type(fault).__name__}: {fault}")[:600],
        "where": (known.where if known else "")[:200],
        "fix": (known.fix if known else "see the log of that rank")[:200],
        "code": int(known.code if known else ExitCode.BUG),
    }
    data = json.dumps(fields).encode()  # at most 12 bytes a character
    return torch.tensor(list(data.ljust(_MESSAGE_BYTES, b"\0")), dtype=torch.uint8)


def _decode(message: torch.Tensor, rank: int) -> LdmError:
    fields = json.loads(bytes(message.tolist()).rstrip(b"\0"))
    what = f"rank {rank}: {fields['what']}"
    code = ExitCode(fields["code"])
    return LdmError(what, where=fields["where"], fix=fields["fix"], code=code)


_MESSAGE_BYTES = 16_384
