# SPDX-License-Identifier: Apache-2.0
"""One server at one request rate: what was offered and answered, and the CPU time of others."""

import os
import statistics
import time
from pathlib import Path

from benchmarks import load

__all__ = ["Cell"]


COUNTS = {
    "images": "msdda_batch_size_sum",
    "batches": "msdda_batch_size_count",
    "rows": "msdda_rows_total",
}


class Cell:
    """One arm at one rate, over all rounds."""

    def __init__(self, arm: str, rate: str) -> None:
        self.arm, self.rate = arm, rate
        self.offered: list[float] = []
        self.answers: list[load.Answer] = []
        self.throughputs: list[float] = []
        self.sums = dict.fromkeys(
            ("images", "batches", "rows", "seconds", "client", "foreign"), 0.0
        )

    def run(self, server, rate, seconds, settle, bodies, seed, *, is_overload) -> None:
        """Offer `rate` for `seconds`; requests due in the first `settle` seconds do not count."""
        pids = [server.process.pid, os.getpid()]
        before, (all_before, ours_before) = load.scrape(server.port), busy(pids)
        client, start = time.process_time(), time.perf_counter()
        times = load.poisson(rate, seconds, seed)
        end = seconds if is_overload else seconds + 120
        answers = load.offer(server.port, times, bodies[: len(times)], end=end)
        spent = time.perf_counter() - start
        after, (all_after, ours_after) = load.scrape(server.port), busy(pids)
        for name, key in COUNTS.items():
            self.sums[name] += after[key] - before[key]
        self.sums["seconds"] += spent
        self.sums["client"] += time.process_time() - client
        self.sums["foreign"] += max(0.0, all_after - all_before - (ours_after - ours_before))
        self.offered.append(rate)
        if is_overload:
            done = [answer.done_at for answer in answers if answer.status == 200]
            self.throughputs.append(load.sustained(done))
            self.answers += [answer for answer in answers if answer.status]  # others were cut off
            server.wait_idle()
        else:
            counted = [answer for answer in answers if answer.sent_at >= settle]
            done = sum(answer.status == 200 for answer in counted)
            last = max((answer.done_at for answer in counted), default=seconds)
            self.throughputs.append(done / (max(last, seconds) - settle))
            self.answers += counted

    def record(self) -> dict:
        s = self.sums
        return {
            "kind": "load", "arm": self.arm, "rate": self.rate,
            "offered_per_s": round(statistics.mean(self.offered), 4),
            "throughput_per_s": round(statistics.mean(self.throughputs), 4),
            "throughputs": [round(value, 4) for value in self.throughputs],
            **load.summary(self.answers),
            "occupancy": round(s["images"] / max(1, s["batches"]), 2),
            "padding": round(1 - s["images"] / max(1, s["rows"]), 3),
            "client_cores": round(s["client"] / s["seconds"], 3),
            "foreign_cores": round(s["foreign"] / s["seconds"], 3),
        }  # fmt: skip


def busy(processes: list[int]) -> tuple[float, float]:
    """Return the CPU seconds of the whole machine and of these processes."""
    tick = os.sysconf("SC_CLK_TCK")
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    everything = sum(map(int, fields)) - int(fields[3]) - int(fields[4])  # idle, waiting for disks
    ours = 0
    for process in processes:
        after_name = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        ours += sum(map(int, after_name[11:13]))
    return everything / tick, ours / tick
