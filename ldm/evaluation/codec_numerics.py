"""Whether a codec stands bf16 and fp16: its largest activations, and what it makes in each."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ldm.evaluation.codec import psnr

FP16_MAX = 65504.0
"""The largest number of float16."""
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """A codec in half precision against itself in float32, on the same pictures and latents.

    Args:
        finite: whether every value of moments and pictures was finite.
        psnr: of its decoded pictures against those of float32, dB; None where not finite.
        max_error: the largest difference of a pixel, of 255; None where not finite.
        moments_error: the largest difference of a posterior mean, in standard deviations of the
            latents; None where not finite.
        reason: why it could not be tried, or None.
    """

    finite: bool
    psnr: float | None = None
    max_error: float | None = None
    moments_error: float | None = None
    reason: str | None = None


@contextmanager
def watched(codec: nn.Module) -> Iterator[dict[str, float]]:
    """Fills in the largest magnitude that each layer puts out inside, by its name.

    A block comes after the layers in it, so that the first of equal ones is the innermost. A
    magnitude that is not a number is infinite.
    """
    largest: dict[str, float] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, out: Any) -> None:
            for value in out if isinstance(out, tuple | list) else [out]:
                if isinstance(value, Tensor) and value.is_floating_point():
                    peak = float(value.detach().abs().max())
                    # max() would drop a NaN, which compares with nothing
                    peak = math.inf if math.isnan(peak) else peak
                    largest[name] = max(largest.get(name, 0.0), peak)

        return hook

    modules = codec.named_modules()
    handles = [part.register_forward_hook(watch(name)) for name, part in modules if name]
    try:
        yield largest
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def in_precision(codec: Any, pixels: Tensor, dtype: torch.dtype) -> Precision:
    """Encodes and decodes (B, 3, H, W) in `dtype`; the float32 latents are decoded by both."""
    moments = codec.moments(pixels)
    zero = moments.new_zeros(())
    latents = codec.latents(moments, zero)
    expected = codec.decode(latents)
    half = copy.deepcopy(codec).to(dtype)
    try:
        found = half.moments(pixels.to(dtype))
        decoded = half.decode(latents.to(dtype)).float()
    except (RuntimeError, NotImplementedError) as error:  # a device without these kernels
        return Precision(False, reason=str(error).partition("\n")[0])
    if not (torch.isfinite(found).all() and torch.isfinite(decoded).all()):
        return Precision(False)
    difference = (decoded.clamp(-1, 1) - expected.clamp(-1, 1)).abs().max()
    shift = (codec.latents(found.to(moments), zero) - latents).abs().max()
    return Precision(
        True,
        float(psnr(decoded, expected).min()),
        float(difference * 127.5),
        float(shift / latents.std().clamp(min=1e-30)),
    )
