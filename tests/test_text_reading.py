"""How an encoder is read: padding, layers, chunks of long prompts, half precision."""

import pytest
import torch
from encoders import (
    CAPTIONS,
    clip_model,
    clip_tokenizer,
    t5_model,
    t5_tokenizer,
    tiny_clip,
    tiny_t5,
)

from ldm.errors import ExitCode, LdmError
from ldm.models.text import HuggingFaceTextEncoder, Reading, load_text_encoder, restore_text_encoder

CLOSE = {"atol": 1e-5, "rtol": 1e-5}  # other shapes add in another order
LONG = "a red circle, " * 40 + "a blue square"


def clip(pad="openai", **options):
    return HuggingFaceTextEncoder(clip_model(), clip_tokenizer(pad), **options)


def framed(tokenizer, prompts, **options):
    options = {"padding": "max_length", "max_length": 77, "truncation": True, **options}
    return tokenizer(list(prompts), return_tensors="pt", **options)["input_ids"]


@pytest.mark.parametrize("pad", ["openai", "openclip"])
@pytest.mark.parametrize("prompts", [CAPTIONS, ("wow!! a star !", "", "x" * 30)])
def test_attended_padding_is_what_transformers_gives_for_padded_ids(pad, prompts):
    encoder = clip(pad, reading=Reading("attended"))
    ids = framed(encoder.tokenizer, prompts)
    expected = encoder.model(ids)
    text = encoder(prompts)
    assert torch.equal(encoder.tokenize(prompts)[0], ids)
    assert text.mask.all()
    assert text.mask.shape == (3, 77)
    torch.testing.assert_close(text.tokens, expected.last_hidden_state, **CLOSE)
    torch.testing.assert_close(text.pooled, expected.pooler_output, **CLOSE)


def test_the_two_rules_of_padding_pool_alike_and_differ_behind_the_prompt():
    masked, attended = clip()(CAPTIONS), clip(reading=Reading("attended"))(CAPTIONS)
    torch.testing.assert_close(masked.pooled, attended.pooled, **CLOSE)
    real = masked.mask[2].sum()
    torch.testing.assert_close(masked.tokens[2, :real], attended.tokens[2, :real], **CLOSE)
    assert attended.tokens[2, real:].abs().min() > 0


def test_each_tokenizer_pads_with_its_own_token():
    openai, openclip = (
        clip(pad, reading=Reading("attended")).tokenize(["one star"])[0][0, -1]
        for pad in ("openai", "openclip")
    )
    assert (openai, openclip) == (len(clip_tokenizer()) - 1, 0)


def test_where_padding_is_masked_an_exclamation_mark_stays_a_word():
    ids, mask = clip("openclip").tokenize(["wow! a star", "one"])
    assert 0 not in ids[0]
    assert ids[1, mask[1].sum() :].eq(0).all()


def test_attended_padding_of_t5_sees_no_mask_and_pads_to_the_limit():
    encoder = tiny_t5(max_tokens=16, reading=Reading("attended"))
    ids = framed(encoder.tokenizer, CAPTIONS[1:], max_length=16)
    text = encoder(CAPTIONS[1:])
    torch.testing.assert_close(text.tokens, encoder.model(ids).last_hidden_state, **CLOSE)
    assert text.mask.all()


@pytest.mark.parametrize("layer", [-3, -2, -1])
@pytest.mark.parametrize("final_norm", [True, False])
@pytest.mark.parametrize("projection", [None, 24])
def test_a_layer_is_that_of_transformers_with_or_without_the_final_norm(
    layer, final_norm, projection
):
    model = clip_model(projection=projection)
    reading = Reading("attended", layer, final_norm)
    encoder = HuggingFaceTextEncoder(model, clip_tokenizer(), reading=reading)
    out = model(framed(encoder.tokenizer, CAPTIONS), output_hidden_states=True)
    expected = out.hidden_states[layer]
    if final_norm:
        expected = getattr(model, "text_model", model).final_layer_norm(expected)
    text = encoder(CAPTIONS)
    torch.testing.assert_close(text.tokens, expected, **CLOSE)
    pooled = out.pooler_output if projection is None else out.text_embeds
    torch.testing.assert_close(text.pooled, pooled, **CLOSE)  # pooled is of the last, whatever


def test_masked_states_of_an_inner_layer_do_not_depend_on_the_batch():
    encoder = clip(reading=Reading(layer=-2, final_norm=False))
    batch, alone = encoder(CAPTIONS), encoder(CAPTIONS[2:])
    length = alone.tokens.shape[1]
    torch.testing.assert_close(batch.tokens[2, :length], alone.tokens[0], **CLOSE)
    assert not batch.tokens[2, length:].any()


