# SPDX-License-Identifier: Apache-2.0
"""compare_flow.py: which pipelines it draws few steps with, and what its systems are."""

import msdda_fast as mf
from benchmarks import compare_flow
from msdda_fast.evaluation.plan import Plan
from tests.methods import stock


def test_few_steps_are_drawn_by_either_rule_with_the_same_adapters():
    pipe = stock.attached()
    found = {variant: own for own, _, variant in compare_flow.with_few_steps(pipe)}
    assert list(found) == ["SDE, 8 steps", "CPS, 8 steps", "SDE, 4 steps", "CPS, 4 steps"]
    assert found["CPS, 4 steps"].objectives["a"].noise == mf.CPS(0.7)
    assert found["SDE, 4 steps"].objectives["b"].noise == mf.FlowSDE(0.4)
    assert all(own.adapter_sets == pipe.adapter_sets for own in found.values())


def test_its_systems_exist():
    Plan(objectives=list(compare_flow.PREFERENCE), systems=compare_flow.SYSTEMS[:-1])
    assert compare_flow.SYSTEMS[-1] == "MORL"  # which there is with an oracle
