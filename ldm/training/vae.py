"""Trains the KL-VAE. Reads top to bottom: set up, resume, step, save.

Randomness and order follow the same functions as diffusion training, so a resumed run is the same
run. What happens in a step is in `vae_step.py`, the terms of the objective in `vae_loss.py`, the
adversary in `vae_gan.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ldm.build import build_discriminator, build_perceptual, build_vae, open_data
from ldm.config.schema import VaeExperiment
from ldm.data.loader import Loader
from ldm.models.identity import weights_sha256
from ldm.training.checkpoints import Beside, resume
from ldm.training.ema import Ema
from ldm.training.optim import learning_rate, make_optimizer
from ldm.training.preview import draw_reconstructions, preview_pictures
from ldm.training.session import Meter, Session, Update
from ldm.training.vae_checkpoints import VaeWriter
from ldm.training.vae_gan import Adversary, DiscriminatorPass
from ldm.training.vae_loss import VaePass, trained_part
from ldm.training.vae_step import Networks, accumulate
from ldm.types import Source


def train_vae(config: VaeExperiment) -> Path:
    """Trains to `train.steps`, resuming whatever `run.dir` already holds.

    Every checkpoint carries the per-channel mean and standard deviation of its own latents,
    measured over the data; where only the decoder is trained, those of the VAE it began with.

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
    networks = make_networks(config, session)
    adversary, model = networks.adversary, trained_part(networks.passes)
    ema, optimizer = Ema(model, config.train.ema_decay), make_optimizer(model, config.optim)
    writer = make_writer(session, networks, ema, optimizer, source)
    session.samples = len(source)
    with session.opened(), session.stop.listening():
        progress = resume(session, writer, source.fingerprint)
        shown = preview_pictures(config, heldout or source)
        distribute(networks, session)
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
                values = accumulate(session, networks, batches, config, progress.step)
                updates = [Update(networks.trained, optimizer, rate, config.optim.clip_norm)]
                if adversary is not None and adversary.trains(progress.step):
                    updates.append(adversary.update(progress.step))
                norms = session.optimizer_steps(updates, progress)
                progress.step += 1
                progress.cursor += config.train.batch_size
                if norms is not None:
                    ema.update(model, progress.step)
                meter.add({**values, **described(updates, norms)})
                bar.update()
                if session.due(progress.step, config.run.log_every_steps):
                    session.report(progress, meter, loader.bad, bar)
                # before the save: a run killed in between makes this step, and its preview, again
                if session.due(progress.step, config.preview.every_steps) and session.is_main:
                    with ema.applied(model):
                        psnr = draw_reconstructions(
                            config, networks.passes.vae, shown, progress.step
                        )
                    session.metrics.write(
                        progress.step, {"heldout_psnr" if heldout else "train_psnr": psnr}
                    )
                stopping = session.stopping()
                if stopping or session.due(progress.step, config.run.save_every_steps):
                    writer.save(progress)
                if stopping:
                    raise session.stopped(progress)
    return writer.last


def described(
    updates: Sequence[Update], norms: tuple[float, ...] | None
) -> dict[str, Tensor | float]:
    """The rows about an optimizer step: of the VAE, and of the discriminator where it stepped."""
    values: dict[str, Tensor | float] = {}
    for number, update in enumerate(updates):
        prefix, norm = ("", "gan_")[number], 0.0 if norms is None else norms[number]
        values |= {f"{prefix}gradient_norm": norm, f"{prefix}learning_rate": update.rate}
    return values


def make_networks(config: VaeExperiment, session: Session) -> Networks:
    """The networks of a run as they begin, not yet distributed."""
    # channels_last: convolutions of the whole network run without re-ordering memory
    vae = build_vae(config.model, config.train.seed).to(session.device)
    vae = vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if config.train.only == "decoder":
        for part in (vae.encoder, vae.quant_conv):
            if part is not None:
                part.requires_grad_(False)
    passes = VaePass(vae, learn_logvar=config.loss.learn_logvar).to(session.device)
    networks = Networks(passes, passes)
    if config.loss.perceptual != "none":
        networks.perceptual = build_perceptual(
            config.loss.perceptual, config.loss.perceptual_path, session.device
        )
    if config.gan.loss != "none":
        channels = vae.config.out_channels
        net = build_discriminator(config.gan, channels, config.train.seed).to(session.device)
        net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = make_optimizer(net, config.gan.optim)
        networks.adversary = Adversary(
            config.gan, net, DiscriminatorPass(net), optimizer, config.train.steps
        )
    return networks


def make_writer(
    session: Session,
    networks: Networks,
    ema: Ema,
    optimizer: torch.optim.Optimizer,
    source: Source,
) -> VaeWriter:
    """The checkpoints of a run: the discriminator is resumed too, a perceptual loss recognised."""
    writer = VaeWriter(session, networks.passes, ema, optimizer, source)
    if networks.adversary is not None:
        writer.beside["discriminator"] = Beside(
            networks.adversary.net, networks.adversary.optimizer
        )
    if networks.perceptual is not None:
        writer.fixed["perceptual"] = weights_sha256(networks.perceptual)
    return writer


def distribute(networks: Networks, session: Session) -> None:
    """Wraps what is trained; done after resuming, so that all ranks begin with equal weights."""
    passes = networks.passes
    networks.trained = session.prepare(
        torch.compile(passes) if session.config.train.compile else passes
    )
    if networks.adversary is not None:
        networks.adversary.passes = session.prepare(networks.adversary.passes)
