"""Single files of the original layout: what diffusers makes of them, every tensor accounted for."""

import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import ldm  # noqa: F401  (before anything that imports torchvision)
from ldm.checkpoint.pickles import load_pickle_tensors
from ldm.cli import main
from ldm.errors import LdmError
from ldm.exchange.exporting import Model, write_single_file
from ldm.exchange.opening import Options, open_codec, open_published
from ldm.exchange.single_file import read_file, read_tensors
from ldm.inference.pipeline import Pipeline
from tests.published import FAMILIES, PROMPT, SIDE, vae

diffusers = pytest.importorskip("diffusers")

PREDICTION = {"sd2": "v"}
FILES = ("sd1", "sd2", "sdxl", "sd3")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Each family as a directory and, written from it by us, as a single file."""
    root, made = tmp_path_factory.mktemp("files"), {}
    for name in FILES:
        pipe = FAMILIES[name]()
        single_file_form(name, pipe)
        pipe.set_progress_bar_config(disable=True)
        pipe.save_pretrained(root / name, safe_serialization=True)
        model = open_published(root / name)
        file = root / f"{name}.safetensors"
        write_single_file(file, Model(model.vae, model.encoder, model.net, model.contract), {})
        made[name] = (root / name, file, pipe)
    return made


def single_file_form(name, pipe):
    """What a single file cannot hold has to be what its readers assume."""
    if name == "sd3":
        with torch.no_grad():  # CLIP-L is pooled without its projection
            pipe.text_encoder.text_projection.weight.copy_(torch.eye(32))


def options(name, folder):
    return Options(prediction=PREDICTION.get(name), tokenizer=str(folder / "tokenizer"))


@pytest.mark.parametrize("name", FILES)
def test_a_file_draws_what_its_directory_draws(saved, name):
    folder, file, _ = saved[name]
    whole = Pipeline.from_pretrained(folder, device="cpu")
    single = Pipeline.from_pretrained(file, device="cpu", options=options(name, folder))
    x1 = torch.randn(
        (1, whole.contract.latent_channels, SIDE // 2, SIDE // 2),
        generator=torch.Generator().manual_seed(0),
    )
    settings = {"steps": 3, "size": SIDE, "spacing": "uniform", "sampler": "ddim"}
    one, other = (
        p._draw_batch(p.requests(PROMPT, **settings, cfg_scale=5.0), x1) for p in (whole, single)
    )
    assert one.equal(other)
    same = ("process", "prediction", "latent_mean", "latent_std", "mask_rule")
    for field in same:
        assert getattr(whole.contract, field) == getattr(single.contract, field)


@pytest.mark.parametrize("name", FILES)
def test_reading_and_writing_is_the_identity_bit_for_bit(saved, name, tmp_path):
    folder, file, _ = saved[name]
    model = open_published(file, options(name, folder))
    again = tmp_path / "again.safetensors"
    write_single_file(again, Model(model.vae, model.encoder, model.net, model.contract), {})
    first, second = load_file(file), load_file(again)
    assert first.keys() == second.keys()
    assert [key for key in first if not first[key].equal(second[key])] == []


@pytest.mark.parametrize("name", FILES)
def test_diffusers_reads_the_file_offline_as_the_directory(saved, name):
    folder, file, pipe = saved[name]
    extra = {"text_encoder_3": None, "tokenizer_3": None} if name == "sd3" else {}
    read = type(pipe).from_single_file(
        str(file), config=str(folder), local_files_only=True, **extra
    )
    for part in ("unet", "transformer", "vae", "text_encoder", "text_encoder_2"):
        ours, theirs = getattr(pipe, part, None), getattr(read, part, None)
        if ours is not None:
            there = theirs.state_dict()
            for key, value in ours.state_dict().items():
                assert_close(there[key], value, rtol=0, atol=0, msg=f"{part}.{key}")


def test_half_precision_is_widened(saved, tmp_path):
    folder, file, _ = saved["sd1"]
    save_file({k: v.half() for k, v in load_file(file).items()}, tmp_path / "half.safetensors")
    net = read_file(tmp_path / "half.safetensors").net
    whole = read_file(file).net
    for name, value in net.state_dict().items():
        assert value.dtype == torch.float32
        assert_close(value, whole.state_dict()[name], rtol=1e-3, atol=1e-6)


def test_copies_and_marks_are_left_out_and_strangers_refused(saved, caplog):
    tensors = load_file(saved["sd1"][1])
    tensors |= {"model_ema.decay": torch.ones(1), "alphas_cumprod": torch.ones(1000)}
    with caplog.at_level("INFO"):
        parts = read_tensors(tensors, "x")
    assert parts.unused == ("alphas_cumprod", "model_ema.decay")
    assert "model_ema.decay" in caplog.text
    tensors["lora_unet_down.weight"] = torch.ones(1)
    with pytest.raises(LdmError, match="lora_unet_down.weight"):
        read_tensors(tensors, "x")
    assert "lora_unet_down.weight" in read_tensors(tensors, "x", allow_unused=True).unused


def test_a_missing_tensor_is_named(saved):
    tensors = load_file(saved["sd1"][1])
    del tensors["model.diffusion_model.out.2.bias"]
    with pytest.raises(LdmError, match="model.diffusion_model.out.2.bias"):
        read_tensors(tensors, "x")


def test_what_sd2_predicts_must_be_said(saved):
    folder, file, _ = saved["sd2"]
    tensors = load_file(file)
    assert "v_pred" in tensors, "our own files carry the mark"
    del tensors["v_pred"]
    unmarked = file.with_name("unmarked.safetensors")
    save_file(tensors, unmarked)
    with pytest.raises(LdmError, match="cannot be seen") as refusal:
        open_published(unmarked, Options(tokenizer=str(folder / "tokenizer")))
    assert "v for the 768 one" in refusal.value.fix


def test_the_last_layer_that_sd2_never_reads_is_left_out(saved):
    """A published file holds open_clip's whole tower: 24 layers, of which 23 are read."""
    tensors = load_file(saved["sd2"][1])
    prefix = "cond_stage_model.model."
    layer = f"{prefix}transformer.resblocks.2."
    more = {k.replace("blocks.2.", "blocks.3."): v for k, v in tensors.items() if layer in k}
    tensors |= more | {
        f"{prefix}text_projection": torch.eye(64),
        f"{prefix}logit_scale": torch.ones(()),
    }
    parts = read_tensors(tensors, "x")
    assert parts.towers[0].model.config.num_hidden_layers == 3


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("double_blocks.0.img_attn.qkv.weight", "FLUX"),
        ("control_model.input_blocks.0.0.weight", "ControlNet"),
        ("conditioner.embedders.0.model.ln_final.weight", "refiner"),
        ("something.else", "its first names are something.else"),
    ],
)
def test_other_families_are_refused_by_name(name, said):
    with pytest.raises(LdmError, match=said):
        read_tensors({name: torch.ones(1)}, "x")


