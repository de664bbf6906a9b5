"""OpenCLIP for real: its towers against transformers, conversion both ways, vocabulary, sources."""

import gzip
import json

import open_clip
import pytest
import torch
from encoders import seeded
from safetensors.torch import save_file

from ldm.errors import ExitCode, LdmError
from ldm.models.text import (
    PUBLISHED,
    HuggingFaceTextEncoder,
    OpenClipTower,
    Reading,
    clip_tokenizer,
    fill,
    load_text_encoder,
    open_clip_text_config,
    open_clip_to_transformers,
    published_text_model,
    transformers_to_open_clip,
    vocabulary,
)

CLOSE = {"atol": 1e-5, "rtol": 1e-5}  # other kernels of attention
TEXT = {"context_length": 77, "vocab_size": 49_408, "width": 32, "heads": 2, "layers": 3}
VISION = {"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16}
CONFIG = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT}
PROMPTS = ("a small red circle on a green square", "wow! two stars", "")
PLAIN = (
    "a photo of a cat",
    "wow!! it's 42 o'clock; e.g. C++ & ~café déjà",
    "日本語 emoji 🦊 Ünïcödé",
    "they've don't I'm we'll I'd you're",
    "  spaces\tand\nlines  ",
    "x" * 30,
    "",
)


@pytest.fixture(scope="module")
def clip():
    model = seeded(lambda: open_clip.CLIP(**CONFIG), 0)
    with torch.no_grad():  # its tables of deviation 0.02 leave words nearly alike
        model.token_embedding.weight.mul_(20)
    return model


@pytest.fixture(scope="module")
def converted(clip):
    """The same tower in transformers, with a tokenizer that pads as OpenCLIP does."""
    return to_transformers(clip)


def to_transformers(clip, prefix="", **changes):
    from transformers import CLIPTextModelWithProjection

    config = open_clip_text_config({**CONFIG, **changes})
    with torch.device("meta"):
        model = CLIPTextModelWithProjection(config)
    state = {prefix + name: tensor for name, tensor in clip.state_dict().items()}
    fill(model, open_clip_to_transformers(state, 3, projection=True, prefix=prefix), "test")
    return model.eval()


def both(clip, converted, reading):
    words = clip_tokenizer(pad="!")
    return (
        HuggingFaceTextEncoder(OpenClipTower(clip), words, reading=reading),
        HuggingFaceTextEncoder(converted, words, reading=reading),
    )


@pytest.mark.parametrize("padding", ["masked", "attended"])
@pytest.mark.parametrize(("layer", "final_norm"), [(-1, True), (-2, True), (-2, False)])
def test_a_tower_in_open_clip_and_its_conversion_give_the_same_states(
    clip, converted, padding, layer, final_norm
):
    """-1: plain; -2 with the norm: Stable Diffusion 2; -2 without: SDXL."""
    there, here = both(clip, converted, Reading(padding, layer, final_norm))
    expected, found = there(PROMPTS), here(PROMPTS)
    assert torch.equal(found.mask, expected.mask)
    torch.testing.assert_close(found.tokens, expected.tokens, **CLOSE)
    torch.testing.assert_close(found.pooled, expected.pooled, **CLOSE)
    assert (there.width, there.pooled_width) == (here.width, here.pooled_width) == (32, 24)


def test_states_and_pooled_vector_are_open_clips_own(clip, converted):
    prompts = [prompt.replace("!", "") for prompt in PROMPTS]
    ids = open_clip.get_tokenizer("ViT-B-32")(prompts)
    _, here = both(clip, converted, Reading("attended"))
    _, inner = both(clip, converted, Reading("attended", -2, final_norm=False))
    with torch.no_grad():
        own = clip.forward_intermediates(text=ids, normalize=False)
    assert torch.equal(here.tokenize(prompts)[0], ids), "it pads with 0, as its own tokenizer"
    torch.testing.assert_close(here(prompts).pooled, clip.encode_text(ids).detach(), **CLOSE)
    last, penultimate = own["text_intermediates"][-1], own["text_intermediates"][-2]
    torch.testing.assert_close(here(prompts).tokens, clip.ln_final(last).detach(), **CLOSE)
    torch.testing.assert_close(inner(prompts).tokens, penultimate, **CLOSE)


def test_stable_diffusion_2_is_the_penultimate_layer_of_a_whole_tower(clip, converted):
    """Its transformers checkpoint has one layer less and reads the last."""
    from transformers import CLIPTextModel

    config = open_clip_text_config({**CONFIG, "text_cfg": {**TEXT, "layers": 2}})
    short = CLIPTextModel(config)
    prefix = "cond_stage_model.model."
    state = {prefix + name: tensor for name, tensor in clip.state_dict().items()}
    names = open_clip_to_transformers(state, 2, projection=False, prefix=prefix)
    short.load_state_dict(names)
    words = clip_tokenizer(pad="!")
    found = HuggingFaceTextEncoder(short, words, reading=Reading("attended"))
    _, whole = both(clip, converted, Reading("attended", -2))
    torch.testing.assert_close(found(PROMPTS).tokens, whole(PROMPTS).tokens, **CLOSE)


