"""Train and run your own latent text-to-image model. Importing this package loads no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ldm import torchvision_guard

torchvision_guard.install()

__version__ = "0.1.0"
__all__ = ["LdmError", "Pipeline", "__version__"]

if TYPE_CHECKING:
    from ldm.errors import LdmError
    from ldm.inference.pipeline import Pipeline

_LAZY = {"Pipeline": "ldm.inference.pipeline", "LdmError": "ldm.errors"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'ldm' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
