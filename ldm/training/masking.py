"""Which tokens a sample is trained on: a function of (seed, epoch, sample id), as every draw."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from ldm.config.dit import DitConfig
from ldm.config.schema import DiffusionExperiment
from ldm.models.routing import Routing
from ldm.randomness import generator
from ldm.types import Batch, Denoiser


def on_some_tokens(
    net: nn.Module, batch: Batch, x0: Tensor, config: DiffusionExperiment, step: int
) -> tuple[Denoiser, Tensor | None]:
    """The network as this micro-batch trains it, and the latent pixels that the loss counts.

    Both are what they would be without masking where `model.masking` is off.

    Args:
        net: the network.
        batch, x0, config, step: as of `training_routing`.

    Returns:
        the network, and a mask (B, 1, h, w) bool or None for all pixels.
    """
    routing, model = training_routing(batch, x0, config, step), config.model
    if routing is None or not isinstance(model, DitConfig):
        return net, None
    counted, patch = None, model.patch_size
    if model.masking.kind == "mask":
        counted = routing.of_pixels(x0.shape[-2] // patch, x0.shape[-1] // patch, patch)
    return partial(net, routing=routing), counted


def training_routing(
    batch: Batch, x0: Tensor, config: DiffusionExperiment, step: int
) -> Routing | None:
    """The routing of a micro-batch with latents x0 (B, C, h, w); None where all tokens count.

    Args:
        batch: its samples and their epochs.
        x0: its latents, whose size tells the number of tokens.
        config: the experiment.
        step: optimizer steps made so far: from `until` of all on, nothing is left out.
    """
    model = config.model
    if not isinstance(model, DitConfig) or model.masking.kind == "none":
        return None
    masking = model.masking
    if step >= round(masking.until * config.train.steps):
        return None
    count = x0.shape[-2] * x0.shape[-1] // model.patch_size**2
    keep = max(1, round(count * (1 - masking.share)))
    seed = config.train.seed
    rows = [
        np.sort(generator(seed, "masking", epoch, name).permutation(count)[:keep])
        for epoch, name in zip(batch.epochs, batch.ids, strict=True)
    ]
    kept = torch.from_numpy(np.stack(rows)).to(x0.device)
    return Routing(kept, masking.first, masking.last)
