"""Several encoders as one, and every encoder as its diffusers pipeline reads it."""

import json

import pytest
import torch
from encoders import CAPTIONS, clip_model, clip_tokenizer, t5_model, t5_tokenizer

from ldm.errors import ExitCode, LdmError
from ldm.models.text import (
    HuggingFaceTextEncoder,
    JointTextEncoder,
    Reading,
    load_diffusers_text,
    load_joint_text_encoder,
    random_text_encoder,
    restore_text_encoder,
)
from ldm.models.text.joint import penultimate

CLOSE = {"atol": 1e-5, "rtol": 1e-5}  # the same modules, batched alike
PROMPTS = (*CAPTIONS, "wow!! A Star, seen from (below)")
LONG = "a red circle, " * 40 + "a blue square"
NEGATIVE = "two blue squares!"


def parts(kind):
    """Components of a tiny pipeline as diffusers names them."""
    if kind.startswith("pixart"):
        return {"text_encoder": t5_model(), "tokenizer": t5_tokenizer()}
    if kind == "sd":
        return {"text_encoder": clip_model(), "tokenizer": clip_tokenizer()}
    if kind == "sd2":
        return {
            "text_encoder": clip_model(act="gelu", layers=2),
            "tokenizer": clip_tokenizer("openclip"),
        }
    first = clip_model(seed=1, projection=16 if kind == "sd3" else None)
    second = clip_model(width=48, act="gelu", projection=24, seed=2)
    found = {"text_encoder": first, "tokenizer": clip_tokenizer()}
    found |= {"text_encoder_2": second, "tokenizer_2": clip_tokenizer("openclip")}
    if kind == "sd3":
        found |= {"text_encoder_3": t5_model(96, seed=3), "tokenizer_3": t5_tokenizer()}
    return found


def write(root, found, **index):
    """The text folders of a diffusers directory."""
    for name, part in found.items():
        if part is not None:
            part.save_pretrained(root / name)
    (root / "model_index.json").write_text(json.dumps(index))
    (root / "transformer").mkdir()
    (root / "transformer" / "config.json").write_text('{"joint_attention_dim": 96}')
    return root


def pipeline(kind, found, **options):
    import diffusers

    name, more = {
        "sd": ("StableDiffusionPipeline", ("safety_checker", "feature_extractor")),
        "sd2": ("StableDiffusionPipeline", ("safety_checker", "feature_extractor")),
        "sdxl": ("StableDiffusionXLPipeline", ()),
        "sd3": ("StableDiffusion3Pipeline", ()),
        "pixart-alpha": ("PixArtAlphaPipeline", ()),
        "pixart-sigma": ("PixArtSigmaPipeline", ()),
    }[kind]
    net = "unet" if kind.startswith("sd") and kind != "sd3" else "transformer"
    missing = dict.fromkeys(("vae", net, "scheduler", *more))
    return getattr(diffusers, name)(**found, **missing, **options), name


@pytest.mark.parametrize("kind", ["sd", "sd2"])
def test_embeddings_are_what_stable_diffusion_feeds(kind, tmp_path):
    found = parts(kind)
    pipe, name = pipeline(kind, found, requires_safety_checker=False)
    encoder = load_diffusers_text(write(tmp_path / "m", found), name)
    given, null = pipe.encode_prompt(list(PROMPTS), "cpu", 1, True)
    torch.testing.assert_close(encoder(PROMPTS).tokens, given, **CLOSE)
    torch.testing.assert_close(encoder.null().tokens, null[:1], **CLOSE)
    _, negative = pipe.encode_prompt(["one"], "cpu", 1, True, negative_prompt=[NEGATIVE])
    torch.testing.assert_close(encoder([NEGATIVE]).tokens, negative, **CLOSE)