def test_inpainting_is_refused(saved):
    tensors = load_file(saved["sd1"][1])
    name = "model.diffusion_model.input_blocks.0.0.weight"
    tensors[name] = torch.cat([tensors[name], tensors[name], tensors[name][:, :1]], dim=1)
    with pytest.raises(LdmError, match="takes 9 channels"):
        read_tensors(tensors, "x")


def test_a_lone_vae_is_read_in_both_spellings(saved, tmp_path):
    _, file, pipe = saved["sd1"]
    prefix = "first_stage_model."
    lone = {k.removeprefix(prefix): v for k, v in load_file(file).items() if k.startswith(prefix)}
    save_file(lone, tmp_path / "vae.safetensors")
    codec = open_codec(tmp_path / "vae.safetensors")
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = pipe.vae.decode(latents / 0.18215, return_dict=False)[0]
    assert_close(codec.decode(latents), theirs, rtol=0, atol=1e-5)
    with pytest.raises(LdmError, match="autoencoder alone"):
        open_published(tmp_path / "vae.safetensors")


def test_statistics_of_latents_fold_into_the_scale_of_the_family(saved, tmp_path):
    from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL

    folder = saved["sd1"][0]
    model = open_published(folder)
    torch.manual_seed(0)
    config = AutoencoderConfig.from_diffusers(dict(vae().config))
    own = dict(vars(config)) if hasattr(config, "__dict__") else None
    statistics = {"latents_mean": (0.1, 0.2, -0.3, 0.4), "latents_std": (0.5, 1.5, 0.8, 1.2)}
    codec = AutoencoderKL(AutoencoderConfig(**(own | statistics | {"scaling_factor": 1.0}))).eval()
    file = tmp_path / "folded.safetensors"
    write_single_file(file, Model(codec, model.encoder, model.net, model.contract), {})
    read = open_published(file, options("sd1", folder))
    assert read.contract.latent_std[0] == pytest.approx(1 / 0.18215)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert_close(read.vae.decode(latents), codec.decode(latents), rtol=0, atol=1e-5)


