"""Drawing: a picture depends on its own request alone; what cannot be served says why."""

import itertools
import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from recipes import tiny

from ldm import Pipeline, storage
from ldm.build import load_vae_directory
from ldm.cli import main
from ldm.errors import ExitCode, LdmError
from ldm.inference.images import Request, read_request
from ldm.inference.starting import initial_noise
from ldm.storage import read_json
from ldm.training.diffusion import train_diffusion
from ldm.training.vae import train_vae


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "run"
    train_diffusion(tiny("dit", folder))
    return folder


@pytest.fixture(scope="module")
def unet_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "run"
    train_diffusion(tiny("unet", folder))
    return folder


@pytest.fixture(scope="module")
def pipeline(run):
    """The tiny model with a network that is not zero: an untrained DiT predicts nothing."""
    pipeline = Pipeline.from_pretrained(run)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for weight in pipeline.net.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    return pipeline


def pixels(image):
    return np.asarray(image, dtype=int)


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "dpmpp_2m_sde", "ddim", "adaptive", "edm_sde"])
def test_a_picture_of_a_batch_equals_the_same_seed_alone(pipeline, sampler):
    eta = {} if sampler in ("dpmpp_2m", "adaptive") else {"eta": 1.0}
    prompts = ["a red circle", "a much longer prompt about a small blue star above a square"]
    batch = pipeline(prompts, n=2, seed=5, sampler=sampler, **eta)
    alone = pipeline(prompts[1], seed=8, sampler=sampler, **eta)
    assert np.abs(pixels(batch[3]) - pixels(alone[0])).max() <= 1
    assert np.abs(pixels(batch[0]) - pixels(batch[1])).max() > 1, "seeds make a difference"


def test_the_batch_size_does_not_change_the_pictures(pipeline):
    one = pipeline("a red circle", n=5, batch_size=1)
    five = pipeline("a red circle", n=5, batch_size=5)
    assert max(np.abs(pixels(a) - pixels(b)).max() for a, b in zip(one, five, strict=True)) <= 1


@pytest.mark.parametrize("pad_to", [77, 128, 256])
def test_padding_the_text_does_not_change_the_pictures(pipeline, pad_to):
    usual = pipeline("a red circle", seed=3)[0]
    pipeline.encoder.pad_to = pad_to
    try:
        padded = pipeline("a red circle", seed=3)[0]
    finally:
        pipeline.encoder.pad_to = None
    assert np.abs(pixels(usual) - pixels(padded)).max() <= 1


def test_the_prompt_and_the_negative_prompt_make_a_difference(pipeline):
    base = pixels(pipeline("a red circle", cfg_scale=4.0)[0])
    assert np.abs(base - pixels(pipeline("a blue square", cfg_scale=4.0)[0])).max() > 1
    assert np.abs(base - pixels(pipeline("a red circle", negative="blue", cfg_scale=4.0)[0])).max()


def test_guidance_of_one_calls_the_network_once_per_step_with_one_row(pipeline):
    rows = []
    count = pipeline.net.register_forward_pre_hook(lambda net, given: rows.append(len(given[0])))
    pipeline("a red circle", cfg_scale=1.0, steps=3, sampler="euler")
    pipeline("a red circle", cfg_scale=2.0, steps=3, sampler="euler")
    count.remove()
    assert rows == [1, 1, 1, 2, 2, 2]


