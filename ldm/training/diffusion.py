"""Trains a denoiser in latent space. Reads top to bottom: set up, resume, step, save.

One run is one function of its configuration: data order, noise, times and caption dropout depend on
(seed, epoch, sample id) alone, so killing it, resuming it or changing ranks leaves it the same run.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ldm.build import (
    build_denoiser,
    build_diffusion,
    build_weighting,
    load_text,
    load_vae,
    open_data,
)
from ldm.config.schema import DiffusionExperiment
from ldm.data.loader import Loader
from ldm.diffusion.guidance import stack
from ldm.diffusion.importance import Importance
from ldm.diffusion.loss import diffusion_loss
from ldm.exchange.initial import check_objective
from ldm.inference.guiding import with_size
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.text import FrozenTextEncoder
from ldm.randomness import normal
from ldm.training.adapters import trained_part
from ldm.training.cache import (
    CachedLoader,
    build_cache,
    build_text,
    load_cache,
    load_text_cache,
)
from ldm.training.checkpoints import DiffusionWriter, resume
from ldm.training.ema import Ema
from ldm.training.masking import on_some_tokens
from ldm.training.noise import Ready, dropped_captions, training_eps, with_noise
from ldm.training.optim import learning_rate, make_optimizer
from ldm.training.pairs import PairLoader, Pairs, load_pairs, refuse_other_pairs
from ldm.training.preview import draw_samples, preview_prompts, preview_sources
from ldm.training.session import Meter, Session
from ldm.training.times import Objective, Times, loss_by_time, observed, training_times
from ldm.types import Batch, Source, TextEmbedding

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Frozen:
    """What is not trained: the VAE, the text encoder, the null embedding (1, L, D)."""

    vae: AutoencoderKL
    encoder: FrozenTextEncoder
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
    source, heldout = training_data(config)
    frozen = load_frozen(config, source, session.device)
    if isinstance(source, Pairs):
        refuse_other_pairs(source, config, frozen.vae)
    diffusion = build_diffusion(config.diffusion)
    diffusion.check()
    check_objective(config.model, config.diffusion)
    weighting = build_weighting(config.diffusion)
    net = build_denoiser(
        config.model,
        channels=frozen.vae.config.latent_channels,
        text=frozen.encoder,
        seed=config.train.seed,
        checkpointing=config.train.gradient_checkpointing,
        learned_variance=diffusion.learned_variance,
    ).to(session.device)
    learned = trained_part(net, config.lora, config.train.seed).to(session.device)
    ema, optimizer = Ema(learned, config.train.ema_decay), make_optimizer(learned, config.optim)
    writer = DiffusionWriter(session, frozen, net, learned, ema, optimizer)
    if config.diffusion.timesteps.importance:
        writer.importance = Importance.fresh()
    session.samples = len(source)
    with session.opened(), session.stop.listening():
        session.on_main(writer.write_components)
        progress = resume(session, writer, source.fingerprint)
        loader = open_loader(config, source, frozen, session)
        prompts = preview_prompts(config.preview, source, heldout)
        sources = preview_sources(config, source)
        if config.preview.every_steps:
            frozen.encoder(prompts)  # one that is too long is refused now, not at the first preview
        session.backends.install(net)
        trained = session.prepare(torch.compile(net) if config.train.compile else net)
        batches = loader.batches(progress.cursor)
        prepared = ((batch, *prepare(batch, frozen, config, session)) for batch in batches)
        samples, meter = with_noise(prepared, config, session, source), Meter()
        with tqdm(
            total=config.train.steps,
            initial=progress.step,
            unit="step",
            desc=f"diffusion {config.run.dir}",
            disable=not session.is_main,
        ) as bar:
            while progress.step < config.train.steps:
                rate = learning_rate(progress.step, config.train.steps, config.optim)
                objective = Objective(diffusion, weighting, writer.importance, progress.cursor)
                values, writer.importance = accumulate(session, trained, objective, samples, config)
                norm = session.optimizer_step(trained, optimizer, rate, progress)
                progress.step += 1
                progress.cursor += config.train.batch_size
                if norm is not None:
                    ema.update(learned, progress.step)
                meter.add({**values, "gradient_norm": norm or 0.0, "learning_rate": rate})
                bar.update()
                if session.due(progress.step, config.run.log_every_steps):
                    session.report(progress, meter, loader.bad, bar, cached=config.cache.enabled)
                # before the save: a run killed in between makes this step, and its preview, again
                if session.due(progress.step, config.preview.every_steps) and session.is_main:
                    with ema.applied(learned):
                        draw_samples(config, frozen, net, prompts, progress.step, sources)
                stopping = session.stopping()
                if stopping or session.due(progress.step, config.run.save_every_steps):
                    writer.save(progress)
                if stopping:
                    raise session.stopped(progress)
    return writer.last


def accumulate(
    session: Session,
    net: nn.Module,
    objective: Objective,
    samples: Iterator[Ready],
    config: DiffusionExperiment,
) -> tuple[dict[str, Tensor | float], Importance | None]:
    """Forward and backward over this rank's micro-batches of one step.

    The loss is the sum over samples over the global batch, so the gradient does not depend on how
    ranks and micro-batches share the work.

    Returns:
        its mean losses, and what they say of the times of the next step.
    """
    share = config.train.batch_size / session.world_size
    batches: list[Batch] = []
    places: list[Times] = []
    losses: list[Tensor] = []
    for micro in range(config.train.accumulation):
        ready = next(samples)
        batch, x0, text, _ = ready
        place = training_times(batch, objective, config)
        eps = training_eps(ready, place.t, objective.diffusion.process, config)
        step = objective.cursor // config.train.batch_size
        learner, counted = on_some_tokens(net, batch, x0, config, step)
        last = micro == config.train.accumulation - 1
        with session.micro_batch_context(net, last=last):
            with session.autocast():
                loss = diffusion_loss(
                    *(learner, objective.diffusion, x0, text, place.t, eps),
                    objective.weighting,
                    counted,
                )
            loss = loss * batch.weight.to(loss.device)
            session.accelerator.backward((loss * place.factor.to(loss)).sum() / share)
        batches.append(batch)
        places.append(place)
        losses.append(loss.detach())
    after = observed(objective.importance, session, batches, places, losses)
    return loss_by_time(torch.cat(losses), places), after


def prepare(
    batch: Batch, frozen: Frozen, config: DiffusionExperiment, session: Session
) -> tuple[Tensor, TextEmbedding]:
    """Clean latents and embedded captions of a batch, cached or live: where both branches meet."""
    device = session.device
    if batch.text is not None:
        text = batch.text.to(device)
    else:
        assert batch.captions is not None
        text = frozen.encoder(batch.captions).to(device)
    if batch.pair is not None:
        x0 = batch.pair[0].to(device)
    else:
        x0 = encoded(batch, frozen, config, session)
    text = drop_captions(text, frozen.null, dropped_captions(batch, config))
    if batch.sizes is None:  # of pairs, and of caches that were built before sizes were kept
        return x0, with_size(text, config.data.image_px, config.data.image_px)
    return x0, replace(text, sizes=batch.sizes.to(device))


def encoded(batch: Batch, frozen: Frozen, config: DiffusionExperiment, session: Session) -> Tensor:
    """Latents (B, C, h, w) of pictures or cached moments: a sample of the VAE's posterior."""
    if batch.moments is not None:
        moments = batch.moments.to(session.device)
    else:
        assert batch.pixels is not None
        with torch.no_grad():
            moments = frozen.vae.moments(batch.pixels.to(session.device))
    channels, height, width = moments.shape[1] // 2, *moments.shape[2:]
    shape = (channels, height, width)
    noise = normal(shape, config.train.seed, "posterior", batch.epochs, batch.ids)
    return frozen.vae.latents(moments, noise.to(session.device))


