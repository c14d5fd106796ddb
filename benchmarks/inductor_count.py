# SPDX-License-Identifier: Apache-2.0
"""Count what Inductor makes of a step: kernels that it generates, and calls of libraries.

    python benchmarks/inductor_count.py

Without a GPU its scheduler runs for the CPU, which fuses what a GPU's does into the same loops but
for details; nothing is compiled. Calls of libraries count as in `kernel_count`. Adds an entry to
results/kernel_count.json; takes minutes.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # when run as a script

import torch
from torch._inductor import scheduler

from benchmarks.kernel_count import STEPS, advance, network
from benchmarks.tables.results import RESULTS

#: The step that Inductor gets: in plain torch.
TITLE = "M = 2, merged"
#: Calls that are not one kernel: a batched product copies its bias first.
CALLS = {"baddbmm": 2}


class _Scheduled(Exception):
    """What Inductor was about to generate."""


def scheduled(run: Callable[[], object]) -> Counter[str]:
    """Return how many nodes of each kind are left after fusion.

    Kinds are "generated" for kernels of its own, and the names of operators that it calls.
    """
    found: Counter[str] = Counter()

    def look(self: scheduler.Scheduler) -> None:
        for node in self.nodes:
            if isinstance(node, scheduler.NopKernelSchedulerNode):
                continue
            if isinstance(node, scheduler.ExternKernelSchedulerNode):
                name = getattr(node.node, "python_kernel_name", None)
                if name is not None:  # None: one of several results of a call
                    found[name.removesuffix(".default").rpartition(".")[2]] += 1
            else:
                found["generated"] += 1
        raise _Scheduled

    torch._dynamo.reset()
    with mock.patch.object(scheduler.Scheduler, "codegen", look), torch.no_grad():
        try:
            torch.compile(run, fullgraph=True, dynamic=False)()
        except Exception as error:
            if not found:
                raise RuntimeError("Inductor did not come to its scheduler") from error
    return found


def main() -> None:
    number, options = STEPS[TITLE]
    found = scheduled(advance(network(2)[:number], options))
    kernels = sum(CALLS.get(name, 1) * calls for name, calls in found.items())
    path = RESULTS / "kernel_count.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    results["inductor"] = {"step": TITLE, "kernels": kernels, "nodes": dict(found)}
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(results["inductor"])


if __name__ == "__main__":
    main()
