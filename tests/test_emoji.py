"""The emoji folder: pictures with names, or a clear word about what is missing."""

import json
from pathlib import Path

import pytest
from PIL import Image

from ldm.cli import main
from ldm.data.emoji import FONT, write_emoji
from ldm.errors import ExitCode


def test_a_missing_font_and_an_existing_folder_are_named(tmp_path, capsys):
    missing = str(tmp_path / "no.ttf")
    assert main(["data", "emoji", str(tmp_path / "new"), "--font", missing]) == ExitCode.IO
    assert "fonts-noto-color-emoji" in capsys.readouterr().err
    assert main(["data", "emoji", str(tmp_path)]) == ExitCode.USAGE
    assert "the folder exists" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(not FONT.is_file(), reason="needs Debian's fonts-noto-color-emoji")
def test_every_picture_has_its_name_and_is_not_blank(tmp_path: Path):
    pytest.importorskip("emoji")
    count = write_emoji(tmp_path / "emoji", image_px=32)
    rows = [json.loads(x) for x in (tmp_path / "emoji/metadata.jsonl").read_text().splitlines()]
    assert len(rows) == count > 1000
    assert len({row["text"] for row in rows}) == count
    for row in rows[::50]:
        with Image.open(tmp_path / "emoji" / row["file_name"]) as picture:
            assert picture.size == (32, 32)
            assert len(picture.getcolors(1024) or range(1024)) > 1
