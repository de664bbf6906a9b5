"""The rules that span several fields of an experiment, each with a legal value. Loads no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ldm.config.dit_rules import dit_conflicts
from ldm.config.models import (
    DitConfig,
    MMDitConfig,
    PretrainedConfig,
    UNetModelConfig,
    VaeModelConfig,
)
from ldm.config.schema import (
    ClipExperiment,
    DiffusionExperiment,
    Experiment,
    OptimConfig,
    TrainConfig,
    VaeExperiment,
)
from ldm.config.text_rules import text_conflicts
from ldm.config.vae_rules import vae_conflicts
from ldm.diffusion.names import (
    GUIDANCE_NEEDS,
    coupling_refusal,
    legal_predictions,
    legal_samplers,
)
from ldm.diffusion.process import PROCESSES
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.schedule import DISTRIBUTIONS


def conflicts(config: Experiment) -> Iterator[tuple[str, str, str]]:
    """Every rule that spans fields and is broken, as (key, what, fix)."""
    yield from _shared_conflicts(config)
    if config.train.gradient_checkpointing and not isinstance(config, DiffusionExperiment):
        yield (
            "train.gradient_checkpointing",
            "only denoisers can recompute activations",
            "train.gradient_checkpointing=false",
        )
    if config.train.only != "all" and not isinstance(config, VaeExperiment):
        yield "train.only", f"only a VAE has a {config.train.only}", "train.only=all"
    if isinstance(config, VaeExperiment):
        yield from _vae_conflicts(config.model, "model")
        yield from _size_conflicts(config.data.image_px, config.model.downsample_factor)
        yield from vae_conflicts(config)
    if isinstance(config, ClipExperiment):
        yield from _clip_conflicts(config)
        if config.model.width % 32:
            yield "model.width", f"{config.model.width} is not a multiple of 32", "use 128"
        yield from _size_conflicts(config.data.image_px, config.model.patch_px)
    if isinstance(config, DiffusionExperiment):
        yield from _diffusion_conflicts(config)


def _shared_conflicts(config: Experiment) -> Iterator[tuple[str, str, str]]:
    data, train, optim = config.data, config.train, config.optim
    if data.source != "shapes" and data.path is None:
        yield "data.path", f"data.source={data.source} needs a path", "data.path=FOLDER"
    if data.source == "shapes" and data.path is not None:
        yield (
            "data.path",
            "data.source=shapes draws its own pictures and reads no path",
            ("remove data.path, or set data.source=imagefolder"),
        )
    if data.source == "shapes" and data.flip:
        yield (
            "data.flip",
            "shapes captions say left and right, so mirroring would falsify them",
            ("data.flip=false"),
        )
    if train.batch_size % train.accumulation:
        yield (
            "train.batch_size",
            (
                f"{train.batch_size} cannot be split into "
                f"train.accumulation={train.accumulation} parts"
            ),
            f"train.batch_size={_multiple(train.batch_size, train.accumulation)}",
        )
    if optim.warmup_steps > train.steps:
        yield (
            "optim.warmup_steps",
            (f"{optim.warmup_steps} steps of warm-up are more than train.steps={train.steps}"),
            f"optim.warmup_steps={train.steps // 10}",
        )


def _diffusion_conflicts(config: DiffusionExperiment) -> Iterator[tuple[str, str, str]]:
    if config.cache.enabled and config.data.crop == "random":
        yield (
            "data.crop",
            "a cache holds one crop of each picture, so crops cannot be random",
            "cache.enabled=false, or data.crop=center",
        )
    diffusion, model = config.diffusion, config.model
    legal = legal_predictions(diffusion.process)
    if diffusion.prediction not in legal:
        yield (
            "diffusion.prediction",
            (
                f"{diffusion.prediction} cannot be used with "
                f"diffusion.process={diffusion.process}: at one end of the process x0 cannot be "
                "recovered from it"
            ),
            f"use one of {', '.join(legal)}",
        )
    if config.sample.sampler not in (able := legal_samplers(diffusion.process)):
        yield (
            "sample.sampler",
            (
                f"{config.sample.sampler} cannot start at pure noise, where "
                f"diffusion.process={diffusion.process} does"
            ),
            f"use one of {', '.join(able)}",
        )
    yield from text_conflicts(config.text)
    yield from _objective_conflicts(config)
    yield from _coupling_conflicts(config)
    if config.sample.interval[0] >= config.sample.interval[1]:
        yield "sample.interval", f"{config.sample.interval} is empty", "sample.interval=[0.0, 1.0]"
    if (rule := config.sample.guidance) in GUIDANCE_NEEDS:
        yield (
            "sample.guidance",
            f"{rule} needs {GUIDANCE_NEEDS[rule]}, which is given when drawing, not stored",
            "sample.guidance=classifier_free",
        )
    if config.sample.cfg_scale not in (0.0, 1.0) and diffusion.caption_dropout == 0:
        yield (
            "sample.cfg_scale",
            (
                "guidance needs a network that was trained without captions some of the time, "
                "but diffusion.caption_dropout=0"
            ),
            "diffusion.caption_dropout=0.1, or sample.cfg_scale=1",
        )
    factor = config.vae.random.downsample_factor if config.vae.path is None else 1
    if config.vae.path is None:
        yield from _vae_conflicts(config.vae.random, "vae.random")
        if (given := config.vae.random.pretrained) is not None:
            yield "vae.random.pretrained", "a random VAE has no weights", f"vae.path={given}"
    if config.lora is not None and not isinstance(model, PretrainedConfig):
        yield (
            "lora",
            "adapters change a trained network, and this one begins with random weights",
            "model.kind=pretrained model.path=MODEL, or lora=null",
        )
    if isinstance(model, DitConfig | MMDitConfig):
        if model.head_dim % 4:
            yield (
                "model.head_dim",
                f"{model.head_dim} is not a multiple of 4",
                f"model.head_dim={_multiple(model.head_dim, 4)}",
            )
        elif model.hidden_size % model.head_dim:
            yield (
                "model.hidden_size",
                (f"{model.hidden_size} is not a multiple of model.head_dim={model.head_dim}"),
                f"model.hidden_size={_multiple(model.hidden_size, model.head_dim)}",
            )
        yield from _size_conflicts(config.data.image_px, factor * model.patch_size)
        if isinstance(model, MMDitConfig):
            known = config.vae.path is None
            yield from _mmdit_conflicts(model, config.data.image_px // factor if known else 0)
        else:
            yield from dit_conflicts(config, model)
    elif isinstance(model, UNetModelConfig):
        yield from _unet_conflicts(model)
        unet_factor = 2 ** (len(model.block_out_channels) - 1)
        yield from _size_conflicts(config.data.image_px, factor * unet_factor)


def _unet_conflicts(model: UNetModelConfig) -> Iterator[tuple[str, str, str]]:
    widths = model.block_out_channels
    for name in ("attention_levels", "heads", "transformer_depth"):
        given = getattr(model, name)
        if isinstance(given, tuple) and len(given) != len(widths):
            yield (
                f"model.{name}",
                f"{len(given)} entries for {len(widths)} levels of model.block_out_channels",
                f"give one {'true or false' if name == 'attention_levels' else 'number'} per level",
            )
            return
    for width, heads in zip(widths, model.heads_per_level, strict=True):
        per_head = model.head_dim
        if width % model.norm_num_groups or width % (per_head or heads):
            by = f"model.heads={heads}" if per_head is None else f"model.head_dim={per_head}"
            yield (
                "model.block_out_channels",
                (
                    f"{width} is not a multiple of model.norm_num_groups={model.norm_num_groups} "
                    f"and of {by}"
                ),
                f"use {_multiple(width, math.lcm(model.norm_num_groups, per_head or heads))}",
            )


def _mmdit_conflicts(model: MMDitConfig, side: int) -> Iterator[tuple[str, str, str]]:
    """`side`: of the latent, 0 where it is not known before the VAE is read."""
    if beyond := [block for block in model.dual_attention_layers if block >= model.num_layers]:
        yield (
            "model.dual_attention_layers",
            f"there is no block {beyond[0]} among model.num_layers={model.num_layers}",
            f"numbers from 0 to {model.num_layers - 1}",
        )
    if (needed := side // model.patch_size) > model.pos_embed_max_size:
        yield (
            "model.pos_embed_max_size",
            f"{model.pos_embed_max_size} positions a side do not hold the {needed} tokens of a "
            "training picture",
            f"model.pos_embed_max_size={needed}",
        )


def _objective_conflicts(config: DiffusionExperiment) -> Iterator[tuple[str, str, str]]:
    diffusion, law = config.diffusion, config.diffusion.timesteps
    legal = DISTRIBUTIONS[law.distribution].options
    for name in ("mean", "std", "scale"):
        if getattr(law, name) is not None and name not in legal:
            yield (
                f"diffusion.timesteps.{name}",
                f"distribution {law.distribution} has no {name}",
                f"diffusion.timesteps.{name}=null",
            )
    if diffusion.sigmoid_bias is not None and diffusion.weighting != "sigmoid":
        yield (
            "diffusion.sigmoid_bias",
            f"weighting {diffusion.weighting} has no bias",
            "diffusion.sigmoid_bias=null",
        )
    if SAMPLERS[config.sample.sampler].learned_variance and not diffusion.learned_variance:
        yield (
            "sample.sampler",
            f"{config.sample.sampler} needs a network that learned its variance",
            "diffusion.learned_variance=true, or sample.sampler=ddpm",
        )
    if diffusion.learned_variance and diffusion.source != "noise":
        yield (
            "diffusion.learned_variance",
            f"diffusion.source={diffusion.source} is no noise whose variance could be learned",
            "diffusion.learned_variance=false",
        )


def _coupling_conflicts(config: DiffusionExperiment) -> Iterator[tuple[str, str, str]]:
    diffusion, data = config.diffusion, config.data
    if diffusion.coupling == "independent" and diffusion.coupling_condition_weight != math.inf:
        yield (
            "diffusion.coupling_condition_weight",
            f"{diffusion.coupling_condition_weight:g} means nothing to coupling independent",
            "diffusion.coupling=optimal_transport, or diffusion.coupling_condition_weight=.inf",
        )
    if data.pairs is None:
        for key, value, plain in (
            ("source", diffusion.source, "noise"),
            ("latent_noise", diffusion.latent_noise, 0.0),
        ):
            if value != plain:
                yield (
                    f"diffusion.{key}",
                    f"{value} needs pairs whose ends it concerns, and data.pairs is null",
                    f"data.pairs=DIR, or diffusion.{key}={plain}",
                )
    else:
        yield from _pair_conflicts(config)
    coupling = diffusion.coupling if data.pairs is None else "pairs"
    if coupling != "independent" and diffusion.learned_variance:
        yield (
            "diffusion.learned_variance",
            f"noise that is coupled to the data ({coupling}) has no variance of reverse steps",
            "diffusion.learned_variance=false",
        )
    if data.pairs is None and diffusion.latent_noise > 0:
        return  # named above; which sampler fits depends on how that is mended
    sampler = config.sample.sampler
    refusal = coupling_refusal(
        sampler, SAMPLERS[sampler].eta, coupling=coupling, latent_noise=diffusion.latent_noise
    )
    if refusal is not None:
        yield "sample.sampler", *refusal


def _pair_conflicts(config: DiffusionExperiment) -> Iterator[tuple[str, str, str]]:
    """What pairs settle already, so that a wish for anything else would be ignored."""
    diffusion, data = config.diffusion, config.data
    for key, value, used in (
        ("diffusion.coupling", diffusion.coupling, "independent"),
        ("data.crop", data.crop, "center"),
        ("data.flip", data.flip, False),
        ("data.holdout", data.holdout, 0),
    ):
        if value != used:
            yield key, f"{value} means nothing to data.pairs={data.pairs}", f"{key}={used}"
    process = PROCESSES[diffusion.process]
    if diffusion.source == "pictures" and not process.pure_noise:
        legal = [name for name, other in PROCESSES.items() if other.pure_noise]
        yield (
            "diffusion.process",
            f"{diffusion.process} never reaches the source pictures: its last alpha is not 0",
            f"use one of {', '.join(legal)}",
        )
    if diffusion.source == "pictures" and diffusion.offset_noise > 0:
        yield (
            "diffusion.offset_noise",
            "there is no noise where pictures are the source",
            "diffusion.offset_noise=0",
        )
    if diffusion.latent_noise > 0 and diffusion.process != "rectified_flow":
        yield (
            "diffusion.process",
            f"latent noise s sqrt(t (1 - t)) is that of rectified_flow, not {diffusion.process}",
            "diffusion.process=rectified_flow",
        )


def _clip_conflicts(config: ClipExperiment) -> Iterator[tuple[str, str, str]]:
    """`train-clip` has its own loop, schedule and betas, and sees whole pictures: a wish for
    anything else is refused, not ignored."""
    optim, data = config.optim, config.data
    for key, value, used in (
        ("optim.schedule", optim.schedule, "cosine"),
        ("optim.final_fraction", optim.final_fraction, 0.0),
        ("optim.beta1", optim.beta1, OptimConfig().beta1),
        ("optim.beta2", optim.beta2, OptimConfig().beta2),
        ("data.crop", data.crop, "center"),
        ("data.flip", data.flip, False),
        ("data.too_small", data.too_small, "upscale"),
        ("data.workers", data.workers, 0),
        ("train.accumulation", config.train.accumulation, 1),
        ("train.compile", config.train.compile, False),
        ("train.ema_decay", config.train.ema_decay, TrainConfig().ema_decay),
        ("train.max_bad_steps", config.train.max_bad_steps, TrainConfig().max_bad_steps),
    ):
        if value != used:
            yield key, f"train-clip cannot do {value!r}", f"{key}={used}"


def _vae_conflicts(model: VaeModelConfig, key: str) -> Iterator[tuple[str, str, str]]:
    for width in model.block_out_channels:
        if width % model.norm_num_groups:
            yield (
                f"{key}.block_out_channels",
                (f"{width} is not a multiple of {key}.norm_num_groups={model.norm_num_groups}"),
                f"use {_multiple(width, model.norm_num_groups)}",
            )


def _size_conflicts(image_px: int, factor: int) -> Iterator[tuple[str, str, str]]:
    if image_px % factor:
        low = image_px // factor * factor
        sizes = f"{low} or {low + factor}" if low else f"{factor}"
        yield (
            "data.image_px",
            f"{image_px} is not a multiple of {factor}, the model's stride",
            (f"data.image_px={sizes}"),
        )


def _multiple(value: int, factor: int) -> int:
    return max(1, round(value / factor)) * factor
