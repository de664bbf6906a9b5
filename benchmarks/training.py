"""Rows of what a training step does besides the network, and of whole steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import Budget, Row, assert_equal, in_turns
from benchmarks.pairs import Pair, dit_pair, unet_pair, vae_pair
from ldm.config.schema import OptimConfig
from ldm.models.backends import choose
from ldm.training.ema import Ema
from ldm.training.optim import clip_gradients, make_optimizer
from ldm.types import TextEmbedding

OPTIM = OptimConfig(learning_rate=1e-4, beta2=0.999, weight_decay=0.0)


def optimizer(budget: Budget) -> Iterator[Row]:
    """AdamW and the weight average over the parameters of the 35 M UNet."""
    from diffusers.training_utils import EMAModel

    pair = unet_pair((16, 32, 32, 32), 32) if budget.is_smoke else unet_pair()
    mine, theirs = deepcopy(pair.peer), deepcopy(pair.peer)
    for net in (mine, theirs):
        for index, weight in enumerate(net.parameters()):
            draws = torch.Generator().manual_seed(index)
            weight.grad = torch.randn(weight.shape, generator=draws)
    ours = make_optimizer(mine, OPTIM)
    peer = torch.optim.AdamW(theirs.parameters(), lr=1e-4, betas=(0.9, 0.999), weight_decay=0.0)
    ours.step()
    peer.step()
    assert_equal(_flat(mine), _flat(theirs), 1e-6, "AdamW step")
    shape = f"{sum(p.numel() for p in mine.parameters()) / 1e6:.0f} M parameters"
    times = in_turns({"torch's default": peer.step, "ours": ours.step}, budget)
    yield times.row("AdamW step", "ours", "torch's default", 2.9, shape=shape)

    average, peer_average = Ema(mine, 0.9999), EMAModel(mine.parameters(), decay=0.9999)
    peer_average.step(mine.parameters())  # its first step copies; from then on decays are alike
    with torch.no_grad():
        for weight in mine.parameters():
            weight.add_(0.1)
    peer_average.step(mine.parameters())
    average.update(mine, 1)
    own = torch.cat([value.flatten() for value in average.shadow.values()])
    other = torch.cat([value.flatten() for value in peer_average.shadow_params])
    assert_equal(own, other, 1e-5, "EMA update")
    parameters = list(mine.parameters())
    times = in_turns(
        {
            "diffusers EMAModel": lambda: peer_average.step(parameters),
            "ours": lambda: average.update(mine, 10),
        },
        budget,
    )
    yield times.row("EMA update", "ours", "diffusers EMAModel", 2.2, shape=shape)


def _flat(net: nn.Module) -> Tensor:
    return torch.cat([weight.detach().flatten() for weight in net.parameters()])


def steps(budget: Budget) -> Iterator[Row]:
    """A whole bf16 step as the peer's training script makes it, and as our loop does."""
    if budget.is_smoke:
        pair, batch, px, widths = dit_pair(2, 1, 32), 1, 64, (8, 16, 16, 16)
    else:
        pair, batch, px, widths = dit_pair(), 8, 128, (32, 64, 128, 128)
    vae, peer_vae = vae_pair(widths)
    pixels = torch.randn(batch, 3, px, px, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        moments = vae.moments(pixels)
        theirs = peer_vae.encode(pixels).latent_dist.parameters
        assert_equal(moments, theirs, 1e-4, "encoder of the training step")
    encoder = _text_tower(pair.text_width)
    ids = torch.randint(0, 900, (batch, 77), generator=torch.Generator().manual_seed(1))
    ours = _our_step(pair, vae, moments, encoder(ids)[0])
    live = _peer_step(pair, peer_vae, encoder, pixels, ids, cached=False)
    cached = _peer_step(pair, peer_vae, encoder, pixels, ids, cached=True)
    with_memory = choose().keeping_memory

    def run_of_ours() -> None:
        with with_memory():  # as a run holds it from its first step to its last
            _run(ours)

    times = in_turns(
        {
            "script, encoding": lambda: _run(live),
            "script, cached": lambda: _run(cached),
            "ours": run_of_ours,
        },
        budget,
    )
    shape = f"dit, {px} px B{batch}, bf16, {STEPS} steps"
    for name, peer, goal in (("live", "encoding", 2.0), ("cached", "cached", 1.5)):
        row = f"training step against {name} script"
        yield times.row(row, "ours", f"script, {peer}", goal, shape=shape)


STEPS = 4
"""Steps of a turn."""


def _run(step: Callable[[], None]) -> None:
    for _ in range(STEPS):
        step()


def _text_tower(width: int) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """A CLIP text tower of 12 layers and random weights, frozen."""
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = CLIPTextConfig(
            vocab_size=1000,
            bos_token_id=0,
            eos_token_id=1,
            hidden_size=width,
            intermediate_size=4 * width,
            num_attention_heads=max(1, width // 64),
            num_hidden_layers=12 if width > 32 else 1,
        )
        tower = CLIPTextModel(config).eval().requires_grad_(False)

    def run(ids: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (tower(ids).last_hidden_state,)

    return run


def _peer_step(
    pair: Pair,
    vae: Any,
    encoder: Callable[[Tensor], tuple[Tensor, ...]],
    pixels: Tensor,
    ids: Tensor,
    *,
    cached: bool,
) -> Callable[[], None]:
    """The body of diffusers' train_text_to_image.py, bf16 by autocast, EMA on."""
    from diffusers import DDPMScheduler
    from diffusers.training_utils import EMAModel

    net = deepcopy(pair.peer).train()
    optim = torch.optim.AdamW(net.parameters(), lr=1e-4)
    average = EMAModel(net.parameters())
    scheduler = DDPMScheduler(beta_schedule="scaled_linear")
    draws = torch.Generator().manual_seed(3)
    half = deepcopy(vae).to(torch.bfloat16)
    with torch.no_grad():
        kept = vae.encode(pixels).latent_dist, encoder(ids)[0]

    def step() -> None:
        if cached:
            law, states = kept
        else:
            with torch.no_grad():
                law = half.encode(pixels.bfloat16()).latent_dist
            with torch.autocast("cpu", torch.bfloat16):
                states = encoder(ids)[0]
        latents = law.sample(draws).float() * vae.config.scaling_factor
        noise = torch.randn(latents.shape, generator=draws)
        t = torch.randint(0, 1000, (len(latents),), generator=draws)
        noisy = scheduler.add_noise(latents, noise, t)
        text = TextEmbedding(states, torch.ones(states.shape[:2], dtype=torch.bool))
        with torch.autocast("cpu", torch.bfloat16):
            predicted = pair.call_peer(net, noisy, t, text)
        loss = F.mse_loss(predicted.float(), noise)
        loss.backward()
        loss.item()  # the script gathers it for its progress bar
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optim.step()
        optim.zero_grad()
        average.step(net.parameters())

    return step


def _our_step(pair: Pair, vae: Any, moments: Tensor, states: Tensor) -> Callable[[], None]:
    """What `train_diffusion` does with a cached batch, with its functions."""
    from ldm.diffusion.core import Diffusion
    from ldm.diffusion.loss import diffusion_loss
    from ldm.diffusion.prediction import PREDICTIONS
    from ldm.diffusion.process import PROCESSES
    from ldm.randomness import normal

    net = choose().install(deepcopy(pair.ours)).train()
    optim, average = make_optimizer(net, OPTIM), Ema(net, 0.9999)
    diffusion = Diffusion(PROCESSES["sd"], PREDICTIONS["eps"])
    ids = tuple(str(i) for i in range(len(moments)))
    text = TextEmbedding(states, torch.ones(states.shape[:2], dtype=torch.bool))
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        epochs, size = (done,) * len(ids), (4, *moments.shape[2:])
        x0 = vae.latents(moments, normal(size, 0, "posterior", epochs, ids))
        eps = normal(size, 0, "noise", epochs, ids)
        t = torch.rand(len(ids), generator=torch.Generator().manual_seed(done))
        with torch.autocast("cpu", torch.bfloat16):
            loss = diffusion_loss(net, diffusion, x0, text, t, eps, None)
        loss.mean().backward()
        clip_gradients(net, 1.0)
        optim.step()
        optim.zero_grad(set_to_none=True)
        average.update(net, done)

    return step


def trainer(budget: Budget) -> Iterator[Row]:
    """What `train_diffusion` adds to forward, backward and optimizer, on the shapes DiT."""
    import tempfile
    import time
    from pathlib import Path

    from benchmarks.profile_run import network_share

    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        share, count = network_share(Path(folder), 4 if budget.is_smoke else 40)
        spent = time.process_time() - began
    yield Row(
        "trainer: share of forward, backward, optimizer",
        "the whole step",
        share,
        0.95,
        shape=f"configs/shapes/dit.yaml, {count} steps",
        note=f"a share, not a speed; 0.95 is an overhead of 5 %; {spent:.0f} s in all",
    )
