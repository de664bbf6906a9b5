"""Rows of whole sampling calls: prompt embeddings in, pictures out, 20 steps with guidance."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.measure import Budget, Row, assert_equal, in_turns
from benchmarks.pairs import TOKENS, Pair, dit_pair, unet_pair, vae_pair
from ldm.checkpoint import Contract
from ldm.config.schema import SampleConfig
from ldm.inference.pipeline import Pipeline
from ldm.inference.starting import initial_noise
from ldm.models.backends import choose
from ldm.types import TextEmbedding

SCALE, STEPS = 7.5, 20
TABLE: dict[str, Any] = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "timestep_spacing": "trailing",
    "clip_sample": False,
    "set_alpha_to_one": True,
    "steps_offset": 1,
}


class Case(NamedTuple):
    """A row: what is drawn, in which precision, and the goal."""

    name: str
    pair: Callable[[], Pair]
    side: int
    dtype: torch.dtype
    goal: float


CASES = (
    Case("sampling tiny unet", lambda: unet_pair((32, 64, 128, 128), 64), 8, torch.float32, 1.4),
    Case("sampling unet 35M fp32", unet_pair, 16, torch.float32, 1.15),
    Case("sampling unet 35M bf16", unet_pair, 16, torch.bfloat16, 1.5),
    Case("sampling dit 30M bf16", dit_pair, 16, torch.bfloat16, 1.2),
)
SMOKE_CASES = (
    Case("sampling tiny unet", lambda: unet_pair((16, 32, 32, 32), 32), 8, torch.float32, 1.4),
    Case("sampling dit 30M bf16", lambda: dit_pair(2, 1, 32), 8, torch.bfloat16, 1.2),
)


class Prompts(nn.Module):
    """Stands for a text encoder: the same embedding for every prompt, as the peer is given one."""

    def __init__(self, text: TextEmbedding) -> None:
        super().__init__()
        self.text = text

    def forward(self, prompts: list[str], **_: Any) -> TextEmbedding:
        """The embedding, one row for each prompt."""
        return self.text[torch.zeros(len(prompts), dtype=torch.long)]


def sampling(budget: Budget) -> Iterator[Row]:
    """Whole calls against diffusers' pipelines with DDIM, and each side's defaults."""
    for case in SMOKE_CASES if budget.is_smoke else CASES:
        steps = 2 if budget.is_smoke else STEPS
        pair = case.pair()
        ours, theirs = _both(case, pair, steps)
        small = case.dtype == torch.float32
        if small:  # in bf16 two equal networks part ways over the steps; see the forward rows
            limit = 2e-2
            assert_equal(_picture(ours()), _picture(theirs()), limit, case.name)
        times = in_turns({"diffusers pipeline": theirs, "ours": ours}, budget)
        shape = f"{case.side}x{case.side} B1, {steps} steps, CFG {SCALE}"
        yield times.row(case.name, "ours", "diffusers pipeline", case.goal, shape=shape)
    pair = SMOKE_CASES[0].pair() if budget.is_smoke else unet_pair()
    case = Case("", lambda: pair, 8 if budget.is_smoke else 16, torch.float32, 2.0)
    ours, theirs = _both(case, pair, None)
    times = in_turns({"diffusers pipeline": theirs, "ours": ours}, budget)
    yield times.row(
        "sampling with defaults, unet 35M",
        "ours",
        "diffusers pipeline",
        case.goal,
        shape=f"{case.side}x{case.side} B1, CFG",
        note="ours dpmpp_2m in 20 steps, theirs PNDM in 50: not the same work",
    )


def _picture(images: Any) -> Tensor:
    import numpy as np

    return torch.from_numpy(np.asarray(images[0], dtype=np.float32))


Draw = Callable[[], Any]


def _both(case: Case, pair: Pair, steps: int | None) -> tuple[Draw, Draw]:
    """One call of each side that draws one picture; `steps` None takes each side's defaults."""
    text = pair.inputs(1, case.side)[2]
    null = TextEmbedding(torch.zeros_like(text.tokens), text.mask)
    vae, peer_vae = vae_pair((32, 64, 128, 128) if case.side > 8 else (8, 16, 16, 16))
    pipeline = _ours(case, pair, vae, Prompts(text), null)
    asked: dict[str, Any] = {"cfg_scale": SCALE, "size": case.side * vae.downsample_factor}
    if steps is not None:
        asked |= {"steps": steps, "sampler": "ddim", "spacing": "trailing"}
    requests = pipeline.requests("a picture", **asked)

    def ours() -> Any:
        return pipeline.draw(requests)

    peer = _peer(pair, peer_vae, case.dtype, defaults=steps is None)
    given = {
        "prompt_embeds": text.tokens.to(case.dtype),
        "negative_prompt_embeds": null.tokens.to(case.dtype),
        "latents": initial_noise(pipeline, requests).to(case.dtype),
        "num_inference_steps": 50 if steps is None else steps,
        "guidance_scale": SCALE,
        "height": case.side * vae.downsample_factor,
        "width": case.side * vae.downsample_factor,
    }
    if pair.name == "dit":
        given |= {
            "prompt_attention_mask": text.mask.to(case.dtype),
            "negative_prompt_attention_mask": text.mask.to(case.dtype),
            "negative_prompt": None,
            "use_resolution_binning": False,
        }

    def theirs() -> Any:
        return peer(**given).images

    return ours, theirs