def drop_captions(text: TextEmbedding, null: TextEmbedding, dropped: Tensor) -> TextEmbedding:
    """`text` (B rows) with the null embedding (1 row) in the rows where `dropped` (B,) is True."""
    count = len(text)
    rows = torch.where(dropped, count, torch.arange(count)).to(text.tokens.device)
    return stack(text, null)[rows]


def training_data(config: DiffusionExperiment) -> tuple[Source, Source | None]:
    """Training and held-out data: captioned pictures, or pairs where they are given."""
    if config.data.pairs is None:
        return open_data(config.data)
    return load_pairs(config.data.pairs, config.data.max_bad_fraction), None


def load_frozen(config: DiffusionExperiment, source: Source, device: torch.device) -> Frozen:
    """The VAE, the text encoder and the null embedding: of no words, or zeros."""
    vae = load_vae(config.vae, config.train.seed).to(device)
    encoder = load_text(config.text, source.captions, config.train.seed).to(device)
    return Frozen(vae, encoder, encoder.null())


def open_loader(
    config: DiffusionExperiment, source: Source, frozen: Frozen, session: Session
) -> Loader | CachedLoader | PairLoader:
    """Batches from the cache, which is built first where it is missing, or from the pictures."""
    train = config.train
    if isinstance(source, Pairs):
        return open_pair_loader(config, source, frozen, session)
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


def open_pair_loader(
    config: DiffusionExperiment, pairs: Pairs, frozen: Frozen, session: Session
) -> PairLoader:
    """Batches of pairs; their captions come from the cache, where there is to be one."""
    text = None
    if config.cache.enabled:
        folder = build_text(
            config,
            pairs.captions,
            frozen.encoder,
            share=(session.rank, session.world_size),
            stopped=lambda: session.stop.name is not None,
        )
        session.accelerator.wait_for_everyone()
        text = load_text_cache(config, pairs.captions, folder)
    return PairLoader(pairs, session.share, seed=config.train.seed, text=text)
