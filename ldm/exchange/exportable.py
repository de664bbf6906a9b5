"""What a pipeline of diffusers, or a reader of single files, would do differently: refused here.

Every check names what differs and how a run can be trained so that it does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ldm.checkpoint import Contract
from ldm.errors import ExitCode, LdmError
from ldm.exchange.shapes import HEAD_WIDTH, Kind, activation_of
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.text import (
    ClassTextEncoder,
    FrozenTextEncoder,
    HuggingFaceTextEncoder,
    JointTextEncoder,
)

SD, SDXL, SD3, PIXART = (
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusion3Pipeline",
    "PixArtAlphaPipeline",
)
T5_TOKENS, MAX_T5_TOKENS = 256, 512
"""What StableDiffusion3Pipeline reads with T5 when it is not told, and at most."""


def told_tokens(settings: Mapping[str, Any]) -> int:
    """The `max_sequence_length` that SD3's pipeline needs for a text encoder's settings."""
    return int(settings.get("t5_tokens", T5_TOKENS))


def check_start(contract: Contract) -> None:
    """A pipeline for prompts starts at noise."""
    if contract.source != "noise" or contract.latent_noise:
        raise refused(
            "it turns pictures into pictures, and diffusers' pipelines for prompts start at noise",
            "use `ldm translate`",
        )


def check_codec(vae: Any) -> None:
    """The codec must be one that is written here."""
    if not isinstance(vae, AutoencoderKL):
        raise refused(
            f"its autoencoder is a {type(vae).__name__}, not a KL-VAE of ours",
            "put vae/ of its source beside the exported denoiser",
        )


def check_text(encoder: FrozenTextEncoder, pipeline: str) -> None:
    """What a pipeline does with prompts must be what the run did."""
    if encoder.zero_null and pipeline != SDXL:
        raise refused(
            f"guidance of {pipeline} compares with the embedding of no words, and this model was "
            "trained with zeros",
            "train with text.zero_null: false",
        )
    joint = {SDXL: "sdxl", SD3: "sd3"}.get(pipeline)
    style = encoder.style if isinstance(encoder, JointTextEncoder) else None
    if style != joint:
        raise refused(
            f"{pipeline} reads prompts with {joint or 'one'} encoder(s), this model with "
            f"{style or 'one'}",
            f"train with text encoders of the style {joint}" if joint else "train with one encoder",
        )
    if isinstance(encoder, ClassTextEncoder):
        raise refused(f"{pipeline} reads prompts, this model class names", "keep it as it is")
    if pipeline == SD3 and told_tokens(encoder.settings) > MAX_T5_TOKENS:
        raise refused(
            f"{pipeline} reads at most {MAX_T5_TOKENS} tokens with T5",
            f"train with text.t5_tokens: {MAX_T5_TOKENS} or fewer",
        )
    padding = encoder.padding if isinstance(encoder, JointTextEncoder) else encoder.reading.padding
    if padding == "masked" and pipeline != PIXART:
        raise refused(
            f"{pipeline} attends to the padding of prompts, and this model was trained with it "
            "masked, so its pictures would be others",
            "train with text.padding: attended",
        )
    if isinstance(encoder, HuggingFaceTextEncoder):
        reading = encoder.reading
        if reading.layer != -1 or not reading.final_norm:
            raise refused(
                f"{pipeline} reads the last layer, and this model layer {reading.layer}",
                "train with text.layer: -1",
            )
        if reading.lower_case != (pipeline == PIXART):
            done = "reads prompts in lower case" if pipeline == PIXART else "keeps capitals"
            raise refused(
                f"{pipeline} {done}, and this model was trained otherwise",
                f"train with text.lower_case: {str(pipeline == PIXART).lower()}",
            )
        if pipeline == PIXART and padding == "attended":
            raise refused(f"{pipeline} masks padding", "train with text.padding: masked")
        if pipeline == SD and encoder.kind != "clip":
            raise refused(f"{pipeline} reads prompts with CLIP", "train with a CLIP encoder")


def check_tower(encoder: HuggingFaceTextEncoder, kind: Kind, name: str) -> None:
    """Nor can the heads and the activation of a text tower be seen in a file."""
    if encoder.kind != "clip":
        return
    config = encoder.model.config
    heads = max(1, config.hidden_size // HEAD_WIDTH)
    activation = activation_of(kind, name)
    if (config.num_attention_heads, config.hidden_act) != (heads, activation):
        raise refused(
            f"readers of single files assume {heads} heads and {activation} in {name}, not "
            f"{config.num_attention_heads} and {config.hidden_act}",
            "export it with --to diffusers, or train with CLIP-L or OpenCLIP",
        )
    projection = getattr(encoder.model, "text_projection", None)
    if (kind.name, name) == ("sd3", "text_encoder") and projection is not None:
        weight = projection.weight
        if weight.shape[0] != weight.shape[1] or not weight.equal(
            torch.eye(len(weight)).to(weight)
        ):
            raise refused(
                "readers of SD 3's single files pool CLIP-L without its projection",
                "export it with --to diffusers",
            )


def encoders_of(encoder: FrozenTextEncoder) -> list[HuggingFaceTextEncoder]:
    """The text encoders that a directory has folders for."""
    if isinstance(encoder, JointTextEncoder):
        return list(encoder.encoders)
    return [] if isinstance(encoder, ClassTextEncoder) else [encoder]


def refused(what: str, fix: str) -> LdmError:
    """The error of a model that cannot be exported."""
    return LdmError(
        f"this model cannot be exported: {what}", where="export", fix=fix, code=ExitCode.CONFIG
    )
