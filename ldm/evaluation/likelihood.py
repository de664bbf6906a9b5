"""How probable a model finds captioned pictures it never saw: measured, picture by picture.

Everything is about latents, the posterior means of the model's own autoencoder: their log-density
along the probability-flow ODE with and without the caption, the variational bound, and the errors
at each noise level. Figures of two models compare only if they share an autoencoder.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ldm.data.transforms import Draws, fit
from ldm.diffusion.elbo import Elbo, continuous_elbo
from ldm.diffusion.guidance import Model, classifier_free
from ldm.diffusion.likelihood import data_log_likelihood, gaussian_base, hutchinson, signs
from ldm.diffusion.schedule import Grid, levels
from ldm.errors import ExitCode, LdmError
from ldm.inference.guiding import with_size
from ldm.inference.inversion import encode
from ldm.inference.pipeline import Pipeline
from ldm.randomness import normal, permutation
from ldm.types import Denoise, Level, Source, TextEmbedding

SPLITS = ("val", "train")


@dataclass(frozen=True)
class Settings:
    """What is measured, and how finely.

    Args:
        count: pictures, at least 2.
        split: "val" are held-out pictures, "train" those of training.
        steps: of the ODE, four evaluations each, at least 2.
        probes: of Hutchinson's estimate for each picture, at least 1.
        strata: noise levels of the bound and of the errors, at least 1.
        seed: of probes, noise, and the choice of pictures.
        batch_size: pictures at once; changes memory and speed, not the figures.

    Raises:
        LdmError: a value out of range.
    """

    count: int = 64
    split: str = "val"
    steps: int = 24
    probes: int = 1
    strata: int = 32
    seed: int = 0
    batch_size: int = 16

    def __post_init__(self) -> None:
        least = {"count": 2, "steps": 2, "probes": 1, "strata": 1, "batch_size": 1}
        for name, low in least.items():
            if (value := getattr(self, name)) < low:
                raise LdmError(
                    f"{name}={value} is too small", where="likelihood", fix=f"use {low} or more"
                )
        if self.split not in SPLITS:
            raise LdmError(
                f"unknown split {self.split!r}", where="split", fix=f"use {' or '.join(SPLITS)}"
            )


@dataclass(frozen=True)
class Sample:
    """One picture's figures, log-likelihoods in nats.

    Args:
        id, caption: of the picture.
        conditional: log p(latents | caption).
        unconditional: log p(latents); None of a model that never saw the empty caption.
        elbo: the variational bound, given the caption; None of a model that was not trained on
            independent noise, which the bound is about.
        errors: squared error of x0 at each noise level, summed over the latents; none without elbo.
    """

    id: str
    caption: str
    conditional: float
    unconditional: float | None
    elbo: float | None
    errors: tuple[float, ...]


@dataclass(frozen=True)
class Likelihoods:
    """The result of `measure`.

    Args:
        samples: one for each picture.
        shape: of the latents, (C, h, w).
        end: the noise level whose blur the likelihood sees.
        levels: noise levels of the errors, noisiest first.
        gains: squared error of x0 per squared error of the network's own prediction there.
    """

    samples: tuple[Sample, ...]
    shape: tuple[int, ...]
    end: Level
    levels: tuple[Level, ...]
    gains: tuple[float, ...]

    @property
    def dims(self) -> int:
        """Numbers in the latents of one picture."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Examples:
    """Captioned pictures of a source as a model's squares: cropped in the middle, not mirrored."""

    source: Source
    image_px: int
    small: Literal["upscale", "error"] = "upscale"

    def chosen(self, count: int, seed: int) -> Iterator[tuple[str, str, Tensor]]:
        """`count` of them, id, caption, pixels (3, H, W), spread over the source.

        A picture that cannot be read is passed over; which others come first stays the same.

        Raises:
            LdmError: code BAD_DATA when there are too few.
        """
        given = 0
        for index in permutation(len(self.source), seed, 0):
            if given == count:
                return
            name = self.source.ids[index]
            draws = Draws(seed, 0, name)  # of no consequence without random crop and mirror
            try:
                example = self.source[int(index)]
                pixels = fit(example.pixels, self.image_px, draws=draws, small=self.small)
            except LdmError as error:
                if error.code != ExitCode.BAD_DATA:
                    raise
                continue
            given += 1
            yield name, example.caption, pixels
        if given < count:
            raise LdmError(
                f"{count} pictures are asked for, and the split has {given} that can be read",
                where="n",
                fix=f"use -n {given}" if given > 1 else "use more data",
                code=ExitCode.BAD_DATA,
            )


