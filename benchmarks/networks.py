"""Rows of single calls of a network: forward, forward and backward, plain and tuned."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.measure import Arm, Budget, Row, assert_equal, in_turns
from benchmarks.pairs import Pair, cast, dit_pair, mmdit_pair, unet_pair, vae_pair
from ldm.models.backends import choose
from ldm.types import TextEmbedding

PLAIN_GOAL = 0.98
PEER = "diffusers"
PEER_FLAG = 'diffusers + "medium"'


class Shape(NamedTuple):
    """A batch of square latents."""

    batch: int
    side: int

    def __str__(self) -> str:
        return f"{self.side}x{self.side} B{self.batch}"


def unet(budget: Budget) -> Iterator[Row]:
    """The UNet of 35 M parameters."""
    if budget.is_smoke:
        yield from _rows(unet_pair((16, 32, 32, 32), 32), [Shape(1, 8)], budget)
        return
    yield from _rows(unet_pair(), [Shape(8, 16), Shape(2, 32)], budget)


def dit(budget: Budget) -> Iterator[Row]:
    """The DiT of 30 M parameters against PixArt."""
    if budget.is_smoke:
        yield from _rows(dit_pair(2, 1, 32), [Shape(1, 8)], budget)
        return
    yield from _rows(dit_pair(), [Shape(8, 16), Shape(4, 32)], budget)


def mmdit(budget: Budget) -> Iterator[Row]:
    """The MM-DiT of 63 M parameters against SD 3."""
    if budget.is_smoke:
        yield from _rows(mmdit_pair(2, 1, 32), [Shape(1, 8)], budget)
        return
    yield from _rows(mmdit_pair(), [Shape(8, 16)], budget)


def _rows(pair: Pair, shapes: list[Shape], budget: Budget) -> Iterator[Row]:
    half = pair.to(torch.bfloat16)
    for shape in shapes:
        inputs = pair.inputs(*shape)
        yield from _forward(pair, shape, inputs, budget)
        x, t, text = inputs
        yield from _forward(half, shape, (x.bfloat16(), t, cast(text, torch.bfloat16)), budget)
        for precision in ("fp32", "bf16"):
            yield from _learning(pair, shape, inputs, precision, budget)


Inputs = tuple[Tensor, Tensor, TextEmbedding]


def _forward(pair: Pair, shape: Shape, inputs: Inputs, budget: Budget) -> Iterator[Row]:
    x, t, text = inputs
    precision = "fp32" if x.dtype == torch.float32 else "bf16"
    net = pair.tuned()
    with torch.inference_mode():
        own = pair.ours(x, t, text)
        kept = net.prepare(text, [float(t[0])])(float(t[0]))
        ready = net(x, t, kept)
        peer = pair.call_peer(pair.peer, x, t, text)
        # both sum in another order; bf16 has 8 bits
        limit = 2e-5 if precision == "fp32" else 6e-2
        assert_equal(own, peer, limit, f"{pair.name} {shape} {precision}")
        assert_equal(ready, peer, limit, f"{pair.name} {shape} {precision} tuned")

        arms: dict[str, Arm] = {
            PEER: lambda: pair.call_peer(pair.peer, x, t, text),
            "plain": lambda: pair.ours(x, t, text),
            "tuned": lambda: net(x, t, kept),
        }
        if precision == "fp32":
            arms[PEER_FLAG] = _flagged(arms[PEER])
        times = in_turns(arms, budget)
    name, what = f"{pair.name} forward {precision}", str(shape)
    yield times.row(f"{name} plain, {shape}", "plain", PEER, PLAIN_GOAL, shape=what)
    yield times.row(
        f"{name} tuned, {shape}", "tuned", PEER, None, shape=what, note="text and time kept"
    )
    if PEER_FLAG in arms:
        yield times.row(f"{name} tuned against flag, {shape}", "tuned", PEER_FLAG, None, shape=what)


TRAINING_GOALS = {
    ("unet", "bf16", 16): 1.4,
    ("unet", "bf16", 32): 1.1,
    ("dit", "bf16", 16): 1.3,
    ("dit", "fp32", 16): 1.5,
}


def _learning(
    pair: Pair, shape: Shape, inputs: Inputs, precision: str, budget: Budget
) -> Iterator[Row]:
    """Forward and backward as a training step makes them, bf16 by autocast."""
    x, t, text = inputs
    net = pair.tuned()

    def learning(model: Any, predict: Callable[[], Tensor]) -> Arm:
        def step() -> Tensor:
            model.zero_grad(set_to_none=True)
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                out = predict()
            loss = out.float().square().mean()
            loss.backward()
            return loss.detach()

        return step

    arms = {
        PEER: learning(pair.peer, lambda: pair.call_peer(pair.peer, x, t, text)),
        "plain": learning(pair.ours, lambda: pair.ours(x, t, text)),
        "tuned": learning(net, lambda: net(x, t, text)),
    }
    limit = 1e-4 if precision == "fp32" else 5e-2
    wanted = arms[PEER]()
    for arm in ("plain", "tuned"):
        assert_equal(arms[arm](), wanted, limit, f"{pair.name} {shape} {precision} loss, {arm}")
    mine, theirs = _gradient(pair.ours), _gradient(pair.peer)
    assert_equal(mine, theirs, limit, f"{pair.name} {shape} {precision} gradient")
    assert_equal(_gradient(net), theirs, limit, f"{pair.name} {shape} {precision} gradient, tuned")
    if precision == "fp32":
        arms[PEER_FLAG] = _flagged(arms[PEER])
    times = in_turns(arms, budget)
    goal = TRAINING_GOALS.get((pair.name, precision, shape.side))
    name, what = f"{pair.name} training {precision}", str(shape)
    yield times.row(f"{name} plain, {shape}", "plain", PEER, PLAIN_GOAL, shape=what)
    yield times.row(f"{name} tuned, {shape}", "tuned", PEER, goal, shape=what)
    if PEER_FLAG in arms:
        yield times.row(f"{name} tuned against flag, {shape}", "tuned", PEER_FLAG, None, shape=what)


def _gradient(net: Any) -> Tensor:
    """The norm of the whole gradient: parameters are named and cut differently on both sides."""
    return torch.stack([p.grad.norm() for p in net.parameters() if p.grad is not None]).norm()


def _flagged(arm: Arm) -> Arm:
    """The peer with the flag that a user could set: what is ours must be more than that."""

    def run() -> None:
        products: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
        former = products.fp32_precision
        products.fp32_precision = "bf16"
        try:
            arm()
        finally:
            products.fp32_precision = former

    return run


def compiled(budget: Budget) -> Iterator[Row]:
    """A training step of the DiT with six blocks, both sides compiled: minutes on one core."""
    pair = dit_pair(1, 1, 32) if budget.is_smoke else dit_pair(6)
    shape = Shape(1, 8) if budget.is_smoke else Shape(8, 16)
    x, t, text = pair.inputs(*shape)
    net = pair.tuned()
    backend = "eager" if budget.is_smoke else "inductor"
    ours = torch.compile(net, backend=backend)
    peer = torch.compile(pair.peer, backend=backend)

    def learning(model: Any, predict: Callable[[], Tensor]) -> Arm:
        def step() -> Tensor:
            model.zero_grad(set_to_none=True)
            with torch.autocast("cpu", torch.bfloat16):
                out = predict()
            loss = out.float().square().mean()
            loss.backward()
            return loss.detach()

        return step

    arms = {
        "compiled diffusers": learning(pair.peer, lambda: pair.call_peer(peer, x, t, text)),
        "ours": learning(net, lambda: ours(x, t, text)),
    }
    assert_equal(arms["ours"](), arms["compiled diffusers"](), 5e-2, "compiled dit loss")
    times = in_turns(arms, budget)
    yield times.row(
        f"dit training bf16 compiled, {shape}",
        "ours",
        "compiled diffusers",
        1.4,
        shape=f"{shape}, 6 blocks",
    )
    torch.compiler.reset()


def dispatch(budget: Budget) -> Iterator[Row]:
    """A narrow UNet as deep as Stable Diffusion's: what is timed is torch being told what to do."""
    widths = (16, 16, 32, 32) if budget.is_smoke else (32, 64, 128, 128)
    pair = unet_pair(widths, 64)
    shape = Shape(1, 8)
    x, t, text = pair.inputs(*shape)
    net = pair.tuned()
    with torch.inference_mode():
        kept = net.prepare(text, [500.0])(500.0)

        assert_equal(
            net(x, t, kept), pair.call_peer(pair.peer, x, t, text), 2e-5, "dispatch-bound unet"
        )
        times = in_turns(
            {
                PEER: lambda: pair.call_peer(pair.peer, x, t, text),
                "plain": lambda: pair.ours(x, t, text),
                "tuned": lambda: net(x, t, kept),
            },
            budget,
        )
    what = f"widths {widths}, {shape}"
    yield times.row("dispatch-bound forward", "tuned", PEER, 1.4, shape=what)
    yield times.row("dispatch-bound forward plain", "plain", PEER, None, shape=what)


