"""Files and directories: atomic, verified, tolerant of hiccups, clear about faults."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ldm import storage
from ldm.errors import ExitCode, LdmError
from ldm.storage import ops


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(ops, "_PAUSES_S", (0.0,) * 5)
    yield
    ops.hook = None


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with steps 1 to 3."""
    for step in (1, 2, 3):
        make_step(tmp_path / "run", step)
    return tmp_path / "run"


def make_step(run: Path, step: int) -> Path:
    final = run / storage.step_name(step)
    with storage.publish(final, {"step": step}) as directory:
        storage.make_directory(directory / "unet")
        storage.write_bytes(directory / "unet" / "weights", bytes([step % 251] * 64))
        storage.write_json(directory / "contract.json", {"step": step})
    return final


def failing(operation: str, code: int, times: int) -> Callable[..., None]:
    """A hook that fails `times` times at an operation."""
    left = times

    def hook(name: str, *arguments: object) -> None:
        nonlocal left
        if name == operation and left > 0:
            left -= 1
            raise OSError(code, os.strerror(code), str(arguments[0]))

    return hook


# Choosing and deleting checkpoints


def test_the_newest_checkpoint_is_taken_and_damaged_ones_are_named(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert storage.newest_verified(run) == run / "step-00000003"
    weights = run / "step-00000003" / "unet" / "weights"
    weights.write_bytes(b"\0" * 64)
    assert storage.newest_verified(run) == run / "step-00000002"
    assert str(weights) in caplog.text
    for step in (1, 2):
        shutil.rmtree(run / storage.step_name(step) / "unet")
    assert storage.newest_verified(run) is None
    assert storage.newest_verified(run / "nowhere") is None


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000, 5):
        make_step(tmp_path, step)
    (tmp_path / "step-best").mkdir()
    steps = [storage.step_of(directory) for directory in storage.step_directories(tmp_path)]
    assert steps == [100_000_000, 99_999_999, 5]


def test_only_verified_checkpoints_count_as_kept(run: Path) -> None:
    (run / "step-00000002" / "contract.json").write_text("damaged")
    assert storage.retire(run, keep=2) == []
    make_step(run, 4)
    assert storage.retire(run, keep=2) == [run / "step-00000002", run / "step-00000001"]
    assert storage.newest_verified(run) == run / "step-00000004"


def test_the_last_verified_checkpoint_is_never_deleted(run: Path) -> None:
    for step in (2, 3):
        (run / storage.step_name(step) / "contract.json").write_text("damaged")
    assert storage.retire(run, keep=1) == []
    assert storage.newest_verified(run) == run / "step-00000001"


def test_a_checkpoint_that_is_being_read_is_not_deleted(run: Path) -> None:
    with storage.hold(run / "step-00000001"):
        assert storage.retire(run, keep=1) == [run / "step-00000002"]
    assert storage.retire(run, keep=1) == [run / "step-00000001"]
    with pytest.raises(LdmError), storage.hold(run / "step-00000001"):
        pass


def test_a_run_has_one_writer(tmp_path: Path) -> None:
    again = storage.claim(tmp_path / "run")
    with storage.claim(tmp_path / "run"), pytest.raises(LdmError, match="another process"), again:
        pass
    with storage.claim(tmp_path / "run"):
        pass


def test_a_live_save_is_not_a_leftover(run: Path) -> None:
    dead = run / "step-00000009.tmp-00000000"
    dead.mkdir()
    with storage.publish(run / "step-00000004"):
        assert storage.clean_leftovers(run) == [dead]
    assert storage.newest_verified(run) == run / "step-00000004"


def test_the_whole_of_two_generations_gets_the_name_back(run: Path) -> None:
    aside = run / "step-00000003.old-00000000"
    shutil.copytree(run / "step-00000003", aside)
    (run / "step-00000003" / "contract.json").write_text("damaged")
    assert storage.newest_verified(run) == aside
    storage.clean_leftovers(run)
    assert storage.newest_verified(run) == run / "step-00000003"
    assert len(os.listdir(run)) == 3


def test_a_failed_publish_leaves_nothing_and_passes_the_error_on(run: Path) -> None:
    before = sorted(os.listdir(run))

    def fail() -> None:
        with storage.publish(run / "step-00000003") as directory:
            (directory / "half").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert sorted(os.listdir(run)) == before
    assert storage.verify(run / "step-00000003")["facts"] == {"step": 3}


def test_facts_with_keys_that_are_no_strings_still_verify(tmp_path: Path) -> None:
    with storage.publish(tmp_path / "out", {"sizes": {10: 1, 9: 2}, "rate": 0.1 + 0.2}):
        pass
    assert storage.verify(tmp_path / "out")["facts"] == {
        "sizes": {"10": 1, "9": 2},
        "rate": 0.1 + 0.2,
    }


def test_frozen_components_share_their_space_or_are_copied(run: Path, tmp_path: Path) -> None:
    storage.link_tree(run / "step-00000001", tmp_path / "linked")
    source = run / "step-00000001" / "unet" / "weights"
    assert (tmp_path / "linked" / "unet" / "weights").stat().st_ino == source.stat().st_ino
    ops.hook = failing("link", errno.EXDEV, 99)
    storage.link_tree(run / "step-00000001", tmp_path / "copied")
    copy = tmp_path / "copied" / "unet" / "weights"
    assert copy.stat().st_ino != source.stat().st_ino
    assert copy.read_bytes() == source.read_bytes()


