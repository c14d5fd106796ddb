# SPDX-License-Identifier: Apache-2.0
"""What counts as an integer, and as a seed: Python's, numpy's and torch's."""

import numpy as np
import pytest
import torch

import msdda_fast as mf
from msdda_fast.engine.noise import image_seeds
from msdda_fast.integers import as_integer
from msdda_fast.kernels.counter_noise import counter_noise

INTEGERS = [3, np.int64(3), np.uint8(3), np.array(3), torch.tensor(3), torch.tensor(3).short()]
OTHERS = [True, np.True_, torch.tensor(True), 3.0, np.float32(3), torch.tensor(3.0), "3", None]
LISTS = [[3], (3,), np.array([3]), torch.tensor([3]), np.array([[3]])]


@pytest.mark.parametrize("value", INTEGERS, ids=repr)
def test_integers(value):
    assert type(as_integer(value)) is int and as_integer(value) == 3
    assert image_seeds(value, 2) == [3, 4]


@pytest.mark.parametrize("value", [*OTHERS, *LISTS], ids=repr)
def test_other_things(value):
    assert as_integer(value) is None


def test_the_largest_unsigned_integer_is_kept():
    most = 2**64 - 1
    assert as_integer(np.uint64(most)) == most
    assert as_integer(torch.tensor(most, dtype=torch.uint64)) == most


@pytest.mark.parametrize(
    "seeds",
    [
        [3, np.int64(4)],
        (np.uint32(3), torch.tensor(4)),
        range(3, 5),
        np.array([3, 4]),
        np.array([3, 4], dtype=np.uint8),
        torch.tensor([3, 4]),
        torch.tensor([3, 4], dtype=torch.int32),
    ],
    ids=repr,
)
def test_seeds_one_per_sample(seeds):
    assert image_seeds(seeds, 2) == [3, 4]
    shape = (2, 4, 3)
    assert counter_noise(seeds, shape).equal(counter_noise([3, 4], shape))
    means = torch.zeros(1, *shape)
    step = mf.fast_fuse_step(means, [1.0], [1.0], seeds=seeds, step=np.int64(5))
    assert step.equal(mf.fast_fuse_step(means, [1.0], [1.0], seeds=[3, 4], step=5))


def test_unsigned_seeds_are_their_64_bits():
    shape, most = (1, 4, 3), 2**64 - 1
    expected = counter_noise([-1], shape)
    for seeds in ([most], np.array([most], np.uint64), torch.tensor([most], dtype=torch.uint64)):
        assert counter_noise(seeds, shape).equal(expected)
    assert image_seeds(most, 2) == [most, 0]  # counting up goes round


@pytest.mark.parametrize(
    "seed", [2**64, -(2**63) - 1, 2**64 + 1, 3.0, True, "3", None, np.float64(3), {}, object()]
)
def test_a_seed_of_no_64_bits_is_refused(seed):
    with pytest.raises(ValueError, match=r"seed"):
        image_seeds(seed, 1)
    with pytest.raises(ValueError, match=r"must be an integer in \[-2\^63, 2\^64\)"):
        image_seeds([seed], 1)
    with pytest.raises(ValueError, match="seed"):
        counter_noise([seed], (1, 4, 3))


@pytest.mark.parametrize(
    "seeds", [np.array([3.0]), torch.tensor([3.0]), [[3]], torch.tensor([True])]
)
def test_seeds_that_are_no_integers_are_refused(seeds):
    for use in (lambda: image_seeds(seeds, 1), lambda: counter_noise(seeds, (1, 4, 3))):
        with pytest.raises(ValueError, match=r"seeds? must be (an integer|integers)"):
            use()


@pytest.mark.parametrize("seeds", [5, np.array(5), torch.tensor(5)], ids=repr)
def test_one_seed_is_no_seed_per_sample(seeds):
    with pytest.raises(mf.InvalidShape, match="seeds"):
        counter_noise(seeds, (1, 4, 3))
