"""Text encoders: masks, padding, limits, hostile prompts, files and identity. No network."""

import json
import shutil

import pytest
import torch
from encoders import CAPTIONS, tiny_clip, tiny_t5
from safetensors.torch import load_file, save_file

from ldm.errors import ExitCode, LdmError
from ldm.models.text import (
    MAX_PROMPT_BYTES,
    HuggingFaceTextEncoder,
    load_text_encoder,
    random_text_encoder,
    train_bpe,
)

CLOSE = {"atol": 2e-6, "rtol": 0}  # states have size 1; other shapes add in another order


def tiny_projecting_clip():
    from transformers import CLIPTextModelWithProjection

    encoder = tiny_clip()
    config = encoder.model.config
    config.projection_dim = 24
    return HuggingFaceTextEncoder(CLIPTextModelWithProjection(config), encoder.tokenizer)


BUILDERS = {"clip": tiny_clip, "projecting clip": tiny_projecting_clip, "t5": tiny_t5}


@pytest.fixture(scope="module", params=BUILDERS)
def encoder(request):
    return BUILDERS[request.param]()


def test_a_mask_covers_the_words_and_the_control_tokens_around_them():
    ids, mask = tiny_clip().tokenize(["one star", "two small yellow stars"])
    assert mask.tolist() == [[True] * 4 + [False] * 2, [True] * 6]
    assert ids[0, 0] == 0
    assert ids[0, 3:].tolist() == [1, 1, 1]  # the end token, then padding with the same id
    ids, mask = tiny_t5().tokenize(["one star", "two small yellow stars"])
    assert mask.tolist() == [[True] * 3 + [False] * 2, [True] * 5]
    assert ids[0, 2:].tolist() == [1, 0, 0]


def test_a_prompt_in_a_batch_is_embedded_as_it_is_alone(encoder):
    batch = encoder(CAPTIONS)
    for row, caption in enumerate(CAPTIONS):
        alone = encoder([caption])
        length = alone.tokens.shape[1]
        assert batch.mask[row].sum() == length
        torch.testing.assert_close(batch.tokens[row, :length], alone.tokens[0], **CLOSE)
        if alone.pooled is not None:
            torch.testing.assert_close(batch.pooled[row], alone.pooled[0], **CLOSE)


def test_states_of_masked_tokens_are_zero(encoder):
    text = encoder(CAPTIONS)
    assert (~text.mask).any()
    assert torch.equal(text.tokens[~text.mask], torch.zeros_like(text.tokens[~text.mask]))


@pytest.mark.parametrize("pad_to", [77, 128, 256])
def test_padding_to_any_length_adds_only_masked_zeros(encoder, pad_to):
    padded = HuggingFaceTextEncoder(encoder.model, encoder.tokenizer, pad_to=pad_to)(CAPTIONS)
    plain = encoder(CAPTIONS)
    length = plain.tokens.shape[1]
    assert padded.tokens.shape[1] == padded.mask.shape[1] == pad_to
    assert torch.equal(padded.tokens[:, :length], plain.tokens)
    assert torch.equal(padded.mask[:, :length], plain.mask)
    assert not padded.mask[:, length:].any()
    assert not padded.tokens[:, length:].any()


