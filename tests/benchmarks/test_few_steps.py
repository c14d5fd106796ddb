# SPDX-License-Identifier: Apache-2.0
"""few_steps.py draws every sampler from the same seeds, and its table shows what it kept."""

import json

import pytest
import torch

from benchmarks import few_steps, few_steps_output
from benchmarks.harness import RESULTS


def test_detail_falls_where_images_are_smooth():
    noise = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert few_steps.detail(torch.ones(2, 3, 8, 8)).tolist() == [0, 0]
    smooth = (noise + noise.roll(1, -1)) / 2
    assert (few_steps.detail(smooth) < few_steps.detail(noise)).all()


@pytest.mark.full  # the whole benchmark, small
def test_measure_and_its_table(monkeypatch, tmp_path):
    monkeypatch.setattr(few_steps, "TEST_PROMPTS", few_steps.TEST_PROMPTS[:8])
    few = [sampler._replace(steps=min(sampler.steps, 5)) for sampler in few_steps.SAMPLERS]
    monkeypatch.setattr(few_steps, "SAMPLERS", tuple(few[-3:]))
    records, shown = few_steps.measure(1)
    assert [(r["steps"], r["weight"]) for r in records] == [
        (steps, weight) for steps in (5, 4, 2) for weight in (*few_steps.WEIGHTS, None)
    ]
    picture = few_steps.picture(shown)
    assert picture.width > 88 * few_steps.SHOWN and picture.height > 88 * 3


def test_the_committed_run():
    """What the guide says of it in words."""
    run = few_steps_output.last_run(RESULTS / "few_steps.jsonl")
    assert len(run) == sum(len(few_steps.preferences(s)) for s in few_steps.SAMPLERS)
    assert {record["images"] for record in run} == {100}
    found = {(few_steps_output.title(r), r["weight"]): r for r in run}
    for weight in (*few_steps.WEIGHTS, None):
        full = found["25 steps, DDIM", weight]
        fast = found["4 steps, LCM, accelerator", weight]
        assert fast["seconds"] < full["seconds"] / 3
        # it has not lost the objects
        assert fast["scores"]["judge object"][0] > full["scores"]["judge object"][0] - 0.05
    rows = few_steps_output.table(RESULTS / "few_steps.jsonl").splitlines()
    assert len([row for row in rows if row.startswith("| ")]) == 1 + len(run)


def test_the_table_is_of_the_last_run(tmp_path):
    assert few_steps_output.table(tmp_path / "none.jsonl") == ""
    line = (RESULTS / "few_steps.jsonl").read_text().splitlines()[0]
    newer = json.dumps(json.loads(line) | {"when": "later", "steps": 25, "seconds": 2.0})
    (tmp_path / "two.jsonl").write_text(f"{line}\n{newer}\n")
    table = few_steps_output.table(tmp_path / "two.jsonl").splitlines()
    assert len([row for row in table if row.startswith("| ")]) == 2
    assert table[2].endswith("| 2000 ms | 1.0x |")
