# SPDX-License-Identifier: Apache-2.0
"""Preferences by ranges of timesteps are those of a callable, for all images or for each."""

import diffusers
import pytest
import torch

import msdda_fast as mf
from msdda_fast.weights import preference_schedule

NAMES = ["a", "b"]
TIMES = torch.tensor([801, 601, 500, 401, 201, 1])
EARLY, LATE = {"a": 1, "b": 0}, {"a": 0.25, "b": 0.75}


def rows(weights, batch: int = 2, **more) -> torch.Tensor:
    return preference_schedule(weights, NAMES, batch, len(TIMES), timesteps=TIMES, **more)


@pytest.mark.parametrize(
    "weights",
    [
        {(500, 999): EARLY, (0, 499): LATE},
        {"500-999": EARLY, "0-499": LATE},
        {(0, 499): LATE, " 500 - 999.5 ": [1, 0]},
        {(0, 500): LATE, (500, 999): EARLY},  # a shared end belongs to the higher range
        {(501, 999): EARLY, (402, 500): [1, 0], (0, 401): LATE},
    ],
    ids=["tuples", "text", "numbers", "shared-end", "three"],
)
def test_ranges_are_a_callable(weights) -> None:
    expected = rows(lambda k: EARLY if k < 3 else LATE)
    assert torch.equal(rows(weights), expected)
    assert torch.equal(rows([weights, weights]), expected)


def test_each_prompt_has_its_own() -> None:
    got = rows([{(500, 999): EARLY, (0, 499): LATE}, LATE], 4, images_per_prompt=2)
    assert torch.equal(
        got, rows(lambda k: [EARLY if k < 3 else LATE, LATE], 4, images_per_prompt=2)
    )


def test_objectives_may_be_named_like_ranges() -> None:
    got = preference_schedule({"1-2": 0.25, "b": 0.75}, ["1-2", "b"], 1, 2, timesteps=TIMES[:2])
    assert got[0].tolist() == [[0.25, 0.75]]


@pytest.mark.parametrize(
    "weights, message",
    [
        ({(500, 999): EARLY}, "every timestep that is sampled: 401 is in none of 500-999"),
        ({(500, 999): EARLY, (0, 501): LATE}, "overlap: 0-501 and 500-999"),
        ({(5, 999): EARLY, "5-999": LATE}, "overlap"),
        ({(999, 500): EARLY, (0, 499): LATE}, r"such as \(500, 999\) or \"500-999\", got \(999"),
        ({(500, 999): EARLY, "late": LATE}, "got 'late'"),
        ({(1, 2, 3): EARLY}, r"got \(1, 2, 3\)"),
        ({(0, 999): {"a": 1}}, "miss b"),
    ],
)
def test_what_is_wrong_is_named(weights, message: str) -> None:
    with pytest.raises(mf.InvalidWeights, match=message):
        rows(weights)
    with pytest.raises(mf.InvalidWeights):
        rows([LATE, weights])


def test_without_timesteps_there_are_no_ranges() -> None:
    with pytest.raises(mf.InvalidWeights, match="no timesteps here"):
        preference_schedule({(0, 999): EARLY}, NAMES, 1, 3)


def test_tables_and_denoisers_take_ranges() -> None:
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    ranges = {(500, 999): [1, 0], (0, 499): [[0.25, 0.75]] * 2}

    def in_turn(k: int) -> list:
        return [1, 0] if k < 2 else [0.25, 0.75]

    given = dict(scheduler=scheduler, num_steps=4, etas=[1.0, 0.5], seeds=[1, 2])
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    networks = [lambda x, t: 0.5 * x, lambda x, t: 0.8 * x]
    got = mf.denoise(networks, x, weights=ranges, **given)
    assert torch.equal(got, mf.denoise(networks, x, weights=in_turn, **given))
    table = mf.coefficient_table(scheduler, 4, weights=ranges, etas=[1.0, 0.5])
    assert table.share.shape == (4, 2, 2) and table.share[1, 0].tolist() == [1, 0]
