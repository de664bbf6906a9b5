"""The rules that span several fields of the section `text`. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterator

from ldm.config.schema import TextConfig


def text_conflicts(text: TextConfig) -> Iterator[tuple[str, str, str]]:
    """Every rule of the text encoder that is broken, as (key, what, fix)."""
    joint = text.style != "single"
    if joint and text.path is None:
        yield "text.path", f"text.style={text.style} needs a path", "text.path=FOLDER"
    if joint and (text.layer is not None or text.final_norm is not None):
        yield (
            "text.layer",
            f"text.style={text.style} says itself which layers are read",
            "leave text.layer and text.final_norm out",
        )
    if joint and text.lower_case:
        yield "text.lower_case", f"text.style={text.style} reads captions as they are", "false"
    if text.classes and (joint or text.path is not None):
        yield "text.classes", "labels take the place of an encoder", "text.path=null"
    if text.classes and text.zero_null:
        yield "text.zero_null", "no class is a label of its own, not zeros", "text.zero_null=false"
    if text.further_paths and not joint:
        yield (
            "text.further_paths",
            "one encoder has no second path",
            "text.style=sdxl, or leave it out",
        )
    wanted = {"sdxl": (1,), "sd3": (1, 2), "flux": (1,)}.get(text.style, (0,))
    if joint and text.further_paths and len(text.further_paths) not in wanted:
        yield (
            "text.further_paths",
            f"text.style={text.style} has no place for {len(text.further_paths)} further encoders",
            f"give {' or '.join(map(str, wanted))}",
        )
