"""Trains a small CLIP on the captions and pictures at hand, for people without a network.

What is kept is the text tower and its tokenizer, in the very layout of a published CLIP, and the
vision tower, whose features can serve as a perceptual loss.

B pairs of a batch, N pairs, L tokens, P width of the shared space.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ldm.config.schema import OptimConfig
from ldm.errors import ExitCode, LdmError
from ldm.models.text import HuggingFaceTextEncoder, clip_text_config, train_bpe
from ldm.randomness import generator, permutation, positions
from ldm.training.clip_loss import (
    contrastive_loss,
    listing_loss,
    recall_loss,
    word_agreement,
)
from ldm.training.optim import learning_rate, parameter_groups
from ldm.training.session import resolve_precision
from ldm.types import Source

RECALLED = 8
"""Tokens that the state of a token must tell: its own and those before it. Eight reach from the
second object of a caption back to its relation to the first; otherwise order comes late."""

WORD_BATCH = 64
"""Captions per step of `_learn_words`."""
WORD_STD = 0.5
"""Standard deviation of fresh word embeddings. At CLIP's own 0.02 a minute of training moves only
the words that contrast needs at once, and the others stay nearly equal."""

Progress = Callable[[int, float], None]
"""Called with (steps done, loss) every `log_every_steps` steps and after the last one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipTraining:
    """Everything that decides the result of `train_clip`; equal values give equal weights."""

    steps: int = 120
    """Optimizer steps; 120 of 128 pairs take about a minute on two cores without bf16."""
    batch_size: int = 128
    """Pairs per step. More pairs are more negatives: a harder and better task."""
    learning_rate: float = 1e-3
    """Peak rate of AdamW, after the warm-up; then a cosine to zero."""
    warmup_steps: int = 20
    """Steps of linear warm-up; 0 disables it."""
    weight_decay: float = 0.05
    """Decoupled decay of matrices; never applied to biases, norms and embeddings."""
    clip_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down."""
    word_weight: float = 1.0
    """Weight of the word by word contrast (see `word_agreement`) beside the pooled one."""
    recall_weight: float = 1.0
    """Weight of telling a word and the ones before it from its state (see `recall_loss`)."""
    recall_steps: int = 300
    """Steps on captions alone before the contrast starts; they look at no picture."""
    width: int = 128
    """Width of both towers: the D that a denoiser sees. A multiple of 32."""
    layers: int = 2
    """Blocks of the text tower."""
    vision_layers: int = 2
    """Blocks of the vision tower."""
    image_px: int = 64
    """Pictures are cropped and scaled to squares of this size."""
    patch_px: int = 8
    """Side of a vision patch; divides `image_px`."""
    vocab_size: int = 1_000
    """Most entries of the vocabulary, of which 514 are bytes and control tokens."""
    max_tokens: int = 77
    """Longest prompt of the encoder, control tokens included; longer captions are cut."""
    max_pairs: int = 20_000
    """Pairs held in memory (12 KiB each at 64 px); of a larger source, a random part."""
    held_out_pairs: int = 256
    """Pairs kept aside to measure retrieval; at most a tenth of the data."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Autocast precision of both towers; auto takes bf16 where the processor multiplies in it.

    Elsewhere bf16 is emulated, six times slower than fp32. Weights and optimizer are fp32."""
    log_every_steps: int = 20
    """How often the loss is noted and progress reported."""
    seed: int = 0
    """Of the weights, the data order and the held-out pairs."""


@dataclass(frozen=True)
class Pairs:
    """Decoded data.

    Args:
        pixels: (N, 3, H, W) uint8.
        captions: N of them.
        set_aside: ids of the samples that could not be used.
    """

    pixels: Tensor
    captions: tuple[str, ...]
    set_aside: tuple[str, ...] = ()

    def __getitem__(self, rows: np.ndarray) -> Pairs:
        captions = tuple(self.captions[i] for i in rows)
        return Pairs(self.pixels[torch.from_numpy(rows)], captions, self.set_aside)


def train_clip(
    source: Source,
    config: ClipTraining,
    *,
    progress: Progress | None = None,
    device: torch.device | str = "cpu",
) -> tuple[HuggingFaceTextEncoder, dict[str, Any], nn.Module]:
    """Trains a text and a vision tower so that a picture and its caption agree.

    The same arguments give the same weights bit for bit on the same machine. The global random
    state is left alone.

    Source: Radford et al. 2021 (arXiv 2103.00020), figure 3 and section 2.4.

    Returns:
        The frozen text encoder on the CPU, and JSON metrics: `loss` (mean of the last noted ones),
        `losses` ((step, loss) pairs), `retrieval` (top-1 among the held-out pairs, picture to
        caption and caption to picture), `forgotten` (what states do not tell of their words, see
        `recall_loss` and `listing_loss`, nats), counts and `seconds`; the frozen vision tower on
        the CPU, a transformers CLIPVisionModel for pixels in [-1, 1].

    Raises:
        LdmError: BAD_DATA with too few usable pairs, CONFIG for an impossible shape, NUMERICS if
            the loss is not finite.
    """
    _check(config)
    precision = resolve_precision(config.precision, torch.device(device))
    config = replace(config, precision=precision)
    started = time.monotonic()
    pairs = load_pairs(source, config)
    shuffled = generator(config.seed, "clip held-out").permutation(len(pairs.captions))
    count = min(config.held_out_pairs, len(shuffled) // 10)
    held_out, train = pairs[shuffled[:count]], pairs[shuffled[count:]]
    tokenizer = train_bpe(
        train.captions, vocab_size=config.vocab_size, max_tokens=config.max_tokens
    )
    model = _build(tokenizer, config)
    encoder = HuggingFaceTextEncoder(model.text_model, tokenizer, too_long="truncate")
    ids, mask = encoder.tokenize(train.captions)
    _add_memory(model, ids, config)
    model.requires_grad_(True).to(device)  # the encoder froze the tower they share
    _learn_words(model, ids.to(device), mask.to(device), config)
    losses = _fit(
        model, train.pixels.to(device), (ids.to(device), mask.to(device)), config, progress
    )
    retrieval = _retrieval(model.eval(), held_out, encoder, device) if count else {}
    some = slice(0, WORD_BATCH)
    with torch.no_grad():
        read = model.eval().text_model(ids[some].to(device))
        forgotten = _forgotten(model, read, ids[some].to(device), mask[some].to(device)).item()
    metrics = {
        "loss": float(np.mean([loss for _, loss in losses[-5:]])),
        "losses": losses,
        "retrieval": retrieval,
        "forgotten": forgotten,
        "pairs": len(train.captions),
        "held_out_pairs": count,
        "set_aside": list(pairs.set_aside),
        "truncated_captions": encoder.truncated_prompts,
        "precision": config.precision,
        "vocabulary": len(tokenizer),
        "seconds": round(time.monotonic() - started, 2),
    }
    tower: nn.Module = model.vision_model.cpu().requires_grad_(False)
    return HuggingFaceTextEncoder(model.text_model.cpu(), tokenizer), metrics, tower


def load_pairs(source: Source, config: ClipTraining) -> Pairs:
    """Decodes at most `max_pairs` samples, drawn from all of them, into one uint8 array.

    Raises:
        LdmError: BAD_DATA if fewer than 2 remain once unusable samples are set aside.
    """
    from PIL import Image, ImageOps

    size = (config.image_px, config.image_px)
    pictures, captions, set_aside = [], [], []
    # of a larger source not the first ones: folders are often sorted by class
    rows = permutation(len(source), config.seed, 0)[: config.max_pairs]
    for index in sorted(rows.tolist()):
        try:
            example = source[index]
        except LdmError as error:
            if error.code != ExitCode.BAD_DATA:
                raise
            set_aside.append(source.ids[index])
            continue
        pixels = example.pixels
        if pixels.shape[:2] != size:
            image = ImageOps.fit(Image.fromarray(pixels), size, Image.Resampling.LANCZOS)
            pixels = np.asarray(image)
        pictures.append(pixels.transpose(2, 0, 1))
        captions.append(example.caption)
    if len(pictures) < 2:
        raise LdmError(
            f"{len(pictures)} usable captioned pictures, a contrast needs at least 2 "
            f"({len(set_aside)} could not be read)",
            where="data",
            fix="give more captioned pictures",
            code=ExitCode.BAD_DATA,
        )
    return Pairs(torch.from_numpy(np.stack(pictures)), tuple(captions), tuple(set_aside))


def _learn_words(model: Any, ids: Tensor, mask: Tensor, config: ClipTraining) -> None:
    """Trains the text tower to recall, at twice the rate: no picture has to be looked at."""
    rate = 2 * config.learning_rate
    rates = OptimConfig(learning_rate=rate, warmup_steps=config.warmup_steps)
    optimizer = torch.optim.AdamW(parameter_groups(model, config.weight_decay), fused=True)
    batch = min(WORD_BATCH, len(ids))
    for step in range(config.recall_steps):
        picked = positions(step * batch, batch, len(ids), config.seed)
        rows = torch.tensor([index for _, index in picked])
        longest = int(mask[rows].sum(1).max())
        with torch.autocast(ids.device.type, torch.bfloat16, config.precision == "bf16"):
            read = model.text_model(ids[rows, :longest])
            loss = _forgotten(model, read, ids[rows, :longest], mask[rows, :longest])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config.recall_steps, rates)
        optimizer.step()
    model.zero_grad(set_to_none=True)


def _forgotten(model: Any, read: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """What the states of captions (B, L) and their pooled states no longer tell of their words."""
    recalled = model.recall(read.last_hidden_state).unflatten(-1, (RECALLED, -1))
    listed, words = model.listed(read.pooler_output), model.word_of[ids]
    return recall_loss(recalled.float(), words, mask) + listing_loss(listed.float(), words, mask)


def _fit(
    model: Any,
    pixels: Tensor,
    tokens: tuple[Tensor, Tensor],
    config: ClipTraining,
    progress: Progress | None,
) -> list[tuple[int, float]]:
    ids, mask = tokens
    lengths = mask.sum(1)
    groups = parameter_groups(model, config.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
    rates = OptimConfig(learning_rate=config.learning_rate, warmup_steps=config.warmup_steps)
    batch = min(config.batch_size, len(pixels))
    losses = []
    for step in range(config.steps):
        picked = positions(step * batch, batch, len(pixels), config.seed)
        rows = torch.tensor([index for _, index in picked])
        longest = int(lengths[rows].max())
        loss = _loss(model, pixels[rows], ids[rows, :longest], mask[rows, :longest], config)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config.steps, rates)
        optimizer.step()
        with torch.no_grad():  # a temperature below 0.01 makes training unstable (section 2.5)
            model.logit_scale.clamp_(0.0, math.log(100.0))
        if (step + 1) % config.log_every_steps == 0 or step + 1 == config.steps:
            losses.append((step + 1, _finite(loss.item(), step + 1)))
            if progress is not None:
                progress(*losses[-1])
    return losses


def _loss(model: Any, pixels: Tensor, ids: Tensor, mask: Tensor, config: ClipTraining) -> Tensor:
    # no attention mask: the text tower is causal and padding comes last, so no real token sees it
    with torch.autocast(pixels.device.type, torch.bfloat16, config.precision == "bf16"):
        seen = model.vision_model(_to_float(pixels))
        read = model.text_model(ids)
        image = model.visual_projection(seen.pooler_output)
        text = model.text_projection(read.pooler_output)
        cells = model.visual_projection(_cells(seen.last_hidden_state[:, 1:]))
        words = model.text_projection(read.last_hidden_state[:, 1:])  # without the start token
        forgotten = _forgotten(model, read, ids, mask)
    scale = model.logit_scale.exp()
    same = (ids[:, None] == ids[None]).all(-1)
    whole = contrastive_loss(scale * _cosine(image.float(), text.float()), same)
    by_word = word_agreement(cells.float(), words.float(), mask[:, 1:])
    weight = config.word_weight
    contrast = (whole + weight * contrastive_loss(scale * by_word, same)) / (1 + weight)
    return contrast + config.recall_weight * forgotten


def _cells(patches: Tensor) -> Tensor:
    """Averages 2x2 patches if the grid is even, (B, N, D) -> (B, N / 4, D): 4 times cheaper."""
    side = math.isqrt(patches.shape[1])
    if side % 2:
        return patches
    grid = patches.unflatten(1, (side // 2, 2, side // 2, 2))
    return grid.mean((2, 4)).flatten(1, 2)


def _cosine(image: Tensor, text: Tensor) -> Tensor:
    return nn.functional.normalize(image, dim=-1) @ nn.functional.normalize(text, dim=-1).T


@torch.no_grad()
def _retrieval(
    model: Any, pairs: Pairs, encoder: HuggingFaceTextEncoder, device: torch.device | str
) -> dict[str, float]:
    """Top-1 rates among all held-out pairs; another pair with an equal caption counts as right."""
    ids = encoder.tokenize(pairs.captions)[0].to(device)
    image = model.get_image_features(_to_float(pairs.pixels.to(device))).pooler_output
    text = model.get_text_features(ids).pooler_output
    scores = _cosine(image, text)
    same = (ids[:, None] == ids[None]).all(-1)
    rows = torch.arange(len(same), device=same.device)
    return {
        "picture_to_caption": same[rows, scores.argmax(1)].float().mean().item(),
        "caption_to_picture": same[rows, scores.argmax(0)].float().mean().item(),
    }


def _build(tokenizer: Any, config: ClipTraining) -> Any:
    from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig

    heads = config.width // (64 if config.width % 64 == 0 else 32)
    text = clip_text_config(tokenizer, width=config.width, layers=config.layers, heads=heads)
    vision = CLIPVisionConfig(
        hidden_size=config.width,
        intermediate_size=4 * config.width,
        num_hidden_layers=config.vision_layers,
        num_attention_heads=heads,
        image_size=config.image_px,
        patch_size=config.patch_px,
    )
    towers = CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=config.width
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        model = CLIPModel(towers)
        embeddings = model.text_model.embeddings
        nn.init.normal_(embeddings.token_embedding.weight, std=WORD_STD)
        nn.init.normal_(embeddings.position_embedding.weight, std=WORD_STD / 2)
        return model


def _add_memory(model: Any, ids: Tensor, config: ClipTraining) -> None:
    """Gives the model the heads of `_forgotten`, over the tokens that occur; all dropped later."""
    used = ids.unique()
    word_of = torch.zeros(int(used.max()) + 1, dtype=torch.long)
    word_of[used] = torch.arange(len(used))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        model.register_buffer("word_of", word_of)
        model.recall = nn.Linear(config.width, RECALLED * len(used))
        model.listed = nn.Linear(config.width, len(used))


def _to_float(pixels: Tensor) -> Tensor:
    return pixels.float() / 127.5 - 1


def _finite(loss: float, step: int) -> float:
    if not math.isfinite(loss):
        raise LdmError(
            f"the loss is {loss} at step {step}",
            where="train-clip",
            fix="lower the learning rate",
            code=ExitCode.NUMERICS,
        )
    return loss


def _check(config: ClipTraining) -> None:
    rules: Sequence[tuple[bool, str]] = (
        (config.steps >= 1, f"steps={config.steps} must be at least 1"),
        (config.batch_size >= 2, f"batch_size={config.batch_size} must be at least 2"),
        (config.width % 32 == 0, f"width={config.width} must be a multiple of 32"),
        (
            config.image_px % config.patch_px == 0,
            f"image_px={config.image_px} must be a multiple of patch_px={config.patch_px}",
        ),
    )
    broken = [rule for holds, rule in rules if not holds]
    if broken:
        raise LdmError("; ".join(broken), where="train-clip", code=ExitCode.CONFIG)
