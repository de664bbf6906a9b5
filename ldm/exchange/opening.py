"""A published model, opened: networks, text encoder, and a contract from its configurations."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch import nn

from ldm.checkpoint.contract import Contract
from ldm.config.schema import SampleConfig
from ldm.diffusion.process import PROCESSES
from ldm.errors import ExitCode, LdmError, named
from ldm.exchange import schedulers
from ldm.exchange.directory import (
    denoiser_folder,
    load_codec_folder,
    load_denoiser_folder,
    read_index,
    read_object,
)
from ldm.exchange.schedulers import Schedule
from ldm.exchange.single_file import Parts, read_file
from ldm.exchange.sources import identity, is_published, located
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.text import (
    FrozenTextEncoder,
    HuggingFaceTextEncoder,
    JointTextEncoder,
    Reading,
    clip_tokenizer,
    load_diffusers_text,
)
from ldm.models.text.files import load_tokenizer
from ldm.models.text.joint import SUFFIXES, penultimate
from ldm.models.text.tokens import TooLong
from ldm.models.text.vocabulary import END
from ldm.types import TextEmbedding

log = logging.getLogger(__name__)

CAPTION_DROPOUT = 0.1
"""Published models do not say it; Stable Diffusion 1 was trained with 10 % (its model card)."""
CLIP_VOCABULARY = 49_408
SD_CHANNELS = 4
LATENT_SCALES: dict[float, tuple[str, float | None]] = {
    0.18215: ("SD 1 and 2", None),
    0.13025: ("SDXL", None),
    1.5305: ("SD 3", 0.0609),
    0.3611: ("FLUX", 0.1159),
}
"""scaling_factor -> whose codec has it, and the shift_factor beside it there."""
OPEN_CLIP_PAD = "!"
"""The token of id 0, with which open_clip pads; OpenAI's towers pad with the end of text."""


@dataclass(frozen=True)
class Options:
    """What a file may leave open.

    Args:
        prediction: eps, v, x0 or flow; None takes what the model says.
        variant: of weight files, such as fp16.
        allow_unused: log tensors that are not understood instead of refusing the file.
        tokenizer: directory of the tokenizer, for single files whose vocabulary is not CLIP's; one
            with tokenizer/, tokenizer_2/ ... where the encoders have different ones.
        scaling_factor: of the latents of a file that holds a VAE alone.
    """

    prediction: str | None = None
    variant: str | None = None
    allow_unused: bool = False
    tokenizer: str | None = None
    scaling_factor: float | None = None


@dataclass(frozen=True)
class Defaults:
    """How a pipeline class of diffusers draws when it is told nothing."""

    steps: int
    cfg_scale: float
    side: int = 64
    """Of its latents, where the network's configuration does not say."""


DEFAULTS = {
    "StableDiffusionPipeline": Defaults(50, 7.5),
    "StableDiffusionXLPipeline": Defaults(50, 5.0),
    "StableDiffusion3Pipeline": Defaults(28, 7.0),
    "PixArtAlphaPipeline": Defaults(20, 4.5),
    "PixArtSigmaPipeline": Defaults(20, 4.5),
    "SanaPipeline": Defaults(20, 4.5),
    "FluxPipeline": Defaults(28, 1.0, side=128),
}
USUAL = Defaults(30, 5.0)


@dataclass(frozen=True)
class Published:
    """Somebody else's model as ours.

    Args:
        net: the denoiser.
        vae: the codec.
        encoder: of prompts.
        null: what guidance compares with, one row.
        contract: what the weights mean, as far as its files say.
        pipeline: its class in diffusers.
        name: where it came from.
        identity: hash of its files.
    """

    net: nn.Module
    vae: Any
    encoder: FrozenTextEncoder
    null: TextEmbedding
    contract: Contract
    pipeline: str
    name: str
    identity: str


def open_published(source: Path | str, options: Options = Options()) -> Published:  # noqa: B008
    """Opens a diffusers directory, a Hub id or a single file of the original layout.

    Raises:
        LdmError: code IO for what is missing, damaged or a pickle; code CONFIG for what has no
            counterpart here, by its name.
    """
    path = located(source)
    if path.is_dir():
        return _open_directory(path, options)
    parts = read_file(path, allow_unused=options.allow_unused)
    if parts.net is None:
        raise LdmError(
            "this file holds an autoencoder alone",
            where=str(path),
            fix="use it as vae.path in a configuration, or give the file of a whole model",
        )
    return _open_parts(path, parts, options)


def refuse_useless(source: Path | str, options: Options) -> None:
    """Refuses what was given for another kind of model than `source` is: it would do nothing.

    Raises:
        LdmError: code USAGE, with the options and what they are for.
    """
    legal: tuple[str, ...]
    if Path(source).is_file():
        legal, what = ("prediction", "allow_unused", "tokenizer"), "a single file"
    elif is_published(source):
        legal, what = ("prediction", "variant"), "a diffusers directory"
    else:
        legal, what = (), "a run, whose contract says everything"
    given = [
        field.name for field in fields(Options) if getattr(options, field.name) != field.default
    ]
    if useless := [name for name in given if name not in legal]:
        raise LdmError(
            f"{', '.join(useless)} means nothing for {what}",
            where=str(source),
            fix=f"leave out {' and '.join('--' + name.replace('_', '-') for name in useless)}",
        )


