# SPDX-License-Identifier: Apache-2.0
"""Every kernel test runs on each backend that this machine has."""

import pytest

from msdda_fast.kernels import registry


@pytest.fixture(params=["eager", "native"])
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if not registry.available(name):
        pytest.skip(registry.explain()[name])
    return name


@pytest.fixture
def native() -> str:
    """Tests that compare native with eager."""
    if not registry.available("native"):
        pytest.skip(registry.explain()["native"])
    return "native"
