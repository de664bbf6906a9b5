"""A DiT from its configuration: sizes, labels, masking; training does not depend on cuts."""

import json

import numpy as np
import pytest
import torch
from recipes import assert_bitwise_equal, state, tiny

from ldm.build import build_denoiser, load_text
from ldm.config.dit import DIT_SIZES as NAMED
from ldm.config.dit import DitConfig
from ldm.diffusion.core import Diffusion
from ldm.diffusion.loss import diffusion_loss
from ldm.diffusion.prediction import PREDICTIONS
from ldm.diffusion.process import PROCESSES
from ldm.errors import ExitCode, LdmError
from ldm.inference.pipeline import Pipeline
from ldm.models.dit_config import DIT_SIZES
from ldm.models.text import ClassTextEncoder
from ldm.training.diffusion import train_diffusion
from ldm.training.masking import training_routing
from ldm.training.session import Session
from ldm.types import Batch, TextEmbedding

MASK = ("model.masking.kind=mask", "model.masking.share=0.5")
ROUTE = ("model.masking.kind=route", "model.masking.last=2", "model.num_layers=3")


def test_a_named_size_is_that_of_the_paper_and_given_keys_win():
    for name, size in DIT_SIZES.items():
        fields = {"hidden_size": size.hidden_size, "num_layers": size.num_layers}
        assert NAMED[name] == fields | {"head_dim": size.hidden_size // size.heads}
        config = DitConfig(size=name)
        assert config.model_dump(include=set(fields)) == fields
    assert DitConfig(size="XL", num_layers=2).num_layers == 2
    assert DitConfig(size="XL", num_layers=2).head_dim == 72
    assert DitConfig().hidden_size == 384


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["model.size=XXL"], "model.size"),
        (["model.positions=learned"], "model.base_size"),
        (["model.rope_scaling=ntk"], "model.rope_scaling"),
        (["model.conditioning=in_context", "model.local_conv=true"], "model.local_conv"),
        ([*MASK, "model.local_conv=true"], "model.masking.kind"),
        ([*MASK, "model.masking.last=1"], "model.masking.last"),
        (["model.masking.kind=route"], "model.masking.last"),
        ([*ROUTE, "model.masking.first=2"], "model.masking.first"),
        ([*ROUTE, "model.masking.last=4"], "model.masking.first"),
        ([*MASK, "model.masking.share=1"], "model.masking.share"),
        (["model.diffusers=true"], "model.conditioning"),
        (["text.classes=[a, b]", "text.path=x"], "text.classes"),
    ],
)
def test_settings_that_mean_nothing_are_refused_by_key(overrides, named, tmp_path):
    with pytest.raises(LdmError, match=named):
        tiny("dit", tmp_path, *overrides)


def built(config, classes=()):
    text = load_text(config.text, ["a cat", "a dog"], 0)
    return build_denoiser(config.model, channels=4, text=text, seed=0), text


def test_labels_reach_the_network_and_nothing_else_does(tmp_path):
    net, text = built(tiny("dit", tmp_path, "text.classes=captions"))
    assert text.classes == ("a cat", "a dog")
    assert (net.config.num_classes, net.config.text_dim) == (2, None)
    assert net.labels.weight.shape == (3, 64)


@pytest.mark.parametrize("labels", [True, False])
def test_a_model_for_diffusers_has_a_class_there(labels, tmp_path):
    wishes = ["model.diffusers=true"]
    if labels:
        wishes += ["text.classes=captions"]
    else:
        wishes += ["model.conditioning=adaln_single"]
    net, _ = built(tiny("dit", tmp_path, *wishes))
    kind = "DiTTransformer2DModel" if labels else "PixArtTransformer2DModel"
    assert net.config.to_diffusers(8)["_class_name"] == kind


def test_a_class_is_named_or_numbered_and_no_words_are_no_class():
    encoder = ClassTextEncoder(["cat", "dog", "7"])
    text = encoder(["dog", "1", "", "7", " cat "])
    assert text.pooled.argmax(1).tolist() == [1, 1, 3, 2, 0]
    assert text.tokens[:, 0].equal(text.pooled)
    assert encoder.null().pooled.equal(text.pooled[2:3])
    assert text.to("cpu", torch.bfloat16).pooled.float().equal(text.pooled)
    with pytest.raises(LdmError, match="use dog"):
        encoder(["dogs"])
    with pytest.raises(LdmError, match="unknown class '3'"):
        encoder(["3"])
    with pytest.raises(LdmError, match="different"):
        ClassTextEncoder(["cat", "cat"])


