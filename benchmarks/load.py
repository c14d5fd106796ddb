# SPDX-License-Identifier: Apache-2.0
"""Open-loop load: requests are sent at times drawn beforehand, whether or not others are answered.

Latency counts from the scheduled time, so a client or a server that falls behind cannot hide it.
One coroutine per request on raw sockets leaves the cores to the server.
"""

import asyncio
import json
import math
import random
import re
import statistics
import time
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

__all__ = [
    "Answer",
    "Reply",
    "ask",
    "offer",
    "percentile",
    "poisson",
    "scrape",
    "summary",
    "sustained",
]

#: Answers closer than this, in seconds, came out of one batch.
LUMP_S = 0.03


class Reply(NamedTuple):
    """A response to a POST; header names are in lower case."""

    status: int
    headers: Mapping[str, str]
    content: bytes


@dataclass(frozen=True)
class Answer:
    """The outcome of a request; times are seconds from the start of the load.

    `status` 0 means no answer: the connection broke, or the load ended first.
    """

    sent_at: float
    done_at: float
    status: int
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def latency_s(self) -> float:
        return self.done_at - self.sent_at


def poisson(rate: float, seconds: float, seed: int) -> list[float]:
    """Return the times in [0, seconds) of a Poisson process, the same for the same seed."""
    draw, now, times = random.Random(seed), 0.0, []
    while (now := now + draw.expovariate(rate)) < seconds:
        times.append(now)
    return times


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the smallest value that `percent` of all values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def sustained(times: Sequence[float]) -> float:
    """Return the answers per second of a server that is never idle, from their times in seconds.

    Answers come in lumps, one per batch. The first batch began at an unknown time, so the clock
    starts with its answers, and they do not count.
    """
    ordered = sorted(times)
    first = 1
    for before, after in pairwise(ordered):
        if after - before > LUMP_S:
            break
        first += 1
    if first >= len(ordered):  # one batch: at least this many
        return len(ordered) / ordered[-1] if ordered else 0.0
    return (len(ordered) - first) / (ordered[-1] - ordered[first - 1])


async def ask(port: int, body: dict) -> Reply:
    """POST a body for images and return the response."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        text = json.dumps(body).encode()
        head = (
            "POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
        )
        writer.write(head.encode() + text)
        answer = await reader.read()
    finally:
        writer.close()
    head, _, content = answer.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    return Reply(int(first.split(" ", 2)[1]), headers, content)


def offer(port: int, times: Sequence[float], bodies: Sequence[dict], *, end: float) -> list[Answer]:
    """Send a body at each of the times; requests without an answer at `end` are abandoned."""
    return asyncio.run(_offer(port, times, bodies, end))


async def _offer(port, times, bodies, end):
    start = time.perf_counter()
    tasks = [
        asyncio.create_task(_send(port, start, at, body))
        for at, body in zip(times, bodies, strict=True)
    ]
    if tasks:
        await asyncio.wait(tasks, timeout=end)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return [
        Answer(at, end, 0) if task.cancelled() else task.result()
        for at, task in zip(times, tasks, strict=True)
    ]


async def _send(port, start, at, body):
    await asyncio.sleep(max(0.0, start + at - time.perf_counter()))
    try:
        reply = await ask(port, body)
    except (OSError, IndexError, ValueError):
        return Answer(at, time.perf_counter() - start, 0)
    return Answer(at, time.perf_counter() - start, reply.status, reply.headers)


def scrape(port: int) -> dict[str, float]:
    """Return the server's metrics without buckets, by name with labels, if any."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
        text = answer.read().decode()
    found = re.findall(r"^(msdda_[^ ]+) (\S+)$", text, re.M)
    return {name: float(value) for name, value in found if "_bucket" not in name}


def summary(answers: Sequence[Answer]) -> dict[str, float]:
    """Return the latency percentiles of answers with an image, in seconds, and the counts."""
    drawn = [answer.latency_s for answer in answers if answer.status == 200]
    counts = {
        "offered": len(answers),
        "completed": len(drawn),
        "refused": sum(answer.status == 429 for answer in answers),
    }
    counts["lost"] = counts["offered"] - counts["completed"] - counts["refused"]
    if drawn:
        for percent in (50, 95, 99):
            counts[f"p{percent}_s"] = round(percentile(drawn, percent), 3)
        counts["mean_s"] = round(statistics.mean(drawn), 3)
    return counts
