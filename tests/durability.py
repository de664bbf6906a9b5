"""A model of what a power cut may leave on a disk, fed by the operation log of `ldm.storage`.

File content counts only once synced, directory entries only once their directory is; anything
pending may or may not have reached the disk, in any combination. Nothing here touches the program.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.storage import ops

Tree = dict[str, Any]  # name -> bytes of a file, or the Tree of a directory
Change = tuple[str, str, Any]  # ("add" | "drop" | "move", name, node | None | (new name, node))


@dataclass
class File:
    data: bytes
    durable: bytes | None = None


@dataclass
class Directory:
    durable: dict[str, Any] = field(default_factory=dict)
    pending: list[Change] = field(default_factory=list)

    def now(self) -> dict[str, Any]:
        return _apply(self.durable, self.pending)


class Disk:
    """Watches `root` from `start()` on; `states()` are the trees a power cut may leave now."""

    def __init__(self, root: Path) -> None:
        self.path, self.last = root, None
        self.root = _read(root)
        self.seen: dict[str, Tree] = {}

    def __call__(self, name: str, *arguments: Any) -> None:
        """The hook: called before an operation, so the one before has happened."""
        self.settle()
        self.last = (name, *arguments)

    def settle(self) -> None:
        """Accounts for the last operation and remembers all states possible from here."""
        if self.last is not None:
            name, *paths = self.last
            self.last = None
            getattr(self, f"_{name}")(*paths)
        for tree in _states(self.root, top=True):
            self.seen.setdefault(repr(tree), tree)

    def _parent(self, path: Path) -> Directory:
        node = self.root
        for part in path.relative_to(self.path).parts[:-1]:
            node = node.now()[part]
        return node

    def _change(self, path: Path, kind: str, value: Any) -> None:
        self._parent(path).pending.append((kind, path.name, value))

    def _write(self, path: Path, writer: object) -> None:
        self._change(path, "add", File(path.read_bytes()))

    def _fsync(self, path: Path) -> None:
        if path.name not in self._parent(path).now():  # made behind the log's back
            self._change(path, "add", File(path.read_bytes()))
        file = self._parent(path).now()[path.name]
        file.data = file.durable = path.read_bytes()

    def _fsync_dir(self, path: Path) -> None:
        if path != self.path and self.path not in path.parents:
            return
        node = self.root if path == self.path else self._parent(path).now()[path.name]
        node.durable, node.pending = node.now(), []

    def _mkdir(self, path: Path) -> None:
        self._change(path, "add", Directory())

    def _rename(self, source: Path, target: Path) -> None:
        node = self._parent(source).now()[source.name]
        assert source.parent == target.parent
        self._change(source, "move", (target.name, node))

    _replace = _rename

    def _link(self, source: Path, target: Path) -> None:
        self._change(target, "add", self._parent(source).now()[source.name])

    def _unlink(self, path: Path) -> None:
        self._change(path, "drop", None)

    _rmdir = _unlink


def power_cuts(root: Path, action: Any, *, afterwards: bool = False) -> list[Tree]:
    """Runs `action`; every state that a power cut during it or after it (only after) may leave."""
    disk = Disk(root)
    ops.hook = disk
    try:
        action()
        disk.settle()
        if afterwards:
            disk.seen.clear()
            disk.settle()
    finally:
        ops.hook = None
    return list(disk.seen.values())


def materialise(tree: Tree, path: Path) -> None:
    """Writes a tree to a real directory."""
    path.mkdir()
    for name, value in tree.items():
        if isinstance(value, bytes):
            (path / name).write_bytes(value)
        else:
            materialise(value, path / name)


def _states(node: Any, top: bool = False) -> Iterator[Any]:
    if isinstance(node, File):
        yield node.durable or b""
        if node.data != node.durable:
            yield node.data
        return
    count = len(node.pending)
    if count > 6:  # without syncs only: whatever happened up to some moment, and nothing after
        kept = iter([(True,) * n + (False,) * (count - n) for n in range(count, -1, -1)])
    elif top:  # every combination of what happened in the run directory itself
        kept = itertools.product((True, False), repeat=count)
    else:
        kept = iter([(True,) * count, (False,) * count][: 2 if count else 1])
    for choice in kept:
        entries = _apply(node.durable, itertools.compress(node.pending, choice))
        # All files of a directory are synced or none is: enough for the mutants, and few states.
        children = {name: list(_states(child)) for name, child in entries.items()}
        yield {name: states[0] for name, states in children.items()}
        yield {name: states[-1] for name, states in children.items()}
        for name, states in children.items():
            for state in states[1:]:
                yield {n: state if n == name else s[0] for n, s in children.items()}


def _apply(entries: dict[str, Any], changes: Any) -> dict[str, Any]:
    result = dict(entries)
    for kind, name, value in changes:
        if kind == "add":
            result[name] = value
        else:
            result.pop(name, None)
        if kind == "move":
            result[value[0]] = value[1]
    return result


def _read(path: Path) -> Directory:
    node = Directory()
    for entry in os.scandir(path):
        if entry.is_dir():
            node.durable[entry.name] = _read(Path(entry.path))
        else:
            data = Path(entry.path).read_bytes()
            node.durable[entry.name] = File(data, data)
    return node
