# SPDX-License-Identifier: Apache-2.0
"""A step never waits, allocates nothing that stays and dispatches a known number of operators."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from msdda_fast.engine.buffers import ShapeKey, StepBuffers
from msdda_fast.engine.dry_run import DryRun, dry_run
from msdda_fast.engine.side_by_side import SideBySide
from msdda_fast.engine.step import Step
from msdda_fast.errors import BackendUnavailable, CaptureError, InvalidShape
from msdda_fast.kernels import registry
from tests.engine.small_world import CHANNELS, KEY, SHAPE, Request, SmallNetwork, small_weights

BACKENDS = [name for name in registry.NAMES if registry.available(name)]
GUIDED = replace(KEY, branches=2)
KEYS = {
    "plain": KEY,
    "guided": GUIDED,
    "clipped": replace(KEY, clip_range=1.0),
    "noise-table": replace(KEY, noise_table=True),
    "half-rows": replace(KEY, dtype=torch.float16, input_rows=2, channels_last=True),
}

PIXELS = {
    "pixels": replace(KEY, pixelwise=2),
    "pixels-clipped-noise-table": replace(KEY, pixelwise=2, clip_range=1.0, noise_table=True),
}
EVERY = {**KEYS, **PIXELS}


class Constant:
    """A network of no operators: what remains is the step's own."""

    def __init__(self, outputs: object) -> None:
        self.outputs = outputs

    def __call__(self, next_input: Tensor, k: Tensor) -> object:
        return self.outputs

    def storages(self) -> dict[str, Tensor]:
        return {}


class Calling(Constant):
    """A network that is a function."""

    def __init__(self, function: Callable[[Tensor, Tensor], object]) -> None:
        self.function = function

    def __call__(self, next_input: Tensor, k: Tensor) -> object:
        return self.function(next_input, k)


def dry_run_of(network: object, key: ShapeKey = KEY, backend: str = "auto") -> DryRun:
    buffers = StepBuffers.allocate(key, "cpu")
    return dry_run(Step(network, key, device="cpu", backend=backend).advance, buffers)


@pytest.mark.parametrize("key", EVERY.values(), ids=EVERY)
def test_no_value_is_read(key: ShapeKey) -> None:
    """Reading one raises DataDependentOutputException; on a GPU it would be a device sync."""
    with FakeTensorMode():
        buffers = StepBuffers.allocate(key, "cpu")
        weights = torch.zeros(2, CHANNELS, CHANNELS, dtype=key.dtype)
        Step(SmallNetwork(key, buffers, weights), key, device="cpu").advance(buffers)


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
def test_a_step_is_two_operators_and_the_network(key: ShapeKey) -> None:
    outputs = torch.zeros(2, key.branches, *SHAPE)
    backend = "native" if "native" in BACKENDS else BACKENDS[-1]
    operators = dry_run_of(Constant(list(outputs)), key, backend).operators
    assert operators == ("msdda_fast.fused_step_.default", "aten.add_.Tensor")


def test_weights_of_pixels_cost_a_mean_for_each_objective() -> None:
    key = PIXELS["pixels"]
    outputs = list(torch.zeros(2, key.branches, *SHAPE))
    operators = dry_run_of(Constant(outputs), key).operators
    work = [name for name in operators if name.startswith("msdda_fast")]
    assert work == ["msdda_fast.fused_step_.default"] * 2 + ["msdda_fast.fused_moments_.default"]


def test_operators_of_the_small_network_are_counted() -> None:
    """A change here is a change of what every step of every image costs."""
    buffers = StepBuffers.allocate(GUIDED, "cpu")
    network = SmallNetwork(GUIDED, buffers, small_weights())
    operators = dry_run(Step(network, GUIDED, device="cpu").advance, buffers).operators
    views = ("aten.view", "aten._unsafe_view", "aten.permute", "aten.select", "aten.unsqueeze")
    assert Counter(name for name in operators if not name.startswith(views)) == {
        "aten.index_select.default": 1,  # the timestep
        "aten.clone.default": 4,  # from here: M K times
        "aten.mm.default": 4,
        "aten.sin.default": 4,
        "aten.mul.Tensor": 8,
        "aten.add.Tensor": 8,
        "aten.stack.default": 2,  # M times
        "msdda_fast.fused_step_.default": 1,
        "aten.add_.Tensor": 1,
    }


