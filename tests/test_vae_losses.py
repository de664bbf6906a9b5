"""The terms of a VAE's objective against closed forms, and that each moves the weights."""

import math

import pytest
import torch
from recipes import TINY, tiny
from torch import nn
from vae_ranks import start

from ldm.build import build_vae
from ldm.config.files import load
from ldm.config.vae import EquivarianceConfig, GanConfig, VaeLossConfig
from ldm.errors import LdmError
from ldm.models.discriminator import DiscriminatorConfig, PatchDiscriminator, min_px
from ldm.training.vae_gan import (
    Adversary,
    DiscriminatorPass,
    Verdict,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    gradient_penalty,
)
from ldm.training.vae_loss import (
    Turn,
    VaePass,
    by_side,
    changed,
    draw_turns,
    equivariance_distance,
    vae_loss,
)
from ldm.training.vae_step import accumulate

LOG2 = math.log(2)


def scores(*values):
    """One score for every patch of a picture of two."""
    return torch.tensor(values)[:, None, None, None].expand(-1, 1, 1, 2)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(
    ("kind", "real", "fake", "expected"),
    [
        ("hinge", 0.0, 0.0, 1.0),  # knows nothing
        ("hinge", 0.25, -0.5, 0.5 * (0.75 + 0.5)),
        ("hinge", 3.0, -3.0, 0.0),  # beyond the margin nothing is left to gain
        ("vanilla", 0.0, 0.0, LOG2),
        ("vanilla", 1.0, -2.0, -0.5 * (math.log(sigmoid(1)) + math.log(1 - sigmoid(-2)))),
        ("non_saturating", 1.0, 2.0, -0.5 * (math.log(sigmoid(1)) + math.log(1 - sigmoid(2)))),
    ],
)
def test_the_discriminators_loss_has_its_closed_form(kind, real, fake, expected):
    found = discriminator_loss(kind, scores(real, real), scores(fake, fake))
    torch.testing.assert_close(found, torch.full((2,), expected))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("hinge", lambda s: -s),
        ("vanilla", lambda s: math.log(1 - sigmoid(s))),
        ("non_saturating", lambda s: -math.log(sigmoid(s))),
    ],
)
def test_the_generators_loss_has_its_closed_form(kind, expected):
    found = generator_loss(kind, scores(-2.0, 0.0, 1.5))
    torch.testing.assert_close(found, torch.tensor([expected(s) for s in (-2.0, 0.0, 1.5)]))


def test_every_generators_loss_falls_as_the_score_of_its_picture_rises():
    """And only the minimax one loses its gradient where the discriminator is sure."""
    slopes = {}
    for kind in ("hinge", "vanilla", "non_saturating"):
        score = torch.tensor([-8.0, 0.0, 8.0], requires_grad=True)
        generator_loss(kind, score[:, None, None, None]).sum().backward()
        slopes[kind] = score.grad
        assert (score.grad < 0).all()
    assert slopes["vanilla"][0] > -1e-3
    assert slopes["non_saturating"][0] < -0.99
    assert slopes["hinge"].tolist() == [-1, -1, -1]


def test_r1_of_a_linear_discriminator_is_the_square_of_its_weights():
    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4, 4, generator=torch.Generator()))

        def forward(self, x):
            return (x * self.weight).sum((1, 2, 3))[:, None, None, None].expand(-1, 1, 2, 2)

    net = Linear()
    with torch.autocast("cpu", torch.bfloat16):
        penalty = gradient_penalty(net, torch.rand(5, 3, 4, 4))
    square = net.weight.detach().square().sum()
    torch.testing.assert_close(penalty, square.expand(5))
    penalty.mean().backward()
    torch.testing.assert_close(net.weight.grad, 2 * net.weight.detach())


def test_a_lazy_penalty_stands_for_the_steps_without_one():
    config = GanConfig(loss="hinge", r1_weight=10.0, r1_every=4, start_step=0)
    net = PatchDiscriminator(DiscriminatorConfig(width=4, layers=1))
    adversary = Adversary(config, net, DiscriminatorPass(net), None, 100)
    assert [adversary.penalises(step) for step in range(6)] == [True, *[False] * 3, True, False]
    zero = scores(0.0)
    terms = adversary.losses(Verdict(zero, zero, torch.tensor([0.5])))
    torch.testing.assert_close(terms["loss"], torch.tensor([1.0 + 0.5 * 10 * 4 * 0.5]))
    torch.testing.assert_close(terms["gan_discriminator"], torch.tensor([1.0]))


