"""Ten minutes on one GPU: this project beside diffusers, eager and compiled, one JSON line each.

    python -m benchmarks.gpu [--only calibrate train_dit ...] [--seconds 525] [--smoke] > gpu.jsonl

Random weights and data (zeros multiply faster). Sides take turns, events time them, medians count.
Every line is flushed as it is measured, groups begin only while time is left, and a part that fails
prints its reason and does not stop the others. `--smoke` runs all of it with tiny shapes on any
device; without a GPU, graphs and the kernels of GPUs are skipped and said so.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ldm  # noqa: F401  before diffusers
from benchmarks.gpu_bench import Arm, Bench, emit, tried
from benchmarks.pairs import Pair, made
from ldm.models.attention import KERNELS, attend
from ldm.training.ema import Ema
from ldm.types import TextEmbedding


def calibrate(bench: Bench) -> None:
    """G0: what this device can do, and every attention kernel on the shapes of the models."""
    side = bench.size(8192, 64)
    a, b = (torch.randn(side, side, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    ms = bench.timed({"mm": lambda: a @ b})["mm"]
    measured = 2 * side**3 / ms / 1e9
    emit("calibrate", f"bf16 product {side}", ms=ms, tflops=measured)
    bench.peak = measured if bench.has_gpu and not bench.is_smoke else bench.peak
    one = torch.zeros(1, device=bench.device)
    emit("calibrate", "launch", ms=bench.timed({"add": lambda: one.add_(1)})["add"])
    shapes = bench.size(
        [(128, 16, 256, 256, 72), (2, 8, 4096, 4096, 40), (2, 8, 1024, 1024, 80)]
        + [(2, 8, 4096, 77, 40)],
        [(2, 2, 16, 16, 8), (2, 2, 16, 7, 8)],
    )
    for shape in shapes:
        for learns in (False, True):
            _attention(bench, shape, learns)


def _attention(bench: Bench, shape: tuple[int, ...], learns: bool) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    batch, heads, queries, keys, width = shape
    draws = [
        torch.randn(batch, heads, n, width, device=bench.device, dtype=torch.bfloat16)
        for n in (queries, keys, keys)
    ]
    q, k, v = (x.requires_grad_(learns) for x in draws)
    gradient = torch.randn_like(q)

    def arm(run: Callable[[], Tensor]) -> Arm:
        if not learns:
            return run
        return lambda: torch.autograd.grad(run(), (q, k, v), gradient)

    def fused(backend: SDPBackend) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v)

        return run

    arms: dict[str, Callable[[], Tensor]] = {
        "flash": fused(SDPBackend.FLASH_ATTENTION),
        "efficient": fused(SDPBackend.EFFICIENT_ATTENTION),
        "cudnn": fused(SDPBackend.CUDNN_ATTENTION),
        "written": lambda: KERNELS["written"](q, k, v, None),
        **{name: lambda name=name: attend(q, k, v, None, name) for name in ("xformers", "flex")},
    }
    what = f"{'learning' if learns else 'forward'} {shape}"
    for name, run in arms.items():
        if not bench.has_gpu and name in ("efficient", "cudnn", "xformers", "flex"):
            emit("calibrate", f"attention {name} {what}", skipped="needs a GPU")
            continue
        with tried("calibrate", f"attention {name} {what}"):
            ms = bench.timed({name: arm(run)})[name]
            flops = 4 * batch * heads * queries * keys * width * (3.5 if learns else 1)
            emit("calibrate", f"attention {name} {what}", ms=ms, tflops=flops / ms / 1e9)


def dit_xl(bench: Bench) -> Pair:
    """The class-conditional DiT-XL/2 and diffusers' class of it."""
    from diffusers import DiTTransformer2DModel

    from ldm.models.dit import DiT, DiTConfig
    from ldm.models.dit_diffusers import dit_weights_from_diffusers

    heads, layers = bench.size((16, 28), (2, 2))
    peer = made(
        lambda: DiTTransformer2DModel(
            num_attention_heads=heads,
            attention_head_dim=bench.size(72, 8),
            in_channels=4,
            out_channels=8,
            num_layers=layers,
            sample_size=bench.size(32, 8),
        )
    )
    block = peer.transformer_blocks[0].norm1.emb
    for other in peer.transformer_blocks[1:]:
        # diffusers keeps these in every block; the published weights have them once
        other.norm1.emb.load_state_dict(block.state_dict())
    config = DiTConfig.from_diffusers(dict(peer.config) | {"_class_name": type(peer).__name__})
    ours = DiT(config)
    ours.load_state_dict(dit_weights_from_diffusers(peer.state_dict(), config))
    call = lambda net, x, t, text: net(  # noqa: E731
        x, t.long(), class_labels=text.pooled.argmax(1), return_dict=False
    )[0]
    return Pair("dit-xl-2", ours, peer, call, 4, 1)


