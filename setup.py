# SPDX-License-Identifier: Apache-2.0
"""Builds msdda_fast._C with ninja: a C++17 compiler, no torch. Without one: pure Python.

MSDDA_BUILD_CUDA=auto (the default) adds the GPU kernels where there is an nvcc, in CUDA_HOME/bin
or, where that variable is not set, on PATH; 0 leaves them out, 1 fails without them.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path

import ninja
import pybind11
from ninja.ninja_syntax import Writer
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CPU = ["csrc/bindings.cpp", "csrc/fused_step_cpu.cpp", "csrc/vector_loops.cpp"]
CUDA = ["csrc/cuda_bindings.cpp", "csrc/fused_step_cuda.cu"]
INCLUDE = ("csrc", "csrc/include", pybind11.get_include(), sysconfig.get_path("include"))
INCLUDES = " ".join(f"-I'{ROOT / path}'" for path in INCLUDE)
# no -ffast-math and no contraction: the noise has the same bits on every machine
FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -ffp-contract=off -fno-math-errno"
FLAGS += f" -fno-trapping-math {INCLUDES}"
LINK = "-bundle -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared"
# nvcc.flags: warnings are errors; no contraction, see above; machine code for A100 and H100, and
# PTX that the driver compiles for what comes after them
NVCC_FLAGS = f"--options-file '{ROOT / 'csrc' / 'nvcc.flags'}' {INCLUDES}"
# The static runtime: one wheel serves torch of any CUDA version, and the module loads where there
# is neither a GPU nor a driver.
# Its symbols stay hidden: torch may have put those of another version in the global scope.
NVCC_LINK = "-shared -cudart static -Xlinker --exclude-libs=libcudart_static.a"

MODE = os.environ.get("MSDDA_BUILD_CUDA") or "auto"
if MODE not in ("auto", "0", "1"):
    sys.exit(f"MSDDA_BUILD_CUDA must be auto, 0 or 1, got {MODE!r}")


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin" if home else None)


class NinjaBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        nvcc = None if MODE == "0" else find_nvcc()
        if MODE == "1" and nvcc is None:
            sys.exit("MSDDA_BUILD_CUDA=1: no nvcc in CUDA_HOME/bin or on PATH")
        if nvcc is not None:
            reason = self.attempt(ext, nvcc)
            if reason is None:
                return
            if MODE == "1":
                sys.exit(f"MSDDA_BUILD_CUDA=1: the CUDA kernels do not build: {reason}")
            warnings.warn(f"msdda_fast: no CUDA kernels, {nvcc} failed: {reason}", stacklevel=1)
        reason = self.attempt(ext, None)
        if reason is not None:
            warnings.warn(f"msdda_fast: no compiled kernels, pure Python: {reason}", stacklevel=1)

    def attempt(self, ext: Extension, nvcc: str | None) -> Exception | None:
        """Builds, without OpenMP where the compiler has none; returns what went wrong."""
        for openmp in ("-fopenmp", ""):
            try:
                return self.run_ninja(ext, openmp, nvcc)
            except subprocess.CalledProcessError as error:
                reason = error
        return reason

    def run_ninja(self, ext: Extension, openmp: str, nvcc: str | None) -> None:
        cxx = os.environ.get("CXX") or "c++"
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(folder / "build.ninja", "w") as file:
            ninja_file = Writer(file, width=10_000)
            flags, link = f"{FLAGS} {openmp}", f"{cxx} {LINK} {openmp}"
            if nvcc is not None:
                flags += " -DMSDDA_CUDA"
                link = f"'{nvcc}' -ccbin {cxx} {NVCC_LINK} {openmp and '-Xcompiler -fopenmp'}"
                compile_one = f"'{nvcc}' -ccbin {cxx} {NVCC_FLAGS} -MD -MF $out.d -c $in -o $out"
                ninja_file.rule("nvcc", compile_one, depfile="$out.d", deps="gcc")
            compile_one = f"{cxx} {flags} -MD -MF $out.d -c $in -o $out"
            ninja_file.rule("cxx", compile_one, depfile="$out.d", deps="gcc")
            ninja_file.rule("link", f"{link} $in -o $out")
            objects = []
            for source in CUDA + CPU if nvcc else CPU:
                objects.append(str(folder / f"{Path(source).stem}.o"))
                rule = "nvcc" if source.endswith(".cu") else "cxx"
                ninja_file.build(objects[-1], rule, str(ROOT / source))
            ninja_file.build(str(target), "link", objects)
        subprocess.run([Path(ninja.BIN_DIR, "ninja"), "-C", folder], check=True)


depends = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").rglob("*.h"))]
depends.append("csrc/nvcc.flags")
module = Extension("msdda_fast._C", CPU + CUDA, depends=depends, optional=True)
setup(ext_modules=[module], cmdclass={"build_ext": NinjaBuild})
