# SPDX-License-Identifier: Apache-2.0
"""The checkout stays small, and the same facts are not written down twice."""

import subprocess
from pathlib import Path

import pytest

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