def test_the_command_writes_a_file_and_proves_it(saved, tmp_path, capfd):
    folder = saved["sd1"][0]
    arguments = ["export", "--model", str(folder), "--to", "single-file", "--verify"]
    assert main([*arguments, "--out", str(tmp_path / "out"), "--title", "mine"]) == 0
    assert "0 differ" in capfd.readouterr().out
    first, second = load_file(tmp_path / "out" / "mine.safetensors"), load_file(saved["sd1"][1])
    assert all(first[name].equal(value) for name, value in second.items())


def test_heads_that_a_file_cannot_tell_are_refused(saved, tmp_path):
    model = open_published(saved["sd2"][0])
    model.encoder.model.config.num_attention_heads = 2
    with pytest.raises(LdmError, match="assume 1 heads"):
        write_single_file(
            tmp_path / "x.safetensors",
            Model(model.vae, model.encoder, model.net, model.contract),
            {},
        )


class Hostile:
    def __reduce__(self):
        return os.system, ("touch owned",)


@pytest.mark.parametrize("ending", [".ckpt", ".bin", ".pth"])
def test_a_pickle_is_refused_and_the_safe_way_offered(ending, tmp_path):
    file = tmp_path / f"model{ending}"
    torch.save({"state_dict": {"a": torch.ones(2)}}, file)
    with pytest.raises(LdmError, match="pickle") as refusal:
        Pipeline.from_pretrained(file)
    assert f"ldm convert {file}" in refusal.value.fix


def test_nothing_of_a_hostile_pickle_runs(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.ones(2), "b": Hostile()}, "model.ckpt")
    assert main(["convert", "model.ckpt", "model.safetensors"]) != 0
    said = capfd.readouterr().err
    assert "posix.system" in said
    assert "nothing of it was run" in said
    assert not (tmp_path / "owned").exists()
    assert not (tmp_path / "model.safetensors").exists()


def test_convert_keeps_the_tensors_bit_for_bit(tmp_path, capfd):
    tensors = {"a": torch.randn(3, 2), "b": torch.arange(4)}
    saved = {"state_dict": tensors, "epoch": 3, "optimizer": {"x": [1, 2]}}
    torch.save(saved, tmp_path / "in.ckpt")
    out = tmp_path / "out.safetensors"
    assert main(["convert", str(tmp_path / "in.ckpt"), str(out)]) == 0
    read = load_file(out)
    assert read.keys() == tensors.keys()
    assert all(read[name].equal(value) for name, value in tensors.items())
    assert main(["convert", str(tmp_path / "in.ckpt"), str(out)]) == 2
    assert "exists" in capfd.readouterr().err


def test_a_pickle_without_tensors_is_refused(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "in.ckpt")
    with pytest.raises(LdmError, match="no named tensors"):
        load_pickle_tensors(tmp_path / "in.ckpt")
