"""The only file that turns configuration into objects.

Random initialisations draw from a forked generator seeded by the run's seed: global state is left
alone and the same configuration always builds the same weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from torch import nn

from ldm.checkpoint import WEIGHTS, find_checkpoint, load_strict, load_tensors
from ldm.checkpoint.perceptual_files import load_lpips_tensors, load_vision_tower
from ldm.config.models import (
    DitConfig,
    MMDitConfig,
    PretrainedConfig,
    UNetModelConfig,
    VaeModelConfig,
)
from ldm.config.schema import (
    DataConfig,
    DiffusionConfig,
    TextConfig,
    VaeRef,
)
from ldm.config.vae import GanConfig
from ldm.data.holdout import split_holdout
from ldm.data.sources import SourceSpec, open_source
from ldm.diffusion.core import Diffusion
from ldm.diffusion.prediction import PREDICTIONS
from ldm.diffusion.process import PROCESSES
from ldm.diffusion.weighting import WEIGHTINGS, Weighting, edm, sigmoid
from ldm.errors import ExitCode, LdmError, named
from ldm.exchange.initial import initial_denoiser
from ldm.exchange.opening import Options, file_text, open_codec
from ldm.exchange.sources import is_published
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.autoencoder_config import AutoencoderConfig
from ldm.models.discriminator import DiscriminatorConfig, PatchDiscriminator
from ldm.models.dit import DiT, DiTConfig
from ldm.models.dit_diffusers import fitted_dit
from ldm.models.external import fresh_codec, fresh_denoiser
from ldm.models.mmdit import MMDiT
from ldm.models.mmdit_config import CLASS, WITHOUT_POOLED, MMDiTConfig, fitted_mmdit
from ldm.models.perceptual import Lpips, MultiScaleGradients, VisionFeatures
from ldm.models.text import (
    ClassTextEncoder,
    FrozenTextEncoder,
    HuggingFaceTextEncoder,
    Reading,
    load_joint_text_encoder,
    load_text_encoder,
    random_text_encoder,
)
from ldm.models.unet import UNet
from ldm.models.unet_config import UNetConfig
from ldm.storage import read_json
from ldm.types import Source

INITIAL_LOGVAR = -6.0
"""Log-variance of a fresh VAE's posterior: a standard deviation of 0.05."""

M = TypeVar("M", bound=nn.Module)
S = TypeVar("S")


