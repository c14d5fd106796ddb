# SPDX-License-Identifier: Apache-2.0
"""What is claimed of the shipped model follows from the committed results."""

import hashlib
import json
from itertools import pairwise
from pathlib import Path

import pytest

from msdda_fast.assets import ASSETS
from msdda_fast.emoji.card import EMOJI, card, results_table
from msdda_fast.emoji.evaluate import SWEEP

ROOT = Path(__file__).parents[2]
RESULTS = json.loads((ROOT / "benchmarks" / "results" / "emoji.json").read_text())
THREE = json.loads((ROOT / "benchmarks" / "results" / "emoji_three.json").read_text())
CERTIFICATE = json.loads((ROOT / "benchmarks" / "results" / "certificate.json").read_text())
ARMS, PAIRED = RESULTS["arms"], RESULTS["paired differences"]


def test_the_setting_is_the_papers_held_out_prompts():
    assert (RESULTS["setting"]["prompts"], RESULTS["setting"]["seeds"]) == (25, 32)


@pytest.mark.parametrize(
    ("reward", "arm", "base"),
    [("aesthetic", "w = 0", "base, eta 1.0"), ("consistency", "w = 1", "base, eta 0.8")],
    ids=["aesthetic", "consistency"],
)
def test_each_adapter_beats_the_base_on_its_own_reward_beyond_the_intervals(reward, arm, base):
    assert ARMS[arm][reward]["low"] > ARMS[base][reward]["high"]
    assert PAIRED[f"{arm} minus {base}"][reward]["low"] > 0


def test_the_sweep_moves_monotonically_between_the_ends():
    for before, after in pairwise(f"w = {w:g}" for w in SWEEP):
        assert ARMS[after]["consistency"]["mean"] > ARMS[before]["consistency"]["mean"]
        assert ARMS[after]["aesthetic"]["mean"] < ARMS[before]["aesthetic"]["mean"]


def test_the_judge_recognises_base_images_and_sees_their_colour_weakness():
    for base in ("base, eta 1.0", "base, eta 0.8"):
        assert ARMS[base]["judge object, single-object prompts"]["mean"] >= 0.80
        assert 0.6 <= ARMS[base]["judge color, single-object prompts"]["mean"] <= 0.81


def test_neither_adapter_loses_objects_and_consistency_has_the_colours_of_the_prompts():
    for arm, base in (("w = 0", "base, eta 1.0"), ("w = 1", "base, eta 0.8")):
        assert ARMS[arm]["judge object"]["mean"] >= ARMS[base]["judge object"]["mean"]
    assert ARMS["w = 1"]["consistency"]["mean"] >= 0.75
    assert ARMS["w = 1"]["judge color"]["mean"] >= 0.95


@pytest.mark.parametrize("prompts", ["", ", single-object prompts"], ids=["all", "single"])
def test_the_consistency_adapter_raises_the_judges_colour_accuracy_by_ten_points(prompts):
    name = f"judge color{prompts}"
    for base in ("base, eta 1.0", "base, eta 0.8"):
        assert ARMS["w = 1"][name]["mean"] >= ARMS[base][name]["mean"] + 0.10


def test_figures_follow_from_the_samples():
    rows = (ROOT / "benchmarks" / "results" / "emoji_samples.csv").read_text().splitlines()
    names = rows[0].split(",")
    column = names.index("consistency")
    values = [float(row.split(",")[column]) for row in rows[1:] if row.startswith("w = 1,")]
    assert len(values) == 25 * 32
    mean = sum(values) / len(values)
    assert mean == pytest.approx(ARMS["w = 1"]["consistency"]["mean"], abs=1e-4)


def test_the_third_adapter_raises_its_own_reward_and_spares_the_objects():
    arms, gain = THREE["arms"], THREE["paired differences"]["warmth minus base, eta 1.0"]
    assert (THREE["setting"]["prompts"], THREE["setting"]["seeds"]) == (25, 8)
    for other in ("base, eta 1.0", "w = 0", "w = 1"):
        assert arms["warmth"]["warmth"]["low"] > arms[other]["warmth"]["high"]
    assert gain["warmth"]["low"] > 0.5
    assert gain["judge object"]["high"] > 0


def test_consistency_and_warmth_pull_apart():
    """A warm picture has not the colours of its prompt."""
    gain = THREE["paired differences"]["warmth minus base, eta 1.0"]
    assert gain["consistency"]["high"] < 0 and gain["judge color"]["high"] < 0


def test_equal_parts_of_three_beat_the_base_in_every_reward():
    gain = THREE["paired differences"]["a third each minus base, eta 1.0"]
    for reward in ("aesthetic", "consistency", "warmth"):
        assert gain[reward]["low"] > 0


def test_the_shared_arms_are_the_first_seeds_of_the_larger_run():
    for arm in ("base, eta 1.0", "w = 0", "w = 1"):
        for reward in ("aesthetic", "consistency"):
            few, many = THREE["arms"][arm][reward], ARMS[arm][reward]
            assert few["low"] < many["high"] and many["low"] < few["high"]


def test_card_and_results_page_are_what_the_command_writes():
    assert (EMOJI / "README.md").read_text() == card(RESULTS, THREE, CERTIFICATE)
    assert results_table(RESULTS) in (ROOT / "docs" / "results.md").read_text()


def test_the_weights_are_small_and_the_manifest_is_theirs():
    assert sum(path.stat().st_size for path in ASSETS.rglob("*.safetensors")) <= 40e6
    manifest = json.loads((EMOJI / "manifest.json").read_text())
    assert len(manifest["sha256"]) >= 10
    for name, digest in manifest["sha256"].items():
        assert hashlib.sha256((EMOJI / name).read_bytes()).hexdigest() == digest
    assert manifest["objectives"] == json.loads((EMOJI / "objectives.json").read_text())
    assert (EMOJI / manifest["notices"]).is_file()
    assert list(manifest["objectives"]) == ["aesthetic", "consistency"]
    assert list(manifest["more_objectives"]) == ["warmth"]
