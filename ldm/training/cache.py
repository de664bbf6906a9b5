"""The cache stage: posterior moments and text embeddings, computed once and kept by content.

A cache lives in a folder named by the hash of everything its values depend on, so a changed VAE,
encoder, caption or size can never meet stale values: it looks elsewhere. Shards are published one
by one with their checksums; an interrupted build continues at the first missing shard, and ranks
share the shards without talking to each other.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ldm.config.models import PretrainedConfig
from ldm.config.schema import DiffusionExperiment
from ldm.data.loader import Place, Share, micro_batches
from ldm.data.transforms import Draws, fit, sizes_of
from ldm.errors import ExitCode, LdmError
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.identity import autoencoder_sha256, value_sha256
from ldm.models.text import FrozenTextEncoder
from ldm.randomness import uniform
from ldm.training.session import refuse_too_many_bad
from ldm.training.shards import build_shards, read_shard, shard_folders, write_shard
from ldm.types import Batch, Source, TextEmbedding

FORMAT = 1
"""Raise whenever the meaning of cached values changes: old caches are then not found."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextCache:
    """The embedded captions of all samples, each distinct one once.

    Args:
        caption_of: row of `lengths` for every sample, (N,).
        tokens: the token states of all distinct captions end to end, (T, D).
        starts: where each caption begins in `tokens`, (M,).
        lengths: its number of tokens, (M,).
        pooled: pooled vectors, (M, P), or None.
    """

    caption_of: Tensor
    tokens: Tensor
    starts: Tensor
    lengths: Tensor
    pooled: Tensor | None

    def rows(self, rows: Tensor) -> TextEmbedding:
        """The embedded captions of samples `rows` (B,), padded to the longest caption of all."""
        captions = self.caption_of[rows]
        span = torch.arange(int(self.lengths.max()))
        mask = span[None] < self.lengths[captions][:, None]  # (B, L)
        places = (self.starts[captions][:, None] + span).clamp(max=len(self.tokens) - 1)
        tokens = self.tokens[places].float().mul_(mask[..., None])  # (B, L, D), gathered: a copy
        return TextEmbedding(
            tokens, mask, None if self.pooled is None else self.pooled[captions].float()
        )


@dataclass(frozen=True)
class Cache:
    """A whole cache in memory.

    Args:
        ids: sample ids, N of them, in the order of the source.
        moments: (N, V, 2C, h, w), V = 2 where the mirrored picture is kept too.
        bad: why a sample is set aside, by its id; its moments are zeros.
        text: the captions.
        sizes: (N, V, 6), what SDXL is told of each picture, where the cache has it.
    """

    ids: tuple[str, ...]
    moments: Tensor
    bad: dict[str, str]
    text: TextCache
    sizes: Tensor | None = None

    def latent_moments(self, rows: Tensor, mirrored: Tensor) -> Tensor:
        """(B, 2C, h, w) float32 of samples `rows`, of the mirrored picture where `mirrored`."""
        return self.moments[rows, self._variant(mirrored)].float()

    def sizes_of(self, rows: Tensor, mirrored: Tensor) -> Tensor | None:
        """(B, 6) of samples `rows`, of the mirrored picture where `mirrored`."""
        return None if self.sizes is None else self.sizes[rows, self._variant(mirrored)]

    def _variant(self, mirrored: Tensor) -> Tensor:
        return mirrored.long() * (self.moments.shape[1] - 1)


class CachedLoader:
    """Yields this rank's micro-batches from a cache: the samples that a live `Loader` would give.

    Args:
        cache: what to read.
        share: which part of each global batch is ours.
        seed: the run's seed.
        flip: mirror half of the pictures, the same half as live training.
    """

    def __init__(self, cache: Cache, share: Share, *, seed: int, flip: bool) -> None:
        self.cache, self.share, self.seed, self.flip = cache, share, seed, flip
        self.bad = cache.bad
        share.refuse_too_few(len(cache.ids))

    def batches(self, cursor: int = 0) -> Iterator[Batch]:
        """Micro-batches for ever, starting where `cursor` samples were consumed by all ranks.

        Gathered in the training thread: it takes a few milliseconds, and a second thread of torch
        operations would halve the speed of the first on a CPU.
        """
        for places in micro_batches(self.share, cursor, len(self.cache.ids), self.seed):
            yield self._gather(places)

    def _gather(self, places: list[Place]) -> Batch:
        rows = torch.tensor([place.sample for place in places])
        ids = tuple(self.cache.ids[place.sample] for place in places)
        epochs = tuple(place.epoch for place in places)
        mirrored = torch.zeros(len(rows), dtype=torch.bool)
        if self.flip:
            mirrored = uniform(self.seed, "flip", epochs, ids) < 0.5
        return Batch(
            ids=ids,
            weight=torch.tensor([float(name not in self.bad) for name in ids]),
            epochs=epochs,
            positions=tuple(place.position for place in places),
            moments=self.cache.latent_moments(rows, mirrored),
            text=self.cache.text.rows(rows),
            sizes=self.cache.sizes_of(rows, mirrored),
        )


