"""Rows of data: reading cached samples, and from JPEG to a square."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.measure import Budget, Row, assert_equal, in_turns
from ldm.data.decode import decode
from ldm.data.loader import Share
from ldm.data.transforms import Draws, fit
from ldm.training.cache import Cache, CachedLoader, TextCache

BATCH = 64


def cached(budget: Budget) -> Iterator[Row]:
    """Batches of latents and text from our cache, from datasets.map lists, from a file each."""
    import datasets

    count, tokens, width = (BATCH, 4, 8) if budget.is_smoke else (4 * BATCH, 77, 768)
    draws = torch.Generator().manual_seed(0)
    moments = torch.randn(count, 8, 32, 32, generator=draws).half()
    words = torch.randn(count, tokens, width, generator=draws).half()
    names = tuple(str(i) for i in range(count))
    cache = Cache(
        names,
        moments[:, None],
        {},
        TextCache(
            tokens=words.flatten(0, 1),
            starts=torch.arange(count) * tokens,
            lengths=torch.full((count,), tokens),
            pooled=None,
            caption_of=torch.arange(count),
        ),
    )
    ours = CachedLoader(cache, Share(BATCH, 0, 1, 1), seed=0, flip=False).batches()
    order = torch.randperm(count, generator=draws)[:BATCH].tolist()
    lists = datasets.Dataset.from_dict(
        {"model_input": [m.tolist() for m in moments], "prompt_embeds": [w.tolist() for w in words]}
    )

    def from_lists() -> Any:
        rows = [lists[i] for i in order]
        return (
            torch.stack([torch.tensor(row["model_input"]) for row in rows]),
            torch.stack([torch.tensor(row["prompt_embeds"]) for row in rows]),
        )

    with tempfile.TemporaryDirectory() as folder:
        for i in range(count):
            np.save(Path(folder) / f"{i}.npy", moments[i].numpy())
            np.save(Path(folder) / f"{i}-text.npy", words[i].numpy())

        def from_files(text: bool = True) -> Any:
            load = lambda name: torch.from_numpy(np.load(Path(folder) / name))  # noqa: E731
            return (
                torch.stack([load(f"{i}.npy") for i in order]).float(),
                torch.stack([load(f"{i}-text.npy") for i in order]).float() if text else None,
            )

        batch = next(ours)
        rows = [int(name) for name in batch.ids]
        assert batch.moments is not None
        assert batch.text is not None
        assert_equal(batch.moments, moments[rows].float(), 0.0, "cached latents")
        assert_equal(batch.text.tokens, words[rows].float(), 0.0, "cached text")
        assert_equal(from_lists()[0], from_files()[0], 0.0, "latents of both peers")
        times = in_turns(
            {
                "datasets.map lists": from_lists,
                "file per sample": from_files,
                "ours": lambda: next(ours),
            },
            budget,
        )
        index, unmirrored = torch.tensor(order), torch.zeros(BATCH, dtype=torch.bool)
        alone = in_turns(
            {
                "file per sample": lambda: from_files(text=False),
                "ours": lambda: cache.latent_moments(index, unmirrored),
            },
            budget,
        )
    shape = f"batches of {BATCH}: 8x32x32 and {tokens}x{width}, fp16"
    yield times.row("cached samples against lists", "ours", "datasets.map lists", 100, shape=shape)
    yield times.row("cached samples against files", "ours", "file per sample", None, shape=shape)
    shape = f"batches of {BATCH}: 8x32x32, fp16"
    yield alone.row("cached latents against files", "ours", "file per sample", 10, shape=shape)


def jpeg(budget: Budget) -> Iterator[Row]:
    """A photograph-like JPEG to a square of 256 pixels, against the peer scripts' transforms."""
    from torchvision import transforms

    side, px = (64, 32) if budget.is_smoke else (512, 256)
    source = _photo(side)
    resize = transforms.Compose(
        [
            transforms.Resize(px, interpolation=transforms.InterpolationMode.LANCZOS),
            transforms.CenterCrop(px),
            transforms.ToTensor(),
            transforms.Normalize([0.5], [0.5]),
        ]
    )
    draws = Draws(0, 0, "0")

    def peer() -> torch.Tensor:
        out: torch.Tensor = resize(Image.open(io.BytesIO(source)).convert("RGB"))
        return out

    def ours() -> torch.Tensor:
        return fit(decode(source), px, draws=draws)

    assert_equal(ours(), peer(), 2 * 2 / 255, "JPEG to square")
    times = in_turns({"PIL Lanczos": peer, "ours": ours}, budget)
    shape = f"{side}x{side} to {px}"
    note = "same decoder and filter as the peer: no faster one is a dependency yet"
    yield times.row(
        "JPEG to square, equal quality", "ours", "PIL Lanczos", 3, shape=shape, note=note
    )
    yield times.row(
        "JPEG to square, scaled decode", "ours", "PIL Lanczos", 6, shape=shape, note=note
    )


def _photo(side: int) -> bytes:
    """Smooth shapes with some grain, as photographs have them."""
    draws = np.random.default_rng(0)
    coarse = Image.fromarray(draws.integers(0, 255, (side // 16, side // 16, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), dtype=float)
    grain = draws.normal(0, 8, smooth.shape)
    file = io.BytesIO()
    pixels = (smooth + grain).clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()
