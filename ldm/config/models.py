"""The architectures that a configuration can ask for. Loads no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from ldm.config.dit import DitConfig
from ldm.config.fields import Count, Integer, Positive, Section


class VaeModelConfig(Section):
    """Architecture of the KL-VAE, in diffusers' words."""

    pretrained: Annotated[str, Field(min_length=1)] | None = None
    """Begin with these weights (run, checkpoint or diffusers VAE directory), not with random ones;
    the other keys must describe them."""
    latent_channels: Count = 4
    """Channels of the latent."""
    block_out_channels: Annotated[tuple[Count, ...], Field(min_length=1)] = (128, 256, 512, 512)
    """Width per resolution level; each level after the first halves the picture."""
    layers_per_block: Count = 2
    """Residual blocks per level (the decoder has one more)."""
    norm_num_groups: Count = 32
    """Groups of every group norm; divides every width."""
    mid_block_add_attention: bool = True
    """Self-attention at the lowest resolution."""

    @property
    def downsample_factor(self) -> int:
        """Picture pixels per latent pixel."""
        return int(2 ** (len(self.block_out_channels) - 1))


class MMDitConfig(Section):
    """Multimodal diffusion transformer, Stable Diffusion 3's layout."""

    kind: Literal["mmdit"] = "mmdit"
    """Selects this architecture."""
    patch_size: Count = 2
    """Latent pixels per token side."""
    hidden_size: Count = 384
    """Width; a multiple of head_dim."""
    num_layers: Count = 12
    """Blocks."""
    head_dim: Count = 64
    """Width of one attention head."""
    qk_norm: Literal["rms_norm"] | None = "rms_norm"
    """Norm of queries and keys: rms_norm as in SD 3.5, or null as in SD 3."""
    dual_attention_layers: tuple[Annotated[Integer, Field(ge=0)], ...] = ()
    """Blocks whose picture tokens also attend to themselves alone; the first 13 in SD 3.5 medium.
    """
    pos_embed_max_size: Count = 64
    """Tokens along each side of the position table: the largest picture it will ever draw."""
    pooled: bool = True
    """Add the pooled text vector to the time embedding where the encoder has one."""


class UNetModelConfig(Section):
    """UNet with cross-attention, Stable Diffusion's layout."""

    kind: Literal["unet"] = "unet"
    """Selects this architecture."""
    block_out_channels: Annotated[tuple[Count, ...], Field(min_length=1)] = (320, 640, 1280, 1280)
    """Width per resolution level."""
    layers_per_block: Count = 2
    """Residual blocks per level."""
    attention_levels: tuple[bool, ...] = (True, True, True, False)
    """Which levels attend to the text."""
    heads: Count | tuple[Count, ...] = 8
    """Attention heads, of all levels or per level; divide the width. 8 in SD 1."""
    head_dim: Count | None = None
    """Width of one attention head in place of `heads`, which it overrides: 64 in SD 2 and SDXL."""
    transformer_depth: Count | tuple[Count, ...] = 1
    """Transformer blocks after each residual block, of all levels or per level; [1, 2, 10] in SDXL.
    """
    linear_projection: bool = False
    """Linear layers around the transformer blocks, as in SD 2 and SDXL, not 1x1 convolutions."""
    size_conditioning: bool = False
    """Tell the network each picture's original size and crop, and the pooled text, as SDXL is."""
    norm_num_groups: Count = 32
    """Groups of every group norm; divides every width."""

    @property
    def heads_per_level(self) -> tuple[int, ...]:
        """Attention heads of each level, finest first."""
        if self.head_dim is not None:
            return tuple(max(1, width // self.head_dim) for width in self.block_out_channels)
        if isinstance(self.heads, tuple):
            return self.heads
        return (self.heads,) * len(self.block_out_channels)


class PretrainedConfig(Section):
    """The denoiser of a run or of a published model, with its architecture and its weights."""

    kind: Literal["pretrained"] = "pretrained"
    """Selects this."""
    path: Annotated[str, Field(min_length=1)]
    """Run, checkpoint, diffusers directory, Hub id, or single .safetensors file; vae.path and
    text.path take the same."""
    prediction: Literal["eps", "v", "x0", "flow"] | None = None
    """What it predicts, where a single file (SD 2) does not say."""
    variant: str | None = None
    """Of a diffusers directory's weight files, such as fp16."""
    other_objective: bool = False
    """Train it with another process or prediction than it was made with."""


class LoraConfig(Section):
    """Low-rank adapters (Hu et al. 2021), trained in place of the network."""

    rank: Count = 16
    """Inner width of every adapter."""
    alpha: Positive | None = None
    """Adapters are scaled by alpha / rank; null is the rank."""
    targets: Literal["attention", "linear"] = "attention"
    """Layers with adapters: the products of every attention, or every linear layer."""


class ClipModelConfig(Section):
    """The small CLIP of `ldm train-clip`."""

    width: Count = 128
    """Width of both towers; a multiple of 32."""
    layers: Count = 2
    """Layers of the text tower."""
    vision_layers: Count = 3
    """Layers of the picture tower."""
    patch_px: Count = 8
    """Patch side of the picture tower."""
    vocab_size: Annotated[Integer, Field(ge=300)] = 1_000
    """Most tokens the tokenizer may have; at least 256 bytes twice over are always there."""
    max_tokens: Annotated[Integer, Field(ge=8)] = 77
    """Longest caption in tokens, with the two markers."""


def _kind(value: Any) -> Any:
    """The architecture that a `model` section means; dit when it does not say."""
    return value.get("kind", "dit") if isinstance(value, dict) else getattr(value, "kind", None)


Denoiser = Annotated[
    Annotated[DitConfig, Tag("dit")]
    | Annotated[MMDitConfig, Tag("mmdit")]
    | Annotated[PretrainedConfig, Tag("pretrained")]
    | Annotated[UNetModelConfig, Tag("unet")],
    Discriminator(_kind),
]
