"""The original layouts of Stable Diffusion as tables: which of their tensors is which of ours.

Ours are the names of diffusers and transformers. The tables follow from the shape of a model, and
hold for any width and depth. Source of the names: the released code of Rombach et al. 2022 (arXiv
2112.10752), Podell et al. 2023 (2307.01952) and Esser et al. 2024 (2403.03206).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ldm.exchange.keymap import Row, below, inside, joined, layer
from ldm.models.autoencoder_config import AutoencoderConfig
from ldm.models.text import openclip
from ldm.models.unet_config import UNetConfig

UNET = "model.diffusion_model."
VAE = "first_stage_model."
UNET_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
VAE_RESNET = {name: name for name in ("norm1", "conv1", "norm2", "conv2")}
VAE_RESNET |= {"nin_shortcut": "conv_shortcut"}
VAE_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
CLIP_LAYER = (
    *("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"),
    *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")),
)
SD3_TOP = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "context_embedder": "context_embedder",
    "final_layer.linear": "proj_out",
}
SD3_BLOCK = {
    "x_block.attn.proj": "attn.to_out.0",
    "x_block.attn2.proj": "attn2.to_out.0",
    "x_block.mlp.fc1": "ff.net.0.proj",
    "x_block.mlp.fc2": "ff.net.2",
    "x_block.adaLN_modulation.1": "norm1.linear",
    "context_block.attn.proj": "attn.to_add_out",
    "context_block.mlp.fc1": "ff_context.net.0.proj",
    "context_block.mlp.fc2": "ff_context.net.2",
}
SD3_QUERIES = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
SD3_NORMS = {
    "x_block.attn.ln_q": "attn.norm_q",
    "x_block.attn.ln_k": "attn.norm_k",
    "x_block.attn2.ln_q": "attn2.norm_q",
    "x_block.attn2.ln_k": "attn2.norm_k",
    "context_block.attn.ln_q": "attn.norm_added_q",
    "context_block.attn.ln_k": "attn.norm_added_k",
}


def unet_rows(config: UNetConfig) -> list[Row]:
    """Every tensor that a UNet of this shape may have; see `keymap.kept`."""
    rows = _layers({"time_embed.0": "time_embedding.linear_1"})
    rows += _layers({"time_embed.2": "time_embedding.linear_2"})
    rows += _layers({"label_emb.0.0": "add_embedding.linear_1"})
    rows += _layers({"label_emb.0.2": "add_embedding.linear_2"})
    rows += _layers({"input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out"})
    levels, place = len(config.block_out_channels), 1
    for level, kind in enumerate(config.down_block_types):
        here = f"down_blocks.{level}"
        for block in range(config.layers_per_block):
            rows += _residual(f"input_blocks.{place}.0", f"{here}.resnets.{block}", UNET_RESNET)
            if kind.startswith("CrossAttn"):
                depth, name = config.depths[level], f"{here}.attentions.{block}"
                rows += _transformer(f"input_blocks.{place}.1", name, depth)
            place += 1
        if level < levels - 1:
            rows += layer(f"input_blocks.{place}.0.op", f"{here}.downsamplers.0.conv")
            place += 1
    rows += _residual("middle_block.0", "mid_block.resnets.0", UNET_RESNET)
    rows += _transformer("middle_block.1", "mid_block.attentions.0", config.depths[-1])
    rows += _residual("middle_block.2", "mid_block.resnets.1", UNET_RESNET)
    place = 0
    for level, kind in enumerate(config.up_block_types):
        here, attends = f"up_blocks.{level}", kind.startswith("CrossAttn")
        for block in range(config.layers_per_block + 1):
            rows += _residual(f"output_blocks.{place}.0", f"{here}.resnets.{block}", UNET_RESNET)
            if attends:
                depth, name = config.depths[-1 - level], f"{here}.attentions.{block}"
                rows += _transformer(f"output_blocks.{place}.1", name, depth)
            place += 1
        if level < levels - 1:
            theirs = f"output_blocks.{place - 1}.{2 if attends else 1}.conv"
            rows += layer(theirs, f"{here}.upsamplers.0.conv")
    return below(UNET, rows)


def vae_rows(config: AutoencoderConfig) -> list[Row]:
    """Every tensor that a KL-VAE of this shape may have; see `keymap.kept`."""
    levels = len(config.block_out_channels)
    rows = _layers({name: name for name in ("quant_conv", "post_quant_conv")})
    for side in ("encoder", "decoder"):
        rows += _layers({f"{side}.{name}": f"{side}.{name}" for name in ("conv_in", "conv_out")})
        rows += layer(f"{side}.norm_out", f"{side}.conv_norm_out")
        for block in range(2):
            theirs, ours = f"{side}.mid.block_{block + 1}", f"{side}.mid_block.resnets.{block}"
            rows += _residual(theirs, ours, VAE_RESNET)
        attention = f"{side}.mid_block.attentions.0"
        rows += layer(f"{side}.mid.attn_1.norm", f"{attention}.group_norm")
        for theirs, ours in VAE_ATTENTION.items():
            rows += layer(f"{side}.mid.attn_1.{theirs}", f"{attention}.{ours}", "convolution")
    for level in range(levels):
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{level}"
        # the original counts the levels of the decoder from the finest
        there = f"decoder.up.{levels - 1 - level}"
        for block in range(config.layers_per_block):
            theirs = f"encoder.down.{level}.block.{block}"
            rows += _residual(theirs, f"{down}.resnets.{block}", VAE_RESNET)
        for block in range(config.layers_per_block + 1):
            rows += _residual(f"{there}.block.{block}", f"{up}.resnets.{block}", VAE_RESNET)
        if level < levels - 1:
            rows += layer(f"encoder.down.{level}.downsample.conv", f"{down}.downsamplers.0.conv")
            rows += layer(f"{there}.upsample.conv", f"{up}.upsamplers.0.conv")
    return below(VAE, rows)


def clip_rows(layers: int, prefix: str, wrapper: str = "") -> list[Row]:
    """A CLIP text tower of transformers, stored under `prefix` with the names of its own file.

    Args:
        layers: of the tower.
        prefix: of the original, up to `text_model.`.
        wrapper: before our names: `text_model.` for CLIPTextModelWithProjection.
    """
    rows = [_one(f"text_model.{name}", wrapper + name) for name in openclip.TOP.values()]
    for index in range(layers):
        for name in CLIP_LAYER:
            ours = f"encoder.layers.{index}.{name}"
            rows += layer(f"text_model.{ours}", wrapper + ours)
    return below(prefix, [*rows, _one("text_projection.weight", "text_projection.weight")])


def open_clip_rows(layers: int, prefix: str, wrapper: str = "") -> list[Row]:
    """A CLIP text tower of open_clip, stored under `prefix`; arguments as `clip_rows`."""
    rows = [_one(theirs, wrapper + ours) for theirs, ours in openclip.TOP.items()]
    rows += [Row("text_projection", ("text_projection.weight",), "transposed")]
    for index in range(layers):
        ours, theirs = f"{wrapper}encoder.layers.{index}", f"transformer.resblocks.{index}"
        for there, here in openclip.LAYER.items():
            rows += layer(f"{theirs}.{there}", f"{ours}.{here}")
        for part in ("weight", "bias"):
            names = tuple(f"{ours}.self_attn.{letter}_proj.{part}" for letter in "qkv")
            rows.append(Row(f"{theirs}.attn.in_proj_{part}", names, "stacked"))
    return below(prefix, rows)


def t5_rows(names: Iterable[str], prefix: str) -> list[Row]:
    """A T5 encoder of transformers, under `prefix` with its own names."""
    return below(prefix, [_one(name, name) for name in names])


def sd3_rows(config: Any) -> list[Row]:
    """Every tensor that an SD3 transformer of this shape (`num_layers`) may have."""
    rows = [_one("pos_embed", "pos_embed.pos_embed"), *_layers(SD3_TOP)]
    final = layer("final_layer.adaLN_modulation.1", "norm_out.linear")
    rows += _in_form(final, "halves swapped")
    for index in range(config.num_layers):
        block = _layers(SD3_BLOCK)
        for theirs, ours in SD3_QUERIES.items():
            block += joined(theirs, ours)
        block += [_one(f"{a}.weight", f"{b}.weight") for a, b in SD3_NORMS.items()]
        context = layer("context_block.adaLN_modulation.1", "norm1_context.linear")
        is_last = index == config.num_layers - 1  # shift and scale only, as after the last block
        block += _in_form(context, "halves swapped") if is_last else context
        rows += below(f"joint_blocks.{index}.", inside(f"transformer_blocks.{index}.", block))
    return below(UNET, rows)


def _layers(names: dict[str, str]) -> list[Row]:
    return [row for theirs, ours in names.items() for row in layer(theirs, ours)]


def _residual(theirs: str, ours: str, names: dict[str, str]) -> list[Row]:
    return _layers({f"{theirs}.{there}": f"{ours}.{here}" for there, here in names.items()})


def _transformer(theirs: str, ours: str, depth: int) -> list[Row]:
    """A spatial transformer: the names inside are the same on both sides."""
    names = ["norm", "proj_in", "proj_out"]
    for index in range(depth):
        block = f"transformer_blocks.{index}"
        names += [f"{block}.{norm}" for norm in ("norm1", "norm2", "norm3")]
        names += [f"{block}.ff.net.0.proj", f"{block}.ff.net.2"]
        names += [f"{block}.{attention}.to_out.0" for attention in ("attn1", "attn2")]
    rows = _layers({f"{theirs}.{name}": f"{ours}.{name}" for name in names})
    for index in range(depth):
        for attention in ("attn1", "attn2"):
            for letter in "qkv":
                name = f"transformer_blocks.{index}.{attention}.to_{letter}.weight"
                rows.append(_one(f"{theirs}.{name}", f"{ours}.{name}"))
    return rows


def _in_form(rows: list[Row], form: str) -> list[Row]:
    return [Row(row.theirs, row.ours, form) for row in rows]


def _one(theirs: str, ours: str) -> Row:
    return Row(theirs, (ours,))
