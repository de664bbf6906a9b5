"""The loader: the same samples for every split of the work, from every cursor, bad ones named."""

import os
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.data.loader import Loader, Share, micro_batches, usable_workers
from ldm.errors import ExitCode, LdmError
from ldm.randomness import permutation, positions
from ldm.types import Batch, Example


class Noise:
    """Examples whose pixels are drawn from their index; those in `bad` raise."""

    def __init__(self, count: int, bad: tuple[int, ...] = ()) -> None:
        self.ids = [f"s{k:03}" for k in range(count)]
        self.captions = [f"caption {k}" for k in range(count)]
        self.fingerprint = "noise"
        self.bad = bad

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Example:
        if index in self.bad:
            raise LdmError("torn", where=self.ids[index], code=ExitCode.BAD_DATA)
        pixels = np.random.default_rng(index).integers(0, 256, (12, 20, 3), dtype=np.uint8)
        return Example(self.ids[index], pixels, self.captions[index])


def load(source: Noise, **options: object) -> Loader:
    defaults = {"seed": 5, "batch_size": 4, "image_px": 8, "crop": "random", "flip": True}
    return Loader(source, **{**defaults, **options})


def first(loader: Loader, count: int, cursor: int = 0) -> list[Batch]:
    return list(islice(loader.batches(cursor), count))


def pictures(batches: list[Batch]) -> dict[str, torch.Tensor]:
    return {name: row for b in batches for name, row in zip(b.ids, b.pixels, strict=True)}


def assert_equal(one: Batch, other: Batch) -> None:
    assert (one.ids, one.captions) == (other.ids, other.captions)
    assert (one.epochs, one.positions) == (other.epochs, other.positions)
    assert torch.equal(one.pixels, other.pixels)
    assert torch.equal(one.weight, other.weight)


@settings(max_examples=60, deadline=None)
@given(
    world=st.integers(1, 5),
    accumulation=st.integers(1, 5),
    micro=st.integers(1, 4),
    length=st.integers(1, 50),
    cursor=st.integers(0, 200),
)
def test_ranks_and_accumulation_steps_cut_the_global_batch_into_disjoint_parts(
    world, accumulation, micro, length, cursor
):
    batch_size = world * accumulation * micro
    for step in range(2):
        places = []
        for rank in range(world):
            share = Share(batch_size, rank, world, accumulation)
            mine = micro_batches(share, cursor, length, seed=3)
            parts = list(islice(mine, step * accumulation, (step + 1) * accumulation))
            assert [len(part) for part in parts] == [micro] * accumulation
            for part in parts:  # contiguous
                start = part[0].position
                assert [place.position for place in part] == list(range(start, start + micro))
            places += [place for part in parts for place in part]
        whole = positions(cursor + step * batch_size, batch_size, length, 3)
        expected = [(epoch, sample, k) for k, (epoch, sample) in enumerate(whole)]
        assert sorted(places, key=lambda place: place.position) == expected


def test_an_epoch_shows_every_sample_once():
    batches = first(load(Noise(12)), 6)
    ids = [sample for batch in batches for sample in batch.ids]
    assert sorted(ids[:12]) == sorted(ids[12:]) == Noise(12).ids
    assert ids[:12] == [Noise(12).ids[k] for k in permutation(12, 5, 0)]
    assert ids[:12] != ids[12:]
    assert [batch.epochs for batch in batches] == [(0,) * 4] * 3 + [(1,) * 4] * 3


def test_a_batch_crossing_into_the_next_epoch_tells_both_epochs():
    batch = first(load(Noise(6)), 2)[1]
    assert batch.epochs == (0, 0, 1, 1)
    assert batch.positions == (0, 1, 2, 3)


def test_batches_hold_pictures_in_range_and_their_own_captions():
    for batch in first(load(Noise(8)), 4):
        assert batch.pixels.shape == (4, 3, 8, 8)
        assert batch.pixels.dtype == batch.weight.dtype == torch.float32
        assert batch.pixels.abs().max() <= 1
        assert batch.weight.eq(1).all()
        assert batch.captions == tuple(f"caption {int(name[1:])}" for name in batch.ids)


