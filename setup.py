# SPDX-License-Identifier: Apache-2.0
"""Builds msdda_fast._C with ninja: a C++17 compiler, no torch. Without one: pure Python."""

import os
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
INCLUDE = ("csrc", "csrc/include", pybind11.get_include(), sysconfig.get_path("include"))
# no -ffast-math and no contraction: the noise has the same bits on every machine
FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -ffp-contract=off -fno-math-errno"
FLAGS += " -fno-trapping-math " + " ".join(f"-I'{ROOT / path}'" for path in INCLUDE)
LINK = "-bundle -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared"


class NinjaBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        for openmp in ("-fopenmp", ""):
            try:
                return self.run_ninja(ext, openmp)
            except subprocess.CalledProcessError as error:
                reason = error
        warnings.warn(f"msdda_fast: no compiled kernels, pure Python: {reason}", stacklevel=1)

    def run_ninja(self, ext: Extension, openmp: str) -> None:
        cxx = os.environ.get("CXX") or "c++"
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(folder / "build.ninja", "w") as file:
            ninja_file = Writer(file, width=10_000)
            compile_one = f"{cxx} {FLAGS} {openmp} -MD -MF $out.d -c $in -o $out"
            ninja_file.rule("cxx", compile_one, depfile="$out.d", deps="gcc")
            ninja_file.rule("link", f"{cxx} {LINK} {openmp} $in -o $out")
            objects = [str(folder / f"{Path(s).stem}.o") for s in ext.sources]
            for source, built in zip(ext.sources, objects, strict=True):
                ninja_file.build(built, "cxx", str(ROOT / source))
            ninja_file.build(str(target), "link", objects)
        subprocess.run([Path(ninja.BIN_DIR, "ninja"), "-C", folder], check=True)


if os.environ.get("MSDDA_BUILD_CUDA", "auto") == "1":
    sys.exit("MSDDA_BUILD_CUDA=1: this version has no CUDA kernels; use auto or 0")
sources = sorted(f"csrc/{path.name}" for path in (ROOT / "csrc").glob("*.cpp"))
headers = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h"))
module = Extension("msdda_fast._C", sources, depends=headers, optional=True)
setup(ext_modules=[module], cmdclass={"build_ext": NinjaBuild})
