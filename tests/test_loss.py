"""The training loss: what the network sees, what it is compared with, how errors are weighted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ldm.diffusion.core import Diffusion
from ldm.diffusion.loss import WEIGHTINGS, diffusion_loss, min_snr
from ldm.diffusion.names import ADMISSIBLE
from ldm.diffusion.prediction import PREDICTIONS
from ldm.diffusion.process import PROCESSES
from ldm.types import TextEmbedding
from tests.oracle import points, text_of

X0, EPS = points(5, 3, 2, 2), points(5, 3, 2, 2, seed=1)
TIMES = torch.tensor([0.01, 0.2, 0.5, 0.8, 0.99], dtype=torch.float64)
PAIRS = [(process, name) for process, legal in ADMISSIBLE.items() for name in legal]


def diffusion_of(process: str, name: str, data_std: float | None = 1.0) -> Diffusion:
    return Diffusion(PROCESSES[process], PREDICTIONS[name], data_std)


def column(values: Tensor) -> Tensor:
    return values.reshape(-1, 1, 1, 1)


def test_the_network_sees_the_noised_latents_and_the_clock() -> None:
    seen: list[Tensor] = []

    def net(x: Tensor, t: Tensor, text: TextEmbedding) -> Tensor:
        seen.extend((x, t))
        return torch.zeros_like(x)

    losses = diffusion_loss(
        net, diffusion_of("rectified_flow", "flow", None), X0, text_of(5), TIMES, EPS
    )
    assert_close(seen[0], (1 - column(TIMES)) * X0 + column(TIMES) * EPS)
    assert_close(seen[1], 1000 * TIMES)
    assert_close(losses, (EPS - X0).square().mean((1, 2, 3)))


def test_data_std_scales_the_input_to_unit_variance() -> None:
    seen: list[Tensor] = []

    def net(x: Tensor, t: Tensor, text: TextEmbedding) -> Tensor:
        seen.append(x)
        return x

    x0, eps = points(64, 3, 8, 8), points(64, 3, 8, 8, seed=1)
    t = torch.linspace(0, 1, 64, dtype=torch.float64)
    diffusion_loss(net, diffusion_of("edm", "edm", 0.5), 0.5 * x0, text_of(64), t, eps)
    assert float(seen[0].std()) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(("process", "name"), PAIRS)
def test_weighted_losses_agree_whatever_is_predicted(process: str, name: str) -> None:
    """min-SNR is min(snr, 5) times the error of x0; each row converts to exactly that."""
    diffusion = diffusion_of(process, name)
    alpha, sigma = (column(c) for c in diffusion.process.coefficients(TIMES))
    x = alpha * X0 + sigma * EPS
    guess = 0.3 * X0 + 0.1
    answer = diffusion.target(guess, (x - alpha * guess) / sigma, alpha.flatten(), sigma.flatten())
    losses = diffusion_loss(
        lambda x, t, text: answer, diffusion, X0, text_of(5), TIMES, EPS, min_snr
    )
    snr = (alpha / sigma).square().flatten()
    expected = snr.clamp(max=5) * (guess - X0).square().mean((1, 2, 3))
    assert_close(losses, expected, rtol=1e-9, atol=1e-12)


def test_min_snr_is_the_published_weight_for_eps_and_v() -> None:
    """Hang et al. 2023: min(snr, 5) / snr on eps and min(snr, 5) / (snr + 1) on v."""
    alpha, sigma = PROCESSES["sd"].coefficients(TIMES)
    snr = (alpha / sigma).square()
    for name, divisor in (("eps", snr), ("v", snr + 1), ("x0", torch.ones_like(snr))):
        weight = min_snr(snr) * diffusion_of("sd", name).x0_gain(alpha, sigma)
        assert_close(weight, snr.clamp(max=5) / divisor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize(("process", "name"), PAIRS)
def test_losses_and_gradients_are_finite_at_both_ends(
    process: str, name: str, weighting: str, dtype: torch.dtype
) -> None:
    diffusion = diffusion_of(process, name)
    first = 0.0 if name != "score" else diffusion.process.t_min  # eps / sigma has no limit
    t = torch.tensor([first, diffusion.process.t_max], dtype=torch.float64)
    weight = torch.ones((), dtype=dtype, requires_grad=True)
    losses = diffusion_loss(
        lambda x, t, text: weight * x,
        diffusion,
        X0[:2].to(dtype),
        text_of(2),
        t,
        EPS[:2].to(dtype),
        WEIGHTINGS[weighting],
    )
    assert losses.shape == (2,)
    assert losses.dtype == dtype
    assert losses.isfinite().all()
    (gradient,) = torch.autograd.grad(losses.sum(), weight)
    assert gradient.isfinite()


def test_the_loss_draws_nothing() -> None:
    before = torch.get_rng_state()
    diffusion_loss(
        lambda x, t, text: x, diffusion_of("sd", "v"), X0, text_of(5), TIMES, EPS, min_snr
    )
    assert torch.equal(before, torch.get_rng_state())


def test_a_half_precision_network_is_compared_in_float32() -> None:
    losses = diffusion_loss(
        lambda x, t, text: x.bfloat16(),
        diffusion_of("rectified_flow", "flow", None),
        X0.float(),
        text_of(5),
        TIMES,
        EPS.float(),
    )
    assert losses.dtype == torch.float32
