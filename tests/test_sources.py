"""Data sets on disk: every layout is read alike, every fault is named."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.data.captions import MAX_CAPTION_BYTES
from ldm.data.huggingface import open_huggingface
from ldm.data.imagefolder import open_imagefolder
from ldm.data.loader import Loader
from ldm.data.sources import SOURCES, SourceSpec, open_source
from ldm.errors import ExitCode, LdmError

COLOURS = {"a": (255, 0, 0), "b": (0, 255, 0), "c": (0, 0, 255)}


def paint(path: Path, colour: tuple[int, int, int] = (9, 9, 9)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), colour).save(path)
    return path


def with_metadata(root: Path, rows: list[dict[str, object]], name: str = "metadata.jsonl") -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures in subfolders and metadata.jsonl, rows not in order."""
    root = tmp_path / "data"
    for name, colour in COLOURS.items():
        paint(root / "images" / f"{name}.png", colour)
    rows = [{"file_name": f"images/{name}.png", "text": f"caption {name}"} for name in "cab"]
    return with_metadata(root, rows)


@pytest.fixture
def beside(tmp_path: Path) -> Path:
    """The same pictures with a text file beside each."""
    root = tmp_path / "data"
    for name, colour in COLOURS.items():
        paint(root / "images" / f"{name}.png", colour)
        (root / "images" / f"{name}.txt").write_text(f"caption {name}\n")
    return root


def refusal(root: Path, **options: object) -> str:
    with pytest.raises(LdmError) as caught:
        open_imagefolder(root, **options)
    assert caught.value.code == ExitCode.BAD_DATA
    return str(caught.value)


def assert_three(source) -> None:
    assert len(source) == 3
    assert list(source.ids) == ["images/a.png", "images/b.png", "images/c.png"]
    assert list(source.captions) == ["caption a", "caption b", "caption c"]
    for index, (name, colour) in enumerate(COLOURS.items()):
        example = source[index]
        assert (example.id, example.caption) == (f"images/{name}.png", f"caption {name}")
        np.testing.assert_array_equal(example.pixels, np.full((4, 4, 3), colour))


def test_jsonl_csv_and_text_files_beside_give_the_same_source(folder, tmp_path):
    lines = open_imagefolder(folder)
    assert_three(lines)

    table = tmp_path / "table"
    shutil.copytree(folder / "images", table / "images")
    text = "file_name,text\r\nimages/a.png,caption a\r\n\r\nimages/c.png,caption c\r\n"
    (table / "metadata.csv").write_bytes(
        b"\xef\xbb\xbf" + text.encode() + b"images/b.png,caption b"
    )
    assert_three(open_imagefolder(table))

    texts = tmp_path / "texts"
    shutil.copytree(folder / "images", texts / "images")
    for name in COLOURS:
        (texts / "images" / f"{name}.txt").write_bytes(f"\ufeffcaption {name}\r\n".encode())
    assert_three(open_imagefolder(texts))
    prints = {open_imagefolder(root).fingerprint for root in (folder, table, texts)}
    assert len(prints) == 1


def test_metadata_in_subfolders_is_relative_to_its_own_folder(tmp_path):
    for name in ("one", "two"):
        paint(tmp_path / name / "x.png")
        with_metadata(tmp_path / name, [{"file_name": "x.png", "text": name}])
    source = open_imagefolder(tmp_path)
    assert list(zip(source.ids, source.captions, strict=True)) == [
        ("one/x.png", "one"),
        ("two/x.png", "two"),
    ]


def test_split_folders_are_entered_and_a_missing_split_is_named(folder, tmp_path):
    root = tmp_path / "splits"
    shutil.copytree(folder, root / "train")
    shutil.copytree(folder, root / "test")
    assert_three(open_imagefolder(root))
    assert_three(open_imagefolder(root, split="test"))
    assert "no split 'validation'; it has test, train" in refusal(root, split="validation")


def test_another_caption_column_can_be_chosen_and_a_wrong_one_is_answered_with_the_nearest(folder):
    rows = [{"file_name": f"images/{n}.png", "prompt": f"caption {n}", "size": 3} for n in "abc"]
    with_metadata(folder, rows)
    assert_three(open_imagefolder(folder, caption_column="prompt"))
    message = refusal(folder, caption_column="promt")
    assert "no column 'promt'; it has 'prompt', 'size'" in message
    assert "data.caption_column: prompt" in message


