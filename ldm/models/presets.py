"""Published networks as configurations, under short names. Loads no torch.

Values are those of the `config.json` files that were published with the weights; for the DiT those
of Peebles & Xie 2023 (arXiv 2212.09748), table 1. Text encoders stand in `text/published.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ldm.models.autoencoder_config import AutoencoderConfig
from ldm.models.dit_config import DIT_SIZES, DiTConfig, published_dit
from ldm.models.mmdit_config import MMDiTConfig
from ldm.models.unet_config import UNetConfig

NetworkConfig = UNetConfig | DiTConfig | MMDiTConfig | AutoencoderConfig


@dataclass(frozen=True)
class Preset:
    """A published network and the inputs that its cost is stated for.

    Args:
        config: builds it.
        size: height and width of the latent; of the picture for an autoencoder.
        text_tokens: tokens of the caption.
    """

    config: NetworkConfig
    size: tuple[int, int]
    text_tokens: int = 0


_SD15 = UNetConfig(sample_size=64)
_SD21 = replace(
    _SD15,
    sample_size=96,
    cross_attention_dim=1024,
    attention_head_dim=(5, 10, 20, 20),
    use_linear_projection=True,
)
_SDXL = UNetConfig(
    sample_size=128,
    block_out_channels=(320, 640, 1280),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    cross_attention_dim=2048,
    attention_head_dim=(5, 10, 20),
    transformer_layers_per_block=(1, 2, 10),
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)
_SD_VAE = AutoencoderConfig(scaling_factor=0.18215)
_SD3_VAE = AutoencoderConfig(
    latent_channels=16,
    use_quant_conv=False,
    use_post_quant_conv=False,
    scaling_factor=1.5305,
    shift_factor=0.0609,
)
_SD3 = MMDiTConfig(
    num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=192
)
_PIXART = DiTConfig(
    in_channels=4,
    out_channels=8,  # the variance is learned
    hidden_size=1152,
    num_layers=28,
    head_dim=72,
    text_dim=4096,
    qk_norm=None,
    conditioning="adaln_single",
    text_projection="mlp",
    cross_norm=False,
    activation="gelu_tanh",
    base_size=32,
    column_first=True,
)

SD3_TOKENS = 154
"""77 of both CLIPs and 77 of T5, as Stable Diffusion 3 was trained."""

PRESETS: dict[str, Preset] = {
    "sd15-unet": Preset(_SD15, (64, 64), 77),
    "sd21-unet": Preset(_SD21, (64, 64), 77),
    "sdxl-unet": Preset(_SDXL, (128, 128), 77),
    "sd-vae": Preset(_SD_VAE, (512, 512)),
    "sdxl-vae": Preset(replace(_SD_VAE, scaling_factor=0.13025), (1024, 1024)),
    "sd3-vae": Preset(_SD3_VAE, (1024, 1024)),
    "flux-vae": Preset(replace(_SD3_VAE, scaling_factor=0.3611, shift_factor=0.1159), (1024, 1024)),
    **{
        f"dit-{size.lower()}-{patch}": Preset(published_dit(size, patch), (32, 32))
        for size in DIT_SIZES
        for patch in (2, 4, 8)
    },
    "pixart-xl-2": Preset(_PIXART, (64, 64), 120),
    "mmdit-sd3-medium": Preset(_SD3, (128, 128), SD3_TOKENS),
    "mmdit-sd35-medium": Preset(
        replace(
            _SD3,
            pos_embed_max_size=384,
            dual_attention_layers=tuple(range(13)),
            qk_norm="rms_norm",
        ),
        (128, 128),
        SD3_TOKENS,
    ),
    "mmdit-sd35-large": Preset(
        replace(
            _SD3,
            num_layers=38,
            num_attention_heads=38,
            caption_projection_dim=2432,
            qk_norm="rms_norm",
        ),
        (128, 128),
        SD3_TOKENS,
    ),
}