def test_other_sizes_are_drawn_and_impossible_ones_refused(pipeline, caplog):
    picture = pipeline("a red circle", size=(32, 64))[0]
    assert picture.size == (64, 32)
    assert "trained at 32x32" in caplog.text
    with pytest.raises(LdmError, match="multiples of 4") as caught:
        pipeline("a red circle", size=34)
    assert "use 32 or 36" in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"steps": 0}, "0 steps"),
        ({"steps": 1001}, "1001 steps"),
        ({"sampler": "dimm"}, "unknown sampler"),
        ({"sampler": "euler", "eta": 0.5}, "draws no noise"),
        ({"sampler": "dpm_solver_3"}, "cannot start at pure noise, where process rectified_flow"),
        ({"cfg_scale": float("nan")}, "out of range"),
        ({"cfg_scale": -1.0}, "out of range"),
        ({"n": 0}, "cannot be drawn"),
        ({"spacing": "random"}, "unknown spacing"),
        ({"style": "oil"}, "unknown setting style"),
        ({"sampler": "ddim", "eta": 1.5}, "eta=1.5 is out of range"),
        ({"sampler": "ddim", "eta": float("nan")}, "eta=nan is out of range"),
        ({"shift": 0.0}, "shift=0.0 is out of range"),
        ({"interval": (0.5, 0.5)}, r"interval=\(0.5, 0.5\) is out of range"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused_by_name(pipeline, settings, part):
    with pytest.raises(LdmError, match=part) as caught:
        pipeline("a red circle", **settings)
    assert caught.value.code == ExitCode.USAGE


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("steps", value) for value in (3.0, "3", True, None)),
        *(("seed", value) for value in (1.5, True, None)),
        *(("n", value) for value in (2.0, None)),
        *(("eta", value) for value in (None, "0", False, [0.0])),
        *(("interval", value) for value in (0.5, [0.5], (0, 0.5, 1), "01", (0, None))),
        *(("size", value) for value in (32.0, "32", "ab", (32.0, 32), True)),
        *(("prompt", value) for value in (None, 3, ["a", None], b"a")),
        *(("negative", 3), ("sampler", None), ("guidance", ["apg"])),
    ],
)
def test_a_setting_of_the_wrong_kind_is_refused_by_name(pipeline, name, value):
    with pytest.raises(LdmError) as caught:
        pipeline.requests(**{"prompt": "a", name: value})
    assert caught.value.where == name


def test_numbers_of_numpy_are_saved_and_replayed_like_pythons(pipeline, tmp_path):
    settings = {"steps": np.int64(2), "seed": np.int32(5), "n": np.int64(1), "size": np.int64(32)}
    given = {"cfg_scale": np.float32(1.5), "shift": np.float64(2), "interval": np.array([0, 0.5])}
    pictures = pipeline(np.array(["a star"]), **settings, **given)
    plain = pipeline.requests(
        "a star", steps=2, seed=5, size=32, cfg_scale=1.5, shift=2, interval=[0, 0.5]
    )
    assert list(pictures.requests) == plain
    assert read_request(pictures.save(tmp_path)[0])[0] == plain[0]


def test_a_seed_beyond_64_bits_draws_its_own_picture(pipeline):
    seeds = [pipeline.requests("a", seed=seed)[0] for seed in (0, 2**63, 2**64, 2**64 + 1, -1)]
    starts = [initial_noise(pipeline, [request]) for request in seeds]
    assert not any(a.equal(b) for a, b in itertools.combinations(starts, 2))


def test_a_prompt_that_is_too_long_names_its_tokens_and_the_limit(pipeline):
    with pytest.raises(LdmError, match=r"has \d+ tokens, the text encoder takes 77"):
        pipeline("a red circle " * 60)


def test_guidance_is_refused_for_a_model_trained_without_caption_dropout(tmp_path):
    folder = tmp_path / "run"
    train_diffusion(tiny("dit", folder, "diffusion.caption_dropout=0", "sample.cfg_scale=1"))
    pipeline = Pipeline.from_pretrained(folder)
    assert len(pipeline("a red circle")) == 1
    with pytest.raises(LdmError, match="without caption dropout"):
        pipeline("a red circle", cfg_scale=3.0)


def test_pictures_show_themselves_in_a_notebook(pipeline):
    pictures = pipeline("a <red> circle", n=3)
    assert pictures._repr_png_().startswith(b"\x89PNG")
    assert "a &lt;red&gt; circle" in pictures._repr_html_()
    assert pictures.grid(columns=3).width > pictures.grid(columns=1).width