def test_the_fingerprint_is_the_same_elsewhere_and_changes_with_the_data(folder, tmp_path):
    first = open_imagefolder(folder).fingerprint
    copy = shutil.copytree(folder, tmp_path / "elsewhere" / "copy", copy_function=shutil.copyfile)
    os.utime(copy / "images" / "a.png", (1, 1))
    assert open_imagefolder(copy).fingerprint == first

    text = (copy / "metadata.jsonl").read_text()
    (copy / "metadata.jsonl").write_text(text.replace("caption b", "caption B"))
    caption_changed = open_imagefolder(copy).fingerprint
    (copy / "metadata.jsonl").write_text(text)
    paint(copy / "images" / "a.png").write_bytes((copy / "images/a.png").read_bytes() + b"\0")
    size_changed = open_imagefolder(copy).fingerprint
    assert len({first, caption_changed, size_changed}) == 3


def test_pictures_without_caption_are_counted_and_twenty_are_named(beside):
    for k in range(30):
        paint(beside / f"new{k:02}.png")
    message = refusal(beside)
    assert "30 of 33 pictures have no caption: new00.png, " in message
    assert "new19.png and 10 more" in message
    assert "new20.png" not in message
    source = open_imagefolder(beside, missing_caption="empty")
    assert source.captions[source.ids.index("new20.png")] == ""
    with pytest.raises(LdmError, match="error or empty"):
        open_imagefolder(beside, missing_caption="skip")


@pytest.mark.parametrize("caption", ["", "  \n ", None])
def test_an_empty_caption_counts_as_missing(folder, caption):
    rows = [{"file_name": f"images/{n}.png", "text": caption if n == "b" else n} for n in "abc"]
    with_metadata(folder, rows)
    assert "1 of 3 pictures have no caption: images/b.png" in refusal(folder)


def test_a_picture_without_metadata_row_has_no_caption(folder):
    paint(folder / "images" / "d.png")
    assert "1 of 4 pictures have no caption: images/d.png" in refusal(folder)


def test_metadata_rows_without_picture_are_counted_and_named(folder):
    (folder / "images" / "b.png").unlink()
    message = refusal(folder)
    assert "1 pictures named in the metadata do not exist: images/b.png" in message


def test_missing_and_empty_folders_are_named(tmp_path):
    assert "no such folder" in refusal(tmp_path / "none")
    assert "not a folder" in refusal(paint(tmp_path / "x.png"))
    (tmp_path / "empty").mkdir()
    assert "no pictures in this folder" in refusal(tmp_path / "empty")
    (tmp_path / "empty" / "metadata.jsonl").touch()
    assert "no pictures in this folder" in refusal(tmp_path / "empty")


def test_bytes_that_are_not_utf8_are_named_with_their_offset(beside, folder):
    note = beside / "images" / "b.txt"
    note.write_bytes(b"\xef\xbb\xbfcaf\xe9 noir")
    (beside / "metadata.jsonl").unlink(missing_ok=True)
    message = refusal(beside)
    assert f"{note}: byte 6 (0xe9) is not UTF-8" in message
    assert "save the file as UTF-8" in message
    note.write_bytes("caption".encode("utf-16-le"))
    assert f"{note}: byte 1 is NUL" in refusal(beside)


def test_odd_but_legal_text_is_kept(folder):
    odd = 'two\u2028parts, «ünï» 🎨 "quoted"'
    rows = [{"file_name": f"images/{n}.png", "text": odd} for n in "abc"]
    lines = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (folder / "metadata.jsonl").write_bytes(lines.encode())
    assert open_imagefolder(folder).captions[0] == odd.replace("\u2028", " ")


def test_a_caption_of_more_than_64_kib_is_refused(folder):
    def rows(size: int) -> list[dict[str, object]]:
        return [{"file_name": f"images/{n}.png", "text": n * size} for n in "abc"]

    with_metadata(folder, rows(MAX_CAPTION_BYTES))
    assert len(open_imagefolder(folder).captions[0]) == MAX_CAPTION_BYTES
    with_metadata(folder, rows(MAX_CAPTION_BYTES + 1))
    assert "65537 bytes, more than the 65536 allowed" in refusal(folder)


@pytest.mark.parametrize(("value", "kind"), [(7, "int"), (["x"], "list"), ({"en": "x"}, "dict")])
def test_a_caption_that_is_not_a_string_is_named_with_its_row(folder, value, kind):
    rows = [{"file_name": f"images/{n}.png", "text": value if n == "b" else n} for n in "abc"]
    with_metadata(folder, rows)
    assert f"metadata.jsonl:2: the caption is of type {kind}" in refusal(folder)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"file_name": "images/a.png", "text": ', "metadata.jsonl:4: not JSON"),
        ('["images/a.png", "x"]', "metadata.jsonl:4: a list where an object belongs"),
        ('{"text": "x"}', "metadata.jsonl:4: file_name is None"),
        ('{"file_name": "images/./a.png", "text": "x"}', ":4: a second row for images/a.png"),
        ('{"file_name": "a\\u0000.png", "text": "x"}', "not the name of a file"),
        ('{"file_name": "images/a.png", "text": "\\u0000"}', ":4:"),
        ('{"file_name": "images/a\\ud800.png", "text": "x"}', "not UTF-8"),
        ('{"file_name": "' + "n" * 300 + '.png", "text": "x"}', "do not exist"),
    ],
)
def test_a_bad_metadata_line_is_named(folder, line, words):
    with (folder / "metadata.jsonl").open("a") as file:
        file.write(line + "\n")
    assert words in refusal(folder)


