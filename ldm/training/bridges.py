"""Pairs (latents of a source picture, latents of its target, caption), to train bridges on.

Any source will do: a small picture for a large one, a drawing for a photo. Liu et al. 2022 (arXiv
2209.03003), section 3.3, without noise; Liu et al. 2023 (arXiv 2302.05872), with latent noise.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ldm.build import load_vae, open_data
from ldm.config.schema import DataConfig, DiffusionExperiment
from ldm.data.pairs import PicturePairs, open_picture_pairs
from ldm.data.transforms import Draws, fit
from ldm.errors import ExitCode, LdmError
from ldm.inference.loading import usable_device
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.identity import autoencoder_sha256, value_sha256
from ldm.training.pairs import Made, PairFacts, build_pairs


def picture_pairs(
    config: DiffusionExperiment,
    out: Path | str,
    *,
    shrink: int | None = None,
    count: int | None = None,
    device: str | None = None,
) -> Path:
    """Encodes pairs of pictures into a directory; an interrupted call continues.

    Both ends are means of the VAE's posterior, cut to the square in their middle, as a source is
    when the model is asked.

    Args:
        config: what will be trained on them; its data, VAE, sizes and cache.batch_size are used.
        out: new directory, or one half made by the same call.
        shrink: make the source of each picture by reducing it by this factor, >= 2; None reads
            the column `source_file_name` of an image folder.
        count: at most so many pairs; None takes all.
        device: where to encode; None takes a GPU when there is one.

    Raises:
        LdmError: the data have no pairs, or keep some out that a metadata file names, or the
            directory holds something else.
    """
    pairs = _open(config.data, shrink)
    total = len(pairs) if count is None else min(count, len(pairs))
    if total < 1:
        raise LdmError(f"count={count} leaves no pair", where="n", fix="ask for at least one")
    vae = load_vae(config.vae, config.train.seed).to(usable_device(device))
    side, factor = config.data.image_px, vae.downsample_factor
    ids, captions = pairs.ids[:total], pairs.captions[:total]
    facts = PairFacts(
        source="pictures",
        count=total,
        shape=(vae.config.latent_channels, side // factor, side // factor),
        image_px=side,
        vae_sha256=autoencoder_sha256(vae, vae.config),
        shard_size=config.cache.shard_size,
        origin={
            "by": "pictures",
            "vae": config.vae.path,
            "data": pairs.targets.fingerprint,
            "names": value_sha256({"names": ids, "sources": [str(x) for x in pairs.sources]}),
            "captions": value_sha256({"captions": captions}),
            "shrink": pairs.shrink,
            "too_small": config.data.too_small,
        },
    )

    def make(start: int, stop: int) -> Made:
        x0, x1 = torch.zeros(2, stop - start, *facts.shape)
        bad: dict[str, str] = {}
        size = config.cache.batch_size
        for begin in range(start, stop, size):
            rows, pixels = _fitted(pairs, range(begin, min(begin + size, stop)), config.data, bad)
            if rows:
                places = [row - start for row in rows]
                ends = _means(vae, pixels).chunk(2)
                x0[places], x1[places] = ends[0], ends[1]
        return Made(x0, x1, tuple(ids[start:stop]), tuple(captions[start:stop]), bad)

    return build_pairs(Path(out), facts, make, label="pairs")


def _open(data: DataConfig, shrink: int | None) -> PicturePairs:
    if shrink is not None:
        if shrink < 2:
            raise LdmError(f"a factor of {shrink} reduces nothing", where="shrink", fix="use 2")
        source, _ = open_data(data)
        return PicturePairs(source, range(len(source)), (), shrink)
    if data.source != "imagefolder" or data.path is None:
        raise LdmError(
            f"data.source={data.source} names no source pictures",
            where="data.source",
            fix="use an image folder with the column source_file_name, or --shrink 4",
            code=ExitCode.CONFIG,
        )
    if data.holdout:
        raise LdmError(
            f"data.holdout={data.holdout} keeps nothing out of pairs that a metadata file names",
            where="data.holdout",
            fix="data.holdout=0, and leave out their source_file_name there",
            code=ExitCode.CONFIG,
        )
    return open_picture_pairs(
        data.path,
        split=data.split,
        caption_column=data.caption_column,
        missing_caption=data.missing_caption,
    )


def _fitted(
    pairs: PicturePairs, rows: range, data: DataConfig, bad: dict[str, str]
) -> tuple[list[int], Tensor]:
    """The rows that can be read and their pixels, (2n, 3, px, px): targets, then sources."""
    good: list[int] = []
    ends: tuple[list[Tensor], list[Tensor]] = ([], [])
    for row in rows:
        name = pairs.ids[row]
        try:
            target, source = pairs[row]
            draws = Draws(0, 0, name)
            fitted = (
                fit(target.pixels, data.image_px, draws=draws, small=data.too_small),
                fit(source, data.image_px, draws=draws),
            )
        except LdmError as error:
            if error.code != ExitCode.BAD_DATA:
                raise
            bad[name] = str(error)
            continue
        good.append(row)
        for end, pixels in zip(ends, fitted, strict=True):
            end.append(pixels)
    return good, torch.stack([*ends[0], *ends[1]]) if good else torch.empty(0)


@torch.inference_mode()
def _means(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    moments = vae.moments(pixels.to(next(vae.parameters())))
    latents = vae.latents(moments, moments.new_zeros(())).float().cpu()
    if not latents.isfinite().all():
        raise LdmError(
            "the VAE gives latents that are not finite",
            where="vae",
            fix="use a VAE that was trained to the end",
            code=ExitCode.NUMERICS,
        )
    return latents
