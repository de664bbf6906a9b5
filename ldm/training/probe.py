"""How long one optimizer step of each stage takes on this machine, measured on random tensors."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch

from ldm.build import build_denoiser, build_vae
from ldm.config.schema import ClipExperiment, DiffusionExperiment, VaeExperiment
from ldm.data.shapes import open_shapes
from ldm.models.text import random_text_encoder
from ldm.training.clip import train_clip
from ldm.training.clip_run import settings_of
from ldm.training.optim import make_optimizer
from ldm.training.session import resolve_precision

REPEATS = 7
"""Least number of steps that are timed."""
SECONDS = 3.0
"""Least time over which steps are timed: a neighbour's burst must not decide their median."""


def vae_step_seconds(config: VaeExperiment) -> float:
    """Seconds of one VAE step, averaged over its two phases (crops, then whole pictures)."""
    vae = build_vae(config.model, 0).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = make_optimizer(vae, config.optim)

    def at(side: int) -> float:
        shape = (config.train.batch_size, 3, side, side)
        pixels = torch.randn(shape).contiguous(memory_format=torch.channels_last)
        latent = side // config.model.downsample_factor
        noise = torch.randn(shape[0], config.model.latent_channels, latent, latent)

        def step() -> None:
            with _autocast(config.train.precision):
                restored, moments = vae(pixels, noise)
            ((restored.float() - pixels).abs().mean() + 1e-6 * vae.kl(moments).mean()).backward()
            optimizer.step()
            optimizer.zero_grad()

        return _median(step)

    whole = at(config.data.image_px)
    if config.crop.side_px is None:
        return whole
    share = config.crop.until
    return share * at(config.crop.side_px) + (1 - share) * whole


def dit_step_seconds(
    config: DiffusionExperiment, vae: VaeExperiment, clip: ClipExperiment
) -> float:
    """Seconds of one denoiser step on cached latents of that VAE and captions of that CLIP."""
    captions = open_shapes(max(256, config.train.batch_size)).captions
    text = random_text_encoder(captions, width=clip.model.width)
    channels = vae.model.latent_channels
    net = build_denoiser(config.model, channels=channels, text=text, seed=0)
    optimizer = make_optimizer(net, config.optim)
    count = config.train.batch_size
    side = config.data.image_px // vae.model.downsample_factor
    x, t = torch.randn(count, channels, side, side), torch.rand(count) * 1000
    words = text(list(captions))[:count]  # padded to the longest of all, as a cache does

    def step() -> None:
        with _autocast(config.train.precision):
            y = net(x, t, words)
        (y.float() - x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return _median(step)


def clip_step_seconds(config: ClipExperiment) -> float:
    """Seconds of one contrastive step: the difference between a longer and a shorter run."""
    source = open_shapes(4 * config.train.batch_size, image_px=config.data.image_px)
    settings = replace(settings_of(config), held_out_pairs=0, warmup_steps=0, recall_steps=0)

    def run(steps: int) -> float:
        started = time.perf_counter()
        train_clip(source, replace(settings, steps=steps))
        return time.perf_counter() - started

    run(1)
    return max(1e-3, (run(4) - run(1)) / 3)


def _autocast(precision: Literal["auto", "fp32", "bf16"]) -> torch.autocast:
    enabled = resolve_precision(precision, torch.device("cpu")) == "bf16"
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled)


def _median(step: Callable[[], None]) -> float:
    step()
    step()
    times: list[float] = []
    while len(times) < REPEATS or sum(times) < SECONDS:
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    return statistics.median(times)
