"""Pictures with the request that made them: display, grids, PNG metadata. Loads no torch."""

from __future__ import annotations

import base64
import io
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from ldm import __version__
from ldm.errors import ExitCode, LdmError
from ldm.storage import write_bytes

METADATA_KEY = "ldm"


@dataclass(frozen=True)
class Request:
    """Everything that decides one picture, given the model.

    Fields with defaults came later than the first pictures: in an older one they are missing, and
    the default is what drew it.
    """

    prompt: str
    negative: str | None
    seed: int
    steps: int
    sampler: str
    spacing: str
    shift: float
    cfg_scale: float
    rescale: float
    interval: tuple[float, float]
    eta: float
    height: int
    width: int
    guidance: str = "classifier_free"
    threshold: float = 0.0
    threshold_limit: float = 3.0
    apg_eta: float = 0.0
    apg_norm: float = 0.0
    apg_momentum: float = -0.5
    guide: str | None = None
    """Identity of the weaker model of autoguidance."""
    guide_path: str | None = None
    """Where that model was loaded from."""
    classifier: str | None = None
    """Name of the function whose gradient guided; the function itself is not kept."""
    source: str | None = None
    """Hash of the picture that it starts from; None for noise."""
    weighting: bool = False
    """Whether `(word:1.3)` in the prompts is emphasis, or text."""
    lora: str | None = None
    """Hash and strength of the adapters merged into the model, one a line."""
    lora_path: str | None = None
    """Where they were loaded from, in the same order."""

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Request:
        """The inverse of `asdict`; what is missing takes its default.

        Raises:
            LdmError: when a field without default is missing, or one is unknown.
            ValueError, TypeError: when a value is of another kind.
        """
        names = {field.name for field in fields(cls)}
        old = {field.name for field in fields(cls) if field.default is MISSING}
        if not old <= values.keys() <= names:
            raise LdmError(
                f"the stored request has other fields than this version knows: "
                f"{sorted((old - values.keys()) | (values.keys() - names))}",
                where="metadata",
                fix=f"use the version of ldm that made the picture (this is {__version__})",
            )
        legal: dict[str, tuple[type, ...]] = {
            "str": (str,),
            "str | None": (str, type(None)),
            "int": (int,),
            "float": (int, float),
            "tuple[float, float]": (list, tuple),
            "bool": (bool,),
        }
        for field in fields(cls):
            value = values.get(field.name, field.default)
            is_wrong_bool = isinstance(value, bool) and field.type != "bool"
            if not isinstance(value, legal[str(field.type)]) or is_wrong_bool:
                raise ValueError(f"{field.name} is {value!r}")
        low, high = values["interval"]
        return cls(**{**values, "interval": (float(low), float(high))})

    def settings(self) -> tuple[object, ...]:
        """What pictures must share to be drawn in one batch: all but prompt, seed and source."""
        own = ("prompt", "seed", "source")
        return tuple(getattr(self, field.name) for field in fields(self) if field.name not in own)

    def parameters(self, model: str) -> str:
        """The text that picture browsers for Stable Diffusion read from the chunk `parameters`."""
        negative = f"\nNegative prompt: {self.negative}" if self.negative else ""
        return (
            f"{self.prompt}{negative}\nSteps: {self.steps}, Sampler: {self.sampler}, "
            f"CFG scale: {self.cfg_scale:g}, Seed: {self.seed}, "
            f"Size: {self.width}x{self.height}, Model hash: {model[:10]}"
        )


