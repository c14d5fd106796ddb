# SPDX-License-Identifier: Apache-2.0
"""Packages and checkpoints of rewards, found on first use or named when they are missing."""

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
        RewardUnavailable: it, or something that it imports, cannot be imported.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise RewardUnavailable(
            f"reward {reward!r} needs the package {module!r} ({error}); install: {install}"
        ) from error


@contextmanager
def checkpoint(reward: str, source: str) -> Iterator[None]:
    """Within the context, a checkpoint that cannot be read or fetched is `RewardUnavailable`.

    Args:
        reward: Name of the reward, for the message.
        source: Hub repository, folder or file of the checkpoint.
    """
    try:
        yield
    except OSError as error:
        raise RewardUnavailable(
            f"reward {reward!r} needs the checkpoint {source!r}, which is neither here nor can be "
            f"fetched ({error}); fetch: hf download {source}"
        ) from error
