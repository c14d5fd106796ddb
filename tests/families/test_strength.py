# SPDX-License-Identifier: Apache-2.0
"""Strength and timestep ranges in any pipeline: the base as a weighted objective says the same.

At equal levels p_pre^(1 - s) p_a^s is the product of {a: s, base: 1 - s}, and an objective outside
of its timesteps is one whose weight has gone over to the base.
"""

import pytest

import msdda_fast as mf
from msdda_fast.errors import InvalidSchedule, InvalidWeights, UnknownObjective
from tests.families import images, xl
from tests.families.lockstep import draw
from tests.families.test_families import CLOSE, error
from tests.families.test_pipelines import W, attached

A_AND_BASE = {"a": mf.Objective("a"), "base": mf.Objective.base()}
FAMILIES = pytest.mark.parametrize("make", [images.sd3, xl.text], ids=["SD3", "SDXL"])


@FAMILIES
def test_strength_is_a_product_with_the_base(make):
    pipe, call = attached(make, objectives={"a": mf.Objective("a")})
    got = draw(pipe, call, objective_strength=1.5)
    reference, call = attached(make, objectives=A_AND_BASE)
    weights = {"a": 1.5, "base": -0.5}
    assert error(got, draw(reference, call, weights=weights, extrapolate=True)) < CLOSE
    assert error(got, draw(pipe, call)) > 0.01


@FAMILIES
def test_outside_of_its_timesteps_an_objective_is_the_base(make):
    pipe, call = attached(make, objectives={"a": mf.Objective("a", timesteps=(500, 1000))})
    got = draw(pipe, call)
    reference, call = attached(make, objectives=A_AND_BASE)
    seen = []
    draw(reference, call | {"callback_on_step_end": lambda p, k, t, d: seen.append(float(t)) or d})
    assert min(seen) < 500 < max(seen)
    weights = [[1.0, 0.0] if t >= 500 else [0.0, 1.0] for t in seen]
    expected = draw(reference, call, weights=lambda k: weights[k])
    assert error(got, expected) < CLOSE


def test_of_one_and_zero():
    pipe, call = attached()
    plain = draw(pipe, call, weights=W)
    assert error(draw(pipe, call, weights=W, objective_strength=1.0), plain) < CLOSE
    base, call = attached(objectives={"base": mf.Objective.base()})
    assert error(draw(pipe, call, weights=W, objective_strength=0.0), draw(base, call)) < CLOSE


def test_images_have_strengths_of_their_own():
    pipe, call = attached()
    count = len(call["prompt_embeds"])
    mixed = draw(
        pipe, call, weights=W, objective_strength=[[1.0, 1.0]] + [[2.0, 0.5]] * (count - 1)
    )
    assert error(mixed[:1], draw(pipe, call, weights=W)[:1]) < CLOSE
    assert (
        error(mixed[1:], draw(pipe, call, weights=W, objective_strength={"a": 2.0, "b": 0.5})[1:])
        < CLOSE
    )


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ({"objective_strength": -1.0}, InvalidWeights),
        ({"objective_strength": {"c": 1.0}}, UnknownObjective),
        ({"kl_weights": {"a": 0.0, "b": 1.0}}, InvalidWeights),
    ],
)
def test_refused(given, kind):
    pipe, call = attached()
    with pytest.raises(kind, match=next(iter(given)).removeprefix("objective_")):
        draw(pipe, call, weights=W, **given)


def test_a_range_is_two_numbers():
    with pytest.raises(InvalidSchedule, match="such as"):
        mf.Objective("a", timesteps=(500,))
