"""Linear layers and convolutions on oneDNN's kernels, their weights laid out once for inference.

Torch lays the weights of a convolution out anew at each call, which for small feature maps takes
longer than the convolution; packed layers keep the layout. Where gradients are wanted, fp32 linear
layers still take oneDNN's product. The operations are those that torch's own compiler emits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models import onednn
from ldm.models.onednn import LEAST_WORK

M = TypeVar("M", bound=nn.Module)
LARGE_MAP = 1024
"""Positions from which feature maps stay channels-last, as oneDNN gives them; torch's group norm
is up to 25 times slower on smaller ones of that layout."""

LEAST_WEIGHT = 2**15
"""Convolutions of smaller weights gain nothing on small maps."""

NO_ACTIVATION: tuple[Any, ...] = ("none", [], "")


class Layout:
    """The packed form of one weight; made anew when it was changed, replaced or moved.

    It is made for the size of input that comes first. Another size is computed as well, and as fast
    unless its kernel wants another layout: one form for each size would be a copy for each.
    """

    def __init__(self) -> None:
        self._packed: Tensor | None = None
        self._source: Tensor | None = None  # held, so that no other weight gets its address
        self._state: tuple[Any, ...] = ()

    def of(self, weight: Tensor, reorder: Callable[[], Tensor]) -> Tensor:
        """The packed form; `reorder` makes it."""
        version = None if weight.is_inference() else weight._version
        state = (weight.data_ptr(), version)
        if self._packed is None or state != self._state:
            # not in inference mode: a tensor born there could not be used in a call outside of it
            with torch.inference_mode(False), torch.no_grad():
                self._packed, self._source, self._state = reorder(), weight.detach(), state
        return self._packed

    def __reduce__(self) -> tuple[Any, ...]:
        return (Layout, ())  # packed tensors cannot be copied


class PackedLinear(nn.Linear):
    """A linear layer whose product is oneDNN's, whatever torch would choose.

    `weight` and `bias` are those of `layer`, the same parameters under the same names.
    """

    def __init__(self, layer: nn.Linear) -> None:
        nn.Module.__init__(self)  # without weights of its own
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias, self.own = layer.weight, layer.bias, (layer,)
        self.layout, self.training = Layout(), layer.training

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """(..., in) -> (..., out)."""
        weight, is_fp32 = self.weight, x.dtype == torch.float32
        is_small = is_fp32 and x.numel() * self.out_features < LEAST_WORK
        if is_small or not _fits(x, weight):
            return F.linear(x, weight, self.bias)
        if torch.is_grad_enabled():
            return (onednn.linear if is_fp32 else F.linear)(x, weight, self.bias)
        packed = self.layout.of(
            weight,
            lambda: torch.ops.mkldnn._reorder_linear_weight(
                weight.detach(), x.numel() // self.in_features
            ),
        )
        out: Tensor = torch.ops.mkldnn._linear_pointwise.default(
            x, packed, self.bias, *NO_ACTIVATION
        )
        return out


class PackedConv2d(nn.Conv2d):
    """A convolution with zero padding; its weights are packed once.

    `weight` and `bias` are those of `layer`, the same parameters under the same names.
    """

    def __init__(self, layer: nn.Conv2d) -> None:
        nn.Module.__init__(self)  # without weights of its own
        for name in layer.__constants__:
            setattr(self, name, getattr(layer, name))
        self.weight, self.bias, self.own = layer.weight, layer.bias, (layer,)
        self.layout, self.training = Layout(), layer.training
        assert not isinstance(layer.padding, str)
        pairs = (layer.padding, layer.stride, layer.dilation)
        self.has_large_weight = layer.weight.numel() >= LEAST_WEIGHT
        self.geometry: tuple[Any, ...] = (*(list(pair) for pair in pairs), layer.groups)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """(B, C, H, W) -> (B, C', H', W')."""
        weight = self.weight
        is_large = self.has_large_weight or x.shape[2] * x.shape[3] >= LARGE_MAP
        if torch.is_grad_enabled() or not is_large or not _fits(x, weight):
            padding, stride, dilation, groups = self.geometry
            return F.conv2d(x, weight, self.bias, stride, padding, dilation, groups)
        packed = self.layout.of(
            weight,
            lambda: torch.ops.mkldnn._reorder_convolution_weight(
                weight.detach(), *self.geometry, list(x.shape)
            ),
        )
        out: Tensor = torch.ops.mkldnn._convolution_pointwise.default(
            x, packed, self.bias, *self.geometry, *NO_ACTIVATION
        )
        return out.contiguous() if out.shape[2] * out.shape[3] < LARGE_MAP else out


def _fits(x: Tensor, weight: Tensor) -> bool:
    """Whether nothing but the input and the weight decides what is computed."""
    return (
        not torch.compiler.is_compiling()
        and x.dtype == weight.dtype
        and x.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
    )


def pack(net: M) -> M:
    """Replaces the linear layers and convolutions of `net` by packed ones; returns `net`.

    Parameters stay the same objects under the same names. Where the operations are missing or err,
    the network stays as it is.
    """
    if not packs():
        return net
    for parent in list(net.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear:
                setattr(parent, name, PackedLinear(layer))
            elif type(layer) is nn.Conv2d and _is_common(layer):
                setattr(parent, name, PackedConv2d(layer))
    return net


def unpack(net: M) -> M:
    """The inverse of `pack`."""
    for parent in list(net.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, PackedLinear | PackedConv2d):
                (own,) = layer.own
                own.weight, own.bias = layer.weight, layer.bias
                setattr(parent, name, own)
    return net


def _is_common(layer: nn.Conv2d) -> bool:
    return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


@lru_cache(maxsize=1)
def packs() -> bool:
    """Whether the packed kernels are here and right, in fp32 and in bf16."""
    if not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.no_grad():
        conv, linear = nn.Conv2d(24, 16, 3, stride=2, padding=1), nn.Linear(40, 24)
        pictures = torch.randn(2, 24, 9, 9, generator=generator)
        rows = torch.randn(6, 40, generator=generator)
        for dtype in (torch.float32, torch.bfloat16):
            for layer, kind, x in (
                (conv.to(dtype), PackedConv2d, pictures.to(dtype)),
                (linear.to(dtype), PackedLinear, rows.to(dtype)),
            ):
                true = layer(x).float()
                try:
                    got = kind(layer)(x).float()  # type: ignore[arg-type]
                except (AttributeError, RuntimeError, NotImplementedError):
                    return False  # private operations: another torch may lack or change them
                # both round their sums of 40 to 216 terms once; entries are below 4
                if not bool((got - true).abs().max() < 16 * torch.finfo(dtype).eps):
                    return False
    return True
