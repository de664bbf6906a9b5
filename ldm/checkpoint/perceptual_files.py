"""Where the weights of perceptual distances lie: a path, torch's cache, the `lpips` package.

Nothing is downloaded: a file that is missing is named, with where it was looked for.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoint.pickles import load_pickle_tensors
from ldm.checkpoint.tensors import load_strict, load_tensors, save_tensors
from ldm.errors import ExitCode, LdmError, missing_package
from ldm.storage import make_directory, read_json, write_json

BACKBONES = {"vgg": "vgg16-397923af.pth", "alex": "alexnet-owt-7be5be79.pth"}
"""The files of torchvision's ImageNet weights, as torch.hub names them."""
VISION_TOWER = "image_encoder"
"""Where `ldm train-clip` keeps the tower that looked at pictures; diffusers' name for it."""
_PREFIX = "vision_model."
WEAKER = (
    "loss.perceptual=gradients needs no weights, and loss.perceptual=clip takes the run of "
    "`ldm train-clip`; both are weaker"
)


def load_lpips_tensors(network: str, path: str | None) -> dict[str, Tensor]:
    """All weights of `ldm.models.perceptual.Lpips`, by its names.

    Args:
        network: "vgg" or "alex".
        path: a file, or a directory with torchvision's file (as .safetensors or .pth); None looks
            into torch's cache. A file without heads takes those of the `lpips` package.

    Raises:
        LdmError: code IO when there is none, with the places that were tried and the choices that
            need none; code USAGE without the package; code IO for weights of another network.
    """
    file = _backbone(network, path)
    tensors = load_tensors(file) if file.suffix == ".safetensors" else load_pickle_tensors(file)
    features = {name: value for name, value in tensors.items() if name.startswith("features.")}
    heads = {name: value for name, value in tensors.items() if name.startswith("lin")}
    if not features:
        raise LdmError(
            f"holds no `features.N.weight`, so it is no {BACKBONES[network]}",
            where=str(file),
            fix=f"give torchvision's {BACKBONES[network]}",
            code=ExitCode.IO,
        )
    return {**features, **(heads or load_pickle_tensors(_heads(network)))}


def load_vision_tower(path: str | None) -> nn.Module:
    """The CLIP vision tower that `ldm train-clip` left in `image_encoder/`, on the CPU.

    Raises:
        LdmError: code IO when there is none, or it is damaged.
    """
    from transformers import CLIPVisionConfig, CLIPVisionModel

    folder = Path(path or "") / VISION_TOWER
    if path is None or not (folder / "config.json").is_file():
        raise LdmError(
            f"there is no {VISION_TOWER}/ to compare features with",
            where=path or "loss.perceptual_path",
            fix="set loss.perceptual_path to a run of `ldm train-clip` (earlier versions kept no "
            "vision tower: train it again), or use loss.perceptual=gradients",
            code=ExitCode.IO,
        )
    config = CLIPVisionConfig.from_dict(read_json(folder / "config.json"))
    with torch.random.fork_rng(devices=[]):
        tower: nn.Module = CLIPVisionModel(config)
    tensors = load_tensors(folder / "model.safetensors")
    # transformers has had this prefix or not, depending on its version
    own = any(name.startswith(_PREFIX) for name in tower.state_dict())
    plain = {name.removeprefix(_PREFIX): value for name, value in tensors.items()}
    load_strict(tower, {(_PREFIX if own else "") + n: v for n, v in plain.items()}, str(folder))
    return tower


def save_vision_tower(folder: Path, tower: Any) -> None:
    """Writes what `load_vision_tower` reads into `folder`/image_encoder/, in diffusers' layout.

    Raises:
        LdmError: code IO.
    """
    make_directory(folder / VISION_TOWER)
    write_json(folder / VISION_TOWER / "config.json", tower.config.to_dict())
    save_tensors(folder / VISION_TOWER / "model.safetensors", tower.state_dict())


def _backbone(network: str, path: str | None) -> Path:
    name = BACKBONES[network]
    folder = Path(torch.hub.get_dir()) / "checkpoints" if path is None else Path(path)
    if folder.is_file():
        return folder
    places = [folder / Path(name).with_suffix(".safetensors"), folder / name]
    for place in places:
        if place.is_file():
            return place
    raise LdmError(
        f"LPIPS needs the ImageNet weights {name}, which are neither here nor downloaded",
        where=str(folder),
        fix=f"put {name} there (torchvision's download of {network}), or set "
        f"loss.perceptual_path to it; {WEAKER}",
        code=ExitCode.IO,
    )


def _heads(network: str) -> Path:
    """The file with the package's five 1x1 heads; the package itself is not imported."""
    package = find_spec("lpips")
    if package is None or package.origin is None:
        raise missing_package("lpips", "perceptual", "LPIPS (its five small heads)")
    return Path(package.origin).parent / "weights" / "v0.1" / f"{network}.pth"
