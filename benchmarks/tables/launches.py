# SPDX-License-Identifier: Apache-2.0
"""The table of CUDA kernels of a step."""

import json

from benchmarks.tables import results


def kernel_count_table() -> str:
    """One row per way to build a step: its kernels, in all and by what they are for."""
    found = json.loads((results.RESULTS / "kernel_count.json").read_text())
    kinds = list(next(iter(found["steps"].values()))["kinds"])
    rows = [
        f"| {title} | {step['kernels']:,} | "
        + " | ".join(str(step["kinds"][kind]) for kind in kinds)
        + " |"
        for title, step in found["steps"].items()
    ]
    head = f"| step | kernels | {' | '.join(kinds)} |\n|---|---:|" + "---:|" * len(kinds)
    inductor = found["inductor"]
    own = inductor["nodes"]["generated"]
    note = (
        f"Counted, not measured. Inductor would make {inductor['kernels']} of "
        f'"{inductor["step"]}", {own} of them its own, as its scheduler for the CPU has it.'
    )
    return "\n".join([head, *rows, "", note])
