# SPDX-License-Identifier: Apache-2.0
"""two_networks.py: turns in proportion, the forwards it claims, gains of the right sign."""

import json

import pytest
import torch

import msdda_fast as mf
from benchmarks import two_networks
from benchmarks.tables import comparisons as tables
from benchmarks.tables import results
from benchmarks.two_networks import SCORES, summarise, systems, turns
from msdda_fast.training import Collection
from tests.tiny_model import small_unet, tiny  # noqa: F401 - fixture


@pytest.mark.parametrize("steps", [25, 50])
@pytest.mark.parametrize("w", two_networks.WEIGHTS)
def test_turns_are_in_proportion_and_evenly_spread(w, steps):
    own = turns(w, steps)
    assert len(own) == steps and abs(sum(own) - w * steps) <= 0.5
    for start in range(steps):
        for stop in range(start + 1, steps + 1):
            assert abs(sum(own[start:stop]) - w * (stop - start)) <= 1 + 1e-9
    assert turns(0.0, steps) == [0] * steps and turns(1.0, steps) == [1] * steps


def test_a_turn_is_the_step_of_that_objective_and_runs_no_other_network(tiny):  # noqa: F811
    other = small_unet(channels=8)
    objectives = {
        "first": mf.Objective(tiny.warm, eta=1.0),
        "second": mf.Objective(unet=other, eta=0.8),
        "teacher": mf.Objective(tiny.cool, eta=0.8),
    }
    pipe = tiny.load(objectives=objectives)
    rows = {"first": 0, "second": 0}

    def count(name):
        def hook(module, args, output):
            rows[name] += len(args[0])

        return hook

    pipe.unet.register_forward_hook(count("first"))
    other.register_forward_hook(count("second"))
    drawn = {}
    for system in systems(5):
        rows.update(first=0, second=0)
        plan = system.plan
        drawn[system.name, system.w], _ = two_networks.sampler(pipe, plan)(["a dog"] * 2, [3, 4])
        assert [n / 2 for n in rows.values()] == system.forwards
    assert len({tuple(latents.flatten().tolist()) for latents in drawn.values()}) == len(drawn)
    alone = tiny.load(objectives={"second": mf.Objective(unet=other, eta=0.8)})
    own = alone(
        ["a dog"] * 2, seed=[3, 4], num_inference_steps=5, guidance_scale=1.0, output_type="latent"
    ).images
    torch.testing.assert_close(drawn["second network alone", None], own)


def fake(offsets):
    """Scores of 3 prompts x 2 seeds: noise that all systems share, plus an offset of each."""
    noise = torch.randn(6, generator=torch.Generator().manual_seed(0))
    index, seeds = torch.arange(3).repeat_interleave(2), torch.arange(2).repeat(3)
    return {
        key: Collection(
            torch.zeros(6, 1, 1, 1), index, seeds, {name: noise + up[name] for name in SCORES}
        )
        for key, up in offsets.items()
    }


def test_gains_are_fused_minus_the_other_weighted_by_w(tmp_path, monkeypatch):
    plans = {f"{system.name} {system.w}": system for system in systems()}
    offsets = {key: dict.fromkeys(SCORES, 0.0) for key in plans}
    offsets["fused 0.2"]["consistency"] = 1.0  # the second network's
    offsets["in turns 0.8"]["aesthetic"] = -1.0
    found = summarise(fake(offsets), plans)
    gains = {(gain["w"], gain["over"]): gain for gain in found["gains"]}
    assert len(gains) == 3 * 5  # per w: three alone, two in turns
    assert gains[0.2, "in turns"]["r_w"] == [0.2] * 3
    assert gains[0.8, "in turns"]["r_w"] == [0.2] * 3
    assert gains[0.5, "in turns"]["r_w"] == [0.0] * 3
    assert gains[0.2, "in turns"]["judge_object"] == [0.0] * 3
    spread = found["systems"][0]["scores"]["aesthetic"]
    assert spread[1] < spread[0] < spread[2]

    setting = {
        "prompts": 3, "seeds": 2, "steps": 25, "guidance_scale": 1.0, "dtype": "float32",
        "etas": {"aesthetic": 1.0, "second network": 0.8, "teacher": 0.8},
        "parameters": {"first": 8_000_000, "second": 2_000_000},
        "distillation": {"steps": 10, "seconds": 60.0, "loss": 0.1},
        "intervals": "i", "machine": "m", "cores": 2, "threads": 1, "torch": "t",
    }  # fmt: skip
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    (tmp_path / "two_networks.json").write_text(json.dumps({"setting": setting, **found}))
    table = tables.two_networks_table()
    assert table.count("+0.200 [+0.200, +0.200] *") == 5 + 1
    assert "\n| fused | 0.5 | 25 + 25 |" in table


def test_systems_of_other_prompts_are_not_compared():
    plans = {f"{system.name} {system.w}": system for system in systems()}
    drawn = fake({key: dict.fromkeys(SCORES, 0.0) for key in plans})
    few = drawn["fused 0.2"]
    drawn["fused 0.2"] = Collection(few.latents, few.prompt_index, few.seeds + 1, few.scores)
    with pytest.raises(ValueError, match="different prompts or seeds"):
        summarise(drawn, plans)