def seeded(make: Callable[[], M], seed: int) -> M:
    """`make()` with torch's generator seeded inside and restored afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def build_vae(config: VaeModelConfig, seed: int) -> AutoencoderKL:
    """A VAE to train: with random weights, whose posterior starts nearly certain, or pretrained.

    Raises:
        LdmError: code CONFIG where the pretrained one has another architecture than `config`.
    """
    if config.pretrained is not None:
        return _pretrained_vae(config, config.pretrained)
    vae = seeded(
        lambda: AutoencoderKL(
            AutoencoderConfig(
                latent_channels=config.latent_channels,
                block_out_channels=config.block_out_channels,
                layers_per_block=config.layers_per_block,
                norm_num_groups=config.norm_num_groups,
                mid_block_add_attention=config.mid_block_add_attention,
                scaling_factor=1.0,
            )
        ),
        seed,
    )
    # A standard normal posterior would drown the first latents in noise: the encoder then spends
    # its first thousand steps on growing them (2 dB after equal time on `shapes`).
    layer = vae.encoder.conv_out if vae.quant_conv is None else vae.quant_conv
    assert layer.bias is not None
    with torch.no_grad():
        layer.bias[config.latent_channels :] += INITIAL_LOGVAR
    return vae


def load_vae(ref: VaeRef, seed: int) -> Any:
    """The frozen VAE of a diffusion run: of a run, a checkpoint or a published model.

    Raises:
        LdmError: code IO when there is none at `ref.path`, or it is damaged.
    """
    if ref.path is None:
        return freeze(build_vae(ref.random, seed))
    if ref.scaling_factor is not None and not Path(ref.path).is_file():
        raise LdmError(
            f"{ref.path} says itself how its latents are scaled",
            where="vae.scaling_factor",
            fix="leave it out; it is for a single file that holds a VAE alone",
            code=ExitCode.CONFIG,
        )
    if is_published(ref.path):
        return freeze(open_codec(ref.path, Options(scaling_factor=ref.scaling_factor)))
    return load_vae_directory(_component(Path(ref.path), "vae"))


def load_vae_directory(folder: Path) -> Any:
    """A VAE from a directory with config.json and safetensors, in diffusers' layout.

    Returns:
        an AutoencoderKL; for another class of diffusers an ExternalCodec, which does the same.
    """
    values = read_json(folder / "config.json")
    if values.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
        return freeze(_with_weights(lambda: fresh_codec(values), folder))
    config = AutoencoderConfig.from_diffusers(values)
    return freeze(_with_weights(lambda: AutoencoderKL(config), folder))


def build_perceptual(kind: str, path: str | None, device: torch.device | str) -> nn.Module:
    """A frozen perceptual distance: (x_hat, x) (B, 3, H, W) in [-1, 1] -> (B,).

    Args:
        kind: "lpips" (VGG16), "lpips_alex", "gradients", or "clip".
        path: where its weights are: see `load_lpips_tensors`; for clip the run of
            `ldm train-clip`; gradients has none.
        device: where it works.

    Raises:
        LdmError: code IO when there are no weights, with what needs none; code USAGE for an
            unknown kind.
    """
    networks = {"lpips": "vgg", "lpips_alex": "alex", "gradients": "", "clip": ""}
    network = named("perceptual loss", networks, kind)
    if network:
        lpips = seeded(lambda: Lpips(network), 0)
        load_strict(lpips, load_lpips_tensors(network, path), path or f"the weights of {kind}")
        return freeze(lpips).to(device)
    if kind == "clip":
        return freeze(VisionFeatures(load_vision_tower(path))).to(device)
    return MultiScaleGradients().to(device)


def load_denoiser(checkpoint: Path) -> tuple[nn.Module, str]:
    """The denoiser of a checkpoint and the name of its folder, `unet` or `transformer`."""
    for name in ("transformer", "unet"):
        folder = checkpoint / name
        if (folder / "config.json").is_file():
            make = partial(_denoiser_of, read_json(folder / "config.json"))
            return freeze(_with_weights(make, folder)), name
    raise LdmError(
        "there is no denoiser here: neither transformer/config.json nor unet/config.json",
        where=str(checkpoint),
        fix="give a run directory that train_diffusion.py wrote",
        code=ExitCode.IO,
    )


def build_denoiser(
    config: DitConfig | MMDitConfig | PretrainedConfig | UNetModelConfig,
    *,
    channels: int,
    text: FrozenTextEncoder,
    seed: int,
    checkpointing: bool = False,
    learned_variance: bool = False,
) -> nn.Module:
    """A denoiser that fits the latents and the text encoder, with fresh or pretrained weights."""
    out_channels = 2 * channels if learned_variance else channels
    if isinstance(config, PretrainedConfig):
        return initial_denoiser(config, channels, out_channels, text, checkpointing)
    if isinstance(config, DitConfig):
        dit = fitted_dit(
            config.model_dump(exclude={"kind", "size", "pooled", "diffusers", "masking"}),
            channels=(channels, out_channels),
            text_dim=text.width,
            pooled_dim=text.pooled_width if config.pooled else None,
            labels=isinstance(text, ClassTextEncoder),
            diffusers=config.diffusers,
        )
        transformer = seeded(lambda: DiT(dit), seed)
        transformer.gradient_checkpointing = checkpointing
        return transformer
    if isinstance(config, MMDitConfig):
        fields = config.model_dump(exclude={"kind", "pooled"})
        mmdit = fitted_mmdit(
            fields | {"in_channels": channels, "out_channels": out_channels},
            text_dim=text.width,
            pooled_dim=text.pooled_width if config.pooled else None,
        )
        joint = seeded(lambda: MMDiT(mmdit), seed)
        joint.gradient_checkpointing = checkpointing
        return joint
    unet = UNetConfig(
        in_channels=channels,
        out_channels=out_channels,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        down_block_types=tuple(
            "CrossAttnDownBlock2D" if a else "DownBlock2D" for a in config.attention_levels
        ),
        up_block_types=tuple(
            "CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(config.attention_levels)
        ),
        # one number where one was given, as older checkpoints have it
        attention_head_dim=config.heads if config.head_dim is None else config.heads_per_level,
        transformer_layers_per_block=config.transformer_depth,
        use_linear_projection=config.linear_projection,
        cross_attention_dim=text.width,
        norm_num_groups=config.norm_num_groups,
    )
    if config.size_conditioning:
        unet = unet.with_sizes(text.pooled_width)
    net = seeded(lambda: UNet(unet), seed)
    net.gradient_checkpointing = checkpointing
    return net


def load_text(config: TextConfig, captions: Sequence[str], seed: int) -> FrozenTextEncoder:
    """The frozen text encoder; without a path, an untrained small one over these captions."""
    if config.classes:
        names = config.classes if config.classes != "captions" else sorted(set(captions))
        return ClassTextEncoder(names)
    encoder = _joint_text(config) if config.style != "single" else _text(config, captions, seed)
    encoder.zero_null = config.zero_null
    return encoder


def _text(config: TextConfig, captions: Sequence[str], seed: int) -> HuggingFaceTextEncoder:
    final_norm = True if config.final_norm is None else config.final_norm
    reading = Reading(config.padding, config.layer or -1, final_norm, config.lower_case)
    if config.path is None:
        limit = {} if config.max_tokens is None else {"max_tokens": config.max_tokens}
        encoder = random_text_encoder(captions, width=config.random_width, seed=seed, **limit)
        model, tokenizer = encoder.model, encoder.tokenizer
        return HuggingFaceTextEncoder(model, tokenizer, too_long=config.too_long, reading=reading)
    if Path(config.path).is_file():
        return file_text(config.path, reading, too_long=config.too_long)
    return load_text_encoder(
        _text_source(config.path),
        max_tokens=config.max_tokens,
        too_long=config.too_long,
        reading=reading,
    )


def _joint_text(config: TextConfig) -> FrozenTextEncoder:
    assert config.path is not None, "the configuration was checked"
    assert config.style != "single", "asked for a joint style"
    return load_joint_text_encoder(
        [_text_source(path) for path in (config.path, *config.further_paths)],
        config.style,
        padding=config.padding,
        max_tokens=config.max_tokens,
        t5_tokens=config.t5_tokens,
        t5_width=config.t5_width,
        too_long=config.too_long,
    )


def _text_source(path: str) -> Path | str:
    """What to load an encoder from: the newest checkpoint, where `path` is a run."""
    root = Path(path)
    return find_checkpoint(root) if root.is_dir() and any(root.glob("step-*")) else path


def build_diffusion(config: DiffusionConfig) -> Diffusion:
    """The process and parameterisation of an experiment, and whether its variance is learned."""
    process, prediction = PROCESSES[config.process], PREDICTIONS[config.prediction]
    needs_std = process.needs_data_std or prediction.needs_data_std
    data_std = config.data_std if needs_std else None
    return Diffusion(process, prediction, data_std, config.learned_variance)


def build_weighting(config: DiffusionConfig) -> Weighting | None:
    """The loss weighting of an experiment; None is the plain error of the prediction."""
    if config.weighting == "edm":
        return partial(edm, data_std=config.data_std)
    if config.weighting == "sigmoid" and config.sigmoid_bias is not None:
        return partial(sigmoid, bias=config.sigmoid_bias)
    return WEIGHTINGS[config.weighting]


def run_data(checkpoint: Path) -> tuple[DataConfig, TextConfig]:
    """What the run of a checkpoint saw: the sections `data` and `text` of its config.yaml.

    The other sections are not read, so that the run of another version can be measured.

    Raises:
        LdmError: code IO when the file is missing or these sections cannot be read.
    """
    return data_of(checkpoint), _section(checkpoint, "text", TextConfig)


def data_of(checkpoint: Path) -> DataConfig:
    """The section `data` of a checkpoint's config.yaml; raises as `run_data`."""
    return _section(checkpoint, "data", DataConfig)