def test_the_adaptive_weight_is_a_ratio_of_lengths_with_a_clamp():
    gradients = torch.zeros(2, 3, 2)
    gradients[0, 0] = torch.tensor([3.0, 4.0])
    gradients[1, 2, 1] = 0.5
    torch.testing.assert_close(
        adaptive_weight(gradients, 1e4), torch.tensor(10.0), rtol=1e-5, atol=0
    )
    assert adaptive_weight(gradients, 2.0) == 2.0
    gradients[1] = 0.0
    assert adaptive_weight(gradients, 1e4) == 1e4, "no gradient to compare with"
    assert not adaptive_weight(gradients * float("nan"), 1e4).isfinite()


def test_the_learnt_log_variance_weighs_what_it_should():
    pixels = torch.zeros(2, 3, 8, 8)
    moments = torch.zeros(2, 8, 2, 2)
    logvar = torch.tensor(0.7, requires_grad=True)
    config = VaeLossConfig(learn_logvar=True, kl_weight=0.0)
    terms = vae_loss(pixels, pixels + 0.5, moments, config, None, logvar)
    torch.testing.assert_close(terms["loss"], torch.full((2,), 0.5 / math.exp(0.7) + 0.7))
    terms["loss"].mean().backward()
    torch.testing.assert_close(logvar.grad, torch.tensor(1 - 0.5 / math.exp(0.7)))


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_patch_is_as_large_as_it_is_said_to_be(layers):
    net = PatchDiscriminator(DiscriminatorConfig(width=4, layers=layers, norm="none"))
    side = min_px(layers)
    assert net(torch.zeros(1, 3, side, side)).shape == (1, 1, 1, 1)
    x = torch.rand(1, 3, 160, 160, requires_grad=True)
    out = net(x)
    middle = out.shape[-1] // 2
    out[0, 0, middle, middle].backward()
    seen = (x.grad.abs().sum((0, 1, 3)) > 0).sum()
    assert seen == {1: 16, 2: 34, 3: 70}[layers]  # Isola et al. 2017, appendix 6.1.2


def test_the_discriminator_has_the_parameters_of_pix2pix():
    """2,768,705 there, where it sees two pictures at once: 64 kernels of 3 channels more."""
    with torch.device("meta"):
        net = PatchDiscriminator(DiscriminatorConfig())
    assert sum(p.numel() for p in net.parameters()) == 2_768_705 - 64 * 3 * 16


def test_a_score_depends_on_its_own_picture_alone():
    net = PatchDiscriminator(DiscriminatorConfig(width=8, layers=2))
    x = torch.rand(4, 3, 24, 24)
    torch.testing.assert_close(net(x)[1:2], net(x[1:2]))


@pytest.mark.parametrize("kind", ["reconstruction", "perceptual", "equivariance", "logvar"])
def test_each_term_has_a_gradient_through_the_real_step(kind, tmp_path):
    """Raising its weight changes what reaches the encoder (logvar: what reaches itself)."""
    key = {
        "reconstruction": ("loss.perceptual=none", "loss.perceptual=none"),
        "perceptual": ("loss.perceptual_weight=0", "loss.perceptual_weight=1"),
        "equivariance": ("equivariance.weight=0", "equivariance.weight=1"),
        "logvar": ("loss.learn_logvar=true", "loss.learn_logvar=true"),
    }[kind]
    found = []
    for change in key:
        config = tiny(
            "vae",
            tmp_path / "run",
            "train.precision=fp32",
            "loss.perceptual=gradients",
            "equivariance.probability=1",
            change,
        )
        session, networks, loader = start(config)
        accumulate(session, networks, loader.batches(0), config, 0)
        found.append({n: p.grad for n, p in networks.passes.named_parameters()})
    if kind == "logvar":
        assert found[0]["logvar"].abs() > 0.1
    elif kind == "reconstruction":
        assert all(grad.abs().max() > 0 for grad in found[0].values())
    else:
        for name, grad in found[1].items():
            assert not grad.equal(found[0][name]), name


