# SPDX-License-Identifier: Apache-2.0
"""What a thread of the CUDA kernels computes, run on the host: the bits of eager, in every case.

The kernels only loop over the work items of csrc/include/msdda/threads.h. host_threads.cpp is the
real bindings with such a loop in place of the launch, so these tests cover everything from the
Python arguments to the stored bits except the GPU's own instructions (see test_cuda_code.py).
"""

import importlib.util
import itertools
import os
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pybind11
import pytest
import torch

from msdda_fast.errors import InvalidShape
from msdda_fast.kernels import native
from msdda_fast.kernels.counter_noise import _eager as eager_noise
from msdda_fast.kernels.counter_noise import _native as native_noise
from msdda_fast.kernels.fused_step import _eager, _native_cuda
from tests.kernels.cases import DTYPES
from tests.kernels.raw_cases import (
    SHAPES,
    Draw,
    assert_same_bits,
    laid_out,
    linear_case,
    moments_case,
    round_roots,
)

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shlex.split(os.environ.get("CXX") or "c++")  # with sanitizers under `make sanitize`
FLAGS = "-std=c++17 -O0 -fPIC -fvisibility=hidden -ffp-contract=off -Wall -Wextra -Werror"


@pytest.fixture(scope="module")
def built(made_once: Callable[..., Path]) -> ModuleType:
    if shutil.which(COMPILER[0]) is None:
        pytest.skip("no C++ compiler")
    library = made_once("host_threads", build) / "host_threads.so"
    spec = importlib.util.spec_from_file_location("host_threads", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(folder: Path) -> None:
    include = [ROOT / "csrc", ROOT / "csrc/include", pybind11.get_include()]
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    flags = FLAGS.split() + [f"-I{path}" for path in (*include, sysconfig.get_path("include"))]
    objects, compilers = [], []
    for source in (ROOT / "tests/kernels/host_threads.cpp", ROOT / "csrc/cuda_bindings.cpp"):
        objects.append(folder / f"{source.stem}.o")
        command = [*COMPILER, *flags, "-c", source, "-o", objects[-1]]
        compilers.append(subprocess.Popen(command, env=environment))
    assert [compiler.wait() for compiler in compilers] == [0, 0]
    library = folder / "host_threads.so"
    subprocess.run([*COMPILER, "-shared", *objects, "-o", library], check=True, env=environment)


@pytest.fixture(params=["wide", "narrow"])
def host(built: ModuleType, request: pytest.FixtureRequest, monkeypatch) -> ModuleType:
    """The CUDA side of both operators runs on CPU tensors; wide where sizes and addresses allow."""
    monkeypatch.setattr(_native_cuda, "_C", built)
    monkeypatch.setattr(native_noise, "_C", built)
    monkeypatch.setattr(native, "queue", lambda tensor: (0, 0))
    built.prefer_wide(request.param == "wide")
    return built


@pytest.mark.sweep(seed=20)  # planted faults fail in the first five
@pytest.mark.parametrize("seed", range(150))
def test_a_linear_step_has_the_bits_of_eager(seed, host):
    draw = Draw(seed)
    arguments, options = linear_case(draw)
    out = draw.tensor(dtype=draw.dtype(), layout=draw.layout())
    copies = draw.pick.choice([0, 1, 4])
    next_input = None
    if copies:
        next_input = draw.tensor(copies, dtype=draw.dtype(), layout=draw.layout())
    expected = torch.empty(draw.shape, dtype=out.dtype)
    _eager.run(expected, *arguments, **options)
    _native_cuda.run(out, *arguments, **options, next_input=next_input)
    assert_same_bits(out, expected)
    for copy in () if next_input is None else next_input:
        assert_same_bits(copy, expected.to(copy.dtype))


@pytest.mark.sweep(seed=20)  # likewise
@pytest.mark.parametrize("seed", range(150))
def test_a_moments_step_has_the_bits_of_eager(seed, host, monkeypatch):
    round_roots(monkeypatch)
    draw = Draw(1000 + seed)
    arguments, options, results = moments_case(draw)
    out = draw.tensor(dtype=draw.dtype(), layout=draw.layout())
    expected = torch.empty(draw.shape, dtype=out.dtype)
    wanted = {name: torch.empty(draw.shape, dtype=draw.compute) for name in results}
    _eager.run_moments(expected, *arguments, **options, **wanted)
    _native_cuda.run_moments(out, *arguments, **options, **results)
    assert_same_bits(out, expected)
    for name, result in results.items():
        assert_same_bits(result, wanted[name])


@pytest.mark.sweep
@pytest.mark.parametrize(("x_dtype", "dtype"), list(itertools.product(DTYPES, DTYPES)), ids=str)
@pytest.mark.parametrize("next_layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("channels", [6, 8])
def test_a_wide_image_has_the_bits_of_eager(channels, next_layout, x_dtype, dtype, host):
    draw = Draw(7)
    draw.shape = (2, channels, 5, 16)
    x = draw.tensor(dtype=x_dtype, layout="nchw")
    outputs = [draw.tensor(2, dtype=dtype, layout="nchw") for _ in range(2)]
    rows, seeds = draw.normal(2, 6, dtype=torch.float32), draw.seeds()
    out, expected = torch.empty_like(x), torch.empty_like(x)
    next_input = draw.tensor(4, dtype=dtype, layout=next_layout)
    _native_cuda.run(out, x, outputs, rows, seeds=seeds, step=3, next_input=next_input)
    _eager.run(expected, x, outputs, rows, seeds=seeds, step=3)
    assert_same_bits(out, expected)
    for copy in next_input:
        assert_same_bits(copy, expected.to(dtype))


def test_only_wide_tensors_make_a_wide_kernel(host, request):
    wide = "wide" in request.node.callspec.id
    x, outputs = torch.randn(1, 4, 8, 8), [torch.randn(2, 1, 4, 8, 8).half()]
    rows = torch.randn(1, 4)

    def was_wide(**changed: object) -> bool:
        given = {"out": torch.empty_like(x), "x": x, "outputs": outputs, "rows": rows} | changed
        _native_cuda.run(**given)
        return bool(host.was_wide())

    assert was_wide() == wide
    assert was_wide(next_input=torch.empty(2, 1, 4, 8, 8)) == wide
    assert was_wide(next_input=laid_out(torch.empty(2, 1, 4, 8, 8), "nhwc", 1)) == wide
    assert not was_wide(x=laid_out(x, "unaligned"))
    assert not was_wide(out=laid_out(x, "unaligned"))
    assert not was_wide(noise=laid_out(x, "unaligned"))
    assert not was_wide(outputs=[laid_out(outputs[0], "unaligned")])
    two = [outputs[0], laid_out(outputs[0], "unaligned")]
    assert not was_wide(outputs=two, rows=torch.randn(1, 6))
    assert not was_wide(outputs=[laid_out(outputs[0], "nhwc", 1)])
    assert not was_wide(next_input=laid_out(torch.empty(2, 1, 4, 8, 8), "unaligned"))
    assert not was_wide(rows=rows.double())
    odd = torch.randn(1, 4, 3, 7)
    assert not was_wide(out=odd.clone(), x=odd, outputs=[], rows=rows[:, :2])


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("step", [3, torch.tensor(2**32 - 1)], ids=["int", "tensor"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_counter_noise_has_the_bits_of_eager(shape, step, dtype, host):
    if len(shape) < 2:
        pytest.skip("no channel axis")
    draw = Draw(1)
    draw.shape = shape
    seeds = draw.seeds()
    got, expected = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)
    native_noise.run_cuda(got, seeds, step, 9)
    eager_noise.run(expected, seeds, step, 9)
    assert_same_bits(got, expected)


def test_a_step_in_place(host):
    draw = Draw(3)
    draw.shape = (2, 4, 8, 8)
    x = draw.tensor(dtype=torch.float32, layout="nchw")
    outputs = [draw.tensor(2, dtype=torch.float16, layout="nchw")]
    rows, expected = draw.normal(1, 4, dtype=torch.float32), torch.empty_like(x)
    _eager.run(expected, x, outputs, rows)
    _native_cuda.run(x, x, outputs, rows)
    assert_same_bits(x, expected)


def test_up_to_128_objectives(host):
    x = torch.randn(1, 4, 8, 8)
    outputs = [torch.randn(1, 1, 4, 8, 8)] * 129
    out, expected = torch.empty_like(x), torch.empty_like(x)
    rows = torch.randn(1, 260)
    _native_cuda.run(out, x, outputs[:128], rows[:, :258])
    _eager.run(expected, x, outputs[:128], rows[:, :258])
    assert_same_bits(out, expected)
    with pytest.raises(InvalidShape, match="129 objectives; the CUDA kernel takes up to 128"):
        _native_cuda.run(out, x, outputs, rows)
    means = [x] * 129
    with pytest.raises(InvalidShape, match="129 objectives"):
        _native_cuda.run_moments(out, means, *(torch.ones(129, 1, 1, 1, 1),) * 2)
