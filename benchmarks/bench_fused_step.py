# SPDX-License-Identifier: Apache-2.0
"""The fused step against what it replaces: diffusers' `DDIMScheduler.step` per objective and Eq. 7.

    pytest benchmarks/bench_fused_step.py

Every contender starts from the same raw network outputs (M, 2, B, *S) and is checked against
`reference.py` in float64 before it is timed. `copy` moves as many bytes as the fused step must read
and write. The pytest-benchmark table shows the native step; the ratios, with spread, machine and
commit, go to results/fused_step.jsonl (`python benchmarks/report.py` makes the README table).
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from benchmarks.harness import append, interleaved, surroundings
from msdda_fast.kernels import registry
from msdda_fast.kernels.counter_noise import counter_noise
from msdda_fast.kernels.fused_step import fused_ddim_step
from msdda_fast.reference import ddim_posterior, fuse_posteriors, guide
from msdda_fast.schedule import StepCoefficients, coefficient_table

GUIDANCE, NUM_STEPS, STEP = 7.5, 50, 20
COPY_BYTES = 32e6  # below, a step lives in the caches and a copy says little about it
SD, VIDEO = (4, 64, 64), (16, 21, 60, 104)


class Case(NamedTuple):
    """One size: latents (B, *S) and M objectives, float32."""

    name: str
    shape: tuple[int, ...]
    count: int

    def __str__(self) -> str:
        return f"{self.name}-M{self.count}"


CASES = [
    *(Case("SD", (1, *SD), count) for count in (2, 3, 4, 8)),
    Case("SD batch", (4, *SD), 2),
    *(Case("video", (1, *VIDEO), count) for count in (2, 3, 4, 8)),
    Case("100 MB", (218, *SD), 2),
]


def scheduler_sd15() -> DDIMScheduler:
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    scheduler.set_timesteps(NUM_STEPS)
    return scheduler


class Inputs:
    """Random inputs of one case, and the contenders that turn them into x_prev."""

    def __init__(self, case: Case) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(case.shape, generator=generator)
        self.outputs = torch.randn((case.count, 2, *case.shape), generator=generator)
        self.seeds = torch.arange(case.shape[0])
        self.noise = counter_noise(self.seeds, case.shape, step=STEP)
        self.etas = torch.linspace(0.8, 1.0, case.count, dtype=torch.float64)
        self.weights = torch.full((case.count,), 1 / case.count, dtype=torch.float64)
        self.scheduler = scheduler_sd15()
        self.no_noise = torch.zeros_like(self.x)

    def bytes_moved(self) -> int:
        """x, outputs and noise read, x_prev written."""
        return 4 * (self.outputs.numel() + 3 * self.x.numel())

    def coefficients(self) -> StepCoefficients:
        table = coefficient_table(
            self.scheduler,
            NUM_STEPS,
            etas=self.etas,
            weights=self.weights,
            guidance_scale=GUIDANCE,
        )
        return table[STEP]

    def diffusers(self, noise: Tensor | None) -> Tensor:
        """The stock way: guidance and `DDIMScheduler.step` per objective, then Eq. 7."""
        t = self.scheduler.timesteps[STEP]
        variance = self.scheduler._get_variance(t, t - 1000 // NUM_STEPS)
        means, variances = [], []
        for (uncond, cond), eta in zip(self.outputs, self.etas.tolist(), strict=True):
            guided = uncond + GUIDANCE * (cond - uncond)
            step = self.scheduler.step(guided, t, self.x, eta=eta, variance_noise=self.no_noise)
            means.append(step.prev_sample)
            variances.append(eta**2 * variance)
        terms = list(zip(self.weights.tolist(), variances, means, strict=True))
        precision = sum(w / var for w, var, _ in terms)
        mean = sum(w / var * mu for w, var, mu in terms) / precision
        noise = torch.randn_like(mean) if noise is None else noise
        return mean + precision**-0.5 * noise

    def exact(self) -> Tensor:
        """`reference.py` in float64."""
        t = int(self.scheduler.timesteps[STEP])
        ends = [float(self.scheduler.alphas_cumprod[i]) for i in (t, t - 1000 // NUM_STEPS)]
        x = self.x.double()
        moments = [
            ddim_posterior(x, guide(*output.double(), GUIDANCE), *ends, eta)
            for output, eta in zip(self.outputs, self.etas.tolist(), strict=True)
        ]
        means, variances = (torch.stack(list(part)) for part in zip(*moments, strict=True))
        mean, variance = fuse_posteriors(means, variances, self.weights)
        return mean + variance.sqrt() * self.noise.double()


def contenders(inputs: Inputs) -> dict[str, Callable[[], Tensor]]:
    row = inputs.coefficients()

    def fused(backend: str, **noise: object) -> Callable[[], Tensor]:
        return lambda: fused_ddim_step(inputs.x, inputs.outputs, row, backend=backend, **noise)

    given, drawn = {"noise": inputs.noise}, {"seeds": inputs.seeds, "step": STEP}
    runs = {
        "diffusers": lambda: inputs.diffusers(inputs.noise),
        "eager": fused("eager", **given),
        "native": fused("native", **given),
        "diffusers, noise drawn": lambda: inputs.diffusers(None),
        "native, noise drawn": fused("native", **drawn),
    }
    if (moved := inputs.bytes_moved()) >= COPY_BYTES:
        source, target = torch.ones(moved // 8), torch.empty(moved // 8)
        runs["copy"] = lambda: target.copy_(source)
    return runs


def verify(inputs: Inputs, runs: dict[str, Callable[[], Tensor]]) -> None:
    """Fused steps err at most twice as much as the stock way, plus one ulp of the largest value."""
    exact = inputs.exact()
    error = {
        name: float((run().double() - exact).abs().max())
        for name, run in runs.items()
        if name not in ("copy", "diffusers, noise drawn")
    }
    ulp = torch.finfo(torch.float32).eps * float(exact.abs().max())
    wrong = {name: e for name, e in error.items() if not e <= 2 * error["diffusers"] + ulp}
    assert not wrong, f"not timed, because wrong: {wrong}; diffusers: {error['diffusers']}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fused_step(case: Case, benchmark) -> None:
    if not registry.available("native"):
        pytest.skip(registry.explain()["native"])
    inputs = Inputs(case)
    runs = contenders(inputs)
    with torch.no_grad():
        verify(inputs, runs)
        timings = interleaved(runs, seconds=4.0)
        benchmark.pedantic(runs["native"], rounds=20, warmup_rounds=2)
    shared = surroundings() | {
        "case": case.name,
        "shape": list(case.shape),
        "num_objectives": case.count,
        "dtype": "float32",
        "bytes": inputs.bytes_moved(),
    }
    append(
        "fused_step", [shared | {"contender": name} | timing for name, timing in timings.items()]
    )
    median = {name: timing["median_us"] for name, timing in timings.items()}
    benchmark.extra_info |= {
        "diffusers / native": round(median["diffusers"] / median["native"], 2),
    }
    if "copy" in median:
        benchmark.extra_info["native / copy"] = round(median["native"] / median["copy"], 2)
