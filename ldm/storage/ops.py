"""The lowest level of storage: named file operations with retry, locks, and errors users can mend.

Everything else in `ldm.storage` changes the disk through `op` alone, so tests can die, fail or keep
a log at each operation.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ldm.errors import ExitCode, LdmError

hook: Callable[..., None] | None = None
"""Called as hook(operation, *arguments) before every low-level operation. Only tests set it: to die
there, to raise an OSError there, or to keep a log."""

_log = logging.getLogger(__name__)


def op(name: str, *arguments: Any) -> None:
    """One operation of `_OPERATIONS`; transient faults are retried where repeating is safe.

    Raises:
        OSError: the fault that remained.
    """

    def once() -> None:
        if hook is not None:
            hook(name, *arguments)
        _OPERATIONS[name](*arguments)

    if name in _NOT_REPEATABLE:
        once()
    else:
        retry(once, f"{name} {arguments[0]}")


def retry(action: Callable[[], None], what: str) -> None:
    """Calls `action` again after a hiccup of a network share, at most five times, loudly.

    Raises:
        OSError: the fault that remained, or one that waiting does not mend.
    """
    for pause_s in _PAUSES_S:
        try:
            return action()
        except OSError as error:
            if error.errno not in _TRANSIENT:
                raise
            _log.warning("%s: %s; trying again", what, error.strerror)
            jitter = 0.5 + os.urandom(1)[0] / 255  # so that many ranks do not come back at once
            time.sleep(pause_s * jitter)
    return action()


@contextmanager
def faults(path: Path, doing: str, need: int = 0) -> Iterator[None]:
    """Turns an OSError of the body into an LdmError (code IO) with the free space and the fix.

    Args:
        path: what the body works on.
        doing: a verb for the message, as in "cannot <doing> it".
        need: bytes the body has to write, 0 if unknown.
    """
    try:
        yield
    except OSError as error:
        name = error.filename if isinstance(error.filename, str) else str(path)
        place = re.sub(r"\.(tmp|old|trash)-[0-9a-f]{8}", "", name)  # the name that users know
        what = f"cannot {doing} it: {error.strerror or error}"
        if error.errno in _SPACE:
            mount, free = room(path)
            needed = f"{need:,} bytes needed, " if need else ""
            what += f" ({needed}{free:,} bytes free on {mount})"
        elif error.errno == errno.EROFS:
            what += f" ({room(path)[0]})"
        fix = _FIXES.get(error.errno or 0, "check the path and the disk, then run again")
        raise LdmError(what, where=place, fix=fix, code=ExitCode.IO) from error


def damaged(path: Path, what: str) -> LdmError:
    """The error for a file or directory whose content cannot be right."""
    fix = "copy it again from where it came, or delete its directory to use an older one"
    return LdmError(what, where=str(path), fix=fix, code=ExitCode.IO)


def room(path: Path) -> tuple[Path, int]:
    """The mount point that holds `path`, existing or not, and the bytes free for us there."""
    place = Path(path).absolute()
    while not place.exists():
        place = place.parent
    usage = os.statvfs(place)
    while not os.path.ismount(place):
        place = place.parent
    return place, usage.f_bavail * usage.f_frsize


@contextmanager
def lock(path: Path, *, shared: bool = False) -> Iterator[bool]:
    """Yields whether the advisory lock was free; it ends with the body or with the process.

    Where the file system knows no locks the answer is True.
    """
    handle = os.open(path, os.O_RDONLY)
    free = True
    try:
        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            free = False
        except OSError as error:
            _log.debug("no locks on %s: %s", path, error)
        yield free
    finally:
        if free:  # explicitly: forked data workers share the handle and would keep the lock
            with suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)


def sibling(path: Path, kind: str) -> Path:
    """A new name beside `path`: on the same file system, and known to `clean_leftovers`."""
    return path.with_name(f"{path.name}.{kind}-{os.urandom(4).hex()}")


def remove(path: Path) -> None:
    """Deletes a file or a whole directory; symbolic links are deleted, not followed."""
    if path.is_symlink() or not path.is_dir():
        op("unlink", path)
        return
    for child in sorted(path.iterdir()):
        remove(child)
    op("rmdir", path)


def discard(path: Path) -> None:
    """Deletes what a failed operation left, if anything; a second fault must not hide the first."""
    try:
        if os.path.lexists(path):
            remove(path)
    except OSError as error:
        _log.warning("could not remove %s: %s; the next start does", path, error)


def _write(path: Path, writer: Callable[[Path], None]) -> None:
    writer(path)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _fsync_dir(path: Path) -> None:
    try:
        _fsync(path)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some shares cannot, and need not
            raise


def _append(path: Path, data: bytes) -> None:
    with open(path, "ab+", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(end - 1)
            if file.read(1) != b"\n":  # a torn last line must not swallow this one
                data = b"\n" + data
        if file.write(data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


_OPERATIONS: dict[str, Callable[..., Any]] = {
    "write": _write,
    "append": _append,
    "fsync": _fsync,
    "fsync_dir": _fsync_dir,
    "replace": os.replace,
    "rename": os.rename,
    "mkdir": os.mkdir,
    "link": os.link,
    "copy": shutil.copyfile,
    "unlink": os.unlink,
    "rmdir": os.rmdir,
}
# After a failed fsync the kernel counts the pages as clean, so asking again would lie; `write` is
# repeated together with its fsync; an append could double the line.
_NOT_REPEATABLE = frozenset({"write", "fsync", "fsync_dir", "append"})
_PAUSES_S = (0.05, 0.1, 0.2, 0.4, 0.8)
_TRANSIENT = frozenset({errno.ESTALE, errno.EIO, errno.EAGAIN, errno.ETIMEDOUT})
_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_FIXES = {
    errno.ENOSPC: "free some space or write to another disk, then run the same command again",
    errno.EDQUOT: "your quota is used up: delete files or ask for more, then run again",
    errno.EFBIG: "raise the file size limit (`ulimit -f unlimited`), then run again",
    errno.EROFS: "the file system is read-only: remount it or write to another disk",
    errno.EACCES: "check the permissions of the path and of the directories above it",
    errno.EPERM: "check the permissions of the path and of the directories above it",
    errno.EIO: "the disk or network share has a fault: check it, then run the same command again",
    errno.ESTALE: "the network share went away: mount it again, then run the same command again",
    errno.ENOENT: "check the path for a typing error",
}
