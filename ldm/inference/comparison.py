"""Our pipeline against diffusers' on the same noise, call by call: the proof of an export.

Both draw on the grid of the exported scheduler, so what is compared is the networks, the guidance,
the solver and the codec, and not two opinions about where steps should lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.schedule import CLEAN, Grid
from ldm.errors import ExitCode, LdmError, missing_package
from ldm.exchange.exportable import PIXART, SD3, told_tokens
from ldm.exchange.exporting import Exported
from ldm.exchange.schedulers import FLOW
from ldm.inference import guiding
from ldm.inference.pipeline import Pipeline
from ldm.inference.starting import initial_noise
from ldm.types import Level

TOLERANCE = 1e-4
"""Of values up to 1, and of larger ones in relation to the largest: float32 through ten steps."""
STEPS = 10
"""Divides 1000: diffusers' DDIM takes its steps from 1000 // steps."""


@dataclass(frozen=True)
class Agreement:
    """The largest differences between the two, per call and in the picture.

    Args:
        calls: (input, output) of each call of the denoiser, as `difference`.
        picture: of pixels from 0 to 1.
        clock_rounding: how far the clock that the scheduler tells lies from the level's own.
        values: largest value that a network returned, for scale.
    """

    calls: tuple[tuple[float, float], ...]
    picture: float
    clock_rounding: float
    values: float

    @property
    def holds(self) -> bool:
        """Whether everything agrees to TOLERANCE."""
        worst = [value for call in self.calls for value in call]
        return bool(self.calls) and max(*worst, self.picture) <= TOLERANCE

    def lines(self) -> list[str]:
        """The figures as text."""
        inputs, outputs = zip(*self.calls, strict=True)
        return [
            f"calls of the denoiser      {len(self.calls)}",
            f"largest difference, input  {max(inputs):.1e}",
            f"largest difference, output {max(outputs):.1e}   (values up to {self.values:.3g})",
            f"largest difference, pixels {self.picture:.1e}   (pixels from 0 to 1)",
            f"rounding of the clock      {self.clock_rounding:.2g}   (of 1000; told to both)",
            f"{'agrees' if self.holds else 'DIFFERS'} to {TOLERANCE:g}",
        ]


def compared(
    folder: Path, pipeline: Pipeline, exported: Exported, prompt: str, *, seed: int = 0
) -> Agreement:
    """Draws one picture with both and compares every call.

    Args:
        folder: what `write_diffusers` wrote.
        pipeline: ours.
        exported: what it said.
        prompt: what to draw; short enough for the encoder.
        seed: of the noise.

    Raises:
        LdmError: code CONFIG, when diffusers cannot open the directory.
    """
    theirs = opened(folder)
    cfg = float(pipeline.contract.sampling["cfg_scale"] or 1.0)
    (request,) = pipeline.requests(
        prompt,
        seed=seed,
        steps=STEPS,
        sampler=exported.scheduler.sampler,
        guidance="classifier_free",
        interval=(0.0, 1.0),
        eta=0.0,
        cfg_scale=max(1.0, cfg),
        rescale=0.0,
        threshold=0.0,
    )
    noise = initial_noise(pipeline, [request])
    said = _Calls(_denoiser(theirs))
    tokens = {SD3: told_tokens(pipeline.contract.text_settings)}
    tokens[PIXART] = pipeline.contract.max_tokens
    limit = tokens.get(exported.pipeline)
    pixels = _draw_theirs(theirs, limit, request, noise)
    grid, rounding = _grid_of(theirs.scheduler, pipeline)
    told = _Calls(pipeline.net)
    mine = _draw_ours(pipeline, exported, request, noise, grid)
    for calls in (said, told):
        calls.hook.remove()
    pairs = zip(told.seen, said.seen, strict=True)
    return Agreement(
        tuple((difference(a, c), difference(b[:, : d.shape[1]], d)) for (a, b), (c, d) in pairs),
        float((mine - pixels).abs().max()),
        rounding,
        max(float(output.abs().max()) for _, output in said.seen),
    )


def difference(one: Tensor, other: Tensor) -> float:
    """The largest difference of two tensors, over the largest value where that is beyond 1."""
    return float((one - other).abs().max() / other.abs().max().clamp(min=1.0))


def opened(folder: Path) -> Any:
    """The pipeline of diffusers in a directory, on the CPU in float32, from local files only.

    Raises:
        LdmError: code CONFIG, with what diffusers says.
    """
    try:
        from diffusers import DiffusionPipeline
    except ImportError:
        raise missing_package("diffusers", "diffusers", "a comparison with it") from None
    try:
        pipe = DiffusionPipeline.from_pretrained(
            str(folder), local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise LdmError(
            f"diffusers does not open what was written ({type(error).__name__}: {error})",
            where=str(folder),
            fix="please report it; nothing was written",
            code=ExitCode.BUG,
        ) from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


class _Calls:
    """What a network was given and what it returned, float32 on the CPU."""

    def __init__(self, net: Any) -> None:
        self.seen: list[tuple[Tensor, Tensor]] = []
        self.hook = net.register_forward_hook(self._note, with_kwargs=True)

    def _note(self, net: Any, args: Any, kwargs: Any, output: Any) -> None:
        given = args[0] if args else kwargs["hidden_states"]
        said = output if isinstance(output, Tensor) else output[0]
        self.seen.append((given.detach().cpu().float(), said.detach().cpu().float()))


def _denoiser(theirs: Any) -> Any:
    return theirs.unet if hasattr(theirs, "unet") else theirs.transformer


@torch.no_grad()
def _draw_theirs(theirs: Any, tokens: int | None, request: Any, noise: Tensor) -> Tensor:
    options: dict[str, Any] = {}
    if type(theirs).__name__ == PIXART:
        options = {"use_resolution_binning": False, "clean_caption": False}
    if tokens is not None:
        options["max_sequence_length"] = tokens
    pictures: Tensor = theirs(
        request.prompt,
        num_inference_steps=request.steps,
        guidance_scale=request.cfg_scale,
        height=request.height,
        width=request.width,
        latents=noise.clone(),
        output_type="pt",
        **options,
    ).images
    return pictures.cpu().float()


@torch.inference_mode()
def _draw_ours(
    pipeline: Pipeline, exported: Exported, request: Any, noise: Tensor, grid: Grid
) -> Tensor:
    denoise = guiding.guided_denoise(pipeline, [request], grid)
    x = SAMPLERS[exported.scheduler.sampler].run(denoise, noise.to(pipeline.device), grid, eta=0.0)
    pixels = pipeline.vae.decode(x.to(next(pipeline.vae.parameters()).dtype)).float().cpu()
    return (pixels / 2 + 0.5).clamp(0, 1)


def _grid_of(scheduler: Any, pipeline: Pipeline) -> tuple[Grid, float]:
    """The levels that a scheduler has set, told as it tells them, and how far it rounds."""
    process = pipeline.diffusion.process
    scale, offset = process.clock
    levels, rounding = [], 0.0
    sigmas: Sequence[Any] = getattr(scheduler, "sigmas", ())
    for step, clock in enumerate(scheduler.timesteps.tolist()):
        t = (clock - offset) / scale
        if process.name == FLOW:
            sigma = float(sigmas[step])
            levels.append(Level(t, 1 - sigma, sigma))
            rounding = max(rounding, abs(scale * sigma + offset - clock))
        else:
            levels.append(process.level(t))
    return Grid(process, (*levels, CLEAN)), rounding
