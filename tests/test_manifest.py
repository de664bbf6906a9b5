"""A manifest finds every damage and trusts no name."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ldm import storage
from ldm.errors import ExitCode, LdmError
from ldm.storage import directories


@pytest.fixture
def final(tmp_path: Path) -> Path:
    """A published directory."""
    with storage.publish(tmp_path / "final", {"step": 1}) as directory:
        storage.make_directory(directory / "unet")
        storage.write_bytes(directory / "unet" / "weights", bytes(range(32)))
        storage.write_json(directory / "contract.json", {"step": 1})
    return tmp_path / "final"


def test_every_flipped_byte_of_every_file_is_detected_and_its_file_named(final: Path) -> None:
    for path in [p for p in final.rglob("*") if p.is_file()]:
        original = path.read_bytes()
        for position in range(len(original)):
            damaged = bytearray(original)
            damaged[position] ^= 1 << position % 8
            path.write_bytes(damaged)
            with pytest.raises(LdmError) as caught:
                storage.verify(final)
            assert caught.value.code == ExitCode.IO
            if path.name != storage.MANIFEST:
                assert str(path) in str(caught.value)
        path.write_bytes(original)
    assert storage.verify(final)["facts"] == {"step": 1}


def test_every_truncation_is_detected_with_expected_and_actual_bytes(final: Path) -> None:
    for path in [p for p in final.rglob("*") if p.is_file()]:
        original = path.read_bytes()
        for length in range(len(original)):
            path.write_bytes(original[:length])
            with pytest.raises(LdmError) as caught:
                storage.verify(final)
            if path.name != storage.MANIFEST:
                assert f"has {length} bytes, expected {len(original)}" in str(caught.value)
        path.write_bytes(original)


def test_a_missing_file_or_manifest_is_named(final: Path) -> None:
    (final / "contract.json").unlink()
    with pytest.raises(LdmError, match=r"contract\.json: is missing"):
        storage.verify(final)
    (final / storage.MANIFEST).unlink()
    with pytest.raises(LdmError, match=r"has no MANIFEST\.json"):
        storage.verify(final)


def test_files_that_the_manifest_does_not_list_are_tolerated(final: Path) -> None:
    (final / "notes.txt").write_text("mine")
    assert "notes.txt" not in storage.verify(final)["files"]


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "a/../../x", "", ".", "a//b", "./a", "C:\\x", "a\\b", "\0"]
)
def test_a_manifest_cannot_name_anything_outside_its_directory(name: str, final: Path) -> None:
    (final.parent / "secret").write_bytes(b"x")
    entry = {"size": 1, "sha256": storage.sha256(final.parent / "secret")}
    forge(final, {name: entry})
    with pytest.raises(LdmError, match="not a plain name"):
        storage.verify(final)


def test_a_manifest_cannot_reach_outside_through_a_symbolic_link(final: Path) -> None:
    (final.parent / "secret").write_bytes(b"x")
    entry = {"size": 1, "sha256": storage.sha256(final.parent / "secret")}
    (final / "link").symlink_to(final.parent)
    (final / "file").symlink_to(final.parent / "secret")
    for name in ("link/secret", "file"):
        forge(final, {name: entry})
        with pytest.raises(LdmError, match="not a plain name"):
            storage.verify(final)


def test_a_pipe_in_the_place_of_a_file_does_not_block(final: Path) -> None:
    (final / "contract.json").unlink()
    os.mkfifo(final / "contract.json")
    with pytest.raises(LdmError, match="not a regular file"):
        storage.verify(final)


def test_a_newer_format_is_refused_clearly(final: Path) -> None:
    manifest = json.loads((final / storage.MANIFEST).read_bytes())
    (final / storage.MANIFEST).write_text(json.dumps({**manifest, "format_version": 2}))
    with pytest.raises(LdmError, match="written in format 2") as caught:
        storage.verify(final)
    assert "upgrade" in caught.value.fix


@pytest.mark.parametrize("text", ["", "[]", "{}", "[" * 100_000, '{"format_version": 1}', "\xff"])
def test_a_hostile_manifest_is_one_clear_error(text: str, final: Path) -> None:
    (final / storage.MANIFEST).write_text(text, encoding="latin-1")
    with pytest.raises(LdmError, match="is damaged"):
        storage.verify(final)


def forge(final: Path, files: dict[str, object]) -> None:
    manifest = {"format_version": 1, "facts": {}, "files": files}
    (final / storage.MANIFEST).write_bytes(directories._render(manifest))
