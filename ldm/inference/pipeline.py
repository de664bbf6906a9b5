"""From a run or a published model and a prompt to pictures. Knows nothing of training.

Every picture has its own seed and its own noise, drawn on the CPU, so picture k of a batch is the
picture that its seed gives alone, on any device.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ldm.checkpoint import Contract
from ldm.diffusion.core import Diffusion
from ldm.diffusion.guidance import LogProb
from ldm.diffusion.prediction import PREDICTIONS
from ldm.diffusion.process import PROCESSES
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.schedule import levels
from ldm.errors import ExitCode, LdmError, named
from ldm.exchange.opening import Options
from ldm.inference import guiding
from ldm.inference.adapters import Merged, check_adapters, merge_files
from ldm.inference.images import Pictures, Request
from ldm.inference.loading import load_model, usable_device
from ldm.inference.network import Network
from ldm.inference.settings import check_solver, converted, sides, texts, whole
from ldm.inference.starting import (
    check_sources,
    check_start,
    initial_noise,
    initial_state,
    step_noise,
)
from ldm.models import tiling
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.backends import Backends, choose
from ldm.models.text import FrozenTextEncoder
from ldm.types import TextEmbedding

SETTINGS = (
    *("steps", "sampler", "spacing", "shift", "eta"),
    *("guidance", "cfg_scale", "rescale", "interval", "threshold", "threshold_limit"),
    *("apg_eta", "apg_norm", "apg_momentum", "weighting"),
)
MAX_SIDE, MAX_PICTURES = 4096, 100_000

log = logging.getLogger(__name__)


class Pipeline:
    """A trained model, ready to draw.

    Args:
        vae: decodes latents.
        encoder: embeds prompts.
        net: the denoiser.
        null: embedding of the empty prompt, (1, L, D), as used in training.
        contract: what the weights mean.
        name: where the model came from, for metadata.
        identity: hash of the checkpoint, for metadata.
        guide: a weaker model of the same latents; with it, autoguidance is the default.
        log_prob: a classifier of noisy latents; with it, its guidance is the default.
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        encoder: FrozenTextEncoder,
        net: nn.Module,
        null: TextEmbedding,
        contract: Contract,
        name: str = "",
        identity: str = "",
        *,
        guide: Pipeline | None = None,
        log_prob: LogProb | None = None,
    ) -> None:
        self.vae, self.encoder, self.net, self.null = vae, encoder, net, null
        self.contract, self.name, self.identity = contract, name, identity
        self.guide, self.log_prob = guide, log_prob
        self._warned: set[tuple[int, int]] = set()  # sizes whose warning was given
        self.backends, self.lora = Backends(), Merged()
        self.vae_tile_px: int | None = None  # strip_px of `tiling.decode`: memory, not the pictures
        self.fitting_guide: Pipeline | None = None  # the one whose VAE was compared with ours
        self.diffusion = Diffusion(
            named("process", PROCESSES, contract.process),
            named("prediction", PREDICTIONS, contract.prediction),
            contract.data_std,
            contract.learned_variance,
        )

    @classmethod
    def from_pretrained(
        cls,
        path: Path | str,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        options: Options = Options(),  # noqa: B008, frozen
        lora: Sequence[str] = (),
        attention: str = "auto",
        cpu_kernels: str = "auto",
    ) -> Pipeline:
        """Loads a run or a published model.

        Args:
            path: run directory, a step directory inside one, a diffusers directory, a Hub id, or a
                single safetensors file of the original layout.
            device: where to draw; None takes a GPU when there is one.
            dtype: of the weights; the state of the sampler is always float32.
            options: what a published model leaves open.
            lora: adapters to merge into the denoiser, each PATH or PATH=STRENGTH.
            attention: kernel of the denoiser's attention: auto, sdpa, xformers or flex.
            cpu_kernels: on a CPU: auto takes faster kernels of equal precision where a probe finds
                them, plain is torch's own way.

        Raises:
            LdmError: see `load_model`; or a kernel that cannot be used.
        """
        device = usable_device(device)
        backends = choose(attention, cpu_kernels, device)
        parts = load_model(path, options)
        merged = merge_files(parts.net, lora)
        vae = parts.vae.to(device, dtype)
        pipeline = cls(
            Backends(cpu=backends.cpu).install(vae),
            parts.encoder.to(device),
            backends.install(parts.net.to(device, dtype)),
            parts.null.to(device),
            parts.contract,
            parts.name,
            parts.identity,
        )
        pipeline.backends, pipeline.lora = backends, merged
        return pipeline

    @property
    def device(self) -> torch.device:
        """Where the denoiser lives."""
        return next(self.net.parameters()).device

    @property
    def stride(self) -> int:
        """Picture sides must be multiples of this."""
        config: Any = self.net.config
        patch = getattr(config, "patch_size", None)
        if patch is None:
            patch = 2 ** (len(config.block_out_channels) - 1)
        return int(self.vae.downsample_factor * patch)

    def to(self, device: torch.device | str) -> Pipeline:
        """Moves the model; returns itself."""
        for part in (self.vae, self.encoder, self.net):
            part.to(device)
        self.null = self.null.to(device)
        return self

    def guided_by(
        self, *, guide: Pipeline | None = None, log_prob: LogProb | None = None
    ) -> Pipeline:
        """This model, sharing its weights, with a weaker model or a classifier to guide it.

        Raises:
            LdmError: one of them is of another kind.
        """
        if guide is not None and not isinstance(guide, Pipeline):
            raise LdmError(
                f"guide={guide!r} is no loaded model",
                where="guide",
                fix="give guide=Pipeline.from_pretrained(RUN)",
            )
        if log_prob is not None and not callable(log_prob):
            raise LdmError(
                f"log_prob={log_prob!r} cannot be called",
                where="log_prob",
                fix="give a function (x_t, level) -> log p(c | x_t)",
            )
        other = copy(self)
        other.guide, other.log_prob = guide, log_prob
        return other

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative: str | None = None,
        n: int = 1,
        seed: int = 0,
        size: int | tuple[int, int] | None = None,
        batch_size: int = 16,
        progress: Callable[[int], None] | None = None,
        guide: Pipeline | None = None,
        log_prob: LogProb | None = None,
        **settings: Any,
    ) -> Pictures:
        """Draws `n` pictures of every prompt.

        Args:
            prompt: one prompt, or several.
            negative: what to steer away from instead of the empty prompt.
            n: pictures per prompt.
            seed: the k-th picture of the call has seed + k.
            size: side, or (height, width), in pixels; None is the size of training.
            batch_size: pictures drawn at once; changes memory and speed, not the pictures.
            progress: called with the number of pictures finished so far.
            guide: a weaker model of the same latents, for guidance="autoguidance".
            log_prob: (x_t (B, C, h, w), level) -> log p(c | x_t), (B,), of a classifier that knows
                noise, for guidance="classifier"; see `classifier_gradient`.
            settings: of SETTINGS; what is not given comes from the checkpoint.

        Raises:
            LdmError: for a request that the model cannot serve; says what it can.
        """
        pipeline, rule = self, settings.get("guidance")
        if guide is not None or log_prob is not None:
            guiding.refuse_unused(rule, guide=guide is not None, log_prob=log_prob is not None)
            pipeline = self.guided_by(guide=guide, log_prob=log_prob)
        asked = {"negative": negative, "n": n, "seed": seed, "size": size, **settings}
        requests = pipeline.requests(prompt, **asked)
        return pipeline.draw(requests, batch_size=batch_size, progress=progress)

    def translate(
        self,
        pictures: Image.Image | Sequence[Image.Image],
        prompt: str | Sequence[str],
        **settings: Any,
    ) -> Pictures:
        """Pictures made from pictures; see `ldm.inference.translation.translate`."""
        from ldm.inference.translation import translate

        return translate(self, pictures, prompt, **settings)

    def requests(
        self,
        prompt: str | Sequence[str],
        *,
        negative: str | None = None,
        n: int = 1,
        seed: int = 0,
        size: int | tuple[int, int] | None = None,
        **settings: Any,
    ) -> list[Request]:
        """What `__call__` would draw, one request per picture; arguments as there."""
        prompts, n, seed = texts("prompt", prompt), whole("n", n), whole("seed", seed)
        if not 1 <= n * len(prompts) <= MAX_PICTURES:
            raise LdmError(
                f"{len(prompts)} prompts x n={n} pictures cannot be drawn",
                where="n",
                fix=f"ask for 1 to {MAX_PICTURES} pictures",
            )
        if unknown := settings.keys() - SETTINGS:
            raise LdmError(
                f"unknown setting {', '.join(sorted(unknown))}",
                where="settings",
                fix=f"known: {', '.join(SETTINGS)}",
            )
        named_rule = {} if "guidance" in settings else guiding.own_rule(self)
        asked = {**self.defaults(), **named_rule, **settings}
        asked |= guiding.recorded(self, asked.get("guidance", ""))
        asked |= {"lora": self.lora.identity, "lora_path": self.lora.given}
        asked = converted({"negative": negative, **asked})
        asked.setdefault("eta", named("sampler", SAMPLERS, asked["sampler"]).eta)
        height, width = self.trained_size if size is None else sides(size)
        return [
            Request(
                prompt=text,
                seed=seed + row * n + k,
                height=height,
                width=width,
                **asked,
            )
            for row, text in enumerate(prompts)
            for k in range(n)
        ]

    @property
    def trained_size(self) -> tuple[int, int]:
        """Height and width of the training pictures."""
        return self.contract.image_sizes[0]

    def defaults(self) -> dict[str, Any]:
        """Sampling settings stored in the checkpoint."""
        stored: dict[str, Any] = dict(self.contract.sampling)
        stored["interval"] = tuple(stored["interval"])
        return stored

    @torch.inference_mode()
    def draw(
        self,
        requests: Sequence[Request],
        *,
        batch_size: int = 16,
        progress: Callable[[int], None] | None = None,
        sources: Tensor | None = None,
    ) -> Pictures:
        """Draws one picture per request, those with equal settings together.

        `sources` are latents (B, C, h, w) to start from, for requests that name a source.
        """
        if batch_size < 1:
            raise LdmError(f"a batch of {batch_size} is empty", where="batch_size", fix="use 16")
        for request in dict.fromkeys(requests):
            self.check(request)
        check_sources(requests, sources)
        images: dict[int, Image.Image] = {}
        for rows in _batches(requests, batch_size):
            x1 = None if sources is None else sources[rows]
            with self.backends.keeping_memory():
                pixels = self._draw_batch([requests[row] for row in rows], x1)
            images.update(zip(rows, to_images(pixels), strict=True))
            if progress is not None:
                progress(len(images))
        ordered = tuple(images[row] for row in range(len(requests)))
        return Pictures(ordered, tuple(requests), self.identity, self.name)

    def check(self, request: Request) -> None:
        """Refuses what the model cannot draw.

        Raises:
            LdmError: names the setting, its value, and a legal one.
        """
        stride = self.stride
        for side in (request.height, request.width):
            if side < stride or side % stride or side > MAX_SIDE:
                low = min(max(side // stride, 1) * stride, MAX_SIDE)
                raise LdmError(
                    f"a side of {side} pixels cannot be made: sides are multiples of {stride} "
                    f"up to {MAX_SIDE}",
                    where="size",
                    fix=f"use {low} or {low + stride}",
                )
        size = (request.height, request.width)
        if size != self.trained_size and size not in self._warned:
            self._warned.add(size)
            log.warning(
                "size: the model was trained at %dx%d; %dx%d may look poor",
                *self.trained_size,
                request.height,
                request.width,
            )
        check_solver(self.contract, request)
        check_start(self, request)
        check_adapters(self, request)
        guiding.check_guidance(self, request)

    def _draw_batch(self, requests: Sequence[Request], x1: Tensor | None = None) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] of requests with equal settings, from given x1."""
        x1 = initial_noise(self, requests) if x1 is None else x1
        x = self.latents(requests, x1)
        x = x.to(next(self.vae.parameters()).dtype)
        pixels = tiling.decode(self.vae, x, self.vae_tile_px).float()
        if not torch.isfinite(pixels).all():
            raise LdmError(
                "the model produced values that are not finite",
                where=f"seed {requests[0].seed}",
                fix="use fewer extremes (lower cfg), or float32 weights",
                code=ExitCode.NUMERICS,
            )
        return pixels

    @torch.inference_mode()
    def latents(self, requests: Sequence[Request], x1: Tensor) -> Tensor:
        """Latents at t = 0 of requests with equal settings, from those at t = 1, (B, C, h, w)."""
        first = requests[0]
        sampler = SAMPLERS[first.sampler]
        plan = levels(self.diffusion.process, first.steps, spacing=first.spacing, shift=first.shift)
        denoise = guiding.guided_denoise(
            self, requests, plan, with_variance=sampler.learned_variance
        )
        x = initial_state(x1, plan, first).to(self.device)
        return sampler.run(denoise, x, plan, noise=step_noise(self, requests), eta=first.eta)

    @property
    def network(self) -> Network:
        """The denoiser as guidance asks it, in whatever precision its weights are."""
        return Network(self.net)


def to_images(pixels: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [-1, 1] to RGB pictures; values outside are clipped."""
    bytes_ = pixels.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    return [Image.fromarray(one) for one in bytes_.permute(0, 2, 3, 1).cpu().numpy()]


def _batches(requests: Sequence[Request], size: int) -> Iterable[list[int]]:
    groups: dict[tuple[object, ...], list[int]] = {}
    for row, request in enumerate(requests):
        groups.setdefault(request.settings(), []).append(row)
    for rows in groups.values():
        # an adaptive sampler's steps follow from all rows, so a picture is drawn alone
        most = 1 if SAMPLERS[requests[rows[0]].sampler].adaptive else size
        for begin in range(0, len(rows), most):
            yield rows[begin : begin + most]
