"""Every way to condition a DiT: what it is told arrives, and each way of running it agrees."""

import pytest
import torch

from ldm.errors import LdmError
from ldm.models.dit import DiT, DiTConfig
from ldm.models.dit_config import CONDITIONINGS
from ldm.types import Prepares, TextEmbedding

SMALL = {
    "in_channels": 4,
    "patch_size": 2,
    "hidden_size": 48,
    "num_layers": 2,
    "head_dim": 16,
    "text_dim": 12,
}
EXTRAS = {
    "text": {},
    "text and pooled": {"pooled_dim": 6},
    "labels": {"num_classes": 5, "text_dim": None},
    "text and labels": {"num_classes": 5},
    "rotary": {"positions": "rope", "base_size": 4, "rope_scaling": "ntk"},
    "learned": {"positions": "learned", "base_size": 4, "qk_norm": None},
}
VARIANTS = [
    pytest.param({"conditioning": name, **extra}, id=f"{name}, {what}")
    for name in CONDITIONINGS
    for what, extra in EXTRAS.items()
]
every_variant = pytest.mark.parametrize("changes", VARIANTS)


def net_of(changes, size=0.15):
    torch.manual_seed(1)
    net = DiT(DiTConfig(**{**SMALL, **changes}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in net.parameters():
            weight.add_(size * torch.randn(weight.shape, generator=generator))
    return net


def told(changes, batch=2, length=5, seed=0):
    """Tokens of which the second prompt has three, and a pooled vector or one-hot label."""
    generator = torch.Generator().manual_seed(seed)
    mask = (
        torch.arange(length) < torch.tensor([length, 3] * (batch // 2) + [4] * (batch % 2))[:, None]
    )
    pooled = torch.randn(batch, 6, generator=generator)
    if "num_classes" in changes:
        pooled = torch.eye(6)[torch.arange(batch) % 5 + seed % 2]
    tokens = torch.randn(batch, length, 12, generator=generator)
    return TextEmbedding(tokens, mask, pooled)


def latents(batch=2, height=8, width=12):
    generator = torch.Generator().manual_seed(7)
    times = torch.tensor([5.0, 700.0, 412.5])[:batch]
    return torch.randn(batch, 4, height, width, generator=generator), times


@every_variant
def test_the_first_prediction_is_zero_and_every_parameter_can_learn(changes):
    net = DiT(DiTConfig(**{**SMALL, **changes}))
    x, t = latents()
    assert not net(x, t, told(changes)).any()
    net = net_of(changes)
    # a row of labels learns from its own label only
    net(x, t, told(changes)).square().sum().backward()
    assert [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


@every_variant
def test_time_and_all_that_is_told_change_the_prediction(changes):
    net = net_of(changes)
    x, t = latents()
    one, text = net(x, t, told(changes)), told(changes)
    assert not one.allclose(net(x, t + 150, text), atol=1e-3)
    other = told(changes, seed=1)
    if changes.get("text_dim", 12) is not None:
        words = TextEmbedding(other.tokens, text.mask, text.pooled)
        assert not one.allclose(net(x, t, words), atol=1e-3)
    if "num_classes" in changes or "pooled_dim" in changes:
        pooled = TextEmbedding(text.tokens, text.mask, other.pooled)
        assert not one.allclose(net(x, t, pooled), atol=1e-3)


@every_variant
def test_padding_never_matters_and_samples_do_not_see_each_other(changes):
    net = net_of(changes)
    (x, t), text = latents(), told(changes)
    generator = torch.Generator().manual_seed(5)
    longer = TextEmbedding(
        torch.cat([text.tokens, 1e3 * torch.randn(2, 4, 12, generator=generator)], 1),
        torch.nn.functional.pad(text.mask, (0, 4)),
        text.pooled,
    )
    both = net(x, t, text)
    torch.testing.assert_close(net(x, t, longer), both, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(net(x[1:], t[1:], text[1:]), both[1:], atol=1e-5, rtol=1e-5)


@every_variant
def test_recomputing_activations_gives_the_same_gradients(changes):
    (x, t), text = latents(), told(changes)
    net, gradients = net_of(changes), []
    for checkpointing in (False, True):
        net.gradient_checkpointing = checkpointing
        net.zero_grad()
        net(x, t, text).square().sum().backward()
        gradients.append([p.grad.clone() for p in net.parameters()])
    for one, two in zip(*gradients, strict=True):
        assert one.equal(two)


@every_variant
def test_what_is_prepared_once_gives_the_predictions_of_plain_calls(changes):
    net = net_of(changes).requires_grad_(False)
    assert isinstance(net, Prepares)
    (x, _), text = latents(), told(changes)
    ready = net.prepare(text, [5.0, 700.0])
    for clock in (5.0, 700.0, 33.25):  # the last was not announced
        plain = net(x, torch.full((2,), clock), text)
        kept = net(x, torch.full((2,), float("nan")), ready(clock))  # nothing is computed from it
        torch.testing.assert_close(kept, plain, atol=1e-5, rtol=1e-5)


def test_preparing_multiplies_each_weight_once_for_all_clocks():
    """Products with weights that depend on time or text alone: as many as layers, at no step."""
    net = net_of({"pooled_dim": 6}).requires_grad_(False)
    (x, t), text = latents(), told({})
    calls = []
    for name, module in net.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    ready = net.prepare(text, [float(i) for i in range(20)])
    once = [name for name in calls if "modulation" in name or "to_kv" in name or "time" in name]
    assert len(once) == 2 + 2 + 1 + 2  # modulations, keys and values, the last norm, time
    calls.clear()
    net(x, t, ready(3.0))
    assert not [n for n in calls if "modulation" in n or "to_kv" in n or "time" in n or "text" in n]


def test_modulations_too_large_to_keep_are_computed_when_their_clock_comes(monkeypatch):
    monkeypatch.setattr("ldm.models.dit.KEPT_BYTES", 10)
    net = net_of({}).requires_grad_(False)
    (x, _), text = latents(), told({})
    plain = net(x, torch.full((2,), 5.0), text)
    kept = net(x, torch.zeros(2), net.prepare(text, [5.0])(5.0))
    torch.testing.assert_close(kept, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_half_precision_is_near_float32(conditioning, dtype):
    changes = {"conditioning": conditioning, "positions": "rope", "num_classes": 5}
    net = net_of(changes, size=0.05)
    (x, t), text = latents(), told(changes)
    wanted = net(x, t, text)
    half = net.to(dtype)
    got = half(x.to(dtype), t, text.to("cpu", dtype))
    assert got.dtype == dtype
    # the mean error of a dozen rounded operations, 2^-8 each in bf16
    assert (got.float() - wanted).square().mean() < 1e-3 * wanted.square().mean()
    kept = half(x.to(dtype), t * 0, half.prepare(text.to("cpu", dtype), [5.0])(5.0))
    plain = half(x.to(dtype), t * 0 + 5, text.to("cpu", dtype))
    assert (kept - plain).float().square().mean() < 1e-3 * wanted.square().mean()


def test_a_text_encoder_that_does_not_fit_is_named():
    x, t = latents()
    for changes, text, named in (
        ({}, TextEmbedding(torch.randn(2, 5, 13), torch.ones(2, 5) > 0), "width 12.*given 13"),
        ({"pooled_dim": 6}, TextEmbedding(*list(vars(told({})).values())[:2]), "no pooled vector"),
        ({"num_classes": 7}, told({}), "width 8.*given 6"),
    ):
        with pytest.raises(LdmError, match=named):
            net_of(changes)(x, t, text)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"conditioning": "adaln_one"}, "adaln_zero, adaln"),
        ({"conditioning": "in_context", "local_conv": True}, "local_conv"),
        ({"num_classes": 5, "pooled_dim": 6}, "both claim"),
        ({"positions": "learned"}, "base_size"),
        ({"positions": "rope", "hidden_size": 36, "head_dim": 18}, "multiples of 4"),
        ({"rope_scaling": "ntk"}, "rope_scaling"),
        ({"conditioning": "cross_attention", "text_projection": "none"}, "text_projection"),
        ({"size_conditions": True}, "adaln_single"),
    ],
)
def test_combinations_that_mean_nothing_are_refused(changes, named):
    with pytest.raises(LdmError, match=named):
        DiTConfig(**{**SMALL, **changes})


@every_variant
def test_a_configuration_survives_its_file(changes):
    config = DiTConfig(**{**SMALL, **changes})
    assert DiTConfig.from_json(config.to_json()) == config


def test_a_file_of_before_the_variants_is_read_as_what_it_was():
    old = {
        "_class_name": "LdmDiT",
        "in_channels": 4,
        "out_channels": None,
        "patch_size": 2,
        "hidden_size": 384,
        "num_layers": 12,
        "head_dim": 64,
        "mlp_ratio": 4.0,
        "text_dim": 768,
        "pooled_dim": None,
        "local_conv": False,
        "qk_norm": "layer_norm",
    }
    assert DiTConfig.from_json(old) == DiTConfig(in_channels=4)
