"""What each training stage writes into a checkpoint, and how it takes it up again.

A checkpoint holds the averaged weights in diffusers' layout, which is what one samples from, and
`state/`, which is what one resumes from. Only whole optimizer steps are saved.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from ldm import __version__, storage
from ldm.build import build_diffusion
from ldm.checkpoint import (
    Contract,
    find_checkpoint,
    load_optimizer_state,
    load_state,
    load_strict,
    optimizer_state,
    pack,
    save_checkpoint,
    save_contract,
    save_model_index,
    save_module,
    save_null,
    save_state,
    save_tensors,
    unpack,
)
from ldm.checkpoint.contract import NULL
from ldm.config.files import refuse_another_experiment
from ldm.config.schema import DataConfig, DiffusionExperiment
from ldm.data.transforms import Draws, fit
from ldm.diffusion.importance import Importance
from ldm.errors import ExitCode, LdmError
from ldm.models import lora
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.dit import DiT
from ldm.models.external import ExternalDenoiser
from ldm.models.identity import autoencoder_sha256, tensors_sha256
from ldm.models.mmdit import MMDiT
from ldm.models.mmdit_config import CLASS
from ldm.models.text import FrozenTextEncoder
from ldm.randomness import permutation
from ldm.training.ema import Ema
from ldm.training.kernels import choose_backends
from ldm.training.session import Progress, Session
from ldm.types import Source, TextEmbedding

STATE_ITEMS = ("weights", "ema", "optimizer", "progress")
IMPORTANCE = "importance"
"""One item more, of runs that draw times by their losses."""
STATISTICS_SAMPLES = 1_024
"""Pictures over which latent statistics are measured: a channel's mean is then within 1/250 of its
standard deviation, since every picture has many latent pixels."""

log = logging.getLogger(__name__)


class Beside(NamedTuple):
    """A network that training needs and sampling does not, such as a discriminator."""

    net: nn.Module
    optimizer: torch.optim.Optimizer


class Writer(Protocol):
    """What the training loops need of a stage's checkpoints."""

    last: Path
    ema: Ema
    optimizer: torch.optim.Optimizer
    importance: Importance | None
    """What is known of the losses by time, where times are drawn by it; else None."""
    beside: dict[str, Beside]
    """Networks that are trained beside the model, by name."""
    fixed: dict[str, str]
    """Hashes of frozen parts of the objective that lie outside of the run, by name."""

    @property
    def model(self) -> nn.Module: ...

    def save(self, progress: Progress) -> None: ...


def resume(session: Session, writer: Writer, fingerprint: str) -> Progress:
    """Restores the newest verified checkpoint of the run, or starts at step 0 if there is none.

    Raises:
        LdmError: code CONFIG for another experiment than the checkpoint's own configuration; code
            IO when checkpoints exist but all are damaged, or when the run says that it
            has one and there is none: a run never starts over by itself.
    """
    if not storage.step_directories(session.run_dir):
        if (session.run_dir / storage.LATEST).exists():
            raise LdmError(
                "LATEST names a checkpoint, but the run directory holds none",
                where=str(session.run_dir),
                fix="put its step-* directory back, or use another run.dir to start over",
                code=ExitCode.IO,
            )
        session.write_config()
        session.metrics.start(0)
        kernels = session.backends.cpu
        return Progress(precision=session.precision, cpu_kernels=kernels, data=fingerprint)
    folder = find_checkpoint(session.run_dir)
    refuse_another_experiment(folder / "config.yaml", session.config)
    session.write_config()
    items = [*STATE_ITEMS, *writer.fixed, *([IMPORTANCE] if writer.importance is not None else [])]
    for name in writer.beside:
        items += [name, f"{name}_optimizer"]
    tensors, facts = load_state(folder / "state", items)
    refuse_other_parts(writer.fixed, facts, folder)
    load_strict(writer.model, unpack("weights", tensors), str(folder / "state"))
    writer.ema.load_state_dict(unpack("ema", tensors))
    if writer.importance is not None:
        writer.importance = Importance.of(unpack(IMPORTANCE, tensors))
    load_optimizer_state(
        writer.optimizer,
        writer.model.named_parameters(),
        unpack("optimizer", tensors),
        facts["optimizer"],
    )
    for name, (net, optimizer) in writer.beside.items():
        load_strict(net, unpack(name, tensors), str(folder / "state"))
        key = f"{name}_optimizer"
        load_optimizer_state(optimizer, net.named_parameters(), unpack(key, tensors), facts[key])
    progress = Progress(**facts["progress"])
    if progress.data != fingerprint:
        raise LdmError(
            "the data set has changed since this run began, so its order would change",
            where=str(session.run_dir),
            fix="put the former files and captions back, or use another run.dir",
            code=ExitCode.CONFIG,
        )
    if session.config.train.precision == "auto":
        session.precision = progress.precision
    if session.config.train.cpu_kernels == "auto":
        session.backends = choose_backends(session, progress.cpu_kernels)
    session.metrics.start(progress.step)
    writer.last = folder
    if session.is_main:
        log.info("resuming %s after step %d", folder, progress.step)
    return progress


