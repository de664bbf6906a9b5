"""Tiny models of the published families, made with the classes of diffusers and transformers.

Their weights are random; names, shapes, layers and the way through the pipeline are the real ones.
"""

import torch

import ldm  # noqa: F401  (before anything that imports torchvision)
from ldm.models.text import train_bpe

CAPTIONS = ("a red circle", "a small blue square on the left", "two green triangles")
PROMPT, NEGATIVE = "a small red square", "green"
SIDE = 32
SCHEDULE = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": True,
}


def tokenizer(max_tokens=77):
    return train_bpe(CAPTIONS, vocab_size=560, max_tokens=max_tokens)


def clip(words, width=32, layers=2, *, projected=False, activation="quick_gelu", output=None):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        projection_dim=output or width,
        hidden_act=activation,
        max_position_embeddings=77,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def vae(channels=4, scale=0.18215, shift=None):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        scaling_factor=scale,
        shift_factor=shift,
        use_quant_conv=shift is None,
        use_post_quant_conv=shift is None,
    ).eval()


def unet(text_width, **fields):
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        **{
            "sample_size": SIDE // 2,
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": text_width,
            "attention_head_dim": 8,
            **fields,
        }
    ).eval()
    return louder(model, ("conv_out",))


def louder(model, names, gain=4.0):
    """A network whose answer matters: random ones say nearly nothing."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.startswith(names) and name.endswith("weight"):
                value.mul_(gain)
    return model


def sd1(seed=0, scheduler=None):
    """Stable Diffusion 1: CLIP-L, 1x1 convolutions around the transformers, eps."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    torch.manual_seed(seed)
    words = tokenizer()
    return StableDiffusionPipeline(
        vae=vae(),
        text_encoder=clip(words),
        tokenizer=words,
        unet=unet(32),
        scheduler=scheduler or DDIMScheduler(**SCHEDULE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sd2(seed=0, scheduler=None):
    """Stable Diffusion 2: open_clip's tower, linear layers around the transformers, v."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    torch.manual_seed(seed)
    words = tokenizer()
    return StableDiffusionPipeline(
        vae=vae(),
        text_encoder=clip(words, 64, 3, activation="gelu"),
        tokenizer=words,
        unet=unet(64, use_linear_projection=True, attention_head_dim=(1, 1)),
        scheduler=scheduler or DDIMScheduler(**SCHEDULE, prediction_type="v_prediction"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl(seed=0, scheduler=None):
    """SDXL: two towers, a pooled vector, six numbers of sizes, two depths."""
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline

    torch.manual_seed(seed)
    words = tokenizer()
    return StableDiffusionXLPipeline(
        vae=vae(scale=0.13025),
        text_encoder=clip(words, 32),
        text_encoder_2=clip(words, 64, projected=True, activation="gelu", output=48),
        tokenizer=words,
        tokenizer_2=words,
        unet=unet(
            96,
            use_linear_projection=True,
            attention_head_dim=(1, 1),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2),
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=48 + 6 * 256,
        ),
        scheduler=scheduler or DDIMScheduler(**SCHEDULE),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def sd3(seed=0, scheduler=None, **fields):
    """Stable Diffusion 3: two towers, no T5, joint attention, flow."""
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    torch.manual_seed(seed)
    words = tokenizer()
    net = SD3Transformer2DModel(
        **{
            "sample_size": SIDE // 2,
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 2,
            "attention_head_dim": 64,
            "num_attention_heads": 1,
            "caption_projection_dim": 64,
            "joint_attention_dim": 128,
            "pooled_projection_dim": 32 + 48,
            "pos_embed_max_size": 16,
            **fields,
        }
    ).eval()
    return StableDiffusion3Pipeline(
        transformer=louder(net, ("proj_out", "norm_out")),
        vae=vae(16, 1.5305, 0.0609),
        text_encoder=clip(words, 32, projected=True),
        text_encoder_2=clip(words, 64, projected=True, activation="gelu", output=48),
        text_encoder_3=None,
        tokenizer=words,
        tokenizer_2=words,
        tokenizer_3=None,
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def pixart(seed=0, scheduler=None):
    """PixArt-alpha: T5 with masked padding, adaLN-single, a learned variance beside eps."""
    from diffusers import DDIMScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(seed)
    words = t5_tokenizer()
    config = T5Config(
        vocab_size=len(words),
        d_model=24,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
    )
    net = PixArtTransformer2DModel(
        sample_size=SIDE // 2,
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=32,
        caption_channels=24,
        norm_type="ada_norm_single",
    ).eval()
    return PixArtAlphaPipeline(
        transformer=net,
        vae=vae(),
        text_encoder=T5EncoderModel(config).eval(),
        tokenizer=words,
        scheduler=scheduler or DDIMScheduler(steps_offset=1, clip_sample=False),
    )


def flux(seed=0, scheduler=None):
    """FLUX: the states of a T5, the pooled vector of a CLIP, packed latents, guidance told."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(seed)
    words, pieces = tokenizer(), t5_tokenizer()
    config = T5Config(
        vocab_size=len(pieces),
        d_model=24,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
    )
    net = FluxTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    ).eval()
    return FluxPipeline(
        transformer=louder(net, ("proj_out", "norm_out")),
        vae=vae(16, 0.3611, 0.1159),
        text_encoder=clip(words, 32),
        tokenizer=words,
        text_encoder_2=T5EncoderModel(config).eval(),
        tokenizer_2=pieces,
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(),
    )


def t5_tokenizer():
    from transformers import T5Tokenizer

    words = sorted({word for caption in (*CAPTIONS, PROMPT) for word in caption.split()})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -12.0)]
    pieces += [(f"\u2581{word}", -3.0) for word in words]
    pieces += [(letter, -14.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=120)


FAMILIES = {"sd1": sd1, "sd2": sd2, "sdxl": sdxl, "sd3": sd3}
