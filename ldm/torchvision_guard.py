"""Lets torchvision be imported beside a torch that its C++ library was not built for.

A torchvision for CUDA beside a torch for CPUs cannot load its library. It would live with that,
but for two operators whose shapes it describes at import: nobody declared them, so the import
fails, and with it transformers, diffusers, open_clip and timm, none of which need them
(pytorch/vision#9077). Declaring the missing operators is enough; calling one still fails with
torchvision's own words.

Installed by `import ldm`, acts at the first import of torchvision, loads nothing itself. A matching
torchvision, or none, is left alone.
"""

from __future__ import annotations

import re
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

BOXES = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
OPERATORS = {"nms": BOXES, "qnms": BOXES}
"""What torchvision 0.22 to 0.29 describes at import, with the signatures of its C++ library."""

_declared: list[Any] = []
"""A torch.library.Library undoes its declarations when it is collected."""


def prepare_torchvision(folder: Path) -> str:
    """Makes the torchvision in `folder` importable.

    Returns:
        "native" when its own library fits this torch, else "declared".

    Raises:
        ImportError: it describes operators that are not known here.
    """
    import torch

    for library in sorted((*folder.glob("_C*.so"), *folder.glob("_C*.pyd"))):
        try:
            torch.ops.load_library(str(library))
        except (OSError, ImportError):
            continue
        return "native"
    described = folder / "_meta_registrations.py"
    text = described.read_text(encoding="utf-8") if described.is_file() else ""
    names = re.findall(r"register_fake\(\s*[\"']torchvision::(\w+)", text)
    missing = [name for name in names if not hasattr(torch.ops.torchvision, name)]
    if unknown := [name for name in missing if name not in OPERATORS]:
        raise ImportError(
            f"torchvision in {folder} does not fit torch {torch.__version__} (operators "
            f"{', '.join(unknown)}); install the torchvision of the same index as torch"
        )
    if missing:
        declarations = torch.library.Library("torchvision", "FRAGMENT")
        for name in missing:
            declarations.define(f"{name}{OPERATORS[name]}")
        _declared.append(declarations)
    return "declared"


class _BeforeTorchvision(MetaPathFinder):
    """Looks at the first import of torchvision, and hands it on."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            found = PathFinder.find_spec(fullname, path)
            for place in (found and found.submodule_search_locations) or ():
                prepare_torchvision(Path(place))
        return None


def install() -> None:
    """Puts the guard in place, once."""
    there = any(type(finder).__name__ == _BeforeTorchvision.__name__ for finder in sys.meta_path)
    if "torchvision" not in sys.modules and not there:
        sys.meta_path.insert(0, _BeforeTorchvision())
