# SPDX-License-Identifier: Apache-2.0
"""What nvcc makes of csrc/fused_step_cuda.cu: no warning, no spill, wide accesses, no contraction.

MSDDA_NVCC lists the nvcc of the toolkits to try, separated as in PATH; by default it is the one
that setup.py takes.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest

pytestmark = pytest.mark.full  # nvcc takes half a minute; test_cuda_threads.py runs the code
ROOT = Path(__file__).resolve().parents[2]
HOME = os.environ.get("CUDA_HOME")
FOUND = shutil.which("nvcc", path=f"{HOME}/bin" if HOME else None)
COMPILERS = [path for path in os.environ.get("MSDDA_NVCC", FOUND or "").split(os.pathsep) if path]
OBJECT = "fused_step_cuda.o"
WIDE = ("linear_kernelIfLi8ELb0E", "moments_kernelIfLi4E")  # float32, 8 or 4 pixels a thread
NAMES = {
    *WIDE, "linear_kernelIfLi1ELb0E", "linear_kernelIfLi1ELb1E", "linear_kernelIdLi1ELb0E",
    "linear_kernelIdLi1ELb1E", "moments_kernelIfLi1E", "moments_kernelIdLi1E", "noise_kernel",
}  # fmt: skip


class Code(NamedTuple):
    """What is in the object file, by architecture and kernel."""

    resources: dict[tuple[str, str], str]
    machine: dict[tuple[str, str], str]
    portable: dict[str, str]  # PTX, by kernel alone


@pytest.fixture(scope="module", params=COMPILERS or [None], ids=str)
def compiled(request: pytest.FixtureRequest, made_once: Callable[..., Path]) -> Path:
    """The object file that the build makes."""
    if request.param is None:
        pytest.skip("no nvcc")

    def make(folder: Path) -> None:
        command = [request.param, "--options-file", ROOT / "csrc/nvcc.flags"]
        command += [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/include'}"]
        command += ["-o", folder / OBJECT, "-c", ROOT / "csrc/fused_step_cuda.cu"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")

    return made_once(f"nvcc-{COMPILERS.index(request.param)}", make) / OBJECT


@pytest.fixture(scope="module")
def code(compiled: Path, request: pytest.FixtureRequest) -> Code:
    tool = cuobjdump()
    if tool is None:
        pytest.skip("no cuobjdump")

    def dump(what: str) -> str:
        command = [tool, f"--dump-{what}", compiled]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def by_kernel(text: str) -> dict[tuple[str, str], str]:
        return {
            (target.split()[0], short_name(function)): function
            for target in re.split(r"arch = ", text)[1:]
            for function in re.split(r"Function ", target)[1:]
        }

    portable = {short_name(entry): entry for entry in dump("ptx").split(".entry ")[1:]}
    return Code(by_kernel(dump("resource-usage")), by_kernel(dump("sass")), portable)


def cuobjdump() -> str | None:
    """The one beside nvcc, on PATH, or in triton."""
    folders = [str(Path(nvcc).parent) for nvcc in COMPILERS] + [os.environ.get("PATH", "")]
    spec = find_spec("triton")
    if spec is not None and spec.origin is not None:
        folders.append(str(Path(spec.origin).parent / "backends/nvidia/bin"))
    return shutil.which("cuobjdump", path=os.pathsep.join(folders))


def short_name(function: str) -> str:
    """The mangled name at the beginning of `function` without namespaces and arguments."""
    found = re.search(r"[a-z]+_kernel(I[fd]Li\dE(Lb\dE)?)?", function)
    return found[0] if found else function.split()[0]


def test_there_is_machine_code_and_ptx_for_every_kernel(code):
    expected = {(arch, name) for arch in ("sm_80", "sm_90") for name in NAMES}
    assert set(code.resources) == set(code.machine) == expected
    assert set(code.portable) == NAMES


def test_a_failed_launch_leaves_no_error_for_the_next_one(compiled, tmp_path):
    program = tmp_path / "old_error"
    command = ["c++", "-std=c++17", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/include'}"]
    command += ["-o", program, ROOT / "tests/kernels/old_error.cpp", compiled]
    subprocess.run(command, check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_nothing_spills(code):
    for kernel, usage in code.resources.items():
        assert "STACK:0" in usage and "LOCAL:0" in usage, (kernel, usage)
    for kernel, text in code.machine.items():
        assert not re.search(r"\b(LDL|STL)\b", text), kernel


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("name", WIDE)
def test_wide_kernels_move_16_bytes_at_a_time(name, arch, code):
    text = code.machine[arch, name]
    loads, stores = (set(re.findall(rf"\b{op}\.E[\w.]*", text)) for op in ("LDG", "STG"))
    assert any(".128" in load for load in loads)
    assert any(".128" in store for store in stores)
    # 8 bytes: four channels of 2 bytes in NHWC, or four pixels of a moments step
    assert all(".128" in store or ".64" in store for store in stores), stores
    assert not any("16" in load for load in loads if ".128" not in load), loads


def test_no_product_and_sum_are_contracted_and_nothing_is_approximate(code):
    for name, text in code.portable.items():
        assert not re.findall(r"\b(?:fma|mad)\.[\w.]*f(?:16|32|64)\b", text), name
        assert ".approx" not in text and ".ftz" not in text, name
        assert "sqrt.rn.f32" in text, name  # Box-Muller


def test_arguments_fit_the_smallest_limit(code):
    for kernel, usage in code.resources.items():
        size = int(re.search(r"CONSTANT\[0\]:(\d+)", usage)[1])
        assert size <= 4096, (kernel, usage)