def refuse_other_parts(now: Mapping[str, str], facts: Mapping[str, Any], folder: Path) -> None:
    """Stops with code CONFIG where a frozen part is not the one that the run began with."""
    if changed := [name for name, value in now.items() if facts[name] != value]:
        raise LdmError(
            f"the weights of the {' and '.join(changed)} loss differ from those this run began "
            "with",
            where=str(folder),
            fix="put the former ones back, or use another run.dir",
            code=ExitCode.CONFIG,
        )


def write_state(folder: Path, writer: Writer, progress: Progress) -> None:
    """Everything that resuming needs: raw weights, averages, moments, position."""
    tensors, facts = optimizer_state(writer.optimizer, writer.model.named_parameters())
    importance = {} if writer.importance is None else writer.importance.tensors()
    tensors = {
        **pack("weights", writer.model.state_dict()),  # with fixed tables, such as positions
        **pack("ema", writer.ema.state_dict()),
        **pack("optimizer", tensors),
        **pack(IMPORTANCE, importance),
    }
    known: dict[str, Any] = {
        "weights": None,
        "ema": None,
        "optimizer": facts,
        "progress": asdict(progress),
        **writer.fixed,
    }
    for name, (net, optimizer) in writer.beside.items():
        moments, known[f"{name}_optimizer"] = optimizer_state(optimizer, net.named_parameters())
        tensors |= pack(name, dict(net.named_parameters())) | pack(f"{name}_optimizer", moments)
    save_state(folder / "state", tensors, known)


