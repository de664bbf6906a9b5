"""Low-rank adapters: W x + (alpha / rank) B A x in place of W x, with W frozen.

Source: Hu et al. 2021 (arXiv 2106.09685), eq. 3. Training goes through peft; what it trained is
kept in the form that diffusers loads, and merging it into a network needs no peft.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ldm.errors import ExitCode, LdmError, missing_package

TARGETS: dict[str, tuple[str, ...]] = {
    "attention": (
        *("to_q", "to_k", "to_v", "to_kv", "to_qkv", "to_out", "to_out.0"),
        *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    ),
    "linear": (),
}
"""Which layers get adapters: the products of every attention, or every linear layer."""

FOLDER = "lora"
"""Where a checkpoint keeps the adapters that its run trained."""

WEIGHTS = "pytorch_lora_weights.safetensors"
"""The file name by which diffusers finds adapters in a directory."""


@dataclass(frozen=True)
class Adapter:
    """One layer's adapter.

    Args:
        down: A, (rank, in) or (rank, in, kh, kw).
        up: B, (out, rank) or (out, rank, 1, 1).
        scale: alpha / rank.
    """

    down: Tensor
    up: Tensor
    scale: float = 1.0

    def delta(self) -> Tensor:
        """The change of the layer's weight, float32, of its shape."""
        up, down = self.up.float().flatten(1), self.down.float().flatten(1)
        return (self.scale * (up @ down)).reshape(self.up.shape[0], *self.down.shape[1:])


def add_adapters(net: nn.Module, *, rank: int, alpha: float, targets: str = "attention") -> None:
    """Puts trainable adapters into `net`, in place, and freezes everything else.

    B starts at 0, so the first outputs are those of `net`; A is drawn from torch's generator.

    Args:
        net: a denoiser.
        rank: inner width of every adapter.
        alpha: the adapters are scaled by alpha / rank.
        targets: a name of `TARGETS`.

    Raises:
        LdmError: peft is not installed, or no layer of `net` is a target (code CONFIG).
    """
    try:
        import peft
    except ImportError as error:
        raise missing_package("peft", "lora", "training adapters") from error
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=_targets(net, targets))
    peft.inject_adapter_in_model(config, net)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(".lora_" in name)


def adapters_of(net: nn.Module) -> dict[str, Adapter]:
    """The adapters that `add_adapters` put into `net`, by the name of their layer."""
    found = {}
    for name, layer in net.named_modules():
        if hasattr(layer, "lora_A") and "default" in layer.lora_A:
            part: Any = layer
            down, up = part.lora_A["default"].weight, part.lora_B["default"].weight
            found[name] = Adapter(down.detach(), up.detach(), float(part.scaling["default"]))
    return found


def base_state(net: nn.Module) -> dict[str, Tensor]:
    """The weights of a network with adapters as they were, under their own names."""
    state = {n: v for n, v in net.state_dict().items() if ".lora_" not in n}
    return {name.replace(".base_layer.", "."): value for name, value in state.items()}


def to_tensors(adapters: Mapping[str, Adapter], folder: str) -> dict[str, Tensor]:
    """Adapters as diffusers stores them; alpha is folded into B, so every reader agrees.

    Args:
        adapters: of a whole network.
        folder: `unet` or `transformer`, the prefix of every name.
    """
    tensors = {}
    for name, adapter in adapters.items():
        tensors[f"{folder}.{name}.lora_A.weight"] = adapter.down
        tensors[f"{folder}.{name}.lora_B.weight"] = adapter.up * adapter.scale
    return tensors


