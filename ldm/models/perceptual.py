"""How different two pictures look: distances between features. Reads no files.

Each module is called with (x_hat, x), both (B, C, H, W) in [-1, 1], and gives one distance per
pair, (B,), which is 0 for equal pictures and has a gradient in x_hat. `ldm.build.build_perceptual`
makes them with their weights.
B batch, C channels, H height, W width, K features.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import LdmError

VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Widths of the 3x3 convolutions between poolings (Simonyan & Zisserman 2015, arXiv 1409.1556,
table 1, column D)."""
NETWORKS: dict[str, tuple[tuple[int, ...], int]] = {
    "vgg": ((3, 8, 15, 22, 29), 16),
    "alex": ((1, 4, 7, 9, 11), 31),
}
"""By backbone: the layers whose outputs are compared, and the smallest side in pixels."""


class Lpips(nn.Module):
    """Learned perceptual image patch similarity, the distance of the `lpips` package, version 0.1.

    Source: Zhang et al. 2018 (arXiv 1801.03924), eq. 1. Weights are frozen; names are those of
    torchvision (`features.N.weight`) and of the package (`lin0.model.1.weight`).

    Args:
        network: "vgg" (VGG16, the usual loss) or "alex" (AlexNet, the usual figure).
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, network: str) -> None:
        super().__init__()
        self.taps, self.min_px = NETWORKS[network]
        self.features = _vgg16() if network == "vgg" else _alexnet()
        widths = [_width(self.features, tap) for tap in self.taps]
        for level, width in enumerate(widths):
            # the package has dropout at 0, which does nothing when not trained
            head = nn.Sequential(nn.Identity(), nn.Conv2d(width, 1, 1, bias=False))
            self.add_module(f"lin{level}", nn.ModuleDict({"model": head}))
        # the package's constants: ImageNet's mean and deviation for pixels in [-1, 1]
        self.register_buffer("shift", _column(-0.030, -0.088, -0.188), persistent=False)
        self.register_buffer("scale", _column(0.458, 0.448, 0.450), persistent=False)
        self.eval().requires_grad_(False)

    def forward(self, x_hat: Tensor, x: Tensor) -> Tensor:
        """(B, 3, H, W) twice -> (B,).

        Raises:
            LdmError: pictures that are not RGB, or smaller than the backbone's strides allow.
        """
        if x.shape[1] != 3 or min(x.shape[2:]) < self.min_px:
            raise LdmError(
                f"LPIPS needs 3 channels and sides of {self.min_px} pixels or more, got "
                f"{tuple(x.shape[1:])}",
                where="loss.perceptual",
                fix="use larger pictures, or loss.perceptual=gradients",
            )
        distance = x_hat.new_zeros(len(x_hat))
        levels = zip(self._levels(x_hat), self._levels(x), strict=True)
        for level, (one, other) in enumerate(levels):
            heads: Any = self.get_submodule(f"lin{level}.model")
            difference = (unit(one) - unit(other)).square()
            distance = distance + heads(difference).mean((1, 2, 3))
        return distance

    def _levels(self, x: Tensor) -> Iterable[Tensor]:
        x = (x - self.shift) / self.scale
        for index, layer in enumerate(self.features.children()):
            x = layer(x)
            if index in self.taps:
                yield x


class MultiScaleGradients(nn.Module):
    """Mean absolute difference of image gradients on a pyramid: edges count, at every scale.

    Ours, after the gradient difference loss of Mathieu et al. 2016 (arXiv 1511.05440), eq. 6. It
    has no weights and knows nothing of what people see: weaker than LPIPS, but always there.

    Args:
        scales: levels of the pyramid; each halves the picture, as far as it goes.
    """

    min_px = 2

    def __init__(self, scales: int = 4) -> None:
        super().__init__()
        self.scales = scales

    def forward(self, x_hat: Tensor, x: Tensor) -> Tensor:
        """(B, C, H, W) twice -> (B,)."""
        error, total = x_hat - x, x_hat.new_zeros(len(x_hat))
        levels = 0
        while levels < self.scales and min(error.shape[2:]) >= 2:
            across, down = error.diff(dim=3).abs(), error.diff(dim=2).abs()
            total = total + across.flatten(1).mean(1) + down.flatten(1).mean(1)
            # gradients are linear, so the pyramid of the error is the error of the pyramids
            error, levels = F.avg_pool2d(error, 2), levels + 1
        return total / max(levels, 1)


class VisionFeatures(nn.Module):
    """Distance between the patch states of every block of a frozen CLIP vision tower.

    LPIPS without its heads (Zhang et al. 2018, arXiv 1801.03924, eq. 1 with weights 1/K), on a
    tower that saw the user's own pictures (`ldm train-clip`).

    Args:
        tower: a transformers CLIPVisionModel that was trained on pixels in [-1, 1].
    """

    min_px = 1

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower
        self.eval().requires_grad_(False)

    def forward(self, x_hat: Tensor, x: Tensor) -> Tensor:
        """(B, 3, H, W) twice -> (B,)."""
        pairs = list(zip(self._levels(x_hat), self._levels(x), strict=True))
        # states (B, N, K) of unit length: squared differences summed over K, mean over N
        each = [(unit(a, -1) - unit(b, -1)).square().sum(-1).mean(1) for a, b in pairs]
        return torch.stack(each).mean(0)

    def _levels(self, x: Tensor) -> tuple[Tensor, ...]:
        """The states of the patches after each block, (B, N, K); the class token is left out."""
        tower: Any = self.tower
        side = tower.config.image_size
        if tuple(x.shape[2:]) != (side, side):
            x = F.interpolate(x, (side, side), mode="bilinear", antialias=True)
        states = tower(x, output_hidden_states=True).hidden_states
        return tuple(state[:, 1:] for state in states[1:])


def unit(x: Tensor, dim: int = 1) -> Tensor:
    """Unit length along `dim`; where all features are 0 the gradient is 0, not 0/0."""
    return x / (torch.linalg.vector_norm(x, dim=dim, keepdim=True) + 1e-10)


def _column(*values: float) -> Tensor:
    return torch.tensor(values)[:, None, None]


def _vgg16() -> nn.Sequential:
    layers: list[nn.Module] = []
    before = 3
    for widths in VGG16:
        layers += [nn.MaxPool2d(2)] if layers else []
        for width in widths:
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU(inplace=True)]
            before = width
    return nn.Sequential(*layers)


def _alexnet() -> nn.Sequential:
    """Krizhevsky 2014 (arXiv 1404.5997), as torchvision trained it."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, stride=4, padding=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(384, 256, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(256, 256, 3, padding=1),
        nn.ReLU(inplace=True),
    )


def _width(features: nn.Sequential, tap: int) -> int:
    convolution = features[tap - 1]
    assert isinstance(convolution, nn.Conv2d)
    return convolution.out_channels
