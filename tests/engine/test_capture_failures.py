# SPDX-License-Identifier: Apache-2.0
"""A step that cannot be captured runs eagerly with one warning, or raises where it must not."""

import logging
import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from msdda_fast.engine.buffers import ShapeKey, StepBuffers
from msdda_fast.engine.graph import StepCache
from msdda_fast.errors import BackendUnavailable, CaptureError, InvalidShape
from tests.engine.small_world import (
    CHANNELS,
    KEY,
    Request,
    SmallNetwork,
    TracedGraphs,
    cache,
    small_weights,
)


class Waiting(SmallNetwork):
    """Reads a value on the host, harmlessly."""

    def __call__(self, next_input: Tensor, k: Tensor) -> list[Tensor | None]:
        assert next_input.sum().item() < 1e9
        return super().__call__(next_input, k)


class Refusing(TracedGraphs):
    """Fails as a CUDA capture does: ending it raises another error on top."""

    def capture(self, advance, buffers):
        advance(buffers)
        try:
            raise RuntimeError("operation not permitted when stream is capturing")
        finally:
            raise RuntimeError("capture was invalidated")


def build(network: type[SmallNetwork]):
    weights = small_weights()
    return lambda key, buffers: network(key, buffers, weights)


def failing(kind: str, **settings: object) -> StepCache:
    network = Waiting if kind == "waits" else SmallNetwork
    graphs = Refusing() if kind == "refused" else TracedGraphs()
    return StepCache(build(network), device="cpu", graphs=graphs, **settings)


NAMES = {"waits": "aten._local_scalar_dense", "refused": "RuntimeError: operation not permitted"}


@pytest.mark.parametrize("kind", NAMES)
def test_auto_warns_once_and_runs_eagerly(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    steps, request = failing(kind), Request()
    with caplog.at_level(logging.WARNING, logger="msdda_fast"):
        for _ in range(2):
            step = steps.prepare(KEY)
            step.load(**request.arguments)
            assert step.run().equal(request.expected(small_weights()))
    assert not step.is_captured
    assert len(caplog.records) == 1 and NAMES[kind] in caplog.text


@pytest.mark.parametrize("kind", NAMES)
def test_required_raises(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    steps = failing(kind, capture="required")
    with pytest.raises(CaptureError, match=NAMES[kind]):
        steps.prepare(KEY)
    assert len(steps) == 0 and not caplog.records


def test_off_does_not_try() -> None:
    step = failing("refused", capture="off").prepare(KEY)
    assert not step.is_captured


def test_required_on_a_device_without_graphs() -> None:
    with pytest.raises(CaptureError, match="device cpu has no graphs"):
        StepCache(build(SmallNetwork), device="cpu", capture="required")


@pytest.mark.parametrize("capture", ["auto", "required"])
@pytest.mark.parametrize(
    ("key", "what"),
    [
        (replace(KEY, shape=(64, 4, 64, 64)), "buffers"),
        (replace(KEY, noise_table=True, max_steps=1024), "buffers"),
        (replace(KEY, shape=(6, 4, 64, 64)), "activations"),
    ],
    ids=["batch", "noise-table", "activations"],
)
def test_what_does_not_fit_is_said_before_capture(key: ShapeKey, what: str, capture: str) -> None:
    graphs = TracedGraphs(free=2**20)
    steps, _ = cache(small_weights(), graphs, capture=capture)
    steps.prepare(KEY)
    shape = re.escape(str(key.shape))
    with pytest.raises(InvalidShape, match=rf"{shape} needs .* for its {what} .*0.000977"):
        steps.prepare(key)
    assert (graphs.captures, key in steps) == (1, False)


MOVES = {
    "other-storage": lambda network: setattr(network, "weights", network.weights.clone()),
    "dtype": lambda network: setattr(network, "weights", network.weights.half()),
    "other-view": lambda network: setattr(network, "weights", network.weights.transpose(1, 2)),
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_weights_that_moved_after_capture_are_named(move) -> None:
    networks: list[SmallNetwork] = []

    def remember(key: ShapeKey, buffers: StepBuffers) -> SmallNetwork:
        networks.append(SmallNetwork(key, buffers, small_weights()))
        return networks[-1]

    graphs, request = TracedGraphs(), Request()
    step = StepCache(remember, device="cpu", graphs=graphs).prepare(KEY)
    step.load(**request.arguments)
    step.run()
    move(networks[0])
    step.load(**request.arguments)
    with pytest.raises(CaptureError, match="storage of 'weights' changed after capture"):
        step.run()
    assert graphs.replays == request.num_steps  # not one more


def test_conditioning_that_moved_after_capture_is_named() -> None:
    prompt = torch.zeros(2, 2, 2, CHANNELS)
    request = Request(guidance=7.5, prompt=prompt)
    step = cache(small_weights())[0].prepare(replace(KEY, branches=2))
    step.buffers.conditioning["prompt"] = prompt.clone()
    step.load(**request.arguments)
    with pytest.raises(CaptureError, match="storage of 'prompt' changed"):
        step.run()


def test_a_wrong_network_is_not_taken_for_a_failed_capture() -> None:
    class Short(SmallNetwork):
        def __call__(self, next_input: Tensor, k: Tensor) -> list[Tensor | None]:
            return super().__call__(next_input, k)[:1]

    class Missing(SmallNetwork):
        def __call__(self, next_input: Tensor, k: Tensor) -> list[Tensor | None]:
            raise BackendUnavailable("no such kernel")

    for network, error in ((Short, InvalidShape), (Missing, BackendUnavailable)):
        with pytest.raises(error, match=r"returned 1 outputs|^no such kernel"):
            StepCache(build(network), device="cpu", graphs=TracedGraphs()).prepare(KEY)


def test_each_run_wants_a_request() -> None:
    step = StepCache(build(SmallNetwork), device="cpu").prepare(KEY)
    with pytest.raises(ValueError, match="load"):
        step.run()
    step.load(**Request().arguments)
    step.run()
    with pytest.raises(ValueError, match="load"):
        step.run()


@pytest.mark.parametrize("settings", [dict(capacity=0), dict(capture="maybe")])
def test_settings_outside_of_their_range(settings: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        StepCache(build(SmallNetwork), device="cpu", **settings)


def test_steps_do_not_record_gradients() -> None:
    weights = small_weights().requires_grad_()
    step = StepCache(lambda key, buffers: SmallNetwork(key, buffers, weights), device="cpu")
    step = step.prepare(KEY)
    step.load(**Request().arguments)
    assert not step.run().requires_grad and torch.is_grad_enabled()