# Faults


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EIO, errno.EAGAIN])
def test_a_hiccup_of_a_network_share_is_waited_out(code: int, tmp_path: Path) -> None:
    for operation in ("write", "fsync", "replace"):
        ops.hook = failing(operation, code, 5)
        storage.write_text(tmp_path / "file", operation)
        assert (tmp_path / "file").read_text() == operation
        ops.hook = failing(operation, code, 6)
        with pytest.raises(LdmError, match="cannot write it"):
            storage.write_text(tmp_path / "file", "never")
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "replace"


def test_a_failed_sync_is_never_just_repeated(tmp_path: Path) -> None:
    """Linux marks the pages clean after a failed fsync: a second one would succeed and lie."""
    log: list[str] = []
    fail = failing("fsync", errno.EIO, 1)

    def hook(name: str, *arguments: object) -> None:
        log.append(name)
        fail(name, *arguments)

    ops.hook = hook
    storage.write_bytes(tmp_path / "file", b"data")
    assert log == ["write", "fsync", "write", "fsync", "replace", "fsync_dir"]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (
            errno.ENOSPC,
            ["No space left", "1,234 bytes needed", "bytes free on /", "free some space"],
        ),
        (errno.EDQUOT, ["quota", "bytes free on /"]),
        (errno.EROFS, ["Read-only", "remount"]),
        (errno.EACCES, ["Permission denied", "permissions"]),
    ],
)
def test_a_full_or_closed_disk_is_explained(code: int, words: list[str], tmp_path: Path) -> None:
    ops.hook = failing("write", code, 1)
    with pytest.raises(LdmError) as caught:
        storage.write_bytes(tmp_path / "file", b"x" * 1234)
    assert caught.value.code == ExitCode.IO
    assert caught.value.where == str(tmp_path / "file")
    assert all(word.lower() in str(caught.value).lower() for word in words)
    assert str(caught.value).count("\n") == 1


def test_space_is_checked_before_writing(tmp_path: Path) -> None:
    storage.require_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(LdmError, match="not enough space"):
        storage.require_space(tmp_path, 10**18)
    with pytest.raises(LdmError), storage.publish(tmp_path / "out", need=10**18):
        pytest.fail("the body must not run")
    assert os.listdir(tmp_path) == []


def test_a_real_file_size_limit_leaves_the_old_file(tmp_path: Path) -> None:
    storage.write_bytes(tmp_path / "file", b"old")
    if (child := os.fork()) == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            storage.write_bytes(tmp_path / "file", b"x" * 100_000)
        except LdmError as error:
            os._exit(error.code)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == ExitCode.IO
    assert (tmp_path / "file").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


FULL_DISK = """
import sys
from pathlib import Path
from ldm import storage
run = Path(sys.argv[1])
for step in range(20):
    final = run / storage.step_name(step)
    try:
        with storage.publish(final, {"step": step}) as directory:
            (directory / "a").write_bytes(bytes(400_000))
            storage.write_bytes(directory / "b", bytes(400_000))
    except storage.ops.LdmError as error:
        print(step, storage.newest_verified(run).name, len(list(run.iterdir())), error)
        sys.exit(error.code)
"""


def test_a_really_full_disk_keeps_every_checkpoint_that_was_there(tmp_path: Path) -> None:
    script = "mount -t tmpfs -o size=2m none {0} && exec {1} -c '{2}' {0}"
    mounted = f"mount -t tmpfs -o size=2m none {tmp_path}"
    if (
        not shutil.which("unshare")
        or subprocess.run(["unshare", "-rm", "sh", "-c", mounted]).returncode
    ):
        pytest.skip("this machine does not let tests mount a small disk")
    command = script.format(tmp_path, sys.executable, FULL_DISK)
    done = subprocess.run(["unshare", "-rm", "sh", "-c", command], capture_output=True, text=True)
    assert done.returncode == ExitCode.IO, done.stderr
    assert done.stdout.startswith("2 step-00000001 2 ")
    assert "No space left on device" in done.stdout
    assert f"bytes free on {tmp_path}" in done.stdout


# Lines


def test_a_resumed_run_has_the_metrics_of_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, torn = tmp_path / "whole.jsonl", tmp_path / "torn.jsonl"
    rows = [json.dumps({"step": step, "loss": 1 / (step + 1)}) for step in range(10)]
    for row in rows:
        storage.append_line(whole, row)
    for row in rows[:8]:
        storage.append_line(torn, row)
    with torn.open("a") as file:
        file.write(rows[8][:9])  # the power went here
    assert storage.read_lines(torn) == rows[:8]
    storage.truncate_metrics(torn, 5)
    for row in rows[6:]:
        storage.append_line(torn, row)
    assert torn.read_bytes() == whole.read_bytes()


def test_a_torn_line_does_not_swallow_the_next_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st')
    storage.append_line(path, '{"step": 2}')
    assert storage.read_lines(path) == ['{"step": 1}', '{"step": 2}']
    assert "line 2" in caplog.text


def test_readers_see_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    path, stop = tmp_path / "file", threading.Event()
    storage.write_bytes(path, b"0" * 9999)
    seen: set[bytes] = set()

    def read() -> None:
        while not stop.is_set():
            seen.add(path.read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    for digit in range(100):
        storage.write_bytes(path, str(digit % 10).encode() * 9999)
    stop.set()
    reader.join()
    assert all(len(data) == 9999 and len(set(data)) == 1 for data in seen)


def test_json_that_is_missing_or_broken_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(LdmError, match="No such file"):
        storage.read_json(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(LdmError, match=r"bad\.json: is not valid JSON"):
        storage.read_json(tmp_path / "bad.json")
    storage.write_json(tmp_path / "good.json", {"rate": 0.1 + 0.2})
    assert storage.read_json(tmp_path / "good.json") == {"rate": 0.1 + 0.2}


def test_storage_loads_nothing_heavy() -> None:
    code = "import sys, ldm.storage; sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
