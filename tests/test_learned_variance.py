"""A learned variance of reverse steps: its loss, what it learns, and drawing with it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from recipes import tiny
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

from ldm import Pipeline
from ldm.checkpoint.contract import Contract
from ldm.cli import main
from ldm.diffusion.core import Diffusion
from ldm.diffusion.guidance import Model, classifier_free
from ldm.diffusion.loss import (
    VLB_SHARE,
    VLB_STEPS,
    diffusion_loss,
    grid_time,
    variance_loss,
)
from ldm.diffusion.prediction import PREDICTIONS
from ldm.diffusion.process import PROCESSES
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.samplers.stochastic import variance_bounds
from ldm.diffusion.schedule import CLEAN, levels
from ldm.errors import ExitCode, LdmError
from ldm.models.dit import DiT, DiTConfig
from ldm.storage import read_json
from ldm.training.diffusion import train_diffusion
from ldm.types import Level, TextEmbedding
from tests.oracle import Gaussian, points, text_of

EVERY = pytest.mark.parametrize("name", PROCESSES)
STEPS = (2, 3, 57, 500, 999, 1000)
V = torch.tensor([-1.0, -0.3, 0.0, 0.6, 1.0], dtype=torch.float64)[:, None]


def ends_of(name: str, index: int) -> tuple[Level, Level]:
    """The levels of step `index` of the grid, the noisier first."""
    process = PROCESSES[name]
    times = (index / VLB_STEPS * process.t_max, (index - 1) / VLB_STEPS * process.t_max)
    return process.level(times[0]), process.level(times[1])


def reverse(now: Level, nxt: Level, x: Tensor, x0: Tensor) -> tuple[Tensor, float]:
    """Mean and variance of q(x_nxt | x_now, x0), by Bayes' rule."""
    r = now.alpha / nxt.alpha
    noise = now.sigma**2 - r**2 * nxt.sigma**2
    precision = 1 / nxt.sigma**2 + r**2 / noise
    return (nxt.alpha * x0 / nxt.sigma**2 + r * x / noise) / precision, 1 / precision


@EVERY
def test_the_loss_is_the_divergence_of_two_normals_per_dimension(name: str) -> None:
    x, x0, guess = points(5, 7), points(5, 7, seed=1), points(5, 7, seed=2)
    for index in STEPS:
        now, nxt = ends_of(name, index)
        true_mean, variance = reverse(now, nxt, x, x0)
        mean, _ = reverse(now, nxt, x, guess)
        high, low = variance_bounds(now, nxt)
        assert low == pytest.approx(variance, rel=1e-9)
        learned = ((V + 1) / 2 * math.log(high) + (1 - V) / 2 * math.log(low)).exp()
        true = Normal(true_mean, torch.full_like(true_mean, variance).sqrt())
        expected = kl_divergence(true, Normal(mean, learned.sqrt().expand_as(mean))).mean(1)
        t = torch.full((5,), now.t, dtype=torch.float64)
        measured = variance_loss(PROCESSES[name], t, x0, guess, V.expand(5, 7))
        # the bounds themselves are differences of numbers near 1
        assert_close(measured, expected, rtol=1e-7, atol=1e-9)


@EVERY
def test_the_last_step_is_the_density_of_the_data(name: str) -> None:
    """N(x0; x0_hat, .) between the beta of the last step and the beta~ of the one before."""
    x0, guess = points(5, 7), points(5, 7, seed=1)
    now, _ = ends_of(name, 1)
    high, low = variance_bounds(now, CLEAN)[0], variance_bounds(*ends_of(name, 2))[1]
    learned = ((V + 1) / 2 * math.log(high) + (1 - V) / 2 * math.log(low)).exp()
    expected = -Normal(guess, learned.sqrt().expand_as(guess)).log_prob(x0).mean(1)
    t = torch.full((5,), now.t, dtype=torch.float64)
    measured = variance_loss(PROCESSES[name], t, x0, guess, V.expand(5, 7))
    assert_close(measured, expected, rtol=1e-7, atol=1e-9)


def true_variance(data: Gaussian, now: Level, nxt: Level) -> float:
    """Var(x_nxt | x_now) of normal data: two normals with x_now = r x_nxt + noise."""
    r = now.alpha / nxt.alpha
    return data.spread(nxt) ** 2 * (1 - (r * data.spread(nxt) / data.spread(now)) ** 2)


