"""Attention is one formula on every kernel, and a kernel that is not it is refused."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from ldm.errors import LdmError
from ldm.models import attention
from ldm.models.attention import SHORT, attend, use_attention
from ldm.models.dit import DiT, DiTConfig
from ldm.models.unet import UNet, UNetConfig
from ldm.types import TextEmbedding


def draws(length: int, keys: int | None = None, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Queries, keys and values of two samples and two heads."""
    generator = torch.Generator().manual_seed(length)
    shapes = [(2, 2, n, 16) for n in (length, keys or length, keys or length)]
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes
    ]


def mask_of(keys: int) -> Tensor:
    """The first sample sees half of its keys, the second all of them."""
    mask = torch.ones(2, keys, dtype=torch.bool)
    mask[0, keys // 2 :] = False
    return mask


def formula(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Vaswani et al. 2017, eq. 1, in float64."""
    q, k, v = (x.double() for x in (q, k, v))
    logits = q @ k.mT / q.shape[-1] ** 0.5
    if mask is not None:
        logits = logits.masked_fill(~mask[:, None, None], float("-inf"))
    return logits.softmax(-1) @ v


@pytest.mark.parametrize("kernel", ["auto", "tuned", "sdpa"])
@pytest.mark.parametrize("keys", [77, SHORT, SHORT + 1])
@pytest.mark.parametrize("masked", [False, True])
def test_bf16_attention_is_the_softmax_formula_on_both_sides_of_the_length_limit(
    kernel: str, keys: int, masked: bool
) -> None:
    half = [x.requires_grad_() for x in draws(SHORT, keys, torch.bfloat16)]
    mask = mask_of(keys) if masked else None
    out = attend(*half, mask, kernel)
    assert out.dtype == torch.bfloat16
    # bf16 keeps 8 bits (0.004 relative), rounded in the inputs, the logits and the weights
    assert_close(out.double(), formula(*half, mask), atol=0.02, rtol=0.02)


@pytest.mark.parametrize("keys", [1, 77, 256, 300])
@pytest.mark.parametrize("masked", [False, True])
def test_tuned_fp32_attention_and_its_gradients_are_those_of_the_fused_kernel(
    keys: int, masked: bool
) -> None:
    # 300 queries: enough work for oneDNN's products with 77 keys and more
    plain = [x.requires_grad_() for x in draws(300, keys)]
    tuned = [x.detach().clone().requires_grad_() for x in plain]
    mask = mask_of(keys) if masked and keys > 1 else None
    outs = [attend(*plain, mask, "sdpa"), attend(*tuned, mask, "tuned")]
    gradient = torch.randn(outs[0].shape, generator=torch.Generator().manual_seed(1))
    for out in outs:
        out.backward(gradient)
    # sums of up to 300 terms in another order
    assert_close(outs[0], outs[1], atol=2e-6, rtol=1e-5)
    for a, b in zip(plain, tuned, strict=True):
        assert_close(a.grad, b.grad, atol=5e-6, rtol=1e-5)
    with torch.no_grad():
        assert_close(attend(*tuned, mask, "tuned"), outs[1], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("kernel", ["auto", "tuned"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_keys_never_count_and_a_row_without_keys_is_zero(
    dtype: torch.dtype, kernel: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(3, 2, 5, 8, generator=generator).to(dtype).requires_grad_() for _ in range(3)
    )
    mask = torch.tensor([[True] * 5, [True, True, False, False, False], [False] * 5])
    out = attend(q, k, v, mask, kernel)
    out.sum().backward()

    assert_close(out[1], attend(q[1:2], k[1:2, :, :2], v[1:2, :, :2], None, kernel)[0])
    assert out[2].abs().max() == 0
    for leaf in (q, k, v):
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()
    assert k.grad is not None
    assert v.grad is not None
    assert k.grad[1, :, 2:].abs().max() == 0
    assert v.grad[1:, :, 2:].abs().max() == 0


def test_auto_computes_bit_for_bit_what_runs_of_earlier_versions_computed() -> None:
    for dtype, keys in ((torch.float32, 77), (torch.bfloat16, 77), (torch.bfloat16, 300)):
        inputs = [x.requires_grad_() for x in draws(64, keys, dtype)]
        former = [x.detach().clone().requires_grad_() for x in inputs]
        q, k, v = former
        visible = mask_of(keys)[:, None, None]
        if dtype == torch.bfloat16 and keys <= SHORT:
            logits = (q * q.shape[-1] ** -0.5) @ k.mT
            expected = logits.masked_fill(~visible, float("-inf")).softmax(-1) @ v
        else:
            expected = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        got = attend(*inputs, mask_of(keys))
        assert got.equal(expected)
        got.sum().backward()
        expected.sum().backward()
        assert all(a.grad.equal(b.grad) for a, b in zip(inputs, former, strict=True))


class Xformers:
    """Stands for xformers: its layout (B, L, H, D), an additive bias, an explicit scale."""

    def __init__(self, fault: str = "") -> None:
        self.fault = fault
        self.calls: list[tuple[int, ...]] = []

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, attn_bias: Tensor | None, scale: float
    ) -> Tensor:
        self.calls.append(tuple(q.shape))
        if self.fault == "scale":
            scale = scale * 1.02
        logits = torch.einsum("blhd,bmhd->bhlm", q, k) * scale
        if attn_bias is not None and self.fault != "mask":
            assert attn_bias.shape == logits.shape
            assert attn_bias.stride(-2) % 8 == 0, "rows are aligned as the real kernel demands"
            logits = logits + attn_bias
        out = torch.einsum("bhlm,bmhd->blhd", logits.softmax(-1), v)
        if self.fault == "gradient":
            # right forwards, and NaN only in the gradient of an entry that overflowed
            out = out + 0 * torch.where(out > 3, (out - out).sqrt(), out - out)
        if self.fault == "refuses":
            raise NotImplementedError("No operator found\nlong table")
        return out


@pytest.fixture
def xformers(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Installs a stand-in for the package."""

    def install(fault: str = "") -> Xformers:
        package, ops, kernel = ModuleType("xformers"), ModuleType("xformers.ops"), Xformers(fault)
        ops.memory_efficient_attention = kernel  # type: ignore[attr-defined]
        package.ops = ops  # type: ignore[attr-defined]
        package.__spec__ = sys.__spec__
        monkeypatch.setitem(sys.modules, "xformers", package)
        monkeypatch.setitem(sys.modules, "xformers.ops", ops)
        attention.fault.cache_clear()
        return kernel

    yield install
    attention.fault.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_xformers_is_called_in_its_own_layout_and_gives_the_formula(
    xformers: Any, dtype: torch.dtype, masked: bool
) -> None:
    kernel = xformers()
    inputs, mask = draws(20, 13, dtype), mask_of(13) if masked else None
    out = attend(*inputs, mask, "xformers")
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    assert_close(out.double(), formula(*inputs, mask), atol=tolerance, rtol=tolerance)
    assert set(kernel.calls) == {(2, 20, 2, 16)}, "batch, length, heads, width"
    calls = len(kernel.calls)
    attend(*inputs, mask, "xformers")
    assert len(kernel.calls) == calls + 1, "a case is proven once"


@pytest.mark.parametrize(
    ("fault", "masked", "learns", "part"),
    [
        ("scale", False, False, "its result is off"),
        ("mask", True, False, "its result is off"),
        ("gradient", False, True, "its gradient of q is off by nan"),
        ("refuses", False, False, "NotImplementedError: No operator found"),
    ],
)
def test_a_kernel_that_is_wrong_is_refused_with_the_reason(
    xformers: Any, fault: str, masked: bool, learns: bool, part: str
) -> None:
    xformers(fault)
    inputs = [x.requires_grad_(learns) for x in draws(20, 13)]
    with pytest.raises(LdmError, match="xformers") as caught:
        attend(*inputs, mask_of(13) if masked else None, "xformers")
    assert part in str(caught.value)
    assert "use auto" in str(caught.value)


def test_a_missing_package_is_named_with_its_extra() -> None:
    attention.fault.cache_clear()
    with pytest.raises(LdmError, match=r"ldm-toolkit\[xformers\]"):
        attend(*draws(8), None, "xformers")


def test_flex_attention_is_refused_for_training_on_a_cpu_which_it_cannot_do() -> None:
    inputs = [x.requires_grad_() for x in draws(16)]
    with pytest.raises(LdmError, match="does not support backward on CPU"):
        attend(*inputs, None, "flex")


def test_the_probe_draws_from_a_generator_of_its_own(xformers: Any) -> None:
    xformers()
    before = torch.get_rng_state()
    attend(*draws(20, 13), None, "xformers")
    assert before.equal(torch.get_rng_state())


def small_unet() -> UNet:
    return UNet(
        UNetConfig(
            block_out_channels=(16, 32),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            norm_num_groups=8,
            attention_head_dim=4,
            cross_attention_dim=12,
        )
    )


def test_each_network_has_a_kernel_of_its_own(xformers: Any) -> None:
    kernel = xformers()
    one, other = small_unet(), small_unet()
    assert use_attention(one, "xformers") == 8, "two in each of four transformers"
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([500.0])
    text = TextEmbedding(torch.randn(1, 5, 12), torch.ones(1, 5, dtype=torch.bool))
    with torch.no_grad():
        other(x, t, text)
        assert not kernel.calls
        one(x, t, text)
    assert kernel.calls


def test_a_compiled_network_without_graph_breaks_uses_the_kernel_that_was_proven(
    xformers: Any,
) -> None:
    xformers()
    config = DiTConfig(in_channels=4, hidden_size=32, head_dim=16, num_layers=1, text_dim=12)
    net = DiT(config).eval()
    use_attention(net, "xformers")
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([500.0, 20.0])
    text = TextEmbedding(torch.randn(2, 5, 12), mask_of(5))
    with torch.no_grad():
        expected = net(x, t, text)
        got = torch.compile(net, backend="eager", fullgraph=True)(x, t, text)
    assert_close(got, expected)
    torch.compiler.reset()


def test_gradients_flow_through_every_kernel_of_the_table(xformers: Any) -> None:
    xformers()
    for name in ("xformers", "written"):
        inputs = [x.requires_grad_() for x in draws(9)]
        attention.KERNELS[name](*inputs, None).sum().backward()
        assert all(x.grad is not None for x in inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inference_in_parts_gives_what_it_gives_in_one(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(5, 2, 256, 16, generator=generator).to(dtype) for _ in range(3)]
    mask = torch.arange(256) < torch.tensor([256, 3, 80, 1, 200])[:, None]
    with torch.no_grad():
        parts = attend(*inputs, mask, "tuned")
        monkeypatch.setattr(attention, "PART", 2**40)
        whole = attend(*inputs, mask, "tuned")
        monkeypatch.setattr(attention, "PART", 2 * 256 * 256 * 2)  # two samples, two, one
        pairs = attend(*inputs, mask, "tuned")
    assert_close(parts, whole, atol=1e-6, rtol=1e-6)
    assert_close(pairs, whole, atol=1e-6, rtol=1e-6)
