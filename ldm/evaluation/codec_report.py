"""What `ldm vae doctor` found, as JSON, as a page of text with verdicts, and as a picture."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ldm.evaluation.codec import LatentStatistics
from ldm.evaluation.codec_numerics import FP16_MAX, Precision
from ldm.inference.pipeline import to_images

FILE, SHEET = "vae-doctor.json", "vae-doctor.png"
DEAD_NATS = 0.01
"""Nats per latent position below which a channel carries nothing: a signal of a seventh of the
noise has as much."""
DEAD_SIGNAL = 0.1
"""The same by standard deviation of the posterior means against that of samples: a channel whose
mean is constant, but not 0, has KL and carries nothing."""
DEAD_SHARE = 1e-3
"""The same for a codec without noise: standard deviation against the widest channel's."""
OFF_MEAN, OFF_STD = 0.2, 1.25
"""Mean, and factor between standard deviations, beyond which stored statistics do not fit."""
SURE = 3.0
"""Standard errors beyond which a difference is no accident of few pictures."""
ALIKE = 0.9
"""Correlation of two channels that say the same."""
HEADROOM = 4.0
"""fp16 with less room than this factor: other pictures may overflow."""
VISIBLE_DB = 40.0
"""PSNR of half precision against float32 below which differences begin to be seen."""
POOR_DB = 20.0
NOISY_SHARE = 0.5
"""High-frequency share of latents that are more noise than picture; white noise has 0.80."""
MAPS, TILE_PX, GAP_PX, HEAD_PX = 16, 112, 4, 30
FAULT, WARNING, OK = "fault", "warning", "ok"
COLOURS = {FAULT: "#c62828", OK: "#222222"}


@dataclass
class Findings:
    """Everything that was measured; what could not be is None, with its reason in `missing`.

    Args:
        kind: what the pictures are to the codec: "held out", "trained on" or "given".
        ids: of the pictures, N.
        image_px: their side.
        psnr, ssim: of each picture, (N,).
        lpips: mean.
        frechet: distance between the features of pictures and reconstructions.
        features: name of those features.
        latents: statistics of normalised latents.
        latent_shape: (C, h, w).
        measured: whether latents are standardised by statistics measured per channel.
        spectrum: share of high frequencies in `latents` and `pictures`.
        equivariance: PSNR of transformed latents, see `equivariance`.
        activations: largest output by layer of `encoder` and `decoder`, in float32.
        precisions: results in bf16 and fp16.
        shown: for the sheet, `pixels` and `restored` (K, 3, S, S), `latents` (M, C, h, w), M >= K.
        unreadable, missing: reasons, by picture and by measure.
    """

    kind: str
    ids: tuple[str, ...]
    image_px: int
    psnr: Tensor
    ssim: Tensor | None
    lpips: float | None
    frechet: float
    features: str
    latents: LatentStatistics
    latent_shape: tuple[int, ...]
    measured: bool
    spectrum: dict[str, float]
    equivariance: dict[str, float | None]
    activations: dict[str, dict[str, float]]
    precisions: dict[str, Precision]
    shown: dict[str, Tensor]
    unreadable: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


