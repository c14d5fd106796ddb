# SPDX-License-Identifier: Apache-2.0
"""A gain counts only above both floors, and images of one prompt are not independent."""

import numpy as np
import pytest

from msdda_fast.evaluation import gauge
from msdda_fast.evaluation.floors import floors, floors_markdown, two_level
from msdda_fast.evaluation.gauge import gauge_figure, shares_kept
from msdda_fast.evaluation.rotations import averaged_rotations
from msdda_fast.evaluation.scores import COSTS, Score
from msdda_fast.evaluation.statistics import arms_of

PAIRS = [(f"prompt {p}", seed) for p in range(10) for seed in range(4)]
WEIGHTS = {"r1": 0.5, "r2": 0.5}
RNG = np.random.default_rng(5)


def rows(method, reward, objects=0.8, chroma=10.0, *, variant="", rewarded=0, pairs=PAIRS):
    weights = "" if method == "SD" else "r1=0.5 r2=0.5"
    costs = dict.fromkeys(COSTS, 1.0) | {"reward_calls": rewarded}
    return [
        Score(
            method, variant, None if method == "SD" else 0.5, weights, 25, prompt, seed,
            {"r1": reward, "r2": reward, "judge_object": objects + noise, "judge_color": 0.5,
             "background_chroma": chroma + 10 * noise},
            1.0, costs,
        )
        for (prompt, seed), noise in zip(pairs, RNG.normal(0, 0.1, len(pairs)), strict=True)
    ]  # fmt: skip


def verdicts(found):
    table = floors(arms_of(found), WEIGHTS)
    return {row.arm.method: (row.judge, row.background, row.both) for row in table}


def test_each_floor_stops_a_system():
    found = rows("SD", 0.0)
    found += rows("good", 1.0, objects=0.9) + rows("ruined", 3.0, objects=0.5)
    found += rows("painted", 2.0, objects=0.9, chroma=40.0)
    assert verdicts(found) == {
        "ruined": ("fail", "pass", "fail"),
        "painted": ("pass", "fail", "fail"),
        "good": ("pass", "pass", "pass"),
        "SD": ("pass", "pass", "pass"),
    }


def test_what_the_interval_does_not_exclude_is_soft():
    found = rows("SD", 0.0) + rows("near", 1.0, objects=0.79, chroma=18.1)
    base = [row.rewards["judge_object"] for row in found[: len(PAIRS)]]
    near = [row.rewards["judge_object"] for row in found[len(PAIRS) :]]
    shift = np.mean(base) - np.mean(near) - 0.01  # below the base by a hundredth
    for row in found[len(PAIRS) :]:
        row.rewards["judge_object"] += shift
    assert verdicts(found)["near"][0] == "soft"


def test_systems_with_and_without_rewards_stand_apart():
    found = rows("SD", 0.0) + rows("free", 1.0, objects=0.9)
    found += rows("search", 2.0, objects=0.9, rewarded=8) + rows("triple", 1.0)
    del found[-1].rewards["background_chroma"]  # not judged throughout: in no table
    text = floors_markdown([(WEIGHTS, floors(arms_of(found), WEIGHTS))])
    free, used = text.split("### With rewards")
    assert "| 1.2 |" not in text
    kl = {("free", "", "r1=0.5 r2=0.5"): 1.234}
    (line,) = (
        line
        for line in floors_markdown([(WEIGHTS, floors(arms_of(found), WEIGHTS))], kl).splitlines()
        if line.startswith("| free |")
    )
    assert "| pass | 1.2 |" in line
    assert "| free |" in free and "| search |" in used and "triple" not in text


def test_two_levels_are_wider_where_prompts_differ():
    """With all variance between prompts the error is that of 10 values, not of 40."""
    between = np.repeat(RNG.normal(0, 1, 10), 4)
    found = two_level(between, PAIRS)
    error = between[::4].std() / np.sqrt(10)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.15)


def test_rotations_are_averaged_and_their_spread_is_kept(tmp_path):
    found = rows("SD", 0.0) + rows("MSDDA", 1.0) + rows("RS", 0.9, variant="product")
    found += rows("RS", 0.4, variant="factor, rotation 0")
    found += rows("RS", 0.6, variant="factor, rotation 1", pairs=PAIRS[:20])
    arms = arms_of(found)
    [mean] = [arm for arm in averaged_rotations(arms) if "mean" in arm.variant]
    assert mean.variant == "factor, mean of 2 rotations" and len(mean.rewards) == 20
    shares = {share.system[1]: share for share in shares_kept(arms, WEIGHTS)}
    assert (
        shares["product"].share[:3] == pytest.approx((0.9, 0.9, 0.9))
        and not shares["product"].rotations
    )
    assert shares[mean.variant].share.mean == pytest.approx(0.5)
    assert shares[mean.variant].rotations == pytest.approx([0.4, 0.6])
    gauge_figure({"w = 0.5": list(shares.values())}, tmp_path / "gauge.png")
    assert (tmp_path / "gauge.png").stat().st_size > 1000
    assert shares_kept(arms_of(rows("SD", 0.0)), WEIGHTS) == []


def test_a_panel_that_lacks_merges_has_its_bars_in_the_rows_of_their_names(monkeypatch, tmp_path):
    found = rows("SD", 0.0) + rows("MSDDA", 1.0)
    found += rows("RS", 0.4, variant="factor") + rows("RS", 0.9, variant="product")
    both = shares_kept(arms_of(found), WEIGHTS)
    product = [share for share in both if share.system[1] == "product"]
    drawn = []
    monkeypatch.setattr(gauge, "save", lambda figure, file: drawn.append(figure))
    gauge_figure({"w = 0.2": product, "w = 0.5": both}, tmp_path / "gauge.png")
    few, all_of_them = drawn[0].axes
    names = [label.get_text() for label in few.get_yticklabels()]
    assert names == ["RS (factor)", "RS (product)"]
    [bar] = few.patches
    widths = {round(b.get_y(), 6): b.get_width() for b in all_of_them.patches}
    assert bar.get_width() == pytest.approx(widths[round(bar.get_y(), 6)]) == pytest.approx(0.9)
