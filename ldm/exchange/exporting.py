"""A model of ours as a diffusers directory, or as one file of the original layout.

Everything a program over there would do differently is refused with the reason, or folded into the
weights where that is exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm import storage
from ldm.checkpoint import Contract, save_module
from ldm.checkpoint.contract import MODEL_INDEX
from ldm.exchange import schedulers
from ldm.exchange.exportable import (
    PIXART,
    SD,
    SD3,
    SDXL,
    T5_TOKENS,
    check_codec,
    check_start,
    check_text,
    check_tower,
    encoders_of,
    refused,
    told_tokens,
)
from ldm.exchange.latents import folded
from ldm.exchange.schedulers import Written
from ldm.exchange.shapes import HEAD_WIDTH, KINDS, SD1_HEADS, Kind
from ldm.exchange.silence import write_silent_t5
from ldm.exchange.single_file import Parts, Tower, write_file
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.dit import DiT
from ldm.models.dit_diffusers import config_to_diffusers, dit_weights_to_diffusers
from ldm.models.mmdit import MMDiT
from ldm.models.text import (
    FrozenTextEncoder,
)
from ldm.models.text.joint import SUFFIXES
from ldm.models.unet import UNet

NULLS = {
    SD: ("safety_checker", "feature_extractor", "image_encoder"),
    SDXL: ("feature_extractor", "image_encoder"),
    SD3: ("feature_extractor", "image_encoder"),
    PIXART: (),
}
"""Parts that our models do not have; their pipelines take null."""
SETTINGS: dict[str, dict[str, Any]] = {
    SD: {"requires_safety_checker": False},
    SDXL: {"add_watermarker": False},
}
PLAIN_GUIDANCE = {
    "guidance": "classifier_free",
    "rescale": 0.0,
    "threshold": 0.0,
    "interval": [0.0, 1.0],
}
"""The guidance that every pipeline has."""
VERSION = "0.40.0"


@dataclass(frozen=True)
class Exported:
    """What an export wrote.

    Args:
        pipeline: diffusers' class of it.
        scheduler: how it draws.
        notes: what is not as in the run, for the reader of the card.
    """

    pipeline: str
    scheduler: Written
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Model:
    """What is exported: the parts of a pipeline; see `ldm.inference.loading.Loaded`."""

    vae: Any
    encoder: FrozenTextEncoder
    net: nn.Module
    contract: Contract


def plan(model: Model) -> Exported:
    """How a model would be exported to diffusers; writes nothing.

    Raises:
        LdmError: code CONFIG, for whatever no pipeline of diffusers can reproduce, by its name.
    """
    contract = model.contract
    check_start(contract)
    pipeline = pipeline_of(model.net)
    check_codec(model.vae)
    check_text(model.encoder, pipeline)
    sampling = contract.sampling
    written = schedulers.written(
        contract.process,
        contract.prediction,
        str(sampling["sampler"]),
        shift=float(sampling.get("shift") or 1.0),
        flow_class=pipeline == SD3,
    )
    if contract.data_std is not None:
        raise refused(
            f"its network sees scaled inputs (data_std={contract.data_std}), diffusers' plain ones",
            "train with a process and prediction that need no data_std",
        )
    notes = list(written.notes)
    if contract.learned_variance:
        notes.append("the variance that the network learned is left out: its sampler is not there")
    if len(set(contract.image_sizes[0])) > 1:
        notes.append("give height and width to every call: the default is a square")
    if contract.offset_noise:
        notes.append(
            f"trained with offset noise {contract.offset_noise:g}; diffusers starts without"
        )
    if pipeline == SD3 and (tokens := told_tokens(contract.text_settings)) != T5_TOKENS:
        notes.append(f"give max_sequence_length={tokens} to every call: {T5_TOKENS} is the default")
    for key, plain in PLAIN_GUIDANCE.items():
        if list(_listed(sampling.get(key, plain))) != list(_listed(plain)):
            notes.append(f"the run's {key}={sampling[key]} of guidance has no place in diffusers")
    return Exported(pipeline, written, tuple(notes))


def write_diffusers(folder: Path, model: Model) -> Exported:
    """Writes a directory that `diffusers.DiffusionPipeline.from_pretrained` opens.

    Args:
        folder: empty, or the temporary place of a publication.
        model: what to write.

    Raises:
        LdmError: as `plan`; code IO.
    """
    exported = plan(model)
    kind = exported.pipeline
    name, class_name = _write_denoiser(folder, model)
    vae = _plain(model.vae, kind)
    save_module(folder / "vae", dict(vae.state_dict()), vae.config.to_diffusers())
    model.encoder.save(folder)
    _state_length(folder, model.encoder)
    storage.make_directory(folder / "scheduler")
    storage.write_json(
        folder / "scheduler" / "scheduler_config.json", dict(exported.scheduler.config)
    )
    parts: dict[str, Any] = {
        name: ("diffusers", class_name),
        "vae": ("diffusers", "AutoencoderKL"),
        "scheduler": ("diffusers", str(exported.scheduler.config["_class_name"])),
        **model.encoder.components(),
        **dict.fromkeys(NULLS[kind], (None, None)),
    }
    if kind == SD3 and "text_encoder_3" not in parts:
        parts |= write_silent_t5(folder, model.encoder.width)
    settings = dict(SETTINGS.get(kind, {}))
    if kind == SDXL:
        settings["force_zeros_for_empty_prompt"] = model.encoder.zero_null
    index = {"_class_name": kind, "_diffusers_version": VERSION, **settings}
    index |= {part: list(place) for part, place in sorted(parts.items())}
    storage.write_json(folder / MODEL_INDEX, index)
    return exported


def write_single_file(path: Path, model: Model, metadata: Mapping[str, str]) -> Kind:
    """Writes one safetensors file of the original layout; returns its family.

    Raises:
        LdmError: code CONFIG, for a model that readers of that layout would take for another.
    """
    pipeline = pipeline_of(model.net)
    kind = _family(model, pipeline)
    exported = plan(model)
    process, prediction = model.contract.process, model.contract.prediction
    legal = [("rectified_flow", "flow")] if pipeline == SD3 else FILE_LAWS
    if (process, prediction) not in legal:
        said = " or ".join(f"{a} with {b}" for a, b in legal)
        raise refused(
            f"readers of single files assume {said}, not {process} with {prediction}",
            "export it with --to diffusers, whose scheduler says so",
        )
    vae = folded(model.vae, kind.latent_scale, kind.latent_shift)
    if pipeline == SD3 and vae.config.use_quant_conv != model.vae.config.use_quant_conv:
        raise refused(
            "SD 3's layout has no place for the statistics of these latents",
            "export it with --to diffusers",
        )
    towers = tuple(
        Tower(f"text_encoder{suffix}", encoder.model)
        for encoder, suffix in zip(encoders_of(model.encoder), SUFFIXES, strict=False)
    )
    net = without_variance(model.net, model.contract)
    marks = {"v_pred": torch.tensor([])} if prediction == "v" and pipeline != SD3 else {}
    if process == "sd_zero_snr":
        marks["ztsnr"] = torch.tensor([])
    parts = Parts(kind, exported.pipeline, prediction, False, net, vae, towers, ())
    write_file(path, parts, metadata, marks)
    return kind


FILE_LAWS = [("sd", "eps"), ("sd", "v"), ("sd_zero_snr", "v")]


def pipeline_of(net: nn.Module) -> str:
    """The pipeline class of diffusers for a network.

    Raises:
        LdmError: code CONFIG, when there is none.
    """
    if isinstance(net, UNet):
        return SD if net.config.addition_embed_type is None else SDXL
    if isinstance(net, MMDiT):
        if net.config.pooled_projection_dim is None:
            raise refused("diffusers' SD3 transformer needs pooled text", "train with pooled text")
        return SD3
    if isinstance(net, DiT):
        config_to_diffusers(net.config, sample_size=1)  # refuses by name what has no class there
        if net.config.num_classes is not None:
            raise refused(
                "a DiT of class labels has a pipeline of its own in diffusers, without prompts",
                "save its weights with to_diffusers, or draw with `ldm infer`",
            )
        return PIXART
    raise refused(
        f"a {type(net).__name__} comes from diffusers and is saved in its layout already",
        "take the folder of its weights from the checkpoint",
    )


def _family(model: Model, pipeline: str) -> Kind:
    """The family whose single files have this shape; heads and activations cannot be seen there."""
    if pipeline == PIXART:
        raise refused("PixArt has no single-file layout that others read", "use --to diffusers")
    if pipeline in (SDXL, SD3):
        kind = KINDS["sdxl" if pipeline == SDXL else "sd3"]
    else:
        assert isinstance(model.net, UNet)
        kind = KINDS["sd2" if model.net.config.use_linear_projection else "sd1"]
    if isinstance(model.net, UNet):
        config = model.net.config
        expected = tuple(
            max(1, width // HEAD_WIDTH) if config.use_linear_projection else SD1_HEADS
            for width in config.block_out_channels
        )
        if config.heads != expected:
            raise refused(
                f"readers of single files assume {expected} heads here, and this UNet has "
                f"{config.heads}",
                "export it with --to diffusers, or train with those heads",
            )
    for encoder, suffix in zip(encoders_of(model.encoder), SUFFIXES, strict=False):
        check_tower(encoder, kind, f"text_encoder{suffix}")
    return kind


def _write_denoiser(folder: Path, model: Model) -> tuple[str, str]:
    """Writes the denoiser; returns its folder and diffusers' class."""
    factor = model.vae.downsample_factor
    side = model.contract.image_sizes[0][0] // factor
    net: Any = without_variance(model.net, model.contract, keep=isinstance(model.net, DiT))
    state: dict[str, Tensor] = dict(net.state_dict())
    if isinstance(net, DiT):
        config = config_to_diffusers(net.config, sample_size=side)
        state = dit_weights_to_diffusers(state, net.config)
    else:
        config = net.config.to_diffusers()
        config["sample_size"] = side
    name = "unet" if isinstance(net, UNet) else "transformer"
    save_module(folder / name, state, config)
    return name, str(config["_class_name"])


