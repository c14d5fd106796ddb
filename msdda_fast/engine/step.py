# SPDX-License-Identifier: Apache-2.0
"""One reverse step over static buffers: the unit that is traced, compiled or captured.

Nothing here allocates between steps, waits for the device or branches on a tensor's value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from msdda_fast.engine.buffers import ShapeKey, StepBuffers
from msdda_fast.engine.pixel_buffers import PixelBuffers
from msdda_fast.errors import InvalidShape
from msdda_fast.kernels import registry
from msdda_fast.kernels.fused_step._ops import Operators
from msdda_fast.kernels.fused_step._pixelwise import run_pixelwise
from msdda_fast.kernels.raw import FusedStepBackend, RunLinear, RunMoments
from msdda_fast.tracing import is_watched

__all__ = ["Network", "Outputs", "Predict", "Shared", "Step", "by_objective"]

#: (M, K, B, *S), or M tensors (K, B, *S); None for an objective that was not evaluated.
Outputs = Tensor | Sequence[Tensor | None]

#: One way in which a network evaluates its objectives; see `Network.kinds`.
Predict: TypeAlias = Callable[[Tensor, Tensor], Outputs]


class Shared(NamedTuple):
    """A way in which several processes evaluate the objectives of a step together.

    Attributes:
        evaluate: `f(next_input, k)` writes this process's share to static storage; it is captured.
        gather: `f(x_t)` returns the outputs of all processes. It runs after `evaluate`, outside of
            a graph: it may wait for other processes, and is called once per step.
    """

    evaluate: Callable[[Tensor, Tensor], None]
    gather: Callable[[Tensor], Outputs]


class Network(Protocol):
    """The networks of all objectives over static storage, as one function of the step.

    There may be several kinds of step, such as exact and approximate, and each step of a request is
    of one kind. One kind may read what another has written to the storage.
    """

    @property
    def kinds(self) -> Mapping[str, Predict | Shared]:
        """Functions `f(next_input, k)` by name, each evaluating every active objective.

        `next_input` is `StepBuffers.next_input`, (R, B, *S) latents in the network's dtype, and k
        the step index, 0-d int64 on the device, which selects an entry of tables such as
        `StepBuffers.timesteps`. The result is of type `Outputs`, in the unit of the scheduler's
        prediction type: one dtype, at most float32, branches in the order (uncond, cond).

        A function that is captured must not read a value on the host or branch on one, and under a
        tracer (`tracing.is_watched`) its own kernels must be operators of `torch.library`.
        """

    def storages(self) -> Mapping[str, Tensor]:
        """Return the current tensors that a graph reads at fixed addresses, by name.

        These are weights, adapter factors, keys and values. Their contents may change in place
        (`copy_`).
        """


class _Raw(NamedTuple):
    """Functions of a backend: its module itself could not be copied with a pipeline."""

    run: RunLinear
    run_moments: RunMoments


class Step:
    """x_t to x_{t-1} in place: network, fused step with the next input, counter.

    Args:
        predict: Evaluates the active objectives, alone or with other processes.
        key: Key of the buffers that this step runs on.
        device: Device of the buffers.
        backend: Backend of the fused step: "auto", or one by name.

    Raises:
        BackendUnavailable: The named backend cannot run on the device.
    """

    def __init__(
        self,
        predict: Predict | Shared,
        key: ShapeKey,
        *,
        device: torch.device | str,
        backend: str = "auto",
    ) -> None:
        device_type = torch.device(device).type
        self._predict = predict
        self._key = key
        raw = registry.resolve("fused_step", backend, device_type)
        self._raw: FusedStepBackend = _Raw(raw.run, raw.run_moments)
        self._operators = Operators(backend)

    def advance(self, buffers: StepBuffers) -> None:
        """Do step `buffers.counter` on `buffers.x`, and increment the counter.

        Of a step that is shared with other processes, this is the part that a graph may record;
        then call `finish`.

        Raises:
            InvalidShape: The network's outputs differ from what `Network` specifies.
        """
        if isinstance(self._predict, Shared):
            self._predict.evaluate(buffers.next_input, buffers.counter)
        else:
            self._fuse(buffers, self._predict(buffers.next_input, buffers.counter))

    @property
    def finish(self) -> Callable[[StepBuffers], None] | None:
        """What follows `advance`, outside of graphs; None: nothing."""
        if not isinstance(self._predict, Shared):
            return None
        gather = self._predict.gather
        return lambda buffers: self._fuse(buffers, gather(buffers.x))

    def _fuse(self, buffers: StepBuffers, predicted: Outputs) -> None:
        outputs = by_objective(predicted)
        self._check(outputs)
        raw = self._operators if is_watched(buffers.x) else self._raw
        seeds = buffers.seeds if buffers.noise is None else None
        if buffers.pixels is not None:
            self._fuse_pixels(raw, buffers, buffers.pixels, outputs, seeds)
        else:
            raw.run(
                buffers.x,
                buffers.x,
                outputs,
                buffers.rows,
                step=buffers.counter,
                clip_range=self._key.clip_range,
                noise=buffers.noise,
                seeds=seeds,
                next_input=buffers.next_input,
            )
        buffers.counter.add_(1)

    def _fuse_pixels(
        self,
        raw: FusedStepBackend,
        buffers: StepBuffers,
        pixels: PixelBuffers,
        outputs: Sequence[Tensor | None],
        seeds: Tensor | None,
    ) -> None:
        variances, weights = pixels.at(buffers.counter)
        noise = buffers.noise
        run_pixelwise(
            raw,
            buffers.x,
            buffers.x,
            outputs,
            pixels.means.unbind(),
            pixels.rows,
            variances,
            weights,
            step=buffers.counter,
            clip_range=self._key.clip_range,
            noise=None if noise is None else noise.index_select(0, buffers.counter.view(1))[0],
            seeds=seeds,
        )
        buffers.next_input.copy_(buffers.x)

    def _check(self, outputs: Sequence[Tensor | None]) -> None:
        active = self._key.active
        expected = (self._key.branches, *self._key.shape)
        if len(outputs) != len(active):
            raise InvalidShape(
                f"the network returned {len(outputs)} outputs, expected {len(active)}"
            )
        for m, output in enumerate(outputs):
            if output is None:
                if active[m] and len(self._key.runs) < 2:
                    raise InvalidShape(f"the network returned None for active objective {m}")
            elif output.shape != expected:
                raise InvalidShape(
                    f"output {m} of the network has shape {tuple(output.shape)}, expected "
                    f"(K, B, *S) = {expected}"
                )
        dtypes = {output.dtype for output in outputs if output is not None}
        if len(dtypes) != 1 or not dtypes <= {torch.float32, torch.float16, torch.bfloat16}:
            raise InvalidShape(
                f"the network returned outputs of {sorted(map(str, dtypes))}, expected one dtype, "
                "float32 or narrower"
            )


def by_objective(outputs: Outputs) -> list[Tensor | None]:
    """Return the outputs as a list of M, (K, B, *S) each, or None."""
    return list(outputs.unbind()) if isinstance(outputs, Tensor) else list(outputs)
