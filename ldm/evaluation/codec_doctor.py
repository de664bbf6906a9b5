"""`ldm vae doctor`: takes a codec and held-out pictures, measures, and writes the report.

What is measured is in `codec.py` and `codec_numerics.py`; words and pictures in `codec_report.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm import storage
from ldm.build import build_perceptual, data_of, freeze, load_vae_directory, open_data
from ldm.checkpoint import find_checkpoint
from ldm.checkpoint.perceptual_files import load_vision_tower
from ldm.data.imagefolder import open_imagefolder
from ldm.errors import ExitCode, LdmError
from ldm.evaluation.codec import (
    RANDOM_FEATURES,
    WINDOW,
    Features,
    LatentMeter,
    frechet_distance,
    high_frequency_share,
    psnr,
    random_features,
    ssim,
)
from ldm.evaluation.codec_numerics import PRECISIONS, in_precision, watched
from ldm.evaluation.codec_report import FILE, SHEET, Findings, as_json, sheet, text
from ldm.evaluation.memorisation import pictures_of
from ldm.inference.pipeline import usable_device
from ldm.models import tiling
from ldm.randomness import permutation
from ldm.types import Source

BATCH, LEAST_PX = 16, 8
PROBED = 4
"""Pictures on which precisions are compared and that the sheet shows."""


@dataclass(frozen=True)
class Settings:
    """What is examined.

    Args:
        count: pictures, at least 2: a distance of distributions needs several.
        image_px: side of their squares, up to 1024: beyond, whole layers are never seen at once;
            None: that of training, else 256.
        features: a run of `ldm train-clip` whose tower describes pictures for the Frechet distance;
            None: fixed random convolutions.
        lpips: weights of LPIPS, a file or directory; None looks into torch's cache.

    Raises:
        LdmError: a value out of range.
    """

    count: int = 64
    image_px: int | None = None
    features: str | None = None
    lpips: str | None = None

    def __post_init__(self) -> None:
        limits = (("n", self.count, 2, 100_000), ("px", self.image_px or LEAST_PX, LEAST_PX, 1024))
        for name, value, low, high in limits:
            if not low <= value <= high:
                raise LdmError(
                    f"{name}={value} is out of range", where=name, fix=f"use {low} to {high}"
                )


@dataclass(frozen=True)
class Pictures:
    """Squares to examine a codec on.

    Args:
        source: where they are.
        kind: "held out", "trained on" or "given", for the report.
        image_px: their side.
        small: what to do with smaller ones.
    """

    source: Source
    kind: str
    image_px: int
    small: Any = "upscale"


def vae_doctor(
    model: str,
    settings: Settings,
    *,
    data: Any = None,
    pictures: Path | None = None,
    out: Path | None = None,
    json_file: Path | None = None,
    device: str | None = None,
) -> str:
    """Examines the codec of a run, or of a directory in diffusers' layout; returns the report.

    Args:
        model: run directory, checkpoint, or directory of a VAE.
        settings: what is examined.
        data: the section `data` of an experiment to take pictures from; None: the run's own.
        pictures: a folder of pictures instead.
        out: folder for FILE and SHEET, or None.
        json_file: FILE under another name, or None.
        device: where to compute.

    Raises:
        LdmError: the model or the pictures cannot be used; says what can.
    """
    files = [] if out is None else [storage.writable_file(out / FILE)]
    if json_file is not None:
        files.append(storage.writable_file(json_file))
    folder = find_vae(Path(model))
    codec = load_vae_directory(folder).to(usable_device(device))
    chosen = choose_pictures(folder, settings, data, pictures)
    findings = examine(codec, chosen, settings)
    facts = as_json(findings, model)
    for file in files:
        storage.write_json(file, facts)
    if out is not None:
        drawing = sheet(findings)
        storage.write_file(out / SHEET, lambda file: drawing.save(file, format="PNG"))
    return text(facts)


def find_vae(path: Path) -> Path:
    """The directory with the VAE's config.json: `path`, `path`/vae, or that of a run.

    Raises:
        LdmError: there is none.
    """
    for folder in (path, path / "vae"):
        if (folder / "config.json").is_file():
            return folder
    return find_checkpoint(path) / "vae"


def choose_pictures(folder: Path, settings: Settings, data: Any, pictures: Path | None) -> Pictures:
    """Given pictures, those of an experiment, or those that the run in `folder` kept out.

    Raises:
        LdmError: code USAGE where none were named and the directory is of no run.
    """
    if pictures is not None:
        source = open_imagefolder(pictures, missing_caption="empty")
        return Pictures(source, "given", settings.image_px or _trained_px(folder) or 256)
    if data is None:
        if not (folder.parent / "config.yaml").is_file():
            raise LdmError(
                "this VAE lies in no run that says which pictures it saw",
                where=str(folder),
                fix="add --pictures DIR or --config EXPERIMENT.yaml",
            )
        data = data_of(folder.parent)
    training, held_out = open_data(data)
    kind = "trained on" if held_out is None else "held out"
    return Pictures(held_out or training, kind, settings.image_px or data.image_px, data.too_small)


def _trained_px(folder: Path) -> int | None:
    if not (folder.parent / "config.yaml").is_file():
        return None
    return int(data_of(folder.parent).image_px)


@torch.no_grad()
def examine(codec: Any, chosen: Pictures, settings: Settings) -> Findings:
    """Measures everything; `codec` is any Codec that is an nn.Module."""
    missing: dict[str, str] = {}
    unreadable: dict[str, str] = {}
    features, name = _features(settings.features, codec)
    distance = _lpips(settings, codec, missing)
    if chosen.image_px < WINDOW:
        missing["ssim"] = f"pictures of {chosen.image_px} pixels are smaller than its window"
    meter, sums = LatentMeter(), _Sums()
    for pixels, ids in _batches(chosen, settings.count, codec, unreadable):
        with watched(codec) as activations:
            moments = tiling.encode(codec, pixels)
        sums.loudest("encoder", activations)
        refuse_overflow(activations)
        zero = moments.new_zeros(())
        latents = codec.latents(moments, zero)
        meter.add(moments, latents, codec.latents(moments, zero + 1))
        with watched(codec) as activations:
            restored = tiling.decode(codec, latents).float()
        sums.loudest("decoder", activations)
        refuse_overflow(activations)
        sums.add(ids, pixels, restored, latents, features, distance, chosen.image_px >= WINDOW)
    if len(sums.ids) < 2:
        raise LdmError(
            f"{len(sums.ids)} pictures could be read; 2 are needed",
            where="pictures",
            fix=next(iter(unreadable.values()), "give more pictures"),
            code=ExitCode.BAD_DATA,
        )
    pixels, restored, latents = sums.first
    few = pixels[:PROBED]
    config = codec.config
    return Findings(
        kind=chosen.kind,
        ids=tuple(sums.ids),
        image_px=chosen.image_px,
        psnr=torch.cat(sums.psnr),
        ssim=torch.cat(sums.ssim) if sums.ssim else None,
        lpips=float(torch.cat(sums.lpips).mean()) if sums.lpips else None,
        frechet=frechet_distance(torch.cat(sums.features[0]), torch.cat(sums.features[1])),
        features=name,
        latents=meter.result(),
        latent_shape=tuple(latents.shape[1:]),
        measured=config.latents_std is not None,
        spectrum={"latents": high_frequency_share(latents), "pictures": high_frequency_share(few)},
        equivariance=equivariance(codec, few),
        activations=sums.activations,
        precisions={key: in_precision(codec, few, dtype) for key, dtype in PRECISIONS.items()},
        shown={
            "pixels": few.cpu(),
            "restored": restored[:PROBED].cpu(),
            "latents": latents.float().cpu(),
        },
        unreadable=unreadable,
        missing=missing,
    )


def refuse_overflow(activations: dict[str, float]) -> None:
    """Refuses a codec whose layers, of `watched`, leave float32: there is nothing to measure.

    Raises:
        LdmError: code BAD_DATA, with the first such layer.
    """
    for layer, largest in activations.items():
        if math.isinf(largest):
            raise LdmError(
                f"{layer} puts out infinity or NaN, in float32 and on pictures in [-1, 1]",
                where="vae",
                fix="use an older checkpoint, or train it again with a lower optim.learning_rate",
                code=ExitCode.BAD_DATA,
            )


class _Sums:
    """What is collected over batches."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        self.psnr: list[Tensor] = []
        self.ssim: list[Tensor] = []
        self.lpips: list[Tensor] = []
        self.features: tuple[list[Tensor], list[Tensor]] = ([], [])
        self.activations: dict[str, dict[str, float]] = {"encoder": {}, "decoder": {}}
        self.first: tuple[Tensor, Tensor, Tensor] = (torch.empty(0),) * 3

    def add(
        self,
        ids: Sequence[str],
        pixels: Tensor,
        restored: Tensor,
        latents: Tensor,
        features: Features,
        distance: nn.Module | None,
        large: bool,
    ) -> None:
        if not self.ids:
            self.first = (pixels, restored, latents)
        self.ids += ids
        self.psnr.append(psnr(restored, pixels).cpu())
        shown = restored.clamp(-1, 1)
        if large:
            self.ssim.append(ssim(restored, pixels).cpu())
        if distance is not None:
            self.lpips.append(distance(shown, pixels).cpu())
        for kept, pictures in zip(self.features, (pixels, shown), strict=True):
            kept.append(features(pictures).double().cpu())

    def loudest(self, part: str, seen: dict[str, float]) -> None:
        for name, value in seen.items():
            self.activations[part][name] = max(self.activations[part].get(name, 0.0), value)