def _section(checkpoint: Path, name: str, kind: Callable[..., S]) -> S:
    path = checkpoint / "config.yaml"
    try:
        return kind(**yaml.safe_load(path.read_text(encoding="utf-8"))[name])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        reason = str(error).partition("\n")[0]
        raise LdmError(
            f"the data of this run cannot be found ({type(error).__name__}: {reason})",
            where=str(path),
            fix="give a checkpoint with the config.yaml that its training wrote",
            code=ExitCode.IO,
        ) from None


def open_data(config: DataConfig) -> tuple[Source, Source | None]:
    """Training and held-out data; the held-out captions of `shapes` are a split of their own."""
    source = open_source(_source_spec(config))
    if config.source == "shapes":
        held = config.model_copy(update={"split": "val", "count": config.holdout or 64})
        return source, open_source(_source_spec(held))
    return split_holdout(source, config.holdout)


def _source_spec(config: DataConfig) -> SourceSpec:
    return SourceSpec(
        source=config.source,
        path=config.path or "",
        split=config.split,
        caption_column=config.caption_column,
        image_column=config.image_column,
        count=config.count,
        image_px=config.image_px,
        missing_caption=config.missing_caption,
    )


def freeze(model: M) -> M:
    """Evaluation mode, no gradients."""
    return model.eval().requires_grad_(False)