@pytest.mark.parametrize("prefix", ["", "conditioner.embedders.1.model."])
def test_conversion_there_and_back_is_exact(clip, converted, prefix):
    back = transformers_to_open_clip(converted.state_dict(), prefix=prefix)
    own = {
        prefix + name: tensor
        for name, tensor in clip.state_dict().items()
        if not name.startswith(("visual.", "logit_"))
    }
    assert back.keys() == own.keys()
    for name, tensor in own.items():
        assert torch.equal(back[name], tensor), name


def test_a_tower_that_lacks_a_tensor_or_has_another_is_refused(clip, converted):
    state = dict(clip.state_dict())
    del state["transformer.resblocks.2.attn.in_proj_bias"]
    with pytest.raises(LdmError, match=r"lacks transformer\.resblocks\.2\.attn\.in_proj_bias"):
        open_clip_to_transformers(state, 3, projection=True)
    strange = {**converted.state_dict(), "text_model.adapter.weight": torch.zeros(1)}
    with pytest.raises(LdmError, match=r"adapter\.weight has no place"):
        transformers_to_open_clip(strange)


def test_quick_gelu_is_kept(clip):
    quick = seeded(lambda: open_clip.CLIP(**CONFIG, quick_gelu=True), 0)
    quick.load_state_dict(clip.state_dict())
    there, here = both(quick, to_transformers(quick, quick_gelu=True), Reading())
    torch.testing.assert_close(here(PROMPTS).tokens, there(PROMPTS).tokens, **CLOSE)
    _, plain = both(quick, to_transformers(quick), Reading())
    assert (plain(PROMPTS).tokens - there(PROMPTS).tokens).abs().max() > 1e-3


@pytest.mark.parametrize("key", ["no_causal_mask", "ls_init_value", "hf_tokenizer_name", "qk_norm"])
def test_a_tower_that_is_no_clip_of_transformers_is_refused_by_name(key):
    with pytest.raises(LdmError, match=f"it has {key}") as caught:
        open_clip_text_config({**CONFIG, "text_cfg": {**TEXT, key: True}})
    assert caught.value.code == ExitCode.CONFIG


def test_a_tower_without_a_causal_mask_runs_in_open_clip():
    text = {**TEXT, "no_causal_mask": True}
    model = seeded(lambda: open_clip.CLIP(24, VISION, text), 0)
    encoder = HuggingFaceTextEncoder(OpenClipTower(model), clip_tokenizer(pad="!"))
    batch, alone = encoder(PROMPTS), encoder(PROMPTS[1:2])
    length = alone.tokens.shape[1]
    torch.testing.assert_close(batch.tokens[1, :length], alone.tokens[0], **CLOSE)
    padded = HuggingFaceTextEncoder(
        OpenClipTower(model), clip_tokenizer(pad="!"), reading=Reading("attended")
    )
    ids = padded.tokenize(["two stars"])[0]
    expected = model.encode_text(ids).detach()
    torch.testing.assert_close(padded(["two stars"]).pooled, expected, **CLOSE)


def test_a_tower_that_pools_elsewhere_or_would_be_saved_is_refused(clip, tmp_path):
    other = seeded(lambda: open_clip.CLIP(24, VISION, {**TEXT, "pool_type": "last"}), 0)
    with pytest.raises(LdmError, match="pools 'last'"):
        OpenClipTower(other)
    encoder = HuggingFaceTextEncoder(OpenClipTower(clip), clip_tokenizer(pad="!"))
    with pytest.raises(LdmError, match="no file layout"):
        encoder.save(tmp_path)


# --- the vocabulary -------------------------------------------------------------------------------


def test_the_tokenizer_is_open_clips_on_plain_text():
    own = open_clip.get_tokenizer("ViT-B-32")
    words = clip_tokenizer(pad="!")
    assert len(words) == 49_408
    for text in PLAIN:  # a "!" is a word here, and not the padding that it is spelled like
        found = words(text, split_special_tokens=True)["input_ids"]
        assert found == [49_406, *own.encode(text), 49_407], text


def test_each_family_pads_with_its_own_token():
    framed = {"padding": "max_length", "max_length": 8}
    openai, openclip = (clip_tokenizer(**pad)("cat", **framed) for pad in ({}, {"pad": "!"}))
    assert openai["input_ids"][2:] == [49_407] * 6
    assert openclip["input_ids"][2:] == [49_407, *[0] * 5]


def test_a_damaged_vocabulary_and_a_missing_package_are_sentences(tmp_path, monkeypatch):
    file = tmp_path / "vocabulary.gz"
    file.write_bytes(gzip.compress(b"header\na b\n"))
    monkeypatch.setattr(vocabulary, "_file", lambda: file)
    with pytest.raises(LdmError, match="cannot be read"):
        clip_tokenizer()
    file.write_bytes(b"no gzip")
    with pytest.raises(LdmError, match="cannot be read"):
        clip_tokenizer()
    monkeypatch.undo()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(LdmError) as caught:
        clip_tokenizer()
    assert "ldm-toolkit[openclip]" in caught.value.fix


