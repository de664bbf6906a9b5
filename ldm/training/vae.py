"""Trains the KL-VAE: reconstruction + KL. Reads top to bottom: set up, resume, step, save.

Randomness and order follow the same functions as diffusion training, so a resumed run is the same
run. Terms beyond reconstruction and KL (perceptual, adversarial) belong in `vae_loss`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ldm.build import build_vae, open_data
from ldm.config.schema import DetailCropConfig, VaeExperiment, VaeLossConfig
from ldm.data.loader import Loader
from ldm.models.autoencoder import kl_divergence
from ldm.randomness import generator, normal
from ldm.training.checkpoints import VaeWriter, resume
from ldm.training.ema import Ema
from ldm.training.optim import learning_rate, make_optimizer
from ldm.training.preview import draw_reconstructions, preview_pictures
from ldm.training.session import Meter, Session
from ldm.types import Batch

log = logging.getLogger(__name__)


def train_vae(config: VaeExperiment) -> Path:
    """Trains to `train.steps`, resuming whatever `run.dir` already holds.

    Every checkpoint carries the per-channel mean and standard deviation of its own latents,
    measured over the data.

    Returns:
        the directory of the last checkpoint.

    Raises:
        LdmError: for everything a user can mend; SIGTERM, SIGINT and SIGUSR1 save first and raise
            with code SIGNALLED.
    """
    session = Session(config)
    source, heldout = open_data(config.data)
    loader = Loader(
        source,
        seed=config.train.seed,
        batch_size=config.train.batch_size,
        image_px=config.data.image_px,
        crop=config.data.crop,
        flip=config.data.flip,
        small=config.data.too_small,
        rank=session.rank,
        world_size=session.world_size,
        accumulation=config.train.accumulation,
        workers=config.data.workers,
    )
    # channels_last: convolutions of the whole network run without re-ordering memory
    vae = build_vae(config.model, config.train.seed).to(session.device)
    vae = vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    ema, optimizer = Ema(vae, config.train.ema_decay), make_optimizer(vae, config.optim)
    writer = VaeWriter(session, vae, ema, optimizer, source)
    session.samples = len(source)
    with session.opened(), session.stop.listening():
        progress = resume(session, writer, source.fingerprint)
        shown = preview_pictures(config, heldout or source)
        trained = session.prepare(torch.compile(vae) if config.train.compile else vae)
        batches, meter = loader.batches(progress.cursor), Meter()
        with tqdm(
            total=config.train.steps,
            initial=progress.step,
            unit="step",
            desc=f"vae {config.run.dir}",
            disable=not session.is_main,
        ) as bar:
            while progress.step < config.train.steps:
                rate = learning_rate(progress.step, config.train.steps, config.optim)
                values = accumulate(session, trained, batches, config, progress.step)
                norm = session.optimizer_step(trained, optimizer, rate, progress)
                progress.step += 1
                progress.cursor += config.train.batch_size
                if norm is not None:
                    ema.update(vae, progress.step)
                meter.add({**values, "gradient_norm": norm or 0.0, "learning_rate": rate})
                bar.update()
                if session.due(progress.step, config.run.log_every_steps):
                    session.report(progress, meter, loader.bad, bar)
                # before the save: a run killed in between makes this step, and its preview, again
                if session.due(progress.step, config.preview.every_steps) and session.is_main:
                    with ema.applied(vae):
                        psnr = draw_reconstructions(config, vae, shown, progress.step)
                    session.metrics.write(
                        progress.step, {"heldout_psnr" if heldout else "train_psnr": psnr}
                    )
                stopping = session.stopping()
                if stopping or session.due(progress.step, config.run.save_every_steps):
                    writer.save(progress)
                if stopping:
                    raise session.stopped(progress)
    return writer.last


def accumulate(
    session: Session,
    vae: nn.Module,
    batches: Iterator[Batch],
    config: VaeExperiment,
    step: int,
) -> dict[str, Tensor | float]:
    """Forward and backward over this rank's micro-batches of one step; returns mean terms."""
    share = config.train.batch_size / session.world_size
    sums: dict[str, Tensor | float] = {}
    for micro in range(config.train.accumulation):
        batch = next(batches)
        assert batch.pixels is not None
        pixels = batch.pixels
        if config.crop.side_px is not None and step < config.crop.until * config.train.steps:
            pixels = detail_crops(pixels, config.crop, config.train.seed, batch)
        pixels = pixels.to(session.device, memory_format=torch.channels_last)
        side = pixels.shape[-1] // config.model.downsample_factor
        shape = (config.model.latent_channels, side, side)
        noise = normal(shape, config.train.seed, "posterior", batch.epochs, batch.ids)
        last = micro == config.train.accumulation - 1
        with session.micro_batch_context(vae, last=last):
            with session.autocast():
                reconstruction, moments = vae(pixels, noise.to(session.device))
            terms = vae_loss(pixels, reconstruction.float(), moments, config.loss)
            weight = batch.weight.to(session.device)
            session.accelerator.backward((terms["loss"] * weight).sum() / share)
        for name, term in terms.items():
            sums[name] = sums.get(name, 0.0) + (term.detach() * weight).sum() / share
    return sums


def detail_crops(pixels: Tensor, config: DetailCropConfig, seed: int, batch: Batch) -> Tensor:
    """The most detailed of a few random crops of each picture, (B, 3, side_px, side_px).

    Plain backgrounds teach a codec little; a crop with much variance has edges in it. Where crops
    lie is a function of (seed, epoch, sample id), like every other draw.
    """
    side = config.side_px
    assert side is not None
    room = pixels.shape[-1] - side + 1
    found = [
        picture[:, y : y + side, x : x + side]
        for picture, epoch, name in zip(pixels, batch.epochs, batch.ids, strict=True)
        for y, x in generator(seed, "detail crop", epoch, name)
        .integers(room, size=(config.candidates, 2))
        .tolist()
    ]
    crops = torch.stack(found).unflatten(0, (len(pixels), config.candidates))
    best = crops.var(dim=(3, 4)).sum(2).argmax(1)
    return crops[torch.arange(len(pixels)), best]


def vae_loss(
    pixels: Tensor, reconstruction: Tensor, moments: Tensor, config: VaeLossConfig
) -> dict[str, Tensor]:
    """The terms of the objective, one value per sample (B,); "loss" is what is minimised.

    Both terms are per pixel value, so weights do not depend on the picture size:
    mean |x - x_hat| (its square, or both) + kl_weight * KL / (number of pixel values).
    Source: Rombach et al. 2022 (arXiv 2112.10752), section 3.1 and appendix G.
    """
    errors = (reconstruction - pixels).flatten(1)
    distance = pixels.new_zeros(len(pixels))
    if "l1" in config.reconstruction:
        distance = distance + errors.abs().mean(1)
    if "l2" in config.reconstruction:
        distance = distance + errors.square().mean(1)
    kl = kl_divergence(moments.float()) / pixels[0].numel()
    return {"loss": distance + config.kl_weight * kl, "reconstruction": distance, "kl": kl}
