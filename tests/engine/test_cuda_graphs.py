# SPDX-License-Identifier: Apache-2.0
"""Real CUDA graphs keep what `test_graph` and `test_capture_failures` show without a GPU."""

import logging
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from msdda_fast.batched import attention_choice
from msdda_fast.engine.buffers import ShapeKey, StepBuffers
from msdda_fast.engine.graph import StepCache
from msdda_fast.engine.graph_backends import CudaGraphs
from msdda_fast.engine.side_by_side import SideBySide
from msdda_fast.engine.step import Predict
from msdda_fast.errors import CaptureError, InvalidShape
from msdda_fast.kernels import registry
from tests.engine.small_world import (
    CHANNELS,
    KEY,
    SHAPE,
    Request,
    SmallNetwork,
    builder,
    drawn,
    small_weights,
)
from tests.engine.test_graph import CHANGES, GUIDED, PROMPT

pytestmark = pytest.mark.gpu

BACKENDS = [name for name in registry.NAMES if registry.available(name, "cuda")]


class Counting(CudaGraphs):
    captures = 0

    def capture(self, advance, buffers):
        self.captures += 1
        return super().capture(advance, buffers)


def assert_same(x_0: Tensor, expected: Tensor) -> None:
    # the matrix products of the network may run on other kernels inside a capture
    torch.testing.assert_close(x_0, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_only_shapes_capture_again_and_nothing_waits(backend: str) -> None:
    weights, graphs = small_weights("cuda"), Counting("cuda")
    steps = StepCache(
        builder(weights), device="cuda", capture="required", backend=backend, graphs=graphs
    )
    first = Request(guidance=7.5, prompt=PROMPT)
    for change in ({}, *CHANGES.values(), {}):
        request = replace(first, **change)
        arguments = request.arguments
        step = steps.prepare(GUIDED)
        torch.cuda.set_sync_debug_mode("error")
        try:
            step.load(**arguments)
            x_0 = step.run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert_same(x_0, request.expected(weights, backend))
    assert graphs.captures == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_noise_and_step_have_the_bits_of_the_loop(backend: str) -> None:
    weights = torch.zeros(2, CHANNELS, CHANNELS, device="cuda")
    request = Request(num_steps=50)
    steps = StepCache(builder(weights), device="cuda", capture="required", backend=backend)
    step = steps.prepare(KEY)
    step.load(**request.arguments)
    assert step.run().equal(request.expected(weights, backend))
    table = replace(request, seeds=None, noise=drawn(50, *SHAPE, seed=4))
    step = steps.prepare(replace(KEY, noise_table=True))
    step.load(**table.arguments)
    assert step.run().equal(table.expected(weights, backend))


def test_graphs_of_several_shapes_share_a_pool_and_leave_one_another_alone() -> None:
    weights = small_weights("cuda")
    steps = StepCache(builder(weights), device="cuda", capture="required", capacity=2)
    keys = [replace(KEY, shape=(b, *SHAPE[1:])) for b in (1, 2, 3, 1)]
    for key in keys:
        batch = key.shape[0]
        request = Request(
            x_T=drawn(*key.shape), seeds=tuple(range(batch)), weights=((0.3, 0.7),) * batch
        )
        for _ in range(2):
            step = steps.prepare(key)
            step.load(**request.arguments)
            assert_same(step.run(), request.expected(weights))
    steps.clear()


def test_adapters_swapped_in_place_keep_the_graph_and_others_are_named() -> None:
    networks: list[SmallNetwork] = []

    def build(key: ShapeKey, buffers: StepBuffers) -> SmallNetwork:
        networks.append(SmallNetwork(key, buffers, small_weights("cuda")))
        return networks[-1]

    request = Request()
    step = StepCache(build, device="cuda", capture="required").prepare(KEY)
    networks[0].weights.mul_(0.5)
    step.load(**request.arguments)
    assert_same(step.run(), request.expected(0.5 * small_weights("cuda")))
    networks[0].weights = networks[0].weights.half()
    step.load(**request.arguments)
    with pytest.raises(CaptureError, match="weights"):
        step.run()


def test_a_capture_that_fails_falls_back_and_spoils_no_later_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Waiting(SmallNetwork):
        """Waits in a way that no operator shows."""

        def __call__(self, next_input: Tensor, k: Tensor) -> list[Tensor | None]:
            torch.cuda.synchronize()
            return super().__call__(next_input, k)

    weights, request, graphs = small_weights("cuda"), Request(), CudaGraphs("cuda")
    for network in (Waiting, SmallNetwork):
        steps = StepCache(
            lambda key, buffers, network=network: network(key, buffers, weights),
            device="cuda",
            graphs=graphs,
        )
        with caplog.at_level(logging.WARNING, logger="msdda_fast"):
            step = steps.prepare(KEY)
        assert step.is_captured == (network is SmallNetwork)
        assert torch.cuda.current_stream() == torch.cuda.default_stream()
        torch.randn(2, device="cuda")  # the default generator is not left in a capture
        step.load(**request.arguments)
        assert_same(step.run(), request.expected(weights))
    assert len(caplog.records) == 1 and "synchronize" in caplog.text


@pytest.mark.parametrize(
    ("grow", "what"), [({}, "activations"), (dict(max_steps=2**36), "buffers")], ids=str
)
def test_what_does_not_fit_is_said_before_capture(grow: dict, what: str) -> None:
    class Greedy(SmallNetwork):
        def __call__(self, next_input: Tensor, k: Tensor) -> list[Tensor | None]:
            wide = torch.zeros(2**40, device="cuda")
            return [output + wide[0] for output in super().__call__(next_input, k)]

    graphs, weights = Counting("cuda"), small_weights("cuda")
    steps = StepCache(
        lambda key, buffers: Greedy(key, buffers, weights), device="cuda", graphs=graphs
    )
    with pytest.raises(InvalidShape, match=f"GiB for its {what}"):
        steps.prepare(replace(KEY, **grow))
    assert graphs.captures == 0


def test_networks_on_streams_of_their_own() -> None:
    weights = small_weights("cuda")

    class Both(SmallNetwork):
        @property
        def kinds(self) -> Mapping[str, Predict]:
            return {"exact": self.side_by_side}

    def build(key: ShapeKey, buffers: StepBuffers) -> Both:
        one = replace(key, active=(True,))
        both = Both(key, buffers, weights)
        both.side_by_side = SideBySide(
            [SmallNetwork(one, buffers, weight[None]) for weight in weights]
        )
        return both

    request = Request()
    for capture in ("off", "required"):
        step = StepCache(build, device="cuda", capture=capture).prepare(KEY)
        step.load(**request.arguments)
        assert_same(step.run(), request.expected(weights))


def test_attention_is_timed_in_the_warm_up_and_captured_on_the_fastest_backend(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention_choice, "_chosen", {})
    shapes = [(2, 8, length, 40) for length in (64, 1024)]
    calls = [[torch.randn(shape).to("cuda", torch.float16) for _ in range(3)] for shape in shapes]
    outs = [torch.zeros_like(query) for query, _, _ in calls]

    def advance(buffers: StepBuffers) -> None:
        for call, out in zip(calls, outs, strict=True):
            out.copy_(attention_choice.attention(*call))

    graph = CudaGraphs("cuda").capture(advance, StepBuffers.allocate(KEY, "cuda"))
    assert len(attention_choice._chosen) == 2
    for out in outs:
        out.zero_()
    graph.replay()
    for (query, key, value), out in zip(calls, outs, strict=True):
        assert attention_choice.chosen_backend(query, key, value) in attention_choice.CANDIDATES
        scores = (query.float() @ key.float().mT) / query.shape[-1] ** 0.5
        expected = scores.softmax(-1) @ value.float()
        torch.testing.assert_close(out.float(), expected, rtol=1e-2, atol=1e-2)
    graph.release()


@pytest.mark.slow
def test_compiled_and_then_captured() -> None:
    weights, request = small_weights("cuda"), Request()
    step = StepCache(builder(weights), device="cuda", capture="required", compile=True)
    step = step.prepare(KEY)
    step.load(**request.arguments)
    assert_same(step.run(), request.expected(weights))
