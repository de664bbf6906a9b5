"""Scaled dot-product attention and the kernels it can run on; each other kernel is proven first.

B batch, H heads, Lq queries, Lk keys, D head width. Which kernel a network uses is an attribute of
its attention layers (`use_attention`), so nothing here is global and two networks may differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache, partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import ExitCode, LdmError, missing_package
from ldm.models import onednn
from ldm.models.onednn import LEAST_WORK

ASKED = ("xformers", "flex")
"""Kernels that are only used where they are asked for and proven."""

SHORT = 256
"""Up to this many keys, attention on a CPU is written out in products: torch's fused kernel takes
1.3 to 8 times as long there (Zen 5, torch 2.13), and longer still in its backward pass."""

WIDE_HEAD, MOST_LOGITS = 128, 2**24
"""Heads of this width (an autoencoder's) are written out in bf16 at any length, as long as their
logits take no more memory than this: 1.6 to 2.8 times as fast."""

PART = 2**20
"""Logits that are computed at a time in inference."""


class RealKeys(NamedTuple):
    """What attention needs of a mask; made once where many layers have the same (`real_keys`).

    Args:
        visible: (B, 1, 1, Lk) bool, the keys that are looked at.
        any: (B, 1, 1, 1) bool, whether any key is real.
    """

    visible: Tensor
    any: Tensor


def real_keys(mask: Tensor) -> RealKeys:
    """Of a mask (B, Lk) bool, True where a key is real.

    A softmax over nothing is 0/0, which some kernels return as NaN: such a row looks at everything
    and is zeroed afterwards, so values and gradients stay finite on every backend.
    """
    real = mask.any(dim=1, keepdim=True)
    return RealKeys((mask | ~real)[:, None, None, :], real[:, :, None, None])


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | RealKeys | None = None, kernel: str = "auto"
) -> Tensor:
    """Scaled dot-product attention (Vaswani et al. 2017, eq. 1).

    Args:
        q: queries, (B, H, Lq, D).
        k: keys, (B, H, Lk, D).
        v: values, (B, H, Lk, D).
        mask: (B, Lk) bool, True where a key is real, or what `real_keys` made of it; None when all
            are.
        kernel: auto is torch's fused kernel, except for short bf16 sequences on a CPU; tuned also
            chooses for fp32 (see `backends.py`); sdpa always fuses; xformers and flex are those
            packages' kernels.

    Returns:
        (B, H, Lq, D). A row without any real key gives zeros: padding never leaks in.

    Raises:
        LdmError: xformers or flex is not there, or does not give what torch's kernel gives.
    """
    if mask is None:
        return _attention(q, k, v, None, kernel)
    keys = mask if isinstance(mask, RealKeys) else real_keys(mask)
    visible: Tensor | None = keys.visible
    if keys.any.device.type == "cpu" and not torch.compiler.is_compiling():
        # here a look at the values costs next to nothing, and saves whole passes over the result
        if kernel == "tuned" and bool(keys.visible.all()):
            visible = None
        if bool(keys.any.all()):
            return _attention(q, k, v, visible, kernel)
    return _attention(q, k, v, visible, kernel) * keys.any


def use_attention(net: nn.Module, kernel: str) -> int:
    """Makes every attention layer of `net` run on `kernel`; returns how many there are."""
    layers = [layer for layer in net.modules() if isinstance(getattr(layer, "kernel", None), str)]
    for layer in layers:
        layer.kernel = kernel  # type: ignore[assignment]
    return len(layers)


def _attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, kernel: str) -> Tensor:
    if kernel in ASKED:
        prove(kernel, _case(q, k, v, visible))
        return KERNELS[kernel](q, k, v, visible)
    if q.device.type == "cpu" and kernel == "tuned":
        return _tuned(q, k, v, visible)
    short = max(q.shape[2], k.shape[2]) <= SHORT
    if q.device.type == "cpu" and kernel == "auto" and q.dtype == torch.bfloat16 and short:
        return written(q, k, v, visible)
    return _fused(q, k, v, visible)


def _tuned(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    """By number of keys and amount of work; see `onednn.py` for fp32."""
    keys = k.shape[2]
    if q.dtype == torch.float32:
        is_small = q.numel() * keys < 2 * LEAST_WORK
        if is_small or torch.compiler.is_compiling():
            return _fused(q, k, v, visible)
        if keys <= SHORT:
            return _in_parts((q, k, v), visible, partial(written, product=onednn.product))
        return onednn.fused_attention(q, k, v, visible)
    wide_heads = q.shape[3] >= WIDE_HEAD and _logits(q, k) <= MOST_LOGITS
    if q.dtype == torch.bfloat16 and (keys <= SHORT or wide_heads):
        return _in_parts((q, k, v), visible, partial(written, wide=keys < SHORT // 2))
    return _fused(q, k, v, visible)


def _in_parts(
    qkv: tuple[Tensor, Tensor, Tensor], visible: Tensor | None, run: Callable[..., Tensor]
) -> Tensor:
    """`run`, a few samples at a time where nothing is kept for a backward pass.

    So the logits stay in the cache, and the allocator has no large block to give back each time.
    """
    parts = -(-_logits(*qkv[:2]) // PART)
    if parts == 1 or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return run(*qkv, visible)
    batch = len(qkv[0])
    size = max(1, batch // parts)
    masks = [None] * batch if visible is None else visible.split(size)
    split = zip(*(x.split(size) for x in qkv), masks, strict=False)
    return torch.cat([run(*part) for part in split])


def _logits(q: Tensor, k: Tensor) -> int:
    return q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]


def written(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor | None,
    *,
    wide: bool = False,
    product: Callable[[Tensor, Tensor], Tensor] = torch.matmul,
) -> Tensor:
    """The formula in torch's plain operations; arguments as in `KERNELS`.

    `wide` takes a float32 softmax out of bf16 logits, which is faster for rows of few keys;
    `product` multiplies matrices.
    """
    logits = product(q * q.shape[-1] ** -0.5, k.mT)  # (B, H, Lq, Lk)
    if visible is not None:
        hidden = torch.zeros_like(visible, dtype=logits.dtype)
        logits = logits + hidden.masked_fill(~visible, float("-inf"))
    weights = logits.softmax(-1, dtype=torch.float32 if wide else None)
    return product(weights.to(v.dtype), v)


def xformers_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    """xformers' memory-efficient kernel, which wants (B, L, H, D) and an additive bias."""
    from xformers.ops import memory_efficient_attention

    bias = None
    if visible is not None:
        keys = k.shape[2]
        shape = (*q.shape[:3], -(-keys // 8) * 8)  # its rows must begin at multiples of 8
        room = torch.zeros(shape, dtype=q.dtype, device=q.device)[..., :keys]
        bias = room.masked_fill_(~visible, float("-inf"))
    q, k, v = (y.transpose(1, 2) for y in (q, k, v))
    out: Tensor = memory_efficient_attention(q, k, v, attn_bias=bias, scale=q.shape[-1] ** -0.5)
    return out.transpose(1, 2)


def flex_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    """torch's FlexAttention, compiled, with the mask as a change of score."""
    if visible is None:
        return _compiled_flex()(q, k, v)
    real = visible[:, 0, 0]  # (B, Lk)

    def score(value: Tensor, b: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return torch.where(real[b, key], value, -math.inf)

    return _compiled_flex()(q, k, v, score_mod=score)


KERNELS = {
    "xformers": xformers_attention,
    "flex": flex_attention,
    "written": written,
}
"""(q, k, v, visible (B, 1, 1, Lk) bool or None) -> (B, H, Lq, D), scaled by 1 / sqrt(D)."""


class Case(NamedTuple):
    """What a kernel's correctness may depend on: one probe for each."""

    q: tuple[int, ...]
    k: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    masked: bool
    learns: bool


def available(kernel: str) -> bool:
    """Whether the package of a kernel can be imported here."""
    return kernel != "xformers" or find_spec("xformers") is not None


def require(kernel: str) -> None:
    """Refuses a kernel whose package is not installed.

    Raises:
        LdmError: names the extra to install.
    """
    if not available(kernel):
        raise missing_package("xformers", "xformers", "the attention kernel xformers")


def prove(kernel: str, case: tuple[Any, ...]) -> bool:
    """Refuses a kernel whose result or gradients are not right in a case; True otherwise.

    Errors are measured against torch's unfused formula in float32, on fixed draws of the actual
    shapes (of at most two samples). A kernel passes when it errs at most twice as much as torch's
    own kernel in that precision does, and everything is finite.

    Raises:
        LdmError: code CONFIG, with what is wrong.
    """
    if wrong := fault(kernel, Case(*case)):
        raise LdmError(
            f"the attention kernel {kernel!r} cannot be used here: {wrong}",
            where="attention",
            fix="use auto, which is torch's own kernel",
            code=ExitCode.CONFIG,
        )
    return True


# torch.compile takes the answer for a constant. `torch.compiler.assume_constant_result` sets the
# same mark, and loads the whole compiler to do so: two seconds of every start.
prove._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache(maxsize=1024)
def fault(kernel: str, case: Case) -> str:
    """What is wrong with a kernel in a case, "" if nothing; found out once in a process."""
    require(kernel)
    try:
        return _probe(kernel, case)
    except Exception as error:  # whatever a kernel says of shapes it cannot do is its refusal
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"


def _probe(kernel: str, case: Case) -> str:
    generator = torch.Generator().manual_seed(0)
    few = min(case.q[0], 2)
    shapes = [(few, *shape[1:]) for shape in (case.q, case.k, case.k, case.q)]
    draws = [torch.randn(shape, generator=generator) for shape in shapes]
    visible = None
    if case.masked:
        visible = torch.ones(few, 1, 1, case.k[2], dtype=torch.bool)
        visible[0, ..., case.k[2] // 2 + 1 :] = False  # one long prompt, one short one
        visible = visible.to(case.device)

    def run(function: Any, dtype: torch.dtype) -> list[Tensor]:
        with torch.enable_grad(), torch.inference_mode(False):
            q, k, v, gradient = (x.to(case.device, dtype, copy=True) for x in draws)
            if not case.learns:
                return [function(q, k, v, visible)]
            inputs = [x.requires_grad_() for x in (q, k, v)]
            out = function(*inputs, visible)
            return [out, *torch.autograd.grad(out, inputs, gradient)]

    truth = run(written, torch.float32)
    own, other = run(_fused, case.dtype), run(KERNELS[kernel], case.dtype)
    rounding = 16 * torch.finfo(case.dtype).eps  # where torch's own kernel happens to be exact
    for name, true, mine, theirs in zip(
        ("result", "gradient of q", "gradient of k", "gradient of v"),
        *(truth, own, other),
        strict=False,
    ):
        allowed = 2 * _error(mine, true) + rounding
        if theirs.shape != true.shape or not _error(theirs, true) <= allowed:
            return f"its {name} is off by {_error(theirs, true):.1e}, allowed are {allowed:.1e}"
    return ""


def _fused(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)


def _error(x: Tensor, true: Tensor) -> float:
    """Relative to the largest entry; NaN where x has one."""
    if x.shape != true.shape:
        return math.nan
    return float((x.detach().float() - true.detach()).abs().max() / true.detach().abs().max())


def _case(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> tuple[Any, ...]:
    """The fields of a `Case`: a plain tuple, which torch.compile can take for a constant."""
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    return (tuple(q.shape), tuple(k.shape), q.dtype, q.device, visible is not None, learns)


@lru_cache(maxsize=1)
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    # without compilation it builds the whole matrix of scores
    return torch.compile(flex_attention, dynamic=False)
