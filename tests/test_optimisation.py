"""Optimizer groups, the learning rate as a function of the step, and the weight average."""

import pytest
import torch
from torch import nn

from ldm.config.schema import OptimConfig
from ldm.training.ema import Ema
from ldm.training.optim import (
    clip_gradients,
    learning_rate,
    make_optimizer,
    parameter_groups,
)


def model():
    return nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3), nn.LayerNorm(3), nn.Conv1d(3, 2, 1))


def test_only_matrices_and_kernels_decay():
    net = model()
    decayed, others = parameter_groups(net, 0.1)
    names = {id(p): n for n, p in net.named_parameters()}
    assert [names[id(p)] for p in decayed["params"]] == ["1.weight", "3.weight"]
    assert {names[id(p)] for p in others["params"]} == {
        "0.weight",
        "1.bias",
        "2.weight",
        "2.bias",
        "3.bias",
    }
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)


def test_frozen_parameters_are_not_optimised():
    net = model()
    net[1].requires_grad_(False)
    count = sum(len(g["params"]) for g in make_optimizer(net, OptimConfig()).param_groups)
    assert count == 5


@pytest.mark.parametrize(
    ("schedule", "middle", "end"),
    [("constant", 1.0, 1.0), ("linear", 0.5, 0.0), ("cosine", 0.5, 0.0)],
)
def test_the_rate_warms_up_then_falls_as_its_schedule_says(schedule, middle, end):
    config = OptimConfig(learning_rate=2.0, warmup_steps=10, schedule=schedule)
    assert learning_rate(0, 110, config) == pytest.approx(0.2)
    assert learning_rate(9, 110, config) == pytest.approx(2.0)
    assert learning_rate(10, 110, config) == pytest.approx(2.0)
    assert learning_rate(60, 110, config) == pytest.approx(2.0 * middle)
    assert learning_rate(110, 110, config) == pytest.approx(2.0 * end)


def test_the_final_fraction_is_where_the_rate_ends():
    config = OptimConfig(learning_rate=1.0, warmup_steps=0, schedule="cosine", final_fraction=0.1)
    assert learning_rate(100, 100, config) == pytest.approx(0.1)


def test_one_update_moves_the_average_by_one_minus_decay():
    net = nn.Linear(2, 1, bias=False)
    ema = Ema(net, 0.75)
    before = ema.shadow["weight"].clone()
    with torch.no_grad():
        net.weight.add_(4.0)
    ema.update(net, step=10_000)
    torch.testing.assert_close(ema.shadow["weight"], before + 1.0)
    ema.update(net, step=0)  # the first step's decay is 1/10
    torch.testing.assert_close(ema.shadow["weight"], before + 1.0 + 0.9 * 3.0)


def test_the_average_is_applied_inside_the_context_only_even_after_an_error():
    net = nn.Linear(2, 1)
    ema = Ema(net, 0.5)
    own = net.weight.detach().clone()
    ema.shadow["weight"].fill_(7.0)

    def use():
        with ema.applied(net):
            assert (net.weight == 7.0).all()
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        use()
    assert net.weight.equal(own)


@pytest.mark.parametrize("limit", [0.5, 0.995, 1.0, 4.0])
def test_clipping_is_torchs_own_bit_for_bit_whether_or_not_it_scales(limit):
    one, other = model(), model()
    for net in (one, other):
        for index, weight in enumerate(net.parameters()):
            generator = torch.Generator().manual_seed(index)
            weight.grad = torch.randn(weight.shape, generator=generator)
    size = float(torch.nn.utils.get_total_norm([p.grad for p in one.parameters()]))
    norm = clip_gradients(one, limit * size)
    assert norm == float(torch.nn.utils.clip_grad_norm_(other.parameters(), limit * size))
    assert all(
        a.grad.equal(b.grad) for a, b in zip(one.parameters(), other.parameters(), strict=True)
    )
