"""Reads captions from text files and checks them. Finds no pictures."""

from __future__ import annotations

import csv
import difflib
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from ldm.errors import ExitCode, LdmError

MAX_CAPTION_BYTES = 64 * 1024
"""Longer than this is a file in the wrong place, not a caption."""

Row = tuple[int, dict[str, object]]
"""A line number and the fields found there."""


def bad_data(what: str, where: object = "", fix: str = "") -> LdmError:
    """The error for a data set that cannot be used (exit code 65)."""
    return LdmError(what, where=str(where), fix=fix, code=ExitCode.BAD_DATA)


def some(names: Iterable[str], limit: int = 20) -> str:
    """The first `limit` names and how many more there are, for an error message."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, with or without a byte order mark.

    Raises:
        LdmError: code BAD_DATA with the offset of the first byte that is not UTF-8 text.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise bad_data(f"cannot be read ({error.strerror})", path) from error
    mark = 3 if raw.startswith(b"\xef\xbb\xbf") else 0
    try:
        text = raw[mark:].decode("utf-8")
    except UnicodeDecodeError as error:
        where = error.start + mark
        raise bad_data(
            f"byte {where} (0x{raw[where]:02x}) is not UTF-8", path, "save the file as UTF-8"
        ) from None
    if (nul := raw.find(b"\0")) >= 0:
        raise bad_data(f"byte {nul} is NUL: not a UTF-8 text", path, "save the file as UTF-8")
    return text


def read_rows(path: Path) -> list[Row]:
    """The rows of a metadata.jsonl or metadata.csv, each with its line number.

    Raises:
        LdmError: code BAD_DATA naming the file and the line that cannot be read.
    """
    text = read_text(path)
    return _csv_rows(text, path) if path.suffix == ".csv" else _json_rows(text, path)


def _json_rows(text: str, path: Path) -> list[Row]:
    rows: list[Row] = []
    # not splitlines(): JSON strings may hold U+2028 and others that it takes for line ends
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise bad_data(f"not JSON ({error})", f"{path}:{number}") from None
        if not isinstance(row, dict):
            raise bad_data(
                f"a {type(row).__name__} where an object belongs",
                f"{path}:{number}",
                'write one object per line, e.g. {"file_name": "a.png", "text": "a cat"}',
            )
        rows.append((number, row))
    return rows


def _csv_rows(text: str, path: Path) -> list[Row]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows: list[Row] = []
    try:
        for row in reader:
            if None in row:
                raise bad_data(
                    "more fields than the header has",
                    f"{path}:{reader.line_num}",
                    'put captions that contain a comma in double quotes: a.png,"red, round"',
                )
            rows.append((reader.line_num, dict(row)))
    except csv.Error as error:
        raise bad_data(f"not CSV ({error})", f"{path}:{reader.line_num}") from None
    return rows


def check_column(column: str, columns: Sequence[str], *, key: str, where: object) -> None:
    """Raises unless `column` exists; lists the columns and the nearest name, guesses nothing."""
    if column in columns:
        return
    near = difflib.get_close_matches(column, columns, n=1, cutoff=0.5)
    raise bad_data(
        f"no column {column!r}; it has {', '.join(map(repr, columns)) or 'none'}",
        where,
        f"set {key}" + (f": {near[0]}" if near else " to one of these"),
    )


def clean(value: object, where: object) -> str:
    """One caption as a single stripped line; "" for an absent one.

    Args:
        value: what the file holds; None means absent.
        where: file and row, for the error.

    Raises:
        LdmError: code BAD_DATA if it is not a string or is longer than MAX_CAPTION_BYTES.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise bad_data(
            f"the caption is of type {type(value).__name__} ({str(value)[:40]!r}), not a string",
            where,
        )
    try:
        size = len(value.encode())
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
        raise bad_data("the caption is not valid Unicode", where) from None
    if size > MAX_CAPTION_BYTES:
        raise bad_data(
            f"the caption has {size} bytes, more than the {MAX_CAPTION_BYTES} allowed", where
        )
    if "\0" in value:
        raise bad_data("the caption contains a NUL character", where)
    return " ".join(value.splitlines()).strip()


def require_captions(
    ids: Sequence[str], captions: Sequence[str], *, missing_caption: str, where: object, fix: str
) -> None:
    """Raises for pictures without a caption, unless `missing_caption` is "empty".

    Raises:
        LdmError: code BAD_DATA with their number and the first 20 names.
    """
    if missing_caption not in ("error", "empty"):
        raise LdmError(
            f"unknown value {missing_caption!r}",
            where="missing_caption",
            fix="error or empty",
            code=ExitCode.CONFIG,
        )
    without = [name for name, caption in zip(ids, captions, strict=True) if not caption]
    if without and missing_caption == "error":
        raise bad_data(
            f"{len(without)} of {len(ids)} pictures have no caption: {some(without)}",
            where,
            f"{fix}, or accept them with missing_caption: empty",
        )
