# SPDX-License-Identifier: Apache-2.0
"""Where to find the data that ships with the package."""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).parent
#: Folders of the models inside the package, by id.
SHIPPED = {"msdda-fast/emoji": "emoji", "msdda-fast/emoji-flow": "emoji-flow"}


def is_shipped(name: str) -> bool:
    """Return whether `name` is the id of a model that ships inside the package."""
    return name in SHIPPED


def resolve(name: str) -> Path:
    """Return the folder of a shipped model.

    Raises:
        FileNotFoundError: No shipped model has that id, or its files are not installed.
    """
    if name not in SHIPPED:
        raise FileNotFoundError(f"no shipped model {name!r}; shipped: {', '.join(SHIPPED)}")
    folder = ASSETS / SHIPPED[name]
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"shipped model {name!r} is incomplete: {folder} has no model_index.json"
        )
    return folder
