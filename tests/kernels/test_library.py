# SPDX-License-Identifier: Apache-2.0
"""Compilers and tracers see the operators: sound schemas, one graph, no recompilation."""

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck

from msdda_fast.kernels.counter_noise import counter_noise
from msdda_fast.kernels.fused_step import fast_fuse_step, fused_ddim_step
from msdda_fast.steps.coefficients import StepCoefficients

SHAPE = (2, 4, 6, 6)
OPS = torch.ops.msdda_fast
STEPS = 3


@pytest.fixture(autouse=True)
def compile_afresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


SEEDS, STEP = torch.tensor([1, 2]), torch.tensor(3)


@pytest.mark.sweep(fast_backend=1)  # one schema for all
@pytest.mark.parametrize("clip_range", [None, 1.0])
@pytest.mark.parametrize("drawn", [True, False], ids=["seeds", "noise"])
def test_the_step_is_a_sound_operator(drawn, clip_range, fast_backend):
    rows = normal(5, 2, 6 if clip_range is None else 13)
    outputs = [normal(2, *SHAPE, seed=1), None]
    noise, seeds = (None, SEEDS) if drawn else (normal(5, *SHAPE, seed=2), None)
    next_input = torch.empty(4, *SHAPE, dtype=torch.float16)
    out, x = torch.empty(SHAPE), normal(*SHAPE)
    arguments = (out, x, outputs, rows, clip_range, STEP, noise, seeds, next_input, fast_backend)
    opcheck(OPS.fused_step_.default, arguments)


@pytest.mark.sweep(fast_backend=1)  # one schema for all
def test_the_fusion_of_moments_is_a_sound_operator(fast_backend):
    means = [normal(*SHAPE, seed=m) for m in range(2)]
    variances, weights = normal(2, *SHAPE).exp(), normal(2, 1, 1, 1, 1).softmax(0)
    out, mean, variance = (torch.empty(SHAPE) for _ in range(3))
    opcheck(
        OPS.fused_moments_.default,
        (out, means, variances, weights, STEP, None, SEEDS, mean, variance, fast_backend),
    )


@pytest.mark.sweep(fast_backend=1)  # likewise
def test_counter_noise_is_a_sound_operator(fast_backend):
    opcheck(OPS.counter_noise_.default, (torch.empty(SHAPE), SEEDS, STEP, 1, fast_backend))


def ancestral(means: Tensor, variances: Tensor, weights: Tensor, seeds: Tensor) -> Tensor:
    """Some sampler of somebody's: `fast_fuse_step` in a loop, the step counted on the device."""
    step = torch.zeros((), dtype=torch.int64)
    x = counter_noise(seeds, SHAPE, stream=0)
    for _ in range(STEPS):
        fused = fast_fuse_step(
            means * x, variances, weights, seeds=seeds, step=step, return_moments=True
        )
        x = x + fused.prev_sample - 0.1 * fused.mean
        step = step + 1
    return x


@pytest.mark.sweep(axes=1)
@pytest.mark.parametrize("axes", [1, 2, 5])
def test_a_sampler_is_one_graph_for_any_weights_and_seeds(axes):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ancestral, fullgraph=True, backend=counter)
    for k in range(3):
        means = normal(2, *SHAPE, seed=k)
        variances = normal(*(2, *SHAPE)[:axes], seed=k).exp()
        weights = normal(2, 2, seed=k).softmax(0)
        arguments = (means, variances, weights, torch.tensor([k, -k]))
        assert torch.equal(compiled(*arguments), ancestral(*arguments))
    assert counter.frame_count == 1


def ddim(x: Tensor, outputs: Tensor, rows: Tensor, seeds: Tensor, step: Tensor) -> Tensor:
    x = x.clone()
    for k in range(STEPS):
        row = StepCoefficients(rows[k], 2, None)
        fused_ddim_step(x, outputs * x, row, seeds=seeds, step=step + k, out=x)
    return x


def test_steps_in_place_are_one_graph_for_any_coefficients_and_step():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ddim, fullgraph=True, backend=counter)
    for k in range(3):
        arguments = (
            normal(*SHAPE, seed=k), normal(2, 2, *SHAPE, seed=k), normal(STEPS, 2, 6, seed=k),
            torch.tensor([k, 2**40 + k]), torch.tensor(k),
        )  # fmt: skip
        assert torch.equal(compiled(*arguments), ddim(*arguments))
    assert counter.frame_count == 1


def test_a_traced_step_replays_with_other_inputs():
    arguments = [
        (normal(*SHAPE, seed=k), normal(2, 2, *SHAPE, seed=k), normal(STEPS, 2, 6, seed=k),
         torch.tensor([k, k + 1]), torch.tensor(k))
        for k in range(2)
    ]  # fmt: skip
    graph = make_fx(ddim)(*arguments[0])
    calls = [node for node in graph.graph.nodes if node.target is OPS.fused_step_.default]
    assert len(calls) == STEPS
    for some in arguments:
        assert torch.equal(graph(*some), ddim(*some))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning:torch.jit")  # torch's own
def test_inductor_agrees():
    compiled = torch.compile(ancestral, fullgraph=True)
    arguments = (normal(2, *SHAPE), normal(2).exp(), normal(2, 2).softmax(0), SEEDS)
    # inductor may contract the sampler's own arithmetic, never the operators'
    torch.testing.assert_close(compiled(*arguments), ancestral(*arguments), rtol=1e-5, atol=1e-6)
