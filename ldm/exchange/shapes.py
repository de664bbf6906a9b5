"""What a file of the original layout holds, read off the names and shapes of its tensors.

A single file has no configuration. Most of a model's can be seen in its shapes; what cannot (heads,
what the network predicts, the scale of the latents) follows from the kind, and is said so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

from ldm.errors import ExitCode, LdmError
from ldm.exchange.original import UNET, VAE
from ldm.models.autoencoder_config import AutoencoderConfig
from ldm.models.unet_config import UNetConfig

Shapes = Mapping[str, tuple[int, ...]]

CLIP_L_SD1 = "cond_stage_model.transformer."
OPEN_CLIP_SD2 = "cond_stage_model.model."
CLIP_L_XL = "conditioner.embedders.0.transformer."
OPEN_CLIP_XL = "conditioner.embedders.1.model."
SD3_TEXT = "text_encoders."
HEAD_WIDTH = 64
"""Of SD 2, SDXL and SD 3, and of every CLIP text tower."""
SD1_HEADS = 8
SIZE_NUMBERS, SIZE_WIDTH = 6, 256
"""SDXL is told six numbers about sizes, each embedded in 256 channels."""


@dataclass(frozen=True)
class Kind:
    """A family of published models, and what its files do not say.

    Args:
        name: of the family.
        pipeline: diffusers' class for it.
        prediction: what its networks predict; None where published ones differ.
        latent_scale: scaling_factor of its VAE.
        latent_shift: shift_factor of its VAE.
        image_px: side of the usual picture.
    """

    name: str
    pipeline: str
    prediction: str | None
    latent_scale: float
    latent_shift: float | None
    image_px: int


KINDS = {
    "sd1": Kind("sd1", "StableDiffusionPipeline", "eps", 0.18215, None, 512),
    "sd2": Kind("sd2", "StableDiffusionPipeline", None, 0.18215, None, 768),
    "sdxl": Kind("sdxl", "StableDiffusionXLPipeline", "eps", 0.13025, None, 1024),
    "sd3": Kind("sd3", "StableDiffusion3Pipeline", "flow", 1.5305, 0.0609, 1024),
    "vae": Kind("vae", "AutoencoderKL", None, 0.18215, None, 512),
}

NOT_READ = {
    "double_blocks.": "FLUX",
    "input_hint_block.": "ControlNet",
    "down_blocks_motion.": "AnimateDiff",
    "clf.1.weight": "Stable Cascade",
    "conditioner.embedders.0.model.": "the SDXL refiner",
    "control_model.": "ControlNet",
    "edm_mean": "Playground 2.5",
}
"""Part of a name -> a family that has it and that is not read from single files."""


def kind_of(shapes: Shapes, where: str) -> tuple[Kind, str]:
    """The family of a file, and why.

    Raises:
        LdmError: code CONFIG, for a file that is none of them.
    """

    def has(part: str) -> bool:
        return any(name.startswith(part) for name in shapes)

    for part, family in NOT_READ.items():
        if any(part in name for name in shapes):
            raise _unread(f"it has {part}*, so it is {family}", where)
    if has(f"{UNET}joint_blocks."):
        return KINDS["sd3"], f"it has {UNET}joint_blocks"
    if has(UNET):
        if has(f"{UNET}label_emb.") or has(OPEN_CLIP_XL):
            return KINDS["sdxl"], f"the UNet has {UNET}label_emb, for sizes and pooled text"
        if has(OPEN_CLIP_SD2):
            return KINDS["sd2"], f"its text tower is open_clip's ({OPEN_CLIP_SD2}*)"
        if has(CLIP_L_SD1):
            return KINDS["sd1"], f"its text tower is CLIP's ({CLIP_L_SD1}*)"
        raise _unread("it has a UNet and no text tower", where)
    if "encoder.conv_in.weight" in shapes or has(f"{VAE}encoder."):
        return KINDS["vae"], "it has an encoder and a decoder, and no denoiser"
    raise _unread(f"its first names are {', '.join(sorted(shapes)[:3])}", where)


def activation_of(kind: Kind, tower: str) -> str:
    """Of a text tower: OpenAI's have the quick gelu, open_clip's the plain one."""
    from_open_clip = kind.name == "sd2" or tower == "text_encoder_2"
    return "gelu" if from_open_clip else "quick_gelu"


def unet_config(shapes: Shapes, kind: Kind, where: str) -> UNetConfig:
    """The shape of the UNet in a file.

    Raises:
        LdmError: code CONFIG, for inpainting and other models with more input than a latent.
    """
    names = {name.removeprefix(UNET): shape for name, shape in shapes.items() if UNET in name}
    width, channels = names["input_blocks.0.0.weight"][:2]
    out_channels = names["out.2.weight"][0]
    if channels != out_channels:
        raise _unread(
            f"its UNet takes {channels} channels and returns {out_channels}: inpainting, editing "
            "and depth models are told more than text",
            where,
        )
    levels: list[dict[str, Any]] = [{"width": width, "blocks": 0, "depth": 0}]
    for place in count(1):
        block = f"input_blocks.{place}"
        if f"{block}.0.op.weight" in names:
            levels.append({"width": 0, "blocks": 0, "depth": 0})
        elif f"{block}.0.out_layers.3.weight" in names:
            levels[-1]["width"] = names[f"{block}.0.out_layers.3.weight"][0]
            levels[-1]["blocks"] += 1
            levels[-1]["depth"] = _count(names, f"{block}.1.transformer_blocks.")
        else:
            break
    depths = [level["depth"] for level in levels]
    depths[-1] = depths[-1] or _count(names, "middle_block.1.transformer_blocks.")
    attends = [level["depth"] > 0 for level in levels]
    widths = tuple(level["width"] for level in levels)
    linear = len(names["middle_block.1.proj_in.weight"]) == 2
    heads = tuple(max(1, each // HEAD_WIDTH) for each in widths) if linear else SD1_HEADS
    fields: dict[str, Any] = {}
    if "label_emb.0.0.weight" in names:
        fields["addition_embed_type"] = "text_time"
        fields["addition_time_embed_dim"] = SIZE_WIDTH
        fields["projection_class_embeddings_input_dim"] = names["label_emb.0.0.weight"][1]
    text = "middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    return UNetConfig(
        sample_size=kind.image_px // 8,
        in_channels=channels,
        out_channels=out_channels,
        block_out_channels=widths,
        layers_per_block=levels[0]["blocks"],
        down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in attends[::-1]),
        cross_attention_dim=names[text][1],
        attention_head_dim=heads,
        transformer_layers_per_block=tuple(max(1, depth) for depth in depths),
        use_linear_projection=linear,
        **fields,
    )


def vae_config(shapes: Shapes, kind: Kind) -> AutoencoderConfig:
    """The shape of the KL-VAE in a file; its scale is the family's."""
    names = {name.removeprefix(VAE): shape for name, shape in shapes.items()}
    levels = _count(names, "encoder.down.")
    last = [f"encoder.down.{level}.block.0.conv2.weight" for level in range(levels)]
    return AutoencoderConfig(
        in_channels=names["encoder.conv_in.weight"][1],
        out_channels=names["decoder.conv_out.weight"][0],
        latent_channels=names["decoder.conv_in.weight"][1],
        block_out_channels=tuple(names[name][0] for name in last),
        layers_per_block=_count(names, "encoder.down.0.block."),
        mid_block_add_attention="encoder.mid.attn_1.norm.weight" in names,
        use_quant_conv="quant_conv.weight" in names,
        use_post_quant_conv="post_quant_conv.weight" in names,
        scaling_factor=kind.latent_scale,
        shift_factor=kind.latent_shift,
    )


