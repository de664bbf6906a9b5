"""Sampling loops of both sides for `gpu.py`, and a loop captured whole as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ldm.diffusion.core import Diffusion
from ldm.diffusion.guidance import GUIDANCE, Finish, Model
from ldm.diffusion.prediction import PREDICTIONS
from ldm.diffusion.process import PROCESSES
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.schedule import levels
from ldm.inference.network import Network
from ldm.types import TextEmbedding

SCALE = 7.5
Arm = Callable[[], Tensor]


def our_loop(net: Any, x: Tensor, text: TextEmbedding, steps: int) -> Arm:
    """Latents by our DDIM with guidance; text and times are prepared before."""
    plan = levels(PROCESSES["sd"], steps, spacing="trailing")
    null = TextEmbedding(torch.zeros_like(text.tokens), text.mask, text.pooled)
    diffusion = Diffusion(PROCESSES["sd"], PREDICTIONS["eps"])
    with torch.inference_mode():
        model = Model(diffusion, Network(net), text, null, levels=plan)
        denoise = GUIDANCE["classifier_free"](model, SCALE, finish=Finish())

    def run() -> Tensor:
        with torch.inference_mode():
            return SAMPLERS["ddim"].run(denoise, x, plan, noise=lambda _: x, eta=0.0)

    run()
    return run


def peer_loop(net: Any, x: Tensor, text: TextEmbedding, steps: int) -> Arm:
    """The loop of StableDiffusionPipeline, without its checks and its progress bar."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        timestep_spacing="trailing",
        clip_sample=False,
    )
    both = torch.cat([torch.zeros_like(text.tokens), text.tokens])

    def run() -> Tensor:
        with torch.inference_mode():
            scheduler.set_timesteps(steps, device=x.device)
            state = x.to(both.dtype)
            for t in scheduler.timesteps:
                pair = scheduler.scale_model_input(torch.cat([state, state]), t)
                null, own = net(pair, t, encoder_hidden_states=both, return_dict=False)[0].chunk(2)
                guided = null + SCALE * (own - null)
                state = scheduler.step(guided, t, state, return_dict=False)[0]
            return state

    return run


def graphed(run: Arm) -> Arm:
    """`run` captured once, launched as one graph at every call: no kernel waits for Python.

    It holds everything it reads where it was when captured; new noise is copied into the same x.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay
