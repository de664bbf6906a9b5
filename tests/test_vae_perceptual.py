"""Perceptual distances: parity with the `lpips` package, gradients, and weights that are found."""

import json
import re
from dataclasses import replace

import pytest
import torch
from recipes import ROOT, tiny
from torch import nn
from vae_ranks import start

from ldm import storage
from ldm.build import build_perceptual, seeded
from ldm.checkpoint import save_tensors
from ldm.checkpoint.perceptual_files import save_vision_tower
from ldm.checkpoint.pickles import load_pickle_tensors
from ldm.config.files import load
from ldm.errors import ExitCode, LdmError
from ldm.models.perceptual import Lpips, MultiScaleGradients, VisionFeatures, unit
from ldm.training import clip_run
from ldm.training.vae import train_vae
from ldm.training.vae_step import accumulate


def pictures(count=2, side=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, side, side, generator=generator) * 2 - 1


def random_lpips(network="alex"):
    """Random weights; the heads are positive, as trained ones are."""
    net = seeded(lambda: Lpips(network), 3)
    for name, weight in net.named_parameters():
        if name.startswith("lin"):
            weight.abs_()
    return net


@pytest.fixture
def alex(tmp_path):
    save_tensors(tmp_path / "alex.safetensors", random_lpips().state_dict())
    return tmp_path / "alex.safetensors"


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("network", ["vgg", "alex"])
def test_lpips_equals_the_package_on_equal_weights(network):
    lpips = pytest.importorskip("lpips")
    theirs = seeded(lambda: lpips.LPIPS(net=network, pnet_rand=True, verbose=False), 0)
    weights = {}
    for name, value in theirs.state_dict().items():
        if name.startswith("net."):
            weights[re.sub(r"net\.slice\d+\.", "features.", name)] = value
        elif re.match(r"lin\d", name):
            weights[name] = value
    ours = Lpips(network)
    ours.load_state_dict(weights)
    x, x_hat = pictures(), pictures(seed=1).requires_grad_()
    expected = theirs(x_hat, x).flatten()
    found = ours(x_hat, x)
    assert found.shape == (2,)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    (slope,) = torch.autograd.grad(expected.sum(), x_hat)
    torch.testing.assert_close(
        *torch.autograd.grad(found.sum(), x_hat), slope, rtol=1e-4, atol=1e-8
    )


def vision_tower():
    from transformers import CLIPVisionConfig, CLIPVisionModel

    shape = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=1,
        image_size=32,
        patch_size=8,
    )
    return seeded(lambda: CLIPVisionModel(shape), 0)


DISTANCES = {
    "lpips": lambda: random_lpips("vgg"),
    "lpips_alex": random_lpips,
    "gradients": MultiScaleGradients,
    "clip": lambda: VisionFeatures(vision_tower()),
}


