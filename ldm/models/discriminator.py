"""PatchGAN: says of every patch of a picture whether it looks real. Knows nothing of losses.

B batch, C channels, H height, W width, h, w patches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from ldm.errors import ExitCode, LdmError


@dataclass(frozen=True)
class DiscriminatorConfig:
    """Shape of a PatchGAN.

    Args:
        in_channels: channels of the pictures.
        width: channels after the first convolution; they double per layer, up to 8 times.
        layers: convolutions that halve the picture; 3 sees patches of 70 x 70 pixels.
        norm: group norm, or none. Batch norm, which pix2pix has, is not offered: it makes the
            score of a picture depend on its neighbours in the batch, so that ranks and
            accumulation steps would train another network.

    Raises:
        LdmError: a number below 1 (code CONFIG).
    """

    in_channels: int = 3
    width: int = 64
    layers: int = 3
    norm: Literal["group", "none"] = "group"

    def __post_init__(self) -> None:
        for name in ("in_channels", "width", "layers"):
            if getattr(self, name) < 1:
                raise LdmError(
                    f"{name} is {getattr(self, name)}",
                    where="discriminator",
                    fix="use 1 or more",
                    code=ExitCode.CONFIG,
                )

    @property
    def min_px(self) -> int:
        """The smallest side of a picture that has a patch."""
        return min_px(self.layers)


class PatchDiscriminator(nn.Module):
    """Scores (B, 1, h, w) of overlapping patches; high is real.

    Source: Isola et al. 2017 (arXiv 1611.07004), section 3.2.2 and appendix 6.1.2, with weights
    drawn from N(0, 0.02) as there.
    """

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        plain = config.norm == "none"
        layers: list[nn.Module] = [nn.Conv2d(config.in_channels, config.width, 4, 2, 1)]
        before = config.width
        for layer in range(1, config.layers + 1):
            after = config.width * min(2**layer, 8)
            stride = 2 if layer < config.layers else 1
            # without a bias where the norm would take it out again
            layers += [nn.LeakyReLU(0.2), nn.Conv2d(before, after, 4, stride, 1, bias=plain)]
            if not plain:
                # at most 32 groups, of 4 channels or more
                layers.append(nn.GroupNorm(math.gcd(32, max(1, after // 4)), after))
            before = after
        layers += [nn.LeakyReLU(0.2), nn.Conv2d(before, 1, 4, 1, 1)]
        self.layers = nn.Sequential(*layers)
        for module in self.layers:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, pictures: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 1, h, w); H and W are at least `config.min_px`."""
        scores: Tensor = self.layers(pictures)
        return scores


def min_px(layers: int) -> int:
    """The smallest side that a PatchGAN of `layers` layers gives a score for.

    Each halving takes floor(side / 2), each of the two last convolutions takes one pixel.
    """
    return int(3 * 2**layers)
