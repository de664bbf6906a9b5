"""Draws and order are functions of their arguments, on every machine and for every split."""

import hashlib

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.randomness import generator, normal, permutation, positions, uniform


def test_noise_is_the_same_on_every_machine_and_in_every_version():
    noise = normal((4, 4), 7, "noise", [0, 3], ["a", "b"])
    digest = hashlib.sha256(noise.numpy().tobytes()).hexdigest()
    assert digest == "89680fb8178dd34f9eca34dcab347aa62e5ce6feeb689ead1dce05ed46e402b1"


def test_a_row_depends_on_its_own_sample_alone():
    all_ = normal((3, 5), 1, "noise", [0, 0, 2], ["a", "b", "c"])
    assert normal((3, 5), 1, "noise", [2], ["c"]).equal(all_[2:])
    assert not all_[0].equal(all_[1])


def test_every_argument_matters():
    base = dict(seed=0, purpose="p", epoch=0, sample_id="x")
    draws = {generator(**base).random()}
    for change in ({"seed": 1}, {"purpose": "q"}, {"epoch": 1}, {"sample_id": "y"}):
        draws.add(generator(**{**base, **change}).random())
    assert len(draws) == 5


def test_draws_have_the_moments_they_should():
    ids = [str(k) for k in range(4000)]
    noise = normal((16,), 0, "noise", [0] * 4000, ids)
    assert abs(noise.mean()) < 4 / 64_000**0.5
    assert abs(noise.var() - 1) < 4 * (2 / 64_000) ** 0.5
    draws = uniform(0, "time", [0] * 4000, ids)
    assert draws.dtype == torch.float64
    assert 0 <= draws.min() < draws.max() < 1
    assert abs(draws.mean() - 0.5) < 4 / (12 * 4000) ** 0.5


def test_each_epoch_is_another_permutation():
    one, two = permutation(50, 0, 0), permutation(50, 0, 1)
    assert sorted(one) == sorted(two) == list(range(50))
    assert not np.array_equal(one, two)
    assert not np.array_equal(one, permutation(50, 1, 0))


@settings(max_examples=50)
@given(st.integers(1, 40), st.integers(0, 200), st.integers(1, 60), st.integers(0, 5))
def test_positions_continue_where_the_cursor_is(length, cursor, count, seed):
    whole = positions(0, cursor + count, length, seed)
    assert positions(cursor, count, length, seed) == whole[cursor:]
    first_epoch = [index for epoch, index in whole if epoch == 0]
    assert len(set(first_epoch)) == len(first_epoch) <= length
