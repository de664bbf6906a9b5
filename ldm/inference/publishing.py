"""`ldm export`: writes a model for other programs, proves it, describes it, uploads on demand."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from ldm import storage
from ldm.errors import ExitCode, LdmError
from ldm.exchange.exportable import encoders_of
from ldm.exchange.exporting import (
    Exported,
    Model,
    plan,
    without_variance,
    write_diffusers,
    write_single_file,
)
from ldm.exchange.opening import CLIP_VOCABULARY, Options
from ldm.exchange.single_file import read_file
from ldm.inference.card import USAGE, Facts, write_card
from ldm.inference.comparison import compared
from ldm.inference.pipeline import Pipeline
from ldm.models.text.joint import SUFFIXES

log = logging.getLogger(__name__)

Target = Literal["diffusers", "single-file"]
TARGETS: tuple[Target, ...] = ("diffusers", "single-file")
PROMPTS = 4
"""Pictures on the card."""
WAIT_S = 1800
"""Longest run of the usage code."""


@dataclass(frozen=True)
class Wishes:
    """What an export is asked for.

    Args:
        to: diffusers or single-file.
        verify: compare with diffusers call by call, and run the card's code.
        prompts: of the card's samples; empty takes those of the run's previews.
        license: for the card.
        title: of the card; None is the name of the model's directory.
        options: what a published model leaves open.
    """

    to: Target = "diffusers"
    verify: bool = False
    prompts: Sequence[str] = ()
    license: str | None = None
    title: str | None = None
    options: Options = Options()


def export(source: str, out: Path, wishes: Wishes) -> list[str]:
    """Writes `out`, whole or not at all; returns what there is to say.

    Raises:
        LdmError: code USAGE when `out` is not empty; code CONFIG for a model that cannot be
            exported, with the reason; code NUMERICS when --verify finds a difference.
    """
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise LdmError(f"{out} is not empty", where="--out", fix="name a new directory")
    # plain: packed weights have no names to export
    pipeline = Pipeline.from_pretrained(
        source, device="cpu", options=wishes.options, cpu_kernels="plain"
    )
    model = Model(pipeline.vae, pipeline.encoder, pipeline.net, pipeline.contract)
    exported = plan(model)  # refusals come before anything is drawn or written
    run = _run_of(pipeline)
    prompts = tuple(wishes.prompts) or _run_prompts(run)
    pictures = pipeline(list(prompts[:PROMPTS]))
    said: list[str] = []
    notes = list(exported.notes)
    with storage.publish(out, {"exported": source, "to": wishes.to}) as folder:
        single, kind, words = None, None, False
        figures: list[str] = []
        if wishes.to == "diffusers":
            write_diffusers(folder, model)
            if wishes.verify:
                figures = _proven(folder, pipeline, exported, prompts[0])
        else:
            single = f"{_file_name(_title(pipeline, wishes))}.safetensors"
            kind = write_single_file(folder / single, model, {"made_by": "ldm-toolkit"})
            words = _own_words(folder, model)
            notes += [OWN_WORDS] if words else []
            if wishes.verify:
                figures = _proven_file(folder / single, model, pipeline)
        facts = Facts(
            _title(pipeline, wishes),
            wishes.license,
            exported if single is None else None,
            figures,
            _run_config(pipeline),
            pipeline.trained_size,
            single,
            # of SD 2 a file marks v alone
            model.contract.prediction if kind and kind.prediction is None else None,
            "tokenizers" if words else None,
        )
        write_card(folder, pipeline.contract, facts, pictures, run)
        if wishes.verify and single is None:
            _run_usage(folder)
            figures.append("the code of README.md runs")
        said += figures
    said += [f"note: {note}" for note in notes]
    return [*said, str(out)]


def push(folder: Path, repo_id: str) -> str:
    """Uploads an export to the Hub; returns its address. The only function that sends anything.

    Raises:
        LdmError: code IO when the Hub cannot be reached or refuses, with its reason.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        api = HfApi()
        api.create_repo(repo_id, exist_ok=True)
        return str(api.upload_folder(folder_path=folder, repo_id=repo_id))
    except OfflineModeIsEnabled:
        reason, fix = "HF_HUB_OFFLINE is set", "unset it to upload"
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0]:.200}"
        fix = "log in with `hf auth login`, check the name OWNER/NAME and the network"
    raise LdmError(
        f"the Hub does not take it ({reason}); the export is at {folder}",
        where=f"--push {repo_id}",
        fix=fix,
        code=ExitCode.IO,
    )