def build_cache(
    config: DiffusionExperiment,
    source: Source,
    vae: AutoencoderKL,
    encoder: FrozenTextEncoder,
    *,
    share: tuple[int, int] = (0, 1),
    stopped: Callable[[], bool] = lambda: False,
) -> tuple[Path, Path]:
    """Computes what is missing of the two caches of an experiment and returns their folders.

    Args:
        share: (rank, world size); each rank makes every world-size-th shard.
        stopped: asked before every shard; True ends the build, which continues there later.

    Raises:
        LdmError: code BAD_DATA, when more than `data.max_bad_fraction` cannot be read, or when a
            latent is not finite; code IO for a disk that is full.
    """
    text = build_text(config, source.captions, encoder, share=share, stopped=stopped)
    moments = _moments_folder(config, source, vae)
    build_shards(
        moments,
        len(source),
        config.cache.shard_size,
        lambda start, stop, out: _encode_pictures(vae, source, range(start, stop), config, out),
        label="latent cache",
        share=share,
        stopped=stopped,
    )
    return moments, text


def build_text(
    config: DiffusionExperiment,
    captions: Sequence[str],
    encoder: FrozenTextEncoder,
    *,
    share: tuple[int, int] = (0, 1),
    stopped: Callable[[], bool] = lambda: False,
) -> Path:
    """The half of `build_cache` that holds captions: what is missing is embedded."""
    distinct, folder = _distinct(captions), _text_folder(config, captions, encoder)
    build_shards(
        folder,
        len(distinct),
        config.cache.shard_size,
        lambda start, stop, out: _encode_text(encoder, distinct[start:stop], config, out),
        label="text cache",
        share=share,
        stopped=stopped,
    )
    return folder


def cache_run(config: DiffusionExperiment) -> tuple[Path, Path]:
    """`ldm cache`: builds what is missing, verifies all of it, and returns the two folders."""
    from ldm.build import load_text, load_vae, open_data

    if config.data.pairs is not None:
        raise LdmError(
            "pairs are latents already; training embeds their captions",
            where="data.pairs",
            fix="run train_diffusion.py with this configuration",
            code=ExitCode.CONFIG,
        )
    source, _ = open_data(config.data)
    vae = load_vae(config.vae, config.train.seed)
    encoder = load_text(config.text, source.captions, config.train.seed)
    folders = build_cache(config, source, vae, encoder)
    load_cache(config, source, folders)
    return folders


def load_cache(config: DiffusionExperiment, source: Source, folders: tuple[Path, Path]) -> Cache:
    """Reads a complete cache into memory, every shard verified against its checksum.

    Raises:
        LdmError: code IO for a missing or damaged shard (delete it and run again), code BAD_DATA
            when too many samples were set aside.
    """
    moments, text = folders
    pictures = [read_shard(d) for d in shard_folders(moments, len(source), config.cache.shard_size)]
    bad = {name: why for _, facts in pictures for name, why in facts["bad"].items()}
    for name, why in bad.items():
        log.warning("set aside: %s", why if name in why else f"{name}: {why}")
    has_sizes = all("sizes" in tensors for tensors, _ in pictures)
    refuse_too_many_bad(bad, len(bad), len(source), config.data.max_bad_fraction)
    return Cache(
        ids=tuple(source.ids),
        moments=torch.cat([tensors["moments"] for tensors, _ in pictures]),
        bad=bad,
        text=load_text_cache(config, source.captions, text),
        sizes=torch.cat([tensors["sizes"] for tensors, _ in pictures]) if has_sizes else None,
    )


def load_text_cache(
    config: DiffusionExperiment, captions: Sequence[str], folder: Path
) -> TextCache:
    """Reads the captions of a complete cache, every shard verified; errors as of `load_cache`."""
    distinct = _distinct(captions)
    row_of = {caption: row for row, caption in enumerate(distinct)}
    texts = [
        read_shard(d)[0] for d in shard_folders(folder, len(distinct), config.cache.shard_size)
    ]
    lengths = torch.cat([tensors["lengths"] for tensors in texts])
    has_pooled = all("pooled" in tensors for tensors in texts)
    return TextCache(
        caption_of=torch.tensor([row_of[caption] for caption in captions]),
        tokens=torch.cat([tensors["tokens"] for tensors in texts]),
        starts=lengths.cumsum(0) - lengths,
        lengths=lengths,
        pooled=torch.cat([tensors["pooled"] for tensors in texts]) if has_pooled else None,
    )