@EVERY
def test_the_loss_is_least_at_the_true_variance(name: str) -> None:
    """On normal data with E[x0 | x_t] as the guess; the expectation is exact, by three nodes."""
    data = Gaussian(mean=0.7, std=0.6)
    nodes = torch.tensor([-(3**0.5), 0.0, 3**0.5], dtype=torch.float64)
    weights = torch.tensor([1 / 6, 2 / 3, 1 / 6], dtype=torch.float64)
    z, eps = (grid.reshape(-1, 1) for grid in torch.meshgrid(nodes, nodes, indexing="ij"))
    share, x0 = (weights[:, None] * weights).flatten(), data.mean + data.std * z
    for index in STEPS:
        now, nxt = ends_of(name, index)
        guess = data.denoise(now.alpha * x0 + now.sigma * eps, now)
        high, low = variance_bounds(now, nxt)
        variance = true_variance(data, now, nxt)
        best = 2 * math.log(variance / low) / math.log(high / low) - 1
        t = torch.full((9,), now.t, dtype=torch.float64)

        span = math.log(high / low)
        slopes = []
        for value in (best - 0.1, best, best + 0.1):
            v = torch.tensor(value, dtype=torch.float64, requires_grad=True)
            losses = variance_loss(PROCESSES[name], t, x0, guess, v.expand(9, 1))
            (slope,) = torch.autograd.grad((share * losses).sum(), v)
            slopes.append(float(slope) / span)  # by log variance; rounding is 1e-10 of 1 / span
        assert slopes[1] == pytest.approx(0, abs=1e-8)
        if span > 1e-3:  # between equal bounds there is nothing to choose
            assert slopes[0] < -0.01 * span
            assert slopes[2] > 0.01 * span


def two_headed(x: Tensor, y_weight: Tensor, v_weight: Tensor) -> Tensor:
    return torch.cat([y_weight * x, v_weight * x], dim=1)


