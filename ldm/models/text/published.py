"""The text encoders of published models as configurations: for files that bring none along.

Values are those of the config.json files that OpenAI, LAION and Google published, as diffusers'
model directories hold them.
"""

from __future__ import annotations

from typing import Any

import torch

from ldm.errors import named

CLIP_VOCABULARY: dict[str, Any] = {
    "vocab_size": 49_408,
    "max_position_embeddings": 77,
    "bos_token_id": 49_406,
    "eos_token_id": 49_407,
    "layer_norm_eps": 1e-5,
}

PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    # OpenAI's ViT-L/14: Stable Diffusion 1, and the first encoder of SDXL
    "clip-l": (
        "CLIPTextModel",
        {
            **CLIP_VOCABULARY,
            "hidden_size": 768,
            "intermediate_size": 3_072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "projection_dim": 768,
            "hidden_act": "quick_gelu",
            "pad_token_id": 49_407,
        },
    ),
    # OpenCLIP's ViT-H/14 without its last layer, as Stable Diffusion 2 reads it
    "open-clip-h": (
        "CLIPTextModel",
        {
            **CLIP_VOCABULARY,
            "hidden_size": 1_024,
            "intermediate_size": 4_096,
            "num_hidden_layers": 23,
            "num_attention_heads": 16,
            "projection_dim": 512,
            "hidden_act": "gelu",
            "pad_token_id": 0,
        },
    ),
    # OpenCLIP's ViT-bigG/14: the second encoder of SDXL and SD3
    "open-clip-bigg": (
        "CLIPTextModelWithProjection",
        {
            **CLIP_VOCABULARY,
            "hidden_size": 1_280,
            "intermediate_size": 5_120,
            "num_hidden_layers": 32,
            "num_attention_heads": 20,
            "projection_dim": 1_280,
            "hidden_act": "gelu",
            "pad_token_id": 0,
        },
    ),
    # Google's T5 v1.1 XXL: SD3 and PixArt
    "t5-v1.1-xxl": (
        "T5EncoderModel",
        {
            "vocab_size": 32_128,
            "d_model": 4_096,
            "d_kv": 64,
            "d_ff": 10_240,
            "num_layers": 24,
            "num_heads": 64,
            "relative_attention_num_buckets": 32,
            "relative_attention_max_distance": 128,
            "layer_norm_epsilon": 1e-6,
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
        },
    ),
}
"""Name -> class of transformers, its configuration. SD3's CLIP-L is `clip-l` with a projection."""


def published_text_model(name: str, *, device: str = "meta", projection: bool = False) -> Any:
    """A text encoder with the published configuration, weights not set.

    Args:
        name: of PUBLISHED.
        device: "meta" holds no weights at all, which is enough to count them or to load into.
        projection: CLIPTextModelWithProjection, where the table has CLIPTextModel.

    Raises:
        LdmError: USAGE for an unknown name.
    """
    import transformers

    class_name, values = named("text encoder", PUBLISHED, name)
    if projection and class_name == "CLIPTextModel":
        class_name = "CLIPTextModelWithProjection"
    kind = "T5Config" if class_name.startswith("T5") else "CLIPTextConfig"
    with torch.device(device):
        return getattr(transformers, class_name)(getattr(transformers, kind)(**values))