def test_a_dry_run_changes_nothing_and_knows_the_memory() -> None:
    buffers = StepBuffers.allocate(KEY, "cpu")
    buffers.load(**Request().arguments)
    before = [buffers.x.clone(), buffers.next_input.clone(), buffers.counter.clone()]
    size = buffers.x.nbytes

    def network(next_input: Tensor, k: Tensor) -> list[Tensor]:
        a = next_input[0] + 1
        b = a + 1  # a and b
        del a
        c = b + 1  # b and c
        d = b + c  # b, c and d
        del b, c
        return [d[None], d[None] + 1]

    result = dry_run(Step(Calling(network), KEY, device="cpu").advance, buffers)
    assert result.peak_bytes == 3 * size
    for tensor, kept in zip((buffers.x, buffers.next_input, buffers.counter), before, strict=True):
        assert tensor.equal(kept)


def test_weights_are_not_counted_as_memory_of_a_step() -> None:
    weights = small_weights()

    def network(next_input: Tensor, k: Tensor) -> list[Tensor]:
        outputs = torch.zeros(2, 1, *SHAPE)
        return [outputs[0] + weights.transpose(1, 2)[0, 0, 0], outputs[1]]

    assert dry_run_of(Calling(network)).peak_bytes == 3 * StepBuffers.allocate(KEY, "cpu").x.nbytes


class TestWhatBreaksACaptureIsNamed:
    @pytest.mark.parametrize(
        ("function", "operator"),
        [
            (lambda x, k: float(x.sum()), "aten._local_scalar_dense"),
            (lambda x, k: [1, 2][int(k)], "aten._local_scalar_dense"),
            (lambda x, k: 1.0 if x.sum() > 0 else 2.0, "aten._local_scalar_dense"),
            (lambda x, k: x[x > 0].sum(), "aten.index.Tensor"),
        ],
        ids=["item", "host-index", "branch", "boolean-index"],
    )
    def test_reading_values(self, function: Callable, operator: str) -> None:
        def network(next_input: Tensor, k: Tensor) -> Tensor:
            return next_input.expand(2, *SHAPE)[:, None] * function(next_input, k)

        with pytest.raises(CaptureError, match=operator):
            dry_run_of(Calling(network))

    @pytest.mark.parametrize(
        ("function", "operator"),
        [
            (lambda x: x.cpu(), "aten._to_copy"),
            (lambda x: x.copy_(torch.zeros(x.shape)), "aten.copy_"),
        ],
        ids=["to-host", "from-host"],
    )
    def test_copies_between_devices(self, function: Callable, operator: str) -> None:
        """The device without data stands for a GPU."""
        buffers = StepBuffers.allocate(KEY, "meta")
        step = Step(Calling(lambda x, k: function(x)), KEY, device="cpu")
        with pytest.raises(CaptureError, match=rf"{operator}.*between \['cpu', 'meta'\]"):
            dry_run(step.advance, buffers)


class TestOutputsThatAreRefused:
    @pytest.mark.parametrize(
        ("outputs", "message"),
        [
            ([torch.zeros(1, *SHAPE)], "returned 1 outputs, expected 2"),
            ([torch.zeros(1, *SHAPE), None], "None for active objective 1"),
            (torch.zeros(2, *SHAPE), r"output 0 of the network has shape \(2, 4, 6, 6\)"),
            (torch.zeros(2, 2, *SHAPE), r"expected \(K, B, \*S\) = \(1, 2, 4, 6, 6\)"),
            (torch.zeros(2, 1, *SHAPE, dtype=torch.float64), "torch.float64"),
            ([torch.zeros(1, *SHAPE), torch.zeros(1, *SHAPE).half()], "one dtype"),
        ],
    )
    def test_by_name(self, outputs: object, message: str) -> None:
        step = Step(Constant(outputs), KEY, device="cpu")
        with pytest.raises(InvalidShape, match=message):
            step.advance(StepBuffers.allocate(KEY, "cpu"))

    def test_a_backend_that_is_missing(self) -> None:
        with pytest.raises(BackendUnavailable, match="abacus"):
            Step(Constant(None), KEY, device="cpu", backend="abacus")


def test_networks_side_by_side_are_one_network() -> None:
    weights = small_weights()
    buffers = StepBuffers.allocate(KEY, "cpu")
    one = replace(KEY, active=(True,))
    alone = [SmallNetwork(one, buffers, weight[None]) for weight in weights]
    both = SideBySide(alone)
    request = Request()
    buffers.load(**request.arguments)
    step = Step(both, KEY, device="cpu")
    for _ in range(request.num_steps):
        step.advance(buffers)
    assert buffers.x.equal(request.expected(weights))