def _labels(batch: int) -> TextEmbedding:
    """Classes as a class-conditional DiT reads them: one-hot, the last place for none."""
    labels = torch.randint(0, 1000, (batch,), generator=torch.Generator().manual_seed(0))
    rows = F.one_hot(labels, 1001).float()
    return TextEmbedding(torch.zeros(batch, 1, 1), torch.ones(batch, 1, dtype=torch.bool), rows)


def sd15(bench: Bench) -> Pair:
    """The UNet of Stable Diffusion 1.5."""
    from benchmarks.pairs import unet_pair

    return unet_pair(*bench.size(((320, 640, 1280, 1280), 768), ((16, 32, 32, 32), 32)))


def compiled(net: Any) -> Any:
    """A copy compiled block by block, which takes seconds and not minutes."""
    copy = deepcopy(net)
    lists = [m for m in copy.modules() if isinstance(m, nn.ModuleList)]
    for blocks in lists:
        for block in blocks:
            if type(block).__name__ in REGIONS:
                block.compile()
    return copy


REGIONS = (
    *("Block", "BasicTransformerBlock", "JointTransformerBlock", "JointBlock"),
    *("ResnetBlock2D", "ResnetBlock", "Transformer2DModel", "SpatialTransformer"),
)


def training(bench: Bench, group: str, pair: Pair, batches: list[int], side: int) -> None:
    """G1, G2, G8: whole steps with optimizer and average: images/s, MFU and peak memory."""
    for batch in batches:
        x, t, text = pair.inputs(batch, side)
        if pair.name == "dit-xl-2":
            text = _labels(batch)
        x, t, text = x.to(bench.device), t.to(bench.device), text.to(bench.device)
        flops = 3 * _forward_flops(pair.ours, x, text)
        arms: dict[str, tuple[Any, bool]] = {
            "peer eager": (deepcopy(pair.peer), False),
            "ours eager": (deepcopy(pair.ours), True),
        }
        if bench.has_gpu:
            arms |= {
                "peer compiled": (compiled(pair.peer), False),
                "ours compiled": (compiled(pair.ours).to(memory_format=torch.channels_last), True),
            }
        for name, (net, is_ours) in arms.items():
            with tried(group, f"{name} B{batch}"):
                step = _step(bench, pair, net, is_ours, (x, t, text))
                ms = bench.timed({name: step})[name]
                emit(
                    group,
                    f"{name} B{batch}",
                    ms=ms,
                    images_per_second=1e3 * batch / ms,
                    mfu=flops / ms / 1e9 / bench.peak,
                    peak_gb=bench.peak_gb(step),
                )
                net.to("cpu")
        if not bench.has_gpu:
            emit(group, f"compiled B{batch}", skipped="needs a GPU")


