"""Trains a denoiser in latent space. Reads top to bottom: set up, resume, step, save.

One run is one function of its configuration: data order, noise, times and caption dropout depend on
(seed, epoch, sample id) alone, so killing it, resuming it or changing ranks leaves it the same run.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ldm.build import build_denoiser, build_diffusion, load_text, load_vae, open_data
from ldm.config.schema import DiffusionExperiment
from ldm.data.loader import Loader
from ldm.diffusion.core import Diffusion
from ldm.diffusion.guidance import stack
from ldm.diffusion.loss import WEIGHTINGS, diffusion_loss
from ldm.diffusion.schedule import sample_times, stratify
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.text import HuggingFaceTextEncoder
from ldm.randomness import normal, uniform
from ldm.training.cache import CachedLoader, build_cache, load_cache
from ldm.training.checkpoints import DiffusionWriter, resume
from ldm.training.ema import Ema
from ldm.training.optim import learning_rate, make_optimizer
from ldm.training.preview import draw_samples, preview_prompts
from ldm.training.session import Meter, Session
from ldm.types import Batch, Source, TextEmbedding

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Frozen:
    """What is not trained: the VAE, the text encoder, the null embedding (1, L, D)."""

    vae: AutoencoderKL
    encoder: HuggingFaceTextEncoder
    null: TextEmbedding


def train_diffusion(config: DiffusionExperiment) -> Path:
    """Trains to `train.steps`, resuming whatever `run.dir` already holds.

    Returns:
        the directory of the last checkpoint.

    Raises:
        LdmError: for everything a user can mend; SIGTERM, SIGINT and SIGUSR1 save first and raise
            with code SIGNALLED.
    """
    session = Session(config)
    source, heldout = open_data(config.data)
    frozen = load_frozen(config, source, session.device)
    diffusion = build_diffusion(config.diffusion)
    diffusion.check()
    net = build_denoiser(
        config.model,
        channels=frozen.vae.config.latent_channels,
        text=frozen.encoder,
        seed=config.train.seed,
        checkpointing=config.train.gradient_checkpointing,
    ).to(session.device)
    ema, optimizer = Ema(net, config.train.ema_decay), make_optimizer(net, config.optim)
    writer = DiffusionWriter(session, frozen, net, ema, optimizer)
    session.samples = len(source)
    with session.opened(), session.stop.listening():
        session.on_main(writer.write_components)
        progress = resume(session, writer, source.fingerprint)
        loader = open_loader(config, source, frozen, session)
        prompts = preview_prompts(config.preview, source, heldout)
        if config.preview.every_steps:
            frozen.encoder(prompts)  # one that is too long is refused now, not at the first preview
        trained = session.prepare(torch.compile(net) if config.train.compile else net)
        batches, meter = loader.batches(progress.cursor), Meter()
        with tqdm(
            total=config.train.steps,
            initial=progress.step,
            unit="step",
            desc=f"diffusion {config.run.dir}",
            disable=not session.is_main,
        ) as bar:
            while progress.step < config.train.steps:
                rate = learning_rate(progress.step, config.train.steps, config.optim)
                values = accumulate(session, trained, diffusion, batches, frozen, config)
                norm = session.optimizer_step(trained, optimizer, rate, progress)
                progress.step += 1
                progress.cursor += config.train.batch_size
                if norm is not None:
                    ema.update(net, progress.step)
                meter.add({**values, "gradient_norm": norm or 0.0, "learning_rate": rate})
                bar.update()
                if session.due(progress.step, config.run.log_every_steps):
                    session.report(progress, meter, loader.bad, bar, cached=config.cache.enabled)
                # before the save: a run killed in between makes this step, and its preview, again
                if session.due(progress.step, config.preview.every_steps) and session.is_main:
                    with ema.applied(net):
                        draw_samples(config, frozen, net, prompts, progress.step)
                stopping = session.stopping()
                if stopping or session.due(progress.step, config.run.save_every_steps):
                    writer.save(progress)
                if stopping:
                    raise session.stopped(progress)
    return writer.last


def accumulate(
    session: Session,
    net: nn.Module,
    diffusion: Diffusion,
    batches: Iterator[Batch],
    frozen: Frozen,
    config: DiffusionExperiment,
) -> dict[str, Tensor | float]:
    """Forward and backward over this rank's micro-batches of one step; returns its mean losses.

    The loss is the sum over samples over the global batch, so the gradient does not depend on how
    ranks and micro-batches share the work.
    """
    share = config.train.batch_size / session.world_size
    losses: list[Tensor] = []
    times: list[Tensor] = []
    for micro in range(config.train.accumulation):
        batch = next(batches)
        x0, text = prepare(batch, frozen, config, session)
        t = training_times(batch, diffusion, config)
        eps = normal(x0.shape[1:], config.train.seed, "noise", batch.epochs, batch.ids)
        last = micro == config.train.accumulation - 1
        with session.micro_batch_context(net, last=last):
            with session.autocast():
                loss = diffusion_loss(
                    net,
                    diffusion,
                    x0,
                    text,
                    t,
                    eps.to(x0.device),
                    WEIGHTINGS[config.diffusion.weighting],
                )
            loss = loss * batch.weight.to(loss.device)
            session.accelerator.backward(loss.sum() / share)
        losses.append(loss.detach())
        times.append(t)
    return loss_by_time(torch.cat(losses), torch.cat(times))


def prepare(
    batch: Batch, frozen: Frozen, config: DiffusionExperiment, session: Session
) -> tuple[Tensor, TextEmbedding]:
    """Clean latents and embedded captions of a batch, cached or live: where both branches meet."""
    device, seed = session.device, config.train.seed
    if batch.moments is not None and batch.text is not None:
        moments, text = batch.moments.to(device), batch.text.to(device)
    else:
        assert batch.pixels is not None
        assert batch.captions is not None
        with torch.no_grad():
            moments = frozen.vae.moments(batch.pixels.to(device))
        text = frozen.encoder(batch.captions).to(device)
    channels, height, width = moments.shape[1] // 2, *moments.shape[2:]
    noise = normal((channels, height, width), seed, "posterior", batch.epochs, batch.ids)
    x0 = frozen.vae.latents(moments, noise.to(device))
    dropped = uniform(seed, "caption", batch.epochs, batch.ids) < config.diffusion.caption_dropout
    return x0, drop_captions(text, frozen.null, dropped)


def drop_captions(text: TextEmbedding, null: TextEmbedding, dropped: Tensor) -> TextEmbedding:
    """`text` (B rows) with the null embedding (1 row) in the rows where `dropped` (B,) is True."""
    count = len(text)
    rows = torch.where(dropped, count, torch.arange(count)).to(text.tokens.device)
    return stack(text, null)[rows]


def training_times(batch: Batch, diffusion: Diffusion, config: DiffusionExperiment) -> Tensor:
    """Times (B,) float64 of a batch: functions of the seed, the epoch and the sample ids."""
    law = config.diffusion.timesteps
    u = uniform(config.train.seed, "time", batch.epochs, batch.ids)
    if law.stratified:
        u = stratify(u, torch.tensor(batch.positions), config.train.batch_size)
    return sample_times(
        diffusion.process,
        u,
        distribution=law.distribution,
        mean=law.mean,
        std=law.std,
        shift=law.shift,
    )


def loss_by_time(losses: Tensor, times: Tensor, bins: int = 4) -> dict[str, Tensor | float]:
    """The mean loss, and its mean in equal slices of t; nothing here waits for the device."""
    slices = (times * bins).long().clamp(max=bins - 1).to(losses.device)
    sums = torch.zeros(bins, device=losses.device).index_add(0, slices, losses.float())
    counts = torch.zeros(bins, device=losses.device).index_add(
        0, slices, torch.ones_like(losses, dtype=torch.float32)
    )
    means = sums / counts  # NaN where no sample fell into the slice
    named = {f"loss_t{k / bins:.2f}": means[k] for k in range(bins)}
    return {"loss": losses.float().mean(), **named}


def load_frozen(config: DiffusionExperiment, source: Source, device: torch.device) -> Frozen:
    """The VAE, the text encoder and the null embedding, which is the embedding of no words."""
    vae = load_vae(config.vae, config.train.seed).to(device)
    encoder = load_text(config.text, source.captions, config.train.seed).to(device)
    return Frozen(vae, encoder, encoder([""]))


def open_loader(
    config: DiffusionExperiment, source: Source, frozen: Frozen, session: Session
) -> Loader | CachedLoader:
    """Batches from the cache, which is built first where it is missing, or from the pictures."""
    train = config.train
    if not config.cache.enabled:
        return Loader(
            source,
            seed=train.seed,
            batch_size=train.batch_size,
            image_px=config.data.image_px,
            crop=config.data.crop,
            flip=config.data.flip,
            small=config.data.too_small,
            rank=session.rank,
            world_size=session.world_size,
            accumulation=train.accumulation,
            workers=config.data.workers,
        )
    folders = build_cache(
        config,
        source,
        frozen.vae,
        frozen.encoder,
        share=(session.rank, session.world_size),
        stopped=lambda: session.stop.name is not None,
    )
    session.accelerator.wait_for_everyone()
    cache = load_cache(config, source, folders)
    return CachedLoader(cache, session.share, seed=train.seed, flip=config.data.flip)
