"""Renaming tensors between two layouts, exactly and both ways. Knows no model.

A layout is a table of rows: one tensor of the original file against one or several of ours, and the
form in which it is stored there. Every form is a bijection, so a round trip changes no bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Row:
    """One tensor of the original layout.

    Args:
        theirs: its name there.
        ours: its name here, or the names of the parts that are joined there.
        form: how it is stored there, a key of FORMS.
    """

    theirs: str
    ours: tuple[str, ...]
    form: str = "same"


Form = tuple[Callable[[list[Tensor]], Tensor], Callable[[Tensor, int], list[Tensor]]]
"""(ours -> theirs, theirs -> ours of so many parts)."""


def layer(theirs: str, ours: str, form: str = "same") -> list[Row]:
    """Weight and bias of one layer; only the weight has the form."""
    return [Row(f"{theirs}.weight", (f"{ours}.weight",), form), *bias(theirs, ours)]


def bias(theirs: str, ours: str) -> list[Row]:
    """The bias of one layer."""
    return [Row(f"{theirs}.bias", (f"{ours}.bias",))]


def joined(theirs: str, ours: Iterable[str]) -> list[Row]:
    """Weights and biases of layers that are one layer there, stacked along the outputs."""
    names = tuple(ours)
    return [
        Row(f"{theirs}.{part}", tuple(f"{name}.{part}" for name in names), "stacked")
        for part in ("weight", "bias")
    ]


def below(prefix: str, rows: Iterable[Row]) -> list[Row]:
    """The same rows with `prefix` before the names of the original."""
    return [replace(row, theirs=prefix + row.theirs) for row in rows]


def inside(prefix: str, rows: Iterable[Row]) -> list[Row]:
    """The same rows with `prefix` before our names."""
    return [replace(row, ours=tuple(prefix + name for name in row.ours)) for row in rows]


def kept(rows: Iterable[Row], names: Iterable[str]) -> list[Row]:
    """The rows whose tensors the model has: optional layers of a table drop out.

    Raises:
        AssertionError: the table does not name every tensor of the model, once.
    """
    present = set(names)
    chosen = [row for row in rows if set(row.ours) <= present]
    named = [name for row in chosen for name in row.ours]
    lost = sorted(present - set(named))
    assert not lost, f"no row for {lost[:5]}"
    assert len(named) == len(set(named)), "two rows for one tensor"
    return chosen


def to_original(rows: Iterable[Row], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under the names and in the forms of the original; copies nothing it need not."""
    return {
        row.theirs: FORMS[row.form][0]([tensors[name] for name in row.ours]).contiguous()
        for row in rows
    }


def from_original(
    rows: Iterable[Row], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors of the original under our names, and the names of those that are missing there."""
    ours: dict[str, Tensor] = {}
    missing = []
    for row in rows:
        if row.theirs not in tensors:
            missing.append(row.theirs)
            continue
        parts = FORMS[row.form][1](tensors[row.theirs], len(row.ours))
        ours.update(zip(row.ours, (part.contiguous() for part in parts), strict=True))
    return ours, missing


def read_by(rows: Iterable[Row]) -> Iterator[str]:
    """The names of the original that a table reads."""
    return (row.theirs for row in rows)


def _alone(parts: list[Tensor]) -> Tensor:
    (only,) = parts
    return only


def _swapped(parts: list[Tensor]) -> Tensor:
    return torch.cat(_alone(parts).chunk(2, dim=0)[::-1])


FORMS: dict[str, Form] = {
    "same": (_alone, lambda value, count: [value]),
    # a linear layer here, a 1x1 convolution there (attention of the original autoencoder)
    "convolution": (
        lambda parts: _alone(parts)[:, :, None, None],
        lambda value, count: [value[:, :, 0, 0] if value.ndim == 4 else value],
    ),
    "transposed": (lambda parts: _alone(parts).T, lambda value, count: [value.T]),
    "stacked": (torch.cat, lambda value, count: list(value.chunk(count, dim=0))),
    # (shift, scale) there, (scale, shift) here
    "halves swapped": (_swapped, lambda value, count: [_swapped([value])]),
}
"""How one tensor of the original holds ours."""
