"""The shape of an MM-DiT, checked and exchanged with diffusers. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ldm.errors import ExitCode, LdmError
from ldm.models.interchange import accept, jsonable

CLASS = "SD3Transformer2DModel"
WITHOUT_POOLED = "LdmMMDiT"
"""Class name of a configuration without pooled text, which diffusers' class cannot be built from;
everything else is the same."""


@dataclass(frozen=True)
class MMDiTConfig:
    """Shape of an MM-DiT; fields are named as in diffusers' config.json.

    Args:
        sample_size: latent side at which neighbouring positions would be 1 apart if the table held
            no more; sampling's default size of the published models.
        patch_size: latent pixels per token side.
        in_channels: channels of the noisy latent.
        out_channels: channels of the prediction.
        num_layers: joint blocks; the last gives up its text half after attention.
        attention_head_dim: width of a head.
        num_attention_heads: heads; times `attention_head_dim` it is the width.
        joint_attention_dim: D, width of the text tokens.
        caption_projection_dim: the width again; the published files state it twice.
        pooled_projection_dim: P, width of the pooled text, or None for an encoder without one.
        pos_embed_max_size: tokens along each side of the position table; smaller grids use its
            centre, larger ones are refused.
        dual_attention_layers: blocks whose image half also attends to itself alone (SD 3.5 medium).
        qk_norm: "rms_norm" (SD 3.5) or None (SD 3).

    Raises:
        LdmError: a combination that cannot be built, with a legal one (code CONFIG).
    """

    sample_size: int = 128
    patch_size: int = 2
    in_channels: int = 16
    out_channels: int = 16
    num_layers: int = 18
    attention_head_dim: int = 64
    num_attention_heads: int = 18
    joint_attention_dim: int = 4096
    caption_projection_dim: int = 1152
    pooled_projection_dim: int | None = 2048
    pos_embed_max_size: int = 96
    dual_attention_layers: tuple[int, ...] = ()
    qk_norm: str | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(value, int) and value < 1:
                raise _wrong(name, f"is {value}", "use 1 or more")
        if self.width % 4:
            raise _wrong(
                "attention_head_dim",
                f"{self.attention_head_dim} times {self.num_attention_heads} heads is no multiple "
                "of 4, which the positions need",
                "use a head width that is a multiple of 4, such as 64",
            )
        if self.caption_projection_dim != self.width:
            raise _wrong(
                "caption_projection_dim",
                f"{self.caption_projection_dim} is not the width {self.width} of the blocks",
                f"use {self.width}",
            )
        if self.qk_norm not in (None, "rms_norm"):
            raise _wrong("qk_norm", f"{self.qk_norm!r} is not known", "use 'rms_norm' or null")
        if beyond := [i for i in self.dual_attention_layers if not 0 <= i < self.num_layers]:
            raise _wrong(
                "dual_attention_layers",
                f"names block {beyond[0]} of {self.num_layers}",
                f"use numbers from 0 to {self.num_layers - 1}",
            )

    @property
    def width(self) -> int:
        """Channels of every token inside the blocks."""
        return self.attention_head_dim * self.num_attention_heads

    def to_diffusers(self) -> dict[str, Any]:
        """The `config.json` of a diffusers SD3Transformer2DModel.

        Without pooled text diffusers has no class for it: `_class_name` says so, and
        `from_diffusers` reads it all the same.
        """
        name = WITHOUT_POOLED if self.pooled_projection_dim is None else CLASS
        return jsonable(asdict(self) | {"_class_name": name})

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> MMDiTConfig:
        """The configuration of a diffusers SD3Transformer2DModel; absent keys as diffusers has.

        Raises:
            LdmError: a key or a value that is not implemented, by its name.
        """
        if config.get("_class_name") == WITHOUT_POOLED:
            config = {**config, "_class_name": CLASS}
        fields = accept(config, CLASS, DIFFUSERS_DEFAULTS, {}, ())
        if fields["out_channels"] is None:
            fields["out_channels"] = fields["in_channels"]
        return cls(**fields)


def fitted_mmdit(
    settings: Mapping[str, Any], *, text_dim: int, pooled_dim: int | None
) -> MMDiTConfig:
    """The configuration that an experiment asks for, in its words, which are those of the DiT.

    Args:
        settings: patch_size, hidden_size, num_layers, head_dim, qk_norm, dual_attention_layers,
            pos_embed_max_size, in_channels and out_channels.
        text_dim: width of the text tokens.
        pooled_dim: width of the pooled text, or None to do without.
    """
    values = dict(settings)
    width, head_dim = values.pop("hidden_size"), values.pop("head_dim")
    return MMDiTConfig(
        **values,
        # the size that fills the table: neighbours are then 1 apart, as in the DiT
        sample_size=values["patch_size"] * values["pos_embed_max_size"],
        attention_head_dim=head_dim,
        num_attention_heads=width // head_dim,
        caption_projection_dim=width,
        joint_attention_dim=text_dim,
        pooled_projection_dim=pooled_dim,
    )


def _wrong(field: str, what: str, fix: str) -> LdmError:
    return LdmError(f"{field} {what}", where="mmdit", fix=fix, code=ExitCode.CONFIG)


DIFFUSERS_DEFAULTS: dict[str, Any] = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 18,
    "attention_head_dim": 64,
    "num_attention_heads": 18,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1152,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 96,
    "dual_attention_layers": (),
    "qk_norm": None,
}
"""What diffusers assumes for an absent key."""
