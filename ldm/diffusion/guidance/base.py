"""What the guidance rules share: whom they ask, in one batched call, and what is done afterwards.

B pictures, C channels, L tokens. Nothing here reads a value back from the device, and no picture
depends on another of its batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ldm.diffusion.core import Diffusion, prepared
from ldm.errors import LdmError
from ldm.types import Denoise, Denoiser, Level, TextEmbedding

Ask = Callable[[Denoiser, Tensor, Level, TextEmbedding], Tensor]
"""(net, x_t, level, text) -> x0, as `Diffusion.denoise`; more channels than x_t are a variance."""
Answers = Callable[[Tensor, Level], "tuple[Tensor, ...]"]
"""(x_t, level) -> one x0 per text, from one call of the network."""
Combine = Callable[[list[Tensor], Tensor, Level], Tensor]
"""(x0 of each text, x_t, level) -> guided x0."""


@dataclass(frozen=True)
class Model:
    """A network, what its numbers mean, and what it is asked for.

    Args:
        diffusion: what the network's numbers mean.
        net: the network.
        text: B prompts.
        null: the empty prompt, or negative prompts in its place: B rows or 1, of any length L.
        ask: used instead of `diffusion.denoise`. When it returns 2C channels, x0 and a learned
            variance's v, the rules guide x0 and return the prompt's own v behind it.
        levels: those that will be asked about, where they are known: what a network computes of
            time alone is then computed in one batch.
    """

    diffusion: Diffusion
    net: Denoiser
    text: TextEmbedding
    null: TextEmbedding
    ask: Ask | None = None
    levels: Iterable[Level] = ()

    def asked(self, *texts: TextEmbedding) -> Answers:
        """One call with len(texts) B rows, in the order of the texts.

        What is returned serves one run: at its first call without gradients the network computes
        what depends on the texts alone, and keeps it (`core.prepared`).

        Raises:
            LdmError: a text with as many rows as neither 1 nor B.
        """
        rows = stack(*(_repeated(text, len(self.text)) for text in texts))
        ask = self.ask or self.diffusion.denoise
        ready: TextEmbedding | None = None

        def answers(x: Tensor, level: Level) -> tuple[Tensor, ...]:
            nonlocal ready
            many = x if len(texts) == 1 else torch.cat([x] * len(texts))
            if torch.is_grad_enabled():  # what is kept is a constant, and has no gradient
                return ask(self.net, many, level, rows).chunk(len(texts))
            if ready is None:
                clocks = [self.diffusion.told(level) for level in self.levels]
                ready = prepared(self.net, rows, clocks)
            return ask(self.net, many, level, ready).chunk(len(texts))

        return answers


@dataclass(frozen=True)
class Finish:
    """When a rule acts, and what is done to its x0: first the rescale, then the threshold.

    Args:
        interval: times (closed) in which guidance acts, elsewhere the prompt stands alone:
            Kynkäänniemi et al. 2024 (arXiv 2404.07724).
        rescale: phi of Lin et al. 2023 (arXiv 2305.08891), eq. 15-16, in x0; 0 is off, 0.7 theirs.
        threshold: percentile p of |x0| in a picture, as a share: dynamic thresholding of Saharia
            et al. 2022 (arXiv 2205.11487), section 2.3. 0 is off, 0.995 theirs. It concerns the
            range of x0, not guidance, so it acts at every time and every scale.
        limit: the range [-limit, limit] that p is held against, in units of x0: 1 for pixels, for
            latents standard deviations.

    Raises:
        LdmError: a value out of range.
    """

    interval: tuple[float, float] = (0.0, 1.0)
    rescale: float = 0.0
    threshold: float = 0.0
    limit: float = 3.0

    def __post_init__(self) -> None:
        low, high = self.interval
        for name, legal, range_ in (
            ("interval", low <= high, "low <= high"),
            ("rescale", 0 <= self.rescale <= 1, "0 to 1"),
            ("threshold", 0 <= self.threshold <= 1, "0 (off) to 1"),
            ("limit", 0 < self.limit < math.inf, "a number > 0"),
        ):
            if not legal:
                raise out_of_range(name, getattr(self, name), range_)

    def acts(self, level: Level) -> bool:
        """Whether guidance acts at this level."""
        return self.interval[0] <= level.t <= self.interval[1]

    def rescaled(self, guided: Tensor, cond: Tensor) -> Tensor:
        """Guided x0 (B, ...) with the contrast of the prompt's own, mixed in by `rescale`."""
        if self.rescale == 0:
            return guided
        axes = tuple(range(1, cond.ndim))
        # a constant picture has no contrast to restore: the tiny floor keeps 0 / 0 out
        contrast = guided.std(axes, keepdim=True).clamp(min=torch.finfo(guided.dtype).tiny)
        ratio = cond.std(axes, keepdim=True) / contrast
        return guided * (self.rescale * ratio + (1 - self.rescale))

    def limited(self, x0: Tensor) -> Tensor:
        """x0 (B, ...) clipped to its percentile s and scaled back, if s is beyond the limit.

        Per picture s = max(percentile of |x0|, limit) and x0 becomes clip(x0, -s, s) limit / s,
        where theirs has 1 for the limit. A picture inside it stays as it is, bit for bit.
        """
        if self.threshold == 0:
            return x0
        s = percentile(x0.abs().flatten(1), self.threshold).clamp(min=self.limit)  # (B,)
        s = s.reshape(-1, *[1] * (x0.ndim - 1))
        return x0.clamp(-s, s) * (torch.full_like(s, self.limit) / s)


