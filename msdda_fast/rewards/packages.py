# SPDX-License-Identifier: Apache-2.0
"""Packages and checkpoints of rewards: loaded on first use, with a clear error if missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType

from msdda_fast.errors import RewardUnavailable


def require(reward: str, module: str, install: str) -> ModuleType:
    """Import the package of a reward.

    Args:
        reward: Name of the reward, for the message.
        module: Dotted name to import.
        install: The command that installs it.

    Raises:
        RewardUnavailable: The package, or something that it imports, cannot be imported.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise RewardUnavailable(
            f"reward {reward!r} needs the package {module!r} ({error}); install: {install}"
        ) from error


@contextmanager
def checkpoint(reward: str, source: str) -> Iterator[None]:
    """Within the context, raise `RewardUnavailable` if a checkpoint cannot be read or fetched.

    Args:
        reward: Name of the reward, for the message.
        source: Hub repository, folder or file of the checkpoint.
    """
    try:
        yield
    except OSError as error:
        raise RewardUnavailable(
            f"reward {reward!r} needs the checkpoint {source!r}, which is missing and cannot be "
            f"downloaded ({error}); to get it: hf download {source}"
        ) from error
