"""The MM-DiT computes what diffusers' SD3Transformer2DModel computes, for SD 3 and 3.5 layouts."""

from __future__ import annotations

import dataclasses
import json

import diffusers
import pytest
import torch
from recipes import tiny
from torch import Tensor, nn
from torch.testing import assert_close

import ldm.models.mmdit
from ldm.build import load_denoiser
from ldm.checkpoint import find_checkpoint
from ldm.errors import LdmError
from ldm.models.mmdit import MMDiT, MMDiTConfig
from ldm.models.mmdit_config import WITHOUT_POOLED
from ldm.training.diffusion import train_diffusion
from ldm.types import Denoiser, Prepares, TextEmbedding

SD3_MEDIUM = MMDiTConfig(
    sample_size=8,
    patch_size=2,
    in_channels=4,
    out_channels=4,
    num_layers=3,
    attention_head_dim=8,
    num_attention_heads=3,
    joint_attention_dim=20,
    caption_projection_dim=24,
    pooled_projection_dim=12,
    pos_embed_max_size=12,
)
LAYOUTS = {
    "sd3 medium": SD3_MEDIUM,
    "sd3.5 large": dataclasses.replace(SD3_MEDIUM, qk_norm="rms_norm", out_channels=5),
    "sd3.5 medium": dataclasses.replace(
        SD3_MEDIUM, qk_norm="rms_norm", dual_attention_layers=(0, 1), pos_embed_max_size=15
    ),
}


def twins(config: MMDiTConfig, dtype: torch.dtype = torch.float32) -> tuple[MMDiT, nn.Module]:
    """Ours and diffusers' model with equal weights, none of them at its initial value."""
    torch.manual_seed(0)
    ours = MMDiT(config)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    written = json.loads(json.dumps(config.to_diffusers()))
    theirs = diffusers.SD3Transformer2DModel.from_config(written)
    theirs.load_state_dict(ours.state_dict())
    return ours.to(dtype), theirs.to(dtype)


