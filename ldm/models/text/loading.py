"""Text encoders from runs, diffusers directories, Hugging Face models and open_clip.

`load_text_encoder` gives one encoder, `load_joint_text_encoder` several as one,
`load_diffusers_text` what a pipeline of diffusers feeds its denoiser, `restore_text_encoder` what a
run was trained with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from ldm.errors import ExitCode, LdmError
from ldm.models.text.classes import ClassTextEncoder
from ldm.models.text.encoder import HuggingFaceTextEncoder, Padding, Reading
from ldm.models.text.files import load_model, load_tokenizer, locate, read_config
from ldm.models.text.joint import SUFFIXES, FrozenTextEncoder, JointTextEncoder, Style, penultimate
from ldm.models.text.openclip import SOURCE, load_open_clip
from ldm.models.text.tokens import TooLong


def load_text_encoder(
    source: Path | str,
    *,
    max_tokens: int | None = None,
    pad_to: int | None = None,
    too_long: TooLong = "error",
    reading: Reading = Reading(),  # noqa: B008, frozen
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> HuggingFaceTextEncoder:
    """Loads a frozen text encoder.

    Args:
        source: a directory with `text_encoder/` and `tokenizer/` (a run, a diffusers model, the
            result of `ldm train-clip`), a flat Hugging Face directory, a Hub id, or
            `open_clip:NAME/TAG` (see `load_open_clip`). What is in the local cache is never looked
            up on the network.
        max_tokens, pad_to, too_long, reading: see `HuggingFaceTextEncoder`.
        device: where the encoder lives.
        dtype: of its weights; embeddings are float32 whatever it is.

    Raises:
        LdmError: IO for files that are missing or damaged, CONFIG for an encoder that is neither
            CLIP nor T5 and for impossible lengths and layers.
    """
    model, tokenizer = _parts(source, "", dtype)
    options = _Options(pad_to=pad_to, too_long=too_long)
    return options.encoder(model, tokenizer, max_tokens, reading).to(device)


def load_joint_text_encoder(
    sources: Sequence[Path | str],
    style: Style,
    *,
    padding: Padding = "attended",
    max_tokens: int | None = None,
    t5_tokens: int = 256,
    t5_width: int | None = None,
    too_long: TooLong = "error",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> JointTextEncoder:
    """Loads several frozen text encoders as one.

    Args:
        sources: one directory with `text_encoder/`, `text_encoder_2/` ..., or a source of
            `load_text_encoder` for each encoder, in this order.
        style, t5_width: see `JointTextEncoder`.
        padding: see `Reading`.
        max_tokens: of the CLIPs of sdxl and sd3; None is their own limit.
        t5_tokens: of T5.
        too_long, device, dtype: as of `load_text_encoder`.

    Raises:
        LdmError: as `load_text_encoder` and `JointTextEncoder`.
    """
    places = _places(sources)
    options, encoders = _Options(pad_to=None, too_long=too_long), []
    for source, suffix in places:
        model, tokenizer = _parts(source, suffix, dtype)
        is_t5 = model.config.model_type == "t5"
        if is_t5 or style == "flux":  # whose CLIP cuts at its own limit
            limit, reading = t5_tokens if is_t5 else None, Reading(padding)
        else:
            limit, reading = max_tokens, penultimate(padding)
        encoders.append(options.encoder(model, tokenizer, limit, reading))
    joint = JointTextEncoder(encoders, style, t5_width=t5_width, t5_tokens=t5_tokens)
    return joint.to(device)


def load_diffusers_text(
    root: Path | str,
    pipeline_class: str,
    *,
    too_long: TooLong = "error",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> FrozenTextEncoder:
    """The text encoder of a diffusers model: its embeddings are what that pipeline feeds.

    Differences that remain: a control token spelled in a prompt is read as text, a long prompt is
    refused where `too_long` does not say otherwise, and PixArt's optional removal of web addresses
    and HTML is left out.

    Args:
        root: the directory with model_index.json.
        pipeline_class: of PIPELINES, `_class_name` there.
        too_long: "truncate" is what diffusers does.
        device, dtype: as of `load_text_encoder`.

    Returns:
        an encoder whose `null()` is what guidance compares with when there is no negative prompt.

    Raises:
        LdmError: CONFIG for another pipeline, else as `load_text_encoder`.
    """
    if (kind := PIPELINES.get(pipeline_class)) is None:
        raise LdmError(
            f"the text encoders of a {pipeline_class} are not known here; known: "
            f"{', '.join(PIPELINES)}",
            where=str(root),
            fix="use its denoiser alone (ldm.models.external), with text embeddings of your own",
            code=ExitCode.CONFIG,
        )
    common: dict[str, Any] = {"too_long": too_long, "device": device, "dtype": dtype}
    if kind == "sd":
        return load_text_encoder(root, reading=Reading("attended"), **common)
    if kind in PIXART_TOKENS:
        limit = PIXART_TOKENS[kind]
        reading = Reading(lower_case=True)
        return load_text_encoder(root, max_tokens=limit, pad_to=limit, reading=reading, **common)
    if kind == "sd3":
        width = read_config(Path(root) / "transformer" / "config.json").get("joint_attention_dim")
        return load_joint_text_encoder([root], "sd3", t5_width=width, **common)
    if kind == "flux":
        return load_joint_text_encoder([root], "flux", t5_tokens=FLUX_TOKENS, **common)
    joint = load_joint_text_encoder([root], "sdxl", **common)
    index = read_config(Path(root) / "model_index.json")
    joint.zero_null = bool(index.get("force_zeros_for_empty_prompt", True))
    return joint


def restore_text_encoder(
    root: Path | str,
    settings: Mapping[str, Any],
    *,
    max_tokens: int | None = None,
    too_long: TooLong = "error",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> FrozenTextEncoder:
    """The encoder that `save` wrote into `root`, with the `settings` it had.

    Args:
        root: a directory with `text_encoder/` and `tokenizer/`.
        settings: `encoder.settings`, which a contract keeps; empty for older runs.
        max_tokens: `encoder.max_tokens`.
        too_long, device, dtype: as of `load_text_encoder`.

    Raises:
        LdmError: IO for settings that this version does not know, else as `load_text_encoder`.
    """
    common: dict[str, Any] = {"max_tokens": max_tokens, "too_long": too_long}
    common |= {"device": device, "dtype": dtype}
    given = dict(settings)
    if set(given) == {"classes"}:
        return ClassTextEncoder(given["classes"]).to(device)
    joint = "style" in given
    known = JOINT_SETTINGS if joint else {"pad_to", *(field.name for field in fields(Reading))}
    if unknown := given.keys() - known:
        raise LdmError(
            f"the settings of the text encoder hold {', '.join(sorted(unknown))}, unknown here",
            where=str(root),
            fix="use the program version that wrote them",
            code=ExitCode.IO,
        )
    if joint:
        return load_joint_text_encoder([root], **given, **common)
    pad_to = given.pop("pad_to", None)
    return load_text_encoder(root, pad_to=pad_to, reading=Reading(**given), **common)


@dataclass(frozen=True)
class _Options:
    pad_to: int | None
    too_long: TooLong

    def encoder(
        self, model: Any, tokenizer: Any, max_tokens: int | None, reading: Reading
    ) -> HuggingFaceTextEncoder:
        return HuggingFaceTextEncoder(
            model,
            tokenizer,
            max_tokens=max_tokens,
            pad_to=self.pad_to,
            too_long=self.too_long,
            reading=reading,
        )


def _parts(source: Path | str, suffix: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Model and tokenizer of a source."""
    if str(source).startswith(SOURCE):
        return load_open_clip(str(source), dtype)
    model_dir, tokenizer_dir = locate(source, suffix)
    return load_model(model_dir, dtype), load_tokenizer(tokenizer_dir)


