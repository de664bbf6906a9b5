"""The table of data sources: a description of a data set in, a Source out."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from ldm.data.huggingface import open_huggingface
from ldm.data.imagefolder import open_imagefolder
from ldm.errors import ExitCode, LdmError
from ldm.types import Source


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceSpec:
    """Which data set to open; each source reads the fields that concern it."""

    source: str
    """A key of SOURCES."""
    path: str = ""
    """Folder, parquet file or hub id; not used by `shapes`."""
    split: str = "train"
    caption_column: str = "text"
    image_column: str = "image"
    """Used by `huggingface`."""
    count: int = 10_000
    """How many scenes `shapes` makes."""
    image_px: int = 64
    """Side of the scenes that `shapes` draws; other sources return pictures as they are."""
    seed: int = 0
    """Which scenes `shapes` draws."""
    missing_caption: Literal["error", "empty"] = "error"


def open_source(spec: SourceSpec) -> Source:
    """Opens the data set that `spec` describes.

    Raises:
        LdmError: code CONFIG for an unknown source or a missing path, BAD_DATA for a data set that
            cannot be used.
    """
    if spec.source not in SOURCES:
        near = difflib.get_close_matches(spec.source, SOURCES, n=1)
        raise LdmError(
            f"unknown source {spec.source!r}; known: {', '.join(SOURCES)}",
            where="data.source",
            fix=f"did you mean {near[0]}?" if near else "",
            code=ExitCode.CONFIG,
        )
    if not spec.path and spec.source != "shapes":
        raise LdmError(
            f"source {spec.source} needs a path",
            where="data.path",
            fix="data.path=FOLDER, or data.source=shapes for procedural pictures",
            code=ExitCode.CONFIG,
        )
    return SOURCES[spec.source](spec)


def _imagefolder(spec: SourceSpec) -> Source:
    return open_imagefolder(
        spec.path,
        split=spec.split,
        caption_column=spec.caption_column,
        missing_caption=spec.missing_caption,
    )


def _huggingface(spec: SourceSpec) -> Source:
    return open_huggingface(
        spec.path,
        split=spec.split,
        image_column=spec.image_column,
        caption_column=spec.caption_column,
        missing_caption=spec.missing_caption,
    )


def _shapes(spec: SourceSpec) -> Source:
    from ldm.data.shapes import open_shapes

    return open_shapes(spec.count, spec.split, spec.image_px, spec.seed)


SOURCES: dict[str, Callable[[SourceSpec], Source]] = {
    "imagefolder": _imagefolder,
    "huggingface": _huggingface,
    "shapes": _shapes,
}