def inputs(
    config: MMDiTConfig,
    size: tuple[int, int] = (8, 8),
    dtype: torch.dtype = torch.float32,
    real: int = 7,
) -> tuple[Tensor, Tensor, TextEmbedding]:
    """Two noisy latents, clocks and captions of seven tokens; of the second, `real` are real."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, config.in_channels, *size, generator=generator).to(dtype)
    tokens = torch.randn(2, 7, config.joint_attention_dim, generator=generator).to(dtype)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, real:] = False
    pooled = None
    if config.pooled_projection_dim is not None:
        pooled = torch.randn(2, config.pooled_projection_dim, generator=generator).to(dtype)
    return x, torch.tensor([3.0, 980.5]), TextEmbedding(tokens, mask, pooled)


@pytest.mark.parametrize("size", [(8, 8), (12, 20), (2, 24)], ids=["base", "other", "extreme"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_prediction_equals_diffusers_to_1e_5(name: str, size: tuple[int, int]) -> None:
    ours, theirs = twins(LAYOUTS[name])
    x, t, text = inputs(LAYOUTS[name], size)
    with torch.no_grad():
        expected = theirs(x, text.tokens, text.pooled, t).sample
        predicted = ours(x, t, text)
    assert expected.std() > 0.1  # a comparison of zeros would prove nothing
    assert_close(predicted, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_table_of_positions_is_the_released_one(name: str) -> None:
    # `twins` copies it with the weights, so the other tests could not see a wrong one
    ours = MMDiT(LAYOUTS[name])
    theirs = diffusers.SD3Transformer2DModel.from_config(LAYOUTS[name].to_diffusers())
    assert_close(ours.pos_embed.pos_embed, theirs.pos_embed.pos_embed, rtol=0, atol=0)


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_of_weights_and_input_equal_diffusers(name: str) -> None:
    # float64: the claim is that the formula is the same, at any tolerance rounding allows. Time's
    # sinusoids stay float32 in both.
    ours, theirs = twins(LAYOUTS[name], torch.float64)
    x, t, text = inputs(LAYOUTS[name], (12, 8), torch.float64)
    here, there = x.clone().requires_grad_(), x.clone().requires_grad_()
    ours(here, t, text).square().mean().backward()
    # diffusers casts its sinusoids as the pooled text is
    theirs(there, text.tokens, text.pooled, t).sample.square().mean().backward()
    assert_close(here.grad, there.grad, rtol=1e-4, atol=1e-10)
    expected = dict(theirs.named_parameters())
    assert dict(ours.named_parameters()).keys() == expected.keys()
    for key, parameter in ours.named_parameters():
        assert_close(parameter.grad, expected[key].grad, rtol=1e-4, atol=1e-10, msg=key)


def test_float32_gradients_equal_diffusers_to_1e_4_of_their_size() -> None:
    ours, theirs = twins(LAYOUTS["sd3.5 medium"])
    x, t, text = inputs(LAYOUTS["sd3.5 medium"])
    ours(x, t, text).square().mean().backward()
    theirs(x, text.tokens, text.pooled, t).sample.square().mean().backward()
    expected = dict(theirs.named_parameters())
    for key, parameter in ours.named_parameters():
        difference = (parameter.grad - expected[key].grad).norm()
        assert difference <= 1e-4 * expected[key].grad.norm() + 1e-9, key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LAYOUTS)
def test_half_precision_stays_as_close_to_float32_as_diffusers_does(
    name: str, dtype: torch.dtype
) -> None:
    ours, theirs = twins(LAYOUTS[name])
    x, t, text = inputs(LAYOUTS[name])
    with torch.no_grad():
        exact = ours(x, t, text)
        ours, theirs, x, text = ours.to(dtype), theirs.to(dtype), x.to(dtype), text.to("cpu", dtype)
        here = (ours(x, t, text).float() - exact).norm() / exact.norm()
        there = (theirs(x, text.tokens, text.pooled, t).sample.float() - exact).norm()
    # both round in every layer, in other places: a third more leaves room for chance
    assert here <= 1.33 * there / exact.norm()
    assert here < (0.05 if dtype == torch.bfloat16 else 0.006)


@pytest.mark.parametrize("name", LAYOUTS)
def test_autocast_gives_finite_gradients_close_to_float32(name: str) -> None:
    model, _ = twins(LAYOUTS[name])
    x, t, text = inputs(LAYOUTS[name], real=3)
    exact = model(x, t, text)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        near = model(x, t, text)
    near.float().square().mean().backward()
    assert (near - exact).norm() < 0.05 * exact.norm()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_length_of_padding_changes_nothing(name: str) -> None:
    model, _ = twins(LAYOUTS[name])
    x, t, text = inputs(LAYOUTS[name], real=4)
    longer = TextEmbedding(
        torch.cat([text.tokens, 100 * torch.randn(2, 50, 20)], dim=1),
        torch.cat([text.mask, torch.zeros(2, 50, dtype=torch.bool)], dim=1),
        text.pooled,
    )
    cut = TextEmbedding(text.tokens[1:, :4], text.mask[1:, :4], text.pooled[1:])
    with torch.no_grad():
        expected = model(x, t, text)
        assert_close(model(x, t, longer), expected, atol=1e-5, rtol=1e-5)
        assert_close(model(x[1:], t[1:], cut), expected[1:], atol=1e-5, rtol=1e-5)
        seen = TextEmbedding(text.tokens, torch.ones_like(text.mask), text.pooled)
        assert (model(x, t, seen) - expected)[1].abs().max() > 1e-3  # the mask does something


def test_a_caption_without_any_real_token_is_drawn_from_the_pooled_text_alone() -> None:
    model, _ = twins(LAYOUTS["sd3.5 medium"])
    x, t, text = inputs(LAYOUTS["sd3.5 medium"], real=0)
    other = dataclasses.replace(text, tokens=text.tokens + torch.tensor([0.0, 9.0])[:, None, None])
    with torch.no_grad():
        assert_close(model(x, t, other)[1], model(x, t, text)[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("real", [7, 4], ids=["all real", "padded"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_prepared_calls_equal_plain_calls(name: str, real: int) -> None:
    model, _ = twins(LAYOUTS[name])
    x, _, text = inputs(LAYOUTS[name], real=real)
    with torch.no_grad():
        at = model.prepare(text, [900.0, 500.0, 3.5])
        for clock in (900.0, 500.0, 250.0, 3.5, 900.0):  # 250 was not announced
            plain = model(x, torch.full((2,), clock), text)
            assert_close(model(x, torch.full((2,), clock), at(clock)), plain, atol=1e-5, rtol=1e-5)


def test_a_prepared_call_computes_neither_modulations_nor_text_again() -> None:
    model, _ = twins(SD3_MEDIUM)
    x, t, text = inputs(SD3_MEDIUM)
    ready = model.prepare(text, [500.0])(500.0)
    called = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.append(name))
    model(x, t, ready)
    assert "transformer_blocks.2.attn.to_q" in called
    once = [name for name in called if "norm" in name or "embedder" in name]
    assert once == []


def test_modulations_for_many_clocks_stay_under_a_bound_of_memory(monkeypatch) -> None:
    model, _ = twins(SD3_MEDIUM)
    x, _, text = inputs(SD3_MEDIUM)
    per_clock = 2 * 4 * sum(24 * len(layer.parts) for layer in model._layers)
    monkeypatch.setattr(ldm.models.mmdit, "KEPT_BYTES", 2 * per_clock)
    batches = []
    model.time_text_embed.timestep_embedder.register_forward_hook(
        lambda _, told, __: batches.append(len(told[0]))
    )
    at = model.prepare(text, [900.0, 700.0, 500.0, 300.0, 100.0])
    for clock in (900.0, 700.0, 500.0, 300.0, 100.0):
        at(clock)
    assert batches == [2, 2, 1]
    with torch.no_grad():
        plain = model(x, torch.full((2,), 700.0), text)
        assert_close(model(x, torch.full((2,), 700.0), at(700.0)), plain, atol=1e-5, rtol=1e-5)


def test_checkpointing_changes_no_gradient_and_keeps_fewer_activations() -> None:
    config = LAYOUTS["sd3.5 medium"]
    model, _ = twins(config, torch.float64)
    x, t, text = inputs(config, dtype=torch.float64, real=4)
    gradients, kept = [], []
    for model.gradient_checkpointing in (False, True):
        model.zero_grad()
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda saved, sizes=sizes: sizes.append(saved.numel()) or saved, lambda saved: saved
        ):
            loss = model(x, t, text).square().mean()
        loss.backward()
        kept.append(sum(sizes))
        gradients.append({key: p.grad.clone() for key, p in model.named_parameters()})
    assert_close(gradients[0], gradients[1], rtol=0, atol=0)
    assert kept[1] < 0.5 * kept[0]


@pytest.mark.parametrize("real", [7, 4], ids=["all real", "padded"])
def test_it_compiles_to_one_graph(real: int) -> None:
    config = dataclasses.replace(LAYOUTS["sd3.5 medium"], num_layers=2)
    model, _ = twins(config)
    x, t, text = inputs(config, real=real)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    model.zero_grad()
    loss = compiled(x, t, text).square().mean()
    loss.backward()
    gradient = model.proj_out.weight.grad.clone()
    model.zero_grad()
    plain = model(x, t, text).square().mean()
    plain.backward()
    assert_close(loss, plain, rtol=1e-5, atol=0)
    assert_close(gradient, model.proj_out.weight.grad, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        ready = model.prepare(text, [500.0])(500.0)
        assert_close(compiled(x, t, ready), model(x, t, ready), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", LAYOUTS)
def test_configuration_survives_the_round_trip_through_diffusers(name: str) -> None:
    written = json.loads(json.dumps(LAYOUTS[name].to_diffusers()))
    with torch.device("meta"):
        saved_by_diffusers = dict(diffusers.SD3Transformer2DModel.from_config(written).config)
    assert MMDiTConfig.from_diffusers(written) == LAYOUTS[name]
    assert MMDiTConfig.from_diffusers(saved_by_diffusers) == LAYOUTS[name]


def test_absent_keys_mean_what_diffusers_means() -> None:
    with torch.device("meta"):
        theirs = diffusers.SD3Transformer2DModel.from_config({}).config
    ours = dataclasses.asdict(MMDiTConfig.from_diffusers({}))
    assert ours == {k: tuple(theirs[k]) if isinstance(theirs[k], list) else theirs[k] for k in ours}
    assert MMDiTConfig.from_diffusers({"out_channels": None, "in_channels": 4}).out_channels == 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"qk_norm": "layer_norm"}, "qk_norm 'layer_norm' is not known"),
        ({"something_new": 1}, "something_new=1"),
        ({"_class_name": "FluxTransformer2DModel"}, "FluxTransformer2DModel"),
        ({"caption_projection_dim": 32}, "32 is not the width 24"),
        ({"dual_attention_layers": [1, 3]}, "names block 3 of 3"),
        ({"attention_head_dim": 3, "caption_projection_dim": 9}, "multiple of 4"),
        ({"num_layers": 0}, "num_layers is 0"),
    ],
)
def test_what_cannot_be_built_is_refused_by_name(change: dict, words: str) -> None:
    with pytest.raises(LdmError, match=words):
        MMDiTConfig.from_diffusers(SD3_MEDIUM.to_diffusers() | change)


@pytest.mark.parametrize(
    ("size", "tokens", "pooled", "words"),
    [
        ((9, 8), 20, 12, "a latent of 9x8 cannot be cut into patches of 2"),
        ((8, 26), 20, 12, "at most 24"),
        ((8, 8), 16, 12, "tokens of width 16 and pooled text of width 12, this MM-DiT reads 20"),
        ((8, 8), 20, None, "pooled text of width None, this MM-DiT reads 20 and 12"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(
    size: tuple[int, int], tokens: int, pooled: int | None, words: str
) -> None:
    text = TextEmbedding(
        torch.zeros(1, 3, tokens),
        torch.ones(1, 3, dtype=torch.bool),
        None if pooled is None else torch.zeros(1, pooled),
    )
    with pytest.raises(LdmError, match=words):
        MMDiT(SD3_MEDIUM)(torch.zeros(1, 4, *size), torch.zeros(1), text)


def test_a_new_model_predicts_zero_and_learns_from_the_first_step() -> None:
    model = MMDiT(LAYOUTS["sd3.5 medium"])
    x, t, text = inputs(LAYOUTS["sd3.5 medium"])
    prediction = model(x, t, text)
    assert prediction.abs().max() == 0
    (prediction - x).square().mean().backward()
    assert model.proj_out.weight.grad.abs().max() > 0


def test_without_pooled_text_it_has_no_weights_for_it_and_rebuilds_from_its_own_file() -> None:
    config = dataclasses.replace(SD3_MEDIUM, pooled_projection_dim=None)
    model = MMDiT(config)
    assert not [name for name, _ in model.named_parameters() if "time_text_embed.text" in name]
    x, t, text = inputs(config)
    assert model(x, t, text).shape == x.shape
    with torch.no_grad():
        model.proj_out.weight.normal_()
        assert_close(model(x, t, model.prepare(text)(3.0))[:1], model(x, t, text)[:1])
    written = json.loads(json.dumps(config.to_diffusers()))
    assert written["_class_name"] == WITHOUT_POOLED  # diffusers must not take it for its own
    assert MMDiTConfig.from_diffusers(written) == config


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.dual_attention_layers=[0,2]", "no block 2 among model.num_layers=2"),
        ("model.hidden_size=72", "72 is not a multiple of model.head_dim=32"),
        ("model.pos_embed_max_size=4", "do not hold the 8 tokens"),
        ("model.qk_norm=layer_norm", "model.qk_norm"),
    ],
)
def test_an_experiment_that_cannot_be_built_is_refused_when_it_is_read(
    override: str, words: str, tmp_path
) -> None:
    with pytest.raises(LdmError, match=words):
        tiny("mmdit", tmp_path / "run", override)


def test_it_is_a_denoiser_that_prepares() -> None:
    assert isinstance(MMDiT(SD3_MEDIUM), Denoiser)
    assert isinstance(MMDiT(SD3_MEDIUM), Prepares)


def test_a_run_learns_and_its_checkpoint_opens_in_diffusers(tmp_path) -> None:
    config = tiny(
        *("mmdit", tmp_path / "run", "train.steps=40", "run.save_every_steps=40"),
        *("train.batch_size=16", "data.count=48", "model.num_layers=3", "optim.warmup_steps=4"),
        "optim.learning_rate=3e-3",
    )
    checkpoint = find_checkpoint(train_diffusion(config))
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [row["loss"] for row in map(json.loads, rows) if "loss" in row]
    first, last = sum(losses[:5]) / 5, sum(losses[-5:]) / 5
    assert last < 0.85 * first, losses
    ours, folder = load_denoiser(checkpoint)
    assert folder == "transformer"
    theirs = diffusers.SD3Transformer2DModel.from_pretrained(checkpoint, subfolder="transformer")
    x = torch.randn(2, 4, 8, 8)
    text = TextEmbedding(
        torch.randn(2, 5, 64), torch.ones(2, 5, dtype=torch.bool), torch.randn(2, 64)
    )
    t = torch.tensor([20.0, 800.0])
    with torch.no_grad():
        expected = theirs(x, text.tokens, text.pooled, t).sample
        assert_close(ours(x, t, text), expected, atol=1e-5, rtol=1e-5)