def without_variance(net: nn.Module, contract: Contract, *, keep: bool = False) -> nn.Module:
    """A UNet with the half of its last layer that predicts; PixArt's pipeline cuts it itself."""
    if not contract.learned_variance or keep:
        return net
    if not isinstance(net, UNet):
        raise refused("this network learned a variance", "train with learned_variance: false")
    channels = contract.latent_channels
    with torch.device("meta"):
        half = UNet(replace(net.config, out_channels=channels))
    state = dict(net.state_dict())
    state |= {name: state[name][:channels] for name in ("conv_out.weight", "conv_out.bias")}
    half.load_state_dict(state, assign=True)
    return half.eval().requires_grad_(False)


def _plain(vae: AutoencoderKL, pipeline: str) -> AutoencoderKL:
    """The codec as a pipeline normalises: one scale for all channels, and for SD3 one shift."""
    config = vae.config
    nothing = 0.0 if pipeline == SD3 else None  # its pipeline adds the shift and takes no null
    if config.latents_mean is not None:
        return folded(vae, 1.0, nothing)
    if pipeline == SD3:
        known = config.shift_factor is not None
        return vae if known else folded(vae, config.scaling_factor, nothing)
    return folded(vae, 1.0, None) if config.shift_factor else vae


def _state_length(folder: Path, encoder: FrozenTextEncoder) -> None:
    """Pipelines pad and cut to the length that the tokenizer states."""
    for suffix, one in zip(SUFFIXES, encoders_of(encoder), strict=False):
        path = folder / f"tokenizer{suffix}" / "tokenizer_config.json"
        if path.is_file():
            config = dict(storage.read_json(path))
            storage.write_json(path, {**config, "model_max_length": one.max_tokens})


def _listed(value: Any) -> Any:
    return value if isinstance(value, (list, tuple)) else [value]
