"""Adapters as runs: trained, resumed, drawn with, recorded, and read by diffusers."""

import diffusers
import pytest
import torch
from torch.testing import assert_close

from ldm import Pipeline
from ldm.checkpoint import load_tensors
from ldm.checkpoint.runs import find_checkpoint
from ldm.config.schema import OptimConfig
from ldm.errors import LdmError
from ldm.inference.images import read_request
from ldm.models.lora import FOLDER, WEIGHTS
from ldm.training.diffusion import train_diffusion
from tests import published
from tests.test_exchange_import import OBJECTIVE, PARTS, pretrained

SLOW = OptimConfig(learning_rate=1e-9)
DRAWN = {"steps": 2, "size": published.SIDE}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for family in ("sd1", "sd3"):
        getattr(published, family)().save_pretrained(root / family, safe_serialization=True)
    return root


def experiment(models, run, family="sd1", *more):
    own = ("lora.rank=4", "lora.alpha=8", "optim.learning_rate=0.1", "optim.warmup_steps=0")
    return pretrained(models / family, run, *PARTS[family], *OBJECTIVE[family], *own, *more)


@pytest.fixture(scope="module")
def run(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "lora"
    train_diffusion(experiment(models, folder))
    return folder


def test_the_run_draws_with_what_it_trained(models, run):
    base, trained = Pipeline.from_pretrained(models / "sd1"), Pipeline.from_pretrained(run)
    for name, value in base.net.state_dict().items():
        changed = not torch.equal(value, trained.net.state_dict()[name])
        assert changed == (".attn" in name and name.endswith("weight")), name
    assert len(trained("a red circle", cfg_scale=2.0, **DRAWN)) == 1


def test_training_that_begins_with_such_a_run_begins_with_its_adapters(models, run, tmp_path):
    config = experiment(models, tmp_path / "on", "sd1", f"model.path={run}", "lora=null")
    train_diffusion(config.model_copy(update={"optim": SLOW}))
    began, trained = Pipeline.from_pretrained(run), Pipeline.from_pretrained(tmp_path / "on")
    for name, value in began.net.state_dict().items():  # two steps of size 1e-9
        assert_close(trained.net.state_dict()[name], value, rtol=0, atol=1e-6)


def test_a_checkpoint_holds_the_adapters_and_links_the_network(run):
    step = find_checkpoint(run)
    linked = step / "unet" / "diffusion_pytorch_model.safetensors"
    assert linked.stat().st_ino == (run / "components" / "unet" / linked.name).stat().st_ino
    state = load_tensors(step / "state" / "tensors.safetensors")
    assert all("lora_" in name for name in state), "nothing of the network is saved again"


def test_diffusers_reads_the_adapters_of_a_run(models, run):
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(models / "sd1", safety_checker=None)
    pipe.load_lora_weights(find_checkpoint(run) / FOLDER)
    draw = torch.Generator().manual_seed(0)
    width = pipe.unet.config.cross_attention_dim
    x, tokens = torch.randn(1, 4, 16, 16, generator=draw), torch.randn(1, 7, width, generator=draw)
    theirs = pipe.unet(x, torch.tensor([500.0]), tokens).sample
    ours = diffusers.UNet2DConditionModel.from_pretrained(models / "sd1" / "unet")
    ours.load_state_dict(Pipeline.from_pretrained(run, cpu_kernels="plain").net.state_dict())
    assert_close(ours(x, torch.tensor([500.0]), tokens).sample, theirs, rtol=1e-4, atol=1e-5)


def test_a_resumed_run_is_the_same_run(models, tmp_path):
    own = ("sd1", "optim.schedule=constant", "run.save_every_steps=1")
    for folder, lengths in (("straight", [2]), ("resumed", [1, 2])):
        for steps in lengths:
            train_diffusion(experiment(models, tmp_path / folder, *own, f"train.steps={steps}"))
    one, two = (
        load_tensors(find_checkpoint(tmp_path / folder) / "state" / "tensors.safetensors")
        for folder in ("straight", "resumed")
    )
    assert one.keys() == two.keys()
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_a_run_whose_network_was_exchanged_is_not_resumed(models, tmp_path):
    published.sd1(seed=1).save_pretrained(tmp_path / "sd1", safe_serialization=True)
    train_diffusion(experiment(tmp_path, tmp_path / "run"))
    published.sd1(seed=2).unet.save_pretrained(tmp_path / "sd1" / "unet")
    with pytest.raises(LdmError, match="the denoiser differ"):
        train_diffusion(experiment(tmp_path, tmp_path / "run", "sd1", "train.steps=3"))


def test_adapters_are_given_to_a_model_by_file_and_recorded(models, run, tmp_path):
    adapters = find_checkpoint(run) / FOLDER
    half = Pipeline.from_pretrained(models / "sd1", lora=[f"{adapters}=0.5"])
    (saved,) = half("a red circle", **DRAWN).save(tmp_path)
    request, _, _ = read_request(saved)
    assert request.lora_path == f"{adapters.resolve() / WEIGHTS}=0.5"
    assert request.lora.endswith("=0.5")
    again = Pipeline.from_pretrained(models / "sd1", lora=request.lora_path.splitlines())
    assert again.draw([request])[0].tobytes() == half.draw([request])[0].tobytes()
    with pytest.raises(LdmError, match="made with the adapters"):
        Pipeline.from_pretrained(models / "sd1").draw([request])


def test_whole_strength_is_what_the_run_draws(models, run):
    given = Pipeline.from_pretrained(models / "sd1", lora=[str(find_checkpoint(run) / FOLDER)])
    trained = Pipeline.from_pretrained(run)
    for name, value in trained.net.state_dict().items():
        assert_close(given.net.state_dict()[name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("nowhere", "no adapters"),
        ("nowhere.safetensors", "no such file"),
        ("a.safetensors=strong", "not a strength"),
    ],
)
def test_adapters_that_cannot_be_read_are_refused(models, given, says):
    with pytest.raises(LdmError, match=says):
        Pipeline.from_pretrained(models / "sd1", lora=[given])


def test_adapters_of_another_network_are_refused(models, run):
    with pytest.raises(LdmError, match="fit no layer"):
        Pipeline.from_pretrained(models / "sd3", lora=[str(find_checkpoint(run) / FOLDER)])


def test_mmdit_runs_have_adapters_too(models, tmp_path):
    train_diffusion(experiment(models, tmp_path / "sd3", "sd3"))
    theirs = diffusers.SD3Transformer2DModel.from_pretrained(models / "sd3" / "transformer")
    ours = diffusers.SD3Transformer2DModel.from_config(theirs.config)
    ours.load_state_dict(Pipeline.from_pretrained(tmp_path / "sd3").net.state_dict())
    folder = find_checkpoint(tmp_path / "sd3") / FOLDER
    theirs.load_lora_adapter(folder, prefix="transformer", weight_name=WEIGHTS)
    draw = torch.Generator().manual_seed(0)
    config = theirs.config
    inputs = {
        "hidden_states": torch.randn(1, config.in_channels, 16, 16, generator=draw),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 7, config.joint_attention_dim, generator=draw),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim, generator=draw),
    }
    assert_close(ours(**inputs).sample, theirs(**inputs).sample, rtol=1e-4, atol=1e-5)


def test_adapters_of_random_weights_make_no_sense(tmp_path):
    from ldm.config.files import load

    with pytest.raises(LdmError, match="adapters change a trained network"):
        load(["configs/tiny/unet.yaml"], [f"run.dir={tmp_path}", "lora.rank=4"])
