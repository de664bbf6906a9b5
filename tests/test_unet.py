"""The UNet computes what diffusers' UNet2DConditionModel does, for SD 1, SD 2 and SDXL layouts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable

import diffusers
import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn
from torch.testing import assert_close

from ldm.errors import LdmError
from ldm.models.layers import timestep_embedding
from ldm.models.unet import UNet, UNetConfig
from ldm.types import Denoiser, TextEmbedding

SMALL_SD1 = UNetConfig(
    sample_size=8,
    block_out_channels=(16, 32, 32),
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=24,
    attention_head_dim=4,
    norm_num_groups=8,
)
CONFIGS = {
    "sd1": SMALL_SD1,
    "sd2": dataclasses.replace(
        SMALL_SD1, use_linear_projection=True, attention_head_dim=(2, 4, 8), layers_per_block=1
    ),
    "deep transformers": dataclasses.replace(
        SMALL_SD1,
        block_out_channels=(16, 24),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 3),
        use_linear_projection=True,
        in_channels=9,
    ),
    "sdxl": dataclasses.replace(
        SMALL_SD1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(1, 2, 4),
        transformer_layers_per_block=(1, 2, 3),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=10 + 6 * 8,
    ),
}
STABLE_DIFFUSION_1 = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
STABLE_DIFFUSION_2 = STABLE_DIFFUSION_1 | {
    "_diffusers_version": "0.10.0.dev0",
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "dual_cross_attention": False,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "sample_size": 96,
    "upcast_attention": True,
    "use_linear_projection": True,
}
STABLE_DIFFUSION_XL = STABLE_DIFFUSION_2 | {
    "_diffusers_version": "0.19.0.dev0",
    "addition_embed_type": "text_time",
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_dim": 2048,
    "cross_attention_norm": None,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "mid_block_only_cross_attention": None,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_attention_heads": None,
    "projection_class_embeddings_input_dim": 2816,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "sample_size": 128,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "upcast_attention": None,
}
STABLE_DIFFUSION_XL_REFINER = STABLE_DIFFUSION_XL | {
    "attention_head_dim": [6, 12, 24, 24],
    "block_out_channels": [384, 768, 1536, 1536],
    "cross_attention_dim": 1280,
    "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 2, "DownBlock2D"],
    "projection_class_embeddings_input_dim": 2560,
    "transformer_layers_per_block": 4,
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 2, "UpBlock2D"],
}


def twins(config: UNetConfig, dtype: torch.dtype) -> tuple[UNet, nn.Module]:
    """Ours and diffusers' model with equal weights, none of them at its initial value."""
    torch.manual_seed(0)
    ours = UNet(config)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    written = json.loads(json.dumps(config.to_diffusers()))
    theirs = diffusers.UNet2DConditionModel.from_config(written)
    theirs.load_state_dict(ours.state_dict())
    return ours.to(dtype), theirs.to(dtype)


def inputs(
    config: UNetConfig,
    masked: bool,
    size: tuple[int, int] = (8, 12),
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, TextEmbedding]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, config.in_channels, *size, generator=generator, dtype=dtype)
    tokens = torch.randn(2, 7, config.cross_attention_dim, generator=generator, dtype=dtype)
    mask = torch.ones(2, 7, dtype=torch.bool)
    if masked:
        mask[1, 3:] = False
    pooled = sizes = None
    if config.addition_embed_type is not None:
        pooled = torch.randn(2, 10, generator=generator, dtype=dtype)
        sizes = torch.tensor([[512.0, 768, 0, 0, 512, 512], [1023, 333, 3, 40, 1024, 768]])
    return x, torch.tensor([3.0, 980.5], dtype=dtype), TextEmbedding(tokens, mask, pooled, sizes)


def predicted_by_diffusers(
    theirs: nn.Module, x: Tensor, t: Tensor, text: TextEmbedding, masked: bool
) -> Tensor:
    mask = text.mask if masked else None
    added = None if text.sizes is None else {"text_embeds": text.pooled, "time_ids": text.sizes}
    return theirs(x, t, text.tokens, encoder_attention_mask=mask, added_cond_kwargs=added).sample


