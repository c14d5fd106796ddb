# SPDX-License-Identifier: Apache-2.0
"""The table of few steps."""

from benchmarks import few_steps_output
from benchmarks.tables import results


def few_steps_table() -> str:
    """One row per sampler and preference, with and without an accelerator."""
    return few_steps_output.table(results.RESULTS / "few_steps.jsonl")
