"""What a diffusion transformer is made of: its settings and the published sizes.

Peebles & Xie 2023 (arXiv 2212.09748); Chen et al. 2023 (PixArt-alpha, arXiv 2310.00426).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from ldm.errors import ExitCode, LdmError


class Size(NamedTuple):
    """Width, blocks and heads of a published size."""

    hidden_size: int
    num_layers: int
    heads: int


DIT_SIZES: dict[str, Size] = {
    "S": Size(384, 12, 6),
    "B": Size(768, 12, 12),
    "L": Size(1024, 24, 16),
    "XL": Size(1152, 28, 16),
}
"""Table 1 of Peebles & Xie 2023."""

CONDITIONINGS = ("adaln_zero", "adaln", "adaln_single", "cross_attention", "in_context")
"""How time and a label or pooled text reach the blocks; see `DiTConfig.conditioning`."""

_CHOICES: dict[str, tuple[str, ...]] = {
    "conditioning": CONDITIONINGS,
    "text_projection": ("linear", "mlp", "none"),
    "activation": ("gelu", "gelu_tanh"),
    "positions": ("sincos", "learned", "rope"),
    "rope_scaling": ("none", "interpolate", "ntk"),
}


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """Everything needed to rebuild a DiT; written to `transformer/config.json`."""

    in_channels: int
    """Channels of the noisy latent."""
    out_channels: int | None = None
    """Channels of the prediction; None means as many as come in."""
    patch_size: int = 2
    """Latent pixels per token side."""
    hidden_size: int = 384
    """Width; a multiple of `head_dim`."""
    num_layers: int = 12
    """Blocks."""
    head_dim: int = 64
    """Width of one attention head; 64 is fastest on CPUs and GPUs alike."""
    mlp_ratio: float = 4.0
    """Width of the feed-forward layer over `hidden_size`."""
    text_dim: int | None = 768
    """Width of the text encoder's token states; None reads no tokens (labels alone)."""
    pooled_dim: int | None = None
    """Width of the pooled text vector added to the time embedding; None ignores it."""
    local_conv: bool = False
    """A 3x3 convolution over the token grid before each block (groups of `head_dim` channels):
    neighbours need not find each other by attention, which small models learn much faster."""
    qk_norm: str | None = "layer_norm"
    """Norm of queries and keys, or None (Dehghani et al. 2023, arXiv 2302.05442); it keeps
    attention logits bounded at high rates. On CPUs torch fuses it, and not the RMS norm."""
    conditioning: str = "adaln_zero"
    """How time and a label or pooled text reach the blocks: `adaln` shifts and scales their norms,
    `adaln_zero` gates their outputs too, `adaln_single` shares one such layer among all blocks,
    `cross_attention` and `in_context` give them as tokens, which are looked at or join the
    sequence. Text tokens are looked at; with `in_context` they join the sequence as well."""
    num_classes: int | None = None
    """Labels known; the pooled vector is then one-hot of num_classes + 1, the last for none."""
    text_projection: str = "linear"
    """What text tokens go through first: a norm and a linear layer; `mlp`, PixArt's two layers;
    or nothing."""
    cross_norm: bool = True
    """A norm before looking at the text; PixArt has none."""
    activation: str = "gelu"
    """Of the feed-forward layer: `gelu` is a third of the cost of `gelu_tanh` on a CPU, and no
    worse; published models have the latter."""
    ff_norm_eps: float = 1e-6
    """Of the norm before the feed-forward layer; 1e-5 in diffusers' DiT."""
    time_frequency_shift: int = 0
    """1 spreads the frequencies of time over one step less, as diffusers' DiT does."""
    size_conditions: bool = False
    """Tell the network the picture's size and aspect, from `TextEmbedding.sizes` (PixArt 1024)."""
    positions: str = "sincos"
    """How tokens know their place: fixed sines or a learned table, added, or rotary."""
    base_size: int | None = None
    """Tokens per side in training, for pictures of other sizes; None never rescales positions."""
    interpolation: float = 1.0
    """Sincos: positions are divided by it."""
    column_first: bool = False
    """Sincos: the first half of the channels encodes the column, as in published models."""
    rope_scaling: str = "none"
    """Rotary, beyond `base_size`: `none`, `interpolate` or `ntk`."""

    def __post_init__(self) -> None:
        sizes = ("in_channels", "patch_size", "hidden_size", "num_layers", "head_dim")
        optional = ("out_channels", "text_dim", "pooled_dim", "num_classes", "base_size")
        for name in (*sizes, *optional):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise wrong_dit(f"{name} must be at least 1, got {value}", f"set {name} above 0")
        for name, legal in _CHOICES.items():
            if (value := getattr(self, name)) not in legal:
                raise wrong_dit(f"unknown {name} {value!r}", f"use one of {', '.join(legal)}")
        if self.qk_norm not in ("layer_norm", None):  # True once meant an RMS norm, of equal names
            raise wrong_dit(
                f"qk_norm {self.qk_norm!r} is not a norm of this DiT",
                "use 'layer_norm' or null; a run of an older version must be trained again",
            )
        if self.hidden_size % self.head_dim or self.hidden_size % 4:
            raise wrong_dit(
                f"hidden_size {self.hidden_size} is not a multiple of head_dim {self.head_dim}",
                f"use {self.head_dim * max(1, round(self.hidden_size / self.head_dim))}",
            )
        self._check_combinations()

    def _check_combinations(self) -> None:
        single = self.conditioning == "adaln_single"
        for wrong, what, fix in (
            (
                self.num_classes is not None and self.pooled_dim is not None,
                "num_classes and pooled_dim both claim the pooled vector",
                "give one of them",
            ),
            (
                self.text_projection == "none" and not self.is_modulated,
                f"text_projection none does not fit conditioning {self.conditioning}",
                "use text_projection linear",
            ),
            (
                self.local_conv and self.conditioning == "in_context",
                "local_conv needs a grid of tokens, and in_context adds tokens to it",
                "use another conditioning, or local_conv: false",
            ),
            (
                self.positions == "learned" and self.base_size is None,
                "learned positions need base_size, the tokens per side in training",
                "set base_size",
            ),
            (
                self.positions == "rope" and bool(self.head_dim % 4),
                f"rotary positions need head_dim in multiples of 4, got {self.head_dim}",
                "use head_dim 64",
            ),
            (
                self.rope_scaling != "none" and (self.positions != "rope" or not self.base_size),
                f"rope_scaling {self.rope_scaling} needs positions rope and a base_size",
                "set both, or rope_scaling none",
            ),
            (
                self.size_conditions and not (single and self.hidden_size % 3 == 0),
                "size_conditions need conditioning adaln_single and a hidden_size divisible by 3",
                "use size_conditions: false",
            ),
        ):
            if wrong:
                raise wrong_dit(what, fix)

    @property
    def is_modulated(self) -> bool:
        """Whether time reaches the blocks through their norms, and not as a token."""
        return self.conditioning.startswith("adaln")

    @property
    def looks_at_context(self) -> bool:
        """Whether blocks have cross-attention."""
        if self.conditioning == "in_context":
            return False
        return self.text_dim is not None or self.conditioning == "cross_attention"

    @property
    def context_dim(self) -> int:
        """Width of what cross-attention looks at."""
        if self.text_projection == "none" and self.text_dim is not None:
            return self.text_dim
        return self.hidden_size

    def to_json(self) -> dict[str, Any]:
        """The dictionary that `transformer/config.json` holds."""
        return {"_class_name": "LdmDiT", **asdict(self)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> DiTConfig:
        """The inverse of `to_json`; an unknown key is refused by the constructor."""
        return cls(**{key: value for key, value in values.items() if not key.startswith("_")})

    @classmethod
    def from_diffusers(cls, found: Mapping[str, Any]) -> DiTConfig:
        """Of the `config.json` of a PixArtTransformer2DModel or DiTTransformer2DModel.

        Raises:
            LdmError: code CONFIG for another class, or a key or value that is not implemented.
        """
        from ldm.models.dit_diffusers import config_from_diffusers

        return config_from_diffusers(found)

    def to_diffusers(self, sample_size: int | None = None) -> dict[str, Any]:
        """The `config.json` of the diffusers class that computes the same.

        Args:
            sample_size: side of the latents trained on, where `base_size` does not say it:
                diffusers stretches the positions of all other sizes to that one.

        Raises:
            LdmError: code CONFIG, with everything that diffusers' classes cannot express.
        """
        from ldm.models.dit_diffusers import config_to_diffusers

        return config_to_diffusers(self, sample_size)


def published_dit(size: str, patch_size: int) -> DiTConfig:
    """A class-conditional ImageNet model of Peebles & Xie: 4 latent channels of 32x32, 1000 labels.

    Args:
        size: a key of DIT_SIZES.
        patch_size: 2, 4 or 8.
    """
    width, layers, heads = DIT_SIZES[size]
    return DiTConfig(
        in_channels=4,
        out_channels=8,  # the variance is learned
        patch_size=patch_size,
        hidden_size=width,
        num_layers=layers,
        head_dim=width // heads,
        text_dim=None,
        num_classes=1000,
        qk_norm=None,
        activation="gelu_tanh",
        base_size=32 // patch_size,
        column_first=True,
    )


def wrong_dit(what: str, fix: str) -> LdmError:
    """The refusal of a configuration."""
    return LdmError(what, where="DiT", fix=fix, code=ExitCode.CONFIG)