def test_turns_are_functions_of_the_sample_and_cover_what_was_asked():
    config = EquivarianceConfig(weight=1, probability=0.5, min_scale=0.25)
    ids = tuple(map(str, range(400)))
    turns = draw_turns(config, 8, 0, (0,) * 400, ids)
    assert turns == draw_turns(config, 8, 0, (0,) * 400, ids)
    assert turns != draw_turns(config, 8, 0, (1,) * 400, ids)
    alone = draw_turns(config, 8, 0, (0,), (ids[turns[5].row],))
    assert alone == (turns[5]._replace(row=0),)
    assert 0.4 < len(turns) / 400 < 0.55
    assert {turn.side for turn in turns} == set(range(2, 9))
    assert {turn.quarters for turn in turns} == {0, 1, 2, 3}
    still = EquivarianceConfig(weight=1, probability=1, min_scale=1, rotate=False)
    assert draw_turns(still, 8, 0, (0,) * 400, ids) == ()


def test_a_decoder_that_turns_and_shrinks_with_its_latents_costs_nothing():
    """One latent pixel per picture pixel and the identity as decoder; any other decoder pays."""
    x = torch.rand(3, 3, 8, 8)
    turns = (Turn(0, 1, 8), Turn(2, 3, 4), Turn(1, 2, 4))
    turned = [changed(x, group, group[0].side) for group in by_side(turns)]
    config = VaeLossConfig()
    distance = equivariance_distance(x, turned, turns, 1, config)
    assert distance.tolist() == [0, 0, 0]
    wrong = [pictures.flip(3) for pictures in turned]
    assert (equivariance_distance(x, wrong, turns, 1, config) > 0.01).all()
    only_one = equivariance_distance(x, wrong[1:], turns[:1], 1, config)
    assert only_one[0] > 0
    assert only_one[1:].tolist() == [0, 0]


def test_a_quarter_turn_brings_the_right_corner_to_the_top():
    x = torch.zeros(1, 1, 4, 4)
    x[0, 0, 0, 3] = 1.0
    assert changed(x, [Turn(0, 1, 4)], 4)[0, 0, 0, 0] == 1  # counter-clockwise
    flat = torch.full((1, 3, 8, 8), 0.3)
    torch.testing.assert_close(changed(flat, [Turn(0, 2, 3)], 3), flat[:, :, :3, :3])


def test_one_forward_gives_all_that_needs_parameters():
    config = load([str(TINY["vae"])], ["run.dir=unused"])
    vae = build_vae(config.model, 0)
    pixels, noise = torch.rand(2, 3, 32, 32), torch.zeros(2, 4, 8, 8)
    plain = VaePass(vae)(pixels, noise)
    assert plain.logvar is None
    assert plain.turned == ()
    rich = VaePass(vae, learn_logvar=True)(pixels, noise, (Turn(1, 2, 4), Turn(0, 0, 2)))
    assert rich.reconstruction.equal(plain.reconstruction)
    assert rich.logvar.shape == ()
    assert [tuple(picture.shape) for picture in rich.turned] == [(1, 3, 8, 8), (1, 3, 16, 16)]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("gan.loss=hinge",), "gan.start_step: 1000 is not before"),
        (("gan.loss=hinge", "gan.start_step=4"), "gan.discriminator_first_steps: 500 steps do not"),
        (("gan.loss=hinge", "gan.layers=4"), "4 layers need 48 pixels.*gan.layers=3"),
        (("gan.loss=hinge", "crop.side_px=16"), "3 layers need 24 pixels.*gan.layers=2"),
        (("loss.perceptual=lpips_alex", "crop.side_px=16"), "lpips_alex needs 31 pixels"),
        (("loss.perceptual=clip",), "clip compares features of a CLIP that you trained"),
        (("loss.perceptual=gradients", "loss.perceptual_path=x"), "gradients has no weights"),
        (("train.only=decoder",), "a random one is not worth keeping"),
        (
            ("train.only=decoder", "model.pretrained=x", "equivariance.weight=1"),
            "which train.only=decoder keeps",
        ),
        (("loss.perceptual=vgg",), "must be 'none', 'lpips', 'lpips_alex', 'gradients' or 'clip'"),
    ],
)
def test_what_cannot_be_trained_is_refused_with_what_can(overrides, message, tmp_path):
    with pytest.raises(LdmError, match=message):
        tiny("vae", tmp_path / "run", *overrides)


@pytest.mark.parametrize("name", ["dit", "unet"])
def test_a_denoiser_has_no_decoder_to_train_alone(name, tmp_path):
    with pytest.raises(LdmError, match="only a VAE has a decoder"):
        tiny(name, tmp_path / "run", "train.only=decoder")
    with pytest.raises(LdmError, match="a random VAE has no weights"):
        tiny(name, tmp_path / "run", "vae.random.pretrained=x")