@pytest.mark.parametrize("final_norm", [True, False])
def test_inner_layers_of_t5_are_those_of_transformers(final_norm):
    reading = Reading("attended", layer=-2, final_norm=final_norm)
    encoder = tiny_t5(max_tokens=16, reading=reading)
    ids = framed(encoder.tokenizer, CAPTIONS[1:], max_length=16)
    expected = encoder.model(ids, output_hidden_states=True).hidden_states[-2]
    if final_norm:
        expected = encoder.model.encoder.final_layer_norm(expected)
    torch.testing.assert_close(encoder(CAPTIONS[1:]).tokens, expected, **CLOSE)


@pytest.mark.parametrize("layer", [0, 1, -4])
def test_a_layer_that_does_not_exist_is_a_configuration_error(layer):
    with pytest.raises(LdmError, match="this encoder has 3") as caught:
        clip(reading=Reading(layer=layer))
    assert caught.value.code == ExitCode.CONFIG
    assert "-3 to -1" in caught.value.fix


def test_the_last_layer_of_t5_without_its_norm_is_refused():
    with pytest.raises(LdmError, match="come with their final norm"):
        tiny_t5(reading=Reading(final_norm=False))


def test_identity_and_settings_name_only_what_is_not_the_default():
    plain = clip()
    assert "reading" not in plain.identity  # caches of earlier versions stay valid
    assert plain.settings == {}
    other = clip(reading=Reading("attended", -2), pad_to=80)
    assert other.identity["reading"] == {"padding": "attended", "layer": -2}
    assert other.settings == {"padding": "attended", "layer": -2, "pad_to": 80}
    assert other.identity["weights"] == plain.identity["weights"]
    assert plain.mask_rule != other.mask_rule


def test_settings_restore_the_encoder_that_was_saved(tmp_path):
    reading = Reading("attended", -2, final_norm=False, lower_case=True)
    encoder = HuggingFaceTextEncoder(
        tiny_clip().model, tiny_clip().tokenizer, max_tokens=20, reading=reading
    )
    encoder.save(tmp_path)
    again = restore_text_encoder(tmp_path, encoder.settings, max_tokens=encoder.max_tokens)
    assert again.identity == encoder.identity
    assert torch.equal(again(CAPTIONS).tokens, encoder(CAPTIONS).tokens)
    plain = restore_text_encoder(tmp_path, {})
    assert torch.equal(plain(CAPTIONS).tokens, tiny_clip()(CAPTIONS).tokens)
    with pytest.raises(LdmError, match="hold colour, unknown here"):
        restore_text_encoder(tmp_path, {"colour": "red"})


def test_lower_case_reads_as_the_lower_case_prompt_does():
    encoder = HuggingFaceTextEncoder(t5_model(), t5_tokenizer(), reading=Reading(lower_case=True))
    assert torch.equal(encoder([" One STAR "]).tokens, tiny_t5()(["one star"]).tokens)


def test_a_null_embedding_is_that_of_no_words_or_zeros():
    encoder = clip(reading=Reading("attended"))
    assert torch.equal(encoder.null().tokens, encoder([""]).tokens)
    encoder.zero_null = True
    assert not encoder.null().tokens.any()
    assert not encoder.null().pooled.any()
    assert encoder.null().mask.all()


# --- long prompts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["masked", "attended"])
def test_chunks_are_prompts_of_their_own_one_after_the_other(padding):
    encoder = clip(too_long="chunk", reading=Reading(padding))
    whole = encoder([LONG])
    chunks = []
    words = encoder.tokenizer(LONG, add_special_tokens=False)["input_ids"]
    ends = [72, 144, len(words)]  # 75 words fit, and "circle," ends after each fourth
    for begin, end in zip([0, *ends[:-1]], ends, strict=True):
        row = [encoder.prefix[0], *words[begin:end], encoder.suffix[0]]
        if padding == "attended":
            row += [encoder.tokenizer.pad_token_id] * (77 - len(row))
        chunks.append(encoder.model(torch.tensor([row])))
    expected = torch.cat([chunk.last_hidden_state for chunk in chunks], dim=1)
    torch.testing.assert_close(whole.tokens, expected, **CLOSE)
    assert whole.mask.all()
    torch.testing.assert_close(whole.pooled, chunks[0].pooler_output, **CLOSE)


