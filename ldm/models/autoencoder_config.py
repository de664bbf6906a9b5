"""The shape of a KL-VAE, checked and exchanged with diffusers. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ldm.errors import ExitCode, LdmError
from ldm.models.interchange import accept, jsonable


@dataclass(frozen=True)
class AutoencoderConfig:
    """Shape and latent statistics of a KL-VAE; fields are named as in diffusers' config.json.

    Args:
        in_channels: channels of the pixels.
        out_channels: channels of the reconstruction.
        latent_channels: C.
        block_out_channels: width of each resolution level, finest first; n levels shrink the
            picture by 2^(n - 1).
        layers_per_block: resnet blocks per level of the encoder; the decoder has one more.
        norm_num_groups: groups of every norm; divides every width.
        mid_block_add_attention: self-attention at the coarsest level.
        use_quant_conv: a 1x1 convolution after the encoder.
        use_post_quant_conv: a 1x1 convolution before the decoder.
        scaling_factor: latents are (z - shift) * scaling_factor; 1 changes nothing.
        shift_factor: one shift for all channels, or None.
        latents_mean: measured mean of z per channel, or None.
        latents_std: measured standard deviation of z per channel, given with `latents_mean`.

    Raises:
        LdmError: a combination that cannot be built, with a legal one (code CONFIG).
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    mid_block_add_attention: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    scaling_factor: float = 1.0
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("in_channels", "out_channels", "latent_channels", "layers_per_block"):
            if getattr(self, name) < 1:
                raise _wrong(name, f"is {getattr(self, name)}", "use 1 or more")
        if not self.block_out_channels or min(self.block_out_channels) < 1:
            raise _wrong(
                "block_out_channels", f"is {self.block_out_channels}", "such as (64, 128, 256, 256)"
            )
        groups = self.norm_num_groups
        odd = [width for width in self.block_out_channels if groups < 1 or width % groups]
        if odd:
            raise _wrong(
                "norm_num_groups",
                f"{groups} does not divide the width {odd[0]} of block_out_channels",
                f"use a divisor of all widths {self.block_out_channels}, such as 8",
            )
        if not self.scaling_factor > 0:
            raise _wrong("scaling_factor", f"is {self.scaling_factor}", "use a number above 0")
        self._check_statistics()

    def _check_statistics(self) -> None:
        mean, std = self.latents_mean, self.latents_std
        if (mean is None) != (std is None):
            raise _wrong("latents_mean", "and latents_std need each other", "give both or neither")
        if mean is None or std is None:
            return
        if {len(mean), len(std)} != {self.latent_channels}:
            raise _wrong(
                "latents_mean",
                f"and latents_std have {len(mean)} and {len(std)} entries for "
                f"{self.latent_channels} latent channels",
                "give one number per channel",
            )
        if not min(std) > 0:
            raise _wrong("latents_std", f"is {std}", "measure it again: every entry is above 0")
        if self.shift_factor is not None:
            raise _wrong("shift_factor", "would shift what latents_mean shifts", "give one of them")

    @property
    def downsample_factor(self) -> int:
        """Pixels per latent along one side."""
        return 1 << (len(self.block_out_channels) - 1)

    def to_diffusers(self) -> dict[str, Any]:
        """The `config.json` of a diffusers AutoencoderKL."""
        levels = len(self.block_out_channels)
        return jsonable(
            asdict(self)
            | FIXED
            | {
                "_class_name": "AutoencoderKL",
                "down_block_types": ("DownEncoderBlock2D",) * levels,
                "up_block_types": ("UpDecoderBlock2D",) * levels,
            }
        )

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> AutoencoderConfig:
        """The configuration of a diffusers AutoencoderKL; absent keys as diffusers reads them.

        Raises:
            LdmError: a key or a value that is not implemented, by its name.
        """
        levels = len(config.get("block_out_channels", DIFFUSERS_DEFAULTS["block_out_channels"]))
        blocks = {
            "down_block_types": ("DownEncoderBlock2D",) * levels,
            "up_block_types": ("UpDecoderBlock2D",) * levels,
        }
        return cls(**accept(config, "AutoencoderKL", DIFFUSERS_DEFAULTS, FIXED | blocks, HARMLESS))


def _wrong(field: str, what: str, fix: str) -> LdmError:
    return LdmError(f"{field} {what}", where="autoencoder", fix=fix, code=ExitCode.CONFIG)


DIFFUSERS_DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "norm_num_groups": 32,
    "mid_block_add_attention": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
}
"""What diffusers assumes for an absent key: Stable Diffusion 1's file has no scaling_factor."""

FIXED: dict[str, Any] = {"act_fn": "silu"}

HARMLESS = ("sample_size", "force_upcast")
"""Sizes of diffusers' tiles, and its fp16 rule: neither changes weights or results here."""
