# SPDX-License-Identifier: Apache-2.0
"""Our contenders: all objectives in one forward, in a step on static buffers, captured on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from benchmarks.contenders.contender import Contender
from benchmarks.contenders.request import Request
from benchmarks.contenders.stock import with_adapters
from msdda_fast.batched.exported import ExportedForward
from msdda_fast.batched.options import BatchedOptions
from msdda_fast.batched.unet import BatchedUNet
from msdda_fast.engine.buffers import ShapeKey, StepBuffers
from msdda_fast.engine.graph import CapturedStep, StepCache
from msdda_fast.engine.step import Network, Predict

__all__ = ["batched", "captured_copies", "in_our_step", "step_key"]


class Batched:
    """A `BatchedUNet` as the network of a step."""

    def __init__(self, unet: BatchedUNet, run: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._unet, self._run = unet, run

    @property
    def kinds(self) -> Mapping[str, Predict]:
        return {"exact": lambda next_input, k: self._run(next_input[0], k)}

    def storages(self) -> Mapping[str, Tensor]:
        return self._unet.storages()


class Copies:
    """Stock networks one after another, as the network of a step."""

    def __init__(self, request: Request, buffers: StepBuffers, unets: Sequence[nn.Module]) -> None:
        self._conditions = request.conditions()
        self._timesteps = buffers.timesteps
        self._unets = unets
        self._branches = request.branches

    @property
    def kinds(self) -> Mapping[str, Predict]:
        return {"exact": self._predict}

    def _predict(self, next_input: Tensor, k: Tensor) -> list[Tensor]:
        t = self._timesteps.index_select(0, k[None])[0]
        rows = next_input.flatten(0, 1)
        outputs = [unet(rows, t, return_dict=False, **self._conditions)[0] for unet in self._unets]
        return [output.unflatten(0, (self._branches, -1)) for output in outputs]

    def storages(self) -> Mapping[str, Tensor]:
        return {
            f"{i}.{name}": parameter
            for i, unet in enumerate(self._unets)
            for name, parameter in unet.named_parameters()
        }


class _Runner:
    """Runs the steps of one request, which is loaded again after the last one."""

    def __init__(self, request: Request, count: int, step: CapturedStep) -> None:
        self._request, self._step = request, step
        self._table = request.table(count)
        self._next = len(self._table)

    def first(self) -> None:
        self._step.load(self._table, self._request.x, seeds=self._request.seeds)
        self._next = 0

    def step(self) -> Tensor:
        if self._next == len(self._table):
            self.first()
        self._step.step(self._next)
        self._next += 1
        return self._step.buffers.x

    def loop(self) -> Tensor:
        self.first()
        self._next = len(self._table)
        return self._step.run()


def batched(
    request: Request,
    count: int,
    options: BatchedOptions,
    *,
    capture: bool = True,
    compile: bool = False,
    openvino: bool = False,
    backend: str = "auto",
) -> Contender:
    """Return the contender with M objectives in one forward and one fused step.

    Args:
        request: What to run.
        count: M.
        options: How the forward is built.
        capture: Replay a graph if the device supports them; never fall back silently.
        compile: Pass the step through `torch.compile`.
        openvino: Run the forward through OpenVINO.
        backend: Backend of the fused step.
    """
    nhwc = request.device.type == "cuda" if options.channels_last is None else options.channels_last
    variants = request.model.in_channels_last() if nhwc else request.model.variants
    variants = variants[:count]
    unet = BatchedUNet.of(variants, options)
    unet.begin(request.prompts[None], request.scheduler.timesteps, request.added())

    run = ExportedForward(unet, request.shape) if openvino else unet

    def build(key: ShapeKey, buffers: StepBuffers) -> Network:
        return Batched(unet, run)

    key = step_key(request, count, channels_last=nhwc)
    step = _cache(request, build, capture, compile, backend).prepare(key)
    runner = _Runner(request, count, step)
    network = step.buffers.next_input
    base = with_adapters(variants[0].network, [variant.adapter for variant in variants])
    return Contender(
        runner.step,
        runner.loop,
        [{m: 1.0} for m in range(count)],
        [*base, *unet.parameters(), *unet.buffers()],
        forward=None if openvino else lambda: unet(network[0], step.buffers.counter),
        first=runner.first,
        compiled=compile or openvino,
    )


def captured_copies(request: Request, count: int, *, compile: bool) -> Contender:
    """Return merged copies of the stock network, run one after another in the same captured step.

    Args:
        request: What to run.
        count: M; 0: the base model alone.
        compile: Pass the step through `torch.compile`.
    """
    systems: list[dict[int, float] | None] = [{m: 1.0} for m in range(count)] or [None]
    unets = [
        request.model.plain(system or {}).to(memory_format=torch.channels_last)
        for system in systems
    ]
    key = step_key(request, len(systems), channels_last=True, input_rows=request.branches)
    parameters = [p for unet in unets for p in unet.parameters()]
    return in_our_step(
        request,
        key,
        systems,
        lambda buffers: Copies(request, buffers, unets),
        parameters,
        compile=compile,
    )


def in_our_step(
    request: Request,
    key: ShapeKey,
    systems: Sequence[Mapping[int, float] | None],
    network: Callable[[StepBuffers], Network],
    parameters: Sequence[Tensor],
    *,
    compile: bool = False,
    compiled: bool = False,
) -> Contender:
    """Return other networks in our step; `systems` and `parameters` as in `Contender`."""

    def build(key: ShapeKey, buffers: StepBuffers) -> Network:
        return network(buffers)

    step = _cache(request, build, True, compile, "auto").prepare(key)
    runner = _Runner(request, len(systems), step)
    return Contender(
        runner.step, runner.loop, systems, parameters,
        first=runner.first, compiled=compile or compiled,
    )  # fmt: skip


def step_key(request: Request, count: int, *, channels_last: bool, input_rows: int = 1) -> ShapeKey:
    """Return the key of our step for M objectives; `input_rows` copies of x go into the network."""
    table = request.table(count)
    return ShapeKey(
        shape=request.shape,
        active=(True,) * count,
        branches=request.branches,
        clip_range=table.clip_range,
        dtype=request.dtype,
        input_rows=input_rows,
        channels_last=channels_last,
    )


def _cache(request: Request, build, capture: bool, compile: bool, backend: str) -> StepCache:
    on_gpu = request.device.type == "cuda"
    return StepCache(
        build,
        device=request.device,
        capture="required" if capture and on_gpu else "off",
        compile=compile,
        backend=backend,
    )
