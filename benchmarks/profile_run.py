"""A short run of the shapes DiT whose steps are cut into network and everything else."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent


def network_share(folder: Path, steps: int) -> tuple[float, int]:
    """CPU time of forward, backward and optimizer over that of whole steps, and how many steps.

    Of steps in the second half, without previews and saves; the cache is built before.
    """
    from ldm.config.files import load
    from ldm.training import diffusion

    overrides = [
        f"run.dir={folder / 'run'}",
        f"cache.dir={folder / 'cache'}",
        "vae.path=null",
        "text.path=null",
        f"train.steps={steps}",
        f"run.save_every_steps={steps}",
        "run.log_every_steps=10",
        "run.tensorboard=false",
        "preview.every_steps=0",
        "data.count=128",
        "data.holdout=0",
        "optim.warmup_steps=1",
    ]
    config: Any = load([str(ROOT / "configs/shapes/dit.yaml")], overrides)
    inside: list[float] = []
    ends: list[float] = []

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            began = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                inside.append(time.process_time() - began)

        return run

    def ended(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            ends.append(time.process_time())
            return result

        return run

    with (
        _replaced(diffusion, "diffusion_loss", timed),
        _replaced(torch.Tensor, "backward", timed),
        _replaced(torch.optim.AdamW, "step", timed),
        _replaced(diffusion.Ema, "update", ended),
        redirect_stderr(io.StringIO()),  # its progress bars
    ):
        diffusion.train_diffusion(config)
    middle = len(ends) // 2
    calls = len(inside) // len(ends)  # a loss, a backward and an update for each step
    # the update of a step is its last timed part, and the average ends it; saving comes after
    spent = sum(inside[calls * (middle + 1) :])
    return spent / (ends[-1] - ends[middle]), len(ends) - 1 - middle


@contextmanager
def _replaced(where: Any, name: str, wrap: Callable[[Any], Any]) -> Iterator[None]:
    former = getattr(where, name)
    setattr(where, name, wrap(former))
    try:
        yield
    finally:
        setattr(where, name, former)
