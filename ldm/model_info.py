"""`ldm model`: what a network costs; by a published name, an experiment file or a directory.

Nothing is computed and no weights are read: networks are built on torch's `meta` device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ldm.build import build_denoiser, build_vae, load_text, open_data
from ldm.checkpoint import find_checkpoint
from ldm.config.files import load
from ldm.config.models import PretrainedConfig
from ldm.config.schema import DiffusionExperiment, VaeExperiment
from ldm.errors import ExitCode, LdmError, named
from ldm.models.autoencoder_config import AutoencoderConfig
from ldm.models.dit_config import DiTConfig
from ldm.models.flops import Cost, cost_of, on_meta, text_cost
from ldm.models.mmdit_config import WITHOUT_POOLED, MMDiTConfig
from ldm.models.presets import PRESETS, NetworkConfig
from ldm.models.text.published import PUBLISHED
from ldm.models.unet_config import UNetConfig
from ldm.storage import read_json

TOKENS = 77
"""Caption length where nothing states one: CLIP's."""
PIXELS = (512, 512)
"""Picture of an autoencoder that states no size."""
BYTES = {"weights_float32": 4, "weights_bfloat16": 2, "training_float32": 16}
"""A parameter's bytes; in training its gradient and AdamW's two moments come with it."""

CLASSES: dict[str, type[NetworkConfig]] = {
    "UNet2DConditionModel": UNetConfig,
    "SD3Transformer2DModel": MMDiTConfig,
    WITHOUT_POOLED: MMDiTConfig,
    "DiTTransformer2DModel": DiTConfig,
    "PixArtTransformer2DModel": DiTConfig,
    "AutoencoderKL": AutoencoderConfig,
}
"""Classes of `config.json` that are read as diffusers writes them."""


class Widths(NamedTuple):
    """Of a text encoder: what a denoiser is built for."""

    width: int
    pooled_width: int | None


class Asked(NamedTuple):
    """A network on the meta device, and the inputs it is to be counted with."""

    net: nn.Module
    size: tuple[int, int]
    text_tokens: int


def model_info(name: str, size: tuple[int, int] | None = None) -> dict[str, Any]:
    """Parameters, floating-point operations and memory of a network.

    Args:
        name: of PRESETS or a published text encoder, an experiment file, a run or checkpoint, or
            a diffusers directory.
        size: height and width of the latent, of the picture for an autoencoder; else the size
            that the preset, experiment or directory states.

    Returns:
        name, class, parameters, flops (one forward pass of one sample, two per multiply-add),
        passes, shape (of the inputs counted with), memory_bytes and layers; of a whole model the
        denoiser, with the others under `components`.

    Raises:
        LdmError: an unknown name, with the nearest; or a class without a module here.
    """
    if name in PUBLISHED:
        if size is not None:
            raise LdmError("a text encoder has no picture size", where="--size", fix="leave it out")
        return _described(name, PUBLISHED[name][0], text_cost(name, TOKENS))
    if name in PRESETS:
        preset = PRESETS[name]
        asked = {name: Asked(on_meta(preset.config), preset.size, preset.text_tokens)}
    elif name.endswith((".yaml", ".yml")):
        asked = {name: _of_experiment(Path(name))}
    elif Path(name).exists():
        asked = _of_directory(Path(name))
    else:
        named("model", PRESETS | dict.fromkeys(PUBLISHED), name)
        raise AssertionError("an unknown name was refused")
    if size is not None:  # of the first: the others have sizes of another kind
        first = next(iter(asked))
        asked[first] = asked[first]._replace(size=size)
    main, *rest = (
        _described(key, type(one.net).__name__, cost_of(*one)) for key, one in asked.items()
    )
    return main | ({"components": rest} if rest else {})


def model_names() -> list[str]:
    """The published networks known by name."""
    return [*PRESETS, *PUBLISHED]


def info_text(info: Mapping[str, Any]) -> str:
    """The same for people: a few lines and a table of the parts."""
    shapes = ", ".join(f"{key} {'x'.join(map(str, shape))}" for key, shape in info["shape"].items())
    flops = ", ".join(f"{name} {_billions(count)}" for name, count in info["passes"].items())
    total = f" = {_billions(info['flops'])}" if len(info["passes"]) > 1 else ""
    memory = {key: _billions(size) for key, size in info["memory_bytes"].items()}
    width = max(len(part) for part in info["layers"])
    lines = [
        f"{info['name']} ({info['class']})",
        f"  parameters  {info['parameters']:,}",
        f"  GFLOP       {flops}{total}, for {shapes}",
        f"  GB          weights {memory['weights_float32']} float32, "
        f"{memory['weights_bfloat16']} bfloat16; training {memory['training_float32']} "
        "(weights, gradients, AdamW) before activations",
        "",
        f"  {'part':<{width}}  {'parameters':>15}  {'GFLOP':>11}",
        *(
            f"  {part:<{width}}  {cost['parameters']:>15,}  {_billions(cost['flops']):>11}"
            for part, cost in info["layers"].items()
        ),
    ]
    further = [info_text(component) for component in info.get("components", ())]
    return "\n\n".join(["\n".join(lines), *further])


