# SPDX-License-Identifier: Apache-2.0
"""latency.py refuses wrong contenders and keeps what it measured; the runbook resumes."""

import io
import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from benchmarks import latency, latency_output
from benchmarks.contenders import runtimes, stock
from benchmarks.contenders.catalogue import catalogue
from benchmarks.contenders.contender import LIMITS, Impossible, Unverified, verify
from benchmarks.contenders.models import load
from benchmarks.contenders.request import Request
from benchmarks.tables import latency as tables
from benchmarks.tables import results

SOME = "E1,E2,E3-M2,E4-M2,E5-M2,S,S again,M2,M2/merged,M2-no-graph,C5-M2"
TINY = ["--device", "cpu", "--dtype", "fp32", "--model", "tiny", "--steps", "3", "--rounds", "7"]

#: One run of all contenders takes a minute of two cores.
MEASURED = pytest.mark.full


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(folder, contenders, *more):
    return latency.main([*TINY, "--contenders", contenders, "--results", str(folder), *more])


@pytest.fixture(scope="module", autouse=True)
def settings():
    """The script sets these for its own process."""
    limit, threads = torch._dynamo.config.recompile_limit, torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        yield
    torch.set_num_threads(threads)
    torch._dynamo.config.recompile_limit = limit


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Folder and records of one run."""
    folder = tmp_path_factory.mktemp("latency")
    assert run(folder, SOME, "--objectives", "1,2") == 0
    return folder, lines(folder / "latency.jsonl")


@pytest.fixture(scope="module")
def request_of_two():
    torch.manual_seed(0)
    device = torch.device("cpu")
    model = load("tiny", num_objectives=2, rank=2, device=device, dtype=torch.float32)
    return Request(model, batch=1, num_steps=3)


@MEASURED
def test_every_contender_is_timed_or_has_a_reason(measured):
    _, records = measured
    names = [entry.name for entry in catalogue([1, 2], "auto", "cpu")]
    assert [record["contender"] for record in records] == names
    assert all(("median_us" in record) != bool(record.get("skipped")) for record in records)
    skipped = {record["contender"]: record.get("skipped") for record in records}
    assert "no graph" in skipped["M2-no-graph"]
    assert "dynamo" in skipped["C5-M2"]
    assert skipped["C1"] == "not asked for"


@MEASURED
def test_a_record_says_what_was_measured_and_where(measured):
    _, records = measured
    ours = next(record for record in records if record["contender"] == "M2")
    for field in ("when", "machine", "load", "commit", "weights", "text_ms", "vae_ms", "loop_ms"):
        assert ours[field] not in (None, "")
    assert ours["p20_us"] <= ours["median_us"] <= ours["p80_us"]
    assert ours["rounds"] >= 7
    assert ours["error"] <= 1e-4
    assert ours["num_objectives"] == 2 and ours["branches"] == 2 and ours["guidance"] == 7.5


@MEASURED
def test_two_objectives_take_few_more_operators_than_one(measured):
    _, records = measured
    count = {record["contender"]: record.get("operators") for record in records}
    assert count["M2"] <= 1.05 * count["S"]
    assert count["M2"] < count["E1"] < count["E4-M2"] < count["E3-M2"]


@MEASURED
def test_copies_hold_each_weight_again_and_one_forward_does_not(measured):
    _, records = measured
    held = {record["contender"]: record.get("parameters_mb") for record in records}
    peak = {record["contender"]: record.get("peak_mb") for record in records}
    assert held["E4-M2"] == pytest.approx(2 * held["E1"], rel=1e-2)
    assert held["E3-M2"] <= held["M2"] <= 1.1 * held["E1"]
    assert peak["S"] < peak["M2"]


@MEASURED
def test_the_tables_have_what_was_timed_and_what_was_not(measured, monkeypatch):
    folder, records = measured
    monkeypatch.setattr(results, "RESULTS", folder)
    console = Console(width=200, record=True, file=io.StringIO())
    latency_output.show(console, records)
    for text in (tables.latency_table(), console.export_text()):
        assert "M2" in text and "E3-M2" in text
        assert "C5-M2" in text and "dynamo" in text
        assert "E4-M3" not in text
    assert (folder / "latency.png").read_bytes().startswith(b"\x89PNG")


@MEASURED
def test_ratios_are_of_one_run_and_the_last_run_is_reported(measured, tmp_path, monkeypatch):
    _, records = measured
    later = [record | {"when": "2099-01-01T00:00:00+00:00"} for record in records]
    for record in later:
        if record["contender"] == "S":
            record["median_us"] *= 2
    text = "".join(json.dumps(record) + "\n" for record in [*records, *later])
    (tmp_path / "latency.jsonl").write_text(text)
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    (last,) = tables.latency_runs().values()
    ours, single = (next(r for r in last if r["contender"] == name) for name in ("M2", "S"))
    assert tables.ratios(ours, last)["S"] == ours["median_us"] / single["median_us"]
    assert tables.is_noisy(last)


def test_a_wrong_contender_is_refused_by_name(request_of_two):
    right = stock.merged_copies(request_of_two, 2)
    wrong = replace(stock.adapters_in_turn(request_of_two, 2), systems=[{0: 1.0}, {0: 1.0}])
    assert verify({"right": right}, request_of_two)["right"] < 1e-5
    with pytest.raises(Unverified, match=r"nothing was timed: \{'wrong'"):
        verify({"right": right, "wrong": wrong}, request_of_two)


RUNTIMES = pytest.mark.parametrize(
    ("package", "make"),
    [("openvino", runtimes.openvino), ("onnxruntime", runtimes.onnx_runtime)],
    ids=["OpenVINO", "ONNX Runtime"],
)


@pytest.mark.full  # an export takes seconds
@RUNTIMES
def test_a_runtime_computes_equal_rows(request_of_two, package, make):
    pytest.importorskip(package)
    peers = {str(count): make(request_of_two, count) for count in (1, 2)}
    assert max(verify(peers, request_of_two).values()) < 1e-5


@RUNTIMES
def test_a_runtime_that_is_missing_is_named(request_of_two, monkeypatch, package, make):
    monkeypatch.setattr(runtimes, "find_spec", lambda name: None)
    with pytest.raises(Impossible, match=f"{package} is not installed"):
        make(request_of_two, 2)


@MEASURED
def test_adapters_change_more_than_half_precision_loses(measured):
    _, records = measured
    effects = {record["contender"]: record.get("effect") for record in records}
    assert effects["E1"] is None
    assert effects["M2"] == effects["E3-M2"] > 5 * LIMITS[torch.float16]


def test_no_numbers_are_wrong_numbers(request_of_two):
    right = stock.single(request_of_two)
    nan = replace(right, step=lambda: torch.full_like(request_of_two.x, torch.nan))
    with pytest.raises(Unverified):
        verify({"nan": nan}, request_of_two)


def test_nothing_is_kept_of_a_refused_run(tmp_path, monkeypatch, capsys):
    def refuse(contenders, request):
        raise Unverified("nothing was timed")

    monkeypatch.setattr(latency, "verify", refuse)
    assert run(tmp_path, "E1", "--objectives", "1") == 1
    assert list(tmp_path.iterdir()) == []
    assert "ms/step" not in capsys.readouterr().out


def test_kernels_are_counted_after_everything_was_timed(tmp_path, monkeypatch):
    """The profiler that counts them stays on, and would slow down what follows."""
    seen = []

    def noted(name):
        real = getattr(latency, name)
        return lambda *given: seen.append(name) or real(*given)

    for name in ("interleaved", "loop_times", "describe"):
        monkeypatch.setattr(latency, name, noted(name))
    assert run(tmp_path, "E1", "--objectives", "1") == 0
    assert seen[-1] == "describe" and seen.index("describe") > seen.index("loop_times")