def test_csv_with_an_unquoted_comma_is_refused_with_its_line(folder):
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.csv").write_text("file_name,text\nimages/a.png,red, round\n")
    message = refusal(folder)
    assert "metadata.csv:2: more fields than the header has" in message
    (folder / "metadata.csv").write_text('file_name,text\nimages/a.png,"open\n')
    assert "not CSV" in refusal(folder)


def test_two_metadata_files_in_one_folder_are_refused(folder):
    (folder / "metadata.csv").write_text("file_name,text\n")
    assert "which one counts" in refusal(folder)


@pytest.mark.parametrize(
    "escape",
    [
        "../secret.png",
        "images/../../secret.png",
        "../door/images/a.png",
        ".hidden/secret.png",
        "{outside}/secret.png",
        "{outside}/data/images/a.png",
    ],
)
def test_a_metadata_row_may_not_leave_the_folder(folder, escape):
    paint(folder.parent / "secret.png")
    (folder.parent / "door").symlink_to(folder)
    (folder / ".hidden").symlink_to(folder.parent)
    name = escape.format(outside=folder.parent)
    with_metadata(folder, [{"file_name": name, "text": "x"}])
    assert "leads outside the data folder" in refusal(folder)


def test_a_link_may_not_leave_the_folder_and_loops_end(folder):
    (folder / "images" / "loop").symlink_to(folder)
    assert_three(open_imagefolder(folder))

    paint(folder.parent / "secret.png")
    link = folder / "images" / "link.png"
    link.symlink_to(folder.parent / "secret.png")
    assert "outside the data folder" in refusal(folder)
    link.unlink()
    (folder / "other").symlink_to(folder.parent, target_is_directory=True)
    assert "outside the data folder" in refusal(folder)


@pytest.mark.parametrize("twin", ["b.jpg", "B.png"])
def test_two_pictures_with_one_caption_file_are_refused(beside, twin):
    paint(beside / "images" / twin)
    message = refusal(beside)
    assert "share one caption file" in message
    assert f"images/{twin}" in message
    assert "images/b.png" in message


