# SPDX-License-Identifier: Apache-2.0
"""What is claimed of the shipped flow model follows from the committed results."""

import csv
import json
from pathlib import Path

import pytest

from msdda_fast.emoji.evaluate_flow import SEEDS, flow_arms
from msdda_fast.emoji.flow_card import EMOJI_FLOW, flow_card

FOLDER = Path(__file__).parents[2] / "benchmarks" / "results"
RESULTS = json.loads((FOLDER / "emoji_flow.json").read_text())
ARMS, PAIRED, SETTING = (RESULTS[name] for name in ("arms", "paired differences", "setting"))


def test_the_setting_is_the_papers_held_out_prompts_and_all_arms():
    assert (SETTING["prompts"], SETTING["seeds"]) == (25, len(SEEDS))
    assert list(ARMS) == [arm.name for arm in flow_arms(SETTING["guidance_scale"])]


def test_the_guidance_is_the_best_of_those_tried_on_training_prompts():
    found = SETTING["objects on training prompts by guidance"]
    assert found[f"{SETTING['guidance_scale']:g}"] == max(found.values())


def test_the_judge_recognises_the_objects_of_the_base():
    base = ARMS[f"base, Euler, guidance {SETTING['guidance_scale']:g}"]
    assert base["judge object, single-object prompts"]["mean"] >= 0.85


@pytest.mark.parametrize(
    ("reward", "arm", "base"),
    [("aesthetic", "w = 0", "base, a = 0.7"), ("consistency", "w = 1", "base, a = 0.5")],
    ids=["aesthetic", "consistency"],
)
def test_each_adapter_beats_the_base_on_its_own_reward_beyond_the_intervals(reward, arm, base):
    assert ARMS[arm][reward]["low"] > ARMS[base][reward]["high"]
    assert PAIRED[f"{arm} minus {base}"][reward]["low"] > 0


def test_the_sweep_moves_between_the_ends():
    for reward, order in (("aesthetic", (0.0, 0.5, 1.0)), ("consistency", (1.0, 0.5, 0.0))):
        means = [ARMS[f"w = {w:g}"][reward]["mean"] for w in order]
        assert means == sorted(means, reverse=True)


def test_figures_follow_from_the_samples():
    with (FOLDER / "emoji_flow_samples.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["arm"] == "w = 1"]
    assert len(rows) == 25 * len(SEEDS)
    mean = sum(float(row["consistency"]) for row in rows) / len(rows)
    assert mean == pytest.approx(ARMS["w = 1"]["consistency"]["mean"], abs=1e-4)


def test_the_card_is_what_the_command_writes():
    assert (EMOJI_FLOW / "README.md").read_text() == flow_card(RESULTS)
