"""Tokens that are masked or routed: who sees whom, what comes out where, what is counted."""

import pytest
import torch

from ldm.models.dit import DiT, DiTConfig
from ldm.models.routing import Routing
from ldm.types import TextEmbedding


def net_of(**changes):
    torch.manual_seed(2)
    fields = {"in_channels": 2, "hidden_size": 32, "head_dim": 16, "text_dim": 4, "num_layers": 4}
    net = DiT(DiTConfig(**{**fields, **changes}))
    with torch.no_grad():
        for weight in net.parameters():
            weight.add_(0.2 * torch.randn(weight.shape))
    return net


def inputs(batch=2, side=8):
    generator = torch.Generator().manual_seed(4)
    mask = torch.tensor([[True, True, False]]).expand(batch, -1)
    text = TextEmbedding(torch.randn(batch, 3, 4, generator=generator), mask)
    return torch.randn(batch, 2, side, side, generator=generator), torch.full((batch,), 300.0), text


KEPT = torch.tensor([[0, 3, 7, 8, 14], [1, 2, 6, 9, 15]])
MODELS = [
    {},
    {"conditioning": "in_context", "positions": "rope"},
    {"conditioning": "cross_attention", "positions": "rope"},
    {"conditioning": "adaln_single"},
]


@pytest.mark.parametrize("changes", MODELS)
@pytest.mark.parametrize("routing", [{"last": None}, {"first": 1, "last": None}, {"last": 3}])
def test_keeping_every_token_is_the_plain_network(changes, routing):
    net, given = net_of(**changes), inputs()
    everything = Routing(torch.arange(16).expand(2, -1), **routing)
    torch.testing.assert_close(net(*given, everything), net(*given), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("changes", MODELS)
def test_masked_patches_are_not_seen_and_nothing_is_predicted_there(changes):
    net, (x, t, text) = net_of(**changes), inputs()
    routing = Routing(KEPT)
    kept = routing.of_pixels(4, 4, 2)
    assert kept.shape == (2, 1, 8, 8)
    assert kept.sum() == 2 * 5 * 4
    out = net(x, t, text, routing)
    assert not out[~kept.expand_as(out)].any()
    assert out[kept.expand_as(out)].all()
    other = torch.where(kept, x, torch.randn(x.shape))
    torch.testing.assert_close(net(other, t, text, routing), out, atol=1e-5, rtol=1e-5)


def test_a_masked_network_is_the_network_on_a_smaller_picture():
    """The kept top half of the tokens, whose positions are those of a picture half as high."""
    net, (x, t, text) = net_of(positions="rope"), inputs()
    routing = Routing(torch.arange(8).expand(2, -1))
    half = net(x[:, :, :4], t, text)
    torch.testing.assert_close(net(x, t, text, routing)[:, :, :4], half, atol=1e-5, rtol=1e-5)


def test_routed_tokens_skip_their_blocks_and_come_back():
    """All blocks between are skipped by all but 5 tokens: with those blocks gone, by all."""
    net, (x, t, text) = net_of(), inputs()
    routing = Routing(KEPT, first=1, last=3)
    seen = {}
    for number, block in enumerate(net.transformer_blocks):
        block.register_forward_hook(lambda _, a, out, n=number: seen.update({n: (a[0], out)}))
    net(x, t, text, routing)
    assert [seen[n][0].shape[1] for n in range(4)] == [16, 5, 5, 16]
    before, after = seen[0][1], seen[3][0]
    for row in range(2):
        others = [n for n in range(16) if n not in KEPT[row]]
        assert after[row, others].equal(before[row, others])
        assert after[row, KEPT[row]].equal(seen[2][1][row])
        assert seen[1][0][row].equal(before[row, KEPT[row]])


@pytest.mark.parametrize("first", [0, 2])
def test_tokens_that_wait_until_after_the_last_block_are_predicted(first):
    net, given = net_of(), inputs()
    out = net(*given, Routing(KEPT, first=first, last=4))
    assert out.ne(0).all()


def test_deferred_masking_lets_the_first_blocks_see_every_patch():
    net, (x, t, text) = net_of(), inputs()
    routing = Routing(KEPT, first=2)
    kept = routing.of_pixels(4, 4, 2)
    other = torch.where(kept, x, torch.randn(x.shape))
    out = net(x, t, text, routing)
    assert not out[~kept.expand_as(out)].any()
    assert not net(other, t, text, routing).allclose(out, atol=1e-3)


@pytest.mark.parametrize("routing", [Routing(KEPT), Routing(KEPT, first=1, last=3)])
def test_recomputing_activations_of_routed_tokens_gives_the_same_gradients(routing):
    net, given, gradients = net_of(positions="rope"), inputs(), []
    for checkpointing in (False, True):
        net.gradient_checkpointing = checkpointing
        net.zero_grad()
        net(*given, routing).square().sum().backward()
        gradients.append([p.grad.clone() for p in net.parameters()])
    assert all(one.equal(two) for one, two in zip(*gradients, strict=True))
