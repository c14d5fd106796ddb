# SPDX-License-Identifier: Apache-2.0
import json
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from msdda_fast.assets import resolve
from msdda_fast.emoji import oracle
from msdda_fast.emoji.align import ALIGNMENT, TIMESTEPS


@pytest.mark.parametrize(("w", "eta"), [(0.2, 0.9480909), (0.5, 0.8834522), (0.8, 0.8304548)])
def test_the_oracle_has_the_noise_of_the_fused_step(w, eta):
    assert oracle.oracle_eta(w) == pytest.approx(eta, abs=1e-7)


def test_its_recipe_is_that_of_the_adapters_at_the_ends_and_between_them_elsewhere():
    for w, name in ((1.0, "consistency"), (0.0, "aesthetic")):
        found, own = oracle.oracle_recipe(w).config, ALIGNMENT[name].config
        assert replace(found, seed=own.seed) == own
    middle = oracle.oracle_recipe(0.5)
    assert middle.eta == oracle.oracle_eta(0.5)
    steps = [recipe.config.steps for recipe in ALIGNMENT.values()][:2]
    assert middle.config.steps == round(sum(steps) / 2)


def test_it_is_trained_on_the_weighted_sum(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(oracle, "align_sum", lambda *arguments: asked.append(arguments))
    oracle.align_oracle(tmp_path, 0.25, tmp_path)
    assert asked == [
        (
            tmp_path,
            {"consistency": 0.25, "aesthetic": 0.75},
            oracle.oracle_recipe(0.25),
            tmp_path / "oracle-0.25",
        )
    ]


@pytest.mark.parametrize("w", [-0.1, 1.1, float("nan")])
def test_a_weight_outside_the_simplex_is_refused(w):
    with pytest.raises(ValueError, match=r"w must lie in \[0, 1\]"):
        oracle.oracle_recipe(w)


def test_the_committed_adapters_are_those_of_the_command():
    folder = Path(__file__).parents[2] / "benchmarks" / "results" / "oracle"
    listed = json.loads((folder / "oracle.json").read_text())
    assert listed["objective"] == oracle.WEIGHTED
    assert tuple(listed["timesteps"]) == TIMESTEPS
    assert [entry["w"] for entry in listed["adapters"].values()] == list(oracle.PREFERENCES)
    shipped = load_file(resolve("msdda-fast/emoji") / "aesthetic/pytorch_lora_weights.safetensors")
    for name, entry in listed["adapters"].items():
        assert entry["eta"] == pytest.approx(oracle.oracle_eta(entry["w"]), abs=1e-6)
        path = folder / name / "pytorch_lora_weights.safetensors"
        assert load_file(path).keys() == shipped.keys()
        assert path.stat().st_size < 200_000
