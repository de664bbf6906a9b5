"""The kernels that all processes of a run compute with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ldm.models.backends import Backends, choose

if TYPE_CHECKING:
    from ldm.training.session import Session


def choose_backends(session: Session, cpu_kernels: str) -> Backends:
    """What `train.attention` and `cpu_kernels` come to: tuned where every rank has tuned ones."""
    attention = session.config.train.attention
    chosen = choose(attention, cpu_kernels, session.device)
    return Backends(attention) if session.any_rank(chosen.cpu == "plain") else chosen
