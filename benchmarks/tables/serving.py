# SPDX-License-Identifier: Apache-2.0
"""The table of servers."""

from benchmarks import serving_output
from benchmarks.tables import results


def serving_table() -> str:
    """One row per server: throughput, and latencies at common rates."""
    return serving_output.table(serving_output.last_run(results.RESULTS / "serving.jsonl"))
