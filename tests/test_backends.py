"""CPU kernels change the time and nothing else, are chosen by a probe, and leave no trace."""

from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from recipes import tiny
from torch import Tensor, nn
from torch.testing import assert_close

from ldm.checkpoint import find_checkpoint
from ldm.checkpoint.state import load_state
from ldm.errors import LdmError
from ldm.inference.pipeline import Pipeline
from ldm.models import backends, onednn, packing
from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.models.backends import Backends, Products, choose
from ldm.models.onednn import LEAST_WORK
from ldm.models.packing import PackedConv2d, PackedLinear, pack, unpack
from ldm.models.unet import UNet, UNetConfig
from ldm.training import checkpoints, session
from ldm.training.checkpoints import STATE_ITEMS
from ldm.training.diffusion import train_diffusion
from ldm.types import TextEmbedding

TUNED = Backends(cpu="tuned")
ROOT = Path(__file__).parent.parent


def switch() -> str:
    value: str = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    return value


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def unet() -> UNet:
    """Wide enough that its products are large enough for oneDNN."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = UNet(
            UNetConfig(
                block_out_channels=(64, 128),
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
                layers_per_block=1,
                norm_num_groups=8,
                attention_head_dim=4,
                cross_attention_dim=32,
            )
        )
    with torch.no_grad():
        for index, weight in enumerate(net.conv_out.parameters()):
            weight.copy_(0.1 * normal(*weight.shape, seed=index))
    return net.eval()


def asked() -> tuple[Tensor, Tensor, TextEmbedding]:
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[0, 9:] = False
    return normal(2, 4, 16, 16), torch.tensor([3.0, 980.0]), TextEmbedding(normal(2, 20, 32), mask)


def test_a_tuned_network_predicts_and_learns_what_the_plain_one_does() -> None:
    plain, tuned = unet(), TUNED.install(unet())
    assert sum(isinstance(layer, PackedLinear) for layer in tuned.modules()) > 20
    x, t, text = asked()
    with torch.inference_mode():
        # fp32 sums in another order, through some forty layers
        assert_close(tuned(x, t, text), plain(x, t, text), atol=2e-5, rtol=1e-4)
    for net in (plain, tuned):
        net(x, t, text).square().mean().backward()
    for (name, a), (other, b) in zip(
        plain.named_parameters(), tuned.named_parameters(), strict=True
    ):
        assert name == other
        assert_close(a.grad, b.grad, atol=2e-5, rtol=1e-3)


def test_a_tuned_vae_gives_the_same_moments_and_pixels_in_bf16_and_fp32() -> None:
    config = AutoencoderConfig(block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8)
    plain = AutoencoderKL(config).eval()
    tuned = TUNED.install(copy.deepcopy(plain))
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
        pixels, latents = normal(1, 3, 64, 64).to(dtype), normal(1, 4, 32, 32).to(dtype)
        with torch.inference_mode():
            plain, tuned = plain.to(dtype), tuned.to(dtype)
            pairs = [(net.moments(pixels), net.decode(latents)) for net in (plain, tuned)]
            for a, b in zip(*pairs, strict=True):
                assert (a - b).abs().max() <= tolerance * a.abs().max()


def test_a_tuned_network_compiles_without_a_graph_break_and_gives_the_same() -> None:
    net = TUNED.install(unet())
    x, t, text = asked()
    with torch.no_grad():
        expected = net(x, t, text)
        got = torch.compile(net, backend="eager", fullgraph=True)(x, t, text)
    torch.compiler.reset()
    assert_close(got, expected, atol=2e-5, rtol=1e-4)  # torch's products in place of oneDNN's


def test_names_and_parameters_stay_through_packing_copying_and_unpacking() -> None:
    net = unet()
    before, weights = list(net.state_dict()), list(net.parameters())
    packed = pack(net)
    x, t, text = asked()
    with torch.inference_mode():
        expected = packed(x, t, text)
        assert copy.deepcopy(packed)(x, t, text).equal(expected)
    assert list(packed.state_dict()) == before
    assert all(a is b for a, b in zip(packed.parameters(), weights, strict=True))
    plain = unpack(packed)
    assert not any(isinstance(m, PackedLinear | PackedConv2d) for m in plain.modules())
    assert list(plain.state_dict()) == before
    assert all(a is b for a, b in zip(plain.parameters(), weights, strict=True))


@pytest.mark.parametrize("change", ["in place", "data", "assigned", "dtype"])
def test_changed_weights_are_packed_anew(change: str) -> None:
    conv, linear = nn.Conv2d(64, 64, 3, padding=1), nn.Linear(256, 256)
    images, rows = normal(1, 64, 8, 8), normal(64, 256)
    for layer, kind, x in ((conv, PackedConv2d, images), (linear, PackedLinear, rows)):
        packed = kind(layer)  # type: ignore[arg-type]
        with torch.no_grad():
            old = packed(x)
            other = normal(*packed.weight.shape, seed=5)
            if change == "in place":
                packed.weight.copy_(other)
            elif change == "data":
                packed.weight.data = other
            elif change == "assigned":
                packed.weight = nn.Parameter(other)
            else:
                packed, x = packed.bfloat16(), x.bfloat16()
            weight, bias = packed.weight, packed.bias
            if isinstance(layer, nn.Conv2d):
                expected = torch.nn.functional.conv2d(x, weight, bias, padding=1)
            else:
                expected = torch.nn.functional.linear(x, weight, bias)
            got = packed(x)
        assert got.dtype == x.dtype
        assert_close(got, expected, atol=1e-3 if change != "dtype" else 0.05, rtol=1e-4)
        if change != "dtype":
            assert not torch.allclose(got, old, atol=0.1)


def test_products_of_onednn_have_the_gradients_of_torchs() -> None:
    rows = LEAST_WORK // (64 * 48) + 1
    x, weight, bias = normal(2, rows, 64), normal(48, 64, seed=1), normal(48, seed=2)
    results = []
    for run in (torch.nn.functional.linear, onednn.linear):
        inputs = [y.clone().requires_grad_() for y in (x, weight, bias)]
        out = run(*inputs)
        out.square().mean().backward()
        results.append([out, *(y.grad for y in inputs)])
    for a, b in zip(*results, strict=True):
        # sums of up to 700 products in another order
        assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_the_switch_of_onednn_is_as_before_after_forward_and_backward_and_errors() -> None:
    before = switch()
    x, t, text = asked()
    TUNED.install(unet())(x, t, text).mean().backward()
    assert switch() == before
    with pytest.raises(RuntimeError):
        onednn.product(normal(2, 3, 4), normal(2, 5, 6))
    assert switch() == before
    products = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    products.fp32_precision = "ieee"  # a user's own setting
    try:
        onednn.linear(normal(2, 3), normal(4, 3), None)
        assert switch() == "ieee"
    finally:
        products.fp32_precision = before


def test_the_probe_refuses_products_that_are_not_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Tensor.__matmul__

    def rounded(a: Tensor, b: Tensor) -> Tensor:
        """What a processor with bf16 matrix units makes of the switch."""
        if switch() == "bf16" and a.dtype == torch.float32:
            return plain(a.bfloat16(), b.bfloat16()).float()
        return plain(a, b)

    monkeypatch.setattr(Tensor, "__matmul__", rounded)
    backends.probe_products.cache_clear()
    try:
        assert not backends.probe_products().exact
        assert choose().cpu == "plain"
        assert choose(cpu="tuned").cpu == "plain", "no fp32 run becomes bf16 by a setting of speed"
    finally:
        backends.probe_products.cache_clear()


def test_auto_needs_a_speedup_and_tuned_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "probe_products", lambda: Products(True, 1.05))
    assert (choose().cpu, choose(cpu="tuned").cpu) == ("plain", "tuned")
    monkeypatch.setattr(backends, "probe_products", lambda: Products(True, 2.0))
    assert (choose().cpu, choose(cpu="plain").cpu) == ("tuned", "plain")
    assert choose(device="meta").cpu == "plain", "only CPUs have these kernels"


def test_unknown_names_and_foreign_networks_are_refused() -> None:
    with pytest.raises(LdmError, match="unknown attention 'flash'; known: auto, sdpa"):
        choose("flash")
    with pytest.raises(LdmError, match="unknown cpu_kernels 'fast'"):
        choose(cpu="fast")
    foreign = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(LdmError, match="has no attention layer of this package"):
        Backends("sdpa").install(foreign)
    assert type(TUNED.install(foreign)[0]) is nn.Linear, "it stays as it is"


def test_memory_is_kept_inside_and_given_back_after() -> None:
    """In a process of its own: holes that other tests left in the heap would hide the faults."""
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, cwd=ROOT)
    usual, kept, after = map(int, done.stdout.split())
    assert kept < usual / 4, "pages come back once, not at every allocation"
    assert after > usual / 2, "and afterwards as before"


FAULTS = """
import resource
import torch
from ldm.models.backends import kept_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(20_000_000)  # 80 MB, which glibc never keeps by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
usual = faults()
with kept_memory():
    faults()
    kept = faults()
