"""The model card beside an export: what the model is, how it was made, how it is used.

README.md in the Hub's form (YAML in front), samples.png drawn by our pipeline, curves.png from
the run's metrics where matplotlib is installed.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ldm import __version__, storage
from ldm.checkpoint import Contract
from ldm.exchange.exportable import PIXART, SD3, T5_TOKENS, told_tokens
from ldm.exchange.exporting import Exported
from ldm.inference.images import Pictures

CARD, SAMPLES, CURVES, USAGE = "README.md", "samples.png", "curves.png", "usage.py"
PLOTTED = ("loss", "gradient_norm", "learning_rate")
"""Columns of metrics.jsonl that make the curves, as far as they are there."""
CONTRACT_ROWS = (
    *("process", "prediction", "clock", "latent_channels", "downsample_factor", "image_sizes"),
    *("caption_dropout", "max_tokens", "mask_rule", "learned_variance"),
    *("coupling", "offset_noise"),
)


@dataclass(frozen=True)
class Facts:
    """What a card says besides the contract.

    Args:
        title: name of the model.
        license: SPDX name or the Hub's word for it; None leaves the line out.
        exported: what was written for diffusers, or None for a single file.
        figures: lines of the comparison with diffusers; empty where there was none.
        config: the run's resolved configuration; empty for a published model.
        size: (height, width) of the usual picture.
        single: name of the single file, or None.
        prediction, tokenizer: what its reader has to be told, or None.
    """

    title: str
    license: str | None
    exported: Exported | None
    figures: Sequence[str]
    config: Mapping[str, Any]
    size: tuple[int, int]
    single: str | None = None
    prediction: str | None = None
    tokenizer: str | None = None


def write_card(
    folder: Path, contract: Contract, facts: Facts, pictures: Pictures, run: Path | None
) -> None:
    """Writes README.md, samples.png and, for a run with metrics, curves.png.

    Raises:
        LdmError: code IO.
    """
    storage.write_bytes(folder / SAMPLES, _png(pictures.grid()))
    has_curves = run is not None and write_curves(run / "metrics.jsonl", folder / CURVES)
    storage.write_text(folder / USAGE, usage(contract, facts))
    parts = [
        f"---\n{yaml.safe_dump(front_matter(facts), sort_keys=False, allow_unicode=True)}---",
        f"# {facts.title}",
        "A latent diffusion model that draws pictures from prompts, trained or imported and "
        f"exported with ldm-toolkit {__version__}.",
        f"![samples]({SAMPLES})",
        _prompts(pictures),
        "## Use",
        f"```python\n{usage(contract, facts)}```",
        *_draws(facts),
        "## What the weights mean",
        _table(contract),
        *_training(facts.config, has_curves),
    ]
    storage.write_text(folder / CARD, "\n\n".join(parts) + "\n")


def front_matter(facts: Facts) -> dict[str, Any]:
    """The YAML of the card."""
    data = facts.config.get("data", {})
    front: dict[str, Any] = {}
    if facts.license is not None:
        front["license"] = facts.license
    front["library_name"] = "diffusers"
    front["pipeline_tag"] = "text-to-image"
    tags = ["text-to-image", "latent-diffusion", "ldm-toolkit"]
    front["tags"] = tags + ([f"diffusers:{facts.exported.pipeline}"] if facts.exported else [])
    if data.get("source") == "huggingface" and data.get("path"):
        front["datasets"] = [data["path"]]
    return front


def usage(contract: Contract, facts: Facts) -> str:
    """A program that draws one picture with the exported model, for its own directory."""
    sampling = contract.sampling
    cfg = max(1.0, float(sampling["cfg_scale"] or 1.0))
    height, width = facts.size
    if facts.single is not None:
        return _single_usage(facts.single, facts)
    extra = ""
    if facts.exported is not None and facts.exported.pipeline == SD3:
        tokens = told_tokens(contract.text_settings)
        extra = f"    max_sequence_length={tokens},\n" if tokens != T5_TOKENS else ""
    if facts.exported is not None and facts.exported.pipeline == PIXART:
        extra = (
            f"    max_sequence_length={contract.max_tokens},\n"
            "    use_resolution_binning=False,\n"
            "    clean_caption=False,\n"
        )
    return (
        "import torch\nfrom diffusers import DiffusionPipeline\n\n"
        'pipe = DiffusionPipeline.from_pretrained(".")\n'
        "picture = pipe(\n"
        '    "a red circle",\n'
        f"    num_inference_steps={sampling['steps']},\n"
        f"    guidance_scale={cfg:g},\n"
        f"    height={height},\n"
        f"    width={width},\n"
        "    generator=torch.Generator().manual_seed(0),\n"
        f"{extra}"
        ").images[0]\n"
        'picture.save("picture.png")\n'
    )


def _single_usage(single: str, facts: Facts) -> str:
    height, width = facts.size
    open_values = {
        name: value
        for name, value in (("prediction", facts.prediction), ("tokenizer", facts.tokenizer))
        if value is not None
    }
    said = ", ".join(f"{name}={json.dumps(value)}" for name, value in open_values.items())
    more, needed = ("", "")
    if said:
        more = f", options=Options({said})"
        needed = "from ldm.exchange.opening import Options\n"
    return (
        "# other programs, such as ComfyUI, look for it in their folder of checkpoints\n"
        f"{needed}from ldm.inference.pipeline import Pipeline\n\n"
        f"pipe = Pipeline.from_pretrained({json.dumps(single)}{more})\n"
        f'picture = pipe("a red circle", size=({height}, {width}))[0]\n'
        'picture.save("picture.png")\n'
    )


def write_curves(metrics: Path, target: Path) -> bool:
    """Plots a run's metrics; False where there are none, or matplotlib is not installed."""
    rows = [json.loads(line) for line in _lines(metrics)]
    columns = [name for name in PLOTTED if any(name in row for row in rows)]
    if not columns:
        return False
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(4 * len(columns), 3), layout="constrained")
    for place, name in enumerate(columns, start=1):
        axes = figure.add_subplot(1, len(columns), place)
        seen = [row for row in rows if name in row]
        axes.plot([row["step"] for row in seen], [row[name] for row in seen])
        axes.set(title=name.replace("_", " "), xlabel="step")
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    storage.write_bytes(target, buffer.getvalue())
    return True


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def _prompts(pictures: Pictures) -> str:
    prompts = dict.fromkeys(request.prompt for request in pictures.requests)
    return "Prompts: " + "; ".join(f"*{prompt}*" for prompt in prompts) + "."


