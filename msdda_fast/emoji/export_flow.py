# SPDX-License-Identifier: Apache-2.0
"""Write `msdda-fast/emoji-flow` as it ships: `python -m msdda_fast.emoji.export_flow`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from msdda_fast.assets import ASSETS
from msdda_fast.emoji.align_flow import FLOW_ALIGNMENT, flow_objectives
from msdda_fast.emoji.packaging import add_adapters, add_logs, write_manifest

FLOW = "msdda-fast/emoji-flow"


def export_flow(work: Path, folder: Path) -> None:
    """Copy pipeline, adapters and logs of `train_flow` and `align_flow` into `folder`."""
    shutil.copytree(work / "base", folder, dirs_exist_ok=True)
    adapters = {name: work / f"align-{name}" for name in FLOW_ALIGNMENT}
    add_adapters(folder, adapters, objectives := flow_objectives())
    logs = {f"align-{name}": source / "log.jsonl" for name, source in adapters.items()}
    add_logs(folder, {"flow": work / "flow.jsonl", **logs})
    shutil.copy2(ASSETS / "emoji" / "THIRD_PARTY_NOTICES", folder)
    write_manifest(folder, FLOW, objectives, {})


def main(
    work: Annotated[Path, typer.Option(help="Folder of train_flow.")] = Path("out/flow"),
    assets: Annotated[Path, typer.Option(help="Folder of the finished files.")] = ASSETS,
) -> None:
    """Copy what was trained to where it ships."""
    export_flow(work, assets / "emoji-flow")


if __name__ == "__main__":
    typer.run(main)
