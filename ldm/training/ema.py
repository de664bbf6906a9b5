"""Exponential moving average of the weights, which is what one samples from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """Float32 averages of a model's parameters.

    The decay warms up as min(decay, (1 + n) / (10 + n)) after n steps, a function of the step, so
    that early averages do not remember the initialisation. Buffers are not averaged: our models
    have none that training changes.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow = {name: p.detach().clone().float() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Moves the averages towards the weights after `step` optimizer steps were made."""
        decay = min(self.decay, (1 + step) / (10 + step))
        weights = [p.detach() for p in model.parameters()]
        torch._foreach_lerp_(list(self.shadow.values()), weights, 1 - decay)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by parameter name."""
        return dict(self.shadow)

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores what `state_dict` gave; names must match exactly."""
        assert state.keys() == self.shadow.keys(), "EMA state of another model"
        for name, value in state.items():
            self.shadow[name].copy_(value)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The model holds the averages inside, and its own weights again afterwards."""
        own = {name: p.detach().clone() for name, p in model.named_parameters()}
        self._copy_into(model, self.shadow)
        try:
            yield
        finally:
            self._copy_into(model, own)

    @torch.no_grad()
    def _copy_into(self, model: nn.Module, values: dict[str, Tensor]) -> None:
        for name, parameter in model.named_parameters():
            parameter.copy_(values[name])
