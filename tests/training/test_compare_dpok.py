# SPDX-License-Identifier: Apache-2.0
"""What the comparison of DPOK with step-level DPO may say, and what it reads."""

import pytest

from msdda_fast.emoji.compare_dpok import measured, verdict
from msdda_fast.emoji.prompts import TEST_PROMPTS

MORE, LESS, EVEN = ({"low": a, "high": b} for a, b in ((0.1, 0.3), (-0.3, -0.1), (-0.1, 0.1)))


@pytest.mark.parametrize(
    ("aesthetic", "consistency", "expected"),
    [
        (MORE, EVEN, "dpok"),
        (EVEN, MORE, "dpok"),
        (LESS, EVEN, "step-dpo"),
        (LESS, LESS, "step-dpo"),
        (EVEN, EVEN, "no difference"),
        (MORE, LESS, "neither: dpok has more aesthetic, less consistency"),
        (LESS, MORE, "neither: step-dpo has more aesthetic, less consistency"),
    ],
)
def test_verdict_needs_an_interval_without_zero_and_no_loss(aesthetic, consistency, expected):
    assert verdict({"aesthetic": aesthetic, "consistency": consistency}, "aesthetic") == expected


def test_measured_reads_the_first_seeds_of_an_arm_in_any_order(tmp_path):
    file = tmp_path / "samples.csv"
    rows = [
        f"{arm},{prompt},{seed},{index + 100 * seed}"
        for arm in ("base", "w = 0")
        for index, prompt in list(enumerate(TEST_PROMPTS))[::-1]
        for seed in (2, 1, 0)
    ]
    file.write_text("\n".join(["arm,prompt,seed,aesthetic", *rows]) + "\n")
    scores = measured(file, "base", seeds=2)["aesthetic"]
    assert scores.shape == (25, 2) and scores[3].tolist() == [3, 103]
    with pytest.raises(ValueError, match=r"no row for arm 'base', prompt and seed .*3\)"):
        measured(file, "base", seeds=4)