def measure(pipeline: Pipeline, examples: Examples, settings: Settings) -> Likelihoods:
    """The figures of `settings.count` pictures; each depends on its own picture alone.

    Raises:
        LdmError: the model has no density, there are too few pictures, or (code NUMERICS) the
            model gives no finite number.
    """
    from tqdm.auto import tqdm

    check_density(pipeline)
    plan = levels(pipeline.diffusion.process, settings.steps, spacing="logsnr")
    chosen = list(examples.chosen(settings.count, settings.seed))
    samples: list[Sample] = []
    with tqdm(total=len(chosen), unit="image", desc="likelihood", disable=None) as bar:
        for begin in range(0, len(chosen), settings.batch_size):
            names, captions, pixels = zip(*chosen[begin : begin + settings.batch_size], strict=True)
            with torch.no_grad():
                x0 = encode(pipeline, torch.stack(pixels).to(pipeline.device))
            found, asked = _figures(pipeline, x0, names, captions, plan, settings)
            samples += found
            bar.update(len(names))
    coefficients = torch.tensor([level[1:] for level in asked], dtype=torch.float64).reshape(-1, 2)
    gains = pipeline.diffusion.x0_gain(*coefficients.unbind(1)).tolist()
    return Likelihoods(tuple(samples), tuple(x0.shape[1:]), plan[-2], asked, tuple(gains))


def check_density(pipeline: Pipeline) -> None:
    """Refuses a model whose base is not white noise, or whose flow is not that of its x0.

    Raises:
        LdmError: says which.
    """
    contract = pipeline.contract
    if contract.latent_noise > 0:
        raise LdmError(
            f"this model was trained with latent noise ({contract.latent_noise:g}), so what it "
            "predicts gives no flow and no likelihood",
            where=pipeline.name,
            fix="measure a model trained with diffusion.latent_noise=0",
        )
    if contract.source != "noise" or contract.offset_noise:
        kind = "pictures" if contract.source != "noise" else "noise with an offset"
        raise LdmError(
            f"this model starts from {kind}, and the likelihood is defined for white noise",
            where=pipeline.name,
            fix="measure a model trained with source noise and offset_noise 0",
        )


def _figures(
    pipeline: Pipeline,
    x0: Tensor,
    names: Sequence[str],
    captions: Sequence[str],
    plan: Grid,
    settings: Settings,
) -> tuple[list[Sample], tuple[Level, ...]]:
    """The samples of one batch of latents (B, C, h, w), and where their errors were seen."""
    shape, data_std = x0.shape[1:], pipeline.contract.data_std or 1.0

    def draws(purpose: str, number: int) -> Tensor:
        return normal(shape, settings.seed, purpose, [number] * len(names), names).to(x0.device)

    text = pipeline.encoder(captions).to(x0.device)
    side = [pipeline.vae.downsample_factor * cells for cells in shape[1:]]
    given, free = _denoisers(pipeline, *(with_size(t, *side) for t in (text, pipeline.null)))
    trace = hutchinson(torch.stack([signs(draws("probe", k)) for k in range(settings.probes)]))
    base = gaussian_base(data_std)

    def log_p(denoise: Denoise | None) -> list[float] | list[None]:
        if denoise is None:
            return [None] * len(names)
        found = data_log_likelihood(denoise, x0, plan, trace=trace, base=base)
        return _finite(found.log_p, names)

    bound: Elbo | None = None
    if pipeline.contract.coupling == "independent":
        offsets = [0.5] * settings.strata
        with torch.no_grad():
            bound = continuous_elbo(
                given, x0, plan, lambda k: draws("bound", k), offsets=offsets, data_std=data_std
            )
    rows = zip(
        names,
        captions,
        log_p(given),
        log_p(free),
        [None] * len(names) if bound is None else _finite(bound.log_p, names),
        [()] * len(names) if bound is None else map(tuple, bound.errors.T.tolist()),
        strict=True,
    )
    return [Sample(*row) for row in rows], () if bound is None else bound.levels


def _denoisers(
    pipeline: Pipeline, text: TextEmbedding, null: TextEmbedding
) -> tuple[Denoise, Denoise | None]:
    """With the caption, and with the empty one where the model knows it."""
    model = Model(pipeline.diffusion, pipeline.network, text, null)
    knows_empty = pipeline.contract.caption_dropout > 0
    return classifier_free(model, 1.0), classifier_free(model, 0.0) if knows_empty else None


def _finite(values: Tensor, names: Sequence[str]) -> list[float]:
    numbers: list[float] = values.tolist()
    for name, number in zip(names, numbers, strict=True):
        if not math.isfinite(number):
            raise LdmError(
                "the model gives this picture no finite likelihood",
                where=name,
                fix="use more steps, or another checkpoint",
                code=ExitCode.NUMERICS,
            )
    return numbers
