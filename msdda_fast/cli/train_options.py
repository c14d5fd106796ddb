# SPDX-License-Identifier: Apache-2.0
"""What the commands of `msdda-fast train` share: options, and what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from msdda_fast.cli.session import err, out

OutOption = Annotated[
    Path, typer.Option("--out", "-o", help="Folder of the run; the same command continues it.")
]
EtaOption = Annotated[
    float, typer.Option(help="DDIM stochasticity, in (0, 1]; use the same value when sampling.")
]
PromptsOption = Annotated[
    Path | None,
    typer.Option(
        help="Text file with one prompt per line.", show_default="the shipped model's own"
    ),
]
CheckpointingOption = Annotated[bool, typer.Option(help="Trade time for memory, for large models.")]
RankOption = Annotated[int, typer.Option(min=1, help="Rank of the adapter.")]
SeedOption = Annotated[int, typer.Option(help="Seed of everything random.")]
PRESET = "the preset's"


def announce(what: str, folder: Path) -> None:
    """Say what is trained and where to watch it."""
    err.print(f"Training {what}; watch {folder / 'curves.png'}", soft_wrap=True)


def finish(file: Path, name: str, eta: float) -> None:
    """Print the adapter's file, and how to use it."""
    out.print(f"{file}", soft_wrap=True)
    use = f"Use it: msdda-fast generate ... --objective {name}={file.parent}:{eta:g}"
    err.print(use, style="dim", soft_wrap=True)
