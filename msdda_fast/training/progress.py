# SPDX-License-Identifier: Apache-2.0
"""The progress bar of a training run, on stderr."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def training_bar(title: str, *, enabled: bool) -> Progress:
    """Return a bar with the time left and the field `status`, which its tasks must set."""
    return Progress(
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
        console=Console(stderr=True),
        disable=not enabled,
    )