@pytest.mark.parametrize("size", [(8, 12), (7, 9)], ids=["even", "odd"])
@pytest.mark.parametrize("masked", [False, True], ids=["all real", "padded"])
@pytest.mark.parametrize("name", CONFIGS)
def test_prediction_equals_diffusers_to_1e_5(
    name: str, masked: bool, size: tuple[int, int]
) -> None:
    ours, theirs = twins(CONFIGS[name], torch.float32)
    x, t, text = inputs(CONFIGS[name], masked, size)
    with torch.no_grad():
        expected = predicted_by_diffusers(theirs, x, t, text, masked)
        predicted = ours(x, t, text)
    assert expected.std() > 0.1  # a comparison of zeros would prove nothing
    assert_close(predicted, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("masked", [False, True], ids=["all real", "padded"])
@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_equal_diffusers(name: str, masked: bool) -> None:
    # float64: the claim is that the formula is the same, at any tolerance rounding allows. A
    # masked score is -10000 there and -inf here: both are exactly 0 after the softmax.
    ours, theirs = twins(CONFIGS[name], torch.float64)
    x, t, text = inputs(CONFIGS[name], masked, dtype=torch.float64)
    found = gradients(ours, lambda: ours(x, t, text), x, text)
    expected = gradients(
        theirs, lambda: predicted_by_diffusers(theirs, x, t, text, masked), x, text
    )
    for key, gradient in expected.items():
        assert_close(found[key], gradient, rtol=1e-4, atol=1e-10, msg=key)


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_gradients_equal_diffusers_in_single_precision(name: str) -> None:
    # 1e-4 of the largest entry of each tensor: where entries cancel, rounding is all that is left
    ours, theirs = twins(CONFIGS[name], torch.float32)
    x, t, text = inputs(CONFIGS[name], masked=True, size=(7, 9))
    found = gradients(ours, lambda: ours(x, t, text), x, text)
    expected = gradients(theirs, lambda: predicted_by_diffusers(theirs, x, t, text, True), x, text)
    for key, gradient in expected.items():
        atol = 1e-4 * float(gradient.abs().max())
        assert_close(found[key], gradient, rtol=0, atol=atol, msg=key)


def gradients(
    net: nn.Module, predict: Callable[[], Tensor], x: Tensor, text: TextEmbedding
) -> dict[str, Tensor]:
    """Of the mean square of the prediction, for every parameter and every input."""
    of = {"x": x, "tokens": text.tokens, **({} if text.pooled is None else {"pooled": text.pooled})}
    for given in of.values():
        given.requires_grad_()
    of |= dict(net.named_parameters())
    return dict(zip(of, torch.autograd.grad(predict().square().mean(), of.values()), strict=True))


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_checkpointing_changes_no_gradient(name: str) -> None:
    model, _ = twins(CONFIGS[name], torch.float64)
    x, t, text = inputs(CONFIGS[name], masked=True, dtype=torch.float64)
    gradients = []
    for model.gradient_checkpointing in (False, True):
        model.zero_grad()
        model(x, t, text).square().mean().backward()
        gradients.append({key: p.grad.clone() for key, p in model.named_parameters()})
    assert_close(gradients[0], gradients[1], rtol=0, atol=0)


def test_checkpointing_keeps_fewer_activations() -> None:
    model = UNet(SMALL_SD1)
    x, t, text = inputs(SMALL_SD1, masked=False)

    def kept() -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda saved: sizes.append(saved.numel()) or saved, lambda saved: saved
        ):
            model(x, t, text)
        return sum(sizes)

    everything = kept()
    model.gradient_checkpointing = True
    assert kept() < 0.5 * everything


@pytest.mark.parametrize(
    ("published", "parameters"),
    [
        (STABLE_DIFFUSION_1, 859_520_964),
        (STABLE_DIFFUSION_1 | {"in_channels": 9}, 859_535_364),
        (STABLE_DIFFUSION_2, 865_910_724),
        (STABLE_DIFFUSION_XL, 2_567_463_684),
        (STABLE_DIFFUSION_XL_REFINER, None),
    ],
    ids=["1.5", "1.5 inpainting", "2.1", "xl", "xl refiner"],
)
def test_published_configs_give_the_published_keys_and_shapes(
    published: dict, parameters: int | None
) -> None:
    with torch.device("meta"):
        ours = UNet(UNetConfig.from_diffusers(published)).state_dict()
        theirs = diffusers.UNet2DConditionModel.from_config(published).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    if parameters is not None:
        assert sum(v.numel() for v in ours.values()) == parameters


@pytest.mark.parametrize("name", CONFIGS)
def test_configuration_survives_the_round_trip_through_diffusers(name: str) -> None:
    written = json.loads(json.dumps(CONFIGS[name].to_diffusers()))
    with torch.device("meta"):
        saved_by_diffusers = dict(diffusers.UNet2DConditionModel.from_config(written).config)
    assert UNetConfig.from_diffusers(written) == CONFIGS[name]
    assert UNetConfig.from_diffusers(saved_by_diffusers) == CONFIGS[name]


def test_absent_keys_mean_what_diffusers_means() -> None:
    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel.from_config({}).config
    ours = dataclasses.asdict(UNetConfig.from_diffusers({}))
    assert ours == {k: tuple(theirs[k]) if isinstance(theirs[k], list) else theirs[k] for k in ours}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"addition_embed_type": "text_image"}, "addition_embed_type is 'text_image'"),
        ({"class_embed_type": "timestep"}, "class_embed_type"),
        ({"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift"),
        ({"down_block_types": ["AttnDownBlock2D"] * 4}, "AttnDownBlock2D"),
        ({"something_new": 1}, "something_new"),
        ({"_class_name": "UNet2DModel"}, "UNet2DModel"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(change: dict, words: str) -> None:
    with pytest.raises(LdmError, match=words):
        UNetConfig.from_diffusers(STABLE_DIFFUSION_1 | change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"attention_head_dim": 6}, "6 heads do not divide the width 16"),
        ({"attention_head_dim": (2, 2)}, "attention_head_dim has 2 entries for 3 levels"),
        ({"norm_num_groups": 32}, "32 does not divide the width 16"),
        ({"up_block_types": ("UpBlock2D",)}, "up_block_types has 1 entries"),
        ({"block_out_channels": ()}, "block_out_channels"),
        ({"layers_per_block": 0}, "layers_per_block is 0"),
        ({"transformer_layers_per_block": 0}, "transformer_layers_per_block"),
        ({"addition_embed_type": "text_time"}, "addition_time_embed_dim is None"),
        (
            {"addition_embed_type": "text_time", "addition_time_embed_dim": 256},
            r"projection_class_embeddings_input_dim is None\n.*the pooled text vector \+ 6 \* 256",
        ),
    ],
)
def test_an_impossible_configuration_is_refused_with_its_field(change: dict, words: str) -> None:
    with pytest.raises(LdmError, match=words):
        dataclasses.replace(SMALL_SD1, **change)


