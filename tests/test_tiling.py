"""Large pictures through the VAE in slices and strips: the same numbers, in less memory."""

from __future__ import annotations

import dataclasses
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from recipes import tiny
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from ldm.cli import main
from ldm.errors import LdmError
from ldm.models import tiling
from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.training.diffusion import train_diffusion

LAYOUTS = {
    "four levels with attention": AutoencoderConfig(
        block_out_channels=(8, 16, 24, 24), norm_num_groups=8, layers_per_block=1
    ),
    "two levels, no attention, no quant convs": AutoencoderConfig(
        block_out_channels=(16, 32),
        latent_channels=16,
        norm_num_groups=8,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        latents_mean=(0.5,) * 16,
        latents_std=(2.0,) * 16,
    ),
    "one level": AutoencoderConfig(block_out_channels=(16,), norm_num_groups=4),
}
EVERY_LAYOUT = pytest.mark.parametrize("layout", LAYOUTS)


def vae_of(layout: str, dtype: torch.dtype = torch.float64) -> AutoencoderKL:
    torch.manual_seed(0)
    vae = AutoencoderKL(LAYOUTS[layout])
    with torch.no_grad():
        for parameter in vae.parameters():
            # norms start at 1 and 0, where a forgotten one would not show
            parameter.add_(0.1 * torch.randn_like(parameter))
    return vae.to(dtype).eval().requires_grad_(False)