def _forward_flops(net: Any, x: Tensor, text: TextEmbedding) -> int:
    """Operations of a forward pass, two for a multiplication with its addition."""
    from torch.utils.flop_counter import FlopCounterMode

    told = torch.zeros(len(x), device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        deepcopy(net).to("meta")(x.to("meta"), told, text.to("meta"))
    return int(counter.get_total_flops())


Inputs = tuple[Tensor, Tensor, TextEmbedding]


def _step(bench: Bench, pair: Pair, net: Any, is_ours: bool, inputs: Inputs) -> Arm:
    from diffusers.training_utils import EMAModel

    x, t, text = inputs
    net = net.to(bench.device).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True if is_ours else None)
    average: Any = Ema(net, 0.9999) if is_ours else EMAModel(net.parameters())

    def step() -> None:
        with torch.autocast(bench.device.type, torch.bfloat16):
            out = net(x, t, text) if is_ours else pair.call_peer(net, x, t, text)
        out.float().square().mean().backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if is_ours:
            average.update(net, 1)
        else:
            average.step(net.parameters())

    return step


def train_dit(bench: Bench) -> None:
    """G1 on 256 tokens."""
    training(bench, "train_dit", dit_xl(bench), bench.size([64, 128, 256], [2]), bench.size(32, 8))


def train_unet(bench: Bench) -> None:
    """G2 on latents of 512 pixels."""
    training(bench, "train_unet", sd15(bench), bench.size([16, 32], [1]), bench.size(64, 8))


def transformers(bench: Bench) -> None:
    """G3: PixArt-XL and SD 3 at 512 pixels, forward and backward."""
    from benchmarks.pairs import dit_pair, mmdit_pair

    pairs = bench.size(
        [(dit_pair, 28, 18, 4096), (mmdit_pair, 24, 24, 4096)], [(dit_pair, 1, 1, 8)]
    )
    for build, layers, heads, width in pairs:
        pair = build(layers, heads, width)
        training(bench, f"transformers {pair.name}", pair, [bench.size(8, 1)], bench.size(64, 8))


def latency(bench: Bench) -> None:
    """G4, G5: sampling with guidance, split into a fixed part and one per evaluation."""
    pair = sd15(bench).to(torch.bfloat16)
    side = bench.size(64, 8)
    for batch in bench.size([1, 8], [1]):
        loops = _loops(bench, pair, batch, side)
        for name, loop in loops.items():
            with tried("latency", f"{name} B{batch}"):
                few, many = bench.size((10, 50), (1, 2))
                first, last = (bench.timed({name: loop(steps)})[name] for steps in (few, many))
                per_step = (last - first) / (many - few)
                emit(
                    "latency",
                    f"{name} B{batch}",
                    steps=many,
                    ms=last,
                    per_evaluation_ms=per_step,
                    fixed_ms=last - many * per_step,
                    images_per_second=1e3 * batch / last,
                )
    if not bench.has_gpu:
        emit("latency", "whole-loop graph", skipped="needs a GPU")


def _loops(bench: Bench, pair: Pair, batch: int, side: int) -> dict[str, Callable[[int], Arm]]:
    """Sampling loops by name: steps -> a call that draws `batch` latents with DDIM and guidance."""
    from benchmarks.gpu_loops import graphed, our_loop, peer_loop

    x, _, text = pair.inputs(batch, side)
    x, text = x.to(bench.device), text.to(bench.device, torch.bfloat16)
    ours, peer = deepcopy(pair.ours).to(bench.device), deepcopy(pair.peer).to(bench.device)
    loops = {
        "peer eager": lambda steps: peer_loop(peer, x, text, steps),
        "ours eager": lambda steps: our_loop(ours, x, text, steps),
    }
    if bench.has_gpu:
        fast = compiled(ours).to(memory_format=torch.channels_last)
        peer_fast = torch.compile(
            deepcopy(peer).to(memory_format=torch.channels_last), mode="reduce-overhead"
        )
        loops |= {
            "peer compiled": lambda steps: peer_loop(peer_fast, x, text, steps),
            "ours graph": lambda steps: graphed(our_loop(ours, x, text, steps)),
            "ours compiled graph": lambda steps: graphed(our_loop(fast, x, text, steps)),
        }
    return loops