def as_json(found: Findings, model: str = "") -> dict[str, Any]:
    """Every figure, with the verdicts; a PSNR is null where pictures are identical."""
    s = found.latents
    worst = int(found.psnr.argmin())
    facts: dict[str, Any] = {
        "model": model,
        "pictures": {
            "kind": found.kind,
            "count": len(found.ids),
            "image_px": found.image_px,
            "unreadable": found.unreadable,
        },
        "reconstruction": {
            "psnr": _number(found.psnr.mean()),
            "psnr_worst": _number(found.psnr[worst]),
            "worst_picture": found.ids[worst],
            "identical": bool(found.psnr.isinf().all()),
            "ssim": None if found.ssim is None else float(found.ssim.mean()),
            "lpips": found.lpips,
            "frechet": {"distance": found.frechet, "features": found.features},
        },
        "latents": {
            "shape": list(found.latent_shape),
            "standardised": found.measured,
            "deterministic": s.certain,
            "kl": None if s.certain else float(s.kl.sum()),
            "std": float(s.std.square().mean().sqrt()),
            "channels": [
                {
                    "mean": float(s.mean[k]),
                    "std": float(s.std[k]),
                    "mean_error": float(s.mean_error[k]),
                    "std_error": float(s.std_error[k]),
                    "signal_std": float(s.signal_std[k]),
                    "kl": None if s.certain else float(s.kl[k]),
                    "dead": _dead(s, k),
                }
                for k in range(len(s.mean))
            ],
            "correlation": s.correlation.tolist(),
            "high_frequency_share": found.spectrum,
            "equivariance": {k: _number(v) for k, v in found.equivariance.items()},
        },
        "precision": {
            **{name: asdict(p) | {"psnr": _number(p.psnr)} for name, p in found.precisions.items()},
            "largest": {part: _largest(seen) for part, seen in found.activations.items()},
            "layers": found.activations,
        },
        "missing": found.missing,
    }
    return facts | {"verdicts": verdicts(facts)}


def _number(value: Tensor | float | None) -> float | None:
    return None if value is None or math.isinf(float(value)) else float(value)


def _dead(s: LatentStatistics, k: int) -> bool:
    if s.certain:
        return bool(s.signal_std[k] <= DEAD_SHARE * s.signal_std.max())
    return bool(s.kl[k] < DEAD_NATS or s.signal_std[k] < DEAD_SIGNAL * s.std[k])


def _largest(seen: dict[str, float]) -> dict[str, Any]:
    """The layer with the largest output; of equal ones the first, which is the innermost."""
    layer = max(seen, key=lambda name: seen[name])
    value = seen[layer]
    return {"layer": layer, "value": value, "fp16_headroom": FP16_MAX / value if value else None}


def verdicts(facts: dict[str, Any]) -> list[dict[str, str]]:
    """What the figures mean, one line each, faults first."""
    found = [
        *_quality(facts["reconstruction"]),
        *_channels(facts["latents"]),
        *_statistics(facts["latents"]),
        *_spectrum(facts["latents"]),
        *_precision(facts["precision"]),
    ]
    order = (FAULT, WARNING, OK)
    return sorted(found, key=lambda line: order.index(line["level"]))


def _line(level: str, about: str, words: str) -> dict[str, str]:
    return {"level": level, "about": about, "text": words}


def _quality(facts: dict[str, Any]) -> list[dict[str, str]]:
    value = facts["psnr"]
    if value is not None and value < POOR_DB:
        words = f"reconstructions are poor: {value:.1f} dB; train longer, or with more channels"
        return [_line(WARNING, "reconstruction", words)]
    return []


def _channels(facts: dict[str, Any]) -> list[dict[str, str]]:
    rows, lines = facts["channels"], []
    for k, row in enumerate(rows):
        if row["dead"]:
            how = (
                f"its std is {row['signal_std']:.1e}"
                if row["kl"] is None
                else f"KL {row['kl']:.2f} nats a position, std of its means {row['signal_std']:.2g}"
            )
            advice = "lower loss.kl_weight, or train with fewer latent_channels"
            lines.append(_line(FAULT, f"channel {k}", f"carries nothing: {how}; {advice}"))
    for i, row in enumerate(facts["correlation"]):
        for j in range(i):
            if abs(row[j]) > ALIKE and not (rows[i]["dead"] or rows[j]["dead"]):
                words = f"say the same: their correlation is {row[j]:.2f}"
                lines.append(_line(WARNING, f"channels {j} and {i}", words))
    if not lines:
        kl = [row["kl"] for row in rows if row["kl"] is not None]
        nats = f", KL {min(kl):.2f} to {max(kl):.2f} nats a position" if kl else ""
        lines.append(_line(OK, "channels", f"all {len(rows)} carry something{nats}"))
    return lines


