"""A save may be killed, fail or lose power at any operation; the run never loses a checkpoint."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from durability import materialise, power_cuts

from ldm import storage
from ldm.errors import ExitCode, LdmError
from ldm.storage import directories, files, ops


def fill(directory: Path, tag: str) -> None:
    """A checkpoint with a subdirectory, through storage and behind its back."""
    storage.make_directory(directory / "vae")
    storage.write_bytes(directory / "vae" / "weights", tag.encode() * 20)
    for name in ("extern", "vae/extern"):  # as transformers' save_pretrained does
        (directory / name).write_bytes(tag.encode())


def save(run: Path, step: int, tag: str, keep: int = 1) -> None:
    final = run / storage.step_name(step)
    with storage.publish(final, {"tag": tag}) as directory:
        fill(directory, tag)
    storage.write_latest(run, final.name)
    storage.retire(run, keep, trusted=final)


def next_step(run: Path) -> None:
    save(run, 3, "new")


def same_step_again(run: Path) -> None:
    save(run, 2, "new")


def after_a_crash(run: Path) -> None:
    storage.clean_leftovers(run)
    save(run, 2, "new")


SCENARIOS = (next_step, after_a_crash)  # the second one replaces the same step, too


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """In memory where possible: thousands of real syncs take minutes and prove no more."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as directory:
        yield Path(directory)


@pytest.fixture
def start(tmp_path: Path) -> Path:
    """A run with two checkpoints; `after_a_crash` finds the newest one moved aside, too."""
    run = tmp_path / "start"
    save(run, 1, "older", keep=2)
    save(run, 2, "old", keep=2)
    return run


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(ops, "_PAUSES_S", (0.0,) * 5)
    yield
    ops.hook = None


def prepare(start: Path, run: Path, scenario: Callable[[Path], None]) -> None:
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(start, run)
    if scenario is after_a_crash:
        (run / "step-00000002").rename(run / "step-00000002.old-0123abcd")
        (run / "step-00000002.tmp-0123abcd").mkdir()
        (run / "LATEST.tmp-0123abcd").touch()


def content(run: Path) -> str:
    """The tag of the checkpoint that a resumed run would load, having checked its files."""
    found = storage.newest_verified(run)
    assert found is not None, f"no checkpoint left in {sorted(os.listdir(run))}"
    tag = storage.verify(found)["facts"]["tag"]
    assert (found / "vae" / "weights").read_bytes() == tag.encode() * 20
    assert (found / "extern").read_bytes() == tag.encode()
    assert (found / "vae" / "extern").read_bytes() == tag.encode()
    return str(tag)


def operations_of(run: Path, action: Callable[[Path], None]) -> list[str]:
    log: list[str] = []
    ops.hook = lambda name, *arguments: log.append(name)
    action(run)
    ops.hook = None
    return log


def error_of(action: Callable[[Path], None], run: Path) -> LdmError | None:
    try:
        action(run)
    except LdmError as error:
        return error
    return None