def test_unusual_legal_names_work(tmp_path):
    names = ["tab\tand\nnewline.png", "🎨 ünï.PNG", "x" * 240 + ".jpeg", "two.dots.webp"]
    for name in names:
        paint(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text(name)
    paint(tmp_path / ".hidden.png")
    source = open_imagefolder(tmp_path)
    assert list(source.ids) == sorted(names)
    assert [source[k].caption for k in range(4)] == [
        " ".join(n.splitlines()) for n in sorted(names)
    ]


def test_a_bad_picture_is_an_error_only_when_it_is_asked_for(folder):
    (folder / "images" / "b.png").write_bytes(b"<html>")
    source = open_imagefolder(folder)
    assert source[0].id == "images/a.png"
    with pytest.raises(LdmError, match=r"b\.png: not an image: it starts with '<html'") as caught:
        source[1]
    assert caught.value.code == ExitCode.BAD_DATA


# --- Hugging Face data sets -------------------------------------------------------------------


@pytest.fixture
def hf_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import config

    monkeypatch.setattr(config, "HF_DATASETS_CACHE", str(tmp_path / "hf-cache"))


@pytest.fixture
def parquet(folder: Path, tmp_path: Path) -> Path:
    return write_parquet(tmp_path / "p" / "data.parquet", folder, [f"caption {n}" for n in "abc"])


def write_parquet(path: Path, folder: Path, captions: list[object]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(exist_ok=True)
    files = [(folder / "images" / f"{name}.png").read_bytes() for name in "abc"]
    images = [{"bytes": file, "path": None} for file in files]
    pq.write_table(pa.table({"image": images, "text": captions}), path)
    return path


@pytest.mark.usefixtures("hf_cache")
def test_parquet_file_parquet_folder_and_saved_data_set_are_equal(parquet, tmp_path):
    import datasets

    file = open_huggingface(str(parquet))
    folder = open_huggingface(str(parquet.parent))
    saved = tmp_path / "saved"
    table = datasets.load_dataset("parquet", data_files=str(parquet), split="train")
    table.cast_column("image", datasets.Image()).save_to_disk(str(saved))
    disk = open_huggingface(str(saved))
    assert file.fingerprint == folder.fingerprint == disk.fingerprint
    assert file.ids == folder.ids == disk.ids
    assert file.ids[1] == f"{file.fingerprint[:8]}-00000001"
    for source in (file, folder, disk):
        assert list(source.captions) == ["caption a", "caption b", "caption c"]
        for index, colour in enumerate(COLOURS.values()):
            np.testing.assert_array_equal(source[index].pixels, np.full((4, 4, 3), colour))


@pytest.mark.usefixtures("hf_cache")
def test_a_folder_of_pictures_can_be_read_through_datasets(folder):
    source = open_huggingface(str(folder))
    assert sorted(source.captions) == ["caption a", "caption b", "caption c"]
    by_caption = {source[k].caption: source[k].pixels[0, 0].tolist() for k in range(3)}
    assert by_caption == {f"caption {name}": list(colour) for name, colour in COLOURS.items()}


@pytest.mark.usefixtures("hf_cache")
def test_faults_of_a_hugging_face_data_set_are_named(folder, parquet, tmp_path):
    def message(path: object, **options: object) -> str:
        with pytest.raises(LdmError) as caught:
            open_huggingface(str(path), **options)
        assert caught.value.code == ExitCode.BAD_DATA
        return str(caught.value)

    assert "no column 'txt'; it has 'image', 'text'" in message(parquet, caption_column="txt")
    assert "set data.image_column: image" in message(parquet, image_column="imag")
    assert "no such file or folder" in message(tmp_path / "none.parquet")
    assert "split 'dev' cannot be loaded" in message(parquet.parent, split="dev")
    numbers = write_parquet(tmp_path / "numbers.parquet", folder, [1, 2, 3])
    assert "row 0, column text: the caption is of type int" in message(numbers)
    gaps = write_parquet(tmp_path / "gaps.parquet", folder, ["x", None, " "])
    assert "2 of 3 pictures have no caption: row 1, row 2" in message(gaps)
    assert list(open_huggingface(str(gaps), missing_caption="empty").captions) == ["x", "", ""]
    assert "not pictures" in message(numbers, image_column="text", caption_column="image")
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(parquet.read_bytes()[:-20])
    assert "cannot be loaded" in message(broken)


def test_a_hub_id_without_network_is_one_sentence():
    with pytest.raises(LdmError, match="the Hub cannot be reached") as caught:
        open_huggingface("nobody/nothing")
    assert caught.value.code == ExitCode.BAD_DATA
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.usefixtures("hf_cache")
def test_bad_and_escaping_pictures_of_a_table_are_named_by_row(folder, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    secret = paint(tmp_path / "secret.png")
    images = [
        {"bytes": b"<html>", "path": None},
        {"bytes": None, "path": str(secret)},
        {"bytes": None, "path": None},
    ]
    root = tmp_path / "table"
    root.mkdir()
    pq.write_table(pa.table({"image": images, "text": list("abc")}), root / "t.parquet")
    source = open_huggingface(str(root / "t.parquet"))
    for index, words in enumerate(["not an image", "outside the data set", "holds no picture"]):
        with pytest.raises(LdmError, match=f"-0000000{index}: .*{words}") as caught:
            source[index]
        assert caught.value.code == ExitCode.BAD_DATA


# --- the table --------------------------------------------------------------------------------


@pytest.mark.usefixtures("hf_cache")
def test_every_source_of_the_table_opens_and_survives_a_worker_process(folder, parquet):
    paths = {"imagefolder": folder, "huggingface": parquet, "shapes": ""}
    for kind in SOURCES:
        source = open_source(SourceSpec(source=kind, path=str(paths[kind]), count=3, image_px=32))
        assert len(source) == len(source.ids) == len(source.captions) == 3
        assert source.fingerprint
        first = source[0]
        assert first.pixels.dtype == np.uint8
        assert (first.id, first.caption) == (source.ids[0], source.captions[0])
        batches = Loader(source, seed=0, batch_size=3, image_px=16, workers=1).batches()
        assert sorted(next(batches).ids) == sorted(source.ids)


def test_an_unknown_source_and_a_missing_path_are_explained():
    with pytest.raises(LdmError, match="known: imagefolder, huggingface, shapes") as caught:
        open_source(SourceSpec(source="imagefolders"))
    assert "did you mean imagefolder?" in str(caught.value)
    assert caught.value.code == ExitCode.CONFIG
    with pytest.raises(LdmError, match="needs a path"):
        open_source(SourceSpec(source="imagefolder"))