@pytest.mark.parametrize(
    "wishes",
    [
        ("text.classes=captions",),
        ("model.conditioning=adaln_single", "model.diffusers=true", *MASK),
        ("model.conditioning=in_context", "model.positions=rope"),
        ("model.conditioning=cross_attention", "text.classes=captions"),
    ],
    ids=lambda wishes: " ".join(wishes),
)
def test_a_trained_model_is_read_back_and_draws(wishes, tmp_path):
    config = tiny("dit", tmp_path / "run", *wishes, "train.steps=2")
    last = train_diffusion(config)
    pipeline = Pipeline.from_pretrained(tmp_path / "run")
    saved = {name.partition(":")[2]: value for name, value in state(last / "transformer").items()}
    assert saved.keys() == pipeline.net.state_dict().keys()
    caption = "a cat" if pipeline.encoder.kind != "classes" else pipeline.encoder.classes[3]
    one, two = (pipeline([caption], seed=3, steps=2, cfg_scale=2.0)[0] for _ in range(2))
    assert np.array_equal(np.asarray(one), np.asarray(two))


def batch_of(ids, epoch=0):
    ids = tuple(ids)
    return Batch(ids=ids, weight=torch.ones(len(ids)), epochs=(epoch,) * len(ids))


def test_the_kept_tokens_depend_on_seed_epoch_and_sample_alone(tmp_path):
    config = tiny("dit", tmp_path, *MASK, "model.masking.share=0.7")
    x0 = torch.zeros(4, 4, 8, 8)
    whole = training_routing(batch_of("abcd"), x0, config, 0).kept
    parts = [training_routing(batch_of(ids), x0[:2], config, 5).kept for ids in ("ab", "cd")]
    assert torch.cat(parts).equal(whole), "however ranks and micro-batches share the work"
    assert whole.shape == (4, 19)
    assert (whole.diff() > 0).all()
    assert not training_routing(batch_of("abcd", epoch=1), x0, config, 0).kept.equal(whole)
    assert not whole[0].equal(whole[1])
    many = training_routing(batch_of(map(str, range(2000))), x0, config, 0).kept
    often = many.flatten().bincount(minlength=64) / 2000
    # a share of 19 / 64 at every place: 5 deviations of 2000 draws
    assert (often - 19 / 64).abs().max() < 5 * (19 / 64 * 45 / 64 / 2000) ** 0.5


def test_the_last_steps_see_all_tokens(tmp_path):
    config = tiny("dit", tmp_path, *MASK, "model.masking.until=0.5", "train.steps=10")
    x0 = torch.zeros(1, 4, 8, 8)
    seen = [training_routing(batch_of("a"), x0, config, step) is None for step in range(10)]
    assert seen == [False] * 5 + [True] * 5


def test_the_loss_is_the_mean_over_the_kept_pixels():
    diffusion = Diffusion(PROCESSES["rectified_flow"], PREDICTIONS["x0"])
    generator = torch.Generator().manual_seed(0)
    x0, eps, said = (torch.randn(2, 3, 4, 4, generator=generator) for _ in range(3))
    said.requires_grad_()
    counted = torch.rand(2, 1, 4, 4, generator=generator) < 0.4
    text = TextEmbedding(torch.zeros(2, 1, 1), torch.ones(2, 1, dtype=torch.bool))
    losses = diffusion_loss(
        lambda *_: said, diffusion, x0, text, torch.tensor([0.3, 0.6]), eps, counted=counted
    )
    for row in range(2):
        errors = (said - x0)[row].square()[:, counted[row, 0]]
        torch.testing.assert_close(losses[row], errors.mean())
    losses.sum().backward()
    assert not said.grad[~counted.expand_as(said)].any()


@pytest.mark.parametrize("wishes", [MASK, ROUTE], ids=["mask", "route"])
def test_a_masked_run_stopped_and_resumed_equals_an_uninterrupted_one(
    wishes, tmp_path, monkeypatch
):
    whole = train_diffusion(tiny("dit", tmp_path / "whole", *wishes))
    config = tiny("dit", tmp_path / "stopped", *wishes)
    seen = iter(range(1, 100))
    with monkeypatch.context() as patch:
        patch.setattr(Session, "stopping", lambda self: next(seen) == 3)
        with pytest.raises(LdmError) as caught:
            train_diffusion(config)
    assert caught.value.code == ExitCode.SIGNALLED
    assert_bitwise_equal(train_diffusion(config), whole)


def test_a_masked_run_in_micro_batches_is_the_same_run(tmp_path):
    wishes = (*MASK, "train.precision=fp32")
    losses = []
    for parts in (1, 2):
        folder = tmp_path / str(parts)
        train_diffusion(tiny("dit", folder, *wishes, f"train.accumulation={parts}"))
        rows = (folder / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(row)["loss"] for row in rows if '"loss"' in row])
    assert len(losses[0]) == 6
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)  # sums in another order
