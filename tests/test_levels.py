# SPDX-License-Identifier: Apache-2.0
"""Noise levels of objectives: their kinds, how they are written down, and who refuses them."""

import math

import pytest

import msdda_fast as mf
from msdda_fast import InvalidSchedule, InvalidShape, Objective
from msdda_fast.levels import ETA, LevelRange, noise_from_json, noise_to_json, read_levels
from msdda_fast.pipelines.manifest import dump_objectives, parse_objectives
from msdda_fast.pipelines.request import objective_etas

NOISES = [
    mf.FlowSDE(0.7),
    mf.FlowSDE(0.4, sigma_max=0.99, window=(2, 5), last_step=False),
    mf.DanceSDE(0.3),
    mf.CPS(0.8, window=(0, 3)),
    mf.FlowDDIM(1.0),
]


@pytest.mark.parametrize("noise", NOISES, ids=str)
def test_an_objective_s_noise_is_saved_and_read_again(noise, tmp_path) -> None:
    assert noise_from_json(noise_to_json(noise)) == noise
    objectives = {"text": Objective(noise=noise), "base": Objective.base(0.5)}
    text = dump_objectives(objectives, {})
    assert parse_objectives(text, tmp_path) == objectives


def test_only_what_is_not_the_default_is_written_down() -> None:
    assert noise_to_json(mf.FlowSDE(0.7)) == {"kind": "FlowSDE", "level": 0.7}


@pytest.mark.parametrize(
    "entry",
    [{}, {"kind": "SDE", "level": 1}, {"kind": "CPS"}, {"kind": "CPS", "level": 1, "sigma_max": 1}],
    ids=str,
)
def test_noise_that_cannot_be_read(entry) -> None:
    with pytest.raises(InvalidSchedule, match="is none of FlowSDE, DanceSDE, CPS, FlowDDIM"):
        noise_from_json(entry)


@pytest.mark.parametrize("level", ["0.7", None, [0.7]])
def test_a_level_is_a_number(level) -> None:
    for make in (mf.FlowSDE, lambda level: Objective(eta=level)):
        with pytest.raises(InvalidSchedule, match=r"must lie in \[0, .* got"):
            make(level)


def test_one_level_for_all_is_no_list_of_them() -> None:
    with pytest.raises(InvalidShape, match=r"levels are FlowSDE\(level=0.7.* expected a list of M"):
        read_levels(mf.FlowSDE(0.7))


@pytest.mark.parametrize("noise", [0.7, "FlowSDE", mf.FlowSDE])
def test_noise_of_an_objective_is_none_or_of_a_kind(noise) -> None:
    with pytest.raises(InvalidSchedule, match=r"noise must be None or .* DDIM's level is eta"):
        Objective(noise=noise)


def test_a_pipeline_that_samples_with_ddim_refuses_noise_of_flow_models() -> None:
    objectives = {"a": Objective(eta=0.8), "text": Objective(noise=mf.CPS(0.8))}
    with pytest.raises(InvalidSchedule, match="objective 'text': CPS is noise of flow models"):
        objective_etas(objectives, None)


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, math.inf])
def test_one_range_of_etas_for_objectives_and_rules(value) -> None:
    message = rf"eta must lie in \[0, 1\], got {value}; eta is DDIM's stochasticity"
    with pytest.raises(InvalidSchedule, match=f"Objective: {message}"):
        Objective(eta=value)
    with pytest.raises(InvalidSchedule, match=f"objective 1: {message}"):
        ETA.check([0.5, value])


def test_numbers_and_noise_are_told_apart() -> None:
    assert read_levels([0.7, 0.4]).noise is None
    values, noise = read_levels([mf.CPS(0.7, last_step=False), mf.CPS(0.4, last_step=False)])
    assert values.tolist() == [0.7, 0.4] and isinstance(noise, mf.CPS) and not noise.last_step


def test_a_range_of_one_level_is_left_out() -> None:
    fixed = LevelRange(name="level", meaning="fixed by LCM", low=1.0, high=1.0)
    with pytest.raises(InvalidSchedule, match=r"x: level is fixed by LCM, and got 0.5: leave it"):
        fixed.check_one(0.5, "x")
