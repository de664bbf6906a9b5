"""fp32 products of a CPU by oneDNN, where torch would take MKL's: same formula, same precision.

Torch has one switch for it, for the whole process. Here it is on inside single operations only and
as it was before and after, in the backward pass as well. Whether it is exact on this machine is
asked by `backends.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

LEAST_WORK = 2**20
"""Multiplications from which oneDNN's product is the faster: it takes 5 us longer to begin."""


@contextmanager
def switched() -> Iterator[None]:
    """Inside, fp32 products are oneDNN's. Goes around one operation."""
    switch: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    former = switch.fp32_precision
    switch.fp32_precision = "bf16"  # "may round to bf16": a probe has found that it does not
    try:
        yield
    finally:
        switch.fp32_precision = former


def product(a: Tensor, b: Tensor) -> Tensor:
    """a (..., n, k) @ b (..., k, m), both with the same leading sizes."""
    if not _learns(a, b):
        with switched():
            return a @ b
    out: Tensor = _Product.apply(a, b)
    return out


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., in), weight (out, in), bias (out,) -> (..., out)."""
    if not _learns(x, weight, bias):
        with switched():
            return F.linear(x, weight, bias)
    out: Tensor = _Linear.apply(x, weight, bias)
    return out


def fused_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    """Torch's fused kernel; q, k, v (B, H, L, D), visible (B, 1, 1, Lk) bool or None."""
    if not _learns(q, k, v):
        with switched():
            return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
    out: Tensor = _FusedAttention.apply(q, k, v, visible)
    return out


def _learns(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


class _Product(Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        with switched():
            return a @ b

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        with switched():
            return gradient @ b.mT, a.mT @ gradient


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        with switched():
            return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = gradient.flatten(0, -2)
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        with switched():
            return (
                gradient @ weight if wants_x else None,
                rows.mT @ x.flatten(0, -2) if wants_weight else None,
                rows.sum(0) if wants_bias else None,
            )


class _FusedAttention(Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
        # the kernel adds its mask to the logits
        bias = None if visible is None else _bias(visible, q.dtype)
        with switched():
            out, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, 0.0, False, attn_mask=bias
            )
        ctx.save_for_backward(q, k, v, out, logsumexp)
        ctx.bias = bias
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, logsumexp = ctx.saved_tensors
        with switched():
            grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                gradient, q, k, v, out, logsumexp, 0.0, False, attn_mask=ctx.bias
            )
        return (*grads, None)


def _bias(visible: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, float("-inf"))
