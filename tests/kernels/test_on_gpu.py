# SPDX-License-Identifier: Apache-2.0
"""The kernels on a GPU: the bits of eager on the CPU, alone, on a stream and in a graph."""

from types import ModuleType

import pytest
import torch
from torch import Tensor

from msdda_fast.kernels import native, registry
from msdda_fast.kernels.counter_noise import _eager as eager_noise
from msdda_fast.kernels.fused_step import _eager
from tests.kernels.cases import DTYPES
from tests.kernels.raw_cases import (
    Draw,
    assert_same_bits,
    laid_out,
    linear_case,
    moments_case,
    round_roots,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]


@pytest.fixture(params=["native", "triton"])
def gpu_backend(request: pytest.FixtureRequest) -> str:
    if not registry.available(request.param, "cuda"):
        pytest.skip(registry.explain("cuda")[request.param])
    return request.param


@pytest.fixture
def fast(gpu_backend) -> ModuleType:
    return registry.resolve("fused_step", gpu_backend, "cuda")


def on_gpu(value: object) -> object:
    """Tensors with their strides and alignment, also inside of lists and dicts, on the GPU."""
    if isinstance(value, list):
        return [on_gpu(entry) for entry in value]
    if isinstance(value, dict):
        return {name: on_gpu(entry) for name, entry in value.items()}
    if not isinstance(value, Tensor):
        return value
    storage = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage()).cuda()
    return storage.as_strided(value.shape, value.stride(), value.storage_offset())


@pytest.mark.parametrize("seed", range(150))
def test_a_linear_step_has_the_bits_of_eager(seed, fast):
    draw = Draw(seed)
    arguments, options = linear_case(draw)
    out = draw.tensor(dtype=draw.dtype(), layout=draw.layout())
    next_input = draw.tensor(3, dtype=draw.dtype(), layout=draw.layout())
    expected = torch.empty(draw.shape, dtype=out.dtype)
    _eager.run(expected, *arguments, **options)
    out, next_input = on_gpu([out, next_input])
    fast.run(out, *on_gpu(arguments), **on_gpu(options), next_input=next_input)
    assert_same_bits(out.cpu(), expected)
    for copy in next_input.cpu():
        assert_same_bits(copy, expected.to(copy.dtype))


@pytest.mark.parametrize("seed", range(150))
def test_a_moments_step_has_the_bits_of_eager(seed, fast, monkeypatch):
    draw = Draw(1000 + seed)
    arguments, options, results = moments_case(draw)
    out = draw.tensor(dtype=draw.dtype(), layout=draw.layout())
    expected = torch.empty(draw.shape, dtype=out.dtype)
    wanted = {name: torch.empty(draw.shape, dtype=draw.compute) for name in results}
    with monkeypatch.context() as patch:
        round_roots(patch)
        _eager.run_moments(expected, *arguments, **options, **wanted)
    out, results = on_gpu([out, results])
    fast.run_moments(out, *on_gpu(arguments), **on_gpu(options), **results)
    assert_same_bits(out.cpu(), expected)
    for name, result in results.items():
        assert_same_bits(result.cpu(), wanted[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seeded", [False, True], ids=["noise", "seeds"])
def test_images_that_fill_the_gpu_have_the_bits_of_eager(seeded, dtype, fast):
    draw = Draw(5)
    draw.shape = (2, 16, 256, 384)
    x = draw.tensor(dtype=torch.float32, layout="nchw")
    outputs = [draw.tensor(2, dtype=dtype, layout="nchw") for _ in range(2)]
    rows = draw.normal(2, 6, dtype=torch.float32)
    z = {"seeds": draw.seeds()} if seeded else {"noise": draw.tensor(dtype=dtype, layout="nchw")}
    expected = torch.empty_like(x)
    _eager.run(expected, x, outputs, rows, step=7, **z)
    out = torch.empty_like(x, device="cuda")
    fast.run(out, *on_gpu([x, outputs, rows]), step=7, **on_gpu(z))
    assert_same_bits(out.cpu(), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_counter_noise_has_the_bits_of_eager(dtype, gpu_backend):
    draw = Draw(1)
    draw.shape = (3, 6, 40, 41)
    seeds, expected = draw.seeds(), torch.empty(draw.shape, dtype=dtype)
    eager_noise.run(expected, seeds, 3, 1)
    for step in (3, torch.tensor(3, device="cuda")):
        got = torch.empty(draw.shape, dtype=dtype, device="cuda")
        registry.resolve("counter_noise", gpu_backend, "cuda").run(got, seeds.cuda(), step, 1)
        assert_same_bits(got.cpu(), expected)


def test_a_captured_graph_replays_every_step(fast):
    draw, steps = Draw(2), 5
    draw.shape = (2, 4, 16, 16)
    x = draw.tensor(dtype=torch.float32, layout="nchw")
    outputs = [draw.tensor(2, dtype=torch.float16, layout="nhwc") for _ in range(2)]
    rows, seeds = draw.normal(steps, 2, 6, dtype=torch.float32), draw.seeds()
    state, *given = on_gpu([x, outputs, rows])
    step, options = torch.zeros((), dtype=torch.int64, device="cuda"), {"seeds": seeds.cuda()}
    out = torch.empty_like(state)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        fast.run(out, state, *given, step=step, **options)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fast.run(out, state, *given, step=step, **options)
    expected = torch.empty_like(x)
    for k in range(steps):
        step.fill_(k)
        graph.replay()
        _eager.run(expected, x, outputs, rows, step=k, seeds=seeds)
        assert_same_bits(out.cpu(), expected)


def test_work_goes_to_the_current_stream(fast):
    x = torch.zeros(1, 4, 64, 64, device="cuda")
    rows = torch.tensor([[1.0, 0.0]], device="cuda")
    out, stream = torch.empty_like(x), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        x.fill_(3.0)
        fast.run(out, x, [], rows)
    stream.synchronize()
    assert (out == 3).all()


def test_a_launch_that_fails_names_the_cuda_error(monkeypatch):
    if missing := native.missing("cuda"):
        pytest.skip(missing)
    run = registry.resolve("fused_step", "native", "cuda").run
    x = torch.zeros(1, 4, 8, 8, device="cuda")
    rows = torch.tensor([[1.0, 0.0]], device="cuda")
    with (
        monkeypatch.context() as patch,
        pytest.raises(RuntimeError, match="cudaErrorInvalidDevice"),
    ):
        patch.setattr(native, "queue", lambda tensor: (99, 0))
        run(x, x, [], rows)
    run(x, x, [], rows)  # the error does not stay


def test_offsets_beyond_32_bits_of_a_huge_image(fast):
    x = torch.zeros(1, 5, 2**29, dtype=torch.float16, device="cuda")
    x[..., -9:] = 1.5
    out = torch.empty_like(x)
    fast.run(out, x, [], torch.tensor([[2.0, 0.0]], device="cuda"))
    assert (out[..., -9:] == 3).all() and not out[..., :-9].any()


def test_layouts_of_the_gpu_stay_where_they_are(fast):
    """A channels-last step allocates nothing but what it is given."""
    x = laid_out(torch.randn(2, 4, 32, 32), "nhwc").cuda()
    outputs = [laid_out(torch.randn(2, 2, 4, 32, 32), "nhwc", 1).cuda().half()]
    rows, out = torch.randn(1, 4, device="cuda"), torch.empty_like(x)
    fast.run(out, x, outputs, rows)  # compiles, loads
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    fast.run(out, x, outputs, rows)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
