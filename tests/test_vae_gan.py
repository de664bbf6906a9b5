"""The adversary in real training steps: nothing leaks, nothing drifts, everything is resumed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from recipes import ROOT, assert_bitwise_equal, state, tiny
from safetensors.torch import load_file
from test_training import environment, stop_after
from torch import nn
from vae_ranks import EVERYTHING, GAN, gradients_of, run, start

from ldm.config.schema import VaeExperiment
from ldm.errors import LdmError
from ldm.training import vae_step
from ldm.training.vae import train_vae
from ldm.training.vae_gan import generator_loss
from ldm.training.vae_step import accumulate, inputs_of


def rows(run_dir):
    return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]


def begun(tmp_path, *overrides):
    """A run with everything on, about to make its first step, the adversary in full."""
    config = tiny("vae", tmp_path / "run", *EVERYTHING, *overrides)
    return (*start(config), config)


def test_no_gradient_of_one_network_reaches_the_other(tmp_path, monkeypatch):
    session, networks, loader, config = begun(tmp_path)
    after = []
    backward = session.accelerator.backward

    def recorded(loss):
        backward(loss)
        after.append(gradients_of(networks))

    monkeypatch.setattr(session.accelerator, "backward", recorded)
    accumulate(session, networks, loader.batches(0), config, 0)
    first, second = after  # the VAE's backward pass, then the discriminator's
    for name, gradient in first.items():
        if name.startswith("vae/"):
            assert second[name].equal(gradient), "the discriminator's loss changed the VAE's"
        else:
            assert gradient is None, "the VAE's loss left gradients in the discriminator"
            assert second[name] is not None


def test_the_discriminator_sees_reconstructions_that_are_cut_off(tmp_path):
    session, networks, loader, config = begun(tmp_path)
    given = inputs_of(next(loader.batches(0)), session, config, 0)
    fake = networks.trained(given.pixels, given.noise).reconstruction
    assert fake.requires_grad
    vae_step.judge(session, networks.adversary, given, fake, 0)["loss"].sum().backward()
    found = gradients_of(networks)
    assert all(gradient is None for name, gradient in found.items() if name.startswith("vae/"))


class Counted(nn.Module):
    """Stands where a distributed wrapper stands, and counts what goes through it."""

    def __init__(self, module):
        super().__init__()
        self.module, self.calls = module, 0

    def forward(self, *args):
        self.calls += 1
        return self.module(*args)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_both_networks_are_called_through_their_wrappers(tmp_path, accumulation):
    session, networks, loader, config = begun(tmp_path, f"train.accumulation={accumulation}")
    vae = networks.trained = Counted(networks.passes)
    judge = networks.adversary.passes = Counted(networks.adversary.passes)
    accumulate(session, networks, loader.batches(0), config, 0)
    assert (vae.calls, judge.calls) == (accumulation, accumulation)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_adaptive_weight_is_the_ratio_of_gradients_over_the_global_batch(
    tmp_path, accumulation
):
    """By hand: one plain pass over the whole batch, differentiated at the last layer."""
    options = ("gan.weight=0.25", "equivariance.weight=0", "loss.learn_logvar=false")
    session, networks, loader, config = begun(
        tmp_path, f"train.accumulation={accumulation}", *options
    )
    batches = loader.batches(0)
    given = [inputs_of(next(batches), session, config, 0) for _ in range(accumulation)]
    pixels, noise = (torch.cat([part[k] for part in given]) for k in (0, 1))
    x_hat = networks.passes.vae(pixels, noise)[0]
    reconstruction = (x_hat - pixels).abs().mean() + networks.perceptual(x_hat, pixels).mean()
    adversarial = generator_loss("hinge", networks.adversary.net(x_hat)).mean()
    layer = networks.passes.vae.decoder.conv_out.weight
    one, other = (
        torch.autograd.grad(term, layer, retain_graph=True)[0].norm()
        for term in (reconstruction, adversarial)
    )
    values = accumulate(session, networks, loader.batches(0), config, 0)
    torch.testing.assert_close(values["gan_weight"], 0.25 * one / (other + 1e-6))


def test_the_adaptive_weight_is_clamped_and_can_be_fixed(tmp_path):
    session, networks, loader, config = begun(tmp_path, "gan.max_adaptive_weight=1e-3")
    values = accumulate(session, networks, loader.batches(0), config, 0)
    assert float(values["gan_weight"]) == pytest.approx(0.5e-3)
    session, networks, loader, config = begun(tmp_path, "gan.adaptive=false", "gan.weight=0.3")
    assert accumulate(session, networks, loader.batches(0), config, 0)["gan_weight"] == 0.3


def test_the_adversarial_gradient_is_added_with_its_weight(tmp_path):
    """The gradient is linear in the weight, and the weight reaches every part of the VAE."""
    found = []
    for weight in (0.0, 1.0, 2.0):
        session, networks, loader, config = begun(
            tmp_path, "gan.adaptive=false", f"gan.weight={weight}"
        )
        accumulate(session, networks, loader.batches(0), config, 0)
        found.append(gradients_of(networks))
    none, one, two = found
    for name in none:
        if name.startswith("vae/vae."):
            difference = one[name] - none[name]
            # fp32 sums of other magnitudes
            torch.testing.assert_close(two[name] - none[name], 2 * difference, rtol=1e-3, atol=1e-5)
            assert difference.abs().max() > 1e-6, name
        elif name.startswith("discriminator/"):
            assert one[name].equal(none[name]), "how much it counts is not its own concern"


def test_the_discriminator_begins_first_and_its_verdict_counts_from_start_step_on(tmp_path):
    when = ("gan.start_step=3", "gan.discriminator_first_steps=2", "gan.ramp_steps=2")
    config = tiny(
        "vae", tmp_path / "run", *GAN, *when, "gan.adaptive=false", "run.keep_checkpoints=9"
    )
    train_vae(
        config.model_copy(update={"run": config.run.model_copy(update={"save_every_steps": 1})})
    )
    weights = [row["gan_weight"] for row in rows(tmp_path / "run")]
    assert weights == [0, 0, 0, 0.25, 0.5, 0.5]
    trained = ["gan_discriminator" in row for row in rows(tmp_path / "run")]
    assert trained == [False, True, True, True, True, True]
    steps = [
        {k: v for k, v in state(tmp_path / f"run/step-{n:08d}").items() if ":discriminator/" in k}
        for n in (1, 2, 3)
    ]
    assert all(len(step) > 5 for step in steps)
    assert all(steps[0][key].equal(fresh) for key, fresh in first_discriminator(config).items())
    assert not all(steps[0][key].equal(steps[1][key]) for key in steps[0])


def first_discriminator(config: VaeExperiment):
    networks = start(config)[1]
    return {
        f"state/tensors.safetensors:discriminator/{name}": value
        for name, value in networks.adversary.net.named_parameters()
    }


def test_the_rows_of_metrics_have_every_term_by_a_stable_name(tmp_path):
    train_vae(tiny("vae", tmp_path / "run", *EVERYTHING, "gan.r1_every=1"))
    names = {
        *("loss", "reconstruction", "kl", "perceptual", "logvar", "equivariance"),
        *("gan_generator", "gan_weight", "gan_discriminator", "gan_real", "gan_fake", "gan_r1"),
        *("gradient_norm", "learning_rate", "gan_gradient_norm", "gan_learning_rate"),
    }
    assert all(names <= row.keys() for row in rows(tmp_path / "run")[1:])


@pytest.mark.parametrize("stop", [1, 3])
def test_a_run_stopped_amid_the_game_and_resumed_equals_an_uninterrupted_one(
    stop, tmp_path, monkeypatch
):
    when = ("gan.start_step=2", "gan.discriminator_first_steps=1")
    config = tiny("vae", tmp_path / "whole", *EVERYTHING, *when)
    whole = train_vae(config)
    names = {key.partition(":")[2].partition("/")[0] for key in state(whole)}
    assert {"discriminator", "discriminator_optimizer"} <= names
    assert "state/tensors.safetensors:weights/logvar" in state(whole)
    config = tiny("vae", tmp_path / "stopped", *EVERYTHING, *when)
    with monkeypatch.context() as patch:
        stop_after(patch, stop)
        with pytest.raises(LdmError, match="saved"):
            train_vae(config)
    assert_bitwise_equal(train_vae(config), whole)


@pytest.mark.parametrize("poisoned", ["vae_loss", "opposition", "judge"])
def test_a_loss_that_is_not_finite_reaches_neither_network(poisoned, tmp_path, monkeypatch):
    real, calls = getattr(vae_step, poisoned), []

    def nan_in_the_third_step(*args):
        calls.append(1)
        terms = real(*args)
        factor = float("nan") if len(calls) == 3 else 1.0
        if isinstance(terms, dict):
            return terms | {"loss": terms["loss"] * factor}
        return terms * factor

    monkeypatch.setattr(vae_step, poisoned, nan_in_the_third_step)
    often = ("run.save_every_steps=1", "run.keep_checkpoints=9")
    train_vae(tiny("vae", tmp_path / "run", *EVERYTHING, *often))
    assert [row["skipped_steps"] for row in rows(tmp_path / "run")] == [0, 0, 1, 1, 1, 1]
    before, after, later = (
        load_file(tmp_path / f"run/step-{n:08d}/state/tensors.safetensors") for n in (2, 3, 4)
    )
    assert all(value.equal(after[name]) for name, value in before.items())
    for network in ("weights/", "discriminator/"):
        assert any(not later[n].equal(v) for n, v in after.items() if n.startswith(network))


def test_a_sample_set_aside_has_a_say_in_neither_network(tmp_path):
    found = []
    for grey in (-0.3, 0.8):
        session, networks, loader, config = begun(tmp_path)
        batch = next(loader.batches(0))
        batch.weight[1], batch.pixels[1] = 0.0, grey
        values = accumulate(session, networks, iter([batch]), config, 0)
        found.append(gradients_of(networks) | {name: values[name] for name in values})
    # 0 * 0.3 + x is x: nothing is left of it but the order of sums
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-7)


def test_ranks_and_micro_batches_give_the_gradients_of_one_process(tmp_path):
    """Two ranks, with one micro-batch each and with two, against one whole batch, adaptive weight
    and R1 and all; that the ranks agree bit for bit is checked inside."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29723"]
    done = subprocess.run(
        [sys.executable, *launcher, str(ROOT / "tests/vae_ranks.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, weights = run(tiny("vae", tmp_path / "one", *EVERYTHING))
    for accumulation in ("1", "2"):
        many = load_file(tmp_path / accumulation / "out.safetensors")
        adaptive = many.pop("gan_weight")
        expected = torch.tensor(weights)
        torch.testing.assert_close(adaptive[0], expected[0], rtol=1e-4, atol=0)  # sum orders
        torch.testing.assert_close(adaptive, expected, rtol=1e-2, atol=0)
        assert many.keys() == one.keys()
        for name, value in one.items():
            # Adam makes whole steps of tiny gradients, so weights are further apart after some
            bound = {"rtol": 1e-3, "atol": 1e-6 if name.startswith("gradient") else 3e-4}
            torch.testing.assert_close(
                many[name], value, **bound, msg=lambda m, n=name: f"{n}: {m}"
            )
