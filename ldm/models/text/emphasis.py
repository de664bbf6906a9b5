"""Emphasis in a prompt, `(word:1.3)`: the text with a weight for each part, and what weights do.

Syntax: `(a)` weighs a 1.1, `[a]` 1/1.1, `(a:1.3)` 1.3; brackets nest and their weights multiply;
`\\(`, `\\)`, `\\[`, `\\]` and `\\\\` are the characters themselves. It is that of AUTOMATIC1111's
web interface (`parse_prompt_attention`), but a bracket without its partner is an error.

R rows of tokens, L tokens, D width.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.errors import LdmError

STEP = 1.1
"""Weight of a round bracket without a number; a square one has its inverse."""
MAX_WEIGHT = 10.0

_PARTS = re.compile(r"\\[()\[\]\\]|\\|[()\[\]]|[^\\()\[\]]+")
_NUMBER = re.compile(r"(.*):\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*\Z", re.DOTALL)


@dataclass
class _Open:
    bracket: str
    place: int
    first: int  # index of the first segment inside it


def parse_emphasis(prompt: str) -> list[tuple[str, float]]:
    """A prompt as (text, weight) segments; neighbours of equal weight are one segment.

    A backslash before any other character, and a colon without a number after it, are text.

    Raises:
        LdmError: USAGE for a bracket without its partner, for a weight outside 0 to 10, and for a
            number in square brackets, which other programs read as a schedule.
    """
    segments: list[tuple[str, float]] = []
    opened: list[_Open] = []
    for found in _PARTS.finditer(prompt):
        part, place = found.group(), found.start()
        if part in ("(", "["):
            opened.append(_Open(part, place, len(segments)))
        elif part in (")", "]"):
            _close(prompt, part, place, opened, segments)
        else:
            escaped = len(part) == 2 and part[0] == "\\"
            segments.append((part[1] if escaped else part, 1.0))
    if opened:
        raise _unbalanced(prompt, opened[-1].bracket, opened[-1].place)
    return _merged(segments)


def emphasised(states: Tensor, empty: Tensor, weights: Tensor) -> Tensor:
    """Token states moved away from those of the empty prompt, by their weights.

    Args:
        states: of the prompts, (R, L, D).
        empty: of the empty prompt at the same positions, (1, L, D).
        weights: (R, L); where it is 1 the state stays as it is, bit for bit.

    Source: ComfyUI (`encode_token_weights` of comfy/sd1_clip.py) and, for weights above 1, compel:
    z = empty + w (z - empty). AUTOMATIC1111 multiplies instead and restores the mean, which divides
    by a mean close to 0 where no final norm is applied (SDXL).
    """
    scale = weights[..., None].to(states)
    return torch.where(scale == 1, states, empty + scale * (states - empty))


def _close(
    prompt: str,
    bracket: str,
    place: int,
    opened: list[_Open],
    segments: list[tuple[str, float]],
) -> None:
    """Weighs the segments since the bracket that this one closes."""
    if not opened or opened[-1].bracket != {")": "(", "]": "["}[bracket]:
        raise _unbalanced(prompt, bracket, place)
    begin = opened.pop()
    weight = STEP if bracket == ")" else 1 / STEP
    inside = segments[begin.first :]
    # "\:1" cannot be written, so the number is the end of the last literal text
    number = _NUMBER.match(inside[-1][0]) if inside and prompt[place - 1] not in ")]" else None
    if number is not None:
        if bracket == "]":
            raise LdmError(
                f"{prompt[begin.place : place + 1]!r:.80} has a number in square brackets",
                where="prompt",
                fix="use round ones for a weight, (word:0.8); schedules are not supported",
            )
        weight = float(number.group(2))
        if not (math.isfinite(weight) and 0 <= weight <= MAX_WEIGHT):
            raise LdmError(
                f"weight {number.group(2)} in {prompt[begin.place : place + 1]!r:.80} is out of "
                "range",
                where="prompt",
                fix=f"use 0 to {MAX_WEIGHT:g}; 1 changes nothing",
            )
        inside[-1] = (number.group(1), inside[-1][1])
    segments[begin.first :] = [(text, own * weight) for text, own in inside]


def _unbalanced(prompt: str, bracket: str, place: int) -> LdmError:
    near = prompt[max(place - 20, 0) : place + 20]
    return LdmError(
        f"the bracket {bracket!r} at character {place + 1}, near {near!r}, has no partner",
        where="prompt",
        fix=f"close it, or write \\{bracket} for the character itself",
    )


def _merged(segments: list[tuple[str, float]]) -> list[tuple[str, float]]:
    merged: list[tuple[str, float]] = []
    for text, weight in segments:
        if merged and math.isclose(merged[-1][1], weight, rel_tol=1e-9):
            merged[-1] = (merged[-1][0] + text, merged[-1][1])
        elif text:
            merged.append((text, weight))
    return [(text, 1.0 if math.isclose(weight, 1.0) else weight) for text, weight in merged]
