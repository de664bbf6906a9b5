"""A run's pictures against those it was trained on, and its network against the ideal denoiser.

Opens the data that the run's own config.yaml names, draws, and compares; `memorisation_report.py`
makes a report of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.build import open_data, run_data
from ldm.data.holdout import Subset
from ldm.data.imagefolder import open_imagefolder
from ldm.diffusion.ideal import Gap, ideal_gap
from ldm.errors import ExitCode, LdmError, named
from ldm.evaluation.memorisation import (
    SPACES,
    Album,
    Findings,
    Picture,
    describe,
    examine,
    latent_features,
    pictures_of,
    pixel_features,
)
from ldm.inference.guiding import with_size
from ldm.inference.inversion import encode
from ldm.inference.pipeline import Pipeline
from ldm.models.text import TooLong
from ldm.randomness import permutation
from ldm.types import Example, Level, Source

SPLITS = ("train", "val")
RATIOS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
"""sigma / alpha of the levels at which a network is compared with the ideal denoiser."""
IDEAL_POINTS = 2048
"""Training latents that the ideal denoiser knows, at most."""


@dataclass(frozen=True)
class Settings:
    """What is compared.

    Args:
        count: pictures to draw, at least 1.
        split: whose captions they are drawn from: "train", where copies are likeliest, or "val".
        space: where distances are taken, one of SPACES.
        seed: of the first picture, and of every choice.
        train_limit: training pictures compared, at most; all of them unless there are more.
        probes: latents of either kind on which the network is compared with the ideal denoiser; 0
            leaves that out.
        held_out: pictures of the baseline, at most.
        sampling: settings of the pipeline other than the checkpoint's.

    Raises:
        LdmError: a value out of range.
    """

    count: int = 100
    split: str = "train"
    space: str = "latents"
    seed: int = 0
    train_limit: int = 50_000
    probes: int = 128
    held_out: int = 400
    sampling: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        least = {"count": 1, "held_out": 1, "train_limit": 3, "probes": 0}
        for name, low in least.items():
            if (value := getattr(self, name)) < low:
                raise LdmError(
                    f"{name}={value} is too small", where="memorisation", fix=f"use {low} or more"
                )
        named("split", dict.fromkeys(SPLITS), self.split)
        named("space", dict.fromkeys(SPACES), self.space)


@dataclass(frozen=True)
class Data:
    """The pictures of a run: trained on, and of the same kind but not trained on (or None).

    Their squares have `image_px` pixels a side; `small` and `too_long` are what training did with
    smaller pictures and with captions that the text encoder cannot take.
    """

    training: Source
    held_out: Source | None
    image_px: int
    small: Literal["upscale", "error"]
    too_long: TooLong

    def pictures(
        self, source: Source, rows: Iterable[int], bad: dict[str, str] | None = None
    ) -> Iterator[Picture]:
        """Pictures of a source as training sees them; see `pictures_of`."""
        return pictures_of(source, rows, self.image_px, self.small, bad)


@dataclass(frozen=True)
class Drawn:
    """Pictures that were just drawn, as a Source."""

    ids: tuple[str, ...]
    captions: tuple[str, ...]
    images: tuple[Image.Image, ...]
    fingerprint: str = ""

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Example:
        pixels = np.asarray(self.images[index].convert("RGB"))
        return Example(self.ids[index], pixels, self.captions[index])


def open_run(checkpoint: Path, settings: Settings) -> Data:
    """The data of a run, as its own config.yaml names it.

    Held-out pictures are such as the samples' captions tell of. `shapes` makes its own: its val
    pictures show contents that training never shows, which keeps them away from it; so for training
    captions the fair comparison is with further training scenes.

    Raises:
        LdmError: code IO or BAD_DATA for data that cannot be found or used; a run on pairs, whose
            ends are latents.
    """
    config, text = run_data(checkpoint)
    if config.pairs is not None:
        raise LdmError(
            f"this run was trained on pairs ({config.pairs}), not on the pictures of data.source",
            where="model",
            fix="judge its pictures (--pictures DIR) with --model RUN of the same VAE that was "
            "trained on pictures",
        )
    if config.source != "shapes":
        training, held_out = open_data(config)
    elif settings.split == "val":
        training, held_out = open_data(config.model_copy(update={"holdout": settings.held_out}))
    else:
        longer = config.model_copy(update={"count": config.count + settings.held_out})
        scenes, _ = open_data(longer)
        training = Subset(scenes, tuple(range(config.count)))
        held_out = Subset(scenes, tuple(range(config.count, longer.count)))
    return Data(training, held_out, config.image_px, config.too_small, text.too_long)


def folder(path: Path) -> Source:
    """The pictures of a folder, with or without captions.

    Raises:
        LdmError: code BAD_DATA when there are none, or the folder cannot be read.
    """
    return open_imagefolder(path, missing_caption="empty")


def drawn(pipeline: Pipeline, data: Data, settings: Settings) -> Drawn:
    """Pictures drawn from captions of the split, with the seeds that follow `settings.seed`.

    Raises:
        LdmError: the split has no pictures, or the model refuses to draw them.
    """
    from tqdm.auto import tqdm

    source = data.training if settings.split == "train" else data.held_out
    if source is None:
        raise LdmError(
            "this run kept no pictures out of training",
            where="split",
            fix="train with data.holdout=N, or use --split train",
            code=ExitCode.BAD_DATA,
        )
    order = permutation(len(source), settings.seed, 0)
    captions = [source.captions[int(order[k % len(order)])] for k in range(settings.count)]
    with tqdm(total=len(captions), unit="image", desc="drawing", disable=None) as bar:
        pictures = pipeline(
            captions,
            seed=settings.seed,
            progress=lambda done: bar.update(done - bar.n),
            **settings.sampling,
        )
    ids = tuple(f"seed {request.seed}" for request in pictures.requests)
    return Drawn(ids, tuple(captions), pictures.images)


def compare(
    samples: Source, data: Data, pipeline: Pipeline, settings: Settings, bad: dict[str, str]
) -> Findings:
    """Describes all three sets in the chosen space and examines them."""
    from tqdm.auto import tqdm

    latents = settings.space == "latents"
    features = latent_features(pipeline.vae) if latents else pixel_features

    def album(source: Source, rows: Sequence[int], what: str) -> Album:
        shown = tqdm(rows, unit="image", desc=what, disable=None)
        return describe(data.pictures(source, shown, bad), features)

    training = album(data.training, _some(data.training, settings.train_limit), "training")
    held_out = None
    if data.held_out is not None:
        held_out = album(data.held_out, _some(data.held_out, settings.held_out), "held out")
    return examine(album(samples, range(len(samples)), "samples"), training, held_out)


def _some(source: Source, limit: int) -> Sequence[int]:
    """At most `limit` rows, spread over the source, in its order."""
    if len(source) <= limit:
        return range(len(source))
    return sorted(int(row) for row in permutation(len(source), 0, 0)[:limit])


@dataclass(frozen=True)
class Gaps:
    """The network against the ideal denoiser of `points` training latents, level by level."""

    points: int
    training: tuple[Gap, ...]
    held_out: tuple[Gap, ...] | None


def compare_with_ideal(pipeline: Pipeline, data: Data, settings: Settings) -> Gaps | None:
    """The unconditional network on noised latents; None for a model without such a thing.

    That is one without caption dropout, and one that was not trained on white noise independent of
    the pictures, of which the ideal denoiser's formula speaks.
    """
    contract = pipeline.contract
    plain = contract.source == "noise" and contract.coupling == "independent"
    plain = plain and contract.offset_noise == contract.latent_noise == 0
    if settings.probes == 0 or contract.caption_dropout == 0 or not plain:
        return None
    points = _latents(pipeline, data, data.training, _some(data.training, IDEAL_POINTS))
    if len(points) == 0:
        return None
    process = pipeline.diffusion.process
    ratios = torch.tensor(RATIOS, dtype=torch.float64)
    levels = process.levels(process.t_at(-2 * ratios.log()))

    nothing = with_size(pipeline.null, *pipeline.trained_size)

    def denoise(x: Tensor, level: Level) -> Tensor:
        null = nothing[torch.zeros(len(x), dtype=torch.long, device=x.device)]
        return pipeline.diffusion.denoise(pipeline.network, x, level, null)

    def gaps(probes: Tensor) -> tuple[Gap, ...]:
        return ideal_gap(denoise, points, levels, probes=probes, seed=settings.seed)

    held_out = None
    if data.held_out is not None:
        latents = _latents(pipeline, data, data.held_out, _some(data.held_out, settings.probes))
        held_out = gaps(latents) if len(latents) else None
    # spread over the points: those of one end of a folder may be alike
    some = torch.from_numpy(permutation(len(points), 0, 0)[: settings.probes].copy())
    return Gaps(len(points), gaps(points[some.to(points.device)]), held_out)


@torch.no_grad()
def _latents(pipeline: Pipeline, data: Data, source: Source, rows: Iterable[int]) -> Tensor:
    """Posterior means of pictures (N, C, h, w), on the device of the network."""
    found, waiting = [], []
    for picture in data.pictures(source, rows):
        waiting.append(picture.pixels)
        if len(waiting) == 64:
            found.append(encode(pipeline, torch.stack(waiting)))
            waiting = []
    if waiting:
        found.append(encode(pipeline, torch.stack(waiting)))
    return torch.cat(found).to(pipeline.device) if found else torch.empty(0)
