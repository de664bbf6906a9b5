"""Text encoders in runs: what checkpoints record and restore; weighting when drawing."""

import json
import shutil

import pytest
import torch
from encoders import clip_model, clip_tokenizer, tiny_clip
from recipes import assert_bitwise_equal, tiny
from test_text_joint import joint

from ldm.build import load_text
from ldm.checkpoint import Contract, load_contract, load_null
from ldm.cli import main
from ldm.config.schema import TextConfig
from ldm.errors import ExitCode, LdmError
from ldm.inference.images import Request, read_request
from ldm.inference.pipeline import Pipeline
from ldm.models.text import HuggingFaceTextEncoder, Reading
from ldm.training.diffusion import train_diffusion

QUICK = ("train.steps=2", "run.save_every_steps=2", "data.count=8", "sample.steps=2")


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Directories with a joint encoder in each style, and with a single one."""
    root = tmp_path_factory.mktemp("encoders")
    for style in ("sdxl", "sd3"):
        joint(style).save(root / style)
    HuggingFaceTextEncoder(clip_model(), clip_tokenizer()).save(root / "single")
    return root


@pytest.fixture(scope="module")
def runs(encoders, tmp_path_factory):
    """Finished checkpoints, trained on each kind of encoder."""
    root = tmp_path_factory.mktemp("runs")
    kinds = {
        "single": ("text.padding=attended", "text.layer=-2", "text.zero_null=true"),
        "sdxl": ("text.style=sdxl", "text.padding=attended"),
        "sd3": ("text.style=sd3", "text.padding=masked", "text.t5_tokens=64"),
    }
    return {
        kind: train_diffusion(
            tiny("dit", root / kind / "run", *QUICK, f"text.path={encoders / kind}", *options)
        )
        for kind, options in kinds.items()
    }


def test_a_run_records_how_prompts_are_read(runs):
    single, sdxl, sd3 = (load_contract(runs[kind]) for kind in ("single", "sdxl", "sd3"))
    assert single.text_settings == {"padding": "attended", "layer": -2}
    assert single.mask_rule == "padding is attended like words"
    assert sdxl.text_settings["style"] == "sdxl"
    assert sd3.text_settings["t5_tokens"] == 64
    assert sd3.mask_rule == "padding is masked in every attention"
    index = json.loads((runs["sd3"] / "model_index.json").read_text())
    assert index["text_encoder_2"] == ["transformers", "CLIPTextModelWithProjection"]
    assert index["text_encoder_3"] == ["transformers", "T5EncoderModel"]
    assert index["tokenizer_3"][0] == "transformers"


@pytest.mark.parametrize("kind", ["single", "sdxl", "sd3"])
def test_drawing_embeds_prompts_as_training_did(kind, runs, encoders):
    pipeline = Pipeline.from_pretrained(runs[kind])
    settings = load_contract(runs[kind]).text_settings
    config = TextConfig(
        path=str(encoders / kind),
        style=settings.get("style", "single"),
        padding=settings["padding"],
        layer=settings.get("layer"),
        t5_tokens=settings.get("t5_tokens", 256),
    )
    trained = load_text(config, [], 0)
    prompts = ["a large red circle", "one star"]
    found, expected = pipeline.encoder(prompts), trained(prompts)
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.mask, expected.mask)
    assert torch.equal(found.pooled, expected.pooled)
    assert pipeline.encoder.identity == trained.identity
    assert len(pipeline("a red circle", steps=2)) == 1


def test_the_null_embedding_of_a_run_may_be_zeros(runs):
    assert not load_null(runs["single"]).tokens.any()
    assert load_null(runs["sdxl"]).tokens.any()


def test_a_run_with_joined_encoders_resumes_bit_for_bit(encoders, tmp_path):
    options = ("text.style=sdxl", "text.padding=attended", f"text.path={encoders / 'sdxl'}")
    whole = train_diffusion(tiny("dit", tmp_path / "a" / "run", *QUICK, "train.steps=4", *options))
    again = tmp_path / "b" / "run"
    train_diffusion(tiny("dit", again, *QUICK, "train.steps=4", *options))
    shutil.rmtree(again / whole.name)
    assert_bitwise_equal(
        train_diffusion(tiny("dit", again, *QUICK, "train.steps=4", *options)), whole
    )


@pytest.mark.parametrize("kind", ["single", "sd3"])
def test_cached_embeddings_are_the_live_ones(kind, encoders, tmp_path):
    from ldm.build import open_data
    from ldm.training.cache import build_text, load_text_cache

    style = () if kind == "single" else ("text.style=sd3", "text.t5_tokens=64")
    given = (*style, "text.padding=attended", f"text.path={encoders / kind}")
    config = tiny("dit", tmp_path / "run", *QUICK, *given)
    captions = open_data(config.data)[0].captions
    encoder = load_text(config.text, captions, 0)
    text = load_text_cache(config, captions, build_text(config, captions, encoder))
    cached, live = text.rows(torch.arange(4)), encoder(captions[:4])
    assert torch.equal(cached.mask, live.mask)
    # other batches add in another order
    torch.testing.assert_close(cached.tokens, live.tokens, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(cached.pooled, live.pooled, atol=1e-5, rtol=1e-5)


def test_caches_of_two_readings_never_meet(tmp_path):
    from ldm.training.cache import _text_folder

    config = tiny("dit", tmp_path / "run", *QUICK)
    model, words = tiny_clip().model, tiny_clip().tokenizer
    readings = (Reading(), Reading("attended"), Reading(layer=-2), Reading(final_norm=False))
    folders = {
        _text_folder(config, ["a"], HuggingFaceTextEncoder(model, words, reading=reading))
        for reading in readings
    }
    assert len(folders) == len(readings)


def test_a_contract_of_an_earlier_version_reads_prompts_as_it_did(runs):
    values = json.loads((runs["single"] / "contract.json").read_text())
    del values["text_settings"]
    assert Contract.from_json(values).text_settings == {}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["text.style=sdxl"], "text.style=sdxl needs a path"),
        (["text.style=sdxl", "text.path=x", "text.layer=-1"], "says itself which layers are read"),
        (["text.path=x", 'text.further_paths=["y"]'], "one encoder has no second path"),
        (
            ["text.style=sdxl", "text.path=x", 'text.further_paths=["y","z"]'],
            "no place for 2 further encoders",
        ),
        (["text.style=sdxl", "text.path=x", "text.lower_case=true"], "captions as they are"),
        (["text.layer=0"], "text.layer"),
        (["text.padding=none"], "text.padding"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(options, match, tmp_path):
    with pytest.raises(LdmError, match=match) as caught:
        tiny("dit", tmp_path / "run", *options)
    assert caught.value.code == ExitCode.CONFIG


# --- weighting when drawing -----------------------------------------------------------------------


def same(one, two):
    return list(one[0].getdata()) == list(two[0].getdata())


def test_weighting_changes_a_picture_only_when_asked_for(runs):
    pipeline = Pipeline.from_pretrained(runs["sdxl"])
    ask = {"steps": 2, "cfg_scale": 4.0}
    plain = pipeline("a red circle", **ask)
    assert same(pipeline("a (red:1.0) circle", weighting=True, **ask), plain)
    assert not same(pipeline("a (red:3) circle", weighting=True, **ask), plain)
    negative = {"negative": "a (blue:3) square", **ask}
    weighted = pipeline("a red circle", weighting=True, **negative)
    assert not same(weighted, pipeline("a red circle", **negative))
    with pytest.raises(LdmError, match="has no partner"):
        pipeline("a smile :)", weighting=True, **ask)
    assert same(pipeline("a smile :)", **ask), pipeline("a smile :)", weighting=False, **ask))


def test_a_picture_keeps_that_its_prompt_was_weighted_and_is_drawn_again(runs, tmp_path, capsys):
    asked = ["--model", str(runs["single"]), "--prompt", "a (red:1.5) circle", "--steps", "2"]
    assert main(["infer", *asked, "--weighting", "--out", str(tmp_path / "a")]) == 0
    request, _, _ = read_request(tmp_path / "a" / "00000.png")
    assert request.weighting is True
    assert main(["replay", str(tmp_path / "a" / "00000.png"), "--out", str(tmp_path / "b")]) == 0
    first, second = (tmp_path / name / "00000.png" for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()
    assert main(["infer", *asked, "--out", str(tmp_path / "c")]) == 0
    assert read_request(tmp_path / "c" / "00000.png")[0].weighting is False
    assert (tmp_path / "c" / "00000.png").read_bytes() != first.read_bytes()


def test_a_request_of_an_earlier_version_was_not_weighted(runs):
    from dataclasses import asdict

    (request,) = Pipeline.from_pretrained(runs["single"]).requests("a (red) circle")
    values = asdict(request)
    del values["weighting"]
    assert Request.from_json(values).weighting is False
    with pytest.raises(ValueError, match="weighting is 1"):
        Request.from_json({**values, "weighting": 1})


@pytest.mark.parametrize("wrong", [1, "yes", None])
def test_weighting_is_yes_or_no(runs, wrong):
    with pytest.raises(LdmError, match="is not True or False"):
        Pipeline.from_pretrained(runs["single"]).requests("a", weighting=wrong)
