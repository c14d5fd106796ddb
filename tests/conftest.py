# SPDX-License-Identifier: Apache-2.0
"""Triton interpreted where there is no GPU, one thread for torch and OpenMP, and no hub to ask.

Tensors of tests are small: threads cost them more than they bring, and each test process and each
program that a test starts would take as many as there are cores. What threads must not change is
tested with as many as that test asks for.

The variables are read when torch and the hub client are imported and when a kernel is defined, and
diffusers imports them all: they are set here, before anything else is imported.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from tests.covering import mark_rest
from tests.second_looks import SECOND_LOOKS

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark_rest(items)
    for item in items:
        if item.nodeid.startswith(tuple(SECOND_LOOKS)):
            item.add_marker("full")


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory):
    """`made_once(name, make)`: the folder that `make(folder)` filled, once for all workers."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    def find(name: str, make: Callable[[Path], object]) -> Path:
        folder, partial = root / name, root / f"{name}.partial"
        with FileLock(root / f"{name}.lock"):
            if not folder.exists():
                partial.mkdir()
                make(partial)
                partial.rename(folder)
        return folder

    return find
