"""The diffusion transformer that a configuration can ask for. Loads no torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import model_validator

from ldm.config.fields import Count, Fraction, Positive, Section, Whole

DIT_SIZES: dict[str, dict[str, int]] = {
    "S": {"hidden_size": 384, "num_layers": 12, "head_dim": 64},
    "B": {"hidden_size": 768, "num_layers": 12, "head_dim": 64},
    "L": {"hidden_size": 1024, "num_layers": 24, "head_dim": 64},
    "XL": {"hidden_size": 1152, "num_layers": 28, "head_dim": 72},
}
"""What `model.size` stands for: table 1 of Peebles & Xie 2023 (arXiv 2212.09748)."""


class MaskingConfig(Section):
    """Training on some of the tokens, which costs less; sampling always sees all of them."""

    kind: Literal["none", "mask", "route"] = "none"
    """mask removes tokens, and the loss counts the others (MaskDiT, MicroDiT); route lets them
    skip some blocks, and the loss counts all (TREAD)."""
    share: Fraction = 0.5
    """Share of the tokens that are removed or skip."""
    first: Whole = 0
    """Blocks that every token goes through before; above 0 with mask is MicroDiT's deferral."""
    last: Count | None = None
    """route: blocks after which the tokens that skipped come back, counted from the start."""
    until: Fraction = 1.0
    """Share of the steps trained so; the rest sees all tokens, as at sampling."""


class DitConfig(Section):
    """Diffusion transformer."""

    kind: Literal["dit"] = "dit"
    """Selects this architecture."""
    size: Literal["S", "B", "L", "XL"] | None = None
    """A published size: sets hidden_size, num_layers and head_dim where they are not given."""
    patch_size: Count = 2
    """Latent pixels per token side."""
    hidden_size: Count = 384
    """Width; a multiple of head_dim."""
    num_layers: Count = 12
    """Blocks."""
    head_dim: Count = 64
    """Width of one attention head."""
    mlp_ratio: Positive = 4.0
    """Feed-forward width over hidden_size."""
    local_conv: bool = False
    """A 3x3 convolution over the tokens in each block: small models learn much faster with it."""
    pooled: bool = True
    """Add the pooled text vector to the time embedding where the encoder has one."""
    conditioning: Literal[
        "adaln_zero", "adaln", "adaln_single", "cross_attention", "in_context"
    ] = "adaln_zero"
    """How time and labels or pooled text reach the blocks: by their norms (adaln, with gates
    adaln_zero, one layer for all blocks adaln_single), or as tokens that are looked at
    (cross_attention) or join the sequence (in_context)."""
    positions: Literal["sincos", "learned", "rope"] = "sincos"
    """How tokens know their place: fixed sines, a learned table, or rotary."""
    base_size: Count | None = None
    """Tokens per side in training: larger pictures then get positions between those; null counts
    tokens. learned needs it."""
    rope_scaling: Literal["none", "interpolate", "ntk"] = "none"
    """rope beyond base_size: positions squeezed, or slow rotations slowed."""
    diffusers: bool = False
    """Build exactly what a diffusers class computes, so that the model can be exported: PixArt for
    adaln_single, DiT for adaln_zero with labels."""
    masking: MaskingConfig = MaskingConfig()
    """Training on some of the tokens."""

    @model_validator(mode="before")
    @classmethod
    def _sizes(cls, values: Any) -> Any:
        """Keys of a named size, below those that are given."""
        size = values.get("size") if isinstance(values, dict) else None
        named = DIT_SIZES.get(size) if isinstance(size, str) else None
        return values if named is None else {**named, **values}
