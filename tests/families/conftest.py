# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the families, and warnings of diffusers about itself."""

import pytest

from tests.tiny_model import tiny  # noqa: F401 - a fixture

#: diffusers' own, of its own parts.
_THEIRS = (
    "ignore::DeprecationWarning:diffusers",
    "ignore:.*FluxPosEmbed:FutureWarning",
)


def pytest_itemcollected(item: pytest.Item) -> None:
    for warning in _THEIRS:
        item.add_marker(pytest.mark.filterwarnings(warning))