def test_infer_writes_numbered_files_and_replay_makes_the_same_picture(run, tmp_path, capsys):
    out = tmp_path / "out"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n\n  a blue star \n")
    arguments = ["infer", "--model", str(run), "--prompt-file", str(prompts), "--n", "2"]
    assert main([*arguments, "--out", str(out), "--seed", "3", "--sampler", "dpmpp_2m_sde"]) == 0
    assert sorted(p.name for p in out.iterdir()) == [f"{k:05d}.png" for k in range(4)]
    picture = out / "00003.png"
    request, _, _ = read_request(picture)
    assert (request.prompt, request.seed, request.eta) == ("a blue star", 6, 1.0)
    with Image.open(picture) as image:
        assert "Steps: 4, Sampler: dpmpp_2m_sde" in image.text["parameters"]
    assert main(["replay", str(picture), "--out", str(out)]) == 0
    again = out / "00004.png"
    assert str(again) in capsys.readouterr().out
    with Image.open(picture) as one, Image.open(again) as two:
        assert np.abs(pixels(one) - pixels(two)).max() <= 1


def test_replay_refuses_another_checkpoint_than_the_one_that_drew(run, unet_run, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["infer", "--model", str(run), "--prompt", "x", "--out", str(out)]) == 0
    assert main(["replay", str(out / "00000.png"), "--model", str(unet_run)]) == ExitCode.USAGE
    assert "not here" in capsys.readouterr().err


def test_a_request_survives_its_metadata(run, tmp_path):
    request = Request(
        prompt="naïve ☃ — 星",
        negative=None,
        seed=2**40,
        steps=7,
        sampler="ddim",
        spacing="trailing",
        shift=1.5,
        cfg_scale=2.5,
        rescale=0.1,
        interval=(0.1, 0.9),
        eta=0.3,
        height=32,
        width=64,
    )
    path = Pipeline.from_pretrained(run).draw([request]).save(tmp_path)[0]
    assert read_request(path)[0] == request


def test_checkpoint_folders_open_in_diffusers_and_transformers(run, unet_run):
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    pipeline = Pipeline.from_pretrained(unet_run)
    folder = next(unet_run.glob("step-00000006"))
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    text = CLIPTextModel.from_pretrained(folder / "text_encoder")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    x, z = torch.randn(2, 3, 32, 32), torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        ours = pipeline.vae.moments(x)
        theirs = vae.encode(x).latent_dist
        torch.testing.assert_close(ours.chunk(2, 1)[0], theirs.mean, atol=1e-5, rtol=1e-5)
        ids = tokenizer("a red circle", return_tensors="pt")
        states = text(**ids).last_hidden_state
        embedding = pipeline.encoder(["a red circle"])
        torch.testing.assert_close(states, embedding.tokens, atol=1e-5, rtol=1e-5)
        t = torch.tensor([10.0, 900.0])
        mask = embedding.mask.expand(2, -1)
        theirs = unet(
            z, t, states.expand(2, -1, -1), encoder_attention_mask=mask, return_dict=False
        )[0]
        ours = pipeline.network(z, t, type(embedding)(states.expand(2, -1, -1), mask))
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_the_contract_says_what_the_weights_mean(unet_run):
    folder = next(unet_run.glob("step-00000006"))
    contract = read_json(folder / "contract.json")
    assert contract["process"] == "sd"
    assert contract["prediction"] == "eps"
    assert contract["caption_dropout"] == 0.1
    assert json.loads((folder / "model_index.json").read_text())["unet"] == [
        "diffusers",
        "UNet2DConditionModel",
    ]


