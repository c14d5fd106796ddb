# SPDX-License-Identifier: Apache-2.0
"""Every Python block and shell line of the README runs, but for those that say why not."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
BLOCK = re.compile(
    r"(?:<!-- not-run: (?P<reason>[^>]+) -->\n)?```(?P<language>\w+)\n(?P<body>.*?)```", re.S
)
BLOCKS = [match.groupdict() for match in BLOCK.finditer(README.read_text())]
RUN = [block for block in BLOCKS if block["reason"] is None]


def commands(block):
    if block["language"] == "python":
        return [[sys.executable, "-W", "error::DeprecationWarning:__main__", "-c", block["body"]]]
    lines = (line.split("#")[0].strip() for line in block["body"].splitlines())
    return [["bash", "-c", line] for line in lines if line]


def rows():
    """`make test` runs the first block of each language: a program takes many seconds."""
    first = {block["language"]: n for n, block in reversed([*enumerate(RUN)])}
    for n, block in enumerate(RUN):
        marks = () if n in first.values() else pytest.mark.full
        yield pytest.param(block, id=f"{block['language']}-{n}", marks=marks)


@pytest.mark.parametrize("block", [*rows()])
def test_block_runs(block, tmp_path):
    scripts = str(Path(sys.executable).parent)  # where `msdda-fast` was installed
    environment = os.environ | {"PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
    for command in commands(block):
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command[-1]}\n{done.stdout}\n{done.stderr}"


def test_only_the_named_blocks_are_not_run():
    skipped = {block["reason"].split(":")[0] for block in BLOCKS if block["reason"]}
    assert skipped == {
        "they install a fresh environment, and `make test` runs this very page",
        "needs Stable Diffusion weights from a hub, and two adapters of yours",
        "needs ComfyUI",
        "needs a Ray cluster",
        "needs the server above",
        "runs until it is stopped",
        "takes hours",
    }
    assert {block["language"] for block in BLOCKS} == {"python", "sh"}


def test_the_first_code_fits_in_eight_lines_of_code():
    body = RUN[0]["body"]
    assert len([line for line in body.splitlines() if line.strip()]) <= 8
