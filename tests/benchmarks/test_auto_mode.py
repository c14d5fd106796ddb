# SPDX-License-Identifier: Apache-2.0
"""auto_mode.py compares receipts with what is so, and report.py shows it."""

import json

import pytest

from benchmarks import auto_mode, modes
from benchmarks.tables import modes as tables
from benchmarks.tables import results


@pytest.mark.full  # of a benchmark, small
def test_receipts_are_judged_and_their_table_is_made(monkeypatch, tmp_path):
    for module in (auto_mode, modes):
        monkeypatch.setattr(module, "STEPS", 3)
    monkeypatch.setattr(auto_mode, "SCALES", (2.0,))
    monkeypatch.setattr(auto_mode, "WEIGHTS", (0.5,))
    auto_mode.run(2, tmp_path / "auto_mode.json")
    result = json.loads((tmp_path / "auto_mode.json").read_text())
    [cell] = result["cells"]
    assert cell["images"] == result["images"] == 2 and 0 <= cell["held"] <= 2
    assert 1 <= cell["forwards_per_step"] <= 2 and cell["upper"] <= cell["budget"]
    merged = cell["merging"]
    assert 0 < merged["first_order"][0] < 2 * merged["precision"][0]
    if cell["forwards_per_step"] == 2:
        assert cell["truth"][0] == 0
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    rows = [row for row in tables.auto_mode_table().splitlines() if row.startswith("| 2 | 0.5 |")]
    assert len(rows) == 1