def _statistics(facts: dict[str, Any]) -> list[dict[str, str]]:
    """Whether latents have mean 0 and std 1, as a denoiser expects: per channel where stored so."""
    rows, lines = facts["channels"], []
    if not facts["standardised"]:
        std = facts["std"]
        if not 1 / OFF_STD**2 < std < OFF_STD**2:
            words = f"latents have std {std:.2f}, a denoiser expects 1: set scaling_factor anew"
            return [_line(FAULT, "scaling_factor", words)]
        return [_line(OK, "scaling_factor", f"fits: latents have std {std:.2f}")]
    for k, row in enumerate(rows):
        off_mean = abs(row["mean"]) - SURE * row["mean_error"] > OFF_MEAN
        ratio = abs(math.log(max(row["std"], 1e-30)))
        off_std = ratio - SURE * row["std_error"] / max(row["std"], 1e-30) > math.log(OFF_STD)
        if off_mean or off_std:
            words = (
                f"stored statistics do not fit: latents have mean {row['mean']:.2f} and std "
                f"{row['std']:.2f} on these pictures, a denoiser expects 0 and 1"
            )
            lines.append(_line(FAULT, f"channel {k}", words))
    return lines or [_line(OK, "statistics", "the stored mean and std of every channel fit")]


def _spectrum(facts: dict[str, Any]) -> list[dict[str, str]]:
    share = facts["high_frequency_share"]["latents"]
    if share > NOISY_SHARE:
        words = f"{share:.0%} of their energy is high frequencies (white noise: 80%); hard to learn"
        return [_line(WARNING, "latents", words)]
    return []


def _precision(facts: dict[str, Any]) -> list[dict[str, str]]:
    lines = []
    largest = max(facts["largest"].values(), key=lambda seen: seen["value"])
    where, headroom = f"{largest['layer']} reaches {largest['value']:.3g}", largest["fp16_headroom"]
    for name in ("bf16", "fp16"):
        seen = facts[name]
        if seen["reason"]:
            lines.append(_line(WARNING, name, f"could not be tried: {seen['reason']}"))
        elif not seen["finite"]:
            words = f"overflows: {where}, fp16 ends at {FP16_MAX:.0f}; use bf16 or fp32"
            lines.append(_line(FAULT, name, words))
        elif seen["psnr"] is not None and seen["psnr"] < VISIBLE_DB:
            words = f"changes pictures visibly: {seen['psnr']:.1f} dB against fp32"
            lines.append(_line(WARNING, name, words))
        elif name == "fp16" and headroom is not None and headroom < HEADROOM:
            words = f"has little room: {where}, {headroom:.1f} times below its end"
            lines.append(_line(WARNING, name, words))
        else:
            error = f"pixels differ by {seen['max_error']:.1f} of 255 at most"
            if name == "fp16" and headroom is not None:
                error += f"; {where}, {headroom:.0f} times below its end"
            lines.append(_line(OK, name, f"is safe: {error}"))
    return lines


def text(facts: dict[str, Any]) -> str:
    """The report as a page of text."""
    seen, r, z = facts["pictures"], facts["reconstruction"], facts["latents"]
    channels, height, width = z["shape"]
    kept = 3 * seen["image_px"] ** 2 / (channels * height * width)
    lines = [
        f"{facts['model']}: {seen['count']} pictures {seen['kind']}, {seen['image_px']} pixels a "
        f"side; latents {channels} x {height} x {width}, {kept:.0f} times fewer numbers",
        "",
        f"PSNR     {_db(r['psnr'])}   (worst {_db(r['psnr_worst'])}: {r['worst_picture']})",
        f"SSIM     {_or_why(facts, 'ssim', r['ssim'])}",
        f"LPIPS    {_or_why(facts, 'lpips', r['lpips'])}",
        f"Frechet  {r['frechet']['distance']:.4g}   (features: {r['frechet']['features']})",
        "",
        "channel    mean     std   signal      KL",
    ]
    for k, row in enumerate(z["channels"]):
        nats = "-" if row["kl"] is None else f"{row['kl']:.2f}"
        lines.append(
            f"{k:7}{row['mean']:8.2f}{row['std']:8.2f}{row['signal_std']:9.2f}{nats:>8}"
            + ("  dead" if row["dead"] else "")
        )
    share, turned = z["high_frequency_share"], z["equivariance"]
    half = "" if turned["half_psnr"] is None else f", at half size {turned['half_psnr']:.1f} dB"
    lines += [
        "",
        f"high frequencies  {share['latents']:.0%} of the latents' energy, "
        f"{share['pictures']:.0%} of the pictures'",
        f"mirrored latents  {_db(turned['mirror_psnr'])}{half}",
        "",
        *(f"{line['level']:8} {line['about']}: {line['text']}" for line in facts["verdicts"]),
    ]
    if seen["unreadable"]:
        name, reason = next(iter(seen["unreadable"].items()))
        lines.append(f"{len(seen['unreadable'])} pictures could not be read; {name}: {reason}")
    return "\n".join(lines)