def from_tensors(
    tensors: Mapping[str, Tensor],
    net: nn.Module,
    where: str,
    alphas: Mapping[str, float] | None = None,
) -> dict[str, Adapter]:
    """Reads adapters written by diffusers, peft or kohya's scripts.

    Args:
        tensors: of a safetensors file.
        net: the network that they are for.
        where: the file, for messages.
        alphas: alpha per layer where a file keeps them in its metadata, by peft's patterns for the
            ends of names; "" is all others.

    Raises:
        LdmError: code IO for tensors that fit no layer of `net`, by name: nothing is left out
            silently.
    """
    layers = {
        name: layer
        for name, layer in net.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    }
    flat = {name.replace(".", "_"): name for name in layers}
    parts: dict[str, dict[str, Tensor]] = {}
    strangers = []
    for key, value in tensors.items():
        stem, role = _split(key)
        name = _layer_name(stem, layers, flat)
        if role is None or name is None:
            strangers.append(key)
        else:
            parts.setdefault(name, {})[role] = value
    strangers += [name for name, part in parts.items() if not {"down", "up"} <= part.keys()]
    adapters = {}
    for name, part in parts.items():
        if name in strangers:
            continue
        rank = part["down"].shape[0]
        alpha = float(part["alpha"]) if "alpha" in part else _stated(alphas or {}, name, rank)
        adapters[name] = Adapter(part["down"], part["up"], alpha / rank)
        if adapters[name].delta().shape != layers[name].get_parameter("weight").shape:
            strangers.append(name)
    if strangers or not adapters:
        shown = ", ".join(sorted(strangers)[:5]) or "none at all"
        raise LdmError(
            f"{len(strangers)} of its tensors fit no layer of this {type(net).__name__} ({shown})",
            where=where,
            fix="use adapters that were trained on this architecture, denoiser only",
            code=ExitCode.IO,
        )
    return adapters


@torch.no_grad()
def merge(net: nn.Module, adapters: Mapping[str, Adapter], strength: float = 1.0) -> None:
    """Adds adapters to the weights of `net`, in place; `strength` -1 takes them out again."""
    layers = dict(net.named_modules())
    for name, adapter in adapters.items():
        weight: Any = layers[name].weight
        weight.copy_(weight.float() + strength * adapter.delta().to(weight.device))


def _targets(net: nn.Module, targets: str) -> list[str]:
    linear = [name for name, layer in net.named_modules() if isinstance(layer, nn.Linear)]
    wanted = TARGETS[targets]
    chosen = [n for n in linear if not wanted or n.endswith(tuple(f".{w}" for w in wanted))]
    if not chosen:
        raise LdmError(
            f"no layer of this {type(net).__name__} is one of lora.targets={targets!r}",
            where="lora.targets",
            fix=f"use {' or '.join(TARGETS)}",
            code=ExitCode.CONFIG,
        )
    return chosen


def stated_alphas(metadata: Mapping[str, str], where: str) -> dict[str, float]:
    """The alphas that diffusers writes into a file's metadata, for `from_tensors`.

    Raises:
        LdmError: code IO for a form of adapter that is scaled or built otherwise.
    """
    facts = json.loads(metadata.get(METADATA, "{}"))
    alphas: dict[str, float] = {}
    for name, value in facts.items():
        if value and name.rpartition(".")[2] in OTHER_FORMS:
            raise LdmError(
                f"adapters with {name}={value} are not read: their product is another one",
                where=where,
                fix="use plain low-rank adapters, or merge these in the program that made them",
                code=ExitCode.IO,
            )
        if name.endswith("lora_alpha"):
            alphas[""] = float(value)
        elif name.endswith("alpha_pattern"):
            alphas |= {layer: float(alpha) for layer, alpha in (value or {}).items()}
    return alphas


def _stated(alphas: Mapping[str, float], name: str, rank: int) -> float:
    """The alpha of a layer; its keys are patterns for the end of a name, as peft reads them."""
    for pattern, alpha in alphas.items():
        if pattern and re.match(rf"(.*\.)?({pattern})$", name):
            return alpha
    return alphas.get("", float(rank))


def _split(key: str) -> tuple[str, str | None]:
    """A tensor's name as its layer and its role: down, up or alpha."""
    for ending, role in ENDINGS.items():
        if key.endswith(ending):
            return key.removesuffix(ending), role
    return key, None


def _layer_name(stem: str, layers: Mapping[str, nn.Module], flat: Mapping[str, str]) -> str | None:
    for prefix in PREFIXES:
        if stem.startswith(prefix):
            rest = stem.removeprefix(prefix)
            return rest if rest in layers else flat.get(rest)
    return stem if stem in layers else None


ENDINGS = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".alpha": "alpha",
}
"""How peft, older diffusers and kohya's scripts call the two matrices."""

METADATA = "lora_adapter_metadata"
"""Where diffusers keeps the alphas of a file: a JSON object in its safetensors metadata."""

OTHER_FORMS = ("use_rslora", "use_dora", "lora_bias")
"""What peft calls adapters that scale by the root of the rank, or have more than two matrices."""

PREFIXES: Sequence[str] = ("unet.", "transformer.", "lora_unet_", "lora_transformer_")
