"""What the weights mean, beside them: contract.json, the null embedding, model_index.json."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ldm import storage
from ldm.checkpoint.tensors import load_tensors, save_tensors
from ldm.errors import ExitCode, LdmError
from ldm.types import TextEmbedding

CONTRACT = "contract.json"
NULL = "null_embedding.safetensors"
MODEL_INDEX = "model_index.json"
FORMAT_VERSION = 1
SOURCES = ("noise", "pictures")
COUPLINGS = ("independent", "optimal_transport", "pairs")


@dataclass(frozen=True, kw_only=True)
class Contract:
    """What sampling must know about the weights; sampling refuses what it does not allow."""

    process: str
    """Noise process, a name of `ldm.diffusion.process.PROCESSES`."""
    prediction: str
    """Parameterisation, a name of `ldm.diffusion.prediction.PREDICTIONS`."""
    data_std: float | None
    """Standard deviation of the data for EDM's preconditioning, else None."""
    clock: str
    """How the network is told the time."""
    latent_channels: int
    """Channels of the latents."""
    latent_mean: tuple[float, ...]
    """Mean per channel of the raw latents; the codec removes it."""
    latent_std: tuple[float, ...]
    """Standard deviation per channel of the raw latents; the codec divides by it."""
    downsample_factor: int
    """Picture pixels per latent pixel along one side."""
    null_embedding: str
    """File name of the embedding that stands for no prompt."""
    null_embedding_sha256: str
    """Hash of that file."""
    caption_dropout: float
    """Probability that training saw the null embedding; 0 forbids guidance."""
    text_encoder: str
    """Where the text encoder came from."""
    text_encoder_sha256: str
    """Hash of its weights."""
    tokenizer_sha256: str
    """Hash of its tokenizer."""
    max_tokens: int
    """Tokens per prompt."""
    mask_rule: str
    """What the denoiser does with padding."""
    image_sizes: tuple[tuple[int, int], ...]
    """Trained picture sizes, (height, width) in pixels."""
    learned_variance: bool = False
    """Whether the network has 2C channels, the second half for the variance of reverse steps."""
    source: str = "noise"
    """What stands at t = 1: noise, or pictures, which are then asked for when drawing."""
    coupling: str = "independent"
    """How noise and data went together: independent, optimal_transport or pairs."""
    latent_noise: float = 0.0
    """Strength of the noise between the ends of pairs; the sampler `bridge` draws it."""
    offset_noise: float = 0.0
    """Deviation of the draw per channel that is added to noise, in training and in drawing."""
    text_settings: Mapping[str, str | int | bool | None | list[str]] = field(default_factory=dict)
    """How prompts are read where that is not the default; see `restore_text_encoder`."""
    sampling: Mapping[str, str | int | float | bool | None] = field(default_factory=dict)
    """Defaults for sampling: sampler, steps, cfg_scale ..."""
    format_version: int = FORMAT_VERSION
    """Raised when the meaning of a field changes."""

    def __post_init__(self) -> None:
        for name in ("latent_mean", "latent_std"):
            values = getattr(self, name)
            if len(values) != self.latent_channels or not all(map(math.isfinite, values)):
                raise ValueError(
                    f"{name} must be {self.latent_channels} finite numbers, got {values}"
                )
        if min(self.latent_std) <= 0:
            raise ValueError(f"latent_std must be > 0, got {self.latent_std}")
        if self.source not in SOURCES or self.coupling not in COUPLINGS:
            raise ValueError(f"source={self.source!r} with coupling={self.coupling!r} is unknown")
        if not (0 <= self.latent_noise < math.inf and 0 <= self.offset_noise < math.inf):
            raise ValueError("latent_noise and offset_noise must be finite numbers >= 0")
        if not 0 <= self.caption_dropout <= 1:
            raise ValueError(f"caption_dropout must be in [0, 1], got {self.caption_dropout}")

    def to_json(self) -> dict[str, Any]:
        """A JSON object; `from_json` gives an equal contract back."""
        return dict(json.loads(json.dumps(asdict(self))))

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Contract:
        """The contract of a JSON object.

        Raises:
            ValueError: if a field is missing, unknown or of the wrong type, or if it was written
                by a newer version.
        """
        version = value.get("format_version")
        if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
            raise ValueError(
                f"it has format {version!r}, this program knows formats 1 to {FORMAT_VERSION}: "
                "upgrade ldm-toolkit"
            )
        value = {**_LATER, **value}
        known = {item.name for item in fields(cls)}
        if value.keys() != known:
            missing, unknown = sorted(known - value.keys()), sorted(value.keys() - known)
            raise ValueError(f"missing fields {missing}, unknown fields {unknown}")
        for name, kinds in _KINDS.items():
            if not isinstance(value[name], kinds) or isinstance(value[name], bool):
                raise ValueError(f"{name} has the wrong type: {value[name]!r}")
        if not isinstance(value["learned_variance"], bool):
            raise ValueError(f"learned_variance is no boolean: {value['learned_variance']!r}")
        sizes = tuple((int(height), int(width)) for height, width in value["image_sizes"])
        numbers = {name: tuple(map(float, value[name])) for name in ("latent_mean", "latent_std")}
        return cls(**{**value, **numbers, "image_sizes": sizes})


