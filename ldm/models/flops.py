"""What a network costs: its parameters and its floating-point operations, by parts.

Operations are counted while the network runs on torch's `meta` device, which computes nothing and
holds no weights: two per multiply-add of every convolution and matrix product, attention included;
norms, activations and sums are left out, as in published figures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ldm.errors import LdmError
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.autoencoder_config import AutoencoderConfig
from ldm.models.dit import DiT
from ldm.models.dit_config import DiTConfig
from ldm.models.mmdit import MMDiT
from ldm.models.mmdit_config import MMDiTConfig
from ldm.models.presets import NetworkConfig
from ldm.models.text.published import published_text_model
from ldm.models.unet import UNet
from ldm.models.unet_config import UNetConfig
from ldm.types import TextEmbedding

Shapes = dict[str, list[int]]


@dataclass(frozen=True)
class Cost:
    """What one network costs for one sample.

    Args:
        parameters: see `parameters_of`.
        flops: of one forward pass.
        passes: the same by pass: "forward", or "encode" and "decode" of an autoencoder.
        layers: per top-level part its parameters and its share of `flops`.
        shape: sizes of the inputs counted with.
    """

    parameters: int
    flops: int
    passes: dict[str, int]
    layers: dict[str, dict[str, int]]
    shape: Shapes


def on_meta(config: NetworkConfig) -> nn.Module:
    """The network of a configuration, without memory for its weights."""
    with torch.device("meta"):
        if isinstance(config, UNetConfig):
            return UNet(config)
        if isinstance(config, DiTConfig):
            return DiT(config)
        if isinstance(config, MMDiTConfig):
            return MMDiT(config)
        return AutoencoderKL(config)


def parameters_of(net: nn.Module) -> int:
    """As published: the original DiT counts its fixed table of positions."""
    if isinstance(net, DiT) and net.config.num_classes is not None:
        return net.published_parameters()
    return sum(parameter.numel() for parameter in net.parameters())


def cost_of(net: nn.Module, size: tuple[int, int], text_tokens: int) -> Cost:
    """Counts one sample through a network that lies on the meta device.

    Args:
        net: a network of `on_meta`.
        size: height and width of the latent; of the picture for an autoencoder.
        text_tokens: tokens of the caption.

    Raises:
        LdmError: a size that the network cannot take.
    """
    config: Any = net.config
    if isinstance(config, AutoencoderConfig):
        passes, shape = _codec_passes(net, config, size)
    else:
        x, text = _inputs(config, size, text_tokens)
        shape = {"latent": list(x.shape), **_shapes(text)}
        passes = {"forward": lambda: net(x, torch.zeros(1, device="meta"), text)}
    return _counted(net, passes, shape)


def text_cost(name: str, tokens: int) -> Cost:
    """Counts one prompt of so many tokens through a published text encoder, of `text/published`."""
    net = published_text_model(name)
    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    return _counted(net, {"forward": lambda: net(input_ids=ids)}, {"ids": list(ids.shape)})


def _counted(net: nn.Module, passes: dict[str, Callable[[], Any]], shape: Shapes) -> Cost:
    layers = {
        name: {"parameters": sum(p.numel() for p in part.parameters()), "flops": 0}
        for name, part in net.named_children()
    }
    counts = {}
    for name, run in passes.items():
        with (
            FlopCounterMode(display=False) as counter,
            torch.no_grad(),
            _Shares(net, counter) as of,
        ):
            run()
        counts[name] = counter.get_total_flops()
        for part, share in of.flops.items():
            layers[part]["flops"] += share
    return Cost(parameters_of(net), sum(counts.values()), counts, layers, shape)


class _Shares:
    """Operations by top-level part: each belongs to the outermost part that is running.

    A part's inner modules may also be called by the network itself, past the part's own `forward`.
    """

    def __init__(self, net: nn.Module, counter: FlopCounterMode) -> None:
        self.net, self.counter = net, counter
        self.flops = {name: 0 for name, _ in net.named_children()}
        self._depth, self._before = 0, 0
        self._handles: list[Any] = []

    def __enter__(self) -> _Shares:
        for name, part in self.net.named_children():
            for module in part.modules():
                self._handles.append(module.register_forward_pre_hook(self._enter))
                self._handles.append(module.register_forward_hook(self._leave(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _enter(self, *_: object) -> None:
        if self._depth == 0:
            self._before = self.counter.get_total_flops()
        self._depth += 1

    def _leave(self, name: str) -> Callable[..., None]:
        def leave(*_: object) -> None:
            self._depth -= 1
            if self._depth == 0:
                self.flops[name] += self.counter.get_total_flops() - self._before

        return leave


def _codec_passes(
    net: Any, config: AutoencoderConfig, size: tuple[int, int]
) -> tuple[dict[str, Callable[[], Any]], Shapes]:
    factor = config.downsample_factor
    if size[0] % factor or size[1] % factor:
        raise LdmError(
            f"{size[0]}x{size[1]} pixels are not whole latents of {factor}x{factor}",
            where="--size",
            fix=f"use multiples of {factor}",
        )
    pixels = _empty(1, config.in_channels, *size)
    latents = _empty(1, config.latent_channels, *(side // factor for side in size))
    passes = {"encode": lambda: net.moments(pixels), "decode": lambda: net.decode_raw(latents)}
    return passes, {"pixels": list(pixels.shape), "latent": list(latents.shape)}


def _inputs(
    config: UNetConfig | DiTConfig | MMDiTConfig, size: tuple[int, int], tokens: int
) -> tuple[Tensor, TextEmbedding]:
    """A latent and a caption of the widths that a denoiser reads."""
    x = _empty(1, config.in_channels, *size)
    sizes = None
    if isinstance(config, UNetConfig):
        width, pooled = config.cross_attention_dim, None
        if config.addition_embed_type is not None:
            assert config.projection_class_embeddings_input_dim is not None
            assert config.addition_time_embed_dim is not None
            features = 6 * config.addition_time_embed_dim
            pooled = config.projection_class_embeddings_input_dim - features
            sizes = _empty(1, 6)
    elif isinstance(config, MMDiTConfig):
        width, pooled = config.joint_attention_dim, config.pooled_projection_dim
    else:
        labels = None if config.num_classes is None else config.num_classes + 1
        width, pooled = config.text_dim or 1, config.pooled_dim or labels
        sizes = _empty(1, 6) if config.size_conditions else None
        tokens = 0 if config.text_dim is None else tokens
    mask = torch.ones(1, tokens, dtype=torch.bool, device="meta")
    vector = None if pooled is None else _empty(1, pooled)
    return x, TextEmbedding(_empty(1, tokens, width), mask, vector, sizes)


def _shapes(text: TextEmbedding) -> Shapes:
    parts = {"text": text.tokens, "pooled": text.pooled, "sizes": text.sizes}
    return {
        name: list(part.shape)
        for name, part in parts.items()
        if part is not None and part.numel() > 0
    }


def _empty(*shape: int) -> Tensor:
    return torch.empty(*shape, device="meta")
