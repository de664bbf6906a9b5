"""AdamW and its schedule. Loads no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ldm.config.fields import Fraction, Number, Positive, Section, Whole


class OptimConfig(Section):
    """AdamW and its schedule, a function of the optimizer step."""

    learning_rate: Positive = 1e-4
    """Peak rate, after warm-up."""
    warmup_steps: Whole = 100
    """Steps of linear warm-up; 0 disables it."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Shape of the decay from the peak to `final_fraction` of it at the last step."""
    final_fraction: Fraction = 0.0
    """Rate at the last step over the peak rate."""
    beta1: Annotated[Number, Field(ge=0, lt=1)] = 0.9
    """Decay of the first moment."""
    beta2: Annotated[Number, Field(ge=0, lt=1)] = 0.99
    """Decay of the second moment."""
    weight_decay: Annotated[Number, Field(ge=0)] = 0.01
    """Decoupled decay; never applied to biases, norms and embeddings."""
    clip_norm: Positive = 1.0
    """Global gradient norm above which gradients are scaled down."""