def vae(bench: Bench) -> None:
    """G6: the codec of Stable Diffusion, bf16, channels-last against the peer's layout."""
    from benchmarks.pairs import vae_pair

    ours, peer = vae_pair(bench.size((128, 256, 512, 512), (8, 16)))
    ours = ours.to(bench.device, torch.bfloat16).to(memory_format=torch.channels_last)
    peer = peer.to(bench.device, torch.bfloat16)
    for side, batch in bench.size([(256, 16), (512, 16), (512, 1)], [(16, 1)]):
        x = torch.randn(batch, 3, side, side, device=bench.device, dtype=torch.bfloat16)
        with torch.inference_mode(), tried("vae", f"{side} B{batch}"):
            z = ours.moments(x).chunk(2, dim=1)[0].bfloat16()
            arms: dict[str, Arm] = {
                "peer encode": lambda x=x: peer.encode(x),
                "ours encode": lambda x=x: ours.moments(x),
                "peer decode": lambda z=z: peer.decode(z),
                "ours decode": lambda z=z: ours.decode_raw(z),
            }
            for name, ms in bench.timed(arms).items():
                rate = 1e3 * batch / ms
                emit("vae", f"{name} {side} B{batch}", ms=ms, images_per_second=rate)


def optimizer(bench: Bench) -> None:
    """G7: AdamW and the average at the size of Stable Diffusion's UNet."""
    from diffusers.training_utils import EMAModel

    net = sd15(bench).ours.to(bench.device)
    count = sum(p.numel() for p in net.parameters())
    for weight in net.parameters():
        weight.grad = torch.randn_like(weight)
    default, fused = (torch.optim.AdamW(net.parameters(), fused=f) for f in (None, True))
    peer, ours = EMAModel(net.parameters()), Ema(net, 0.999)
    arms: dict[str, Arm] = {
        "AdamW default": default.step,
        "AdamW fused": fused.step,
        "peer average": lambda: peer.step(net.parameters()),
        "our average": lambda: ours.update(net, 10),
    }
    for name, ms in bench.timed(arms).items():
        moved = count * (28 if "Adam" in name else 12)  # bytes read and written, float32
        emit("optimizer", name, ms=ms, terabytes_per_second=moved / ms / 1e9)


def feed(bench: Bench) -> None:
    """G9: a step on latents from memory against one on data that is already on the device."""
    pair = dit_xl(bench)
    batch, side = bench.size((128, 32), (2, 8))
    x, t, _ = pair.inputs(batch, side)
    x, t, text = x.to(bench.device), t.to(bench.device), _labels(batch).to(bench.device)
    step = _step(bench, pair, pair.ours, True, (x, t, text))
    stored = torch.randn(4 * batch, *x.shape[1:]).half()
    stored = stored.pin_memory() if bench.has_gpu else stored
    place = 0

    def fed() -> None:
        nonlocal place
        place = (place + batch) % len(stored)
        x.copy_(stored[place : place + batch], non_blocking=True)
        step()

    times = bench.timed({"synthetic": step, "fed": fed})
    emit("feed", "share of a step", **times, ratio=times["synthetic"] / times["fed"])


GROUPS: dict[str, Callable[[Bench], None]] = {
    "calibrate": calibrate,
    "train_dit": train_dit,
    "train_unet": train_unet,
    "latency": latency,
    "vae": vae,
    "optimizer": optimizer,
    "feed": feed,
    "transformers": transformers,
}


def main() -> None:
    """Runs the groups while time is left."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--seconds", type=float, default=525, help="begin no group after this")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, any device")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not args.smoke:
        sys.exit("this needs a GPU; --smoke runs it with tiny shapes anywhere")
    began = time.monotonic()
    bench = Bench(device, args.smoke, repeats=1 if args.smoke else 20)
    name = torch.cuda.get_device_name() if bench.has_gpu else "cpu"
    emit("start", "device", device=name, torch=torch.__version__)
    for group in args.only:
        if time.monotonic() - began > args.seconds:
            emit(group, "all", skipped="no time left")
            continue
        with tried(group, "all"):
            GROUPS[group](bench)
        emit(group, "done", seconds=time.monotonic() - began)


if __name__ == "__main__":
    main()
