"""Which tokens go through which blocks of a transformer in training; it draws nothing itself.

B batch, N tokens of the picture, K of them kept, P tokens before them, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """The tokens that blocks `first` to `last` see, chosen by the training code.

    With a `last` block the others wait and join again behind it (TREAD: Krause et al. 2025, arXiv
    2501.04765). Without one they are gone for good, and the prediction there is 0 (MaskDiT: Zheng
    et al. 2023, arXiv 2306.09305; with `first` > 0 the deferred masking of MicroDiT: Sehwag et al.
    2024, arXiv 2407.15811): the loss must not count them.

    Args:
        kept: (B, K) int64, ascending places of the tokens that go on, of 0..N-1.
        first: block before which the others leave.
        last: block before which they come back; None never.
    """

    kept: Tensor
    first: int = 0
    last: int | None = None

    def of_pixels(self, rows: int, columns: int, patch: int) -> Tensor:
        """Which latent pixels were kept, (B, 1, rows * patch, columns * patch) bool."""
        tokens = torch.zeros(
            len(self.kept), rows * columns, dtype=torch.bool, device=self.kept.device
        ).scatter(1, self.kept, True)
        grid = tokens.unflatten(1, (rows, columns))[:, None]
        return grid.repeat_interleave(patch, 2).repeat_interleave(patch, 3)

    def sequence(self, before: int) -> Tensor:
        """Places in a sequence that begins with `before` other tokens, which all stay: (B, P+K)."""
        if before == 0:
            return self.kept
        head = torch.arange(before, device=self.kept.device).expand(len(self.kept), -1)
        return torch.cat([head, self.kept + before], dim=1)


def taken(tokens: Tensor, places: Tensor) -> Tensor:
    """(B, N, D) at places (B, K) -> (B, K, D)."""
    return tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[-1]))


def put_back(tokens: Tensor, places: Tensor, into: Tensor) -> Tensor:
    """`into` (B, N, D) with tokens (B, K, D) at places (B, K)."""
    index = places[..., None].expand(-1, -1, tokens.shape[-1])
    return into.scatter(1, index, tokens.to(into.dtype))
