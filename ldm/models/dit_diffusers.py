"""A DiT in diffusers' words: configurations and weights, both ways, and the original DiT's names.

Classes: PixArtTransformer2DModel (adaln_single with text) and DiTTransformer2DModel (adaln_zero
with labels). Their queries, keys and values are separate layers, ours are one product; the last
layer orders the numbers of a patch otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ldm.errors import ExitCode, LdmError
from ldm.models.dit_config import DiTConfig, wrong_dit
from ldm.models.interchange import accept
from ldm.models.positions import sincos_positions

Weights = dict[str, Tensor]

_DIFFUSERS_ONLY = {
    "mlp_ratio": 4.0,
    "pooled_dim": None,
    "local_conv": False,
    "qk_norm": None,
    "positions": "sincos",
    "column_first": True,
}
_DIT_ONLY = _DIFFUSERS_ONLY | {"conditioning": "adaln_zero", "time_frequency_shift": 1}
_PIXART_ONLY = _DIFFUSERS_ONLY | {
    "conditioning": "adaln_single",
    "cross_norm": False,
    "ff_norm_eps": 1e-6,
    "time_frequency_shift": 0,
}
_SHARED = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "num_layers": 28,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
}
_FIXED = {
    "dropout": 0.0,
    "attention_bias": True,
    "upcast_attention": False,
    "norm_elementwise_affine": False,
}


def fitted_dit(
    chosen: Mapping[str, Any],
    *,
    channels: tuple[int, int],
    text_dim: int,
    pooled_dim: int | None,
    labels: bool,
    diffusers: bool,
) -> DiTConfig:
    """A DiT of some fields for a text encoder.

    Args:
        chosen: fields of a DiTConfig.
        channels: of input and output.
        text_dim: width of the encoder's token states.
        pooled_dim: of its pooled vector; None ignores that.
        labels: its pooled vector is a one-hot label, the last for none, and is all that is read.
        diffusers: choose what is left so that a diffusers class computes the same.
    """
    fields: dict[str, Any] = {**chosen, "in_channels": channels[0], "out_channels": channels[1]}
    if labels:
        fields |= {"text_dim": None, "num_classes": text_dim - 1}
    else:
        fields |= {"text_dim": text_dim, "pooled_dim": None if diffusers else pooled_dim}
    if diffusers:
        fields |= {"qk_norm": None, "activation": "gelu_tanh", "column_first": True}
        of_dit: dict[str, Any] = {"ff_norm_eps": 1e-5, "time_frequency_shift": 1}
        fields |= of_dit if labels else {"text_projection": "mlp", "cross_norm": False}
    return DiTConfig(**fields)


def config_from_diffusers(found: Mapping[str, Any]) -> DiTConfig:
    """`DiTConfig.from_diffusers`."""
    if found.get("_class_name") == "DiTTransformer2DModel":
        return _from_dit(found)
    return _from_pixart(found)


def config_to_diffusers(config: DiTConfig, sample_size: int | None = None) -> dict[str, Any]:
    """`DiTConfig.to_diffusers`."""
    if config.base_size is not None:
        sample_size = config.base_size * config.patch_size
    is_dit = config.num_classes is not None
    refused = [
        f"{name} {getattr(config, name)!r} (only {wanted!r})"
        for name, wanted in (_DIT_ONLY if is_dit else _PIXART_ONLY).items()
        if getattr(config, name) != wanted
    ]
    for wrong, what in (
        (sample_size is None, "no base_size, and no sample_size given"),
        (is_dit and config.text_dim is not None, "text and labels in one network"),
        (not is_dit and config.text_dim is None, "neither text nor labels"),
        (is_dit and config.interpolation != 1, "interpolation of a DiT"),
        (not is_dit and config.text_projection == "linear", "text_projection linear"),
        (config.activation == "gelu" and is_dit, "activation gelu of a DiT"),
    ):
        refused += [what] if wrong else []
    if refused or sample_size is None:
        raise LdmError(
            f"diffusers has no class for this DiT: {'; '.join(refused)}",
            where="DiT",
            fix="train with model.diffusers=true, or keep it in this project's format",
            code=ExitCode.CONFIG,
        )
    shared = {
        "num_attention_heads": config.hidden_size // config.head_dim,
        "attention_head_dim": config.head_dim,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels or config.in_channels,
        "num_layers": config.num_layers,
        "sample_size": sample_size,
        "patch_size": config.patch_size,
        "activation_fn": "gelu-approximate" if config.activation == "gelu_tanh" else "gelu",
    }
    if is_dit:
        return {
            "_class_name": "DiTTransformer2DModel",
            **shared,
            "num_embeds_ada_norm": config.num_classes,
            "norm_eps": config.ff_norm_eps,
        }
    return {
        "_class_name": "PixArtTransformer2DModel",
        **shared,
        "cross_attention_dim": config.context_dim,
        "caption_channels": config.text_dim if config.text_projection == "mlp" else None,
        "interpolation_scale": config.interpolation,
        "use_additional_conditions": config.size_conditions,
    }


def dit_weights_from_diffusers(state: Mapping[str, Tensor], config: DiTConfig) -> Weights:
    """Our weights of a state_dict of the diffusers class of `config`.

    A name that is not known stays as it is, for the loader to report.

    Raises:
        LdmError: code IO, when the blocks of a DiTTransformer2DModel embed time or labels each in
            their own way: diffusers allows that, a published DiT has one embedding.
    """
    theirs = {name: value for name, value in state.items() if name != "pos_embed.pos_embed"}
    if config.num_classes is not None:
        _refuse_different_embeddings(theirs, config)
    ours: Weights = {}
    for mine, others in _names(config).items():
        if all(name in theirs for name in others):
            parts = [theirs.pop(name) for name in others]
            repeated = mine in _ONE_FOR_ALL_BLOCKS and config.num_classes is not None
            ours[mine] = parts[0] if repeated or len(parts) == 1 else torch.cat(parts)
    for name in ("proj_out.weight", "proj_out.bias"):
        if name in ours:
            ours[name] = _patch_order(ours[name], config, to_ours=True)
    return ours | theirs


def dit_weights_to_diffusers(state: Mapping[str, Tensor], config: DiTConfig) -> Weights:
    """The inverse of `dit_weights_from_diffusers`; embeddings of a DiT go to every block."""
    theirs: Weights = {}
    for mine, others in _names(config).items():
        value = state[mine]
        if mine.startswith("proj_out."):
            value = _patch_order(value, config, to_ours=False)
        if mine in _ONE_FOR_ALL_BLOCKS and config.num_classes is not None:
            theirs.update(dict.fromkeys(others, value))
        else:
            theirs.update(zip(others, value.chunk(len(others)), strict=True))
    return {name: value.clone() for name, value in theirs.items()}


def dit_weights_from_original(state: Mapping[str, Tensor], config: DiTConfig) -> Weights:
    """Our weights of a checkpoint of the authors of DiT (`published_dit`).

    Raises:
        LdmError: code IO, when its table of positions is not that of `config`.
    """
    theirs = dict(state)
    side, table = config.base_size, theirs.pop("pos_embed", None)
    if table is not None and side is not None:
        wanted = sincos_positions(
            side, side, config.hidden_size, base=side, column_first=config.column_first
        )
        if table.shape[1:] != wanted.shape or not torch.allclose(
            table[0].float(), wanted, atol=1e-4
        ):
            raise _damaged("pos_embed is not the table of sines of this configuration")
    ours: Weights = {}
    for name in list(theirs):
        renamed = name
        for old, new in _ORIGINAL:
            renamed = renamed.replace(old, new)
        ours[renamed] = theirs.pop(name)
    for name in ("proj_out.weight", "proj_out.bias"):
        ours[name] = _patch_order(ours[name], config, to_ours=True)
    return ours


def _names(config: DiTConfig) -> dict[str, list[str]]:
    """Ours -> theirs: one name, or the layers that ours joins, or the copies in every block."""
    is_dit, blocks = config.num_classes is not None, range(config.num_layers)
    layers = {"proj_in": ["pos_embed.proj"]}
    if is_dit:
        emb = [f"transformer_blocks.{i}.norm1.emb" for i in blocks]
        layers["time.0"] = [f"{name}.timestep_embedder.linear_1" for name in emb]
        layers["time.2"] = [f"{name}.timestep_embedder.linear_2" for name in emb]
        layers |= {"modulation_out": ["proj_out_1"], "proj_out": ["proj_out_2"]}
    else:
        layers |= {ours: [theirs] for ours, theirs in _PIXART_LAYERS.items()}
        if config.text_projection == "mlp":
            layers |= {f"text_proj.{2 * k}": [f"caption_projection.linear_{k + 1}"] for k in (0, 1)}
        for ours in ("resolution", "aspect") if config.size_conditions else ():
            theirs = "aspect_ratio" if ours == "aspect" else ours
            for k in (0, 1):
                name = f"adaln_single.emb.{theirs}_embedder.linear_{k + 1}"
                layers[f"{ours}.{2 * k}"] = [name]
    for i in blocks:
        at = f"transformer_blocks.{i}"
        layers |= {f"{at}.{ours}": [f"{at}.{name}" for name in names] for ours, names in _BLOCK}
        if is_dit:
            layers[f"{at}.modulation"] = [f"{at}.norm1.linear"]
        else:
            looks = {ours: [f"{at}.{name}" for name in names] for ours, names in _CROSS}
            layers |= {f"{at}.{ours}": names for ours, names in looks.items()}
    names = {
        f"{ours}.{kind}": [f"{name}.{kind}" for name in theirs]
        for ours, theirs in layers.items()
        for kind in ("weight", "bias")
    }
    if is_dit:
        names["labels.weight"] = [f"{name}.class_embedder.embedding_table.weight" for name in emb]
        return names
    tables = ["scale_shift_table", *(f"transformer_blocks.{i}.scale_shift_table" for i in blocks)]
    return names | {name: [name] for name in tables}


_ONE_FOR_ALL_BLOCKS = frozenset(
    ["labels.weight", *(f"time.{k}.{kind}" for k in (0, 2) for kind in ("weight", "bias"))]
)
_PIXART_LAYERS = {
    "time.0": "adaln_single.emb.timestep_embedder.linear_1",
    "time.2": "adaln_single.emb.timestep_embedder.linear_2",
    "modulation": "adaln_single.linear",
    "proj_out": "proj_out",
}
_BLOCK: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("attn1.to_qkv", ("attn1.to_q", "attn1.to_k", "attn1.to_v")),
    ("attn1.to_out", ("attn1.to_out.0",)),
    ("ff.0", ("ff.net.0.proj",)),
    ("ff.2", ("ff.net.2",)),
)
_CROSS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("attn2.to_q", ("attn2.to_q",)),
    ("attn2.to_kv", ("attn2.to_k", "attn2.to_v")),
    ("attn2.to_out", ("attn2.to_out.0",)),
)
_ORIGINAL = (
    ("x_embedder.proj", "proj_in"),
    ("t_embedder.mlp", "time"),
    ("y_embedder.embedding_table", "labels"),
    ("final_layer.linear", "proj_out"),
    ("final_layer.adaLN_modulation.1", "modulation_out"),
    ("blocks.", "transformer_blocks."),
    ("attn.qkv", "attn1.to_qkv"),
    ("attn.proj", "attn1.to_out"),
    ("mlp.fc1", "ff.0"),
    ("mlp.fc2", "ff.2"),
    ("adaLN_modulation.1", "modulation"),
)


def _patch_order(value: Tensor, config: DiTConfig, *, to_ours: bool) -> Tensor:
    """Rows of the last layer: (row, column, channel) of a patch there, channel first here."""
    patch = config.patch_size
    if to_ours:
        return value.unflatten(0, (patch, patch, -1)).movedim(2, 0).flatten(0, 2)
    return value.unflatten(0, (-1, patch, patch)).movedim(0, 2).flatten(0, 2)


def _refuse_different_embeddings(theirs: Weights, config: DiTConfig) -> None:
    for mine, others in _names(config).items():
        if mine in _ONE_FOR_ALL_BLOCKS:
            copies = [theirs[name] for name in others if name in theirs]
            if any(not copy.equal(copies[0]) for copy in copies[1:]):
                raise _damaged(f"the blocks do not share one {others[0].partition('emb.')[2]}")


def _damaged(what: str) -> LdmError:
    return LdmError(
        what, where="DiT weights", fix="run this checkpoint with diffusers", code=ExitCode.IO
    )


def _from_pixart(found: Mapping[str, Any]) -> DiTConfig:
    values = accept(
        found,
        "PixArtTransformer2DModel",
        _SHARED
        | {
            "out_channels": 8,
            "sample_size": 128,
            "cross_attention_dim": 1152,
            "caption_channels": None,
            "interpolation_scale": None,
            "use_additional_conditions": None,
        },
        _FIXED | {"norm_type": "ada_norm_single", "attention_type": "default", "norm_eps": 1e-6},
        ("norm_num_groups", "num_embeds_ada_norm", "use_linear_projection", "num_vector_embeds"),
    )
    caption, cross = values["caption_channels"], values["cross_attention_dim"]
    sized = values["use_additional_conditions"]
    config = DiTConfig(
        **_shared_fields(values),
        text_dim=cross if caption is None else caption,
        qk_norm=None,
        conditioning="adaln_single",
        text_projection="none" if caption is None else "mlp",
        cross_norm=False,
        size_conditions=values["sample_size"] == 128 if sized is None else sized,
        interpolation=values["interpolation_scale"] or max(values["sample_size"] // 64, 1),
    )
    if caption is not None and cross != config.hidden_size:
        raise wrong_dit(
            f"captions are projected to {config.hidden_size}, but cross_attention_dim is {cross}",
            "a PixArt checkpoint has them equal",
        )
    return config


def _from_dit(found: Mapping[str, Any]) -> DiTConfig:
    values = accept(
        found,
        "DiTTransformer2DModel",
        _SHARED
        | {
            "out_channels": None,
            "sample_size": 32,
            "num_embeds_ada_norm": 1000,
            "norm_eps": 1e-5,
        },
        _FIXED | {"norm_type": "ada_norm_zero"},
        ("norm_num_groups",),
    )
    return DiTConfig(
        **_shared_fields(values),
        text_dim=None,
        num_classes=values["num_embeds_ada_norm"],
        qk_norm=None,
        ff_norm_eps=values["norm_eps"],
        time_frequency_shift=1,
    )


def _shared_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    heads, head_dim = values["num_attention_heads"], values["attention_head_dim"]
    activations = {"gelu-approximate": "gelu_tanh", "gelu": "gelu"}
    if values["activation_fn"] not in activations:
        raise wrong_dit(
            f"activation_fn {values['activation_fn']!r} is not implemented",
            f"known: {', '.join(activations)}",
        )
    return {
        "in_channels": values["in_channels"],
        "out_channels": values["out_channels"],
        "patch_size": values["patch_size"],
        "hidden_size": heads * head_dim,
        "num_layers": values["num_layers"],
        "head_dim": head_dim,
        "activation": activations[values["activation_fn"]],
        "base_size": values["sample_size"] // values["patch_size"],
        "column_first": True,
    }