def _pretrained_vae(config: VaeModelConfig, path: str) -> AutoencoderKL:
    vae = load_vae(VaeRef(path=path), seed=0)
    if not isinstance(vae, AutoencoderKL):
        raise LdmError(
            f"the pretrained VAE is a {vae.config.class_name}, which cannot be trained here",
            where="model.pretrained",
            fix="give an AutoencoderKL",
            code=ExitCode.CONFIG,
        )
    wanted, found = config.model_dump(exclude={"pretrained"}), asdict(vae.config)
    if differing := [name for name, value in wanted.items() if found[name] != value]:
        raise LdmError(
            "the pretrained VAE has another architecture: "
            + "; ".join(f"{name} is {found[name]}, not {wanted[name]}" for name in differing),
            where="model",
            fix=" ".join(f"model.{n}={json.dumps(found[n])}" for n in differing),
            code=ExitCode.CONFIG,
        )
    return vae.train().requires_grad_(True)


def build_discriminator(config: GanConfig, channels: int, seed: int) -> PatchDiscriminator:
    """A PatchGAN with random weights for pictures of `channels` channels."""
    shape = DiscriminatorConfig(channels, config.width, config.layers, config.norm)
    return seeded(lambda: PatchDiscriminator(shape), seed)


def _component(path: Path, name: str) -> Path:
    if (path / "config.json").is_file():
        return path
    if (path / name / "config.json").is_file():
        return path / name
    return find_checkpoint(path) / name


def _with_weights(make: Callable[[], M], folder: Path) -> M:
    model = seeded(make, 0)
    load_strict(model, load_tensors(folder / WEIGHTS), str(folder / WEIGHTS))
    return model


def _denoiser_of(values: dict[str, object]) -> nn.Module:
    kind = values.get("_class_name")
    if kind == "LdmDiT":
        return DiT(DiTConfig.from_json(values))
    if kind in (CLASS, WITHOUT_POOLED):
        return MMDiT(MMDiTConfig.from_diffusers(values))
    if kind == "UNet2DConditionModel":
        return UNet(UNetConfig.from_diffusers(values))
    return fresh_denoiser(values)  # refuses a class that it does not know