@pytest.mark.parametrize("kind", DISTANCES)
def test_a_distance_is_zero_at_home_and_grows_with_blur(kind):
    distance, x = DISTANCES[kind](), pictures()
    assert distance(x, x).tolist() == [0, 0]
    blurred = [nn.functional.avg_pool2d(x, size, 1, size // 2) for size in (3, 7)]
    slight, strong = (distance(y, x) for y in blurred)
    assert (slight > 0).all()
    assert (strong > slight).all()
    torch.testing.assert_close(distance(blurred[1][1:], x[1:]), strong[1:], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", DISTANCES)
def test_its_gradient_is_finite_on_flat_pictures_too_and_never_in_its_weights(kind):
    distance = DISTANCES[kind]()
    if hasattr(distance, "features"):
        for name, weight in distance.named_parameters():
            if name.endswith("bias"):
                weight.fill_(-10.0)  # all features die
    x_hat = torch.zeros(1, 3, 64, 64, requires_grad=True)
    distance(x_hat, pictures(1)).sum().backward()
    assert x_hat.grad.isfinite().all()
    assert all(p.grad is None and not p.requires_grad for p in distance.parameters())


def test_features_that_are_all_zero_have_no_direction_and_no_gradient():
    x = torch.zeros(1, 4, 2, 2, requires_grad=True)
    unit(x).sum().backward()
    assert x.grad.isfinite().all()
    torch.testing.assert_close(unit(torch.full((1, 4, 1, 1), 3.0)), torch.full((1, 4, 1, 1), 0.5))


def test_gradients_are_those_of_a_ramp():
    """x_hat - x is a ramp of slope s across: the mean gradient is s at the first scale, and twice
    as much at each coarser one, whose pixels are twice as wide."""
    ramp = 0.01 * torch.arange(16.0).expand(1, 3, 16, 16)
    for scales, expected in ((1, 0.01), (2, 0.015), (3, (0.01 + 0.02 + 0.04) / 3)):
        found = MultiScaleGradients(scales)(ramp, torch.zeros_like(ramp))
        torch.testing.assert_close(found, torch.tensor([expected]))


def test_pictures_that_lpips_cannot_see_are_refused():
    for shape in ((1, 3, 15, 64), (1, 4, 64, 64)):
        with pytest.raises(LdmError, match="3 channels and sides of 16 pixels"):
            Lpips("vgg")(torch.zeros(shape), torch.zeros(shape))


def test_missing_weights_are_named_with_where_they_belong(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    for path in (None, str(tmp_path)):
        with pytest.raises(LdmError) as caught:
            build_perceptual("lpips", path, "cpu")
        text = str(caught.value)
        assert caught.value.code == ExitCode.IO
        assert str(tmp_path / "cache/hub/checkpoints" if path is None else tmp_path) in text
        for word in ("vgg16-397923af.pth", "loss.perceptual=gradients", "loss.perceptual=clip"):
            assert word in text
    with pytest.raises(LdmError, match="unknown perceptual loss 'lpipz'"):
        build_perceptual("lpipz", None, "cpu")


def test_torchvisions_file_is_found_in_the_cache_and_takes_the_packages_heads(
    tmp_path, monkeypatch
):
    pytest.importorskip("lpips")
    folder = tmp_path / "hub/checkpoints"
    folder.mkdir(parents=True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    trunk = {n: v for n, v in random_lpips().state_dict().items() if n.startswith("features.")}
    classifier = {"classifier.1.weight": torch.zeros(2, 2)}
    torch.save(trunk | classifier, folder / "alexnet-owt-7be5be79.pth")
    found = build_perceptual("lpips_alex", None, "cpu")
    assert found.get_parameter("features.0.weight").equal(trunk["features.0.weight"])
    head = found.get_parameter("lin0.model.1.weight")
    assert (head >= 0).all()
    assert head.sum() > 0
    by_path = build_perceptual("lpips_alex", str(folder / "alexnet-owt-7be5be79.pth"), "cpu")
    assert by_path(pictures(), pictures(seed=1)).equal(found(pictures(), pictures(seed=1)))


def test_weights_of_another_network_are_refused(alex):
    with pytest.raises(LdmError, match="these weights do not fit Lpips"):
        build_perceptual("lpips", str(alex), "cpu")


class Evil:
    def __reduce__(self):
        return (print, ("code ran",))


@pytest.mark.parametrize("content", [{"a": Evil()}, [1, 2], {"a": "b"}, None])
def test_a_pickle_that_is_not_plain_tensors_is_refused_and_runs_nothing(content, tmp_path, capsys):
    path = tmp_path / "weights.pth"
    if content is None:
        path.write_bytes(b"nothing")
    else:
        torch.save(content, path)
    with pytest.raises(LdmError) as caught:
        load_pickle_tensors(path)
    assert caught.value.code == ExitCode.IO
    assert str(path) in str(caught.value)
    assert "code ran" not in capsys.readouterr().out


def test_a_training_checkpoint_gives_the_tensors_of_its_state_dict(tmp_path):
    torch.save({"global_step": 3, "state_dict": {"w": torch.ones(2)}}, tmp_path / "a.ckpt")
    found = load_pickle_tensors(tmp_path / "a.ckpt")
    assert {name: value.tolist() for name, value in found.items()} == {"w": [1, 1]}
    with pytest.raises(LdmError, match="no such file"):
        load_pickle_tensors(tmp_path / "b.ckpt")


@pytest.mark.parametrize("kind", ["lpips_alex", "clip"])
def test_the_perceptual_term_moves_every_weight_of_the_vae(kind, tmp_path, alex):
    path = alex
    if kind == "clip":
        path = tmp_path / "clip"
        path.mkdir()
        save_vision_tower(path, vision_tower())
    found = []
    for weight in (0, 1):
        config = tiny(
            "vae",
            tmp_path / "run",
            f"loss.perceptual={kind}",
            f"loss.perceptual_path={path}",
            f"loss.perceptual_weight={weight}",
            "train.precision=fp32",
        )
        session, networks, loader = start(config)
        values = accumulate(session, networks, loader.batches(0), config, 0)
        assert values["perceptual"] > 0
        found.append({n: p.grad for n, p in networks.passes.named_parameters()})
    assert all(not grad.equal(found[0][name]) for name, grad in found[1].items())


def test_the_vision_tower_of_train_clip_serves_a_vae(tmp_path, monkeypatch):
    quick = ("train.steps=2", "optim.warmup_steps=0", "data.count=40", "train.batch_size=8")
    small = ("model.width=32", "model.layers=1", "model.vision_layers=2", "data.image_px=32")
    clip = tmp_path / "clip"
    full = clip_run.settings_of
    monkeypatch.setattr(clip_run, "settings_of", lambda c: replace(full(c), recall_steps=2))
    config = load([str(ROOT / "configs/shapes/clip.yaml")], [f"run.dir={clip}", *quick, *small])
    clip_run.train_clip_run(config)
    storage.verify(clip)
    distance = build_perceptual("clip", str(clip), "cpu")
    assert (distance(pictures(), pictures(seed=1)) > 0).all()
    train_vae(tiny("vae", tmp_path / "vae", "loss.perceptual=clip", f"loss.perceptual_path={clip}"))
    rows = map(json.loads, storage.read_lines(tmp_path / "vae/metrics.jsonl"))
    assert all(row["perceptual"] > 0 for row in rows)
    with pytest.raises(LdmError, match="earlier versions kept no vision tower"):
        build_perceptual("clip", str(tmp_path), "cpu")


def test_a_run_does_not_go_on_with_another_perceptual_loss(tmp_path, alex):
    options = ("loss.perceptual=lpips_alex", f"loss.perceptual_path={alex}", "train.batch_size=2")
    train_vae(tiny("vae", tmp_path / "run", *options, "train.steps=2"))
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(alex.read_bytes())
    elsewhere = (*options, f"loss.perceptual_path={moved}")
    train_vae(tiny("vae", tmp_path / "run", *elsewhere, "train.steps=3"))  # the same weights
    save_tensors(alex, {n: v * 1.1 for n, v in random_lpips().state_dict().items()})
    with pytest.raises(LdmError, match="weights of the perceptual loss differ") as caught:
        train_vae(tiny("vae", tmp_path / "run", *options, "train.steps=4"))
    assert caught.value.code == ExitCode.CONFIG