def _billions(count: int) -> str:
    value = count / 1e9
    return f"{value:,.1f}" if value >= 100 else f"{value:.3g}"


def _described(name: str, kind: str, cost: Cost) -> dict[str, Any]:
    memory = {key: count * cost.parameters for key, count in BYTES.items()}
    return {"name": name, "class": kind, **asdict(cost), "memory_bytes": memory}


def _of_experiment(path: Path) -> Asked:
    config = load([str(path)], [])
    if isinstance(config, VaeExperiment):
        with torch.device("meta"):
            vae = build_vae(config.model.model_copy(update={"pretrained": None}), seed=0)
        return Asked(vae, (config.data.image_px, config.data.image_px), 0)
    if not isinstance(config, DiffusionExperiment):
        raise LdmError(
            f"an experiment of stage {config.stage} has no denoiser and no VAE",
            where=str(path),
            fix="give an experiment of stage diffusion or vae",
        )
    if isinstance(config.model, PretrainedConfig):
        raise LdmError(
            f"this experiment takes its denoiser from {config.model.path}",
            where=str(path),
            fix=f"ldm model info {config.model.path}",
        )
    channels, factor = config.vae.random.latent_channels, config.vae.random.downsample_factor
    if config.vae.path is not None:
        found = _config_of(_folder(Path(config.vae.path), "vae"))
        assert isinstance(found, AutoencoderConfig)
        channels, factor = found.latent_channels, found.downsample_factor
    text: Any = Widths(config.text.random_width, config.text.random_width)
    if config.text.path is not None or config.text.classes:
        named_by_data = config.text.classes == "captions"
        text = load_text(
            config.text, open_data(config.data)[0].captions if named_by_data else (), 0
        )
    with torch.device("meta"):
        net = build_denoiser(
            config.model,
            channels=channels,
            text=text,
            seed=0,
            learned_variance=config.diffusion.learned_variance,
        )
    side = config.data.image_px // factor
    return Asked(net, (side, side), config.text.max_tokens or TOKENS)


def _of_directory(path: Path) -> dict[str, Asked]:
    """The denoiser and then the VAE of a whole model, or the one network of a folder."""
    if (path / "config.json").is_file():
        return {str(path): _asked(_config_of(path))}
    parts = [name for name in ("transformer", "unet", "vae") if _holds(path, name)]
    if not parts:
        path = find_checkpoint(path)
        parts = [name for name in ("transformer", "unet", "vae") if _holds(path, name)]
    if not parts:
        raise LdmError(
            "there is no network here: neither config.json nor transformer/, unet/ or vae/",
            where=str(path),
            fix="give a run, a checkpoint or a diffusers directory",
            code=ExitCode.IO,
        )
    asked = {str(path / name): _asked(_config_of(path / name)) for name in parts}
    if not (path / "contract.json").is_file():
        return asked
    contract = read_json(path / "contract.json")
    height, width = contract["image_sizes"][0]
    factor, tokens = contract["downsample_factor"], contract["max_tokens"]
    sizes = {name: (height // factor, width // factor) for name in ("transformer", "unet")}
    sizes["vae"] = (height, width)
    return {
        str(path / name): asked[str(path / name)]._replace(size=sizes[name], text_tokens=tokens)
        for name in parts
    }


def _asked(config: NetworkConfig) -> Asked:
    """A network with the size that its configuration states."""
    if isinstance(config, AutoencoderConfig):
        return Asked(on_meta(config), PIXELS, 0)
    if isinstance(config, DiTConfig):
        side = (config.base_size or 16) * config.patch_size
    else:
        side = config.sample_size or 64
    return Asked(on_meta(config), (side, side), TOKENS)


def _folder(path: Path, name: str) -> Path:
    if (path / "config.json").is_file():
        return path
    return path / name if _holds(path, name) else find_checkpoint(path) / name


def _holds(path: Path, name: str) -> bool:
    return (path / name / "config.json").is_file()


def _config_of(folder: Path) -> NetworkConfig:
    values = read_json(folder / "config.json")
    kind = values.get("_class_name")
    if kind == "LdmDiT":
        return DiTConfig.from_json(values)
    if kind not in CLASSES:
        raise LdmError(
            f"a {kind} has no module here whose cost could be counted",
            where=str(folder / "config.json"),
            fix=f"give one of {', '.join([*CLASSES, 'LdmDiT'])}",
        )
    return CLASSES[kind].from_diffusers(values)