@dataclass(frozen=True)
class Pictures(Sequence[Image.Image]):
    """Drawn pictures; shows itself in a notebook.

    Args:
        images: RGB pictures.
        requests: what each was asked for.
        model: identity of the model that drew them.
        model_path: where that model was loaded from.
    """

    images: tuple[Image.Image, ...]
    requests: tuple[Request, ...]
    model: str
    model_path: str

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Any) -> Any:
        return self.images[index]

    def __iter__(self) -> Iterator[Image.Image]:
        return iter(self.images)

    def grid(self, columns: int | None = None) -> Image.Image:
        """All pictures on one sheet."""
        return grid(self.images, columns)

    def save(self, directory: Path | str, *, start: int | None = None) -> list[Path]:
        """Writes PNG files with their requests inside; never overwrites one.

        Args:
            directory: created when missing.
            start: number of the first file; None takes the next free number.
        """
        folder = writable_folder(Path(directory))
        taken = [int(p.stem) for p in folder.glob("*.png") if p.stem.isdecimal()]
        number = max(taken, default=-1) + 1 if start is None else start
        paths = []
        for offset, (image, request) in enumerate(zip(self.images, self.requests, strict=True)):
            path = folder / f"{number + offset:05d}.png"
            write_bytes(path, png(image, request, self.model, self.model_path))
            paths.append(path)
        return paths

    def _repr_png_(self) -> bytes:
        return _encode(self.grid())

    def _repr_html_(self) -> str:
        cells = "".join(
            f'<figure style="display:inline-block;margin:4px;max-width:{max(i.width, 160)}px">'
            f'<img src="data:image/png;base64,{base64.b64encode(_encode(i)).decode()}"/>'
            f'<figcaption style="font-size:small">{_escape(r.prompt)} · seed {r.seed}</figcaption>'
            "</figure>"
            for i, r in zip(self.images, self.requests, strict=True)
        )
        return f"<div>{cells}</div>"


def writable_folder(folder: Path) -> Path:
    """The folder, made when missing.

    Raises:
        LdmError: code IO when it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LdmError(
            f"cannot create the folder ({error.strerror})",
            where=str(folder),
            fix="choose another folder",
            code=ExitCode.IO,
        ) from None
    if not os.access(folder, os.W_OK):
        raise LdmError(
            "the folder cannot be written",
            where=str(folder),
            fix="choose another folder",
            code=ExitCode.IO,
        )
    return folder


def grid(images: Sequence[Image.Image], columns: int | None = None, gap: int = 2) -> Image.Image:
    """Pictures side by side on a light sheet, as square as possible unless `columns` is given."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    width, height = max(i.width for i in images), max(i.height for i in images)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), "#ddd")
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        sheet.paste(image, (gap + column * (width + gap), gap + row * (height + gap)))
    return sheet


def png(image: Image.Image, request: Request, model: str, model_path: str) -> bytes:
    """PNG bytes that carry the whole request, for people's tools and for `ldm replay`."""
    facts = {
        "version": __version__,
        "model": model,
        "model_path": model_path,
        "request": asdict(request),
    }
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt("parameters", request.parameters(model))
    chunks.add_itxt(METADATA_KEY, json.dumps(facts, ensure_ascii=False))
    return _encode(image, chunks)


def read_request(path: Path) -> tuple[Request, str, str]:
    """The request, model identity and model path inside a picture that `ldm infer` wrote.

    Raises:
        LdmError: code IO for an unreadable file, USAGE for a picture without a request.
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()
            text = image.text.get(METADATA_KEY)  # type: ignore[attr-defined]
    except FileNotFoundError:
        raise LdmError(
            "no such file",
            where=str(path),
            fix="give a PNG that `ldm infer` wrote",
            code=ExitCode.IO,
        ) from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise LdmError(
            f"this is not a readable PNG ({error})",
            where=str(path),
            fix="give a PNG that `ldm infer` wrote",
            code=ExitCode.IO,
        ) from None
    if text is None:
        raise LdmError(
            "the picture carries no request",
            where=str(path),
            fix="give a PNG that `ldm infer` wrote; other tools may have removed its metadata",
        )
    try:
        facts = json.loads(text)
        request = Request.from_json(facts["request"])
        return request, str(facts["model"]), str(facts["model_path"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LdmError(
            f"the request inside the picture is damaged ({error})",
            where=str(path),
            fix="draw the picture again",
        ) from None


def _encode(image: Image.Image, chunks: PngImagePlugin.PngInfo | None = None) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=chunks)
    return buffer.getvalue()


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
