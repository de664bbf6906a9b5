"""A diffusers directory, part by part: denoiser, codec, text encoders, scheduler."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ldm import storage
from ldm.checkpoint.contract import MODEL_INDEX
from ldm.errors import ExitCode, LdmError
from ldm.exchange.weights import filled, folder_tensors
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.autoencoder_config import AutoencoderConfig
from ldm.models.dit import DiT, DiTConfig
from ldm.models.dit_diffusers import dit_weights_from_diffusers
from ldm.models.external import load_external_codec, load_external_denoiser
from ldm.models.mmdit import MMDiT, MMDiTConfig
from ldm.models.unet import UNet, UNetConfig

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Own:
    """A class of diffusers that is built here.

    Args:
        config: of our network, from its config.json.
        make: the network of that configuration.
        weights: its state_dict as ours, where names differ.
    """

    config: Callable[[Config], Any]
    make: Callable[[Any], nn.Module]
    weights: Callable[[Mapping[str, Tensor], Any], dict[str, Tensor]] = lambda state, config: dict(
        state
    )


DENOISERS: dict[str, Own] = {
    "UNet2DConditionModel": Own(UNetConfig.from_diffusers, UNet),
    "SD3Transformer2DModel": Own(MMDiTConfig.from_diffusers, MMDiT),
    "LdmMMDiT": Own(MMDiTConfig.from_diffusers, MMDiT),
    "LdmDiT": Own(DiTConfig.from_json, DiT),
    "PixArtTransformer2DModel": Own(DiTConfig.from_diffusers, DiT, dit_weights_from_diffusers),
    "DiTTransformer2DModel": Own(DiTConfig.from_diffusers, DiT, dit_weights_from_diffusers),
}
"""Every other class of diffusers is reached by `models/external.py`; Ldm* are those of runs."""
FOLDERS = ("transformer", "unet")


@dataclass(frozen=True)
class Index:
    """What model_index.json says.

    Args:
        root: the directory.
        pipeline: its `_class_name`.
        parts: folder -> (library, class); parts that are null are left out.
        settings: whatever else it holds.
    """

    root: Path
    pipeline: str
    parts: Mapping[str, tuple[str, str]]
    settings: Mapping[str, Any]


def read_index(root: Path) -> Index:
    """Reads model_index.json. LdmError (code IO) if it is missing or no such file."""
    value = storage.read_json(root / MODEL_INDEX)
    if not isinstance(value, dict) or not isinstance(value.get("_class_name"), str):
        raise LdmError(
            "this is no model_index.json of diffusers",
            where=str(root / MODEL_INDEX),
            fix="give a directory that diffusers wrote, or a Hub id",
            code=ExitCode.IO,
        )
    parts, settings = {}, {}
    for name, entry in value.items():
        if isinstance(entry, list) and len(entry) == 2:
            if entry[1] is not None:
                parts[name] = (str(entry[0]), str(entry[1]))
        elif not name.startswith("_"):
            settings[name] = entry
    return Index(root, value["_class_name"], parts, settings)


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object, such as config.json.

    Raises:
        LdmError: code IO, as `storage.read_json`, or when it holds something else.
    """
    value = storage.read_json(path)
    if not isinstance(value, dict):
        raise LdmError(
            f"this is no configuration: it holds a {type(value).__name__}, not an object",
            where=str(path),
            fix="fetch the model again",
            code=ExitCode.IO,
        )
    return value


@contextmanager
def _legible(folder: Path) -> Iterator[None]:
    """Turns what a value of the wrong kind in a config.json raises into one sentence."""
    try:
        yield
    except (TypeError, ValueError, KeyError) as error:
        raise LdmError(
            f"this configuration cannot be read ({type(error).__name__}: {error})",
            where=str(folder / "config.json"),
            fix="fetch the model again, or mend the value",
            code=ExitCode.IO,
        ) from error


def denoiser_folder(root: Path) -> Path:
    """The folder of the denoiser.

    Raises:
        LdmError: code IO, when there is none.
    """
    for name in FOLDERS:
        if (root / name / "config.json").is_file():
            return root / name
    raise LdmError(
        f"there is no denoiser here: neither {' nor '.join(FOLDERS)} has a config.json",
        where=str(root),
        fix="give the directory of a whole pipeline",
        code=ExitCode.IO,
    )


def load_denoiser_folder(folder: Path, *, variant: str | None = None) -> nn.Module:
    """The denoiser in a folder: ours for the classes of DENOISERS, else diffusers' seen as ours.

    Raises:
        LdmError: code IO for missing or damaged files, code CONFIG for a configuration that is not
            built here, by the name of the key.
    """
    config = read_object(folder / "config.json")
    kind = config.get("_class_name")
    if kind not in DENOISERS:
        return load_external_denoiser(folder)
    own = DENOISERS[kind]
    with _legible(folder):
        shape = own.config(config)
    tensors = own.weights(folder_tensors(folder, variant=variant), shape)
    return filled(lambda: own.make(shape), tensors, str(folder))


def load_codec_folder(folder: Path, *, variant: str | None = None) -> Any:
    """The autoencoder in a folder: ours for AutoencoderKL, else diffusers' seen as ours.

    Raises:
        LdmError: as `load_denoiser_folder`.
    """
    config = read_object(folder / "config.json")
    kind = config.get("_class_name", "AutoencoderKL")
    if kind != "AutoencoderKL":
        return load_external_codec(folder)
    with _legible(folder):
        shape = AutoencoderConfig.from_diffusers(config)
    tensors = {_renamed(name): v for name, v in folder_tensors(folder, variant=variant).items()}
    tensors = {name: _flat(name, value) for name, value in tensors.items()}
    return filled(lambda: AutoencoderKL(shape), tensors, str(folder))


OLD_ATTENTION = {
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "proj_attn": "to_out.0",
}
"""Names of the autoencoder's attention in files from before diffusers 0.15."""


def _renamed(name: str) -> str:
    head, _, last = name.rpartition(".")
    before, _, layer = head.rpartition(".")
    if "attentions." in name and layer in OLD_ATTENTION:
        return f"{before}.{OLD_ATTENTION[layer]}.{last}"
    return name


def _flat(name: str, value: Tensor) -> Tensor:
    """Files that were made from the original layout keep its 1x1 convolutions."""
    is_projection = "attentions." in name and ".to_" in name and name.endswith("weight")
    return value[:, :, 0, 0] if is_projection and value.ndim == 4 else value
