# SPDX-License-Identifier: Apache-2.0
"""A process started by `torchrun`: its rank, its device, and joining the others."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from msdda_fast.engine.parallel import ObjectiveParallel

__all__ = ["default_device", "join", "leave", "own_folder", "rank", "shared_seed", "size"]

#: Seconds to wait for a rank that is there and silent; it may still be loading the model. One that
#: is gone is noticed at once.
TIMEOUT = 600.0


def rank() -> int:
    """Return the rank of this process, 0 when alone; rank 0 writes files and reports for all."""
    return int(os.environ["RANK"]) if size() > 1 else 0


def default_device() -> str:
    """Return this rank's GPU on its machine, or the CPU if there is no GPU."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def join(device: torch.device) -> ObjectiveParallel | None:
    """Join the other processes: over NCCL if `device` is a GPU, else over gloo.

    Returns: None when this process is alone.

    Raises:
        RankLost: Another process did not join in time.
    """
    if size() == 1:
        return None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=TIMEOUT))
    return ObjectiveParallel(timeout=TIMEOUT)


def leave() -> None:
    """Undo `join` if it was called."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def shared_seed(parallel: ObjectiveParallel | None) -> int:
    """Draw a random seed, the same on every rank."""
    seed = random.randrange(2**32)
    return seed if parallel is None else int(parallel.from_first(torch.tensor(seed)))


@contextmanager
def own_folder(folder: Path, parallel: ObjectiveParallel | None) -> Iterator[Path]:
    """Yield the folder itself on rank 0, and a temporary copy on every other rank.

    So all ranks continue from the same files, and only rank 0 changes them.
    """
    if rank() == 0:
        if parallel is not None:
            parallel.from_first(torch.zeros(()))  # until the others have their copies
        yield folder
        return
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / folder.name
        if folder.exists():
            shutil.copytree(folder, copy)
        if parallel is not None:
            parallel.from_first(torch.zeros(()))
        yield copy


def size() -> int:
    """Return the number of processes, 1 when alone."""
    return int(os.environ.get("WORLD_SIZE", "1"))
