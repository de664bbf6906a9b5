"""Writes a captioned image folder of emoji: a font's pictures with their Unicode names.

For people who have no captioned pictures at hand: Debian's `fonts-noto-color-emoji` and the package
`emoji` are all it needs. The font is under the SIL Open Font License 1.1; keep its licence beside a
set that you publish.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

from ldm.errors import ExitCode, LdmError, missing_package
from ldm.storage import publish, write_text

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
FONT_PX = 109
"""The one size that the font's bitmaps have."""
WIDEST_PX = 140
"""A sequence that the font does not know is drawn as several glyphs, wider than this."""


def write_emoji(folder: Path, *, image_px: int = 64, font: Path = FONT) -> int:
    """Renders every emoji without skin tone and flag that the font has, each name once.

    Args:
        folder: made by this call; gets one PNG per emoji and metadata.jsonl.
        image_px: side of the pictures.
        font: Noto Color Emoji in its bitmap (CBDT) form.

    Returns:
        the number of pictures.

    Raises:
        LdmError: code IO without the font, USAGE without the package `emoji` or when the folder
            exists.
    """
    if folder.exists():
        raise LdmError("the folder exists", where=str(folder), fix="give a new folder")
    tile = _tile_maker(font, image_px)
    rows: list[dict[str, str]] = []
    with publish(folder) as out:
        for character, caption in _named():
            picture = tile(character)
            if picture is not None:
                name = f"{len(rows):04d}.png"
                picture.save(out / name)
                rows.append({"file_name": name, "text": caption})
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_text(out / "metadata.jsonl", text)
    return len(rows)


def _named() -> Iterator[tuple[str, str]]:
    """Fully qualified emoji and their names, without skin tones and flags, each name once."""
    try:
        import emoji
    except ImportError:
        raise missing_package("emoji", "emoji", "rendering emoji") from None
    seen: set[str] = set()
    for character, facts in sorted(emoji.EMOJI_DATA.items()):
        caption = facts["en"].strip(":").replace("_", " ")
        plain = "skin tone" not in caption and not caption.startswith("flag")
        is_flag = all(0x1F1E6 <= ord(c) <= 0x1F1FF for c in character)
        if facts["status"] == emoji.STATUS["fully_qualified"] and plain and not is_flag:
            if caption not in seen:
                yield character, caption
            seen.add(caption)


def _tile_maker(font: Path, image_px: int) -> Any:
    if not font.is_file():
        raise LdmError(
            "the emoji font is not there",
            where=str(font),
            fix="apt install fonts-noto-color-emoji, or give --font",
            code=ExitCode.IO,
        )
    layout = ImageFont.Layout.RAQM if features.check("raqm") else ImageFont.Layout.BASIC
    face = ImageFont.truetype(str(font), FONT_PX, layout_engine=layout)

    def draw(character: str) -> Image.Image:
        sheet = Image.new("RGBA", (136, 128))
        ImageDraw.Draw(sheet).text((0, 0), character, font=face, embedded_color=True)
        return sheet

    unknown = np.asarray(draw(chr(0xF0000))).tobytes()

    def tile(character: str) -> Image.Image | None:
        if face.getlength(character) > WIDEST_PX:
            return None
        sheet = draw(character)
        if sheet.getbbox() is None or np.asarray(sheet).tobytes() == unknown:
            return None
        square = Image.new("RGB", (136, 136), "white")
        square.paste(sheet, (0, 4), sheet)
        return square.resize((image_px, image_px), Image.Resampling.LANCZOS)

    return tile