def open_codec(source: Path | str, options: Options = Options()) -> Any:  # noqa: B008
    """The autoencoder of a published model: its directory, `vae/` in it, a file, or a lone VAE."""
    path = located(source)
    if path.is_dir():
        folder = path if (path / "config.json").is_file() else path / "vae"
        return load_codec_folder(folder, variant=options.variant)
    parts = read_file(path, allow_unused=options.allow_unused)
    if parts.net is not None:
        return parts.vae
    return _scaled(parts.vae, options.scaling_factor, path)


def _scaled(vae: AutoencoderKL, scale: float | None, path: Path) -> AutoencoderKL:
    """A codec from a file of its own, which does not say how its latents are scaled."""
    if scale is None and vae.config.latent_channels != SD_CHANNELS:
        known = ", ".join(f"{each:g} ({name})" for each, (name, _) in LATENT_SCALES.items())
        raise LdmError(
            f"a file of a VAE alone does not say how its {vae.config.latent_channels} channels are "
            "scaled",
            where=str(path),
            fix=f"vae.scaling_factor=NUMBER; published ones have {known}",
            code=ExitCode.CONFIG,
        )
    if scale is None:
        log.info("%s: vae.scaling_factor is taken as that of SD 1 and 2; SDXL's is 0.13025", path)
        return vae
    vae.config = replace(
        vae.config, scaling_factor=scale, shift_factor=LATENT_SCALES.get(scale, ("", None))[1]
    )
    return vae


def open_denoiser(source: Path | str, options: Options = Options()) -> nn.Module:  # noqa: B008
    """The denoiser of a published model; errors as `open_published`."""
    path = located(source)
    if path.is_dir():
        return load_denoiser_folder(denoiser_folder(path), variant=options.variant)
    net = read_file(path, allow_unused=options.allow_unused).net
    if net is None:
        raise LdmError(
            "this file holds an autoencoder alone",
            where=str(path),
            fix="give that of a whole model",
        )
    return net


def file_text(path: str, reading: Reading, *, too_long: TooLong) -> HuggingFaceTextEncoder:
    """The one text encoder of a single file, read as a configuration says.

    Raises:
        LdmError: code CONFIG for a file with several, else as `read_file`.
    """
    parts = read_file(located(path), allow_unused=True)
    if len(parts.towers) != 1:
        raise LdmError(
            f"this file has {len(parts.towers)} text encoders",
            where=path,
            fix="give a diffusers directory with text.style sdxl or sd3, or `ldm export` this file",
            code=ExitCode.CONFIG,
        )
    pad = OPEN_CLIP_PAD if parts.kind.name == "sd2" else END
    model: Any = parts.towers[0].model
    words = _tokenizer(Path(path), model.config.vocab_size, Options(), pad)
    return HuggingFaceTextEncoder(model, words, too_long=too_long, reading=reading)


def schedule_of(source: Path | str, options: Options = Options()) -> Schedule:  # noqa: B008
    """What a published model was trained with, without loading its weights where it says so."""
    path = located(source)
    if path.is_dir():
        config = read_object(denoiser_folder(path) / "config.json")
        return _schedule(path, config, options)
    return _file_schedule(path, read_file(path, allow_unused=options.allow_unused), options)


def _open_directory(root: Path, options: Options) -> Published:
    index, folder = read_index(root), denoiser_folder(root)
    config = read_object(folder / "config.json")
    schedule = _schedule(root, config, options)
    for note in schedule.notes:
        log.info("%s: %s", root, note)
    net = load_denoiser_folder(folder, variant=options.variant)
    vae = load_codec_folder(root / "vae", variant=options.variant)
    encoder = load_diffusers_text(root, index.pipeline)
    return _assembled(root, net, vae, encoder, schedule, index.pipeline, config.get("sample_size"))


def _open_parts(path: Path, parts: Parts, options: Options) -> Published:
    assert parts.net is not None
    schedule = _file_schedule(path, parts, options)
    encoder = _encoder(path, parts, options)
    encoder.zero_null = parts.kind.name == "sdxl"
    side = parts.kind.image_px // parts.vae.downsample_factor
    return _assembled(path, parts.net, parts.vae, encoder, schedule, parts.kind.pipeline, side)


