# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the server: its arrivals, its statistics, its table, and its other scheduler."""

import asyncio
import json
import time

import pytest
import torch

from benchmarks import load, serving, serving_output
from benchmarks.contenders.one_weight import OneWeightQueue
from benchmarks.contenders.servers import occupancy
from benchmarks.tables import results
from benchmarks.tables.serving import before_table
from msdda_fast.batching.admission import Admission
from msdda_fast.batching.captured_checks import CapturedChecks
from msdda_fast.batching.limits import Limits
from msdda_fast.batching.queue import TicketQueue
from msdda_fast.batching.request import ImageRequest
from tests.tiny_model import pipe, tiny  # noqa: F401 - fixtures


class TestLoad:
    def test_arrivals_are_poisson_and_the_same_for_a_seed(self):
        times = load.poisson(50, 100, seed=1)
        assert times == sorted(times) == load.poisson(50, 100, seed=1)
        assert times != load.poisson(50, 100, seed=2) and times[-1] < 100
        assert abs(len(times) - 5000) < 5 * 5000**0.5
        gaps = torch.tensor(times).diff()
        assert abs(gaps.std() / gaps.mean() - 1) < 0.1  # as of exponential gaps

    def test_percentiles_are_values_that_were_seen(self):
        values = [float(i) for i in range(1, 101)]
        assert [load.percentile(values, p) for p in (50, 95, 99, 100)] == [50, 95, 99, 100]
        assert load.percentile([3.0], 99) == 3.0

    @pytest.mark.parametrize(("size", "gap"), [(1, 0.5), (8, 2.0)])
    def test_a_rate_is_told_from_lumps(self, size, gap):
        times = [gap * (k + 1) + i * 1e-3 for k in range(6) for i in range(size)]
        assert load.sustained(times) == pytest.approx(size / gap, rel=0.01)

    def test_a_rate_of_one_batch_or_none_is_a_lower_bound(self):
        assert load.sustained([2.0, 2.001]) == pytest.approx(1.0, rel=0.01)
        assert load.sustained([]) == 0.0

    def test_latency_counts_from_when_a_request_was_due(self):
        """A server that stalls is charged for all who were to come meanwhile."""

        async def serve(reader, writer):
            await reader.readuntil(b"\r\n\r\n")
            time.sleep(0.1)  # stalls everything, the client's clock included
            writer.write(b"HTTP/1.1 429 No\r\nRetry-After: 7\r\n\r\n")
            writer.close()

        async def run():
            server = await asyncio.start_server(serve, "127.0.0.1", 0)
            async with server:
                port = server.sockets[0].getsockname()[1]
                return await load._offer(port, [0.0, 0.01, 0.02], [{}] * 3, end=5)

        answers = asyncio.run(run())
        assert [answer.status for answer in answers] == [429] * 3
        assert answers[0].headers["retry-after"] == "7"
        assert max(answer.latency_s for answer in answers) > 0.25

    def test_what_is_not_answered_is_lost(self):
        answers = [load.Answer(0, 1, 200), load.Answer(0, 3, 200), load.Answer(1, 1, 429)]
        found = load.summary([*answers, load.Answer(2, 9, 0)])
        assert (found["offered"], found["completed"]) == (4, 2)
        assert (found["refused"], found["lost"]) == (1, 1)
        assert (found["p50_s"], found["p99_s"]) == (1.0, 3.0)
        assert "p50_s" not in load.summary([load.Answer(0, 9, 0)])


def test_requests_are_the_same_for_all_arms_and_have_few_weights():
    bodies = serving.requests(300, ["a", "b", "c"], 5, seed=3)
    assert bodies == serving.requests(300, ["a", "b", "c"], 5, seed=3)
    assert len({str(body["weights"]) for body in bodies}) == 5
    assert len({body["seed"] for body in bodies}) == 300
    assert all(sum(body["weights"].values()) == pytest.approx(1) for body in bodies)


@pytest.mark.parametrize(
    "arguments",
    [["--max-batch", "1"], ["--queue-limit", "4"], ["--minutes", "0"], ["--rounds", "-1"]],
    ids=" ".join,
)
def test_arguments_that_cannot_be_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        serving.parse(arguments)
    assert arguments[0] in capsys.readouterr().err