def _places(sources: Sequence[Path | str]) -> list[tuple[Path | str, str]]:
    """Every encoder as its source and the suffix of its folders there."""
    if len(sources) > 1:
        return [(source, "") for source in sources]
    root = locate(sources[0], "_2")[0].parent  # both styles have a second encoder
    found = [s for s in SUFFIXES if (root / f"text_encoder{s}" / "config.json").is_file()]
    return [(root, suffix) for suffix in found]


JOINT_SETTINGS = {"style", "padding", "t5_tokens", "t5_width"}
PIXART_TOKENS = {"pixart-alpha": 120, "pixart-sigma": 300}
FLUX_TOKENS = 512
PIPELINES = {
    "StableDiffusionPipeline": "sd",
    "StableDiffusionImg2ImgPipeline": "sd",
    "StableDiffusionInpaintPipeline": "sd",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusionXLImg2ImgPipeline": "sdxl",
    "StableDiffusionXLInpaintPipeline": "sdxl",
    "StableDiffusion3Pipeline": "sd3",
    "StableDiffusion3Img2ImgPipeline": "sd3",
    "StableDiffusion3InpaintPipeline": "sd3",
    "FluxPipeline": "flux",
    "PixArtAlphaPipeline": "pixart-alpha",
    "PixArtSigmaPipeline": "pixart-sigma",
}
"""Pipeline class of diffusers -> how it reads prompts."""
