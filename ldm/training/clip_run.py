"""`ldm train-clip`: from an experiment to a published text encoder."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from tqdm.auto import tqdm

from ldm import storage
from ldm.build import open_data
from ldm.checkpoint.perceptual_files import save_vision_tower
from ldm.config.files import dump, refuse_another_experiment
from ldm.config.schema import ClipExperiment
from ldm.errors import ExitCode, LdmError
from ldm.training.clip import ClipTraining, train_clip
from ldm.training.session import refuse_too_many_bad

log = logging.getLogger(__name__)


def train_clip_run(config: ClipExperiment) -> Path:
    """Trains the small CLIP and publishes `run.dir`: text_encoder/, tokenizer/, image_encoder/.

    The directory appears whole or not at all. A run that is there already is left alone; one that
    was interrupted starts over, which takes a minute and gives the same weights.

    Raises:
        LdmError: code CONFIG when `run.dir` holds something else, BAD_DATA without usable pairs.
    """
    run_dir = Path(config.run.dir)
    if (run_dir / storage.MANIFEST).exists():
        storage.verify(run_dir)
        refuse_another_experiment(run_dir / "config.yaml", config, may_change=("run.",))
        log.info("%s is complete", run_dir)
        return run_dir
    if run_dir.exists() and any(run_dir.iterdir()):
        raise LdmError(
            "the directory is not empty and holds no text encoder",
            where=str(run_dir),
            fix="use another run.dir",
            code=ExitCode.CONFIG,
        )
    source, _ = open_data(config.data)
    settings = settings_of(config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tqdm(total=settings.steps, unit="step", desc=f"clip {run_dir}") as bar:

        def progress(step: int, loss: float) -> None:
            bar.update(step - bar.n)
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)

        encoder, metrics, tower = train_clip(source, settings, progress=progress, device=device)
    for name in metrics["set_aside"]:
        log.warning("set aside: %s", name)
    refuse_too_many_bad(
        {name: "" for name in metrics["set_aside"]},
        len(metrics["set_aside"]),
        len(source),
        config.data.max_bad_fraction,
    )
    with storage.publish(run_dir) as folder:
        encoder.save(folder)
        save_vision_tower(folder, tower)
        storage.write_json(folder / "metrics.json", metrics)
        storage.write_text(folder / "config.yaml", dump(config))
    return run_dir


def settings_of(config: ClipExperiment) -> ClipTraining:
    """The training settings that an experiment describes."""
    return ClipTraining(
        steps=config.train.steps,
        batch_size=config.train.batch_size,
        learning_rate=config.optim.learning_rate,
        warmup_steps=config.optim.warmup_steps,
        weight_decay=config.optim.weight_decay,
        clip_norm=config.optim.clip_norm,
        width=config.model.width,
        layers=config.model.layers,
        vision_layers=config.model.vision_layers,
        image_px=config.data.image_px,
        patch_px=config.model.patch_px,
        vocab_size=config.model.vocab_size,
        max_tokens=config.model.max_tokens,
        max_pairs=config.data.count if config.data.source == "shapes" else 20_000,
        precision=config.train.precision,
        log_every_steps=config.run.log_every_steps,
        seed=config.train.seed,
    )
