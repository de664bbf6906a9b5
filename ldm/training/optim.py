"""AdamW, its parameter groups, and the learning rate as a function of the optimizer step."""

from __future__ import annotations

import math

import torch
from torch import nn

from ldm.config.schema import OptimConfig


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """The rate of optimizer step `step` (0-based) out of `steps`.

    A function of the step alone: a resumed run and any number of ranks see the same rates.
    """
    peak, final = config.learning_rate, config.final_fraction
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return peak
    done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    fall = 1 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return peak * (final + (1 - final) * fall)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Two groups: matrices and kernels decay; biases, norms and embeddings do not."""
    embeddings = {
        f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Embedding)
    }
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = [p for name, p in named if p.ndim >= 2 and name not in embeddings]
    others = [p for name, p in named if p.ndim < 2 or name in embeddings]
    groups: list[dict[str, object]] = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW, about three times as fast as the default on CPUs."""
    return torch.optim.AdamW(
        parameter_groups(model, config.weight_decay),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        fused=True,
    )


def clip_gradients(model: nn.Module, limit: float) -> float:
    """Scales the gradients so that their norm over all parameters is at most `limit`.

    Returns:
        the norm before; it may be infinite or NaN, and so are then the gradients.
    """
    parameters = list(model.parameters())
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    value = float(norm)
    if not value < 0.99 * limit:  # below, all would be multiplied by 1: a pass over the memory
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return value
