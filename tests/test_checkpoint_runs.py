"""Saving a run's checkpoint and finding it again, alone and with several ranks."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ldm import checkpoint, storage
from ldm.errors import ExitCode, LdmError
from ldm.storage import ops


@pytest.fixture(autouse=True)
def no_hook() -> Iterator[None]:
    yield
    ops.hook = None


def writer(step: int) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        config = {"_class_name": "Toy"}
        checkpoint.save_module(directory / "unet", {"x": torch.full((99,), float(step))}, config)

    return write


def save(run: Path, step: int, keep: int = 2) -> Path:
    return checkpoint.save_checkpoint(run, step, writer(step), keep=keep, facts={"run_id": "r"})


def test_a_run_keeps_its_newest_checkpoints_and_points_at_the_last(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        final = save(tmp_path, step)
    assert sorted(os.listdir(tmp_path)) == ["LATEST", "step-00000010", "step-00000015"]
    assert (tmp_path / "LATEST").read_text() == "step-00000015\n"
    assert storage.verify(final)["facts"] == {"step": 15, "run_id": "r"}
    assert checkpoint.find_checkpoint(tmp_path) == final
    assert checkpoint.find_checkpoint(tmp_path / "step-00000010").name == "step-00000010"
    tensors, _ = checkpoint.load_module(final / "unet")
    assert float(tensors["x"][0]) == 15


def test_a_damaged_newest_checkpoint_is_passed_over_loudly(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)
    weights = save(tmp_path, 2) / "unet" / checkpoint.WEIGHTS
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert checkpoint.find_checkpoint(tmp_path) == tmp_path / "step-00000001"
    assert str(weights) in caplog.text
    with pytest.raises(LdmError, match="has changed"):  # asked for by name: no other will do
        checkpoint.find_checkpoint(tmp_path / "step-00000002")
    (tmp_path / "step-00000001" / "MANIFEST.json").unlink()
    with pytest.raises(LdmError, match="all checkpoints of this run are damaged") as caught:
        checkpoint.find_checkpoint(tmp_path)
    assert caught.value.code == ExitCode.IO


def test_what_is_not_a_run_is_said_so(tmp_path: Path) -> None:
    for path, words in ((tmp_path, "has no step-"), (tmp_path / "none", "does not exist")):
        with pytest.raises(LdmError, match=words) as caught:
            checkpoint.find_checkpoint(path)
        assert "is not a run directory" in str(caught.value)
        assert caught.value.code == ExitCode.USAGE
        assert caught.value.fix


def test_a_full_disk_while_saving_leaves_the_run_as_it_was(tmp_path: Path) -> None:
    save(tmp_path, 1)

    def hook(name: str, *arguments: object) -> None:
        if name == "write" and checkpoint.WEIGHTS in str(arguments[0]):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    ops.hook = hook
    with pytest.raises(LdmError, match="No space left") as caught:
        save(tmp_path, 2)
    assert caught.value.code == ExitCode.IO
    assert caught.value.where.endswith(f"step-00000002/unet/{checkpoint.WEIGHTS}")
    ops.hook = None
    assert sorted(os.listdir(tmp_path)) == ["LATEST", "step-00000001"]
    assert save(tmp_path, 2) == checkpoint.find_checkpoint(tmp_path)


def test_space_is_checked_by_what_the_last_checkpoint_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen = tmp_path / "frozen"
    frozen.mkdir()
    (frozen / "big").write_bytes(bytes(100_000))
    asked: list[int] = []

    def require(directory: Path, need: int) -> None:
        asked.append(need)

    monkeypatch.setattr("ldm.storage.directories.require_space", require)
    for step in (1, 2):
        checkpoint.save_checkpoint(
            tmp_path / "run",
            step,
            lambda d: (storage.link_tree(frozen, d / "vae"), writer(1)(d)),
        )
    assert len(asked) == 1, "the first save has nothing to go by"
    assert 400 < asked[0] < 5000, "linked files need no new space"


def ranks(world: int, tmp_path: Path, action: Callable[[int], object]) -> list[str]:
    """What `action` raised on each of `world` gloo ranks, as 'code text'."""
    children = []
    for rank in range(world):
        if (child := os.fork()) == 0:
            text = "none"
            try:
                dist.init_process_group(
                    "gloo",
                    init_method=f"file://{tmp_path}/rendezvous",
                    rank=rank,
                    world_size=world,
                    timeout=timedelta(seconds=20),
                )
                action(rank)
            except LdmError as error:
                text = f"{int(error.code)} {error}"
            except Exception as error:
                text = f"{type(error).__name__} {error}"
            finally:
                (tmp_path / f"rank{rank}").write_text(text)
                os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    return [(tmp_path / f"rank{rank}").read_text() for rank in range(world)]


def test_one_rank_saves_and_all_go_on(tmp_path: Path) -> None:
    assert ranks(2, tmp_path, lambda rank: save(tmp_path / "run", 7)) == ["none", "none"]
    assert checkpoint.find_checkpoint(tmp_path / "run").name == "step-00000007"


def test_a_rank_that_cannot_save_tells_the_others_instead_of_leaving_them(tmp_path: Path) -> None:
    def fail(rank: int) -> None:
        def write(directory: Path) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory / "weights"))

        checkpoint.save_checkpoint(tmp_path / "run", 7, write)

    first, second = ranks(2, tmp_path, fail)
    assert first.startswith("74 ")
    assert second.startswith("74 ")
    assert "No space left on device" in first
    assert "rank 0: " in second
    assert "No space left on device" in second


def test_any_rank_may_be_the_one_that_fails(tmp_path: Path) -> None:
    def fail(rank: int) -> None:
        checkpoint.agree(ZeroDivisionError("ä" * 5000) if rank == 1 else None)

    first, second = ranks(2, tmp_path, fail)
    assert first.startswith(f"{int(ExitCode.BUG)} rank 1: ZeroDivisionError")  # where is empty
    assert second.startswith("ZeroDivisionError")