def test_clip_skip_of_stable_diffusion_is_an_inner_layer_with_the_final_norm():
    found = parts("sd")
    pipe, _ = pipeline("sd", found, requires_safety_checker=False)
    # its clip_skip looks for text_model, which transformers 5.6 took away
    pipe.text_encoder.__dict__["text_model"] = pipe.text_encoder
    expected, _ = pipe.encode_prompt(list(PROMPTS), "cpu", 1, False, clip_skip=1)
    encoder = HuggingFaceTextEncoder(*found.values(), reading=Reading("attended", layer=-2))
    torch.testing.assert_close(encoder(PROMPTS).tokens, expected, **CLOSE)


@pytest.mark.parametrize("zeros", [True, False])
def test_embeddings_are_what_sdxl_feeds(zeros, tmp_path):
    found = parts("sdxl")
    pipe, name = pipeline("sdxl", found, force_zeros_for_empty_prompt=zeros)
    root = write(tmp_path / "m", found, force_zeros_for_empty_prompt=zeros)
    encoder = load_diffusers_text(root, name)
    given, null, pooled, null_pooled = pipe.encode_prompt(list(PROMPTS), device="cpu")
    text = encoder(PROMPTS)
    torch.testing.assert_close(text.tokens, given, **CLOSE)
    torch.testing.assert_close(text.pooled, pooled, **CLOSE)
    assert text.mask.all()
    assert (encoder.width, encoder.pooled_width, encoder.max_tokens) == (32 + 48, 24, 77)
    assert encoder.zero_null == zeros
    torch.testing.assert_close(encoder.null().tokens, null[:1], **CLOSE)
    torch.testing.assert_close(encoder.null().pooled, null_pooled[:1], **CLOSE)
    asked = pipe.encode_prompt(["one"], device="cpu", negative_prompt=NEGATIVE)
    torch.testing.assert_close(encoder([NEGATIVE]).tokens, asked[1], **CLOSE)
    torch.testing.assert_close(encoder([NEGATIVE]).pooled, asked[3], **CLOSE)


def test_the_refiner_of_sdxl_reads_with_its_second_encoder_alone(tmp_path):
    found = parts("sdxl") | {"text_encoder": None, "tokenizer": None}
    pipe, _ = pipeline("sdxl", found)
    encoder = load_diffusers_text(write(tmp_path / "m", found), "StableDiffusionXLImg2ImgPipeline")
    given, _, pooled, _ = pipe.encode_prompt(list(PROMPTS), device="cpu")
    torch.testing.assert_close(encoder(PROMPTS).tokens, given, **CLOSE)
    torch.testing.assert_close(encoder(PROMPTS).pooled, pooled, **CLOSE)
    encoder.save(tmp_path / "again")
    assert sorted(p.name for p in (tmp_path / "again").iterdir()) == [
        "text_encoder_2",
        "tokenizer_2",
    ]


@pytest.mark.parametrize("with_t5", [True, False])
def test_embeddings_are_what_sd3_feeds(with_t5, tmp_path):
    from types import SimpleNamespace

    found = parts("sd3") | ({} if with_t5 else {"text_encoder_3": None, "tokenizer_3": None})
    pipe, name = pipeline("sd3", found)
    # without a T5 the pipeline asks its denoiser how wide the zeros are
    asked = SimpleNamespace(config=SimpleNamespace(joint_attention_dim=96))
    pipe.__dict__["transformer"] = asked
    encoder = load_diffusers_text(write(tmp_path / "m", found), name)
    given, null, pooled, null_pooled = pipe.encode_prompt(list(PROMPTS), None, None, device="cpu")
    text = encoder(PROMPTS)
    torch.testing.assert_close(text.tokens, given, **CLOSE)
    torch.testing.assert_close(text.pooled, pooled, **CLOSE)
    assert text.mask.all()
    assert text.mask.shape == (len(PROMPTS), 77 + 256)
    assert (encoder.width, encoder.pooled_width) == (96, 16 + 24)
    torch.testing.assert_close(encoder.null().tokens, null[:1], **CLOSE)
    torch.testing.assert_close(encoder.null().pooled, null_pooled[:1], **CLOSE)