def test_the_embedding_is_that_of_transformers(encoder):
    framed = encoder.tokenizer(list(CAPTIONS), padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = encoder.model(**framed)
    text = encoder(CAPTIONS)
    mask = framed["attention_mask"].bool()
    assert torch.equal(text.mask, mask)
    torch.testing.assert_close(text.tokens[mask], expected.last_hidden_state[mask], **CLOSE)
    if encoder.kind == "clip":
        pooled = expected.get("text_embeds", expected.get("pooler_output"))
        torch.testing.assert_close(text.pooled, pooled, **CLOSE)
        assert text.pooled.shape[1] == encoder.pooled_width
    assert text.tokens.shape[2] == encoder.width


def test_the_empty_prompt_has_an_embedding(encoder):
    text = encoder([""])
    assert text.mask.all()
    assert text.tokens.isfinite().all()


def test_a_prompt_that_is_too_long_is_refused_with_count_limit_and_fix(encoder):
    strict = HuggingFaceTextEncoder(encoder.model, encoder.tokenizer, max_tokens=8)
    with pytest.raises(LdmError) as caught:
        strict(["one star", "a red star and " * 5])
    count = len(encoder.tokenizer("a red star and " * 5)["input_ids"])
    assert "'a red star and a red star" in caught.value.what
    assert f"has {count} tokens" in caught.value.what
    assert "takes 8" in caught.value.what
    assert "shorten" in caught.value.fix
    assert caught.value.code == ExitCode.USAGE


def test_a_prompt_of_exactly_the_limit_is_accepted(encoder):
    count = encoder.tokenize(["two small yellow stars"])[1].shape[1]
    options = {"max_tokens": count, "too_long": "truncate"}
    strict = HuggingFaceTextEncoder(encoder.model, encoder.tokenizer, **options)
    assert strict(["two small yellow stars"]).mask.sum() == count
    assert strict.truncated_prompts == 0
    shorter = HuggingFaceTextEncoder(encoder.model, encoder.tokenizer, max_tokens=count - 1)
    with pytest.raises(LdmError, match=f"has {count} tokens"):
        shorter(["two small yellow stars"])


def test_truncation_keeps_the_end_token_and_counts(encoder):
    options = {"max_tokens": 5, "too_long": "truncate"}
    cutting = HuggingFaceTextEncoder(encoder.model, encoder.tokenizer, **options)
    ids, mask = cutting.tokenize(["one star", CAPTIONS[0], CAPTIONS[0]])
    assert ids.shape[1] == 5
    assert ids[1, -1] == encoder.tokenizer.eos_token_id
    assert mask[1].all()
    assert cutting.truncated_prompts == 2


@pytest.mark.parametrize("said", ["<|endoftext|>", "<|startoftext|>", "<|ENDOFTEXT|>", "</s><pad>"])
def test_a_control_token_spelled_in_a_prompt_is_not_one(encoder, said):
    ids, mask = encoder.tokenize([f"one {said} star"])
    inner = ids[0, len(encoder.prefix) : -len(encoder.suffix)].tolist()
    control = {encoder.tokenizer.bos_token_id, encoder.tokenizer.eos_token_id}
    assert not control & set(inner)
    assert encoder.tokenizer.pad_token_id not in inner
    assert mask.all()


def test_clip_reads_a_spelled_control_token_as_text():
    encoder = tiny_clip()
    ids, _ = encoder.tokenize(["one <|endoftext|> star"])
    spelled = encoder.tokenizer.decode(ids[0, 1:-1])
    assert spelled.replace(" ", "") == "one<|endoftext|>star"


@pytest.mark.parametrize(
    "bad", ["nul \0 inside", "x" * (MAX_PROMPT_BYTES + 1), 3, None, b"bytes", "\ud800"]
)
def test_a_prompt_that_is_no_text_is_refused(encoder, bad):
    with pytest.raises(LdmError) as caught:
        encoder(["one star", bad])
    assert caught.value.code == ExitCode.USAGE
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("bad", ["one star", []])
def test_a_batch_must_be_a_sequence_of_prompts(encoder, bad):
    with pytest.raises(LdmError):
        encoder(bad)


def test_any_text_can_be_spelled_without_an_unknown_token():
    encoder = tiny_clip()
    texts = ["emoji 🦊 日本語 é ñ", "tab\tnewline\n", "~^|§"]
    for text, ids in zip(texts, encoder.tokenizer(texts)["input_ids"], strict=True):
        assert encoder.tokenizer.unk_token_id not in ids[1:-1]
        spelled = encoder.tokenizer.decode(ids, skip_special_tokens=True)
        assert spelled.replace(" ", "") == "".join(text.split())


def test_the_encoder_is_frozen_and_stays_in_eval_mode(encoder):
    encoder.train()
    assert not any(module.training for module in encoder.modules())
    assert not any(weight.requires_grad for weight in encoder.parameters())
    assert not encoder(["one star"]).tokens.requires_grad


def test_a_saved_encoder_loads_equal_from_both_layouts(encoder, tmp_path, capfd):
    encoder.save(tmp_path / "run")
    flat = tmp_path / "flat"
    shutil.copytree(tmp_path / "run" / "text_encoder", flat)
    shutil.copytree(tmp_path / "run" / "tokenizer", flat, dirs_exist_ok=True)
    expected = encoder(CAPTIONS)
    for place in (tmp_path / "run", tmp_path / "run" / "text_encoder", flat):
        loaded = load_text_encoder(place)
        found = loaded(CAPTIONS)
        assert torch.equal(found.tokens, expected.tokens)
        assert torch.equal(found.mask, expected.mask)
        assert encoder.kind == "t5" or torch.equal(found.pooled, expected.pooled)
        assert loaded.identity == encoder.identity
    assert capfd.readouterr() == ("", "")  # no bars, no load reports


def test_a_saved_encoder_opens_in_transformers_alone(tmp_path):
    from transformers import CLIPTextModel, CLIPTokenizer

    tiny_clip().save(tmp_path)
    model = CLIPTextModel.from_pretrained(tmp_path / "text_encoder")
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    framed = tokenizer(list(CAPTIONS), padding=True, return_tensors="pt")
    states = model(**framed).last_hidden_state * framed["attention_mask"][..., None]
    torch.testing.assert_close(states, tiny_clip()(CAPTIONS).tokens, **CLOSE)


def test_the_text_tower_of_a_whole_clip_checkpoint_is_found(tmp_path):
    """The layout of openai/clip-vit-large-patch14: both towers in one file."""
    from transformers import CLIPConfig, CLIPModel

    encoder = tiny_clip()
    vision = {"hidden_size": 32, "num_attention_heads": 1, "num_hidden_layers": 1}
    config = CLIPConfig(text_config=encoder.model.config.to_dict(), vision_config=vision)
    whole = CLIPModel(config)
    whole.text_model.load_state_dict(encoder.model.state_dict())
    whole.save_pretrained(tmp_path)
    encoder.tokenizer.save_pretrained(tmp_path)
    loaded = load_text_encoder(tmp_path)
    assert torch.equal(loaded(CAPTIONS).tokens, encoder(CAPTIONS).tokens)
    assert loaded.identity == encoder.identity


def test_weights_saved_in_bfloat16_load_as_float32(tmp_path):
    encoder = tiny_clip()
    encoder.model.to(torch.bfloat16)
    encoder.save(tmp_path)
    loaded = load_text_encoder(tmp_path)
    assert {weight.dtype for weight in loaded.parameters()} == {torch.float32}
    assert load_text_encoder(tmp_path, dtype=torch.bfloat16)(["star"]).tokens.dtype == torch.float32
    assert load_text_encoder(tmp_path, dtype=torch.bfloat16).identity == loaded.identity


def test_weights_whose_file_names_a_precision_are_found(tmp_path):
    encoder = tiny_clip()
    encoder.model.save_pretrained(tmp_path / "text_encoder", variant="fp16")
    encoder.tokenizer.save_pretrained(tmp_path / "tokenizer")
    assert not (tmp_path / "text_encoder" / "model.safetensors").exists()
    assert load_text_encoder(tmp_path).identity == encoder.identity


def test_identity_changes_with_a_weight_a_word_or_a_setting():
    same, other = tiny_clip(), tiny_clip()
    assert same.identity == other.identity
    with torch.no_grad():
        next(other.model.parameters()).view(-1)[5] += 1e-3
    changed = HuggingFaceTextEncoder(other.model, other.tokenizer).identity
    assert changed["weights"] != same.identity["weights"]
    assert changed["tokenizer"] == same.identity["tokenizer"]
    words = random_text_encoder(["fox fox fox"], width=32, max_tokens=40)
    assert words.identity["tokenizer"] != same.identity["tokenizer"]
    same.model.config.hidden_act = "gelu"
    setting = HuggingFaceTextEncoder(same.model, same.tokenizer).identity
    assert setting != tiny_clip().identity
    json.dumps(setting)


def test_the_vocabulary_is_a_function_of_the_captions():
    """The trainer's own hash tables are seeded anew in every process and object."""
    captions = [f"{a}{b}{c}" for a in "kqxw" for b in "aeiou" for c in "rstl"]  # ties everywhere
    states = {tuple(sorted(train_bpe(captions, vocab_size=560, max_tokens=9).get_vocab().items()))}
    for order in (captions[::-1], captions[7:] + captions[:7]):
        tokenizer = train_bpe(order, vocab_size=560, max_tokens=9)
        states.add(tuple(sorted(tokenizer.get_vocab().items())))
    assert len(states) == 1
    assert len(states.pop()) == 560


def test_building_a_random_encoder_is_reproducible_and_draws_no_global_number():
    before = torch.get_rng_state()
    first, again, third = tiny_clip(seed=1), tiny_clip(seed=1), tiny_clip(seed=2)
    assert torch.equal(before, torch.get_rng_state())
    assert first.identity == again.identity
    assert first.identity["weights"] != third.identity["weights"]


def test_a_hub_id_that_is_not_cached_is_one_sentence_offline(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(LdmError) as caught:
        load_text_encoder("openai/clip-vit-large-patch14-not-there")
    assert caught.value.code == ExitCode.IO
    assert "hf download" in caught.value.fix
    assert "ldm train-clip" in caught.value.fix


def test_missing_or_damaged_files_are_refused(tmp_path):
    with pytest.raises(LdmError, match="holds no text encoder"):
        load_text_encoder(tmp_path)
    tiny_clip().save(tmp_path)
    weights = tmp_path / "text_encoder" / "model.safetensors"
    whole = weights.read_bytes()

    lacking = load_file(weights)
    lacking.pop(next(name for name in lacking if "final_layer_norm.weight" in name))
    save_file(lacking, weights, metadata={"format": "pt"})
    with pytest.raises(LdmError, match="lacks 1 weights, .*final_layer_norm.weight"):
        load_text_encoder(tmp_path)

    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(LdmError) as caught:
        load_text_encoder(tmp_path)
    assert caught.value.code == ExitCode.IO
    assert "text_encoder" in caught.value.where

    weights.write_bytes(whole)
    shutil.rmtree(tmp_path / "tokenizer")
    with pytest.raises(LdmError) as caught:
        load_text_encoder(tmp_path)
    assert "tokenizer" in caught.value.where


def test_a_pickled_checkpoint_is_not_opened(tmp_path):
    encoder = tiny_clip()
    encoder.save(tmp_path)
    (tmp_path / "text_encoder" / "model.safetensors").unlink()
    torch.save(encoder.model.state_dict(), tmp_path / "text_encoder" / "pytorch_model.bin")
    with pytest.raises(LdmError, match="cannot be read"):
        load_text_encoder(tmp_path)


def test_a_model_of_another_kind_is_named_with_the_known_ones(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(LdmError, match="'bert' model, not one of clip, clip_text_model, t5"):
        load_text_encoder(tmp_path)


@pytest.mark.parametrize(
    "options", [{"max_tokens": 41}, {"max_tokens": 2}, {"max_tokens": 20, "pad_to": 16}]
)
def test_impossible_lengths_are_a_configuration_error(options):
    encoder = tiny_clip()
    with pytest.raises(LdmError) as caught:
        HuggingFaceTextEncoder(encoder.model, encoder.tokenizer, **options)
    assert caught.value.code == ExitCode.CONFIG