def test_a_sample_looks_the_same_whoever_loads_it_and_new_in_another_epoch():
    alone = pictures(first(load(Noise(8)), 2))
    for rank in range(2):
        shared = load(Noise(8), rank=rank, world_size=2, accumulation=2)
        for batch in first(shared, 4):
            for name, row in zip(batch.ids, batch.pixels, strict=True):
                assert torch.equal(row, alone[name])
    other_places = pictures(first(load(Noise(8), batch_size=8), 1))
    assert all(torch.equal(other_places[name], alone[name]) for name in alone)
    later = pictures(first(load(Noise(8)), 2, cursor=8))
    assert any(not torch.equal(later[name], alone[name]) for name in alone)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_any_cursor_continues_an_uninterrupted_run(accumulation):
    loader = load(Noise(10), accumulation=accumulation)
    whole = first(loader, 12)
    for step in range(1, 12 // accumulation):
        resumed = first(load(Noise(10), accumulation=accumulation), accumulation, cursor=4 * step)
        for one, other in zip(resumed, whole[step * accumulation :], strict=False):
            assert_equal(one, other)


def test_worker_processes_change_nothing(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    source = Noise(10, bad=(3,))
    alone, helped = load(source), load(source, workers=2)
    for one, other in zip(first(alone, 6), first(helped, 6), strict=True):
        assert_equal(one, other)
    assert alone.bad == helped.bad == {"s003": "s003: torn"}


def test_a_bad_sample_has_weight_zero_keeps_its_place_and_is_named_once():
    loader = load(Noise(8, bad=(2, 6)))
    for batch, clean in zip(first(loader, 6), first(load(Noise(8)), 6), strict=True):
        assert batch.ids == clean.ids
        for k, name in enumerate(batch.ids):
            is_bad = name in ("s002", "s006")
            assert batch.weight[k] == (0 if is_bad else 1)
            assert batch.captions[k] == ("" if is_bad else clean.captions[k])
            expected = torch.zeros(3, 8, 8) if is_bad else clean.pixels[k]
            assert torch.equal(batch.pixels[k], expected)
    assert dict(sorted(loader.bad.items())) == {"s002": "s002: torn", "s006": "s006: torn"}


def test_a_picture_that_cannot_be_cropped_is_a_bad_sample_too():
    loader = load(Noise(8), image_px=16, small="error")
    assert first(loader, 1)[0].weight.eq(0).all()
    assert "smaller than image_px=16" in loader.bad[first(loader, 1)[0].ids[0]]


@pytest.mark.parametrize("world", [1, 2])
def test_a_data_set_without_a_single_good_sample_ends_the_run(world):
    loader = load(Noise(8, bad=tuple(range(8))), world_size=world)
    with pytest.raises(LdmError, match="none of the 8 samples can be used") as caught:
        first(loader, 100)
    assert caught.value.code == ExitCode.BAD_DATA


@pytest.mark.parametrize("rank", [0, 1])
def test_one_good_sample_keeps_the_run_going_on_every_rank(rank):
    loader = load(Noise(8, bad=tuple(range(1, 8))), rank=rank, world_size=2)
    assert len(first(loader, 60)) == 60


def test_faults_of_our_own_are_not_taken_for_bad_data():
    class Broken(Noise):
        def __getitem__(self, index: int) -> Example:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        first(load(Broken(8)), 1)
    with pytest.raises(LdmError, match="unknown value 'middle'"):
        first(load(Noise(8), crop="middle"), 1)


def test_a_batch_that_cannot_be_cut_evenly_lists_what_can():
    with pytest.raises(LdmError, match=r"batch_size=30 cannot be cut") as caught:
        Share(30, 0, 2, 4)
    assert "batch_size=24 or 32" in caught.value.fix
    assert "accumulation one of 1, 3, 5, 15" in caught.value.fix
    assert caught.value.code == ExitCode.CONFIG
    with pytest.raises(LdmError) as caught:
        Share(3, 0, 4, 1)
    assert caught.value.fix == "batch_size=4"
    with pytest.raises(LdmError, match="at least 1"):
        Share(0)


def test_fewer_samples_than_one_global_batch_is_an_error_with_the_arithmetic():
    with pytest.raises(LdmError, match=r"7 samples .* global batch of 8 \(= 2 per .* 2 ranks x 2"):
        load(Noise(7), batch_size=8, world_size=2, accumulation=2)


def test_loading_leaves_the_global_random_state_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first(load(Noise(8)), 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_no_more_workers_than_usable_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 5})
    assert [usable_workers(wanted) for wanted in (0, 1, 2, 64)] == [0, 1, 2, 2]
