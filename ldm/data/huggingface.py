"""Any Hugging Face data set as a Source: a hub id, a parquet file, a folder, a saved data set."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.data.captions import bad_data, check_column, clean, require_captions
from ldm.data.decode import decode
from ldm.errors import LdmError, missing_package
from ldm.types import Example

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class HuggingFaceSource:
    """The Source of `open_huggingface`; ids are the fingerprint's start and the row number.

    Pictures stay encoded in the (memory-mapped) table and are decoded by `ldm.data.decode`.
    """

    table: Dataset
    image_column: str
    roots: tuple[str, ...]
    ids: tuple[str, ...]
    captions: tuple[str, ...]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Example:
        name = self.ids[index]
        cell = self.table[index][self.image_column] or {}
        if cell.get("bytes"):
            pixels = decode(cell["bytes"], name=name)
        elif cell.get("path"):
            pixels = decode(_inside(cell["path"], self.roots, name), name=name)
        else:
            raise bad_data("the row holds no picture", name)
        return Example(name, pixels, self.captions[index])


def open_huggingface(
    path: str,
    *,
    split: str = "train",
    image_column: str = "image",
    caption_column: str = "text",
    missing_caption: str = "error",
) -> HuggingFaceSource:
    """Opens a data set through `datasets`.

    Args:
        path: a hub id (`owner/name`), a local parquet file, a folder that `load_dataset` reads, or
            one written by `save_to_disk`.
        split: which split; `train` for a single parquet file.
        image_column: the column of pictures (bytes or paths).
        caption_column: the column of captions (strings).
        missing_caption: "error", or "empty" to accept rows without caption.

    Raises:
        LdmError: code BAD_DATA if it cannot be loaded, is empty, lacks a column, or a caption is
            missing or not a string.
    """
    table = _load(path, split)
    columns = list(table.column_names)
    check_column(image_column, columns, key="data.image_column", where=path)
    check_column(caption_column, columns, key="data.caption_column", where=path)
    if not len(table):
        raise bad_data(f"split {split!r} has no rows", path)
    table = _encoded(table.select_columns([image_column, caption_column]), image_column, path)
    captions = tuple(
        clean(value, f"{path}, row {row}, column {caption_column}")
        for row, value in enumerate(table.with_format(None)[caption_column])
    )
    names = [f"row {row}" for row in range(len(table))]
    require_captions(
        names, captions, missing_caption=missing_caption, where=path, fix="fill the caption column"
    )
    fingerprint = _fingerprint(_sizes(table, image_column), captions)
    ids = tuple(f"{fingerprint[:8]}-{row:08d}" for row in range(len(table)))
    return HuggingFaceSource(table, image_column, _roots(path), ids, captions, fingerprint)


def _load(path: str, split: str) -> Dataset:
    place = Path(path).expanduser()
    if not place.exists() and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise bad_data("no such file or folder", path, "set data.path to a hub id or a local path")
    try:
        import datasets
    except ImportError as error:
        raise missing_package("datasets", "data", "data.source: huggingface") from error
    # One place for whatever the library raises (its own errors, pyarrow's, the network's).
    try:
        if place.is_file():
            files = {split: str(place)}
            loaded = datasets.load_dataset("parquet", data_files=files, split=split)
        elif (place / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(str(place))[split]
        elif (place / "state.json").is_file():
            loaded = datasets.load_from_disk(str(place))
        else:
            loaded = datasets.load_dataset(str(place) if place.exists() else path, split=split)
    except Exception as error:
        raise _cannot_load(path, split, place.exists(), error) from error
    if not isinstance(loaded, datasets.Dataset):
        raise bad_data(f"a {type(loaded).__name__}, not one table of rows", path)
    return loaded


def _cannot_load(path: str, split: str, is_local: bool, error: Exception) -> LdmError:
    if isinstance(error, ConnectionError) and not is_local:
        return bad_data(
            "the data set is neither a local path nor in the cache, and the Hub cannot be reached",
            path,
            "connect once to download it, or give a local folder or parquet file",
        )
    detail = str(error).partition("\n")[0] or type(error).__name__
    return bad_data(f"split {split!r} cannot be loaded ({detail})", path)


def _encoded(table: Dataset, column: str, path: str) -> Dataset:
    """The table with pictures as `{"bytes", "path"}`, so that only our decoder opens them."""
    import datasets

    try:
        return table.cast_column(column, datasets.Image(decode=False))
    except Exception as error:  # pyarrow's conversion errors have no common base of their own
        kind = table.features[column]
        raise bad_data(f"column {column!r} holds {kind}, not pictures", path) from error


def _sizes(table: Dataset, column: str) -> list[int]:
    """Encoded bytes per picture, from the table's offsets: reads no picture."""
    import pyarrow.compute as pc

    cells: Any = table.with_format("arrow")[:][column]
    lengths = pc.binary_length(pc.struct_field(cells, "bytes")).to_pylist()
    paths = pc.struct_field(cells, "path").to_pylist()
    return [_size(*cell) for cell in zip(lengths, paths, strict=True)]


def _size(length: int | None, path: str | None) -> int:
    if length is not None:
        return length
    return os.path.getsize(path) if path and os.path.isfile(path) else -1


def _fingerprint(sizes: Sequence[int], captions: Sequence[str]) -> str:
    """A hash of sizes and captions in row order: equal on every machine with the same data."""
    digest = hashlib.blake2b(digest_size=16)
    for size, caption in zip(sizes, captions, strict=True):
        digest.update(f"{size}\0{caption}\0".encode())
    return digest.hexdigest()


def _roots(path: str) -> tuple[str, ...]:
    """Folders in which pictures named by path may lie: the data set's own, or the caches."""
    place = Path(path).expanduser()
    if place.exists():
        return (os.path.realpath(place if place.is_dir() else place.parent),)
    from datasets import config
    from huggingface_hub import constants

    caches = (config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH, constants.HF_HUB_CACHE)
    return tuple(os.path.realpath(cache) for cache in caches)


def _inside(path: str, roots: Sequence[str], name: str) -> Path:
    """`path`, refused if it leads outside: a table from elsewhere must not read other files."""
    resolved = os.path.realpath(path) if "\0" not in path else ""
    if not any(resolved.startswith(root + os.sep) for root in roots):
        raise bad_data(f"picture {path!r} lies outside the data set", name)
    return Path(resolved)
