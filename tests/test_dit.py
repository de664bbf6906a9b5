"""The diffusion transformer: identity at initialisation, masked text, any size, its own file."""

import pytest
import torch

from ldm.errors import LdmError
from ldm.models.dit import DiT, DiTConfig
from ldm.models.dit_blocks import Block, LocalConv, Place, Signal
from ldm.models.positions import sincos_positions
from ldm.types import TextEmbedding


def config(**changes):
    return DiTConfig(
        **{
            "in_channels": 4,
            "patch_size": 2,
            "hidden_size": 64,
            "num_layers": 2,
            "head_dim": 32,
            "text_dim": 16,
            **changes,
        }
    )


def text(length=5, real=5, batch=2, pooled=None):
    generator = torch.Generator().manual_seed(length)
    mask = (torch.arange(length) < real).expand(batch, -1)
    tokens = torch.randn(batch, length, 16, generator=generator)
    return TextEmbedding(tokens, mask, pooled)


def shaken(model, size=0.2):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(size * torch.randn(weight.shape, generator=generator))
    return model


@pytest.mark.parametrize("local_conv", [False, True])
def test_a_block_is_the_identity_at_initialisation(local_conv):
    net = DiT(config(local_conv=local_conv))
    x, words = torch.randn(2, 9, 64), text()
    signal = Signal(torch.randn(2, 64), torch.randn(2, 5, 64), words.mask)
    for block in net.transformer_blocks:
        assert block(x, signal, Place(3)).equal(x)
    assert not shaken(Block(config()))(x, signal, Place(3)).equal(x)


def test_the_local_convolution_reaches_the_neighbours_on_the_grid_and_no_others():
    rows, columns = 4, 6
    conv = shaken(LocalConv(config()))
    tokens = torch.zeros(1, rows * columns, 64)
    before = conv.on_grid(tokens, rows)
    tokens[0, 2 * columns + 1] = 1.0  # row 2, column 1
    moved = (conv.on_grid(tokens, rows) - before).abs().sum(-1).reshape(rows, columns) > 1e-6
    expected = torch.zeros(rows, columns, dtype=torch.bool)
    expected[1:4, 0:3] = True
    assert moved.equal(expected)


def test_the_convolution_of_the_whole_net_follows_rows_on_a_grid_that_is_not_square():
    net = shaken(DiT(config(local_conv=True, num_layers=1, patch_size=1)))
    with torch.no_grad():  # nothing but the convolution may carry news from token to token
        for attention in (net.transformer_blocks[0].attn1, net.transformer_blocks[0].attn2):
            attention.to_out.weight.zero_()
    x, t, words = torch.randn(1, 4, 4, 7), torch.tensor([500.0]), text(batch=1)
    moved = x.clone()
    moved[0, :, 1, 3] += 1.0
    change = (net(moved, t, words) - net(x, t, words)).abs().sum(1)[0] > 1e-4
    expected = torch.zeros(4, 7, dtype=torch.bool)
    expected[0:3, 2:5] = True
    assert change.equal(expected)


def test_the_first_prediction_is_zero_and_every_parameter_can_learn():
    net = DiT(config(pooled_dim=8, local_conv=True))
    words = text(pooled=torch.randn(2, 8))
    out = net(torch.randn(2, 4, 8, 6), torch.tensor([1.0, 900.0]), words)
    assert out.shape == (2, 4, 8, 6)
    assert not out.any()
    shaken(net)(
        torch.randn(2, 4, 8, 8), torch.tensor([1.0, 900.0]), words
    ).square().sum().backward()
    assert [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_padding_tokens_never_matter():
    net = shaken(DiT(config()))
    x, t, words = torch.randn(2, 4, 8, 8), torch.tensor([5.0, 700.0]), text(5, 5)
    longer = TextEmbedding(
        torch.cat([words.tokens, 1e3 * torch.randn(2, 7, 16)], 1),
        torch.cat([words.mask, torch.zeros(2, 7, dtype=torch.bool)], 1),
    )
    torch.testing.assert_close(net(x, t, words), net(x, t, longer), atol=1e-5, rtol=1e-5)


def test_samples_of_a_batch_do_not_see_each_other():
    net = shaken(DiT(config()))
    x, t, words = torch.randn(2, 4, 8, 8), torch.tensor([5.0, 700.0]), text()
    both = net(x, t, words)
    alone = net(x[1:], t[1:], words[1:])
    torch.testing.assert_close(both[1:], alone, atol=1e-5, rtol=1e-5)


def test_patches_go_back_to_where_they_came_from():
    """With the identity on one patch channel, out[c, h, w] = x[c, h, w] for every place."""
    net = DiT(config(in_channels=1, patch_size=2, hidden_size=64))
    with torch.no_grad():
        net.proj_in.weight.zero_()
        for place in range(4):
            net.proj_in.weight[place, 0, place // 2, place % 2] = 1.0
        net.proj_in.bias.zero_()
        net.proj_out.weight[:, :4] = torch.eye(4)
    net.norm_out = torch.nn.Identity()
    x = torch.randn(1, 1, 4, 6)
    sent = net(x, torch.zeros(1), text(batch=1))
    none = net(torch.zeros_like(x), torch.zeros(1), text(batch=1))
    torch.testing.assert_close(sent - none, x)


def test_positions_tell_rows_from_columns_and_all_places_apart():
    table = sincos_positions(4, 6, 64)
    assert table.shape == (24, 64)
    assert torch.cdist(table, table).add(torch.eye(24)).min() > 0.1
    grid = table.reshape(4, 6, 64)
    assert grid[0, :, :32].unique(dim=0).shape[0] == 1, "the first half encodes the row"
    assert grid[:, 0, 32:].unique(dim=0).shape[0] == 1, "the second half the column"


def test_time_and_text_change_the_prediction():
    net = shaken(DiT(config()))
    x, words = torch.randn(2, 4, 8, 8), text()
    one = net(x, torch.tensor([5.0, 5.0]), words)
    assert not one.allclose(net(x, torch.tensor([600.0, 600.0]), words), atol=1e-3)
    assert not one.allclose(net(x, torch.tensor([5.0, 5.0]), text(6, 6)), atol=1e-3)


def test_recomputing_activations_gives_the_same_gradients():
    x, t, words = torch.randn(2, 4, 8, 8), torch.tensor([5.0, 700.0]), text()
    net = shaken(DiT(config(local_conv=True)))
    gradients = []
    for checkpointing in (False, True):
        net.gradient_checkpointing = checkpointing
        net.zero_grad()
        net(x, t, words).square().sum().backward()
        gradients.append([p.grad.clone() for p in net.parameters()])
    for one, two in zip(*gradients, strict=True):
        assert one.equal(two)


def test_a_configuration_survives_its_file():
    value = config(pooled_dim=8, qk_norm=None, local_conv=True)
    assert DiTConfig.from_json(value.to_json()) == value


@pytest.mark.parametrize("changes", [{"hidden_size": 100}, {"num_layers": 0}, {"patch_size": -1}])
def test_impossible_configurations_are_refused(changes):
    with pytest.raises(LdmError):
        config(**changes)


def test_a_latent_that_cannot_be_cut_into_patches_is_refused():
    with pytest.raises(LdmError, match="patches of 2"):
        DiT(config())(torch.randn(1, 4, 7, 8), torch.zeros(1), text(batch=1))


def test_a_norm_of_an_older_version_is_refused_and_not_taken_for_another() -> None:
    saved = DiTConfig(in_channels=4).to_json() | {"qk_norm": True}
    with pytest.raises(LdmError, match="qk_norm True"):
        DiTConfig.from_json(saved)