def killed_before(number: int, run: Path, action: Callable[[Path], None]) -> None:
    """Runs `action` in a child that is killed before operation `number`."""
    if (child := os.fork()) == 0:
        try:
            left = number

            def hook(name: str, *arguments: object) -> None:
                nonlocal left
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1

            ops.hook = hook
            action(run)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_save_killed_before_any_operation_leaves_the_old_or_the_new_checkpoint(
    scenario: Callable[[Path], None], start: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    prepare(start, run, scenario)
    total = len(operations_of(run, scenario))
    assert total > 30
    found = []
    for number in range(total):
        prepare(start, run, scenario)
        killed_before(number, run, scenario)
        found.append(content(run))
        storage.clean_leftovers(run)
        assert content(run) == found[-1]
        assert all(name == "LATEST" or name.startswith("step-") for name in os.listdir(run))
        assert not [name for name in os.listdir(run) if directories._LEFTOVER.fullmatch(name)]
        next_step(run)  # the same command again
        assert content(run) == "new"
        assert sorted(os.listdir(run)) == ["LATEST", "step-00000003"]
    switch = found.index("new")
    assert found == ["old"] * switch + ["new"] * (total - switch), "it must never go back"


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EROFS])
def test_a_fault_at_any_operation_is_one_clear_error_and_loses_nothing(
    code: int, scenario: Callable[[Path], None], start: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    prepare(start, run, scenario)
    total = len(operations_of(run, scenario))
    for number in range(total):
        prepare(start, run, scenario)
        left = number

        def hook(name: str, *arguments: object) -> None:
            nonlocal left
            left -= 1
            if left == -1:
                raise OSError(code, os.strerror(code), str(arguments[0]))

        ops.hook = hook
        error = error_of(scenario, run)
        assert error is None or (error.code == ExitCode.IO and error.fix)
        assert ".tmp-" not in str(error)
        assert error is not None or code in (errno.EIO, errno.ESTALE), "waiting mends only those"
        ops.hook = None
        assert content(run) in ("old", "new")
        storage.clean_leftovers(run)
        next_step(run)
        assert sorted(os.listdir(run)) == ["LATEST", "step-00000003"]


def power_cut_loses(start: Path, tmp_path: Path, scenario: Callable[[Path], None]) -> bool:
    """Whether a power cut may leave a state without a checkpoint to resume from."""
    run = tmp_path / "run"
    prepare(start, run, scenario)
    states = power_cuts(run, lambda: scenario(run))
    assert len(states) > 20
    for tree in states:
        cut = tmp_path / "cut"
        shutil.rmtree(cut, ignore_errors=True)
        materialise(tree, cut)
        try:
            before = content(cut)
            storage.clean_leftovers(cut)
            assert content(cut) == before
        except AssertionError:
            return True
    return False


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_no_power_cut_loses_the_last_checkpoint(
    scenario: Callable[[Path], None], start: Path, tmp_path: Path
) -> None:
    assert not power_cut_loses(start, tmp_path, scenario)


@pytest.mark.parametrize("step", [2, 3])
def test_a_published_directory_survives_a_power_cut_right_afterwards(
    step: int, start: Path
) -> None:
    def publish() -> None:
        with storage.publish(start / storage.step_name(step), {"tag": "new"}) as directory:
            fill(directory, "new")

    for state in power_cuts(start, publish, afterwards=True):
        final = state[storage.step_name(step)]
        assert final.keys() == {"MANIFEST.json", "extern", "vae"}
        assert final["extern"] == b"new"
        assert final["vae"] == {"weights": b"new" * 20, "extern": b"new"}
    assert all(".old-" not in name and ".tmp-" not in name for name in os.listdir(start))


def test_a_written_file_survives_a_power_cut_right_afterwards(start: Path) -> None:
    (start / "LATEST").unlink()
    states = power_cuts(start, lambda: storage.write_latest(start, "here"), afterwards=True)
    assert [state["LATEST"] for state in states] == [b"here\n"]


@pytest.mark.parametrize("forgotten", ["fsync", "fsync_dir"])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_power_cut_model_notices_a_forgotten_sync(
    scenario: Callable[[Path], None],
    forgotten: str,
    start: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def op(name: str, *arguments: object) -> None:
        if name != forgotten:
            ops.op(name, *arguments)

    monkeypatch.setattr(files, "op", op)
    monkeypatch.setattr(directories, "op", op)
    assert power_cut_loses(start, tmp_path, scenario)


def test_the_power_cut_model_notices_deleting_before_publishing(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def swap_in(temporary: Path, final: Path) -> None:
        directories.delete(final)
        ops.op("rename", temporary, final)
        ops.op("fsync_dir", final.parent)

    monkeypatch.setattr(directories, "_swap_in", swap_in)
    shutil.rmtree(start / "step-00000001")
    assert power_cut_loses(start, tmp_path, same_step_again)
