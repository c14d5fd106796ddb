# SPDX-License-Identifier: Apache-2.0
"""What a thread of the CUDA kernels computes, run on the host: the bits of eager, in every case.

The kernels only loop over the work items of csrc/include/msdda/threads.h. host_threads.cpp is the
real bindings with such a loop in place of the launch, so these tests cover everything from the
Python arguments to the stored bits except the GPU's own instructions (see test_cuda_code.py).
"""

import importlib.util
import itertools
import math
import os
import random
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import numpy as np
import pybind11
import pytest
import torch
from torch import Tensor

from msdda_fast.errors import InvalidShape
from msdda_fast.kernels import native
from msdda_fast.kernels.counter_noise import _eager as eager_noise
from msdda_fast.kernels.counter_noise import _native as native_noise
from msdda_fast.kernels.fused_step import _eager, _native_cuda
from tests.kernels.cases import DTYPES

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which(os.environ.get("CXX") or "c++")
FLAGS = "-std=c++17 -O1 -fPIC -fvisibility=hidden -ffp-contract=off -Wall -Wextra -Werror"
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
SHAPES = (
    (1, 4, 8, 8), (3, 5, 17, 7), (2, 13), (3,), (2, 16, 3, 8, 2), (1, 4, 9, 11), (2, 8, 4, 6),
    (2, 4, 1, 1), (2, 6, 16), (2, 3, 8, 3), (0, 4, 8, 8),
)  # fmt: skip


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("host_threads")
    include = [ROOT / "csrc", ROOT / "csrc/include", pybind11.get_include()]
    flags = FLAGS.split() + [f"-I{path}" for path in (*include, sysconfig.get_path("include"))]
    objects, compilers = [], []
    for source in (ROOT / "tests/kernels/host_threads.cpp", ROOT / "csrc/cuda_bindings.cpp"):
        objects.append(folder / f"{source.stem}.o")
        compilers.append(subprocess.Popen([COMPILER, *flags, "-c", source, "-o", objects[-1]]))
    assert [compiler.wait() for compiler in compilers] == [0, 0]
    library = folder / "host_threads.so"
    subprocess.run([COMPILER, "-shared", *objects, "-o", library], check=True)
    spec = importlib.util.spec_from_file_location("host_threads", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=["wide", "narrow"])
def host(built: ModuleType, request: pytest.FixtureRequest, monkeypatch) -> ModuleType:
    """The CUDA side of both operators runs on CPU tensors; wide where sizes and addresses allow."""
    monkeypatch.setattr(_native_cuda, "_C", built)
    monkeypatch.setattr(native_noise, "_C", built)
    monkeypatch.setattr(native, "queue", lambda tensor: (0, 0))
    built.prefer_wide(request.param == "wide")
    return built


@pytest.fixture
def rounded_roots(monkeypatch):
    """Eager with the root that IEEE 754 asks for; some CPU builds of torch are 1 ulp off."""
    monkeypatch.setattr(Tensor, "sqrt", lambda x: torch.from_numpy(np.sqrt(x.numpy())))


def assert_same_bits(got: Tensor | None, expected: Tensor | None) -> None:
    if got is None or expected is None:
        assert got is expected
        return
    bits = BITS[got.element_size()]
    assert torch.equal(got.contiguous().view(bits), expected.contiguous().view(bits))


def laid_out(x: Tensor, layout: str, lead: int = 0) -> Tensor:
    """The same values elsewhere; the sample axis is number `lead`."""
    if layout == "nhwc" and x.ndim > lead + 2:
        return x.movedim(lead + 1, -1).contiguous().movedim(-1, lead + 1)
    if layout == "sliced":
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), math.nan, dtype=x.dtype)
        wide[..., 1::2] = x
        return wide[..., 1::2]
    if layout == "unaligned":
        flat = torch.cat([x.new_zeros(1), x.flatten()])
        return flat[1:].view(x.shape)
    return x.contiguous().clone()


