"""Where tokens stand: rotations see offsets only, and larger pictures get positions they know."""

import pytest
import torch

from ldm.models.dit import DiT, DiTConfig
from ldm.models.positions import (
    resized_positions,
    rotary_positions,
    rotated,
    sincos_positions,
)
from ldm.types import TextEmbedding


def logits(turns, queries, keys):
    """Attention logits (N, N) of equal queries and equal keys at every place."""
    count = len(turns[0])
    q = rotated(queries.expand(1, 1, count, -1), turns)
    k = rotated(keys.expand(1, 1, count, -1), turns)
    return (q @ k.mT)[0, 0]


def a_query_and_a_key(width=16):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(width, generator=generator), torch.randn(width, generator=generator)


@pytest.mark.parametrize("scaling", ["none", "interpolate", "ntk"])
def test_a_rotary_logit_depends_on_the_offset_alone(scaling):
    rows, columns = 6, 9
    turns = rotary_positions(rows, columns, 16, base=4, scaling=scaling)
    seen = logits(turns, *a_query_and_a_key()).reshape(rows, columns, rows, columns)
    # the same offset from everywhere: shift both by (2, 3)
    torch.testing.assert_close(seen[:4, :6, :4, :6], seen[2:, 3:, 2:, 3:], atol=1e-5, rtol=1e-5)
    assert not seen[0, 0, 0, 1].isclose(seen[0, 0, 1, 0], atol=1e-3), "rows are not columns"
    assert not seen[0, 0, 0, 1].isclose(seen[0, 1, 0, 0], atol=1e-3), "left is not right"


def test_a_rotary_logit_is_the_sum_of_two_axes_of_turned_pairs():
    """Su et al. 2021, eq. 34: sum over pairs of |q||k| cos(offset * rate + the angle between)."""
    (q, k), rows, columns = a_query_and_a_key(8), 5, 7
    seen = logits(rotary_positions(rows, columns, 8), q, k).reshape(rows, columns, rows, columns)
    rates = [1.0, 0.01]  # 10000^(-i / 2), for each axis
    expected = 0.0
    for pair in range(4):
        a, b = complex(q[pair], q[pair + 4]), complex(k[pair], k[pair + 4])
        offset = (2 - 4) if pair < 2 else (6 - 1)
        turn = torch.polar(torch.ones(()), torch.tensor(offset * rates[pair % 2]))
        expected += (a * complex(turn) * b.conjugate()).real
    torch.testing.assert_close(seen[2, 6, 4, 1], torch.tensor(expected), atol=1e-5, rtol=1e-5)


def test_rotations_keep_lengths_and_the_first_token_as_it_is():
    x = torch.randn(2, 3, 12, 16)
    turned = rotated(x, rotary_positions(3, 4, 16))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert turned[:, :, 0].equal(x[:, :, 0])


def test_interpolated_rotations_are_those_of_the_base_in_between():
    """A picture of 8 in base 4: every second token stands where a token of 4 stood."""
    large = rotary_positions(8, 8, 16, base=4, scaling="interpolate")
    small = rotary_positions(4, 4, 16)
    for one, two in zip(large, small, strict=True):
        assert one.reshape(8, 8, -1)[::2, ::2].flatten(0, 1).equal(two)


def test_ntk_scaling_slows_the_slowest_pair_alone_by_the_whole_factor():
    large = [part.reshape(16, 4, 4) for part in rotary_positions(16, 4, 8, base=4, scaling="ntk")]
    plain = [part.reshape(16, 4, 4) for part in rotary_positions(16, 4, 8)]
    one, two = (torch.atan2(sin, cos) for cos, sin in (large, plain))
    torch.testing.assert_close(one[1, 0, 0], two[1, 0, 0])  # fast: neighbours as far as ever
    torch.testing.assert_close(one[12, 0, 1], two[3, 0, 1])  # slow: 12 of 16 is 3 of 4
    torch.testing.assert_close(one[:, :, 2:], two[:, :, 2:])  # columns are not longer


