# SPDX-License-Identifier: Apache-2.0
"""Every kernel test runs on each backend that this machine has, Triton through its interpreter."""

import pytest
import torch

from msdda_fast.kernels import registry

NAMES = ("eager", "native", "triton")


def pytest_itemcollected(item: pytest.Function) -> None:
    """Skip here what is known before a test runs: a thinned sweep does not count on such rows."""
    arguments = item.callspec.params if hasattr(item, "callspec") else {}
    chosen = [arguments.get(name) for name in ("backend", "fast_backend")]
    if "triton" in chosen and any(argument is torch.bfloat16 for argument in arguments.values()):
        reason = "the interpreter truncates to bfloat16; test_on_gpu.py covers it"
        item.add_marker(pytest.mark.skip(reason=reason))


def _available(name: str) -> str:
    if not registry.available(name):
        pytest.skip(registry.explain()[name])
    return name


@pytest.fixture(params=NAMES)
def backend(request: pytest.FixtureRequest) -> str:
    return _available(request.param)


@pytest.fixture(params=NAMES[1:])
def fast_backend(request: pytest.FixtureRequest) -> str:
    """Those that are compared with eager."""
    return _available(request.param)


@pytest.fixture(params=NAMES[:2])
def quick_backend(request: pytest.FixtureRequest) -> str:
    """Those that draw a million numbers in no time; the others have their bits."""
    return _available(request.param)


@pytest.fixture
def native() -> str:
    if not registry.available("native"):
        pytest.skip(registry.explain()["native"])
    return "native"
