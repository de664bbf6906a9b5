"""A VAE that begins with published weights: all of it, or its decoder alone."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from recipes import ROOT, assert_bitwise_equal, tiny
from safetensors.torch import load_file
from test_training import stop_after

from ldm.build import build_vae, load_vae
from ldm.checkpoint import save_module
from ldm.config.files import load
from ldm.config.schema import VaeRef
from ldm.errors import ExitCode, LdmError
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.autoencoder_config import AutoencoderConfig
from ldm.training.vae import train_vae

DECODER = ("train.only=decoder", "optim.weight_decay=0.1")


@pytest.fixture
def published(tmp_path):
    """A diffusers VAE directory with one scale and one shift, as Stable Diffusion 3 has them."""
    config = tiny("vae", tmp_path / "unused").model
    vae = build_vae(config, 5)
    facts = replace(vae.config, scaling_factor=1.5305, shift_factor=0.0609)
    save_module(tmp_path / "published", dict(vae.state_dict()), facts.to_diffusers())
    return tmp_path / "published"


def weights(folder):
    return load_file(Path(folder) / "diffusion_pytorch_model.safetensors")


def config_of(folder):
    return json.loads((Path(folder) / "config.json").read_text())


def test_training_the_decoder_leaves_the_latents_as_they_were_published(tmp_path, published):
    last = train_vae(tiny("vae", tmp_path / "run", f"model.pretrained={published}", *DECODER))
    before, after = weights(published), weights(last / "vae")
    assert before.keys() == after.keys()
    for name, value in before.items():
        same = after[name].equal(value)
        assert same == name.startswith(("encoder.", "quant_conv.")), name
    assert config_of(last / "vae") == config_of(published)
    pixels, noise = torch.rand(2, 3, 32, 32), torch.randn(2, 4, 8, 8)
    old, new = load_vae(VaeRef(path=str(published)), 0), load_vae(VaeRef(path=str(last)), 0)
    assert new.latents(new.moments(pixels), noise).equal(old.latents(old.moments(pixels), noise))


def test_training_all_of_it_measures_the_latents_anew(tmp_path, published):
    """A scale and shift that belonged to other latents must not stay beside the measured ones."""
    last = train_vae(tiny("vae", tmp_path / "run", f"model.pretrained={published}"))
    found = config_of(last / "vae")
    assert found["scaling_factor"] == 1.0
    assert found["shift_factor"] is None
    assert len(found["latents_std"]) == 4
    changed = [n for n, v in weights(published).items() if not weights(last / "vae")[n].equal(v)]
    assert any(name.startswith("encoder.") for name in changed)


def test_it_begins_with_the_published_weights_and_is_resumed_bit_for_bit(
    tmp_path, published, monkeypatch
):
    given = (f"model.pretrained={published}", *DECODER)
    begun = build_vae(tiny("vae", tmp_path / "x", *given).model, 0)
    assert all(begun.state_dict()[n].equal(v) for n, v in weights(published).items())
    assert all(p.requires_grad for p in begun.parameters())
    whole = train_vae(tiny("vae", tmp_path / "whole", *given))
    config = tiny("vae", tmp_path / "stopped", *given)
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(LdmError, match="saved"):
            train_vae(config)
    assert_bitwise_equal(train_vae(config), whole)


def test_another_architecture_is_refused_with_its_keys(tmp_path, published):
    other = ("model.latent_channels=8", "model.block_out_channels=[16,16,16,32]")
    with pytest.raises(LdmError) as caught:
        train_vae(tiny("vae", tmp_path / "run", f"model.pretrained={published}", *other))
    assert caught.value.code == ExitCode.CONFIG
    assert "model.latent_channels=4 model.block_out_channels=[16, 16, 32]" in str(caught.value)


def test_an_autoencoder_that_is_not_ours_to_train_is_refused_by_its_class(tmp_path):
    import diffusers

    other = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
    )
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(LdmError, match="is a AutoencoderTiny, which cannot be trained") as caught:
        train_vae(tiny("vae", tmp_path / "run", f"model.pretrained={tmp_path / 'other'}"))
    assert caught.value.where == "model.pretrained"
    assert caught.value.code == ExitCode.CONFIG


def test_a_run_is_a_published_vae_too(tmp_path):
    """Its statistics stay as they are, on other data too."""
    first = train_vae(tiny("vae", tmp_path / "one"))
    other = (*DECODER, "data.count=12")
    last = train_vae(tiny("vae", tmp_path / "two", f"model.pretrained={tmp_path / 'one'}", *other))
    assert config_of(last / "vae") == config_of(first / "vae")


@pytest.mark.parametrize(("name", "factor"), [("f4", 4), ("f8", 8), ("f16", 16)])
def test_the_shipped_sizes_have_the_latents_that_they_are_named_after(name, factor):
    path = ROOT / f"configs/vae/{name}.yaml"
    model = load([str(path)]).model
    values = model.model_dump(exclude={"pretrained"})
    with torch.device("meta"):
        vae = AutoencoderKL(AutoencoderConfig(**values))
        moments = vae.moments(torch.zeros(1, 3, 256, 256))
        side = 256 // factor
        assert moments.shape == (1, 2 * model.latent_channels, side, side)
        assert vae.decode_raw(moments[:, : model.latent_channels]).shape == (1, 3, 256, 256)
    count = sum(p.numel() for p in vae.parameters()) / 1e6
    assert f"{count:.0f} M parameters" in path.read_text()
    assert yaml.safe_load(path.read_text())["gan"]["loss"] == "hinge"
    if name == "f8":
        assert sum(p.numel() for p in vae.parameters()) == 83_653_863  # Stable Diffusion's
