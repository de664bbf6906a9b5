"""Classifier-free guidance: calls, formula, interval, rescale, padding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ldm.diffusion.core import Diffusion
from ldm.diffusion.guidance import classifier_free, stack
from ldm.diffusion.prediction import PREDICTIONS
from ldm.diffusion.process import PROCESSES
from ldm.errors import LdmError
from ldm.types import Level, TextEmbedding
from tests.oracle import points, text_of

DIFFUSION = Diffusion(PROCESSES["rectified_flow"], PREDICTIONS["flow"])
LEVEL = Level(0.4, 0.6, 0.4)
X = points(3, 2, 4, 4)
TEXT, NULL = text_of(3, 1.0), text_of(3, -1.0)


class Net:
    """Says x^2 plus the mean of its unmasked tokens, times x; notes how many rows it was given."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, x: Tensor, t: Tensor, text: TextEmbedding) -> Tensor:
        self.rows.append(len(x))
        shown = text.tokens[..., 0] * text.mask
        said = shown.sum(1) / text.mask.sum(1)
        return x.square() + said.reshape(-1, 1, 1, 1) * x


def one(text: TextEmbedding) -> Tensor:
    return DIFFUSION.denoise(Net(), X, LEVEL, text)


@pytest.mark.parametrize(("scale", "text"), [(1.0, TEXT), (0.0, NULL)], ids=["off", "uncond"])
def test_guidance_scale_one_and_zero_call_the_network_once(
    scale: float, text: TextEmbedding
) -> None:
    net = Net()
    x0 = classifier_free(DIFFUSION, net, TEXT, NULL, scale)(X, LEVEL)
    assert net.rows == [3]
    assert torch.equal(x0, one(text))


@pytest.mark.parametrize("scale", [0.5, 2.0, 7.5])
def test_guidance_extrapolates_in_one_batched_call(scale: float) -> None:
    net = Net()
    x0 = classifier_free(DIFFUSION, net, TEXT, NULL, scale)(X, LEVEL)
    assert net.rows == [6]
    assert_close(x0, one(NULL) + scale * (one(TEXT) - one(NULL)))


@pytest.mark.parametrize(("interval", "active"), [((0.2, 0.6), True), ((0.5, 1.0), False)])
def test_guidance_acts_within_its_interval_only(
    interval: tuple[float, float], active: bool
) -> None:
    net = Net()
    x0 = classifier_free(DIFFUSION, net, TEXT, NULL, 3.0, interval=interval)(X, LEVEL)
    assert net.rows == ([6] if active else [3])
    assert torch.equal(x0, one(TEXT)) != active


def test_rescale_restores_the_contrast_of_the_conditional_picture() -> None:
    axes = (1, 2, 3)
    plain = classifier_free(DIFFUSION, Net(), TEXT, NULL, 6.0)(X, LEVEL)
    full = classifier_free(DIFFUSION, Net(), TEXT, NULL, 6.0, rescale=1.0)(X, LEVEL)
    part = classifier_free(DIFFUSION, Net(), TEXT, NULL, 6.0, rescale=0.7)(X, LEVEL)
    assert not torch.allclose(plain.std(axes), one(TEXT).std(axes), rtol=0.05)
    assert_close(full.std(axes), one(TEXT).std(axes))
    assert_close(part, 0.7 * full + 0.3 * plain)


def test_rescale_of_a_constant_picture_is_finite() -> None:
    flat = torch.zeros(1, 1, 2, 2)
    x0 = classifier_free(DIFFUSION, Net(), text_of(1, 1.0), text_of(1), 6.0, rescale=1.0)
    assert x0(flat, LEVEL).isfinite().all()


def test_a_negative_prompt_takes_the_place_of_the_empty_one() -> None:
    negative = text_of(1, 0.25)
    x0 = classifier_free(DIFFUSION, Net(), TEXT, negative, 4.0)(X, LEVEL)
    away = one(text_of(3, 0.25))
    assert_close(x0, away + 4.0 * (one(TEXT) - away))


@pytest.mark.parametrize("length", [1, 2, 7])
def test_prompts_of_different_lengths_are_padded_with_masked_tokens(length: int) -> None:
    null = text_of(3, -1.0, length=length)
    x0 = classifier_free(DIFFUSION, Net(), TEXT, null, 4.0)(X, LEVEL)
    assert_close(x0, classifier_free(DIFFUSION, Net(), TEXT, NULL, 4.0)(X, LEVEL))
    both = stack(null, TEXT)
    assert both.tokens.shape == (6, max(2, length), 1)
    assert both.mask.sum(1).tolist() == [length] * 3 + [2] * 3


def test_pooled_embeddings_are_stacked_too() -> None:
    text = TextEmbedding(TEXT.tokens, TEXT.mask, torch.ones(3, 4))
    null = TextEmbedding(NULL.tokens[:1], NULL.mask[:1], torch.zeros(1, 4))
    seen: list[TextEmbedding] = []

    def net(x: Tensor, t: Tensor, text: TextEmbedding) -> Tensor:
        seen.append(text)
        return x

    classifier_free(DIFFUSION, net, text, null, 2.0)(X, LEVEL)
    assert seen[0].pooled is not None
    assert_close(seen[0].pooled, torch.cat([torch.zeros(3, 4), torch.ones(3, 4)]))


def test_impossible_requests_are_refused() -> None:
    for wrong in (
        {"scale": -1.0},
        {"scale": 2.0, "interval": (0.8, 0.2)},
        {"scale": 2.0, "rescale": 1.5},
    ):
        with pytest.raises(LdmError, match="out of range"):
            classifier_free(DIFFUSION, Net(), TEXT, NULL, **wrong)  # type: ignore[arg-type]
    with pytest.raises(LdmError, match="2 negative prompts for 3 prompts"):
        classifier_free(DIFFUSION, Net(), TEXT, text_of(2), 2.0)
