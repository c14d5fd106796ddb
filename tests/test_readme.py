# SPDX-License-Identifier: Apache-2.0
"""Every block of Python or shell in README, docs/ and examples/ runs, or says why not."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "examples/README.md"]
BLOCK = re.compile(
    r"(?:<!-- not-run: (?P<reason>[^>]+) -->\n)?```(?P<language>\w+)\n(?P<body>.*?)```", re.S
)
BLOCKS = [
    match.groupdict() | {"page": str(page.relative_to(ROOT))}
    for page in PAGES
    for match in BLOCK.finditer(page.read_text())
]
#: The same block on two pages runs once.
RUN = {block["body"]: block for block in reversed(BLOCKS) if block["reason"] is None}
RUN = list(reversed(RUN.values()))


def commands(block):
    if block["language"] == "python":
        return [[sys.executable, "-W", "error::DeprecationWarning:__main__", "-c", block["body"]]]
    lines = (line.split("#")[0].strip() for line in block["body"].splitlines())
    return [["bash", "-c", line] for line in lines if line]


def rows():
    """`make test` runs the first block of Python: a program takes many seconds."""
    first = next(n for n, block in enumerate(RUN) if block["language"] == "python")
    for n, block in enumerate(RUN):
        marks = () if n == first else pytest.mark.full
        yield pytest.param(block, id=f"{block['page']}-{n}", marks=marks)


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
    skipped = [block["reason"] for block in BLOCKS if block["reason"]]
    counts = {reason: skipped.count(reason) for reason in skipped}
    assert counts == {
        "this page is tested where the package is installed already": 1,
        "they install a fresh environment, and `make test` runs this very page": 1,
        "needs Stable Diffusion weights from a hub, and two adapters of yours": 2,
        "needs Stable Diffusion 3.5 from a hub, and adapters of yours": 1,
        "needs several processes": 1,
        "needs weights from a hub, and adapters of yours": 6,
        "needs SDXL from a hub, and adapters of yours": 1,
        "needs a diffusers pipeline of yours, with two adapters loaded": 1,
        "needs the model above, and a process per part": 1,
        "needs ComfyUI": 1,
        "needs a Ray cluster": 1,
        "needs the server above": 2,
        "runs until it is stopped": 1,
        "takes minutes": 3,
        "takes hours": 1,
        "rewrites committed results": 1,
    }
    assert {block["language"] for block in BLOCKS} == {"python", "sh"}


def test_the_readme_is_short_and_its_first_code_fits_in_eight_lines():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
    assert RUN[0]["page"] == "README.md" and RUN[0]["language"] == "python"
    assert len([line for line in RUN[0]["body"].splitlines() if line.strip()]) <= 8


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, section = target.partition("#")
        if path.startswith("https://github.com/msdda-fast/msdda_fast/blob/main/"):
            path = str(ROOT / path.split("/blob/main/")[1])
        elif "://" in path:
            continue
        found = page if not path else (page.parent / path)
        assert found.exists(), target
        if section:
            heads = re.findall(r"^#+ (.+)$", found.read_text(), re.M)
            slugs = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
            assert section in slugs, target