def _batches(
    chosen: Pictures, count: int, codec: Any, unreadable: dict[str, str]
) -> Iterator[tuple[Tensor, list[str]]]:
    """Pictures (B, 3, S, S) with their ids; which ones follows from the source alone."""
    from tqdm.auto import tqdm

    source, like = chosen.source, next(codec.parameters())
    order = permutation(len(source), 0, 0)[:count].tolist()
    shown = tqdm(order, unit="image", desc="vae doctor", disable=None)
    waiting: list[Any] = []
    for picture in pictures_of(source, shown, chosen.image_px, chosen.small, unreadable):
        waiting.append(picture)
        if len(waiting) == BATCH:
            yield torch.stack([p.pixels for p in waiting]).to(like), [p.id for p in waiting]
            waiting = []
    if waiting:
        yield torch.stack([p.pixels for p in waiting]).to(like), [p.id for p in waiting]


def _features(path: str | None, codec: Any) -> tuple[Features, str]:
    if path is None:
        return random_features, RANDOM_FEATURES
    tower: Any = freeze(load_vision_tower(path)).to(next(codec.parameters()).device)
    side = tower.config.image_size

    def described(pixels: Tensor) -> Tensor:
        small = F.interpolate(pixels, (side, side), mode="bilinear", antialias=True)
        states: Tensor = tower(small).pooler_output
        return states

    return described, f"clip vision tower of {path}"


def _lpips(settings: Settings, codec: Any, missing: dict[str, str]) -> nn.Module | None:
    try:
        return build_perceptual("lpips", settings.lpips, next(codec.parameters()).device)
    except LdmError as error:
        if settings.lpips is not None:
            raise
        missing["lpips"] = error.what
        return None


@torch.no_grad()
def equivariance(codec: Any, pixels: Tensor) -> dict[str, float | None]:
    """PSNR in dB of pictures from transformed latents against transformed pictures.

    Latents in which a mirror or a smaller picture is the same operation are easier to generate:
    Kouzelis et al. 2025 (arXiv 2502.09509), section 3.
    """
    moments = codec.moments(pixels)
    latents = codec.latents(moments, moments.new_zeros(()))
    found: dict[str, float | None] = {
        "mirror_psnr": float(psnr(codec.decode(latents.flip(3)), pixels.flip(3)).mean()),
        "half_psnr": None,
    }
    if latents.shape[2] % 2 == 0 and latents.shape[3] % 2 == 0:
        small = codec.decode(F.avg_pool2d(latents, 2))
        found["half_psnr"] = float(psnr(small, F.avg_pool2d(pixels, 2)).mean())
    return found