@pytest.mark.parametrize(("kind", "limit"), [("pixart-alpha", 120), ("pixart-sigma", 300)])
def test_embeddings_are_what_pixart_feeds(kind, limit, tmp_path):
    found = parts(kind)
    pipe, name = pipeline(kind, found)
    encoder = load_diffusers_text(write(tmp_path / "m", found), name)
    given, mask, null, null_mask = pipe.encode_prompt(list(PROMPTS), device="cpu")
    text, empty = encoder(PROMPTS), encoder.null()
    assert text.mask.shape == (len(PROMPTS), limit)
    assert torch.equal(text.mask, mask.bool())
    torch.testing.assert_close(text.tokens[text.mask], given[mask.bool()], **CLOSE)
    assert torch.equal(empty.mask, null_mask[:1].bool())
    torch.testing.assert_close(empty.tokens[empty.mask], null[:1][empty.mask], **CLOSE)


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3"])
def test_truncation_is_that_of_diffusers(kind, tmp_path):
    found = parts(kind)
    pipe, name = pipeline(kind, found)
    encoder = load_diffusers_text(write(tmp_path / "m", found), name, too_long="truncate")
    ask = {"sd": ("cpu", 1, False), "sdxl": (None, "cpu"), "sd3": (None, None, "cpu")}[kind]
    expected = pipe.encode_prompt([LONG], *ask)
    torch.testing.assert_close(encoder([LONG]).tokens, expected[0], **CLOSE)
    assert encoder.truncated_prompts == 1
    encoder.too_long = "error"
    with pytest.raises(LdmError, match="takes 77"):
        encoder([LONG])


def test_a_pipeline_that_is_not_known_is_named(tmp_path):
    with pytest.raises(LdmError, match="text encoders of a SanaPipeline are not known"):
        load_diffusers_text(tmp_path, "SanaPipeline")


def joint(style, **options):
    found = parts(style)
    padding = options.pop("padding", "attended")
    encoders = [
        HuggingFaceTextEncoder(
            found[f"text_encoder{s}"],
            found[f"tokenizer{s}"],
            too_long=options.get("too_long", "error"),
            max_tokens=32 if s == "_3" else None,
            reading=Reading(padding) if s == "_3" else penultimate(padding),
        )
        for s in ("", "_2", "_3")
        if f"text_encoder{s}" in found
    ]
    return JointTextEncoder(encoders, style)


@pytest.mark.parametrize("style", ["sdxl", "sd3"])
def test_a_saved_joint_encoder_loads_equal_in_the_layout_of_diffusers(style, tmp_path, capfd):
    encoder = joint(style)
    encoder.save(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == set(encoder.components())
    loaded = restore_text_encoder(tmp_path, json.loads(json.dumps(encoder.settings)))
    expected, found = encoder(CAPTIONS), loaded(CAPTIONS)
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.pooled, expected.pooled)
    assert loaded.identity == encoder.identity
    sources = [tmp_path / f"text_encoder{s}" for s in ("", "_2", "_3")[: len(encoder.encoders)]]
    apart = load_joint_text_encoder(sources, style, t5_tokens=32)
    assert apart.identity == encoder.identity
    assert capfd.readouterr() == ("", "")


def test_exchanged_encoders_are_another_encoder():
    one = joint("sdxl")
    other = JointTextEncoder([*one.encoders][::-1], "sdxl")
    for key in ("weights", "tokenizer"):
        assert one.identity[key] != other.identity[key]
    assert not torch.equal(one(CAPTIONS).tokens, other(CAPTIONS).tokens)


@pytest.mark.parametrize("style", ["sdxl", "sd3"])
def test_masked_padding_makes_a_joint_embedding_independent_of_the_batch(style):
    encoder = joint(style, padding="masked")
    batch, alone = encoder(CAPTIONS), encoder(CAPTIONS[2:])
    assert not batch.mask.all()
    assert not batch.tokens[~batch.mask].any()
    torch.testing.assert_close(batch.tokens[2][batch.mask[2]], alone.tokens[0], **CLOSE)
    torch.testing.assert_close(batch.pooled[2], alone.pooled[0], **CLOSE)


