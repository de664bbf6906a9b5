"""Models in one safetensors file of the original layout: read into parts, and written from them.

Writing is the exact inverse of reading. Every tensor of a file is accounted for: read, known to be
of no use, or reported by its name.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ldm.checkpoint.tensors import load_tensors, save_tensors
from ldm.errors import ExitCode, LdmError
from ldm.exchange import original
from ldm.exchange.keymap import Row, from_original, kept, read_by, to_original
from ldm.exchange.original import VAE
from ldm.exchange.shapes import (
    CLIP_L_SD1,
    CLIP_L_XL,
    HEAD_WIDTH,
    OPEN_CLIP_SD2,
    OPEN_CLIP_XL,
    SD3_TEXT,
    Kind,
    Shapes,
    activation_of,
    kind_of,
    sd3_config,
    unet_config,
    vae_config,
)
from ldm.exchange.weights import filled, refuse_pickle, shards, some
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.mmdit import MMDiT, MMDiTConfig
from ldm.models.unet import UNet

log = logging.getLogger(__name__)

HARMLESS = (
    "model_ema.",
    "alphas_cumprod",
    "betas",
    "log_one_minus_alphas_cumprod",
    "logvar",
    "posterior_",
    "sqrt_",
    "denoiser.sigmas",
    "global_step",
    "loss.",
    "first_stage_model.loss.",
    "v_pred",
    "ztsnr",
    "model_sampling.",
)
"""Beginnings of names that no sampling needs: EMA copies, tables of the noise process, marks."""
HARMLESS_ENDS = (".position_ids", ".logit_scale", ".attn_mask", "embed_tokens.weight")
V_MARK, ZERO_SNR_MARK = "v_pred", "ztsnr"
"""Names of empty tensors by which trainers mark v-prediction and zero terminal SNR."""
OPEN_CLIP_LAYERS_LEFT = 1
"""SD 2 reads the states before the last layer; its layer, projection and scale are of no use."""


@dataclass(frozen=True)
class Tower:
    """One text encoder of a file.

    Args:
        name: of its folder in a diffusers directory.
        model: of transformers.
    """

    name: str
    model: nn.Module


@dataclass(frozen=True)
class Parts:
    """What a single file holds.

    Args:
        kind: its family.
        reason: why it was taken for that.
        prediction: what the denoiser predicts, where the file or the family says; else None.
        zero_snr: whether the file is marked as trained with zero terminal SNR.
        net: the denoiser; None in the file of a VAE.
        vae: the codec.
        towers: the text encoders.
        unused: names that were known to be of no use.
    """

    kind: Kind
    reason: str
    prediction: str | None
    zero_snr: bool
    net: nn.Module | None
    vae: AutoencoderKL
    towers: tuple[Tower, ...]
    unused: tuple[str, ...]


def read_file(path: Path, *, allow_unused: bool = False) -> Parts:
    """The parts of a model in one file, or in shards beside a `.safetensors.index.json`.

    Args:
        path: the file; half precision is widened to float32.
        allow_unused: log names that are not understood instead of refusing them.

    Raises:
        LdmError: code IO for a pickle, a damaged file, and names that are missing or left over;
            code CONFIG for a family that is not read.
    """
    refuse_pickle(path)
    tensors: dict[str, Tensor] = {}
    for file in shards(path) if path.suffix == ".json" else [path]:
        tensors |= load_tensors(file)
    return read_tensors(tensors, str(path), allow_unused=allow_unused)


def read_tensors(tensors: Mapping[str, Tensor], where: str, *, allow_unused: bool = False) -> Parts:
    """The parts of a model whose tensors are at hand; see `read_file`."""
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    kind, reason = kind_of(shapes, where)
    log.info("%s: %s, because %s", where, kind.name, reason)
    if kind.name == "vae" and "encoder.conv_in.weight" in shapes:
        tensors = {VAE + name: value for name, value in tensors.items()}
        shapes = {VAE + name: shape for name, shape in shapes.items()}
    reader = _Reader(tensors, where)
    with _shaped(where):
        vae_shape = vae_config(shapes, kind)
    vae = reader.module(lambda: AutoencoderKL(vae_shape), original.vae_rows(vae_shape))
    net = None
    if kind.name == "sd3":
        with _shaped(where):
            joint = MMDiTConfig.from_diffusers(sd3_config(shapes, where))
        net = reader.module(lambda: MMDiT(joint), original.sd3_rows(joint))
    elif kind.name != "vae":
        with _shaped(where):
            shape = unet_config(shapes, kind, where)
        net = reader.module(lambda: UNet(shape), original.unet_rows(shape))
    with _shaped(where):
        towers = tuple(_towers(reader, shapes, kind))
    unused = reader.rest(allow_unused=allow_unused)
    prediction = "v" if V_MARK in tensors else kind.prediction
    return Parts(kind, reason, prediction, ZERO_SNR_MARK in tensors, net, vae, towers, unused)


@contextmanager
def _shaped(where: str) -> Iterator[None]:
    """A file without a tensor that tells the shape of its model is pruned or cut."""
    try:
        yield
    except KeyError as error:
        raise LdmError(
            f"{error.args[0]} is missing, which tells the shape of the model",
            where=where,
            fix="fetch the file again; a pruned file that lacks a part cannot be used alone",
            code=ExitCode.IO,
        ) from error


class _Reader:
    """Takes parts out of the tensors of a file and remembers what was taken."""

    def __init__(self, tensors: Mapping[str, Tensor], where: str) -> None:
        self.tensors, self.where = tensors, where
        self.taken: set[str] = set()

    def module(self, make: Any, rows: list[Row], fixed: Mapping[str, Tensor] | None = None) -> Any:
        """A module with its weights from the file; `fixed` are those that no file holds."""
        with torch.device("meta"):
            names = set(make().state_dict())
        fixed = fixed or {}
        rows = kept(rows, names - fixed.keys())
        found, missing = from_original(rows, self.tensors)
        if missing:
            raise LdmError(
                f"{len(missing)} tensors are missing: {some(missing)}",
                where=self.where,
                fix="fetch the file again; a pruned file that lacks a part cannot be used alone",
                code=ExitCode.IO,
            )
        self.taken |= set(read_by(rows))
        return filled(make, {**found, **fixed}, self.where)

    def rest(self, *, allow_unused: bool) -> tuple[str, ...]:
        """The names not taken, all harmless or allowed.

        Raises:
            LdmError: code IO, for names that nothing here understands.
        """
        left = sorted(self.tensors.keys() - self.taken)
        harmless = [name for name in left if _is_harmless(name)]
        unknown = sorted(set(left) - set(harmless))
        if unknown and not allow_unused:
            raise LdmError(
                f"{len(unknown)} tensors are not understood: {some(unknown)}",
                where=self.where,
                fix="they may belong to another kind of model; --allow-unused ignores them",
                code=ExitCode.IO,
            )
        for names, what in ((harmless, "known to be of no use"), (unknown, "not understood")):
            if names:
                log.info("%s: left out %d (%s): %s", self.where, len(names), what, some(names))
        return tuple(left)


def _towers(reader: _Reader, shapes: Shapes, kind: Kind) -> Iterable[Tower]:
    if kind.name == "sd1":
        yield _clip(reader, shapes, CLIP_L_SD1, Place(kind, "text_encoder"))
    elif kind.name == "sd2":
        yield _open_clip(reader, shapes, OPEN_CLIP_SD2, Place(kind, "text_encoder"))
    elif kind.name == "sdxl":
        yield _clip(reader, shapes, CLIP_L_XL, Place(kind, "text_encoder"))
        yield _open_clip(reader, shapes, OPEN_CLIP_XL, Place(kind, "text_encoder_2", True))
    elif kind.name == "sd3":
        for part, name in (("clip_l", "text_encoder"), ("clip_g", "text_encoder_2")):
            prefix = f"{SD3_TEXT}{part}.transformer."
            if f"{prefix}text_model.embeddings.token_embedding.weight" in shapes:
                yield _clip(reader, shapes, prefix, Place(kind, name, True))
        if f"{SD3_TEXT}t5xxl.transformer.shared.weight" in shapes:
            yield _t5(reader, shapes)


class Place(NamedTuple):
    """Where a text tower stands: its family, its folder, and whether it ends in a projection."""

    kind: Kind
    name: str
    projected: bool = False

    @property
    def wrapper(self) -> str:
        """Before our names of its weights."""
        return "text_model." if self.projected else ""


def _clip(reader: _Reader, shapes: Shapes, prefix: str, place: Place) -> Tower:
    """CLIP's tower under transformers' own names."""
    inner = prefix + "text_model."
    layers = _numbered(shapes, inner + "encoder.layers.")
    vocabulary, width = shapes[inner + "embeddings.token_embedding.weight"]
    positions = shapes[inner + "embeddings.position_embedding.weight"][0]
    feed_forward = shapes[inner + "encoder.layers.0.mlp.fc1.weight"][0]
    output = shapes.get(prefix + "text_projection.weight", (width,))[0]
    make = _clip_maker((vocabulary, width, positions, feed_forward, layers, output), place)
    rows = original.clip_rows(layers, prefix, place.wrapper)
    fixed = {}
    if place.projected and prefix + "text_projection.weight" not in shapes:
        fixed = {"text_projection.weight": torch.eye(width)}  # SD 3 pools CLIP-L unprojected
    return Tower(place.name, reader.module(make, rows, fixed))


def _open_clip(reader: _Reader, shapes: Shapes, prefix: str, place: Place) -> Tower:
    """open_clip's tower, as far as it is read: SD 2's without its last layer."""
    layers = _numbered(shapes, prefix + "transformer.resblocks.")
    vocabulary, width = shapes[prefix + "token_embedding.weight"]
    positions = shapes[prefix + "positional_embedding"][0]
    feed_forward = shapes[prefix + "transformer.resblocks.0.mlp.c_fc.weight"][0]
    output = shapes.get(prefix + "text_projection", (width, width))[1]
    # a published file holds the whole tower; one that was written from diffusers holds what is read
    whole = prefix + "text_projection" in shapes
    used = layers - OPEN_CLIP_LAYERS_LEFT if whole and not place.projected else layers
    make = _clip_maker((vocabulary, width, positions, feed_forward, used, output), place)
    if not place.projected:
        unread = original.open_clip_rows(layers, prefix)
        reader.taken |= {row.theirs for row in unread} & shapes.keys()
    rows = original.open_clip_rows(used, prefix, place.wrapper)
    return Tower(place.name, reader.module(make, rows))


def _clip_maker(sizes: tuple[int, ...], place: Place) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    vocabulary, width, positions, feed_forward, layers, output = sizes
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        max_position_embeddings=positions,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // HEAD_WIDTH),
        projection_dim=output,
        hidden_act=activation_of(place.kind, place.name),
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=1,
    )
    kind = CLIPTextModelWithProjection if place.projected else CLIPTextModel
    return lambda: kind(config)


def _t5(reader: _Reader, shapes: Shapes) -> Tower:
    from transformers import T5Config, T5EncoderModel

    prefix = f"{SD3_TEXT}t5xxl.transformer."
    vocabulary, width = shapes[prefix + "shared.weight"]
    inner = shapes[prefix + "encoder.block.0.layer.0.SelfAttention.q.weight"][0]
    table = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    buckets, heads = shapes[prefix + table]
    config = T5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=inner // heads,
        d_ff=shapes[prefix + "encoder.block.0.layer.1.DenseReluDense.wo.weight"][1],
        num_layers=_numbered(shapes, prefix + "encoder.block."),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
    )
    with torch.device("meta"):
        names = [name for name in T5EncoderModel(config).state_dict() if "embed_tokens" not in name]
    shared = reader.tensors[prefix + "shared.weight"]
    fixed = {"encoder.embed_tokens.weight": shared}  # one table under two names
    rows = original.t5_rows(names, prefix)
    return Tower("text_encoder_3", reader.module(lambda: T5EncoderModel(config), rows, fixed))


def file_tensors(parts: Parts) -> dict[str, Tensor]:
    """The tensors of a single file with these parts: the inverse of `read_tensors`.

    Raises:
        LdmError: code CONFIG, for a denoiser that the original layout has no names for.
    """
    assert parts.net is not None
    config: Any = parts.net.config
    table = original.sd3_rows if parts.kind.name == "sd3" else original.unet_rows
    tensors = _written(parts.net, table(config)) | _written(
        parts.vae, original.vae_rows(parts.vae.config)
    )
    for tower in parts.towers:
        tensors |= _written(tower.model, _tower_rows(parts.kind, tower))
    return tensors


def write_file(
    path: Path, parts: Parts, metadata: Mapping[str, str], marks: Mapping[str, Tensor]
) -> None:
    """Writes a single file in the original layout, with empty tensors as marks; see V_MARK."""
    save_tensors(path, {**file_tensors(parts), **marks}, metadata)


def _tower_rows(kind: Kind, tower: Tower) -> list[Row]:
    config: Any = tower.model.config
    if config.model_type == "t5":
        names = [name for name in tower.model.state_dict() if "embed_tokens" not in name]
        return original.t5_rows(names, f"{SD3_TEXT}t5xxl.transformer.")
    wrapper = "text_model." if "Projection" in type(tower.model).__name__ else ""
    layers = int(config.num_hidden_layers)
    if kind.name == "sd3":
        part = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}[tower.name]
        return original.clip_rows(layers, f"{SD3_TEXT}{part}.transformer.", wrapper)
    if kind.name == "sd1":
        return original.clip_rows(layers, CLIP_L_SD1, wrapper)
    if kind.name == "sd2":
        return original.open_clip_rows(layers, OPEN_CLIP_SD2, wrapper)
    if tower.name == "text_encoder":
        return original.clip_rows(layers, CLIP_L_XL, wrapper)
    return original.open_clip_rows(layers, OPEN_CLIP_XL, wrapper)


def _written(module: nn.Module, rows: list[Row]) -> dict[str, Tensor]:
    state = {k: v for k, v in module.state_dict().items() if not k.endswith("embed_tokens.weight")}
    return to_original(kept(rows, state), state)


def _numbered(shapes: Shapes, prefix: str) -> int:
    return len({name[len(prefix) :].split(".")[0] for name in shapes if name.startswith(prefix)})


def _is_harmless(name: str) -> bool:
    return name.startswith(HARMLESS) or name.endswith(HARMLESS_ENDS)
