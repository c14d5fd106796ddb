# SPDX-License-Identifier: Apache-2.0
"""The extension builds from any folder, without OpenMP too; without a compiler there is none.

MSDDA_BUILD_CUDA decides about the GPU kernels.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which(os.environ.get("CXX") or "c++")
HOME = os.environ.get("CUDA_HOME")
NVCC = shutil.which("nvcc", path=f"{HOME}/bin" if HOME else None)

pytestmark = pytest.mark.slow
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


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


def assert_loads(tmp_path: Path, *, cuda: bool) -> None:
    """The module that was built loads, and says truly whether it has GPU kernels."""
    (library,) = built(tmp_path)
    check = f"import sys; sys.path[:0] = [{str(library.parent)!r}]; import _C; "
    check += "print(_C.__file__, _C.cuda_built, hasattr(_C, 'cuda_linear_step'))"
    loaded = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert loaded.stdout == f"{library} {cuda} {cuda}\n", loaded.stderr


def cuda_home(tmp_path: Path, *, broken_nvcc: bool) -> str:
    """A CUDA_HOME without an nvcc, or with one that fails."""
    folder = tmp_path / "cuda/bin"
    folder.mkdir(parents=True)
    if broken_nvcc:
        (folder / "nvcc").write_text("#!/bin/sh\nexit 1\n")
        (folder / "nvcc").chmod(0o755)
    return str(folder.parent)


@needs_compiler
def test_a_compiler_without_openmp_is_enough(tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text(
        f'#!/bin/sh\nfor a in "$@"; do [ "$a" = -fopenmp ] && exit 1; done\nexec {COMPILER} "$@"\n'
    )
    compiler.chmod(0o755)
    done = build(tmp_path, CXX=f"'{compiler}'", MSDDA_BUILD_CUDA="0")
    assert done.returncode == 0, done.stderr
    assert "pure Python" not in done.stderr
    assert_loads(tmp_path, cuda=False)


def test_without_a_compiler_the_build_warns_once_and_succeeds(tmp_path):
    done = build(tmp_path, CXX="/bin/false", MSDDA_BUILD_CUDA="0")
    assert done.returncode == 0, done.stderr
    assert built(tmp_path) == []
    assert done.stderr.count("UserWarning: msdda_fast: no compiled kernels") == 1


@needs_compiler
@pytest.mark.skipif(NVCC is None, reason="no nvcc")
@pytest.mark.parametrize("mode", ["auto", "1"])
def test_with_nvcc_there_are_gpu_kernels_and_no_library_to_find(mode, tmp_path):
    done = build(tmp_path, MSDDA_BUILD_CUDA=mode)
    assert done.returncode == 0, done.stderr
    assert "UserWarning" not in done.stderr
    assert_loads(tmp_path, cuda=True)
    (library,) = built(tmp_path)
    needed = subprocess.run(["ldd", library], capture_output=True, text=True).stdout
    assert "libcud" not in needed
    exported = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True)
    assert b"cuda" not in exported.stdout  # or they could meet those of torch


@needs_compiler
@pytest.mark.parametrize("broken_nvcc", [True, False], ids=["broken", "absent"])
def test_auto_goes_on_without_a_working_nvcc(broken_nvcc, tmp_path):
    home = cuda_home(tmp_path, broken_nvcc=broken_nvcc)
    done = build(tmp_path, MSDDA_BUILD_CUDA="auto", CUDA_HOME=home)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("UserWarning: msdda_fast: no CUDA kernels") == int(broken_nvcc)
    assert done.stderr.count("UserWarning") == int(broken_nvcc)
    assert_loads(tmp_path, cuda=False)


@pytest.mark.parametrize("broken_nvcc", [True, False], ids=["broken", "absent"])
def test_asking_for_gpu_kernels_that_do_not_build_fails_loudly(broken_nvcc, tmp_path):
    home = cuda_home(tmp_path, broken_nvcc=broken_nvcc)
    done = build(tmp_path, MSDDA_BUILD_CUDA="1", CUDA_HOME=home)
    assert done.returncode != 0
    assert "MSDDA_BUILD_CUDA=1: " + ("the CUDA" if broken_nvcc else "no nvcc in") in done.stderr
    assert built(tmp_path) == []


def test_an_unknown_mode_is_refused(tmp_path):
    done = build(tmp_path, MSDDA_BUILD_CUDA="yes")
    assert done.returncode != 0
    assert "must be auto, 0 or 1, got 'yes'" in done.stderr
