"""Single files that survive a crash: atomic writes, JSON, and the lines of metrics.jsonl."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ldm.storage.ops import damaged, discard, faults, op, retry, sibling

_log = logging.getLogger(__name__)


def write_file(path: Path, writer: Callable[[Path], object], *, need: int = 0) -> None:
    """Makes `path` atomically: readers and crashes see the old content or the new, never a mixture.

    Args:
        path: the file; its directory must exist.
        writer: fills the path it is given, a temporary name in the same directory.
        need: bytes expected, for the message if the disk is full; 0 if unknown.

    Raises:
        LdmError: code IO, with the cause, the free space and the fix; `path` is as it was.
    """
    path = Path(path)
    temporary = sibling(path, "tmp")

    def store() -> None:
        op("write", temporary, writer)
        op("fsync", temporary)

    with faults(path, "write", need):
        try:
            retry(store, f"write {path}")
            op("replace", temporary, path)
        except BaseException:
            discard(temporary)
            raise
        op("fsync_dir", path.parent)


def write_bytes(path: Path, data: bytes) -> None:
    """`write_file` with known content."""
    write_file(path, lambda target: target.write_bytes(data), need=len(data))


def write_text(path: Path, text: str) -> None:
    """`write_file` with UTF-8 text."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """`write_file` with JSON; floats come back bit for bit."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The value of a JSON file.

    Raises:
        LdmError: code IO, if it is missing, unreadable or not JSON.
    """
    path = Path(path)
    with faults(path, "read"):
        data = path.read_bytes()
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"is not valid JSON ({error})") from error


def append_line(path: Path, line: str) -> None:
    """Adds one JSON line, for metrics.jsonl. Not synced: a power cut may lose the last lines.

    Raises:
        LdmError: code IO, e.g. when the disk is full.
    """
    assert "\n" not in line, "one line at a time"
    with faults(Path(path), "append to"):
        op("append", Path(path), line.encode() + b"\n")


def read_lines(path: Path) -> list[str]:
    """The whole JSON lines of a file, [] if there is none; torn ones are skipped with a warning.

    Raises:
        LdmError: code IO, if it cannot be read.
    """
    path = Path(path)
    if not path.exists():
        return []
    with faults(path, "read"):
        pieces = path.read_bytes().split(b"\n")
    lines = []
    for number, piece in enumerate(pieces, start=1):
        if not piece:
            continue
        try:
            whole = isinstance(json.loads(piece), dict)
        except ValueError:
            whole = False
        if not whole:
            _log.warning("%s: line %d was torn by a crash and is skipped", path, number)
        else:
            lines.append(piece.decode())
    return lines


def truncate_metrics(path: Path, step: int) -> None:
    """Keeps the rows with "step" <= `step`, byte for byte, so that a resumed run repeats none.

    Raises:
        LdmError: code IO.
    """
    path = Path(path)
    kept = [line for line in read_lines(path) if json.loads(line).get("step", 0) <= step]
    text = "".join(f"{line}\n" for line in kept)
    if path.exists() and path.read_bytes() != text.encode():
        write_text(path, text)


def sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal. OSError if unreadable or a symbolic link."""
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