def test_the_bound_teaches_the_variance_and_leaves_the_mean_alone() -> None:
    x0, eps = points(64, 3, 2, 2), points(64, 3, 2, 2, seed=1)
    t = torch.arange(1, 65, dtype=torch.float64) * 15 / VLB_STEPS
    weights = [torch.tensor(0.3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    learned = Diffusion(PROCESSES["vp_cosine_plain"], PREDICTIONS["v"], learned_variance=True)
    plain = replace(learned, learned_variance=False)
    t = grid_time(learned.process, t)
    hybrid = diffusion_loss(
        lambda x, t, text: two_headed(x, *weights), learned, x0, text_of(64), t, eps
    )
    simple = diffusion_loss(lambda x, t, text: weights[0] * x, plain, x0, text_of(64), t, eps)
    of_both = torch.autograd.grad(hybrid.sum(), weights)
    (of_mean,) = torch.autograd.grad(simple.sum(), weights[:1])
    assert_close(of_both[0], of_mean)
    assert abs(float(of_both[1])) > 1e-3

    alpha, sigma = learned.process.coefficients(t)
    x_t = alpha.reshape(-1, 1, 1, 1) * x0 + sigma.reshape(-1, 1, 1, 1) * eps
    guess = learned.x0(x_t, 0.3 * x_t, alpha, sigma)
    bound = variance_loss(learned.process, t, x0, guess, 0.3 * x_t)
    assert VLB_SHARE * VLB_STEPS == 1, "T terms of weight 0.001, of which one is drawn"
    assert_close(hybrid.detach(), simple.detach() + bound)


def test_training_is_on_the_grid_of_the_bound() -> None:
    for name, process in PROCESSES.items():
        grid = torch.arange(1, VLB_STEPS + 1, dtype=torch.float64) / VLB_STEPS * process.t_max
        assert_close(grid_time(process, grid), grid, rtol=0, atol=1e-15)
        u = (torch.arange(10 * VLB_STEPS, dtype=torch.float64) + 0.5) / (10 * VLB_STEPS)
        moved = grid_time(process, u * process.t_max).reshape(-1, 10)
        assert_close(moved, grid[:, None].expand(-1, 10), rtol=0, atol=1e-15)  # all equally often
        if name == "sd":  # published networks are told whole indices
            assert_close(process.told(grid), torch.arange(1000.0).double(), rtol=0, atol=1e-9)
    seen: list[Tensor] = []

    def net(x: Tensor, t: Tensor, text: TextEmbedding) -> Tensor:
        seen.append(t)
        return torch.cat([x, x], 1)

    diffusion = Diffusion(PROCESSES["sd"], PREDICTIONS["v"], learned_variance=True)
    times = torch.tensor([0.0401, 0.7], dtype=torch.float64)
    diffusion_loss(net, diffusion, points(2, 1), text_of(2), times, points(2, 1))
    assert_close(seen[0], torch.tensor([40.0, 699.0]).double())


def gaussian_network(data: Gaussian) -> tuple[Diffusion, object]:
    """A network that predicts x0 of normal data, and the best v for steps of three times equal."""
    process = PROCESSES["vp_sde"]
    grid = levels(process, 4)

    def net(x: Tensor, t: Tensor, text: TextEmbedding) -> Tensor:
        now = process.level(float(t[0]) / 1000)
        step = [level.t for level in grid].index(pytest.approx(now.t))
        nxt, v = grid[step + 1], 0.0
        if nxt.sigma > 0:
            high, low = variance_bounds(now, nxt)
            v = 2 * math.log(true_variance(data, now, nxt) / low) / math.log(high / low) - 1
        x0 = data.denoise(x, now)
        return torch.cat([x0, torch.full_like(x0, v)], dim=1)

    return Diffusion(process, PREDICTIONS["x0"], learned_variance=True), net


def test_four_steps_with_the_true_variance_have_the_exact_spread() -> None:
    """Each step then is the true reverse one; either bound is off by far more than the error."""
    data, count = Gaussian(mean=0.0, std=0.6), 40_000
    diffusion, net = gaussian_network(data)
    grid = levels(diffusion.process, 4)
    spread = {}
    for name in ("ddpm_learned", "ddpm", "ddpm_large"):
        ask = diffusion.denoise_with_variance if name == "ddpm_learned" else diffusion.denoise
        states: list[Tensor] = []
        SAMPLERS[name].run(
            lambda x, level, ask=ask: ask(net, x, level, text_of(len(x))),
            data.spread(grid[0]) * points(count, 1),
            grid,
            noise=lambda step: points(count, 1, seed=1 + step),
            eta=1.0,
            on_step=lambda step, x, states=states: states.append(x),
        )
        spread[name] = float(states[2].std()) / data.spread(grid[3])
    error = 4 / math.sqrt(2 * count)  # four standard errors of a standard deviation
    assert spread["ddpm_learned"] == pytest.approx(1, abs=error)
    assert spread["ddpm"] < 1 - 3 * error
    assert spread["ddpm_large"] > 1 + 3 * error


@pytest.mark.parametrize(("v", "twin"), [(-1.0, "ddpm"), (1.0, "ddpm_large")])
def test_the_ends_of_v_are_the_two_fixed_variances(v: float, twin: str) -> None:
    diffusion = Diffusion(PROCESSES["vp_cosine"], PREDICTIONS["v"], learned_variance=True)

    def net(x: Tensor, t: Tensor, text: TextEmbedding) -> Tensor:
        return torch.cat([0.3 * x, torch.full_like(x, 5 * v)], dim=1)  # beyond the bounds: cut

    def run(name: str, ask: object) -> Tensor:
        return SAMPLERS[name].run(
            lambda x, level: ask(net, x, level, text_of(3)),  # type: ignore[operator]
            points(3, 2),
            levels(diffusion.process, 6),
            noise=lambda step: points(3, 2, seed=step),
            eta=1.0,
        )

    assert_close(run("ddpm_learned", diffusion.denoise_with_variance), run(twin, diffusion.denoise))


def test_ordinary_samplers_see_x0_alone() -> None:
    x, level, text = points(2, 3, 4, 4), PROCESSES["vp_cosine"].level(0.4), text_of(2)
    learned = Diffusion(PROCESSES["vp_cosine"], PREDICTIONS["v"], learned_variance=True)
    plain = replace(learned, learned_variance=False)

    def half(x: Tensor, t: Tensor, text: TextEmbedding) -> Tensor:
        return 0.3 * x

    def whole(x: Tensor, t: Tensor, text: TextEmbedding) -> Tensor:
        return torch.cat([0.3 * x, 0.1 * x], dim=1)

    x0 = learned.denoise(whole, x, level, text)
    assert torch.equal(x0, plain.denoise(half, x, level, text))
    both = learned.denoise_with_variance(whole, x, level, text)
    assert torch.equal(both, torch.cat([x0, (0.1 * x).clamp(-1, 1)], dim=1))


def test_guidance_guides_x0_and_keeps_the_prompts_own_variance() -> None:
    diffusion = Diffusion(PROCESSES["rectified_flow"], PREDICTIONS["x0"], learned_variance=True)

    def net(x: Tensor, t: Tensor, text: TextEmbedding) -> Tensor:
        told = text.tokens[:, :1].expand(-1, x.shape[1], -1)[..., 0]
        return torch.cat([told.expand_as(x), (told / 10).expand_as(x)], dim=1)

    model = Model(diffusion, net, text_of(2, 3.0), text_of(1, 1.0), diffusion.denoise_with_variance)
    x, level = points(2, 2), Level(0.5, 0.5, 0.5)
    guided = classifier_free(model, 4.0)(x, level)
    assert_close(guided, torch.tensor([[9.0, 9.0, 0.3, 0.3]]).double().expand(2, 4))
    assert_close(
        classifier_free(model, 1.0)(x, level),
        torch.tensor([[3.0, 3.0, 0.3, 0.3]]).double().expand(2, 4),
    )


def test_a_dit_may_predict_more_channels_than_it_reads() -> None:
    config = DiTConfig(
        in_channels=4, out_channels=8, hidden_size=32, num_layers=1, head_dim=16, text_dim=8
    )
    assert DiTConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    text = TextEmbedding(torch.zeros(2, 3, 8), torch.ones(2, 3, dtype=torch.bool))
    assert DiT(config)(torch.zeros(2, 4, 8, 8), torch.zeros(2), text).shape == (2, 8, 8, 8)
    values = replace(config, out_channels=None).to_json()
    del values["out_channels"]  # as older versions wrote it
    older = DiTConfig.from_json(values)
    assert DiT(older)(torch.zeros(2, 4, 8, 8), torch.zeros(2), text).shape == (2, 4, 8, 8)
    with pytest.raises(LdmError, match="out_channels must be at least 1"):
        replace(config, out_channels=0)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "run"
    extra = ("diffusion.learned_variance=true", "sample.sampler=ddpm_learned", "train.steps=2")
    train_diffusion(tiny("dit", folder, *extra))
    return folder


def test_a_trained_model_draws_with_its_variance(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    request = ["infer", "--model", str(run), "--prompt", "a red circle", "--out", str(out)]
    assert main([*request, "--n", "2"]) == 0
    assert main([*request, "--sampler", "dpmpp_2m"]) == 0
    assert len(list(out.iterdir())) == 3
    pipeline = Pipeline.from_pretrained(run)
    assert pipeline.contract.learned_variance
    calls: list[tuple[int, ...]] = []
    pipeline.net.register_forward_hook(
        lambda net, given, answer: calls.append(
            (len(given[0]), answer.shape[1] // given[0].shape[1])
        )
    )
    pipeline("a red circle", steps=3, cfg_scale=4.0)
    assert calls == [(2, 2)] * 3, "one call a step with both texts, 2C channels"


def test_the_variance_of_a_model_that_has_none_is_refused_by_name(run: Path) -> None:
    pipeline = Pipeline.from_pretrained(run)
    pipeline.contract = replace(pipeline.contract, learned_variance=False)
    with pytest.raises(LdmError, match="ddpm_learned needs a model that learned") as caught:
        pipeline("a red circle")
    assert caught.value.code == ExitCode.USAGE
    assert "use sampler ddpm" in str(caught.value)


def test_a_contract_from_before_means_no_variance(run: Path) -> None:
    values = read_json(next(run.glob("step-*")) / "contract.json")
    assert Contract.from_json(values).learned_variance
    del values["learned_variance"]
    assert not Contract.from_json(values).learned_variance
    with pytest.raises(ValueError, match="learned_variance"):
        Contract.from_json({**values, "learned_variance": 1})


def test_a_unet_learns_its_variance_too(tmp_path: Path) -> None:
    extra = ("diffusion.learned_variance=true", "train.steps=2")
    folder = train_diffusion(tiny("unet", tmp_path / "run", *extra))
    assert read_json(folder / "unet/config.json")["out_channels"] == 8
    picture = Pipeline.from_pretrained(folder)("a red circle", sampler="ddpm_learned", eta=1.0)
    assert len(picture) == 1


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        (("sample.sampler=ddpm_learned",), "needs a network that learned its variance"),
        (("diffusion.learned_variance=true", "diffusion.source=pictures"), "no noise whose"),
    ],
)
def test_a_configuration_that_cannot_have_a_variance_is_refused(
    tmp_path: Path, settings: tuple[str, ...], part: str
) -> None:
    with pytest.raises(LdmError, match=part):
        tiny("dit", tmp_path / "run", *settings)
