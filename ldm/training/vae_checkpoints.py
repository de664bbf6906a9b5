"""What the VAE stage writes into a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from ldm import storage
from ldm.checkpoint import save_module
from ldm.diffusion.importance import Importance
from ldm.models.autoencoder_config import AutoencoderConfig
from ldm.training.checkpoints import Beside, latent_statistics, publish, write_state
from ldm.training.ema import Ema
from ldm.training.session import Progress, Session
from ldm.training.vae_loss import VaePass, trained_part
from ldm.types import Source


class VaeWriter:
    """Checkpoints of the VAE stage: `vae/` with the statistics of its own latents.

    Args:
        session: of the run.
        passes: the VAE, with the log-variance of its reconstruction where that is learnt.
        ema: averages of `model`.
        optimizer: of `model`.
        source: the pictures over which latents are measured.
    """

    def __init__(
        self,
        session: Session,
        passes: VaePass,
        ema: Ema,
        optimizer: torch.optim.Optimizer,
        source: Source,
    ) -> None:
        self.session, self.ema, self.optimizer = session, ema, optimizer
        self.vae, self.source, self.last = passes.vae, source, session.run_dir
        self.model = trained_part(passes)
        self.importance: Importance | None = None
        self.beside: dict[str, Beside] = {}
        self.fixed: dict[str, str] = {}

    def save(self, progress: Progress) -> None:
        """Publishes the averaged VAE and the resume state of this step."""

        def write(folder: Path) -> None:
            with self.ema.applied(self.model):
                config = self._published_config()
                save_module(folder / "vae", dict(self.vae.state_dict()), config.to_diffusers())
            storage.write_text(folder / "config.yaml", self.session.resolved)
            write_state(folder, self, progress)

        self.last = publish(self.session, progress, write)

    def _published_config(self) -> AutoencoderConfig:
        """The VAE's configuration with what its latents are now.

        Where only the decoder is trained the latents are those of the published VAE, and so are the
        numbers that denoisers were trained with. Otherwise they are measured, and take the place of
        a scaling factor and shift.
        """
        if self.session.config.train.only == "decoder":
            return self.vae.config
        mean, std = latent_statistics(
            self.vae, self.source, self.session.config.data, self.session.device
        )
        return replace(
            self.vae.config,
            latents_mean=mean,
            latents_std=std,
            scaling_factor=1.0,
            shift_factor=None,
        )
