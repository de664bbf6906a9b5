"""Keeps some samples out of training: the ones whose hashed id comes first, on every machine."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from ldm.errors import ExitCode, LdmError
from ldm.types import Example, Source


@dataclass(frozen=True)
class Subset:
    """The samples `rows` of a source, as a source."""

    source: Source
    rows: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        return self.source[self.rows[index]]

    @cached_property
    def ids(self) -> Sequence[str]:
        """Sample ids of the subset."""
        return tuple(self.source.ids[row] for row in self.rows)

    @cached_property
    def captions(self) -> Sequence[str]:
        """Captions of the subset."""
        return tuple(self.source.captions[row] for row in self.rows)

    @cached_property
    def fingerprint(self) -> str:
        """Changes with the source and with the choice of rows."""
        text = f"{self.source.fingerprint}|{self.rows}"
        return hashlib.sha256(text.encode()).hexdigest()


def split_holdout(source: Source, count: int) -> tuple[Source, Source | None]:
    """Training part and held-out part (None when `count` is 0).

    Adding a file to a data set moves at most a few samples between the parts.

    Raises:
        LdmError: code BAD_DATA when nothing would be left to train on.
    """
    if count == 0:
        return source, None
    if count >= len(source):
        raise LdmError(
            f"data.holdout={count} leaves nothing of {len(source)} samples to train on",
            where="data.holdout",
            fix=f"data.holdout={len(source) // 10}",
            code=ExitCode.BAD_DATA,
        )
    keys = [hashlib.sha256(name.encode()).digest() for name in source.ids]
    order = sorted(range(len(source)), key=lambda row: keys[row])
    return Subset(source, tuple(sorted(order[count:]))), Subset(
        source, tuple(sorted(order[:count]))
    )