@pytest.mark.parametrize("padding", ["masked", "attended"])
def test_a_prompt_beside_a_longer_one_is_embedded_as_it_is_alone(padding):
    encoder = clip(too_long="chunk", reading=Reading(padding))
    batch = encoder([CAPTIONS[2], LONG, CAPTIONS[1]])
    for row, prompt in ((0, CAPTIONS[2]), (1, LONG), (2, CAPTIONS[1])):
        alone = encoder([prompt])
        length = alone.tokens.shape[1]
        assert batch.mask[row].sum() == alone.mask.sum()
        torch.testing.assert_close(batch.tokens[row, :length], alone.tokens[0], **CLOSE)
        torch.testing.assert_close(batch.pooled[row], alone.pooled[0], **CLOSE)
        assert not batch.tokens[row, length:].any()


def test_chunking_leaves_a_prompt_that_fits_as_it_is():
    exactly = " ".join(["star"] * 75)
    chunked, plain = clip(too_long="chunk"), clip()
    assert torch.equal(chunked([exactly]).tokens, plain([exactly]).tokens)
    assert chunked([exactly + " star"]).mask.sum() == 77 + 3


def test_a_chunk_breaks_after_a_comma_where_one_is_near_and_else_between_words():
    encoder = clip(too_long="chunk")
    near = " ".join(["star"] * 60) + ", " + " ".join(["star"] * 30)
    assert encoder.tokenize([near])[1].sum(1).tolist() == [63, 32]
    far = " ".join(["star"] * 50) + ", " + " ".join(["star"] * 40)
    assert encoder.tokenize([far])[1].sum(1).tolist() == [77, 18]
    ids, mask = encoder.tokenize([" ".join(["circumference"] * 80)])
    assert mask.sum(1).tolist() == 13 * [74] + [26]  # twelve tokens a word
    assert ids[0, 1] == ids[1, 1]


def test_a_word_longer_than_a_chunk_is_cut():
    encoder = clip(too_long="chunk")
    mask = encoder.tokenize(["~" + "xq" * 120])[1]
    assert len(mask) > 1
    assert mask.sum(1).max() <= 77


def test_no_token_of_a_long_prompt_is_lost_or_repeated():
    encoder = clip(too_long="chunk")
    words = " ".join(f"{colour} star{mark}" for colour in CAPTIONS * 9 for mark in (",", "!", ""))
    ids, mask = encoder.tokenize([words])
    inner = [row[real][1:-1].tolist() for row, real in zip(ids, mask, strict=True)]
    flat = [token for row in inner for token in row]
    assert flat == encoder.tokenizer(words, add_special_tokens=False)["input_ids"]


def test_t5_reads_long_prompts_in_chunks_too():
    encoder = tiny_t5(max_tokens=8, too_long="chunk")
    text = encoder(["one star " * 6, "one star"])
    assert text.mask.sum(1).tolist() == [14, 3]
    assert text.pooled is None


# --- half precision -------------------------------------------------------------------------------


def test_t5_in_float16_keeps_the_layers_that_overflow_in_float32(tmp_path):
    encoder = tiny_t5()
    with torch.no_grad():  # products of the size that T5 v1.1 XXL has, beyond 65,504
        for block in encoder.model.encoder.block:
            block.layer[1].DenseReluDense.wo.weight.mul_(3e5)
    expected = encoder(CAPTIONS)
    encoder.save(tmp_path)
    loaded = load_text_encoder(tmp_path, dtype=torch.float16)
    moved = load_text_encoder(tmp_path).to("cpu", torch.float16)
    for half in (loaded, moved):
        wo = half.model.encoder.block[0].layer[1].DenseReluDense.wo.weight
        assert wo.dtype == torch.float32
        assert wo.abs().max() > 1e4
        assert half.model.shared.weight.dtype == torch.float16
        found = half(CAPTIONS)
        # 11 bits of mantissa, states of size 1
        torch.testing.assert_close(found.tokens, expected.tokens, atol=0.02, rtol=0)
    assert torch.equal(loaded(CAPTIONS).tokens, moved(CAPTIONS).tokens), (
        "moving keeps what loading keeps"
    )


@pytest.mark.parametrize("make", [tiny_clip, tiny_t5])
def test_bfloat16_is_near_float32(make):
    expected, found = make()(CAPTIONS), make().to("cpu", torch.bfloat16)(CAPTIONS)
    assert found.tokens.dtype == torch.float32
    # 8 bits of mantissa over two layers: a few hundredths of states of size 1
    torch.testing.assert_close(found.tokens, expected.tokens, atol=0.1, rtol=0)