print(usual, kept, faults())
"""
"""Prints the page faults of equal work: usually, inside `kept_memory`, and after it."""


def test_a_run_records_its_kernels_and_keeps_them(tmp_path, monkeypatch) -> None:
    chosen = []
    plain = session.choose_backends
    monkeypatch.setattr(backends, "probe_products", lambda: Products(True, 2.0))
    train_diffusion(tiny("dit", tmp_path / "run", "train.steps=2", "train.precision=fp32"))
    _, facts = load_state(find_checkpoint(tmp_path / "run") / "state", STATE_ITEMS)
    assert facts["progress"]["cpu_kernels"] == "tuned"

    def recorded(*args):
        chosen.append(plain(*args))
        return chosen[-1]

    monkeypatch.setattr(backends, "probe_products", lambda: Products(True, 1.0))
    monkeypatch.setattr(checkpoints, "choose_backends", recorded)
    train_diffusion(tiny("dit", tmp_path / "run", "train.steps=4", "train.precision=fp32"))
    assert chosen == [TUNED], "although this machine would not choose them any more"


def test_checkpoints_of_earlier_versions_go_on_with_torchs_own_kernels() -> None:
    assert session.Progress(step=5).cpu_kernels == "plain"


def test_tuned_and_plain_runs_draw_the_same_picture(tmp_path) -> None:
    run = train_diffusion(tiny("unet", tmp_path / "run", "train.steps=2")).parent
    pictures = []
    for kernels in ("plain", "tuned"):
        pipeline = Pipeline.from_pretrained(run, cpu_kernels=kernels)
        assert pipeline.backends == replace(Backends(), cpu=kernels)
        pictures.append(pipeline("a red circle", seed=3, steps=4)[0])
    differences = [abs(a - b) for a, b in zip(*(p.tobytes() for p in pictures), strict=True)]
    assert max(differences) <= 1, "rounding to bytes"


def test_packing_is_given_up_where_torch_has_no_such_operations(monkeypatch) -> None:
    monkeypatch.setattr(packing.PackedLinear, "forward", lambda self, x: x @ self.weight.mT)
    packing.packs.cache_clear()
    try:
        assert not packing.packs(), "a result without its bias is wrong"
        net = nn.Sequential(nn.Linear(4, 4))
        assert type(pack(net)[0]) is nn.Linear
    finally:
        packing.packs.cache_clear()