@pytest.mark.parametrize("padding", ["masked", "attended"])
def test_the_chunks_of_joined_clips_end_at_the_same_words(padding):
    encoder = joint("sdxl", too_long="chunk", padding=padding)
    text = encoder([LONG, CAPTIONS[0]])
    singly = [clip([LONG]) for clip in encoder.clips]
    assert text.tokens.shape[1] == singly[0].tokens.shape[1] == singly[1].tokens.shape[1]
    beside = torch.cat([one.tokens for one in singly], dim=2)
    torch.testing.assert_close(text.tokens[:1], beside, **CLOSE)


def test_chunks_agree_where_the_tokenizers_count_otherwise():
    """One vocabulary knows the words of the prompt whole, the other spells them in letters."""
    prompt = "photograph of mountains, " * 8
    knowing = random_text_encoder([prompt], width=32, max_tokens=77)
    parts = ((clip_model(), clip_tokenizer()), (knowing.model, knowing.tokenizer))
    encoders = [
        HuggingFaceTextEncoder(*part, too_long="chunk", reading=penultimate("attended"))
        for part in parts
    ]
    said = []
    for clip, other in (encoders, encoders[::-1]):
        tokens = clip.prompts.encode([prompt], companions=[other.prompts])
        assert tokens.mask.sum(1).max() <= 77
        texts = [clip.tokenizer.decode(row, skip_special_tokens=True) for row in tokens.ids]
        said.append(["".join(text.split()) for text in texts])
    assert said[0] == said[1]
    assert len(said[0]) > 1
    assert JointTextEncoder(encoders, "sdxl")([prompt]).tokens.shape[1] == 77 * len(said[0])


def test_sd3_reads_long_prompts_in_chunks_of_each_kind():
    encoder = joint("sd3", too_long="chunk")
    text = encoder([LONG])
    clips, t5 = encoder.clips[0]([LONG]).tokens.shape[1], encoder.t5([LONG]).tokens.shape[1]
    assert text.tokens.shape[1] == clips + t5
    assert clips == 3 * 77


def clip(**options):
    return HuggingFaceTextEncoder(clip_model(**options), clip_tokenizer())


def t5(width=96):
    return HuggingFaceTextEncoder(t5_model(width), t5_tokenizer())


@pytest.mark.parametrize(
    ("style", "encoders", "match"),
    [
        ("sdxl", lambda: [t5(), clip()], "cannot be made of t5"),
        ("sdxl", lambda: [clip(), clip(), t5()], "cannot be made of clip"),
        ("sd3", lambda: [clip()], "cannot be made of clip"),
        ("sd3", lambda: [clip(), clip(), t5()], "one has none"),
        ("sd3", lambda: [clip(projection=8), clip(projection=8), t5(32)], "width 32 of T5"),
        ("sd3", lambda: [clip(projection=8), clip(projection=8)], "width None of T5"),
    ],
)
def test_encoders_that_do_not_fit_together_are_refused(style, encoders, match):
    with pytest.raises(LdmError, match=match) as caught:
        JointTextEncoder(encoders(), style)
    assert caught.value.code == ExitCode.CONFIG


def test_one_rule_of_padding_holds_for_all_encoders():
    attended = HuggingFaceTextEncoder(clip_model(), clip_tokenizer(), reading=Reading("attended"))
    with pytest.raises(LdmError, match="others do not"):
        JointTextEncoder([clip(), attended], "sdxl")


def test_a_model_with_one_encoder_is_no_joint_one(tmp_path):
    clip().save(tmp_path)
    with pytest.raises(LdmError, match="no text_encoder_2/config.json"):
        load_joint_text_encoder([tmp_path], "sdxl")
