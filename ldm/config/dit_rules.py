"""The rules between the fields of a diffusion transformer and its experiment. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterator

from ldm.config.dit import DitConfig
from ldm.config.schema import DiffusionExperiment

Conflict = tuple[str, str, str]


def dit_conflicts(config: DiffusionExperiment, model: DitConfig) -> Iterator[Conflict]:
    """Every rule of a DiT that is broken, as (key, what, fix)."""
    if model.positions == "learned" and model.base_size is None:
        yield (
            "model.base_size",
            "learned positions are a table, whose side must be known",
            "set it to latent side / model.patch_size",
        )
    if model.rope_scaling != "none" and (model.positions != "rope" or model.base_size is None):
        yield (
            "model.rope_scaling",
            f"{model.rope_scaling} concerns rotary positions beyond model.base_size",
            "model.positions=rope with a model.base_size, or model.rope_scaling=none",
        )
    if model.local_conv and model.conditioning == "in_context":
        yield (
            "model.local_conv",
            "a convolution needs a grid of tokens, and in_context adds tokens to it",
            "model.local_conv=false",
        )
    if model.diffusers:
        yield from _diffusers_conflicts(config, model)
    yield from _masking_conflicts(model)


def _diffusers_conflicts(config: DiffusionExperiment, model: DitConfig) -> Iterator[Conflict]:
    wanted = "adaln_zero" if config.text.classes else "adaln_single"
    for key, value, used in (
        ("conditioning", model.conditioning, wanted),
        ("positions", model.positions, "sincos"),
        ("local_conv", model.local_conv, False),
        ("mlp_ratio", model.mlp_ratio, 4.0),
    ):
        if value != used:
            yield (
                f"model.{key}",
                f"no class of diffusers has {value} here (model.diffusers=true)",
                f"model.{key}={used}, or model.diffusers=false",
            )


def _masking_conflicts(model: DitConfig) -> Iterator[Conflict]:
    masking = model.masking
    if masking.kind == "none":
        return
    if not 0 < masking.share < 1:
        yield "model.masking.share", f"{masking.share} leaves all tokens or none", "use 0.5"
    if model.local_conv:
        yield (
            "model.masking.kind",
            "model.local_conv needs the whole grid of tokens",
            "model.local_conv=false, or model.masking.kind=none",
        )
    last = masking.last
    if masking.kind == "mask" and last is not None:
        yield "model.masking.last", "masked tokens never come back", "model.masking.last=null"
    if masking.kind == "route" and last is None:
        yield (
            "model.masking.last",
            "route needs the block after which tokens come back",
            f"model.masking.last={max(1, model.num_layers - 1)}",
        )
    end = model.num_layers if last is None else last
    if masking.first >= end or end > model.num_layers:
        yield (
            "model.masking.first",
            f"blocks {masking.first} to {end} are not among the {model.num_layers} of this model",
            f"use numbers from 0 to {model.num_layers}, first below last",
        )
