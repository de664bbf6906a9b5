"""Guidance: from a network and two texts to the `denoise` that a sampler sees."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from ldm.diffusion.core import Diffusion
from ldm.errors import LdmError
from ldm.types import Denoise, Denoiser, Level, TextEmbedding


def classifier_free(
    diffusion: Diffusion,
    net: Denoiser,
    text: TextEmbedding,
    null: TextEmbedding,
    scale: float,
    *,
    interval: tuple[float, float] = (0.0, 1.0),
    rescale: float = 0.0,
) -> Denoise:
    """uncond + scale (cond - uncond) in x0: Ho & Salimans 2022 (arXiv 2207.12598), scale = 1 + w.

    Scale 1 is off and 0 unconditional; both call the network once with B rows. Otherwise one call
    has 2B rows, unconditional first.

    Args:
        diffusion: what the network's numbers mean.
        net: the network.
        text: B prompts.
        null: the empty prompt, or negative prompts: B rows or 1; may have another length L.
        scale: >= 0.
        interval: times (closed) in which guidance acts, elsewhere the scale is 1: Kynkäänniemi et
            al. 2024 (arXiv 2404.07724).
        rescale: phi of Lin et al. 2023 (arXiv 2305.08891), eq. 15-16, in x0; 0 is off, 0.7 theirs.

    Raises:
        LdmError: a scale, interval or rescale out of range, or as many nulls as neither 1 nor B.
    """
    low, high = interval
    if scale < 0 or not 0 <= rescale <= 1 or not low <= high:
        raise LdmError(
            f"guidance scale={scale}, interval={interval}, rescale={rescale} is out of range",
            where="guidance",
            fix="use scale >= 0, interval low <= high, rescale in [0, 1]",
        )
    null = _rows(null, len(text))
    both = stack(null, text)

    def denoise(x: Tensor, level: Level) -> Tensor:
        active = scale if low <= level.t <= high else 1.0
        if active == 1.0:
            return diffusion.denoise(net, x, level, text)
        if active == 0.0:
            return diffusion.denoise(net, x, level, null)
        uncond, cond = diffusion.denoise(net, torch.cat([x, x]), level, both).chunk(2)
        guided = uncond + active * (cond - uncond)
        return guided if rescale == 0 else _rescaled(guided, cond, rescale)

    return denoise


def stack(first: TextEmbedding, second: TextEmbedding) -> TextEmbedding:
    """The rows of both embeddings, the shorter padded with masked tokens."""
    length = max(first.tokens.shape[1], second.tokens.shape[1])
    pairs = [_lengthened(embedding, length) for embedding in (first, second)]
    pooled = None
    if first.pooled is not None and second.pooled is not None:
        pooled = torch.cat([first.pooled, second.pooled])
    return TextEmbedding(
        torch.cat([tokens for tokens, _ in pairs]), torch.cat([mask for _, mask in pairs]), pooled
    )


def _lengthened(embedding: TextEmbedding, length: int) -> tuple[Tensor, Tensor]:
    missing = length - embedding.tokens.shape[1]
    return pad(embedding.tokens, (0, 0, 0, missing)), pad(embedding.mask, (0, missing), value=False)


def _rows(null: TextEmbedding, count: int) -> TextEmbedding:
    if len(null) == count:
        return null
    if len(null) != 1:
        raise LdmError(
            f"{len(null)} negative prompts for {count} prompts",
            where="negative",
            fix=f"give one, or {count}",
        )
    pooled = None if null.pooled is None else null.pooled.expand(count, -1)
    return TextEmbedding(null.tokens.expand(count, -1, -1), null.mask.expand(count, -1), pooled)


def _rescaled(guided: Tensor, cond: Tensor, rescale: float) -> Tensor:
    """Guided x0 (B, ...) with the contrast of the conditional one, mixed in by `rescale`."""
    axes = tuple(range(1, cond.ndim))
    # a constant picture has no contrast to restore: the tiny floor keeps 0 / 0 out
    contrast = guided.std(axes, keepdim=True).clamp(min=torch.finfo(guided.dtype).tiny)
    ratio = cond.std(axes, keepdim=True) / contrast
    return guided * (rescale * ratio + (1 - rescale))


GUIDANCE: dict[str, Callable[..., Denoise]] = {"classifier_free": classifier_free}
