# SPDX-License-Identifier: Apache-2.0
"""Compile every Triton kernel as its launches do, for every kind of integer, without a GPU.

Triton's JIT turns an integer argument of 1 into a constant, and knows which are multiples of 16;
each gives another kernel. The package's own launches run here on tensors of the CPU under a driver
that says it has an H100, and compile instead of launching; then once more with each integer
replaced by each of `VALUES`.

python -m tests.kernels.specialised
"""

import itertools
import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from msdda_fast.kernels.counter_noise import _triton as noise
from msdda_fast.kernels.fused_step import _triton as step
from msdda_fast.kernels.group_norm import _triton as norm
from msdda_fast.kernels.grouped_lora import _triton as lora
from msdda_fast.kernels.rowwise import _triton as rowwise
from msdda_fast.steps.coefficients import Layout

VALUES = (0, 1, 2, 15, 16, 17)
#: x, weight, bias and both factors of a layer.
LAYER = ((2, 5, 9), (7, 9), (7,), (2, 4, 9), (2, 7, 4))


class H100:
    """What the JIT asks a driver before it launches anything."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class Compiler:
    """Stands in for launches: compiles what they would run.

    Attributes:
        failures: What did not compile, by kernel and arguments.
        compiled: How many kernels did, by name.
    """

    def __init__(self) -> None:
        self.failures: dict[str, str] = {}
        self.compiled: dict[str, int] = {}
        self._run = JITFunction.run

    def run(self, kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        given = dict(zip(self._names(kernel), args, strict=False)) | kwargs
        numbers = [
            param.name
            for param in kernel.params
            if not param.is_constexpr and type(given[param.name]) is int
        ]
        self._compile(kernel, given, "as launched")
        for name, value in itertools.product(numbers, VALUES):
            self._compile(kernel, given | {name: value}, f"{name}={value}")

    @staticmethod
    def _names(kernel: Any) -> list[str]:
        return [param.name for param in kernel.params]

    def _compile(self, kernel: Any, given: dict[str, Any], what: str) -> None:
        try:
            # in order: an argument of the launch may be named as an option of the JIT is
            args = [given[param.name] for param in kernel.params if param.name in given]
            options = {
                name: value for name, value in given.items() if name not in self._names(kernel)
            }
            self._run(kernel, *args, grid=(1,), warmup=True, **options)
        except Exception as error:
            self.failures[f"{kernel.fn.__name__}, {what}"] = f"{type(error).__name__}: {error}"
        caches = kernel.device_caches[0][0]
        self.compiled[kernel.fn.__name__] = len(caches)


def launches() -> Iterator[Callable[[], object]]:
    """Every way of a launch that selects other code."""
    x, seeds = torch.zeros(2, 5, 3, 3), torch.tensor([1, 2])
    for count, clip_range in itertools.product((2, 17), (None, 1.0)):
        rows = torch.ones(2, Layout(count, clip_range is not None).width)
        outputs = [x[None]] * count
        yield partial(_step, x, outputs, rows, clip_range=clip_range, seeds=seeds)
    for state in (torch.zeros(2, 5), x, x.to(memory_format=torch.channels_last)):
        outputs = [torch.stack([state, state])] * 2
        yield partial(_step, state, outputs, torch.ones(2, 6), noise=state, next_input=state[None])
    for weights in (torch.ones(2, 1), torch.ones(2, 2, 5, 3, 3)):
        yield partial(
            step.run_moments, torch.empty_like(x), [x, x], torch.ones(2, 1), weights, seeds=seeds
        )
    yield partial(noise.run, torch.empty_like(x), seeds, 1, 1)
    yield partial(lora.launch, *(torch.zeros(size) for size in LAYER))
    weight = torch.ones(6)
    for picture in (torch.zeros(2, 6, 3, 3), torch.zeros(1, 6, 1, 1)):
        for shift in (None, weight[None]):
            yield partial(norm.launch, picture, weight, weight, 3, 1e-5, shift, shift is None)
    rows = torch.zeros(4, 6)
    for bias in (None, weight):
        yield partial(rowwise.launch_sum_of, rows, rows, bias)
        yield partial(rowwise.launch_sum_and_norm, rows, rows, bias, bias, bias, 1e-5)
    yield partial(rowwise.launch_geglu, rows)


def _step(state: Tensor, outputs: list[Tensor], rows: Tensor, **options: Any) -> None:
    step.run(torch.empty_like(state), state, outputs, rows, step=1, **options)


def main() -> None:
    driver.set_active(H100())
    compiler = Compiler()
    JITFunction.run = lambda kernel, *args, **kwargs: compiler.run(kernel, *args, **kwargs)
    for launch in launches():
        launch()
    found = {"failures": compiler.failures, "compiled": compiler.compiled}
    print(json.dumps({"triton": triton.__version__} | found))


if __name__ == "__main__":
    main()