class DiffusionWriter:
    """Checkpoints of the diffusion stage: a whole pipeline in diffusers' layout.

    The frozen parts are written once per run and hard-linked into every checkpoint.
    """

    def __init__(
        self,
        session: Session,
        frozen: Any,
        net: nn.Module,
        learned: nn.Module,
        ema: Ema,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self.session, self.frozen, self.net = session, frozen, net
        self.learned = learned  # the network, or the adapters in it
        self.ema, self.optimizer = ema, optimizer
        self.last = session.run_dir
        self.importance: Importance | None = None
        self.beside: dict[str, Beside] = {}
        self.fixed: dict[str, str] = {}

    @property
    def model(self) -> nn.Module:
        """What is trained."""
        return self.learned

    @property
    def has_adapters(self) -> bool:
        """Whether adapters are trained, in a network that stays as it was."""
        return self.learned is not self.net

    @property
    def components(self) -> Path:
        """Where the run keeps its frozen parts."""
        return self.session.run_dir / "components"

    def write_components(self) -> None:
        """Writes VAE and text encoder, or checks that they are those that the run began with.

        Raises:
            LdmError: code CONFIG when another VAE or encoder was trained in the meantime.
        """
        vae: AutoencoderKL = self.frozen.vae
        encoder: FrozenTextEncoder = self.frozen.encoder
        now = {
            "vae": autoencoder_sha256(vae, vae.config),
            "text_encoder": encoder.identity["weights"],
        }
        name, config, _ = denoiser_facts(self.net)
        if self.has_adapters:
            now["denoiser"] = tensors_sha256(lora.base_state(self.net))
        if self.components.exists():
            then = storage.verify(self.components)["facts"]
            if changed := [name for name, value in now.items() if then[name] != value]:
                raise LdmError(
                    f"the {' and '.join(changed)} differ from those this run began with",
                    where=str(self.session.run_dir),
                    fix="use another run.dir, or put the former ones back",
                    code=ExitCode.CONFIG,
                )
            return
        with storage.publish(self.components, now) as folder:
            save_module(folder / "vae", dict(vae.state_dict()), vae.config.to_diffusers())
            encoder.save(folder)
            if self.has_adapters:
                save_module(folder / name, lora.base_state(self.net), config)

    def save(self, progress: Progress) -> None:
        """Publishes the averaged denoiser with its frozen parts, contract and resume state."""

        def write(folder: Path) -> None:
            text: dict[str, tuple[str, str]] = self.frozen.encoder.components()
            for part in ("vae", *text):
                storage.link_tree(self.components / part, folder / part)
            name, config, class_ = denoiser_facts(self.net)
            with self.ema.applied(self.model):
                if self.has_adapters:
                    storage.link_tree(self.components / name, folder / name)
                    storage.make_directory(folder / lora.FOLDER)
                    adapters = lora.to_tensors(lora.adapters_of(self.net), name)
                    save_tensors(folder / lora.FOLDER / lora.WEIGHTS, adapters)
                else:
                    save_module(folder / name, dict(self.net.state_dict()), config)
            null: TextEmbedding = self.frozen.null
            sha256 = save_null(folder, null)
            config_ = self.session.config
            assert isinstance(config_, DiffusionExperiment)
            save_contract(folder, make_contract(config_, self.frozen, sha256))
            save_model_index(
                folder,
                {
                    name: class_,
                    "vae": ("diffusers", "AutoencoderKL"),
                    **text,
                },
                pipeline="LdmPipeline",
            )
            storage.write_text(folder / "config.yaml", self.session.resolved)
            write_state(folder, self, progress)

        self.last = publish(self.session, progress, write)


def publish(session: Session, progress: Progress, write: Callable[[Path], None]) -> Path:
    """Saves on rank 0, with the same outcome on every rank."""
    return save_checkpoint(
        session.run_dir,
        progress.step,
        write,
        keep=session.config.run.keep_checkpoints,
        facts={"version": __version__, "stage": session.config.stage},
    )


def denoiser_facts(net: Any) -> tuple[str, dict[str, Any], tuple[str, str]]:
    """Folder, config.json and class of a denoiser in a checkpoint."""
    if isinstance(net, DiT):
        return "transformer", net.config.to_json(), ("ldm", "DiT")
    if isinstance(net, MMDiT):
        config = net.config.to_diffusers()
        is_theirs = config["_class_name"] == CLASS
        return "transformer", config, ("diffusers" if is_theirs else "ldm", config["_class_name"])
    if isinstance(net, ExternalDenoiser):
        name = net.config.class_name
        folder = "unet" if name.startswith("UNet") else "transformer"
        return folder, net.config.to_diffusers(), ("diffusers", name)
    return "unet", net.config.to_diffusers(), ("diffusers", "UNet2DConditionModel")


def make_contract(config: DiffusionExperiment, frozen: Any, null_sha256: str) -> Contract:
    """The contract of a run: what its weights mean and how it is sampled by default."""
    vae: AutoencoderKL = frozen.vae
    encoder: FrozenTextEncoder = frozen.encoder
    diffusion, channels = build_diffusion(config.diffusion), vae.config.latent_channels
    scale, offset = diffusion.process.clock
    sampling = config.sample.model_dump(mode="json")
    side = config.data.image_px
    return Contract(
        process=config.diffusion.process,
        prediction=config.diffusion.prediction,
        data_std=diffusion.data_std,
        clock=f"{scale:g} * t + {offset:g}, t = 0 data, t = 1 noise",
        latent_channels=channels,
        latent_mean=tuple(vae.config.latents_mean or [0.0] * channels),
        latent_std=tuple(vae.config.latents_std or [1.0 / vae.config.scaling_factor] * channels),
        downsample_factor=vae.downsample_factor,
        null_embedding=NULL,
        null_embedding_sha256=null_sha256,
        learned_variance=diffusion.learned_variance,
        source=config.diffusion.source,
        coupling=config.diffusion.coupling if config.data.pairs is None else "pairs",
        latent_noise=config.diffusion.latent_noise,
        offset_noise=config.diffusion.offset_noise,
        caption_dropout=config.diffusion.caption_dropout,
        text_encoder=" + ".join((config.text.path or "random", *config.text.further_paths)),
        text_encoder_sha256=encoder.identity["weights"],
        tokenizer_sha256=encoder.identity["tokenizer"],
        max_tokens=encoder.max_tokens,
        mask_rule=encoder.mask_rule,
        text_settings=encoder.settings,
        image_sizes=((side, side),),
        sampling={**sampling, "shift": config.diffusion.timesteps.shift},
    )


@torch.no_grad()
def latent_statistics(
    vae: AutoencoderKL, source: Source, data: DataConfig, device: torch.device, batch: int = 64
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of every latent channel over samples of the data.

    The variance is that of posterior samples: of the means, plus the mean posterior variance.
    """
    rows = permutation(len(source), 0, 0)[:STATISTICS_SAMPLES].tolist()
    count, total, square = 0, torch.zeros(()), torch.zeros(())
    for start in range(0, len(rows), batch):
        pictures = readable_pictures(source, rows[start : start + batch], data)
        if pictures:
            moments = vae.moments(torch.stack(pictures).to(device)).double().cpu()
            mean, logvar = moments.chunk(2, dim=1)
            total = total + mean.sum((0, 2, 3))
            square = square + (mean.square() + logvar.exp()).sum((0, 2, 3))
            count += mean[:, 0].numel()
    if count == 0:
        raise LdmError(
            "no picture could be read to measure the latents",
            where="data",
            fix="mend the data set",
            code=ExitCode.BAD_DATA,
        )
    mean = total / count
    std = (square / count - mean.square()).clamp(min=1e-12).sqrt()
    return tuple(mean.tolist()), tuple(std.tolist())


def readable_pictures(source: Source, rows: Iterable[int], data: DataConfig) -> list[torch.Tensor]:
    """Pictures (3, px, px) in [-1, 1] of those samples that can be read; others are left out."""
    pictures = []
    for row in rows:
        try:
            example = source[row]
            draws = Draws(0, 0, example.id)
            pictures.append(fit(example.pixels, data.image_px, draws=draws, small=data.too_small))
        except LdmError as error:
            if error.code != ExitCode.BAD_DATA:
                raise
    return pictures