def _ours(case: Case, pair: Pair, vae: Any, encoder: Prompts, null: TextEmbedding) -> Pipeline:
    backends = choose()
    side = case.side * vae.downsample_factor
    contract = Contract(
        process="sd",
        prediction="eps",
        data_std=None,
        clock="999 * t",
        latent_channels=4,
        latent_mean=(0.0,) * 4,
        latent_std=(1.0,) * 4,
        downsample_factor=vae.downsample_factor,
        null_embedding="",
        null_embedding_sha256="",
        caption_dropout=0.1,
        text_encoder="",
        text_encoder_sha256="",
        tokenizer_sha256="",
        max_tokens=TOKENS,
        mask_rule="",
        image_sizes=((side, side),),
        sampling={**SampleConfig().model_dump(mode="json"), "shift": 1.0},
    )
    parts: Any = (
        backends.install(deepcopy(vae).to(case.dtype)),
        encoder,
        backends.install(deepcopy(pair.ours).to(case.dtype)),
        null,
        contract,
    )
    pipeline = Pipeline(*parts)
    pipeline.backends = backends
    return pipeline


def _peer(pair: Pair, vae: nn.Module, dtype: torch.dtype, *, defaults: bool) -> Any:
    import diffusers

    net = deepcopy(pair.peer).to(dtype)
    scheduler = diffusers.DDIMScheduler(**TABLE)
    if defaults:
        shared = {name: TABLE[name] for name in ("beta_schedule", "beta_start", "beta_end")}
        scheduler = diffusers.PNDMScheduler(**shared, skip_prk_steps=True, steps_offset=1)
    vae = vae.to(dtype)
    if pair.name == "dit":
        pipe = diffusers.PixArtAlphaPipeline(
            tokenizer=None, text_encoder=None, vae=vae, transformer=net, scheduler=scheduler
        )
    else:
        pipe = diffusers.StableDiffusionPipeline(
            vae=vae,
            text_encoder=None,
            tokenizer=None,
            unet=net,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def samplers(budget: Budget) -> Iterator[Row]:
    """Arithmetic of samplers for a free denoiser; `benchmarks/samplers.py` has all of them."""
    import warnings

    from benchmarks.samplers import GOAL_US, measure

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        measure("ddim")  # the first call of everything is not a figure
        rows = [measure(name) for name in ("ddim", "dpmpp_2m")]
    for row in rows:
        shared = {"shape": "1x4x64x64, 50 steps", "ours_ms": row["us"] / 1e3}
        yield Row(
            f"sampler step {row['name']}",
            row["peer"],
            row["ratio"],
            2.5,
            peer_ms=row["peer_us"] / 1e3,
            **shared,
        )
        yield Row(
            f"sampler time per step {row['name']}",
            f"limit {GOAL_US:.0f} us",
            GOAL_US / row["us"],
            1.0,
            note="limit over measured",
            **shared,
        )
