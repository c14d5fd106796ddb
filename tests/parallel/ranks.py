# SPDX-License-Identifier: Apache-2.0
"""Run a function on several ranks: processes of one gloo group on this machine."""

import multiprocessing
import tempfile
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from msdda_fast.engine.parallel import ObjectiveParallel

#: A server imports once what every rank needs, and ranks are forks of it.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["torch.distributed", "msdda_fast.pipelines.stable_diffusion.pipeline"]
)

PATIENCE = 180.0  # seconds until a test calls it a hang, on a machine that is busy with others


@dataclass
class Outcome:
    """What one rank returned or raised, and how long it took; `died` says that it told nothing."""

    value: Any = None
    error: BaseException | None = None
    seconds: float = 0.0
    died: bool = False


def run_ranks(size, function, *arguments, timeout=60.0, backend="gloo", **options) -> list[Outcome]:
    """Call `function(parallel, *arguments)` on `size` ranks; raises if a rank never ends."""
    options["timeout"] = timeout
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(size):
            ours, theirs = _context.Pipe(duplex=False)
            meeting = dict(
                backend=backend,
                init_method=f"file://{folder}/meet",
                rank=rank,
                world_size=size,
            )
            process = _context.Process(
                target=_rank, args=(theirs, meeting, options, function, arguments)
            )
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        try:
            return [_receive(pipe) for pipe in pipes]
        finally:
            for process in processes:
                process.kill()  # those that a test lets hang
                process.join()


def values(outcomes: list[Outcome]) -> list[Any]:
    """What the ranks returned; an error of theirs is raised here."""
    for outcome in outcomes:
        if outcome.error is not None:
            raise outcome.error
        assert not outcome.died
    return [outcome.value for outcome in outcomes]


def _receive(pipe: Connection) -> Outcome:
    assert pipe.poll(PATIENCE), "a rank hangs"
    try:
        return pipe.recv()
    except EOFError:
        return Outcome(died=True)


def _rank(pipe, meeting, options, function, arguments) -> None:
    torch.set_num_threads(1)
    if meeting["backend"] == "nccl":
        torch.cuda.set_device(meeting["rank"])
    dist.init_process_group(**meeting)
    parallel = ObjectiveParallel(**options)
    start = time.monotonic()
    try:
        outcome = Outcome(function(parallel, *arguments))
    except BaseException as error:
        error.add_note("".join(traceback.format_exception(error)))
        outcome = Outcome(error=error.with_traceback(None))
    outcome.seconds = time.monotonic() - start
    pipe.send(outcome)
    pipe.close()
    # a rank that is done keeps its sockets, so that only `parallel` can tell the others something
    time.sleep(PATIENCE)
