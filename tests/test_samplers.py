"""Samplers against closed forms: order of convergence, ends, noise, arguments."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ldm.diffusion.process import PROCESSES, Process
from ldm.diffusion.samplers import SAMPLERS, start, transition
from ldm.diffusion.schedule import SPACINGS, levels
from ldm.errors import LdmError
from ldm.types import Level
from tests.oracle import Gaussian, points, three_blobs

MIXTURE = three_blobs()
GAUSSIAN = Gaussian()
SIZES = (80, 160, 320)
FLOW = PROCESSES["rectified_flow"]
STOCHASTIC = [name for name, sampler in SAMPLERS.items() if sampler.stochastic]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tens of thousands of tiny products: a second thread only makes them wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def grid_of(process: Process, times: Tensor) -> list[Level]:
    alpha, sigma = process.coefficients(times)
    rows = zip(times.tolist(), alpha.tolist(), sigma.tolist(), strict=True)
    return [Level(*row) for row in rows]


def log_snr_grid(process: Process, steps: int, strides: Sequence[float]) -> list[Level]:
    """Levels from log-SNR -5 to 5, inside every process; the steps in it repeat `strides`."""
    weights = torch.tensor(strides, dtype=torch.float64).repeat(steps)[:steps]
    marks = torch.cat([weights.new_zeros(1), weights.cumsum(0)])
    return grid_of(process, process.t_at(-5 + 10 * marks / marks[-1]))


@cache
def reference() -> Tensor:
    """Where the ODE takes `points(32, 2)` over log-SNR -5 to 5, both in x / (alpha + sigma)."""
    now, nxt = log_snr_grid(FLOW, 1, (1.0,))
    return MIXTURE.follow(points(32, 2), now, nxt)


def slopes(errors: Sequence[float]) -> list[float]:
    return [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]


@pytest.mark.parametrize("strides", [(1.0,), (1.0, 2.0)], ids=["even", "uneven"])
@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("name", SAMPLERS)
def test_sampler_attains_its_order_on_a_mixture(
    name: str, process: str, strides: tuple[float, ...]
) -> None:
    errors = []
    for steps in SIZES:
        grid = log_snr_grid(PROCESSES[process], steps, strides)
        x = points(32, 2) * (grid[0].alpha + grid[0].sigma)
        x = SAMPLERS[name].run(MIXTURE.denoise, x, grid, eta=0.0)
        difference = x / (grid[-1].alpha + grid[-1].sigma) - reference()
        errors.append(float(difference.square().mean().sqrt()))
    for slope in slopes(errors):
        assert slope == pytest.approx(SAMPLERS[name].order, abs=0.10), errors


@pytest.mark.parametrize("name", SAMPLERS)
def test_sampler_attains_its_order_from_pure_noise_on_rectified_flow(name: str) -> None:
    x = points(32, 2)
    grids = [grid_of(FLOW, torch.linspace(1, 0.05, n + 1, dtype=torch.float64)) for n in SIZES]
    exact = MIXTURE.follow(x, grids[0][0], grids[0][-1])
    outs = [SAMPLERS[name].run(MIXTURE.denoise, x, grid, eta=0.0) for grid in grids]
    errors = [float((out - exact).square().mean().sqrt()) for out in outs]
    for slope in slopes(errors):
        assert slope == pytest.approx(SAMPLERS[name].order, abs=0.10), errors


@pytest.mark.parametrize("process", PROCESSES)
def test_many_second_order_steps_reach_the_exact_gaussian_map(process: str) -> None:
    grid = log_snr_grid(PROCESSES[process], 1000, (1.0,))
    x = start(points(32, 2), grid[0])
    exact = GAUSSIAN.follow(x, grid[0], grid[-1])
    for name in ("heun", "dpmpp_2m"):
        out = SAMPLERS[name].run(GAUSSIAN.denoise, x, grid)
        assert_close(out, exact, rtol=0, atol=2e-5)  # measured 6e-6 at order 2


@pytest.mark.parametrize("process", PROCESSES)
def test_transition_is_exact_when_x0_is_known(process: str) -> None:
    x0, eps = points(8, 3), points(8, 3, seed=1)
    grid = levels(PROCESSES[process], 7)
    for now, nxt in pairwise(grid):
        moved = transition(now.alpha * x0 + now.sigma * eps, x0, now, nxt)
        assert_close(moved, nxt.alpha * x0 + nxt.sigma * eps, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_ends_on_clean_finite_data_in_float32(
    name: str, process: str, spacing: str
) -> None:
    grid = levels(PROCESSES[process], 20, spacing=spacing)
    x = start(points(256, 1).float(), grid[0])
    draws = points(20, 256, 1, seed=1).float()
    x = SAMPLERS[name].run(GAUSSIAN.denoise, x, grid, noise=lambda step: draws[step])
    assert x.dtype == torch.float32
    assert x.isfinite().all()
    # 256 points leave 0.04 on the mean and 0.03 on the spread; leading never sees pure noise
    assert float(x.mean()) == pytest.approx(GAUSSIAN.mean, abs=0.2)
    assert float(x.std()) == pytest.approx(GAUSSIAN.std, abs=0.2)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_last_step_returns_the_last_x0(name: str) -> None:
    seen: list[Tensor] = []

    def denoise(x: Tensor, level: Level) -> Tensor:
        seen.append(MIXTURE.denoise(x, level))
        return seen[-1]

    x = SAMPLERS[name].run(denoise, points(8, 2), levels(FLOW, 5), eta=0.0)
    torch.testing.assert_close(x, seen[-1], rtol=0, atol=0)


@pytest.mark.parametrize(("name", "calls"), [("ddim", 6), ("dpmpp_2m", 6), ("heun", 11)])
def test_sampler_calls_the_network_as_often_as_documented(name: str, calls: int) -> None:
    seen: list[Level] = []

    def denoise(x: Tensor, level: Level) -> Tensor:
        seen.append(level)
        return x

    SAMPLERS[name].run(denoise, points(2, 2), levels(FLOW, 6))
    assert len(seen) == calls
    assert all(level.sigma > 0 for level in seen)


@pytest.mark.parametrize(("quiet", "noisy"), [("euler", "ddim"), ("dpmpp_2m", "dpmpp_2m_sde")])
def test_eta_zero_is_bit_for_bit_the_deterministic_sampler(quiet: str, noisy: str) -> None:
    grid = levels(PROCESSES["sd"], 10)
    x = points(8, 2)
    one = SAMPLERS[quiet].run(MIXTURE.denoise, x, grid)
    other = SAMPLERS[noisy].run(MIXTURE.denoise, x, grid, eta=0.0, noise=lambda step: x)
    assert torch.equal(one, other)


@pytest.mark.parametrize("indices", [(500, 499), (999, 979), (40, 1)])
@pytest.mark.parametrize("process", ["sd", "vp_linear"])
def test_eta_one_is_the_ddpm_posterior(process: str, indices: tuple[int, int]) -> None:
    now, nxt = (PROCESSES[process].level((index + 1) / 1000) for index in indices)
    abar_now, abar_nxt = now.alpha**2, nxt.alpha**2
    alpha_step = abar_now / abar_nxt
    beta = 1 - alpha_step
    x, x0 = points(4, 2), points(4, 2, seed=1)
    mean = (abar_nxt**0.5 * beta * x0 + alpha_step**0.5 * (1 - abar_nxt) * x) / (
        1 - abar_now
    )  # Ho et al. 2020, eq. 7
    spread = ((1 - abar_nxt) / (1 - abar_now) * beta) ** 0.5
    for draw in (torch.zeros_like(x), torch.ones_like(x)):
        got = SAMPLERS["ddim"].run(
            lambda _, __: x0, x, (now, nxt), eta=1.0, noise=lambda _, draw=draw: draw
        )
        assert_close(got, mean + spread * draw, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("name", STOCHASTIC)
def test_stochastic_sampler_keeps_the_moments_of_a_gaussian(
    name: str, process: str, eta: float
) -> None:
    """Mean and spread follow affine maps, so two points and the noise gain give them exactly."""
    grid = log_snr_grid(PROCESSES[process], 200, (1.0,))
    first, last = grid[0], grid[-1]
    probes = torch.tensor([0.0, 1.0], dtype=torch.float64)
    run = SAMPLERS[name].run
    silent = torch.zeros_like(probes)
    base = run(GAUSSIAN.denoise, probes, grid, eta=eta, noise=lambda _: silent)
    gain = float(base[1] - base[0])
    # column k of x carries a unit draw at step k alone: one run gives the gain of every draw
    count = len(grid) - 1
    unit = torch.eye(count, dtype=torch.float64)
    replies = run(
        GAUSSIAN.denoise, torch.zeros(count).double(), grid, eta=eta, noise=lambda k: unit[k]
    )
    noise_variance = float((replies - base[0]).square().sum())
    mean = float(base[0]) + gain * first.alpha * GAUSSIAN.mean
    spread = math.sqrt((gain * GAUSSIAN.spread(first)) ** 2 + noise_variance)
    assert noise_variance > 0
    scale = GAUSSIAN.spread(last)
    # weak order 1 with 200 steps; without the noise the spread would be off by 0.1 and more
    assert (mean - last.alpha * GAUSSIAN.mean) / scale == pytest.approx(0, abs=0.02)
    assert spread / scale == pytest.approx(1, abs=0.02)


def test_progress_is_reported_after_every_step() -> None:
    steps: list[int] = []
    for sampler in SAMPLERS.values():
        steps.clear()
        sampler.run(
            GAUSSIAN.denoise,
            points(1, 1),
            levels(FLOW, 4),
            eta=0.0,
            on_step=lambda step, x: steps.append(step),
        )
        assert steps == [1, 2, 3, 4]


@pytest.mark.parametrize("name", SAMPLERS)
def test_impossible_eta_is_refused(name: str) -> None:
    run, x, grid = SAMPLERS[name].run, points(1, 1), levels(FLOW, 2)
    with pytest.raises(LdmError, match="eta"):
        run(GAUSSIAN.denoise, x, grid, eta=1.5, noise=lambda _: x)
    with pytest.raises(LdmError, match="eta"):
        run(GAUSSIAN.denoise, x, grid, eta=0.5)
