# SPDX-License-Identifier: Apache-2.0
"""Every family against Algorithm 1 run by unmodified stock pipelines in lockstep."""

from collections.abc import Callable

import pytest
import torch

import msdda_fast as mf
from msdda_fast.pipelines.attach import attach
from tests.families.lockstep import (
    ancestral,
    draw,
    equal_levels,
    flow_grpo,
    lockstep,
    made,
    unequal_levels,
    use,
)
from tests.families.table import FAMILIES, Family

#: Of the largest entry; float32 networks on more rows at once round differently.
CLOSE = 5e-6
A, B, BASE = {"a": 1.0}, {"b": 1.0}, {}
BOTH = {"a": 0.8, "b": 0.5}


def families(quick: Callable[[str, Family], bool], chosen=FAMILIES):
    """A test of each; `make test` runs those that are `quick`."""
    return pytest.mark.parametrize(
        "family",
        [
            pytest.param(family, id=name, marks=() if quick(name, family) else pytest.mark.full)
            for name, family in chosen.items()
        ],
    )


one_per_mechanism = families(lambda _, family: bool(family.mechanism))
three = families(lambda name, _: name in ("SD3", "FLUX", "SDXL"))
unequal = families(
    lambda _, family: bool(family.mechanism),
    {name: family for name, family in FAMILIES.items() if family.levels},
)


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    assert got.shape == expected.shape
    return float((got - expected).abs().max() / expected.abs().max())


def weights_for(call: dict) -> torch.Tensor:
    """Other weights for each prompt, (B, 2)."""
    first = torch.linspace(0.3, 0.8, len(call["prompt_embeds"]), dtype=torch.float64)
    return torch.stack([first, 1 - first], 1)


@three
def test_one_objective_has_the_bits_of_the_stock_pipeline(family: Family):
    stock, call = made(family.make)
    use(stock, A)
    expected = draw(stock, call)
    use(stock, B)
    pipe = attach(stock)
    assert list(pipe.objectives) == ["a", "b"]
    assert torch.equal(draw(pipe, call, weights={"a": 1, "b": 0}), expected)


@one_per_mechanism
def test_two_objectives_are_algorithm_1(family: Family, caplog):
    pipe, call = made(family.make)
    weights = weights_for(call)
    got = draw(attach(pipe), call, weights=weights)
    ours = [record for record in caplog.records if record.name.startswith("msdda_fast")]
    assert not ours  # all objectives ran in one forward
    expected = lockstep(family.make, [A, B], equal_levels(weights))
    assert error(got, expected) < CLOSE
    # the comparison would notice one objective in place of two
    assert error(draw(attach(pipe), call, weights=[1, 0]), expected) > 0.05


@unequal
def test_unequal_levels_are_algorithm_1(family: Family):
    pipe, call = made(family.make)
    weights, batch = weights_for(call), len(call["prompt_embeds"])
    seeds = [3 + 1000 * i for i in range(batch)]
    if family.levels == "flow":
        own, moments = (0.7, 0.3), flow_grpo
        levels = [mf.FlowSDE(a) for a in own]
    else:
        own = levels = (1.0, 0.6)
        moments = ancestral
    got = draw(attach(pipe), call, weights=weights, levels=levels, seed=seeds)
    fuse = unequal_levels(weights, seeds, moments, own)
    expected = lockstep(family.make, [A, B], fuse, seeds=seeds)
    assert error(got, expected) < CLOSE


@three
def test_the_base_and_sets_of_adapters_are_objectives(family: Family):
    pipe, call = made(family.make)
    objectives = {"both": mf.Objective(["a", "b"], scale=[0.8, 0.5]), "base": mf.Objective.base()}
    weights = weights_for(call)
    got = draw(attach(pipe, objectives), call, weights=weights)
    expected = lockstep(family.make, [BOTH, BASE], equal_levels(weights))
    assert error(got, expected) < CLOSE
