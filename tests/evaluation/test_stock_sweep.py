# SPDX-License-Identifier: Apache-2.0
"""A sweep with a stock pipeline: the base at the first objective's noise, then the weights."""

from dataclasses import replace

import numpy as np
from PIL import Image

import msdda_fast as mf
from msdda_fast.evaluation.cell_drawer import CellDrawer, base_label
from msdda_fast.evaluation.cells import Cell
from msdda_fast.evaluation.sweep import Sweep, run_sweep
from msdda_fast.pipelines.accelerator import Accelerator
from msdda_fast.pipelines.attach import attach
from msdda_fast.pipelines.manifest import NAMELESS
from tests.families import images
from tests.families.encoders import with_encoders
from tests.tiny_model import quiet

SWEEP = Sweep(
    prompts=["a red dog"],
    weights=(0.25,),
    toward="b",
    num_inference_steps=2,
    guidance_scale=3.0,
    strength={"b": 0.5},
    rewards=("aesthetic",),
)
OBJECTIVES = {
    "a": mf.Objective("a", noise=mf.FlowSDE(0.7)),
    "b": mf.Objective("b", noise=mf.FlowSDE(0.5)),
}


def pipeline(objectives):
    pipe, _ = with_encoders(images.sd3, 1)
    return quiet(mf.MSDDAPipeline.from_pipe(pipe, objectives=objectives))


def draw(pipe, **given):
    return pipe(
        "a red dog", seed=4, num_inference_steps=2, guidance_scale=3.0, **given
    ).images[0]  # fmt: skip


def test_cells_are_the_calls_that_they_stand_for():
    pipe = pipeline(OBJECTIVES)
    drawer = CellDrawer(pipe, SWEEP)
    base, cell = (drawer([Cell("a red dog", weight, 4)])[0] for weight in (None, 0.25))
    lone = pipeline({"x": mf.Objective(noise=mf.FlowSDE(0.7))})
    assert np.array_equal(base, draw(lone))
    weights = {"a": 0.75, "b": 0.25}
    expected = draw(pipe, weights=weights, objective_strength={"b": 0.5})
    assert np.array_equal(cell, expected) and not np.array_equal(cell, draw(pipe, weights=weights))
    assert base_label(pipe) == "base"


def test_the_base_has_the_accelerator_of_the_objectives():
    pipe, _ = images.sd3(1)
    sets = {"a": (("a", 1.0), ("b", 1.0)), NAMELESS: (("b", 1.0),)}
    pipe = attach(pipe, {"a": OBJECTIVES["a"]}, sets, Accelerator("b"))
    base = CellDrawer(pipe, replace(SWEEP, toward=""))._base
    assert base.adapter_sets == {"base": sets[NAMELESS]} and base.accelerator == pipe.accelerator


def test_it_is_finished_once(tmp_path, monkeypatch):
    pipe = pipeline(OBJECTIVES)
    result = run_sweep(pipe, SWEEP, tmp_path)
    assert [len(values) for values in result.means.values()] == [2]
    with Image.open(result.grid) as grid:
        assert grid.mode == "RGB"
    monkeypatch.setattr(pipe.transformer, "forward", None)
    assert run_sweep(pipe, SWEEP, tmp_path).means == result.means