def save_contract(directory: Path, contract: Contract) -> None:
    """Writes contract.json. LdmError (code IO) if that fails."""
    storage.write_json(Path(directory) / CONTRACT, contract.to_json())


def load_contract(directory: Path) -> Contract:
    """Reads contract.json.

    Raises:
        LdmError: code IO, if it is missing, not valid, or written by a newer version.
    """
    path = Path(directory) / CONTRACT
    value = storage.read_json(path)
    try:
        return Contract.from_json(value)
    except (ValueError, TypeError, AttributeError) as error:
        raise LdmError(
            f"this contract cannot be used: {error}",
            where=str(path),
            fix="use the program version that wrote it, or another checkpoint",
            code=ExitCode.IO,
        ) from error


def save_null(directory: Path, null: TextEmbedding) -> str:
    """Stores the embedding that stands for no prompt, one row; returns the sha256 of the file.

    Raises:
        LdmError: code IO.
    """
    assert len(null) == 1, "one embedding serves the whole batch"
    tensors = {"tokens": null.tokens, "mask": null.mask}
    if null.pooled is not None:
        tensors["pooled"] = null.pooled
    save_tensors(Path(directory) / NULL, tensors)
    return storage.sha256(Path(directory) / NULL)


def load_null(directory: Path) -> TextEmbedding:
    """The embedding of `save_null`: tokens (1, L, D), mask (1, L), pooled (1, P) or None.

    Raises:
        LdmError: code IO, if it is missing or damaged.
    """
    path = Path(directory) / NULL
    tensors = load_tensors(path)
    if not {"tokens", "mask"} <= tensors.keys() <= {"tokens", "mask", "pooled"}:
        raise LdmError(
            f"this is not a null embedding: it holds {sorted(tensors)}",
            where=str(path),
            fix="use another checkpoint",
            code=ExitCode.IO,
        )
    return TextEmbedding(tensors["tokens"], tensors["mask"], tensors.get("pooled"))


def save_model_index(
    directory: Path,
    components: Mapping[str, tuple[str, str]],
    pipeline: str = "StableDiffusionPipeline",
) -> None:
    """Writes model_index.json, by which diffusers finds the parts of a pipeline.

    Args:
        directory: the checkpoint.
        components: folder -> (library, class), e.g. `{"vae": ("diffusers", "AutoencoderKL")}`.
        pipeline: diffusers' pipeline class.

    Raises:
        LdmError: code IO.
    """
    index: dict[str, Any] = {"_class_name": pipeline, "_diffusers_version": "0.40.0"}
    index |= {name: list(place) for name, place in sorted(components.items())}
    storage.write_json(Path(directory) / MODEL_INDEX, index)


_LATER: dict[str, Any] = {
    "learned_variance": False,
    "source": "noise",
    "coupling": "independent",
    "latent_noise": 0.0,
    "offset_noise": 0.0,
    "text_settings": {},
}
"""What a contract means that was written before a field was added."""

_KINDS: dict[str, tuple[type, ...]] = {
    "process": (str,),
    "prediction": (str,),
    "data_std": (int, float, type(None)),
    "clock": (str,),
    "latent_channels": (int,),
    "latent_mean": (list, tuple),
    "latent_std": (list, tuple),
    "downsample_factor": (int,),
    "null_embedding": (str,),
    "null_embedding_sha256": (str,),
    "caption_dropout": (int, float),
    "text_encoder": (str,),
    "text_encoder_sha256": (str,),
    "tokenizer_sha256": (str,),
    "max_tokens": (int,),
    "mask_rule": (str,),
    "image_sizes": (list, tuple),
    "sampling": (dict,),
    "source": (str,),
    "coupling": (str,),
    "latent_noise": (int, float),
    "offset_noise": (int, float),
    "text_settings": (dict,),
}