def sd3_config(shapes: Shapes, where: str) -> dict[str, Any]:
    """The configuration of the SD3 transformer in a file, in diffusers' words."""
    names = {name.removeprefix(UNET): shape for name, shape in shapes.items() if UNET in name}
    width, channels, patch = names["x_embedder.proj.weight"][:3]
    layers = _count(names, "joint_blocks.")
    positions = names["pos_embed"][1]
    side = round(positions**0.5)
    dual = [i for i in range(layers) if f"joint_blocks.{i}.x_block.attn2.qkv.weight" in names]
    head_width = names.get("joint_blocks.0.x_block.attn.ln_q.weight", (HEAD_WIDTH,))[0]
    return {
        "_class_name": "SD3Transformer2DModel",
        "sample_size": 128,
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": names["final_layer.linear.weight"][0] // patch**2,
        "num_layers": layers,
        "attention_head_dim": head_width,
        "num_attention_heads": width // head_width,
        "joint_attention_dim": names["context_embedder.weight"][1],
        "caption_projection_dim": width,
        "pooled_projection_dim": names["y_embedder.mlp.0.weight"][1],
        "pos_embed_max_size": side,
        "dual_attention_layers": dual,
        "qk_norm": "rms_norm" if "joint_blocks.0.x_block.attn.ln_q.weight" in names else None,
    }


def _count(names: Shapes, prefix: str) -> int:
    """How many numbered parts begin with `prefix`."""
    found = {name[len(prefix) :].split(".")[0] for name in names if name.startswith(prefix)}
    return len(found)


def _unread(why: str, where: str) -> LdmError:
    return LdmError(
        f"this file is no single-file model that can be read: {why}",
        where=where,
        fix="read are SD 1, SD 2, SDXL base, SD 3 and lone VAEs of the original layout; others as "
        "diffusers directories",
        code=ExitCode.CONFIG,
    )
