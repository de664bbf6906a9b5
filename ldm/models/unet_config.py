"""The shape of a UNet, checked and exchanged with diffusers. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from ldm.errors import ExitCode, LdmError
from ldm.models.interchange import accept, jsonable

SIZE_FEATURES = 256
"""Sinusoidal features of each number of size and crop in SDXL."""


@dataclass(frozen=True)
class UNetConfig:
    """Shape of a UNet; fields are named as in diffusers' config.json.

    Args:
        sample_size: latent height and width the model was trained at; sampling's default size.
        in_channels: channels of the noisy latent.
        out_channels: channels of the prediction.
        block_out_channels: width of each resolution level, finest first.
        layers_per_block: resnet blocks per level on the way down; one more on the way up.
        down_block_types: per level, "CrossAttnDownBlock2D" or "DownBlock2D".
        up_block_types: per level from the coarsest, "CrossAttnUpBlock2D" or "UpBlock2D".
        cross_attention_dim: D, width of the text tokens.
        attention_head_dim: NUMBER of heads, for all levels or per level. The name is a mistake
            of the published files that every Stable Diffusion checkpoint carries.
        transformer_layers_per_block: transformer blocks after each resnet, for all or per level.
        norm_num_groups: groups of every norm; divides every width.
        norm_eps: of the norms in resnet blocks.
        use_linear_projection: Stable Diffusion 2's linear layers around the transformer blocks
            where 1 has 1x1 convolutions; only the shape of the weights differs.
        addition_embed_type: "text_time" adds SDXL's embedding of the pooled text vector and the
            numbers of size and crop to the time signal (Podell et al. 2023, arXiv 2307.01952,
            section 2.2); None adds nothing.
        addition_time_embed_dim: sinusoidal features of each of those numbers, 256 in SDXL.
        projection_class_embeddings_input_dim: width of the pooled vector plus that of all numbers,
            2816 = 1280 + 6 * 256 in SDXL.

    Raises:
        LdmError: a combination that cannot be built, with a legal one (code CONFIG).
    """

    sample_size: int | None = None
    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    cross_attention_dim: int = 768
    attention_head_dim: int | tuple[int, ...] = 8
    transformer_layers_per_block: int | tuple[int, ...] = 1
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    use_linear_projection: bool = False
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None

    def __post_init__(self) -> None:
        for name in ("in_channels", "out_channels", "layers_per_block", "cross_attention_dim"):
            if getattr(self, name) < 1:
                raise _wrong(name, f"is {getattr(self, name)}", "use 1 or more")
        widths = self.block_out_channels
        if not widths:
            raise _wrong("block_out_channels", "is empty", "such as (64, 128, 256)")
        lists = ("down_block_types", "up_block_types")
        numbers = ("attention_head_dim", "transformer_layers_per_block")
        for name in (*lists, *(n for n in numbers if isinstance(getattr(self, n), tuple))):
            if len(getattr(self, name)) != len(widths):
                raise _wrong(
                    name,
                    f"has {len(getattr(self, name))} entries for {len(widths)} levels",
                    "give one entry per entry of block_out_channels",
                )
        if min(self.depths) < 1:
            raise _wrong("transformer_layers_per_block", f"is {self.depths}", "use 1 or more")
        for name in lists:
            for kind in getattr(self, name):
                if kind not in BLOCK_TYPES[name]:
                    known = ", ".join(BLOCK_TYPES[name])
                    raise _wrong(name, f"has {kind!r}", f"the known ones are {known}")
        self._check_widths()
        self._check_addition()

    def _check_widths(self) -> None:
        for width, heads in zip(self.block_out_channels, self.heads, strict=True):
            if self.norm_num_groups < 1 or width < 1 or width % self.norm_num_groups:
                raise _wrong(
                    "norm_num_groups",
                    f"{self.norm_num_groups} does not divide the width {width}",
                    f"use a divisor of all widths {self.block_out_channels}, such as 8",
                )
            if heads < 1 or width % heads:
                raise _wrong(
                    "attention_head_dim",
                    f"{heads} heads do not divide the width {width}",
                    "give the number of heads, such as width / 64 per level",
                )

    def _check_addition(self) -> None:
        if self.addition_embed_type not in (None, "text_time"):
            raise _wrong(
                "addition_embed_type", f"is {self.addition_embed_type!r}", "use null or 'text_time'"
            )
        if self.addition_embed_type is None:
            return
        features, total = self.addition_time_embed_dim, self.projection_class_embeddings_input_dim
        if features is None or features < 2 or features % 2:
            raise _wrong("addition_time_embed_dim", f"is {features}", "use an even number, 256")
        if total is None or total <= features:
            raise _wrong(
                "projection_class_embeddings_input_dim",
                f"is {total}",
                f"give the width of the pooled text vector + 6 * {features}",
            )

    def with_sizes(self, pooled_width: int | None) -> UNetConfig:
        """The same UNet that also reads a pooled vector of this width and six sizes, as SDXL does.

        Raises:
            LdmError: there is no pooled vector.
        """
        if not pooled_width:
            raise LdmError(
                "this text encoder has no pooled vector, which belongs to SDXL's conditioning",
                where="model.size_conditioning",
                fix="use model.size_conditioning=false, or a CLIP text encoder",
                code=ExitCode.CONFIG,
            )
        return replace(
            self,
            addition_embed_type="text_time",
            addition_time_embed_dim=SIZE_FEATURES,
            projection_class_embeddings_input_dim=pooled_width + 6 * SIZE_FEATURES,
        )

    @property
    def heads(self) -> tuple[int, ...]:
        """Attention heads per level, finest first."""
        return self._per_level(self.attention_head_dim)

    @property
    def depths(self) -> tuple[int, ...]:
        """Transformer blocks after each resnet block of a level with attention, finest first."""
        return self._per_level(self.transformer_layers_per_block)

    def _per_level(self, value: int | tuple[int, ...]) -> tuple[int, ...]:
        return value if isinstance(value, tuple) else (value,) * len(self.block_out_channels)

    def to_diffusers(self) -> dict[str, Any]:
        """The `config.json` of a diffusers UNet2DConditionModel."""
        return jsonable(asdict(self) | FIXED | {"_class_name": "UNet2DConditionModel"})

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> UNetConfig:
        """The configuration of a diffusers UNet2DConditionModel; absent keys as diffusers has them.

        Raises:
            LdmError: a key or a value that is not implemented, by its name.
        """
        return cls(**accept(config, "UNet2DConditionModel", DIFFUSERS_DEFAULTS, FIXED, HARMLESS))


def _wrong(field: str, what: str, fix: str) -> LdmError:
    return LdmError(f"{field} {what}", where="unet", fix=fix, code=ExitCode.CONFIG)


BLOCK_TYPES: dict[str, tuple[str, ...]] = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}

DIFFUSERS_DEFAULTS: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "cross_attention_dim": 1280,
    "attention_head_dim": 8,
    "transformer_layers_per_block": 1,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "use_linear_projection": False,
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "projection_class_embeddings_input_dim": None,
}
"""What diffusers assumes for an absent key."""

FIXED: dict[str, Any] = {
    "act_fn": "silu",
    "attention_type": "default",
    "center_input_sample": False,
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "dropout": 0.0,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "reverse_transformer_layers_per_block": None,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
}

HARMLESS = ("upcast_attention", "addition_embed_type_num_heads")
"""The first is about fp16 overflow in a kernel that is not used here; the second belongs to an
`addition_embed_type` that is not built here."""