def _proven(folder: Path, pipeline: Pipeline, exported: Exported, prompt: str) -> list[str]:
    agreement = compared(folder, pipeline, exported, prompt)
    lines = agreement.lines()
    if not agreement.holds:
        raise LdmError(
            "the export does not draw what the model draws:\n  " + "\n  ".join(lines),
            where="--verify",
            fix="please report it with these figures; nothing was written",
            code=ExitCode.NUMERICS,
        )
    return lines


OWN_WORDS = (
    "its text encoder has a vocabulary of its own, in tokenizers/; programs that know CLIP's only "
    "would read other prompts"
)


def _own_words(folder: Path, model: Model) -> bool:
    """Writes the tokenizers beside a single file where they are not CLIP's; whether it did."""
    clips = [one for one in encoders_of(model.encoder) if one.kind == "clip"]
    if all(one.model.config.vocab_size == CLIP_VOCABULARY for one in clips):
        return False
    for encoder, suffix in zip(clips, SUFFIXES, strict=False):
        encoder.tokenizer.save_pretrained(folder / "tokenizers" / f"tokenizer{suffix}")
    return True


def _proven_file(path: Path, model: Model, pipeline: Pipeline) -> list[str]:
    """Reads the file again: every tensor of the denoiser and the encoders is bit for bit the same.

    The codec is compared by what it decodes, since statistics of latents are folded into it.
    """
    import torch

    parts = read_file(path)
    assert parts.net is not None
    pairs = [("denoiser", parts.net, without_variance(model.net, model.contract))]
    for tower, encoder in zip(parts.towers, encoders_of(model.encoder), strict=True):
        pairs.append((tower.name, tower.model, encoder.model))
    there = {f"{part}.{k}": v for part, module, _ in pairs for k, v in module.state_dict().items()}
    here = {f"{part}.{k}": v for part, _, module in pairs for k, v in module.state_dict().items()}
    differing = [
        name
        for name in there
        if name not in here or not there[name].equal(here[name].cpu().to(there[name].dtype))
    ]
    height, width = (side // parts.vae.downsample_factor for side in pipeline.trained_size)
    latents = torch.randn(
        (1, pipeline.contract.latent_channels, height, width),
        generator=torch.Generator().manual_seed(0),
    )
    change = float((parts.vae.decode(latents) - pipeline.vae.decode(latents).float()).abs().max())
    lines = [
        f"tensors of the networks    {len(there)}, {len(differing)} differ",
        f"largest difference, pixels {change:.1e}   (pixels from -1 to 1)",
    ]
    if differing or change > 1e-4:
        raise LdmError(
            "the file does not hold what the model is:\n  " + "\n  ".join(lines),
            where="--verify",
            fix="please report it with these figures; nothing was written",
            code=ExitCode.NUMERICS,
        )
    return lines


def _run_usage(folder: Path) -> None:
    """Runs the code of the card as a user would, offline, and takes its picture away again."""
    # ldm first: it makes a torchvision that does not fit this torch importable
    code = f"import ldm, runpy; runpy.run_path({USAGE!r})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=WAIT_S,
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise LdmError(
            f"the code of the model card does not run: {last}",
            where="--verify",
            fix="please report it; nothing was written",
            code=ExitCode.BUG,
        )
    (folder / "picture.png").unlink()


def _run_of(pipeline: Pipeline) -> Path | None:
    """The run directory of a checkpoint; None for a published model."""
    folder = Path(pipeline.name)
    return folder.parent if folder.is_dir() and storage.step_of(folder) is not None else None


def _run_prompts(run: Path | None) -> tuple[str, ...]:
    file = None if run is None else run / "samples" / "prompts.txt"
    lines = file.read_text(encoding="utf-8").splitlines() if file and file.is_file() else []
    return tuple(dict.fromkeys(line for line in lines if line)) or ("a red circle",)


def _run_config(pipeline: Pipeline) -> dict[str, Any]:
    path = Path(pipeline.name) / "config.yaml"
    return dict(yaml.safe_load(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _title(pipeline: Pipeline, wishes: Wishes) -> str:
    run = _run_of(pipeline)
    if wishes.title or run:
        return wishes.title or (run.name if run else "")
    place = Path(pipeline.name)
    return place.name if place.is_dir() else place.name.split(".safetensors")[0]


def _file_name(title: str) -> str:
    """A title as the name of a file."""
    return re.sub(r'[\x00-\x1f/\\:*?"<>|]+', "-", title).strip(". ") or "model"