PLAIN = Finish()
"""Guidance at all times, and nothing afterwards."""


def guide(
    plain: Answers, finish: Finish, answers: Answers | None = None, combine: Combine | None = None
) -> Denoise:
    """The `denoise` of a rule: `combine` of the answers where guidance acts, elsewhere `plain`.

    Args:
        plain: asks for the prompt alone.
        finish: when the rule acts, and what follows.
        answers: asks for everything the rule combines, the prompt last; None never guides.
        combine: the rule's formula.
    """

    def denoise(x: Tensor, level: Level) -> Tensor:
        channels = x.shape[1]
        if answers is None or combine is None or not finish.acts(level):
            (said,) = plain(x, level)
            x0 = said[:, :channels]
        else:
            said_of_each = answers(x, level)
            said = said_of_each[-1]
            parts = [part[:, :channels] for part in said_of_each]
            x0 = finish.rescaled(combine(parts, x, level), parts[-1])
        x0 = finish.limited(x0)
        return x0 if said.shape[1] == channels else torch.cat([x0, said[:, channels:]], 1)

    return denoise


def percentile(values: Tensor, share: float) -> Tensor:
    """What this share of each row (B, N) does not exceed, (B,), between neighbours linearly.

    `torch.quantile`, without its limit on N and its look at the values.
    """
    place = share * (values.shape[1] - 1)
    below = math.floor(place)
    largest = values.topk(values.shape[1] - below, dim=1).values  # falling; ends at `below`
    return largest[:, -1].lerp(largest[:, max(-2, -largest.shape[1])], place - below)


def along(vectors: Tensor, direction: Tensor) -> Tensor:
    """The part of each picture (B, ...) parallel to its direction (B, ...); 0 where that is 0."""
    axes = tuple(range(1, vectors.ndim))
    square = direction.square().sum(axes, keepdim=True).clamp(min=torch.finfo(vectors.dtype).tiny)
    return (vectors * direction).sum(axes, keepdim=True) / square * direction


def check_scale(scale: float) -> None:
    """Refuses a guidance scale below 0, or none at all."""
    if not 0 <= scale < math.inf:
        raise out_of_range("scale", scale, "a number >= 0")


def out_of_range(name: str, value: object, legal: str) -> LdmError:
    """The refusal of a setting, naming the legal values."""
    return LdmError(
        f"guidance {name}={value} is out of range", where=name, fix=f"use {name} {legal}"
    )


def stack(*embeddings: TextEmbedding) -> TextEmbedding:
    """The rows of all embeddings, the shorter ones padded with masked tokens."""
    length = max(embedding.tokens.shape[1] for embedding in embeddings)
    pairs = [_lengthened(embedding, length) for embedding in embeddings]
    pooled = [embedding.pooled for embedding in embeddings if embedding.pooled is not None]
    sizes = [embedding.sizes for embedding in embeddings if embedding.sizes is not None]
    return TextEmbedding(
        torch.cat([tokens for tokens, _ in pairs]),
        torch.cat([mask for _, mask in pairs]),
        torch.cat(pooled) if len(pooled) == len(embeddings) else None,
        torch.cat(sizes) if len(sizes) == len(embeddings) else None,
    )


def _lengthened(embedding: TextEmbedding, length: int) -> tuple[Tensor, Tensor]:
    missing = length - embedding.tokens.shape[1]
    return pad(embedding.tokens, (0, 0, 0, missing)), pad(embedding.mask, (0, missing), value=False)


def _repeated(text: TextEmbedding, count: int) -> TextEmbedding:
    if len(text) == count:
        return text
    if len(text) != 1:
        raise LdmError(
            f"{len(text)} negative prompts for {count} prompts",
            where="negative",
            fix=f"give one, or {count}",
        )
    pooled, sizes = (
        None if part is None else part.expand(count, -1) for part in (text.pooled, text.sizes)
    )
    tokens, mask = text.tokens.expand(count, -1, -1), text.mask.expand(count, -1)
    return TextEmbedding(tokens, mask, pooled, sizes)
