# SPDX-License-Identifier: Apache-2.0
"""Where results lie, and how their numbers are written."""

from pathlib import Path

RESULTS = Path(__file__).parent.parent / "results"


def duration(microseconds: float) -> str:
    if microseconds < 1000:
        return f"{microseconds:.0f} µs"
    return f"{microseconds / 1000:.{1 if microseconds < 100_000 else 0}f} ms"


def threads(record: dict) -> str:
    count = record["threads"]
    return f"{count} thread" if count == 1 else f"{count} threads"


def spread(interval: list[float], sign: str = "-") -> str:
    """Return a mean and its interval, to three digits."""
    mean, low, high = (f"{value:{sign}.3g}" for value in interval)
    return f"{mean} ({low}, {high})"
