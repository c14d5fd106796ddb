# SPDX-License-Identifier: Apache-2.0
"""The identity of a stock pipeline changes with everything that its images depend on, by name."""

import pytest
import torch

import msdda_fast as mf
from msdda_fast import resume
from msdda_fast.pipelines.identity import model_identity
from tests.families import images
from tests.families.lockstep import draw, quiet

OBJECTIVES = {
    "one": mf.Objective("a", noise=mf.FlowSDE(0.7)),
    "both": mf.Objective(["a", "b"], scale=[0.5, 1.0], noise=mf.FlowSDE(0.5)),
    "base": mf.Objective(noise=mf.FlowSDE(0.5)),
}


@pytest.fixture(scope="module")
def stock():
    return images.sd3(1)


def identity(stock, **changes):
    objectives = OBJECTIVES | changes
    return model_identity(quiet(mf.MSDDAPipeline.from_pipe(stock[0], objectives=objectives)))


def differences(old, new):
    with pytest.raises(mf.errors.ResumeMismatch) as error:
        resume.require_same("here", old, new)
    return str(error.value)


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"one": mf.Objective("a", noise=mf.FlowSDE(0.6))}, "objectives.one.noise.level was 0.7"),
        ({"one": mf.Objective("a", noise=mf.CPS(0.7))}, "objectives.one.noise.kind was 'FlowSDE'"),
        ({"one": mf.Objective("b", noise=mf.FlowSDE(0.7))}, "objectives.one.adapters"),
        ({"one": mf.Objective("a", scale=2.0, noise=mf.FlowSDE(0.7))}, "objectives.one.adapters"),
        ({"one": mf.Objective("a", noise=mf.FlowSDE(0.7), timesteps=(0, 9))}, "timesteps"),
        (
            {"both": mf.Objective(["a", "b"], scale=[0.6, 1.0], noise=mf.FlowSDE(0.5))},
            "objectives.both.adapters",
        ),
    ],
)
def test_objectives(stock, changed, field):
    assert field in differences(identity(stock), identity(stock, **changed))


@pytest.mark.parametrize(
    ("tensor", "field"),
    [("to_q.base_layer.weight", "model.transformer"), ("to_q.lora_A.b", "objectives.both")],
)
def test_one_number_of_a_network(stock, tensor, field):
    before = identity(stock)
    parameters = stock[0].transformer.named_parameters()
    parameter = next(value for name, value in parameters if tensor in name)
    kept = parameter.detach().clone()
    with torch.no_grad():
        parameter.view(-1)[0] += 1e-3
        found = differences(before, identity(stock))
        parameter.copy_(kept)
    assert f"otherwise: {field}" in found and ";" not in found


def test_a_call_changes_nothing(stock):
    before = identity(stock)
    assert before["pipeline"] == "StableDiffusion3Pipeline" and before["dtype"] == "float32"
    pipe = quiet(mf.MSDDAPipeline.from_pipe(stock[0], objectives=OBJECTIVES))
    draw(pipe, stock[1], weights=[0.2, 0.3, 0.5], seed=1)
    assert model_identity(pipe) == before