def _draws(facts: Facts) -> list[str]:
    parts = []
    if facts.figures:
        text = "\n".join(facts.figures)
        parts += [f"Compared with our own pipeline, equal noise, call by call:\n\n```\n{text}\n```"]
    if facts.exported is not None and facts.exported.notes:
        parts += ["\n".join(f"- {note}" for note in facts.exported.notes)]
    return parts


def _table(contract: Contract) -> str:
    values = contract.to_json()
    rows = [f"| {name.replace('_', ' ')} | {values[name]} |" for name in CONTRACT_ROWS]
    sampling = ", ".join(f"{name} {value}" for name, value in values["sampling"].items())
    return "\n".join(["| | |", "|---|---|", *rows, f"| sampling | {sampling} |"])


def _training(config: Mapping[str, Any], has_curves: bool) -> list[str]:
    if not config:
        return []
    data, train = config.get("data", {}), config.get("train", {})
    where = f" ({data['path']})" if data.get("path") else ""
    text = (
        f"Data: {data.get('source')}{where}, pictures of {data.get('image_px')} pixels. "
        f"{train.get('steps')} steps of {train.get('batch_size')} pictures, seed "
        f"{train.get('seed')}."
    )
    parts = ["## Training", text]
    if has_curves:
        parts.append(f"![curves]({CURVES})")
    whole = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
    return [
        *parts,
        f"<details><summary>Configuration</summary>\n\n```yaml\n{whole}```\n\n</details>",
    ]


def _png(image: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