@pytest.mark.parametrize("scaling", ["interpolate", "ntk"])
@pytest.mark.parametrize("side", [3, 4])
def test_rotations_up_to_the_base_size_are_not_scaled(scaling, side):
    for one, two in zip(
        rotary_positions(side, side, 16, base=4, scaling=scaling),
        rotary_positions(side, side, 16),
        strict=True,
    ):
        assert one.equal(two)


def test_sines_of_another_size_span_the_range_of_the_base():
    base = sincos_positions(4, 4, 16)
    assert sincos_positions(4, 4, 16, base=4).equal(base), "exact at the base"
    large = sincos_positions(8, 12, 16, base=4).reshape(8, 12, 16)
    torch.testing.assert_close(large[::2, ::3].flatten(0, 1), base)
    halved = sincos_positions(8, 8, 16, interpolation=2.0).reshape(8, 8, 16)
    torch.testing.assert_close(halved[::2, ::2].flatten(0, 1), base)


def test_column_first_is_the_same_table_with_its_halves_exchanged():
    table, other = sincos_positions(3, 5, 16), sincos_positions(3, 5, 16, column_first=True)
    assert torch.cat([table[:, 8:], table[:, :8]], dim=1).equal(other)


def test_a_learned_table_is_itself_at_its_size_and_smooth_elsewhere():
    table = torch.randn(4, 4, 6)
    assert resized_positions(table, 4, 4).equal(table.flatten(0, 1))
    flat = torch.ones(4, 4, 6)
    torch.testing.assert_close(resized_positions(flat, 7, 9), torch.ones(63, 6))
    slope = torch.arange(4.0)[:, None, None].expand(4, 4, 1)
    rows = resized_positions(slope, 8, 4).reshape(8, 4)[:, 0]
    assert (rows.diff() > 0).all()
    assert rows[[3, 4]].mean().isclose(torch.tensor(1.5))


@pytest.mark.parametrize(
    "changes",
    [
        {"base_size": 4},
        {"positions": "learned", "base_size": 4},
        {"positions": "rope", "base_size": 4, "rope_scaling": "ntk"},
        {"positions": "rope", "base_size": 4, "rope_scaling": "interpolate"},
    ],
)
def test_each_kind_tells_places_apart_at_the_base_and_beyond(changes):
    """Without positions, exchanging two patches of the input exchanges those of the output."""
    torch.manual_seed(0)
    net = DiT(
        DiTConfig(
            in_channels=2,
            patch_size=1,
            hidden_size=32,
            head_dim=16,
            text_dim=4,
            num_layers=2,
            **changes,
        )
    )
    with torch.no_grad():
        for weight in net.parameters():
            weight.add_(0.3 * torch.randn(weight.shape))
    text = TextEmbedding(torch.randn(1, 2, 4), torch.ones(1, 2, dtype=torch.bool))
    for side in (4, 6):
        x = torch.randn(1, 2, side, side)
        moved = x.roll(1, dims=2)
        one = net(x, torch.tensor([9.0]), text).roll(1, dims=2)
        assert not one.allclose(net(moved, torch.tensor([9.0]), text), atol=1e-3)


def test_a_table_made_while_sampling_serves_training():
    net = DiT(
        DiTConfig(
            in_channels=2, hidden_size=32, head_dim=16, num_layers=1, text_dim=4, positions="rope"
        )
    )
    text = TextEmbedding(torch.randn(1, 2, 4), torch.ones(1, 2, dtype=torch.bool))
    x = torch.randn(1, 2, 22, 26)  # a size no other test has
    with torch.inference_mode():
        net(x, torch.tensor([9.0]), text)
    net(x, torch.tensor([9.0]), text).sum().backward()
    with torch.device("meta"):
        blank = DiT(net.config)
    assert blank(x.to("meta"), torch.tensor([9.0], device="meta"), text.to("meta")).is_meta
    assert net(x, torch.tensor([9.0]), text).device.type == "cpu"
