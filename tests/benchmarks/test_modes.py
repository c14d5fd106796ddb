# SPDX-License-Identifier: Apache-2.0
"""modes.py judges every step by exact networks, and report.py shows what it kept."""

import json

import pytest
import torch

from benchmarks import modes
from benchmarks.tables import modes as tables
from benchmarks.tables import results
from msdda_fast.pipelines.stable_diffusion.modes import MODES
from tests.tiny_model import quiet


@pytest.mark.full  # the whole benchmark, small
def test_quality_and_its_table(monkeypatch, tmp_path):
    kept = []
    monkeypatch.setattr(modes, "TEST_PROMPTS", modes.TEST_PROMPTS[:2])
    monkeypatch.setattr(modes, "STEPS", 4)
    monkeypatch.setattr(modes, "append", lambda name, records: kept.extend(records))
    modes.quality(1)
    found = {record["mode"]: record for record in kept}
    assert list(found) == [*MODES, modes.BFLOAT16]
    assert found["exact"]["kl"] == [0, 0, 0]
    assert found["exact"]["changes"]["consistency"] == [0, 0, 0]
    for name in ("merged", "auto", modes.BFLOAT16):
        # of four steps the budget may admit none
        assert found[name]["kl"][0] > 0 or name == "auto"
    assert found["merged"]["kl_late"] == 0  # adapters do not act in the last of four steps

    timing = {"kind": "latency", "batch": 1, "when": "now", "rounds": 7, "load": 0, "commit": "c"}
    times = {"exact": 2.0, "merged": 1.0, "auto": 1.9}
    kept += [
        timing | {"mode": mode, "median_us": t, "p20_us": t - 0.1, "p80_us": t + 0.1}
        for mode, t in times.items()
    ]
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    (tmp_path / "modes.jsonl").write_text("".join(map(line, kept)))
    rows = [row for row in tables.modes_table().splitlines() if row.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows[1:]] == [f"| {name}" for name in found]
    assert rows[2].endswith("| 0.50 |")  # merged
    assert rows[3].endswith("| 0.95 (=) |")  # auto, and the spreads overlap


@pytest.mark.full  # of a benchmark
def test_an_exact_step_diverges_by_nothing_and_another_by_its_square(monkeypatch):
    monkeypatch.setattr(modes, "STEPS", 6)
    pipe = quiet(modes.load(torch.float32))
    table = modes.coefficients(pipe, torch.tensor([[0.5, 0.5]] * 2))
    embeds = pipe.encode_prompt(list(modes.TEST_PROMPTS[:2]), "cpu", 1, False)[0].detach()
    judge = modes.exact_networks(pipe, table)
    judge.begin(embeds[None, None], table.timesteps)
    states, _ = modes.trajectory(pipe, "exact", embeds, [7, 8])
    assert not modes.divergence(judge, states, table, [7, 8]).any()
    states[-1] += 0.01
    off = modes.divergence(judge, states, table, [7, 8])
    assert not off[:-1].any()
    expected = states[0, 0].numel() * 0.01**2 / (2 * table.std[-1].square())
    torch.testing.assert_close(off[-1].double(), expected, rtol=1e-3, atol=0)


def line(record) -> str:
    return json.dumps(record) + "\n"
