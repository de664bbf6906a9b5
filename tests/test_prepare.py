"""What depends on text and time alone is computed once per sampling run, and nothing else changes.

`plain` is the same network without `prepare`: every call of it computes everything.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from ldm.diffusion.core import Diffusion, at_clock, prepared
from ldm.diffusion.guidance import (
    Model,
    adaptive_projected,
    autoguidance,
    classifier_free,
    classifier_gradient,
    perpendicular_negative,
)
from ldm.diffusion.prediction import PREDICTIONS
from ldm.diffusion.process import PROCESSES
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.schedule import levels
from ldm.inference.network import Network
from ldm.models.layers import ResnetBlock
from ldm.models.prepared import ByClock, without_padding
from ldm.models.unet import UNet, UNetConfig
from ldm.types import Denoise, Denoiser, Level, TextEmbedding

SD = UNetConfig(
    block_out_channels=(8, 16),
    layers_per_block=1,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=12,
    attention_head_dim=2,
    norm_num_groups=4,
)
SDXL = dataclasses.replace(
    SD,
    transformer_layers_per_block=2,
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=4,
    projection_class_embeddings_input_dim=6 + 6 * 4,
)
SD_PROCESS = Diffusion(PROCESSES["sd"], PREDICTIONS["eps"])
LEVEL = SD_PROCESS.process.level(0.6)


def unet(config: UNetConfig = SD, seed: int = 0) -> UNet:
    """A UNet with no parameter at its initial value, in float64: rounding cannot hide a fault."""
    torch.manual_seed(seed)
    net = UNet(config).double().requires_grad_(False)
    for parameter in net.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return net


def plain(net: Denoiser) -> Denoiser:
    return lambda x, t, text: net(x, t, text)


def texts(count: int, seed: int = 0, length: int = 6, real: int = 4) -> TextEmbedding:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(count, length, 12, generator=generator, dtype=torch.float64)
    mask = torch.arange(length) < torch.tensor([[real]] * (count - 1) + [[real - 1]])
    pooled = torch.randn(count, 6, generator=generator, dtype=torch.float64)
    sizes = torch.tensor([[512.0, 640, 0, 16 * seed, 512, 512]]).expand(count, -1)
    return TextEmbedding(tokens, mask, pooled, sizes)


def latents(rows: int = 2, channels: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(rows, channels, 6, 4, generator=generator, dtype=torch.float64)


def model_of(net: Denoiser, steps: Sequence[Level] = (), **changes: object) -> Model:
    given = Model(SD_PROCESS, net, texts(2, 1), texts(1, 2, length=3, real=2), levels=steps)
    return dataclasses.replace(given, **changes)  # type: ignore[arg-type]


def calls(net: nn.Module, kind: type[nn.Module], part: str) -> list[int]:
    """Rows of each call of a part of all modules of a kind, from now on."""
    seen: list[int] = []
    for module in net.modules():
        if isinstance(module, kind) and getattr(module, part) is not None:
            getattr(module, part).register_forward_hook(
                lambda part, given, made: seen.append(len(given[0]))
            )
    return seen


@pytest.mark.parametrize("config", [SD, SDXL], ids=["sd", "sdxl"])
def test_a_run_of_20_steps_computes_keys_and_times_once(config: UNetConfig) -> None:
    net = unet(config)
    crossing = [
        block.attn2
        for module in net.modules()
        for block in getattr(module, "transformer_blocks", ())
    ]
    keys, values = ([] for _ in range(2))
    for attention in crossing:
        attention.to_k.register_forward_hook(lambda *call: keys.append(len(call[2])))
        attention.to_v.register_forward_hook(lambda *call: values.append(len(call[2])))
    shifts, times = calls(net, ResnetBlock, "time_emb_proj"), calls(net, UNet, "time_embedding")
    plan = levels(SD_PROCESS.process, 20)
    denoise = classifier_free(model_of(net, plan), 4.0)
    with torch.inference_mode():
        SAMPLERS["ddim"].run(denoise, latents(), plan)
    assert keys == values == [4] * len(crossing), "both texts of both pictures, once"
    blocks = sum(isinstance(module, ResnetBlock) for module in net.modules())
    assert shifts == [len(plan)] * blocks, "all levels in one batch"
    assert times == [len(plan)]


def learned(net: Denoiser, x: Tensor, level: Level, text: TextEmbedding) -> Tensor:
    diffusion = dataclasses.replace(SD_PROCESS, learned_variance=True)
    return diffusion.denoise_with_variance(net, x, level, text)


def shifted(net: Denoiser, x: Tensor, level: Level, text: TextEmbedding) -> Tensor:
    """An answer that also asks about a level that is not the one of the step."""
    other = SD_PROCESS.process.level(0.5 * level.t)
    return SD_PROCESS.denoise(net, x, level, text) - 0.2 * SD_PROCESS.denoise(net, x, other, text)


def direct(net: Denoiser, x: Tensor, level: Level, text: TextEmbedding) -> Tensor:
    """An answer that calls the network itself, with a clock of its own."""
    return net(x, torch.full((len(x),), 321.0, dtype=x.dtype), text)


def log_prob(x: Tensor, level: Level) -> Tensor:
    return (x.flatten(1).tanh() * level.alpha).sum(1)


RULES: dict[str, Callable[[Model, Denoiser], Denoise]] = {
    "classifier_free": lambda model, weak: classifier_free(model, 3.0),
    "off": lambda model, weak: classifier_free(model, 1.0),
    "uncond": lambda model, weak: classifier_free(model, 0.0),
    "perp_neg": lambda model, weak: perpendicular_negative(model, 3.0, negative=texts(1, 9)),
    "apg": lambda model, weak: adaptive_projected(model, 3.0, norm=1.0),
    "autoguidance": lambda model, weak: autoguidance(
        model,
        3.0,
        weak=model_of(weak, diffusion=Diffusion(PROCESSES["rectified_flow"], PREDICTIONS["flow"])),
    ),
    "classifier": lambda model, weak: classifier_gradient(model, 3.0, log_prob=log_prob),
    "another level": lambda model, weak: classifier_free(
        dataclasses.replace(model, ask=shifted), 3.0
    ),
    "another clock": lambda model, weak: classifier_free(
        dataclasses.replace(model, ask=direct), 3.0
    ),
}


def drawn(sampler: str, denoise: Denoise, steps: Sequence[Level], rows: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    draws = [torch.randn(rows, 4, 6, 4, generator=generator, dtype=torch.float64) for _ in steps]
    with torch.inference_mode():
        return SAMPLERS[sampler].run(
            denoise, latents(rows), steps, noise=lambda draw: draws[draw % len(draws)]
        )


@pytest.mark.parametrize("config", [SD, SDXL], ids=["sd", "sdxl"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_every_rule_draws_what_the_plain_call_draws(
    config: UNetConfig, rule: Callable[[Model, Denoiser], Denoise]
) -> None:
    net, weak, plan = unet(config), unet(config, seed=1), levels(SD_PROCESS.process, 4)
    expected = drawn("dpmpp_2m", rule(model_of(plain(net)), plain(weak)), plan)
    assert expected.std() > 0.01
    for announced in (plan, ()):
        found = drawn("dpmpp_2m", rule(model_of(net, announced), weak), plan)
        assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sampler", ["ddpm", "dpmpp_2s", "adaptive"])
def test_levels_between_the_announced_ones_are_computed_when_they_come(sampler: str) -> None:
    net, plan = unet(), levels(SD_PROCESS.process, 4)
    rows = 1 if SAMPLERS[sampler].adaptive else 2
    found, expected = (
        drawn(
            sampler,
            classifier_free(model_of(one, plan, text=texts(2, 1)[:rows]), 3.0),
            plan,
            rows,
        )
        for one in (net, plain(net))
    )
    assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_a_learned_variance_is_the_same() -> None:
    net = unet(dataclasses.replace(SD, out_channels=8))
    plan = levels(SD_PROCESS.process, 4)
    found, expected = (
        drawn("ddpm_learned", classifier_free(model_of(one, plan, ask=learned), 3.0), plan)
        for one in (net, plain(net))
    )
    assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("config", [SD, SDXL], ids=["sd", "sdxl"])
def test_a_prepared_call_in_single_precision_differs_by_rounding_alone(config: UNetConfig) -> None:
    net, text = unet(config).float(), texts(3).to("cpu", torch.float32)
    x, t = latents(3).float(), torch.full((3,), 731.5)
    with torch.no_grad():
        expected = net(x, t, text)
        found = net(x, t, net.prepare(text, [3.0, 731.5, 999.0])(731.5))
    # the products of time have other numbers of rows, so their sums may be in another order
    assert_close(found, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


def test_weights_in_bf16_are_prepared_in_bf16() -> None:
    net = Network(unet(SDXL).bfloat16())
    x, plan = latents().float(), levels(SD_PROCESS.process, 4)
    with torch.inference_mode():
        found = classifier_free(model_of(net, plan), 3.0)(x, plan[1])
        expected = classifier_free(model_of(plain(net), plan), 3.0)(x, plan[1])
    assert found.dtype == torch.float32
    assert_close(found, expected, rtol=0, atol=0.02 * float(expected.abs().max()))


def test_sizes_are_not_rounded_with_the_weights() -> None:
    text = dataclasses.replace(texts(1), sizes=torch.tensor([[1023.0, 515, 3, 0, 1024, 1024]]))
    moved = text.to("cpu", torch.bfloat16)
    assert moved.tokens.dtype == moved.pooled.dtype == torch.bfloat16
    assert torch.equal(moved.sizes, text.sizes)  # bf16 cannot tell 1023 from 1024


def test_what_a_wrapped_network_cannot_prepare_is_asked_as_before() -> None:
    class Echo(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones((), dtype=torch.bfloat16))

        def forward(self, x: Tensor, t: Tensor, text: TextEmbedding) -> Tensor:
            assert text.tokens.dtype == x.dtype == torch.bfloat16
            return self.scale * x + text.tokens.sum((1, 2))[:, None, None, None]

    with torch.inference_mode():
        found = classifier_free(model_of(Network(Echo())), 3.0)(latents().float(), LEVEL)
    assert torch.isfinite(found).all()


def test_each_run_reads_the_weights_and_the_text_it_was_given() -> None:
    net = unet()
    with torch.inference_mode():
        before = classifier_free(model_of(net), 3.0)(latents(), LEVEL)
    net.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_v.weight.mul_(2)
    net.time_embedding.linear_1.weight.mul_(2)
    for changes in ({}, {"text": texts(2, 30)}, {"null": texts(1, 31)}):
        with torch.inference_mode():
            found = classifier_free(model_of(net, **changes), 3.0)(latents(), LEVEL)
            expected = classifier_free(model_of(plain(net), **changes), 3.0)(latents(), LEVEL)
        assert_close(found, expected, rtol=1e-9, atol=1e-9)
        assert (found - before).abs().max() > 1e-3


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_guided_call_is_the_same_with_and_without_gradients(
    rule: Callable[[Model, Denoiser], Denoise],
) -> None:
    """With gradients nothing is kept: the rows of the texts go to the network as they are."""
    found = []
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            found.append(rule(model_of(unet()), unet(seed=1))(latents(), LEVEL))
    assert_close(*found, rtol=1e-9, atol=1e-9)


def test_gradients_through_a_guided_call_reach_the_text() -> None:
    net, model = unet(), model_of(unet(), (LEVEL,))
    tokens = model.text.tokens.clone().requires_grad_()
    found = []
    for one in (net, plain(net)):
        text = dataclasses.replace(model.text, tokens=tokens)
        denoise = classifier_free(dataclasses.replace(model, net=one, text=text), 3.0)
        with torch.no_grad():
            denoise(latents(), LEVEL)  # what this call keeps is not what the next one uses
        (gradient,) = torch.autograd.grad(denoise(latents(), LEVEL).square().sum(), tokens)
        found.append(gradient)
    assert found[0].abs().max() > 1e-3
    assert_close(*found, rtol=1e-9, atol=1e-9)


def test_an_embedding_prepared_for_one_clock_is_not_for_another() -> None:
    net, text = unet(), texts(2)
    ready = prepared(net, text, [600.0])
    x = latents()
    by_clock = [
        net(x, torch.full((2,), clock, dtype=x.dtype), at_clock(ready, clock))
        for clock in (600.0, 300.0)
    ]
    for clock, found in zip((600.0, 300.0), by_clock, strict=True):
        expected = net(x, torch.full((2,), clock, dtype=x.dtype), text)
        assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert (by_clock[0] - by_clock[1]).abs().max() > 1e-3


def test_moving_or_cutting_an_embedding_forgets_what_was_kept() -> None:
    ready = prepared(unet(), texts(3), [600.0])
    assert callable(ready.kept)
    assert ready.to("cpu").kept is None
    assert ready[:2].kept is None


def test_tokens_that_no_row_sees_are_left_out() -> None:
    text = texts(3, length=9, real=4)
    short = without_padding(text)
    assert short.tokens.shape[1] == 4
    assert torch.equal(short.tokens, text.tokens[:, :4])
    assert torch.equal(short.mask, text.mask[:, :4])
    unseen = dataclasses.replace(text, mask=torch.zeros_like(text.mask))
    assert without_padding(unseen).tokens.shape[1] == 1
    net, x, t = unet(), latents(3), torch.full((3,), 600.0, dtype=torch.float64)
    assert_close(net(x, t, net.prepare(unseen)(600.0)), net(x, t, unseen), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("at_once", [None, 1, 2, 5])
def test_clocks_are_looked_up_whatever_their_order(at_once: int | None) -> None:
    def squares(t: Tensor) -> tuple[Tensor, Tensor]:
        return t[:, None].square(), -t[:, None]

    by_clock = ByClock(squares, [9.0, 4.0, 2.0, 4.0], torch.device("cpu"), at_once=at_once)
    for clock in (9.0, 4.0, 3.0, 2.0, 9.0, 7.5):
        square, negative = by_clock(clock)
        assert square.tolist() == [clock**2]
        assert negative.tolist() == [-clock]