def _assembled(
    path: Path,
    net: Any,
    vae: Any,
    encoder: FrozenTextEncoder,
    schedule: Schedule,
    pipeline: str,
    side: int | list[int] | None,
) -> Published:
    usual = DEFAULTS.get(pipeline, USUAL)
    sides = side if isinstance(side, list) else [side or usual.side] * 2
    factor = vae.downsample_factor
    channels = int(vae.config.latent_channels)
    sampling = SampleConfig(
        sampler=schedule.sampler,
        steps=usual.steps,
        spacing=schedule.spacing,
        cfg_scale=usual.cfg_scale,
    ).model_dump(mode="json")
    scale, offset = PROCESSES[schedule.process].clock
    mean, std = latent_law(vae.config, channels)
    returned = getattr(net.config, "out_channels", None)
    contract = Contract(
        process=schedule.process,
        prediction=schedule.prediction,
        learned_variance=returned == 2 * channels,  # PixArt's, after iDDPM
        data_std=None,
        clock=f"{scale:g} * t + {offset:g}, t = 0 data, t = 1 noise",
        latent_channels=channels,
        latent_mean=mean,
        latent_std=std,
        downsample_factor=factor,
        null_embedding="",
        null_embedding_sha256="",
        caption_dropout=CAPTION_DROPOUT,
        text_encoder=str(path),
        text_encoder_sha256="",
        tokenizer_sha256="",
        max_tokens=encoder.max_tokens,
        mask_rule=encoder.mask_rule,
        image_sizes=((int(sides[0]) * factor, int(sides[1]) * factor),),
        sampling={**sampling, "shift": schedule.shift},
        text_settings=encoder.settings,
    )
    name = str(path.resolve())  # metadata of pictures keep it, to be drawn again from anywhere
    return Published(net, vae, encoder, encoder.null(), contract, pipeline, name, identity(path))


def latent_law(config: Any, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel that a codec's configuration gives its latents."""
    mean = getattr(config, "latents_mean", None) or [config.shift_factor or 0.0] * channels
    std = getattr(config, "latents_std", None) or [1.0] * channels
    return tuple(mean), tuple(each / config.scaling_factor for each in std)


def _schedule(root: Path, config: Mapping[str, Any], options: Options) -> Schedule:
    file = root / "scheduler" / "scheduler_config.json"
    found = read_object(file)
    if options.prediction is not None:
        wanted = named("prediction", schedulers.PREDICTIONS, options.prediction)
        found["prediction_type"] = wanted
    side, patch = config.get("sample_size"), config.get("patch_size")
    tokens = (int(side) // int(patch)) ** 2 if isinstance(side, int) and patch else None
    return schedulers.read(found, str(file), tokens=tokens)


def _file_schedule(path: Path, parts: Parts, options: Options) -> Schedule:
    prediction = options.prediction or parts.prediction
    if prediction is None:
        raise LdmError(
            "what the network predicts cannot be seen in a single file of SD 2",
            where=str(path),
            fix="give prediction eps for the 512 base model, v for the 768 one (infer: "
            "--prediction v)",
            code=ExitCode.CONFIG,
        )
    if parts.kind.name == "sd3":
        return Schedule(schedulers.FLOW, prediction, "euler", "linear", 3.0)
    process = "sd_zero_snr" if parts.zero_snr else "sd"
    sampler, spacing = ("ddim", "trailing") if parts.zero_snr else ("dpmpp_2m", "leading")
    return Schedule(process, prediction, sampler, spacing)


def _encoder(path: Path, parts: Parts, options: Options) -> FrozenTextEncoder:
    """The text encoders of a single file, read as the family's pipeline reads them."""
    if not parts.towers:
        raise LdmError(
            "this file holds no text encoder",
            where=str(path),
            fix="use the edition that includes them (sd3_medium_incl_clips), or a diffusers "
            "directory",
            code=ExitCode.IO,
        )
    joint = parts.kind.name in ("sdxl", "sd3")
    reading = penultimate("attended") if joint else Reading("attended")
    encoders = []
    for place, tower in enumerate(parts.towers):
        config: Any = tower.model.config
        if config.model_type == "t5":
            log.info("%s: T5 is left out: no tokenizer for it is in the file", path)
            continue
        pad = END if place == 0 and parts.kind.name != "sd2" else OPEN_CLIP_PAD
        words = _tokenizer(path, config.vocab_size, options, pad, place)
        encoders.append(HuggingFaceTextEncoder(tower.model, words, reading=reading))
    if not joint:
        return encoders[0]
    if parts.kind.name == "sdxl":
        return JointTextEncoder(encoders, "sdxl")
    width = int(getattr(parts.net, "config").joint_attention_dim)  # noqa: B009, any network
    return JointTextEncoder(encoders, "sd3", t5_width=width)


def _tokenizer(path: Path, entries: int, options: Options, pad: str, place: int = 0) -> Any:
    if options.tokenizer is not None:
        root = Path(options.tokenizer)
        folder = root / f"tokenizer{SUFFIXES[place]}"
        return load_tokenizer(folder if folder.is_dir() else root)
    if entries != CLIP_VOCABULARY:
        raise LdmError(
            f"its text encoder has {entries} tokens, and CLIP's tokenizer {CLIP_VOCABULARY}",
            where=str(path),
            fix="give the directory of its own tokenizer (infer: --tokenizer DIR)",
            code=ExitCode.CONFIG,
        )
    return clip_tokenizer(pad)