def test_replay_finds_the_step_that_drew_after_the_run_went_on(tmp_path):
    config = tiny("dit", tmp_path / "run")
    train_diffusion(config)
    out = str(tmp_path / "out")
    assert main(["infer", "--model", str(tmp_path / "run"), "--prompt", "x", "--out", out]) == 0
    train_diffusion(tiny("dit", tmp_path / "run", "train.steps=8"))
    assert main(["replay", f"{out}/00000.png", "--out", out]) == 0
    (tmp_path / "run").rename(tmp_path / "moved")
    assert main(["replay", f"{out}/00000.png", "--out", out]) == ExitCode.USAGE
    moved = str(tmp_path / "moved")
    assert main(["replay", f"{out}/00000.png", "--out", out, "--model", moved]) == 0


@pytest.mark.parametrize(
    ("extra", "part"),
    [
        (["--size", "0"], "'0' is not a size"),
        (["--batch-size", "0"], "batch of 0"),
        (["--device", "warp"], "no device 'warp'"),
        (["--n", "0"], "cannot be drawn"),
    ],
)
def test_odd_arguments_of_infer_are_refused(run, tmp_path, capsys, extra, part):
    arguments = ["infer", "--model", str(run), "--prompt", "x", "--out", str(tmp_path / "o")]
    assert main([*arguments, *extra]) == ExitCode.USAGE
    assert part in capsys.readouterr().err


def test_a_checkpoint_is_not_retired_while_it_is_being_loaded(tmp_path, monkeypatch):
    import ldm.inference.loading as module

    newest = train_diffusion(tiny("dit", tmp_path / "run"))
    (older,) = [d for d in storage.step_directories(tmp_path / "run") if d != newest]
    seen = []

    def load(folder):
        seen.append(storage.retire(tmp_path / "run", keep=1))
        return load_vae_directory(folder)

    monkeypatch.setattr(module, "load_vae_directory", load)
    Pipeline.from_pretrained(older)
    assert seen == [[]]
    assert storage.retire(tmp_path / "run", keep=1) == [older], "afterwards it may go"


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": "abc"},
        {"height": "64"},
        {"seed": "x"},
        {"seed": True},
        {"shift": None},
        {"sampler": ["ddim"]},
        {"interval": [1]},
        {"interval": ["a", "b"]},
        {"interval": 3},
        {"prompt": None},
    ],
)
def test_a_request_of_the_wrong_kind_is_damaged(pipeline, tmp_path, wrong):
    (request,) = pipeline.requests(["a"])
    facts = {"request": {**asdict(request), **wrong}, "model": "", "model_path": ""}
    for text in (json.dumps(facts), '{"request": null}', "[]"):
        chunks = PngImagePlugin.PngInfo()
        chunks.add_itxt("ldm", text)
        Image.new("RGB", (8, 8)).save(tmp_path / "x.png", pnginfo=chunks)
        with pytest.raises(LdmError, match="damaged"):
            read_request(tmp_path / "x.png")


def test_a_file_with_an_odd_number_for_a_name_is_left_alone(pipeline, tmp_path):
    (tmp_path / "\u00b2.png").touch()
    assert pipeline("a", steps=1).save(tmp_path)[0].name == "00000.png"


def test_a_vae_run_is_no_model_to_draw_with(tmp_path, capsys):
    train_vae(tiny("vae", tmp_path / "vae"))
    assert main(["infer", "--model", str(tmp_path / "vae"), "--prompt", "x"]) == ExitCode.USAGE
    assert "no denoiser" in capsys.readouterr().err


def test_a_directory_that_is_no_run_and_a_damaged_model_are_named(tmp_path, capsys, run):
    assert main(["infer", "--model", str(tmp_path), "--prompt", "x"]) == ExitCode.USAGE
    assert "not a run directory" in capsys.readouterr().err
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    for weights in copy.glob("step-*/transformer/*.safetensors"):
        weights.write_bytes(weights.read_bytes()[:-100])
    assert main(["infer", "--model", str(copy), "--prompt", "x"]) == ExitCode.IO
    error = capsys.readouterr().err
    assert "all checkpoints of this run are damaged" in error
    assert "Traceback" not in error