def _db(value: float | None) -> str:
    return "inf (identical)" if value is None else f"{value:.2f} dB"


def _or_why(facts: dict[str, Any], name: str, value: float | None) -> str:
    return f"{value:.4f}" if value is not None else f"not measured: {facts['missing'][name]}"


def sheet(found: Findings) -> Image.Image:
    """Original, reconstruction, amplified difference and latent maps; histograms below.

    Maps run from -3 (black) to 3 (white). A histogram shows the latents against the standard
    normal, which is what a denoiser is trained to draw.
    """
    pixels, restored = found.shown["pixels"], found.shown["restored"].clamp(-1, 1)
    difference = (restored - pixels).abs()
    # the brightest hundredth may clip; a power of two is easy to think with
    level = float(difference.flatten().double().quantile(0.99)) if difference.numel() else 0.0
    gain = 2.0 ** min(max(math.floor(-math.log2(max(level, 1e-9) / 2)), 0), 7)
    latents = found.shown["latents"]
    maps = latents[: len(pixels), :MAPS]
    heads = ["original", "reconstruction", f"difference x{gain:.0f}"]
    colours = [COLOURS[OK]] * 3
    for k in range(maps.shape[1]):
        kl = "" if found.latents.certain else f"  KL {float(found.latents.kl[k]):.2f}"
        heads.append(f"channel {k}{kl}")
        colours.append(COLOURS[FAULT if _dead(found.latents, k) else OK])
    step = TILE_PX + GAP_PX
    size = (len(heads) * step + GAP_PX, HEAD_PX + (len(pixels) + 1) * step + GAP_PX)
    page = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(12)
    for column, (head, colour) in enumerate(zip(heads, colours, strict=True)):
        pen.text((GAP_PX + column * step, 8), head, fill=colour, font=font)
    for row in range(len(pixels)):
        tiles = to_images(torch.stack([pixels[row], restored[row], gain * difference[row] - 1]))
        tiles += [to_images((one / 3).expand(1, 3, *one.shape))[0] for one in maps[row]]
        for column, tile in enumerate(tiles):
            # nearest neighbour: a smooth enlargement would hide what the pixels are like
            tile = tile.resize((TILE_PX, TILE_PX), Image.Resampling.NEAREST)
            page.paste(tile, (GAP_PX + column * step, HEAD_PX + row * step))
    for k in range(maps.shape[1]):
        place = (GAP_PX + (3 + k) * step, HEAD_PX + len(pixels) * step)
        _histogram(pen, place, latents[:, k], colours[3 + k])
    return page


def _histogram(pen: Any, place: tuple[int, int], values: Tensor, colour: str) -> None:
    """Density of values from -4 to 4, 0.7 high at most, with that of the standard normal."""
    left, bottom = place[0], place[1] + TILE_PX
    bars = TILE_PX // 4
    counts = torch.histc(values.float().flatten(), bars, -4, 4)
    density = counts / max(values.numel(), 1) * bars / 8
    for k, height in enumerate((density / 0.7).clamp(0, 1).tolist()):
        top = bottom - round(height * TILE_PX)
        pen.rectangle((left + 4 * k, top, left + 4 * k + 2, bottom), fill=colour)
    curve = [
        (
            left + x,
            bottom - math.exp(-(((x / TILE_PX - 0.5) * 8) ** 2) / 2) * 0.3989 / 0.7 * TILE_PX,
        )
        for x in range(TILE_PX)
    ]
    pen.line(curve, fill="#1565c0", width=1)