def test_a_text_encoder_of_another_width_is_refused() -> None:
    x, t, text = inputs(dataclasses.replace(SMALL_SD1, cross_attention_dim=32), masked=False)
    with pytest.raises(LdmError, match="width 32, this UNet reads width 24"):
        UNet(SMALL_SD1)(x, t, text)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sizes": None}, "reads sizes with each text, and none came"),
        ({"pooled": None}, "reads a pooled vector with each text, and none came"),
        (
            {"pooled": torch.zeros(2, 12)},
            "width 12 and 6 sizes make 60 features, this UNet reads 58",
        ),
    ],
)
def test_an_sdxl_layout_says_what_it_misses(change: dict, words: str) -> None:
    x, t, text = inputs(CONFIGS["sdxl"], masked=False)
    with pytest.raises(LdmError, match=words):
        UNet(CONFIGS["sdxl"])(x, t, dataclasses.replace(text, **change))


@pytest.mark.parametrize("part", ["pooled", "sizes"])
def test_each_part_that_sdxl_adds_moves_the_prediction(part: str) -> None:
    model, _ = twins(CONFIGS["sdxl"], torch.float32)
    x, t, text = inputs(CONFIGS["sdxl"], masked=False)
    other = dataclasses.replace(text, **{part: getattr(text, part).flip(0)})
    with torch.no_grad():
        assert (model(x, t, other) - model(x, t, text)).abs().max() > 1e-3


def test_padding_of_the_caption_does_not_change_the_prediction() -> None:
    model, _ = twins(SMALL_SD1, torch.float32)
    x, t, text = inputs(SMALL_SD1, masked=True)
    longer = TextEmbedding(
        torch.cat([text.tokens, 100 * torch.randn(2, 50, 24)], dim=1),
        torch.cat([text.mask, torch.zeros(2, 50, dtype=torch.bool)], dim=1),
    )
    with torch.no_grad():
        assert_close(model(x, t, longer), model(x, t, text), atol=1e-5, rtol=1e-5)


def test_a_new_model_predicts_zero_and_learns_from_the_first_step() -> None:
    model = UNet(SMALL_SD1)
    x, t, text = inputs(SMALL_SD1, masked=False)
    prediction = model(x, t, text)
    assert prediction.abs().max() == 0
    (prediction - x).square().mean().backward()
    assert model.conv_out.weight.grad.abs().max() > 0


def test_it_is_a_denoiser() -> None:
    assert isinstance(UNet(SMALL_SD1), Denoiser)


def test_memory_layout_does_not_change_the_prediction() -> None:
    model, _ = twins(SMALL_SD1, torch.float32)
    x, t, text = inputs(SMALL_SD1, masked=True)
    with torch.no_grad():
        expected = model(x, t, text)
        model.to(memory_format=torch.channels_last)
        predicted = model(x.contiguous(memory_format=torch.channels_last), t, text)
    assert predicted.is_contiguous(memory_format=torch.channels_last)
    assert_close(predicted, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 0.05), (torch.float16, 0.005)])
@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_it_runs_in_half_precision(name: str, dtype: torch.dtype, error: float) -> None:
    # a few units in the last place (2^-9 and 2^-12 of the largest) after some thirty layers
    model, _ = twins(CONFIGS[name], torch.float32)
    x, t, text = inputs(CONFIGS[name], masked=True)
    with torch.no_grad():
        expected = model(x, t, text)
        predicted = model.to(dtype)(x.to(dtype), t, text.to("cpu", dtype))
    assert predicted.dtype == dtype
    assert_close(predicted.float(), expected, rtol=0, atol=error * float(expected.abs().max()))


def test_time_embedding_equals_the_one_stable_diffusion_was_trained_with() -> None:
    t = torch.tensor([0.0, 0.5, 1.0, 998.0, 999.0])
    expected = get_timestep_embedding(t, 64, flip_sin_to_cos=True, downscale_freq_shift=0)
    assert_close(timestep_embedding(t, 64), expected, atol=1e-6, rtol=0)


def test_time_embedding_tells_neighbouring_steps_apart_under_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        near = timestep_embedding(torch.tensor([998, 999]), 64)
    assert near.dtype == torch.float32
    assert (near[0] - near[1]).abs().max() > 0.5
