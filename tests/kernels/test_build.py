# SPDX-License-Identifier: Apache-2.0
"""The extension builds from any folder, without OpenMP too; without a compiler there is none."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which(os.environ.get("CXX") or "c++")

pytestmark = pytest.mark.slow


def build(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Build a copy of the sources from another working directory; the path has a space."""
    source = tmp_path / "a clone"
    shutil.copytree(ROOT / "csrc", source / "csrc")
    shutil.copy(ROOT / "setup.py", source)
    command = [sys.executable, source / "setup.py", "-q", "build_ext"]
    command += ["--build-lib", tmp_path / "lib", "--build-temp", tmp_path / "temp"]
    return subprocess.run(
        command, cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True
    )


def built(tmp_path: Path) -> list[Path]:
    return list(tmp_path.glob("lib/msdda_fast/_C*"))


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_a_compiler_without_openmp_is_enough(tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text(
        f'#!/bin/sh\nfor a in "$@"; do [ "$a" = -fopenmp ] && exit 1; done\nexec {COMPILER} "$@"\n'
    )
    compiler.chmod(0o755)
    done = build(tmp_path, CXX=f"'{compiler}'")
    assert done.returncode == 0, done.stderr
    assert len(built(tmp_path)) == 1
    assert "pure Python" not in done.stderr
    check = f"import sys; sys.path[:0] = [{str(built(tmp_path)[0].parent)!r}]; import _C; print(_C)"
    loaded = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert str(tmp_path) in loaded.stdout, loaded.stderr


def test_without_a_compiler_the_build_warns_once_and_succeeds(tmp_path):
    done = build(tmp_path, CXX="/bin/false")
    assert done.returncode == 0, done.stderr
    assert built(tmp_path) == []
    assert done.stderr.count("UserWarning: msdda_fast: no compiled kernels") == 1


def test_asking_for_cuda_kernels_that_are_not_there_fails_loudly(tmp_path):
    done = build(tmp_path, MSDDA_BUILD_CUDA="1")
    assert done.returncode != 0
    assert "MSDDA_BUILD_CUDA=1" in done.stderr