def uneven(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Noise whose scale and mean change from top to bottom: no strip has the picture's moments."""
    rows = torch.linspace(-1, 2, shape[2], dtype=dtype)[:, None]
    return torch.randn(*shape, dtype=dtype) * (rows.abs() + 0.1) + 3 * rows


@EVERY_LAYOUT
@pytest.mark.parametrize("size", [(1, 1), (1, 6), (7, 3), (5, 8)])
@pytest.mark.parametrize("strip_px", [1, 2, 5, 16])
def test_strips_of_any_height_give_what_the_whole_picture_gives(
    layout: str, size: tuple[int, int], strip_px: int
) -> None:
    # float64: the claim is one of equal formulas, at any tolerance that rounding allows
    vae = vae_of(layout)
    latents = uneven(2, vae.config.latent_channels, *size)
    assert_close(tiling.decode(vae, latents, strip_px), vae.decode(latents), atol=1e-9, rtol=1e-9)
    sides = [side * vae.downsample_factor for side in size]
    pixels = uneven(2, 3, *sides)
    assert_close(tiling.encode(vae, pixels, strip_px), vae.moments(pixels), atol=1e-9, rtol=1e-9)


def test_attention_of_a_few_queries_at_a_time_sees_every_position(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vae, latents = vae_of("four levels with attention"), uneven(1, 4, 7, 5)
    whole = vae.decode(latents)
    monkeypatch.setattr(tiling, "ATTENDED", 4 * 35)  # 35 positions: eight parts of 4, one of 3
    assert_close(tiling.decode(vae, latents, 8), whole, atol=1e-9, rtol=1e-9)


def test_a_log_variance_out_of_its_range_is_cut_in_strips_as_well() -> None:
    vae, pixels = vae_of("one level"), uneven(1, 3, 6, 5)
    vae.quant_conv.weight.mul_(1e3)
    plain = vae.moments(pixels)
    assert {-30.0, 20.0} <= set(plain.chunk(2, dim=1)[1].flatten().tolist())
    assert_close(tiling.encode(vae, pixels, 2), plain, atol=1e-9, rtol=1e-9)


def test_strips_agree_in_float32_to_rounding_and_in_bf16_to_its_eight_bits() -> None:
    layout = "four levels with attention"
    latents = uneven(1, 4, 9, 5, dtype=torch.float32)
    exact = vae_of(layout).decode(latents.double())
    scale = exact.abs().max()
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        vae = vae_of(layout, dtype)
        strips = tiling.decode(vae, latents.to(dtype), 8)
        assert strips.dtype == dtype
        assert (strips.double() - exact).abs().max() < tolerance * scale
        assert (vae.decode(latents.to(dtype)).double() - exact).abs().max() < tolerance * scale


def test_a_mean_far_from_zero_does_not_spoil_the_statistics_of_a_norm() -> None:
    # sums of squares would lose every digit here: 4000 squared is 2^24
    norm = torch.nn.GroupNorm(2, 4, eps=1e-6)
    x = uneven(1, 4, 12, 9, dtype=torch.float32) + 4000
    factor, shift = tiling._normalisation(x, norm, rows=5)
    expected = torch.nn.functional.group_norm(x.double(), 2, eps=1e-6)
    # x itself is stored to 2.4e-4, which the norm divides by a standard deviation of about 3
    assert_close((x.double() * factor + shift).float(), expected.float(), atol=2e-3, rtol=1e-3)


def test_memory_layout_and_a_picture_beside_it_change_nothing() -> None:
    vae = vae_of("four levels with attention")
    latents = uneven(3, 4, 6, 5)
    together = tiling.decode(vae, latents, 8)
    alone = tiling.decode(vae, latents[1:2], 8)
    assert torch.equal(together[1:2], alone)
    vae.to(memory_format=torch.channels_last)
    strided = latents.contiguous(memory_format=torch.channels_last)
    assert_close(tiling.decode(vae, strided, 8), together, atol=1e-9, rtol=1e-9)


class Watched:
    """A codec of sixfold pictures that notes how many pixels it is given at once."""

    downsample_factor = 1

    def __init__(self) -> None:
        self.calls: list[tuple[int, ...]] = []

    def decode(self, latents: Tensor) -> Tensor:
        self.calls.append(tuple(latents.shape))
        return 6 * latents

    moments = decode


def test_batches_beyond_the_limit_are_sliced_and_small_ones_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tiling, "LARGE_PX", 100)
    for work in (tiling.decode, tiling.encode):
        for batch, side, calls in (
            (4, 5, [4]),  # 100 pixels: at once
            (5, 5, [4, 1]),
            (3, 8, [1, 1, 1]),
            (2, 20, [1, 1]),  # too large for any call; this codec has no strips
        ):
            codec, x = Watched(), torch.randn(batch, 3, side, side)
            assert_close(work(codec, x), 6 * x)  # type: ignore[arg-type]
            assert [shape[0] for shape in codec.calls] == calls
    codec = Watched()
    tiling.decode(codec, torch.randn(9, 3, 20, 20), 0)  # type: ignore[arg-type]
    assert codec.calls == [(9, 3, 20, 20)]


def test_a_picture_beyond_the_limit_goes_in_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    vae, latents = vae_of("four levels with attention"), uneven(2, 4, 5, 5)
    whole = vae.decode(latents)
    monkeypatch.setattr(tiling, "LARGE_PX", 1599)  # 40 x 40 pixels are 1600
    monkeypatch.setattr(AutoencoderKL, "decode", None)  # a plain call would fail
    assert_close(tiling.decode(vae, latents), whole, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(("codec", "strip_px"), [(Watched(), 32), (None, -1)])
def test_impossible_strips_are_refused(codec: Any, strip_px: int) -> None:
    codec = codec or vae_of("one level")
    with pytest.raises(LdmError, match=rf"strips {strip_px} pixels high cannot be made by"):
        tiling.decode(codec, torch.zeros(1, 4, 2, 2), strip_px)


def test_a_size_that_cannot_be_encoded_is_refused_in_strips_as_well() -> None:
    with pytest.raises(LdmError, match="64x64 or 72x64"):
        tiling.encode(vae_of("four levels with attention"), torch.zeros(1, 3, 70, 64), 32)


class Peak(TorchDispatchMode):
    """The most bytes of tensors that were alive at once, of those made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def peak(vae: AutoencoderKL, latents: Tensor, strip_px: int) -> int:
    with Peak() as seen:
        tiling.decode(vae, latents, strip_px)
    return seen.most


def test_strips_need_three_whole_activations_and_a_strip_where_the_plain_call_needs_five() -> None:
    config = dataclasses.replace(
        LAYOUTS["four levels with attention"], block_out_channels=(32, 64, 64, 64)
    )
    torch.manual_seed(0)
    vae = AutoencoderKL(config).eval()
    latents = torch.randn(1, 4, 32, 32)
    finest = 32 * 256 * 256 * 4  # bytes of the 32 channels of the finest level
    plain, strips = peak(vae, latents, 0), peak(vae, latents, 8)
    # 64 channels come in and 32 go out: 2 + 1 activations, and strips of 8 rows of 256
    assert strips < 3.3 * finest
    assert plain > 1.6 * strips


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "run"
    train_diffusion(tiny("dit", folder, "train.steps=2", "run.save_every_steps=2"))
    return folder


def test_the_command_draws_the_same_picture_in_strips(run: Path, tmp_path: Path) -> None:
    command = ["infer", "--model", str(run), "--prompt", "a red circle", "--steps", "2"]
    for name, option in (("whole", []), ("strips", ["--vae-tile", "8"])):
        assert main([*command, "--out", str(tmp_path / name), "--device", "cpu", *option]) == 0
    drawn = [
        np.asarray(Image.open(tmp_path / name / "00000.png")).astype(int)
        for name in ("whole", "strips")
    ]
    assert np.abs(drawn[0] - drawn[1]).max() <= 1  # a value may round to the other side
    assert main([*command, "--out", str(tmp_path), "--vae-tile", "-1"]) == 2
