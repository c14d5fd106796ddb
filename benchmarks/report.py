# SPDX-License-Identifier: Apache-2.0
"""Turn committed results into the tables of docs/results.md, and the small one of the README.

    python benchmarks/report.py

Prints the tables of the latest run of each case, and rewrites the blocks of the pages between
`<!-- bench:fused_step:begin -->` and `<!-- bench:fused_step:end -->`, and likewise for the other
names of `TABLES`.
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # when run as a script

from benchmarks.tables import (
    comparisons,
    denoisers,
    families,
    few_steps,
    kernels,
    latency,
    launches,
    modes,
    serving,
)

ROOT = Path(__file__).parent.parent
PAGES = (
    ROOT / "README.md",
    *(
        ROOT / "docs" / f"{page}.md"
        for page in ("results", "merge-or-fuse", "families/index", "guide/few-steps")
    ),
)


def rewrite(name: str, table: str) -> None:
    begin, end = f"<!-- bench:{name}:begin -->", f"<!-- bench:{name}:end -->"
    block = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    for page in PAGES:
        text = page.read_text() if page.exists() else ""
        if block.search(text):
            page.write_text(block.sub(lambda _: f"{begin}\n{table}\n{end}", text))


TABLES = {
    "headline": latency.headline_table,
    "fused_step": kernels.fused_step_table,
    "grouped_lora": kernels.grouped_lora_table,
    "kernel_count": launches.kernel_count_table,
    "latency": latency.latency_table,
    "latency_families": denoisers.latency_families_table,
    "request_path": latency.request_path_table,
    "modes": modes.modes_table,
    "auto_mode": modes.auto_mode_table,
    "compare": comparisons.compare_table,
    "gauge": comparisons.gauge_table,
    "floors": comparisons.floors_table,
    "compare_flow": comparisons.compare_flow_table,
    "compare_emoji_flow": comparisons.compare_emoji_flow_table,
    "two_networks": comparisons.two_networks_table,
    "serving": serving.serving_table,
    "few_steps": few_steps.few_steps_table,
    "serving_before": serving.before_table,
    "family_takes": families.takes_table,
    "family_memory": families.memory_table,
}

if __name__ == "__main__":
    for bench, make in TABLES.items():
        table = make()
        print(table, end="\n\n")
        rewrite(bench, table)