class Draw:
    """Random but reproducible cases: an odd number of axes is bound to meet in some of them."""

    def __init__(self, seed: int) -> None:
        self.pick = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.shape = self.pick.choice(SHAPES)
        self.count = self.pick.choice([0, 1, 2, 3, 9])
        self.wide = self.pick.random() < 0.3  # float64 arithmetic
        self.compute = torch.float64 if self.wide else torch.float32

    def normal(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(dtype)

    def dtype(self) -> torch.dtype:
        return self.pick.choice(DTYPES)

    def layout(self) -> str:
        return self.pick.choice(["nchw", "nchw", "nchw", "nhwc", "nhwc", "sliced", "unaligned"])

    def tensor(self, *lead: int, dtype: torch.dtype, layout: str) -> Tensor:
        return laid_out(self.normal(*lead, *self.shape, dtype=dtype), layout, len(lead))

    def seeds(self) -> Tensor:
        bounds = (-(2**63), 2**63 - 1)
        return torch.randint(*bounds, self.shape[:1], generator=self.generator)

    def noise(self, steps: int | None) -> dict[str, Tensor]:
        kind = self.pick.choice(["none", "noise", "seeds"])
        if kind == "seeds" and len(self.shape) > 1:
            return {"seeds": self.seeds()}
        if kind != "noise":
            return {}
        lead = () if steps is None else (steps,)
        return {"noise": self.tensor(*lead, dtype=self.dtype(), layout=self.layout())}

    def step(self, steps: int) -> int | Tensor:
        k = self.pick.randrange(steps)
        return k if self.pick.random() < 0.5 else torch.tensor(k)


def linear_case(draw: Draw) -> tuple[list[object], dict[str, object]]:
    count, steps = draw.count, draw.pick.choice([None, 5])
    clipped = draw.pick.random() < 0.3
    x = draw.tensor(dtype=draw.dtype(), layout=draw.layout())
    x = None if draw.pick.random() < 0.1 and not clipped else x
    batch = draw.pick.choice([1, draw.shape[0]])
    lead = () if steps is None else (steps,)
    width = 5 * count + 3 if clipped else 2 * count + 2
    rows = draw.normal(*lead, batch, width, dtype=draw.compute)
    rows[torch.rand(rows.shape, generator=draw.generator) < 0.1] = 0
    outputs: list[Tensor | None] = []
    dtype, layout = draw.dtype(), draw.layout()
    for m in range(count):
        kind = draw.pick.choice([2, 2, 2, 1, 0])
        own = layout if draw.pick.random() < 0.9 else draw.layout()
        output = draw.tensor(kind, dtype=dtype, layout=own) if kind else None
        if output is not None and draw.pick.random() < 0.1:
            columns = [m + 1, count + m + 1]
            columns += [2 * count + 3 + m, 3 * count + 3 + m] if clipped else []
            rows[..., columns] = 0
            output.fill_(math.nan)
        outputs.append(output)
    options = {
        "step": draw.step(steps or 1000),
        "clip_range": 0.7 if clipped else None,
        **draw.noise(steps),
    }
    return [x, outputs, rows], options


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


@pytest.mark.usefixtures("rounded_roots")
@pytest.mark.parametrize("seed", range(150))
def test_a_moments_step_has_the_bits_of_eager(seed, host):
    draw = Draw(1000 + seed)
    count, shape = max(draw.count, 1), draw.shape
    dtype, layout = draw.dtype(), draw.layout()
    means = [draw.tensor(dtype=dtype, layout=layout) for _ in range(count)]
    variances, weights = (
        draw.normal(count, *(n if draw.pick.random() < 0.7 else 1 for n in shape)).square() + 0.1
        for _ in range(2)
    )
    weights[torch.rand(weights.shape, generator=draw.generator) < 0.1] = 0
    weights[0] += 0.1  # somebody is active everywhere
    variances[torch.rand(variances.shape, generator=draw.generator) < 0.05] = 0
    numbers = [t.to(draw.compute) for t in (variances, weights)]
    options = {"step": draw.step(1000), **draw.noise(None)}
    results = {}
    for name in ("mean", "variance"):
        if draw.pick.random() < 0.5:
            results[name] = draw.tensor(dtype=draw.compute, layout=draw.layout())
    out = draw.tensor(dtype=draw.dtype(), layout=draw.layout())
    expected = torch.empty(shape, dtype=out.dtype)
    wanted = {name: torch.empty(shape, dtype=draw.compute) for name in results}
    _eager.run_moments(expected, means, *numbers, **options, **wanted)
    _native_cuda.run_moments(out, means, *numbers, **options, **results)
    assert_same_bits(out, expected)
    for name, result in results.items():
        assert_same_bits(result, wanted[name])


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