def test_quick_changes_what_was_not_given():
    quick = serving.parse(["--quick", "--steps", "7"])
    assert (quick.minutes, quick.rounds, quick.steps) == (1.0, 1, 7)
    full = serving.parse([])
    assert (full.minutes, full.rounds, full.steps) == (10.0, 2, 25)


def test_occupancy_is_of_the_batches_between():
    before = {"msdda_batch_size_sum": 10, "msdda_batch_size_count": 5}
    after = {"msdda_batch_size_sum": 26, "msdda_batch_size_count": 7}
    assert occupancy(before, after) == 8 and occupancy(before, before) == 0


@pytest.mark.parametrize(
    ("kind", "expected"), [(TicketQueue, [0, 1, 2, 3]), (OneWeightQueue, [0, 2])]
)
def test_one_weight_per_batch_takes_the_oldest_and_its_equals(pipe, kind, expected):  # noqa: F811
    limits = Limits.check(
        max_batch=4, max_wait_ms=0, queue_limit=9, client_limit=9, max_pixels=2**10, max_cost=2**20,
        batch_sizes=None,
    )  # fmt: skip
    line = kind(limits)
    weights = [[0.3, 0.7], [0.5, 0.5], [0.3, 0.7], [0.2, 0.8]]
    admission = Admission(lambda request: CapturedChecks(pipe, limits))
    tickets = [
        admission.tickets(ImageRequest("a dog", weights=w, num_inference_steps=2, seed=i))[0]
        for i, w in enumerate(weights)
    ]
    line.put(tickets)
    assert [ticket.seed for ticket in line.take().batch] == expected


def test_the_line_on_what_was_before_says_what_was_measured(tmp_path, monkeypatch):
    record = {
        "when": "2026-01-02T03:04:05", "machine": "m", "cores": 2, "threads": 2, "torch": "t",
        "commit": "c", "before": "b", "steps": 25, "rounds": 3, "ratios": [0.9, 1.1, 1.04],
        "ratio": 1.04, "per_s": {"before": 2.0, "now": 2.08}, "burst": 16, "model": "e",
        "processor_s": {"before": 0.5, "now": 0.48}, "levels_apart": 0, "noisy": False,
    }  # fmt: skip
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    assert before_table() == ""
    (tmp_path / "serving_before.jsonl").write_text("{}\n" + json.dumps(record) + "\n")
    text = before_table()
    assert "2.00 images/s and 0.50 processor seconds per image at commit b, 2.08 and" in text
    assert "1.04x, the median of 3 rounds from 0.90x to 1.10x" in text and "noisy" not in text


def test_the_table_says_what_was_measured(tmp_path):
    shared = {
        "when": "2026-01-02T03:04:05", "machine": "m", "cores": 2, "threads": 2, "torch": "t",
        "commit": "c", "model": "e", "steps": 25, "weights": 11, "max_batch": 8, "rounds": 2,
        "queue_limit": 32, "is_quick": False, "noisy": True,
    }  # fmt: skip
    records = [shared | {"kind": "batch", "batch": 1, "image_ms": 600.0}]
    for arm, throughput in (("off", 2.0), ("mixed", 3.5), ("one weight", 2.2)):
        for rate, offered in (("overload", 8.0), ("0.5 off", 1.0)):
            records.append(shared | {
                "kind": "load", "arm": arm, "rate": rate, "offered_per_s": offered,
                "throughput_per_s": throughput, "occupancy": 1.0, "completed": 98, "offered": 100,
                "refused": 2, "lost": 0, "p50_s": 0.6, "p95_s": 1.2, "p99_s": 1.54,
                "client_cores": 0.02, "foreign_cores": 0.3,
            })  # fmt: skip
    table = serving_output.table(records)
    assert "| mixed weights | 3.50 | 1.75x | 1.0 | 0.6 / 1.2 / 1.5, 2% refused |" in table
    assert "Noisy: other processes took up to 0.3 cores" in table and "600 ms" in table
    serving_output.draw(records, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 1000
    assert serving_output.table(serving_output.last_run(tmp_path / "none.jsonl")) == ""
