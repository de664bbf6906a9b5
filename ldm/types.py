"""The values that rooms hand to each other, and the protocols they agree on. No behaviour.

B batch, C channels, H height, W width, L text tokens, D text width, P pooled width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor


class Level(NamedTuple):
    """A noise level: x_t = alpha * x0 + sigma * eps at time t. Plain floats, so nothing syncs."""

    t: float
    alpha: float
    sigma: float


@dataclass(frozen=True)
class TextEmbedding:
    """What every text encoder returns and every denoiser accepts.

    Args:
        tokens: token states, (B, L, D).
        mask: True where a token is real, (B, L) bool; padding never influences a picture.
        pooled: one vector per prompt, (B, P), or None.
        sizes: what SDXL is told of a picture besides its text, (B, 6): original height and width,
            top and left of the crop, target height and width, in pixels; or None.
        kept: what a denoiser's `prepare` computed from this text once, for all calls of a sampling
            run; only that denoiser reads it. Between the two it is the function from a clock to
            the embedding for that clock, which `diffusion.denoise` asks.
    """

    tokens: Tensor
    mask: Tensor
    pooled: Tensor | None = None
    sizes: Tensor | None = None
    kept: Any = None

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> TextEmbedding:
        """The same embedding on `device`, its token states as `dtype`; nothing kept.

        Sizes stay what they are: bf16 cannot tell 1023 pixels from 1024.
        """
        pooled = None if self.pooled is None else self.pooled.to(device, dtype)
        sizes = None if self.sizes is None else self.sizes.to(device)
        return TextEmbedding(self.tokens.to(device, dtype), self.mask.to(device), pooled, sizes)

    def __len__(self) -> int:
        return int(self.tokens.shape[0])

    def __getitem__(self, rows: slice | Tensor) -> TextEmbedding:
        """Some of the rows; nothing kept."""
        pooled = None if self.pooled is None else self.pooled[rows]
        sizes = None if self.sizes is None else self.sizes[rows]
        return TextEmbedding(self.tokens[rows], self.mask[rows], pooled, sizes)


@dataclass(frozen=True)
class Example:
    """One captioned picture: `pixels` is (H, W, 3) uint8 RGB."""

    id: str
    pixels: np.ndarray
    caption: str


@dataclass(frozen=True)
class Batch:
    """What the loader yields: pictures, cached moments or pairs of latents, one of them.

    Args:
        ids: sample ids, B of them.
        weight: (B,) float32, 1 for a good sample and 0 for one set aside.
        epochs: the epoch of each sample, which its random draws depend on.
        positions: where each sample stands in the step's global batch, over all ranks.
        pixels: (B, 3, H, W) float32 in [-1, 1], or None when `moments` is given.
        captions: B captions, or None when `text` is given.
        moments: (B, 2C, h, w) posterior mean and log-variance, or None.
        text: the embedded captions, or None.
        pair: the latents (B, C, h, w) at t = 0 and t = 1 of given pairs, or None.
        sizes: original size, crop and size of each picture, (B, 6), see `TextEmbedding`; or None.
    """

    ids: tuple[str, ...]
    weight: Tensor
    epochs: tuple[int, ...] = ()
    positions: tuple[int, ...] = ()
    pixels: Tensor | None = None
    captions: tuple[str, ...] | None = None
    moments: Tensor | None = None
    text: TextEmbedding | None = None
    pair: tuple[Tensor, Tensor] | None = None
    sizes: Tensor | None = None


Denoise = Callable[["Tensor", Level], "Tensor"]
"""What a sampler sees: (x_t, level) -> x0_hat, float32, same shape."""


@runtime_checkable
class Denoiser(Protocol):
    """UNet, DiT and the oracles of the tests: (x (B, C, H, W), t (B,), text) -> (B, C, H, W)."""

    def __call__(self, x: Tensor, t: Tensor, text: TextEmbedding) -> Tensor: ...


@runtime_checkable
class Prepares(Protocol):
    """A denoiser that computes once per sampling run what depends on text and time only.

    `prepare(text, clocks)` returns a function from a clock to the embedding that the denoiser is
    called with at that clock, `kept` filled in. A clock that was not announced is computed when it
    comes. Outputs equal those of the plain call up to rounding.
    """

    def prepare(
        self, text: TextEmbedding, clocks: Sequence[float] = ()
    ) -> Callable[[float], TextEmbedding]: ...


class TextEncoder(Protocol):
    """Prompts in, embeddings out."""

    def __call__(self, prompts: Sequence[str]) -> TextEmbedding: ...


class Codec(Protocol):
    """Pixels in [-1, 1] to latents with mean 0 and std 1 per channel, and back."""

    def moments(self, pixels: Tensor) -> Tensor: ...
    def latents(self, moments: Tensor, noise: Tensor) -> Tensor: ...
    def decode(self, latents: Tensor) -> Tensor: ...


class Source(Protocol):
    """A map-style data set: example i is always the same example.

    `ids[i]` is stable across machines. Indexing raises LdmError (code BAD_DATA) for a sample that
    cannot be used. `captions[i]` is read without decoding the picture. `fingerprint` changes
    whenever the data does.
    """

    @property
    def ids(self) -> Sequence[str]: ...
    @property
    def captions(self) -> Sequence[str]: ...
    @property
    def fingerprint(self) -> str: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Example: ...
