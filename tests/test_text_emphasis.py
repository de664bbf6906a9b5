"""Emphasis in prompts: the syntax, what weights do to states, and the way through the pipeline."""

import pytest
import torch
from encoders import CAPTIONS, clip_model, clip_tokenizer, t5_model, t5_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from test_text_joint import joint

from ldm.errors import ExitCode, LdmError
from ldm.models.text import HuggingFaceTextEncoder, Reading, parse_emphasis

CLOSE = {"atol": 1e-5, "rtol": 1e-5}  # the same modules, other shapes


def clip(**options):
    return HuggingFaceTextEncoder(clip_model(), clip_tokenizer(), **options)


ENCODERS = {
    "masked clip": clip,
    "attended clip": lambda: clip(reading=Reading("attended")),
    "inner layer": lambda: clip(reading=Reading("attended", -2, final_norm=False)),
    "t5": lambda: HuggingFaceTextEncoder(t5_model(), t5_tokenizer(), max_tokens=32),
    "sdxl": lambda: joint("sdxl"),
    "sd3": lambda: joint("sd3"),
}


@pytest.fixture(scope="module", params=ENCODERS)
def encoder(request):
    return ENCODERS[request.param]()


@pytest.mark.parametrize(
    ("prompt", "segments"),
    [
        ("", []),
        ("a red circle", [("a red circle", 1.0)]),
        ("a (red) circle", [("a ", 1.0), ("red", 1.1), (" circle", 1.0)]),
        ("a [red] circle", [("a ", 1.0), ("red", 1 / 1.1), (" circle", 1.0)]),
        ("a (red:1.3) circle", [("a ", 1.0), ("red", 1.3), (" circle", 1.0)]),
        ("((red))", [("red", 1.21)]),
        ("[[red]]", [("red", 1 / 1.21)]),
        ("([red])", [("red", 1.0)]),
        ("(a (b:2) c:1.5)", [("a ", 1.5), ("b", 3.0), (" c", 1.5)]),
        ("((red):1.3)", [("red", 1.43)]),
        ("(red:1)", [("red", 1.0)]),
        ("a (red:1.0) circle", [("a red circle", 1.0)]),
        ("(red:0)", [("red", 0.0)]),
        ("(red:.5)", [("red", 0.5)]),
        ("(red: 1.3 )", [("red", 1.3)]),
        ("(a:b:1.3)", [("a:b", 1.3)]),
        ("(a:b)", [("a:b", 1.1)]),
        ("16:9", [("16:9", 1.0)]),
        (r"a \(red\) circle", [("a (red) circle", 1.0)]),
        (r"(a\)b:1.3)", [("a)b", 1.3)]),
        (r"\[red\]", [("[red]", 1.0)]),
        (r"a\\b", [(r"a\b", 1.0)]),
        (r"a\b", [(r"a\b", 1.0)]),
        ("end\\", [("end\\", 1.0)]),
        ("()", []),
        ("(:1.3)", []),
        ("(red)(blue)", [("redblue", 1.1)]),
        ("line\n(two:1.2)", [("line\n", 1.0), ("two", 1.2)]),
    ],
)
def test_the_syntax(prompt, segments):
    found = parse_emphasis(prompt)
    assert [text for text, _ in found] == [text for text, _ in segments]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in segments])


@pytest.mark.parametrize(
    ("prompt", "match"),
    [
        ("a (red circle", r"'\(' at character 3, near 'a \(red circle', has no partner"),
        ("a red) circle", r"'\)' at character 6"),
        ("a smile :)", r"'\)' at character 10"),
        ("(a [b)]", r"'\)' at character 6"),
        ("[a", r"'\[' at character 1"),
        ("[red:0.5]", "a number in square brackets"),
        ("(red:99)", "weight 99 in .* is out of range"),
        ("(red:-1)", "weight -1 in .* is out of range"),
    ],
)
def test_what_is_malformed_is_refused_with_its_place(prompt, match):
    with pytest.raises(LdmError, match=match) as caught:
        parse_emphasis(prompt)
    assert caught.value.code == ExitCode.USAGE
    assert caught.value.fix


@given(st.text(alphabet="ab ,:1.\\", max_size=30))
def test_text_without_brackets_is_itself(text):
    plain = text.replace("\\", "")
    assert "".join(part for part, _ in parse_emphasis(plain)) == plain
    assert {weight for _, weight in parse_emphasis(plain)} <= {1.0}


@given(st.text(alphabet="ab()[]\\: 1", max_size=20))
def test_any_text_can_be_written_by_escaping(text):
    escaped = "".join(f"\\{letter}" if letter in "()[]\\" else letter for letter in text)
    assert parse_emphasis(escaped) == ([(text, 1.0)] if text else [])


def test_weight_one_leaves_the_embedding_bit_for_bit(encoder):
    plain = encoder(["two small yellow stars", "one star"])
    found = encoder(["two (small:1.0) yellow stars", "([one]) star"], weighting=True)
    assert torch.equal(found.tokens, plain.tokens)
    assert torch.equal(found.mask, plain.mask)
    assert plain.pooled is None or torch.equal(found.pooled, plain.pooled)


def test_without_weighting_brackets_are_text(encoder):
    prompts = ["two (small:1.3) yellow stars", "(unbalanced"]
    assert torch.equal(encoder(prompts).tokens, encoder(prompts, weighting=False).tokens)
    assert not torch.equal(encoder(prompts[:1]).tokens, encoder(["two small yellow stars"]).tokens)


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.5])
def test_a_weighted_state_lies_on_the_line_from_the_empty_prompt(weight):
    encoder = clip(reading=Reading("attended"))
    plain, empty = encoder(["two small yellow stars"]), encoder([""])
    found = encoder([f"two (small:{weight}) yellow stars"], weighting=True)
    expected = plain.tokens.clone()
    expected[0, 2] = empty.tokens[0, 2] + weight * (plain.tokens[0, 2] - empty.tokens[0, 2])
    torch.testing.assert_close(found.tokens, expected, **CLOSE)
    assert torch.equal(found.pooled, plain.pooled), "pooled vectors are of unweighted words"


def test_weights_of_a_prompt_do_not_touch_its_neighbours(encoder):
    plain = encoder(list(CAPTIONS[1:]))
    found = encoder(["two (small:1.4) yellow stars", CAPTIONS[2]], weighting=True)
    assert torch.equal(found.tokens[1], plain.tokens[1])
    assert not torch.equal(found.tokens[0], plain.tokens[0])


@pytest.mark.parametrize("padding", ["masked", "attended"])
def test_weights_reach_the_later_chunks_of_a_long_prompt(padding):
    encoder = clip(too_long="chunk", reading=Reading(padding))
    words = ["star"] * 100
    plain = encoder([" ".join(words)])
    words[90] = "(star:1.5)"
    found = encoder([" ".join(words)], weighting=True)
    changed = (found.tokens != plain.tokens).any(-1)[0].nonzero().flatten().tolist()
    assert changed == [77 + 1 + 90 - 75]


def test_a_prompt_of_weights_only_is_an_empty_one():
    encoder = clip()
    assert torch.equal(encoder(["(:1.3)"], weighting=True).tokens, encoder([""]).tokens)