# --- open_clip: as a source -----------------------------------------------------------------------


@pytest.fixture
def small_model(tmp_path, monkeypatch, clip):
    """open_clip's registry with one small model more, and its weights in a file."""
    (tmp_path / "tiny.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(tmp_path / "tiny.json")
    path = tmp_path / "weights.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in clip.state_dict().items()}, path)
    yield path
    open_clip.factory._MODEL_CONFIGS.pop("tiny")


def test_an_open_clip_source_is_a_clip_of_transformers_that_saves(
    small_model, clip, converted, tmp_path
):
    encoder = load_text_encoder(f"open_clip:tiny/{small_model}", reading=Reading("attended"))
    _, expected = both(clip, converted, Reading("attended"))
    assert torch.equal(encoder(PROMPTS).tokens, expected(PROMPTS).tokens)
    assert torch.equal(encoder(PROMPTS).pooled, expected(PROMPTS).pooled)
    encoder.save(tmp_path / "run")
    again = load_text_encoder(tmp_path / "run", reading=Reading("attended"))
    assert torch.equal(again(PROMPTS).tokens, encoder(PROMPTS).tokens)
    assert again.identity == encoder.identity


def test_weights_that_are_not_to_be_had_are_one_sentence_offline():
    with pytest.raises(LdmError) as caught:
        load_text_encoder("open_clip:ViT-H-14/laion2b_s32b_b79k")
    assert caught.value.code == ExitCode.IO
    assert "hf download laion/CLIP-ViT-H-14-laion2B-s32B-b79K" in caught.value.fix


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("open_clip:ViT-Q-99/x", "knows no model 'ViT-Q-99'"),
        ("open_clip:ViT-H-14/nowhere", "open_clip knows: laion2b_s32b_b79k"),
        ("open_clip:ViT-H-14", "'' is neither a file nor weights"),
    ],
)
def test_unknown_names_list_the_known_ones(source, match):
    with pytest.raises(LdmError, match=match):
        load_text_encoder(source)


def test_weights_that_may_hold_a_program_are_refused(small_model):
    pickled = small_model.with_suffix(".bin")
    pickled.write_bytes(b"")
    with pytest.raises(LdmError, match="only safetensors"):
        load_text_encoder(f"open_clip:tiny/{pickled}")
    broken = small_model.with_name("broken.safetensors")
    broken.write_bytes(small_model.read_bytes()[:1000])
    with pytest.raises(LdmError, match="cannot be read"):
        load_text_encoder(f"open_clip:tiny/{broken}")


# --- published configurations ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("clip-l", 123_060_480),
        ("open-clip-h", 340_387_840),
        ("open-clip-bigg", 694_659_840),
        ("t5-v1.1-xxl", 4_762_310_656),
    ],
)
def test_published_configurations_have_the_published_size(name, parameters):
    model = published_text_model(name)
    assert sum(weight.numel() for weight in model.parameters()) == parameters


def test_every_published_configuration_is_tested():
    assert PUBLISHED.keys() == {"clip-l", "open-clip-h", "open-clip-bigg", "t5-v1.1-xxl"}
    assert published_text_model("clip-l", projection=True).text_projection.out_features == 768
    with pytest.raises(LdmError, match="unknown text encoder 'clip-xl'"):
        published_text_model("clip-xl")


def test_the_widths_are_those_that_sdxl_and_sd3_expect():
    clips = [published_text_model(name).config for name in ("clip-l", "open-clip-bigg")]
    assert sum(config.hidden_size for config in clips) == 2_048
    assert sum(config.projection_dim for config in clips) == 2_048
    assert published_text_model("t5-v1.1-xxl").config.d_model == 4_096


def test_weights_fill_a_model_without_any_strictly(converted):
    state = converted.state_dict()
    for wrong, match in (
        ({"text_model.extra": torch.zeros(1)}, "has no place for extra"),
        ({"text_projection.weight": torch.zeros(3, 3)}, "has another text_projection"),
    ):
        with pytest.raises(LdmError, match=match) as caught:
            fill(to_meta(converted.config), {**state, **wrong}, "file")
        assert caught.value.code == ExitCode.IO
    less = dict(state)
    del less["text_model.final_layer_norm.bias"]
    with pytest.raises(LdmError, match="lacks final_layer_norm.bias"):
        fill(to_meta(converted.config), less, "file")


def test_t5_fills_both_names_of_its_table():
    from encoders import t5_model, t5_tokenizer
    from transformers import T5EncoderModel

    whole = t5_model()
    with torch.device("meta"):
        empty = T5EncoderModel(whole.config)
    state = {k: v for k, v in whole.state_dict().items() if k != "encoder.embed_tokens.weight"}
    fill(empty, state, "file")
    found, expected = (HuggingFaceTextEncoder(m, t5_tokenizer())(["one"]) for m in (empty, whole))
    assert torch.equal(found.tokens, expected.tokens)


def to_meta(config):
    from transformers import CLIPTextModelWithProjection

    with torch.device("meta"):
        return CLIPTextModelWithProjection(config)
