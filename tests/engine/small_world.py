# SPDX-License-Identifier: Apache-2.0
"""A network with two objectives, a prompt and timesteps; requests for it; a recorder of steps."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from unittest import mock

import torch
from torch import Tensor
from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.proxy_tensor import make_fx

from msdda_fast.engine.buffers import ShapeKey, StepBuffers
from msdda_fast.engine.graph import StepCache
from msdda_fast.engine.graph_backends import Advance
from msdda_fast.engine.step import Network, Predict
from msdda_fast.kernels.fused_step import fused_ddim_step
from msdda_fast.steps.coefficients import CoefficientTable
from msdda_fast.steps.table import coefficient_table
from tests.gaussian_world import sd15_scheduler

SHAPE = (2, 4, 6, 6)
CHANNELS = SHAPE[1]
KEY = ShapeKey(shape=SHAPE, active=(True, True))


def drawn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def predict(weight: Tensor, x: Tensor, t: Tensor, prompt: Tensor | None = None) -> Tensor:
    """x (B, *S), t 0-d int64, prompt (B, C): something of x's shape that all of them matter to."""
    mixed = torch.tensordot(x, weight, dims=([1], [1])).movedim(-1, 1)
    output = torch.sin(mixed) + 0.001 * t * mixed
    return output if prompt is None else output + prompt[:, :, None, None]


class SmallNetwork:
    """M objectives with a matrix each; with a prompt (M, K, B, C) when K = 2."""

    def __init__(self, key: ShapeKey, buffers: StepBuffers, weights: Tensor) -> None:
        self.weights = weights  # (M, C, C)
        self.key, self.timesteps = key, buffers.timesteps
        if key.branches == 2:
            size = (len(key.active), 2, key.shape[0], CHANNELS)
            buffers.conditioning["prompt"] = torch.zeros(size, device=buffers.x.device)
        self.prompt = buffers.conditioning.get("prompt")

    @property
    def kinds(self) -> Mapping[str, Predict]:
        return {"exact": self}

    def __call__(self, next_input: Tensor, k: Tensor) -> list[Tensor | None]:
        t = self.timesteps.index_select(0, k.view(1))[0]
        x = next_input[0]
        outputs: list[Tensor | None] = []
        for m, active in enumerate(self.key.active):
            if not active:
                outputs.append(None)
            elif self.prompt is None:
                outputs.append(predict(self.weights[m], x, t)[None])
            else:
                halves = [predict(self.weights[m], x, t, self.prompt[m, i]) for i in (0, 1)]
                outputs.append(torch.stack(halves))
        return outputs

    def storages(self) -> Mapping[str, Tensor]:
        return {"weights": self.weights}


def small_weights(device: str = "cpu") -> Tensor:
    return 0.3 * drawn(2, CHANNELS, CHANNELS, seed=1).to(device)


def builder(weights: Tensor) -> Callable[[ShapeKey, StepBuffers], Network]:
    return lambda key, buffers: SmallNetwork(key, buffers, weights)


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request, and what the plain loop makes of it."""

    num_steps: int = 5
    etas: tuple[float, ...] = (0.8, 1.0)
    weights: object = ((0.3, 0.7), (0.6, 0.4))
    guidance: float = 1.0
    seeds: tuple[int, ...] | None = (1, 2)
    noise: Tensor | None = None
    x_T: Tensor | None = None
    prompt: Tensor | None = None

    @property
    def table(self) -> CoefficientTable:
        return coefficient_table(
            sd15_scheduler(),
            self.num_steps,
            etas=self.etas,
            weights=self.weights,
            guidance_scale=self.guidance,
        )

    @property
    def start(self) -> Tensor:
        return drawn(*SHAPE) if self.x_T is None else self.x_T

    @property
    def arguments(self) -> dict[str, object]:
        conditioning = None if self.prompt is None else {"prompt": self.prompt}
        return {
            "table": self.table,
            "x_T": self.start,
            "seeds": self.seeds,
            "noise": self.noise,
            "conditioning": conditioning,
        }

    def expected(self, weights: Tensor, backend: str = "auto") -> Tensor:
        """One public fused step after another, on the device of `weights`."""
        x, table = self.start.to(weights.device), self.table.to(weights.device)
        for k, t in enumerate(table.timesteps):
            if self.prompt is None:
                outputs = [predict(weight, x, t)[None] for weight in weights]
            else:
                outputs = [
                    torch.stack([predict(weight, x, t, prompt[i]) for i in (0, 1)])
                    for weight, prompt in zip(weights, self.prompt.to(weights.device), strict=True)
                ]
            noise = None if self.noise is None else self.noise[k].to(weights.device)
            x = fused_ddim_step(
                x, outputs, table[k], seeds=self.seeds, noise=noise, step=k, backend=backend
            )
        return x


class TracedGraph:
    def __init__(self, owner: "TracedGraphs", module: torch.nn.Module, tensors: list[Tensor]):
        self.owner, self.module, self.tensors = owner, module, tensors

    def replay(self) -> None:
        self.owner.replays += 1
        with torch.no_grad():
            self.module(*self.tensors)

    def release(self) -> None:
        self.owner.alive -= 1
        self.module = None


class TracedGraphs:
    """Records the operators of a step on the CPU, and repeats them on the same storage."""

    def __init__(self, free: int = 2**40) -> None:
        self.captures = self.replays = self.alive = 0
        self.free = free

    def capture(self, advance: Advance, buffers: StepBuffers) -> TracedGraph:
        advance(buffers)
        names = [f.name for f in fields(buffers) if isinstance(getattr(buffers, f.name), Tensor)]
        own = [] if buffers.pixels is None else [f.name for f in fields(buffers.pixels)]

        # inputs, not constants: reading the value of a constant would go unnoticed
        def traced(*tensors: Tensor) -> None:
            given = dict(zip(names, tensors, strict=False))
            if buffers.pixels is not None:
                of_pixels = dict(zip(own, tensors[len(names) :], strict=True))
                given["pixels"] = replace(buffers.pixels, **of_pixels)
            advance(replace(buffers, **given))

        tensors = [getattr(buffers, name) for name in names]
        tensors += [getattr(buffers.pixels, name) for name in own]
        # metadata of every value, which nobody reads: most of the time of a trace
        with mock.patch.object(proxy_tensor, "extract_val", lambda *values, **options: None):
            module = make_fx(traced)(*tensors)
        self.captures += 1
        self.alive += 1
        return TracedGraph(self, module, tensors)

    def free_bytes(self) -> int:
        return self.free


def cache(
    weights: Tensor, graphs: TracedGraphs | None = None, **settings: object
) -> tuple[StepCache, TracedGraphs]:
    graphs = TracedGraphs() if graphs is None else graphs
    return StepCache(builder(weights), device="cpu", graphs=graphs, **settings), graphs
