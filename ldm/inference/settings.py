"""What a request may hold: each setting as the kind of value that metadata keep and replay.

numpy's numbers become Python's, a list becomes a tuple; what is no such value is refused by name.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import numpy as np

from ldm.diffusion.names import legal_samplers
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.schedule import SPACINGS
from ldm.errors import LdmError, named
from ldm.inference.images import Request

if TYPE_CHECKING:
    from ldm.checkpoint import Contract

MAX_STEPS = 1000


def converted(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of `Pipeline.__call__` as the fields of a request hold them.

    Raises:
        LdmError: names the setting, its value, and a legal one.
    """
    kinds = {field.name: str(field.type) for field in fields(Request)}
    plain = {name: KINDS[kinds[name]](name, value) for name, value in settings.items()}
    low, high = plain.get("interval", (0.0, 1.0))
    if not low < high:
        raise LdmError(
            f"interval=({low}, {high}) is out of range: it is empty",
            where="interval",
            fix="use two times from 0 to 1, the lower one first: (0.0, 1.0) is all",
        )
    return plain


def whole(name: str, value: Any) -> int:
    """A whole number, of Python or numpy. LdmError for anything else, True and 3.0 among it."""
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise _wrong(name, value, "a whole number") from None


def texts(name: str, value: Any) -> list[str]:
    """One text, or several, as a list. LdmError for anything else."""
    if isinstance(value, str):
        return [str(value)]
    if isinstance(value, bytes) or not isinstance(value, Iterable):
        raise _wrong(name, value, "a text or a list of texts")
    return [_text(name, one) for one in value]


def sides(value: Any) -> tuple[int, int]:
    """Height and width of one side or a pair. LdmError for anything else."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        return (whole("size", value),) * 2
    if len(value) != 2:
        raise LdmError(f"{value} is not a size", where="size", fix="use 64 or (64, 128)")
    return whole("size", value[0]), whole("size", value[1])


def check_solver(contract: Contract, request: Request) -> None:
    """Refuses steps, samplers and settings of samplers that the model cannot draw with.

    Raises:
        LdmError: names the setting, its value, and a legal one.
    """
    if not 1 <= request.steps <= MAX_STEPS:
        raise LdmError(
            f"{request.steps} steps are impossible", where="steps", fix=f"use 1 to {MAX_STEPS}"
        )
    sampler = named("sampler", SAMPLERS, request.sampler)
    named("spacing", SPACINGS, request.spacing)
    if not 0 < request.shift < math.inf:
        raise LdmError(f"shift={request.shift} is out of range", where="shift", fix="1 is none")
    if sampler.learned_variance and not contract.learned_variance:
        raise LdmError(
            f"sampler {request.sampler} needs a model that learned its variance",
            where="sampler",
            fix="use sampler ddpm",
        )
    if request.sampler not in (able := legal_samplers(contract.process)):
        raise LdmError(
            f"sampler {request.sampler} cannot start at pure noise, where process "
            f"{contract.process} does",
            where="sampler",
            fix=f"use one of {', '.join(able)}",
        )
    if not 0 <= request.eta <= 1:
        raise LdmError(f"eta={request.eta} is out of range", where="eta", fix="use 0 to 1")
    if request.eta and not sampler.stochastic:
        raise LdmError(
            f"sampler {request.sampler} draws no noise, so eta={request.eta} means nothing",
            where="eta",
            fix="use eta=0, or sampler ddim",
        )


def _number(name: str, value: Any) -> float:
    try:
        if isinstance(value, (bool, np.bool_, str, bytes)):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise _wrong(name, value, "a number") from None


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _wrong(name, value, "a text")
    return str(value)  # numpy's texts are no JSON


def _text_or_none(name: str, value: Any) -> str | None:
    return None if value is None else _text(name, value)


def _times(name: str, value: Any) -> tuple[float, float]:
    if isinstance(value, str) or not isinstance(value, (Sequence, np.ndarray)) or len(value) != 2:
        raise _wrong(name, value, "two times from 0 to 1, such as (0.0, 1.0)")
    return _number(name, value[0]), _number(name, value[1])


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise _wrong(name, value, "True or False")
    return bool(value)


def _wrong(name: str, value: Any, kind: str) -> LdmError:
    return LdmError(
        f"{name}={value!r} is not {kind}", where=name, fix=f"give {kind}, or leave it out"
    )


KINDS: dict[str, Callable[[str, Any], Any]] = {
    "str": _text,
    "str | None": _text_or_none,
    "int": whole,
    "float": _number,
    "tuple[float, float]": _times,
    "bool": _flag,
}
"""By the type of a field of `Request`."""