def _moments_folder(config: DiffusionExperiment, source: Source, vae: AutoencoderKL) -> Path:
    data = config.data
    # latent statistics are applied after reading, so they are not part of the key
    layout = replace(vae.config, latents_mean=None, latents_std=None)
    told = isinstance(config.model, PretrainedConfig) or getattr(
        config.model, "size_conditioning", False
    )
    key = value_sha256(
        {
            "format": FORMAT,
            # an older cache, which knows no sizes, still serves a denoiser that reads none
            **({"sizes": True} if told else {}),
            "vae": autoencoder_sha256(vae, layout),
            "data": source.fingerprint,
            "image_px": data.image_px,
            "mirrored": data.flip,
            "too_small": data.too_small,
            "dtype": config.cache.dtype,
            "shard": config.cache.shard_size,
        }
    )
    return Path(config.cache.dir) / f"latents-{key[:16]}"


def _text_folder(
    config: DiffusionExperiment, captions: Sequence[str], encoder: FrozenTextEncoder
) -> Path:
    key = value_sha256(
        {
            "format": FORMAT,
            "encoder": encoder.identity,
            "captions": value_sha256({"captions": _distinct(captions)}),
            "limit": [encoder.max_tokens, encoder.too_long],
            "dtype": config.cache.dtype,
            "shard": config.cache.shard_size,
        }
    )
    return Path(config.cache.dir) / f"text-{key[:16]}"


def _distinct(captions: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(captions))


def _dtype(config: DiffusionExperiment) -> torch.dtype:
    return torch.float32 if config.cache.dtype == "fp32" else torch.float16


@torch.inference_mode()
def _encode_text(
    encoder: FrozenTextEncoder, captions: list[str], config: DiffusionExperiment, out: Path
) -> None:
    rows: list[Tensor] = []
    pooled: list[Tensor] = []
    for start in range(0, len(captions), config.cache.batch_size):
        text = encoder(captions[start : start + config.cache.batch_size])
        pairs = zip(text.tokens, text.mask, strict=True)
        rows += [states[real].to("cpu", _dtype(config)) for states, real in pairs]
        if text.pooled is not None:
            pooled.append(text.pooled.to("cpu", _dtype(config)))
    tensors = {"tokens": torch.cat(rows), "lengths": torch.tensor([len(row) for row in rows])}
    if pooled:
        tensors["pooled"] = torch.cat(pooled)
    write_shard(out, tensors, {"bad": {}})


@torch.inference_mode()
def _encode_pictures(
    vae: AutoencoderKL, source: Source, rows: range, config: DiffusionExperiment, out: Path
) -> None:
    data, factor = config.data, vae.downsample_factor
    side, views = data.image_px // factor, 2 if data.flip else 1
    device = next(vae.parameters()).device
    moments = torch.zeros(len(rows), views, 2 * vae.config.latent_channels, side, side)
    px = data.image_px
    sizes = torch.tensor([px, px, 0, 0, px, px]).float().repeat(len(rows), views, 1)
    bad: dict[str, str] = {}
    for start in range(0, len(rows), config.cache.batch_size):
        places, pictures = [], []
        for place in range(start, min(start + config.cache.batch_size, len(rows))):
            name = source.ids[rows[place]]
            try:
                example = source[rows[place]]
                draws, (height, width) = Draws(0, 0, name), example.pixels.shape[:2]
                picture = fit(example.pixels, px, draws=draws, small=data.too_small)
            except LdmError as error:
                if error.code != ExitCode.BAD_DATA:
                    raise
                bad[name] = str(error)
                continue
            for view in range(views):
                told = sizes_of(height, width, px, draws=draws, mirrored=bool(view))
                sizes[place, view] = torch.tensor(told)
            places.append(place)
            pictures.append(picture)
        if not pictures:
            continue
        pixels = torch.stack(pictures).to(device)
        for view in range(views):
            encoded = vae.moments(pixels.flip(-1) if view else pixels).float().cpu()
            if not torch.isfinite(encoded).all():
                names = [source.ids[rows[p]] for p in places]
                raise LdmError(
                    f"the VAE gives latents that are not finite, among {names[0]} .. {names[-1]}",
                    where="cache",
                    fix="use a VAE that was trained to the end",
                    code=ExitCode.NUMERICS,
                )
            moments[places, view] = encoded
    write_shard(out, {"moments": moments.to(_dtype(config)), "sizes": sizes}, {"bad": bad})
