"""What is particular to training a VAE: its objective, its adversary, its crops. Loads no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ldm.config.fields import Count, Fraction, NotNegative, Number, Positive, Section, Whole
from ldm.config.optim import OptimConfig


class VaeLossConfig(Section):
    """What the VAE minimises: reconstruction + perceptual + kl_weight * KL, per pixel value."""

    reconstruction: Literal["l1", "l2", "l1+l2"] = "l1"
    """Distance between picture and reconstruction; the sum keeps small objects from being ignored
    early and edges sharp late."""
    kl_weight: Annotated[Number, Field(ge=0)] = 1e-6
    """Weight of the KL divergence, summed over the latent and divided by the pixel values."""
    perceptual: Literal["none", "lpips", "lpips_alex", "gradients", "clip"] = "none"
    """Perceptual distance: LPIPS on VGG16 or AlexNet (ImageNet weights are needed), image gradients
    at several scales (no weights), or features of your own CLIP's vision tower."""
    perceptual_weight: NotNegative = 1.0
    """Weight of the perceptual distance against the reconstruction."""
    perceptual_path: Annotated[str, Field(min_length=1)] | None = None
    """Its weights: a file or directory for lpips (null: torch's cache), a run of `ldm train-clip`
    for clip."""
    learn_logvar: bool = False
    """Learn the log-variance s of the reconstruction: distances count as d / exp(s) + s."""


class GanOptimConfig(OptimConfig):
    """AdamW of the discriminator; its schedule begins where its training begins."""

    learning_rate: Positive = 1e-4
    """Peak rate, after warm-up."""
    warmup_steps: Whole = 0
    """Steps of linear warm-up; 0 disables it."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the decay from the peak to `final_fraction` of it at the last step."""
    beta1: Annotated[Number, Field(ge=0, lt=1)] = 0.5
    """Decay of the first moment; a moving opponent wants a short memory."""
    beta2: Annotated[Number, Field(ge=0, lt=1)] = 0.9
    """Decay of the second moment."""
    weight_decay: Annotated[Number, Field(ge=0)] = 0.0
    """Decoupled decay; never applied to biases and norms."""


class GanConfig(Section):
    """A PatchGAN that learns to tell reconstructions from pictures, against blur."""

    loss: Literal["none", "hinge", "vanilla", "non_saturating"] = "none"
    """none trains no discriminator; vanilla is the minimax game."""
    weight: NotNegative = 0.5
    """Weight of the adversarial term, times the adaptive weight."""
    adaptive: bool = True
    """Scale the term so that at the decoder's last layer its gradient is as long as that of the
    reconstruction (VQGAN, eq. 7)."""
    max_adaptive_weight: Positive = 1e4
    """Largest adaptive weight."""
    start_step: Whole = 1_000
    """Optimizer step at which the term begins to count."""
    discriminator_first_steps: Whole = 500
    """Steps that the discriminator trains before then."""
    ramp_steps: Whole = 500
    """Steps over which the term grows to its weight; 0 is at once."""
    r1_weight: NotNegative = 0.0
    """Gamma of the R1 penalty gamma/2 |grad D(x)|^2 at real pictures; 0 is off."""
    r1_every: Count = 16
    """Steps between R1 penalties, each counted as many times."""
    width: Count = 64
    """Channels after the discriminator's first convolution."""
    layers: Count = 3
    """Its halvings; 3 sees patches of 70 x 70 pixels and needs pictures of 24 or more."""
    norm: Literal["group", "none"] = "group"
    """Its norm; none with R1, as is usual there."""
    optim: GanOptimConfig = GanOptimConfig()
    """Its optimizer."""


class EquivarianceConfig(Section):
    """Turned and shrunken latents must decode to turned and shrunken pictures (EQ-VAE)."""

    weight: NotNegative = 0.0
    """Weight of the reconstruction from changed latents; 0 is off."""
    probability: Fraction = 0.5
    """Share of the samples whose latents are changed as well."""
    min_scale: Annotated[Number, Field(gt=0, le=1)] = 0.25
    """Smallest side of a changed latent, as a share of its own; 1 changes no size."""
    rotate: bool = True
    """Turn by multiples of 90 degrees too."""


class DetailCropConfig(Section):
    """Train on small detailed crops first: convolutions learn as much from them, for less."""

    side_px: Count | None = None
    """Side of the crops; null trains on whole pictures throughout."""
    until: Fraction = 0.75
    """Share of the steps made on crops; the rest sees whole pictures, whose statistics differ."""
    candidates: Count = 4
    """Random crops per picture, of which the one with the largest variance is taken."""
