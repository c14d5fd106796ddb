# SPDX-License-Identifier: Apache-2.0
"""The checkout stays small, and the same facts are not written down twice."""

import importlib.metadata
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

import msdda_fast
from benchmarks import report
from msdda_fast import errors

ROOT = Path(__file__).parent.parent


def tracked(*folders):
    listed = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "-z", "--", *folders], capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def test_results_and_pages_are_small():
    files = tracked("benchmarks/results", "docs", "examples")
    assert files
    large = {str(path.relative_to(ROOT)): path.stat().st_size for path in files}
    assert {name: size for name, size in large.items() if size > 500_000} == {}


def test_the_version_is_written_down_once():
    version = msdda_fast.__version__
    assert importlib.metadata.version("msdda-fast") == version
    for name in ("pyproject.toml", "setup.py", "CITATION.cff", "docs/conf.py"):
        assert version not in (ROOT / name).read_text(), name
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_oldest_versions_are_those_of_the_lower_bounds():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    wanted = [
        *project["build-system"]["requires"],
        *project["project"]["dependencies"],
        *(item for name in ("triton", "train", "eval", "serve") for item in extras[name]),
    ]
    lines = (ROOT / "constraints-oldest.txt").read_text().splitlines()
    oldest = dict(line.partition(" ")[0].split("==") for line in lines if "==" in line)
    for item in wanted:
        name, bound = re.match(r"([\w-]+)>=([\d.]+)", item).groups()
        assert f"{oldest[name]}.".startswith(f"{bound}."), item


def test_the_pages_show_what_the_committed_results_say():
    pages = [page.read_text() for page in report.PAGES]
    for name, table in report.TABLES.items():
        block = f"<!-- bench:{name}:begin -->\n{table()}\n<!-- bench:{name}:end -->"
        assert sum(block in page for page in pages) == 1, f"run benchmarks/report.py: {name}"


def test_the_reference_has_every_public_name():
    assert set(errors.__all__) <= set(msdda_fast.__all__)
    listed = re.findall(
        r"auto(?:class|function):: (\w+)$", (ROOT / "docs/api.md").read_text(), re.M
    )
    assert set(msdda_fast.__all__) == {*listed, *errors.__all__}