def vae(budget: Budget) -> Iterator[Row]:
    """The VAE of 5.3 M parameters, 256 pixels, and its training pass at 64."""
    widths = (16, 32) if budget.is_smoke else (32, 64, 128, 128)
    side = 16 if budget.is_smoke else 256
    ours, peer = vae_pair(widths)
    yield from _vae_training(ours, peer, 16 if budget.is_smoke else 64, budget)
    for dtype in (torch.float32, torch.bfloat16):
        yield from _codec(*(net.to(dtype) for net in vae_pair(widths)), side, budget)


def _codec(ours: Any, peer: Any, side: int, budget: Budget) -> Iterator[Row]:
    from copy import deepcopy

    dtype = next(ours.parameters()).dtype
    precision = "fp32" if dtype == torch.float32 else "bf16"
    net = choose().install(deepcopy(ours))
    x = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0)).to(dtype)
    goal = None if precision == "fp32" else 1.25

    with torch.inference_mode():
        z = peer.encode(x).latent_dist.mean * peer.config.scaling_factor
        parts: dict[str, dict[str, Callable[[], Tensor]]] = {
            "encode": {
                PEER: lambda: peer.encode(x).latent_dist.parameters,
                "plain": lambda: ours.moments(x),
                "tuned": lambda: net.moments(x),
            },
            "decode": {
                PEER: lambda: peer.decode(z / peer.config.scaling_factor, return_dict=False)[0],
                "plain": lambda: ours.decode(z),
                "tuned": lambda: net.decode(z),
            },
        }
        for part, arms in parts.items():
            wanted = arms[PEER]()
            limit = 1e-4 if precision == "fp32" else 8e-2
            for arm in ("plain", "tuned"):
                assert_equal(arms[arm]().clamp(-30, 20), wanted, limit, f"vae {part} {arm}")
            times = in_turns(dict(arms), budget)
            name, shape = f"vae {part} {precision}", f"{side}x{side} B1"
            plain = PLAIN_GOAL if precision == "fp32" else None
            yield times.row(f"{name} plain", "plain", PEER, plain, shape=shape)
            yield times.row(f"{name} tuned", "tuned", PEER, goal, shape=shape)


def _vae_training(ours: Any, peer: Any, side: int, budget: Budget) -> Iterator[Row]:
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, side, side, generator=draws)
    noise = torch.zeros(4, 4, side // ours.downsample_factor, side // ours.downsample_factor)

    def own() -> Tensor:
        ours.zero_grad(set_to_none=True)
        loss = ours(x, noise)[0].square().mean()
        loss.backward()
        return loss.detach()

    def theirs() -> Tensor:
        peer.zero_grad(set_to_none=True)
        loss = peer(x, return_dict=False)[0].square().mean()  # its latent is the mean as well
        loss.backward()
        return loss.detach()

    assert_equal(own(), theirs(), 1e-4, "vae loss")
    assert_equal(_gradient(ours), _gradient(peer), 1e-4, "vae gradient")
    times = in_turns({PEER: theirs, "plain": own}, budget)
    yield times.row("vae training fp32 plain", "plain", PEER, PLAIN_GOAL, shape=f"{side}x{side} B4")
