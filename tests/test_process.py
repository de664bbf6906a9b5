"""Noise processes: ends, published tables, inverse in log-SNR, clock, names."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ldm.diffusion import guidance, loss, names, prediction, samplers, schedule
from ldm.diffusion.names import named
from ldm.diffusion.process import PROCESSES
from ldm.errors import LdmError

EVERY = pytest.mark.parametrize("name", PROCESSES)


def alpha_bar(name: str) -> Tensor:
    """The published table: entry i at t = (i + 1) / 1000."""
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    return PROCESSES[name].coefficients(t)[0].square()


@EVERY
def test_time_zero_is_data_and_noise_grows_with_time(name: str) -> None:
    process = PROCESSES[name]
    alpha, sigma = process.coefficients(torch.linspace(0, process.t_max, 4001).double())
    assert float(alpha[0]) == 1
    assert float(sigma[0]) == pytest.approx(0.002 if name == "edm" else 0.0, abs=1e-15)
    assert (sigma.diff() > 0).all()
    assert (alpha.diff() <= 0).all()
    assert sigma.isfinite().all()


@pytest.mark.parametrize("name", ["vp_linear", "vp_cosine", "sd"])
def test_variance_is_preserved(name: str) -> None:
    alpha, sigma = PROCESSES[name].coefficients(torch.linspace(0, 1, 501).double())
    assert_close(alpha**2 + sigma**2, torch.ones_like(alpha), rtol=0, atol=1e-14)


def test_rectified_flow_is_a_straight_line() -> None:
    t = torch.linspace(0, 1, 11).double()
    alpha, sigma = PROCESSES["rectified_flow"].coefficients(t)
    assert torch.equal(alpha, 1 - t)
    assert torch.equal(sigma, t)


def test_edm_runs_from_its_smallest_to_its_largest_sigma() -> None:
    first, last = PROCESSES["edm"].level(0.0), PROCESSES["edm"].level(1.0)
    assert (first.alpha, last.alpha) == (1, 1)
    assert first.sigma == pytest.approx(0.002, rel=1e-12)
    assert last.sigma == pytest.approx(80, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "end", "first_below_a_hundredth"),
    [("vp_linear", 4.04e-5, 673), ("sd", 4.66e-3, 933)],
)
def test_tables_have_the_published_numbers(
    name: str, end: float, first_below_a_hundredth: int
) -> None:
    table = alpha_bar(name)
    assert float(table[-1]) == pytest.approx(end, rel=2e-3)
    assert int((table < 0.01).nonzero()[0]) == first_below_a_hundredth


def test_stable_diffusion_starts_at_its_known_noise_ratio() -> None:
    last = PROCESSES["sd"].level(1.0)
    assert last.sigma / last.alpha == pytest.approx(14.61, abs=0.005)


@pytest.mark.parametrize(
    ("name", "roots"), [("sd", (0.00085**0.5, 0.012**0.5, 2)), ("vp_linear", (1e-4, 0.02, 1))]
)
def test_continuous_table_meets_the_discrete_one(
    name: str, roots: tuple[float, float, int]
) -> None:
    low, high, power = roots
    product, expected = 1.0, []
    for i in range(1000):
        product *= 1 - (low + (high - low) * i / 999) ** power
        expected.append(product)
    assert_close(alpha_bar(name), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


def test_cosine_has_the_published_offset() -> None:
    process = PROCESSES["vp_cosine"]
    assert process.level(0.5).alpha ** 2 == pytest.approx(0.493844, abs=1e-6)  # 0.5 without offset
    angles = [(t + 0.008) / 1.008 * math.pi / 2 for t in (0.0, 0.3)]
    expected = math.cos(angles[1]) / math.cos(angles[0])
    assert process.level(0.3).alpha == pytest.approx(expected, rel=1e-14)


def test_cosine_keeps_its_digits_next_to_data() -> None:
    # sigma^2 = 2 tan(a0) delta + O(delta^2) with delta = t / 1.008 * pi / 2
    a0, delta = 0.008 / 1.008 * math.pi / 2, 1e-9 / 1.008 * math.pi / 2
    sigma = PROCESSES["vp_cosine"].level(1e-9).sigma
    assert sigma**2 == pytest.approx(2 * math.tan(a0) * delta, rel=1e-6)


@EVERY
def test_time_is_recovered_from_log_snr(name: str) -> None:
    process = PROCESSES[name]
    t = torch.linspace(1e-4, process.t_max - 1e-4, 777, dtype=torch.float64)
    assert_close(process.t_at(process.logsnr(t)), t, rtol=1e-9, atol=1e-12)


@EVERY
def test_log_snr_out_of_reach_gives_the_nearer_end(name: str) -> None:
    process = PROCESSES[name]
    wanted = torch.tensor([-math.inf, -1000.0, 1000.0, math.inf])
    found = process.t_at(wanted).tolist()
    assert found[0] == process.t_max
    assert found[1] == pytest.approx(process.t_max, abs=1e-12)
    assert found[2] == pytest.approx(0, abs=1e-12)
    assert found[3] == 0


def test_networks_are_told_the_clock_of_published_models() -> None:
    index = torch.tensor([0, 500, 999], dtype=torch.float64)
    assert_close(PROCESSES["sd"].told((index + 1) / 1000), index, rtol=0, atol=1e-9)
    assert float(PROCESSES["sd"].told(torch.tensor(0.0))) == 0
    assert float(PROCESSES["rectified_flow"].told(torch.tensor(0.25))) == 250


def test_names_are_those_of_the_tables() -> None:
    assert tuple(PROCESSES) == names.PROCESS_NAMES
    assert tuple(prediction.PREDICTIONS) == names.PREDICTION_NAMES
    assert tuple(samplers.SAMPLERS) == names.SAMPLER_NAMES
    assert tuple(schedule.SPACINGS) == names.SPACING_NAMES
    assert tuple(schedule.DISTRIBUTIONS) == names.TIMESTEP_NAMES
    assert tuple(loss.WEIGHTINGS) == names.WEIGHTING_NAMES
    assert tuple(guidance.GUIDANCE) == names.GUIDANCE_NAMES
    stochastic = (s.name for s in samplers.SAMPLERS.values() if s.stochastic)
    assert tuple(stochastic) == names.STOCHASTIC_SAMPLER_NAMES


@pytest.mark.parametrize(
    "table", [PROCESSES, prediction.PREDICTIONS, samplers.SAMPLERS], ids=lambda t: next(iter(t))
)
def test_entries_carry_the_name_they_are_filed_under(table: dict[str, object]) -> None:
    assert [entry.name for entry in table.values()] == list(table)  # type: ignore[attr-defined]


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(LdmError, match=r"'vp_cosin'.*rectified_flow, vp_linear") as caught:
        named("process", PROCESSES, "vp_cosin")
    assert caught.value.fix == "use vp_cosine"


def test_names_load_without_torch() -> None:
    code = "import sys, ldm.diffusion.names; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
