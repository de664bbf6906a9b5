"""The step directories of a run: which there are, which one to trust, which ones to delete."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ldm.errors import LdmError
from ldm.storage.directories import delete, make_directory, problem
from ldm.storage.files import write_text
from ldm.storage.ops import damaged, faults, lock

LATEST = "LATEST"

_log = logging.getLogger(__name__)
_STEP = re.compile(r"step-(\d{8,})(\.old-[0-9a-f]{8})?")


def step_name(step: int) -> str:
    """The directory name of a step."""
    return f"step-{step:08d}"


def step_of(directory: Path) -> int | None:
    """The step of a checkpoint directory, None if its name is not one."""
    match = _STEP.fullmatch(Path(directory).name)
    return int(match[1]) if match else None


def step_directories(run_dir: Path) -> list[Path]:
    """All checkpoint directories, newest first, verified or not; [] if there is no such run.

    Raises:
        LdmError: code IO, if `run_dir` cannot be listed.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        return []
    with faults(run_dir, "list"):
        names = [entry.name for entry in os.scandir(run_dir) if entry.is_dir()]
    # A checkpoint moved aside by an interrupted `publish` comes after the one that replaces it.
    found = [(int(m[1]), m[2] is None, name) for name in names if (m := _STEP.fullmatch(name))]
    return [run_dir / name for _, _, name in sorted(found, reverse=True)]


def write_latest(run_dir: Path, name: str) -> None:
    """Points LATEST at a checkpoint. For people and scripts: `newest_verified` does not trust it.

    Raises:
        LdmError: code IO.
    """
    write_text(Path(run_dir) / LATEST, f"{name}\n")


def newest_verified(run_dir: Path) -> Path | None:
    """The newest checkpoint that verifies, or None; every damaged one is named in a warning."""
    for directory in step_directories(run_dir):
        if (fault := problem(directory)) is None:
            return directory
        _log.warning("skipping a damaged checkpoint, trying the one before: %s", fault)
    return None


def retire(run_dir: Path, keep: int = 2, *, trusted: Path | None = None) -> list[Path]:
    """Deletes the checkpoints older than the newest `keep` verified ones; returns those deleted.

    Damaged ones do not count and one that is being read (`hold`) stays, so the last verified one is
    never deleted.

    Args:
        run_dir: the run.
        keep: >= 1; with 2 or more a run survives damage to its newest checkpoint.
        trusted: a checkpoint published a moment ago, which need not be hashed again.

    Raises:
        LdmError: code IO.
    """
    assert keep >= 1, "a run keeps at least one checkpoint"
    intact, deleted = 0, []
    directories = step_directories(run_dir)
    with faults(Path(run_dir), "delete old checkpoints of"):
        for directory in directories if len(directories) > keep else []:
            if intact >= keep:
                deleted += [directory] if delete(directory) else []
            elif directory == trusted or (fault := problem(directory)) is None:
                intact += 1
            else:
                _log.warning("a damaged checkpoint does not count as kept: %s", fault)
    return deleted


@contextmanager
def hold(directory: Path) -> Iterator[None]:
    """Keeps `retire` of another process away from a checkpoint while it is being loaded.

    Raises:
        LdmError: code IO, if it is gone or being deleted; then take `newest_verified` again.
    """
    directory = Path(directory)
    with faults(directory, "read"), lock(directory, shared=True) as free:
        if not free or not directory.exists():
            raise damaged(directory, "is being deleted by another process")
        yield


@contextmanager
def claim(run_dir: Path) -> Iterator[None]:
    """Holds a run for one writer; the directory is made if missing.

    Raises:
        LdmError: if another process trains in this directory.
    """
    run_dir = Path(run_dir)
    make_directory(run_dir)
    with faults(run_dir, "lock"), lock(run_dir) as free:
        if not free:
            raise LdmError(
                "another process is already writing this run",
                where=str(run_dir),
                fix="wait for it or stop it, or choose another run.dir",
            )
        yield
