# SPDX-License-Identifier: Apache-2.0
"""latency.py --size: every way computes what it is timed for, in every family."""

import io
import json
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from benchmarks import latency, latency_families
from benchmarks.contenders import families
from benchmarks.contenders.contender import Unverified
from benchmarks.contenders.together import WAYS, exact, verify
from benchmarks.tables import results
from benchmarks.tables.denoisers import latency_families_table

TINY = ["--device", "cpu", "--dtype", "fp32", "--size", "tiny", "--rank", "2", "--rounds", "2"]


@pytest.fixture(autouse=True)
def settings():
    with torch.random.fork_rng():
        yield


@pytest.mark.parametrize(
    "model",
    [
        "wan",
        *(pytest.param(name, marks=pytest.mark.full) for name in ("sd3", "flux", "sdxl")),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_every_way_is_timed_or_has_a_reason(model, tmp_path, monkeypatch):
    contenders = "base,rows,rows again,soup,turns,mixed,ours,ours/captured"
    given = ["--model", model, "--objectives", "2", "--contenders", contenders]
    folder = str(tmp_path)
    assert latency.main([*TINY, *given, "--results", folder]) == 0
    text = (tmp_path / "latency-families.jsonl").read_text()
    records = {r["contender"]: r for r in map(json.loads, text.splitlines())}
    assert "no graphs" in records["ours/captured"]["skipped"]
    timed = {name: record for name, record in records.items() if "median_us" in record}
    assert [*timed] == ["base", "rows", "rows again", "soup", "turns", "mixed", "ours"]
    assert all(record["error"] <= 1e-5 and record["rounds"] == 2 for record in timed.values())
    assert timed["rows"]["ratio"] == 1 and timed["ours"]["hidden_axis_us"] > 0
    count = {name: record["operators"] for name, record in timed.items()}
    assert count["base"] == count["soup"] and count["ours"] < count["mixed"] < 2 * count["turns"]
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    console = Console(width=200, record=True, file=io.StringIO())
    latency_families.show(console, list(records.values()))
    for table in (latency_families_table(), console.export_text()):
        assert "one after another" in table and "no graphs" in table and "rank 2" in table


def test_a_wrong_way_is_refused():
    torch.manual_seed(0)
    kind = {"device": torch.device("cpu"), "dtype": torch.float32}
    denoiser = families.load("wan", "tiny", count=2, rank=2, **kind)
    with torch.no_grad(), ExitStack() as stack:
        outputs = exact(denoiser, 2)
        way = WAYS["turns"]
        right = way.make(denoiser, 2, stack)
        assert verify(way, right, outputs, torch.float32) < 1e-5
        for wrong in (lambda: right().flip(0), lambda: right() * torch.nan):
            with pytest.raises(Unverified, match="nothing was timed: `set_adapter`"):
                verify(way, wrong, outputs, torch.float32)
        weak = outputs | {"each": outputs["base"]}
        with pytest.raises(Unverified, match=r"adapters change outputs by 0\.00e"):
            verify(
                replace(way, adapters="base"),
                WAYS["rows"].make(denoiser, 2, stack),
                weak,
                torch.float32,
            )


@pytest.mark.parametrize("given", [["--model", "flux"], ["--model", "emoji", "--size", "tiny"]])
def test_a_size_is_for_families(given, capsys):
    with pytest.raises(SystemExit):
        latency.arguments(given)
    assert "--size is for sd3, flux, sdxl, wan" in capsys.readouterr().err


@pytest.mark.full
@pytest.mark.parametrize("model", families.FAMILIES)
def test_sizes_for_the_cpu_have_at_least_100_million_parameters(model):
    family = families.FAMILIES[model]
    with torch.device("meta"):
        network = family.kind(**family.configs["cpu"])
    assert sum(parameter.numel() for parameter in network.parameters()) >= 100e6
