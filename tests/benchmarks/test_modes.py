# SPDX-License-Identifier: Apache-2.0
"""modes.py judges every step by exact networks, and report.py shows what it kept."""

import json

import torch

from benchmarks import modes, report
from msdda_fast.pipeline.modes import MODES
from tests.tiny_model import quiet


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
    for name in ("staggered", "merged", "hybrid", modes.BFLOAT16):
        assert found[name]["kl"][0] > 0
    assert found["hybrid"]["kl"][0] < found["merged"]["kl"][0]
    # the last step of four is exact in hybrid mode, and merged in merged mode
    assert found["hybrid"]["kl_late"] < 1e-4 < found["merged"]["kl_late"]

    timing = {"kind": "latency", "batch": 1, "when": "now"}
    times = {"exact": 2.0, "staggered": 1.5, "merged": 1.0, "hybrid": 1.25}
    kept += [timing | {"mode": mode, "median_us": time} for mode, time in times.items()]
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    (tmp_path / "modes.jsonl").write_text("".join(map(line, kept)))
    rows = [row for row in report.modes_table().splitlines() if row.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows[1:]] == [f"| {name}" for name in found]
    assert rows[3].endswith("| 0.50 |")  # merged


def test_the_exact_trajectory_is_that_of_the_pipeline():
    pipe = quiet(modes.load(torch.float32))
    weights = [0.5, 0.5]
    table = modes.mf.coefficient_table(
        pipe.scheduler, modes.STEPS, weights=[weights] * 2, etas=[1.0, 0.8]
    )
    prompts = list(modes.TEST_PROMPTS[:2])
    embeds = pipe.encode_prompt(prompts, "cpu", 1, False)[0][None, None].detach()
    networks = modes.ModeNetworks([*pipe.variants.values()], modes.DEFAULTS)
    exact = modes.Exact(networks, table, embeds)
    x_0, divergence = modes.trajectory(exact, exact, table, [7, 8])
    call = dict(weights=weights, num_inference_steps=modes.STEPS, seed=7, output_type="latent")
    expected = pipe(prompts, **call).images
    assert (x_0 - expected).abs().max() < 1e-4
    assert not divergence.any()


def line(record) -> str:
    return json.dumps(record) + "\n"
