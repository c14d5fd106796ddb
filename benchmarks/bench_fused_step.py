# SPDX-License-Identifier: Apache-2.0
"""The fused step against what it replaces: `DDIMScheduler.step` for every objective, then Eq. 7.

    pytest benchmarks/bench_fused_step.py

Every contender starts from the same raw network outputs (M, 2, B, *S) and is checked against
`reference.py` in float64 before it is timed. `copy` moves as many bytes as the fused step must read
and write. Without a GPU the contenders run on the CPU; with one, the backends are also timed as
captured graphs. The pytest-benchmark table shows one backend; all times, rates and counts go to
results/fused_step.jsonl with machine and commit (`python benchmarks/report.py` makes the
table of docs/results.md).
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from benchmarks.harness import (
    append,
    captured,
    interleaved,
    launches,
    operators,
    surroundings,
)
from msdda_fast.kernels import registry
from msdda_fast.kernels.counter_noise import counter_noise
from msdda_fast.kernels.fused_step import fused_ddim_step
from msdda_fast.reference import ddim_posterior, fuse_posteriors, guide
from msdda_fast.steps.coefficients import StepCoefficients
from msdda_fast.steps.table import coefficient_table

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FAST = [name for name in ("native", "triton") if registry.available(name, DEVICE)]
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
        self.x = torch.randn(case.shape, generator=generator).to(DEVICE)
        self.outputs = torch.randn((case.count, 2, *case.shape), generator=generator).to(DEVICE)
        self.seeds = torch.arange(case.shape[0], device=DEVICE)
        self.noise = counter_noise(self.seeds, case.shape, step=STEP)
        self.etas = torch.linspace(0.8, 1.0, case.count, dtype=torch.float64)
        self.weights = torch.full((case.count,), 1 / case.count, dtype=torch.float64)
        self.scheduler = scheduler_sd15()
        self.no_noise = torch.zeros_like(self.x)

    def bytes_moved(self) -> int:
        """Return the bytes of x, outputs and noise, which are read, and of x_prev, written."""
        return 4 * (self.outputs.numel() + 3 * self.x.numel())

    def coefficients(self) -> StepCoefficients:
        table = coefficient_table(
            self.scheduler,
            NUM_STEPS,
            etas=self.etas,
            weights=self.weights,
            guidance_scale=GUIDANCE,
            device=DEVICE,
        )
        return table[STEP]

    def diffusers(self, noise: Tensor | None) -> Tensor:
        """Do it the stock way: guidance and `DDIMScheduler.step` per objective, then Eq. 7."""
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
        """Return x_prev by `reference.py` in float64."""
        t = int(self.scheduler.timesteps[STEP])
        ends = [float(self.scheduler.alphas_cumprod[i]) for i in (t, t - 1000 // NUM_STEPS)]
        x = self.x.double().cpu()
        moments = [
            ddim_posterior(x, guide(*output.double().cpu(), GUIDANCE), *ends, eta)
            for output, eta in zip(self.outputs, self.etas.tolist(), strict=True)
        ]
        means, variances = (torch.stack(list(part)) for part in zip(*moments, strict=True))
        mean, variance = fuse_posteriors(means, variances, self.weights)
        return mean + variance.sqrt() * self.noise.double().cpu()


def contenders(inputs: Inputs) -> dict[str, Callable[[], Tensor]]:
    row = inputs.coefficients()

    def fused(backend: str, **noise: object) -> Callable[[], Tensor]:
        return lambda: fused_ddim_step(inputs.x, inputs.outputs, row, backend=backend, **noise)

    given, drawn = {"noise": inputs.noise}, {"seeds": inputs.seeds, "step": STEP}
    compiled = torch.compile(inputs.diffusers, dynamic=False)
    runs = {
        "diffusers": lambda: inputs.diffusers(inputs.noise),
        "diffusers, compiled": lambda: compiled(inputs.noise),
        "eager": fused("eager", **given),
        "diffusers, noise drawn": lambda: inputs.diffusers(None),
    }
    for backend in FAST:
        runs[backend] = fused(backend, **given)
        runs[f"{backend}, noise drawn"] = fused(backend, **drawn)
        if DEVICE == "cuda":
            runs[f"{backend}, captured"] = captured(fused(backend, **drawn), DEVICE)
    if (moved := inputs.bytes_moved()) >= COPY_BYTES:
        source, target = (torch.ones(moved // 8, device=DEVICE) for _ in range(2))
        runs["copy"] = lambda: target.copy_(source)
    return runs


def verify(inputs: Inputs, runs: dict[str, Callable[[], Tensor]]) -> None:
    """Check that errors are at most twice those of the stock way, plus one ulp of the largest."""
    exact = inputs.exact()
    error = {
        name: float((run().double().cpu() - exact).abs().max())
        for name, run in runs.items()
        if name not in ("copy", "diffusers, noise drawn")
    }
    ulp = torch.finfo(torch.float32).eps * float(exact.abs().max())
    wrong = {name: e for name, e in error.items() if not e <= 2 * error["diffusers"] + ulp}
    assert not wrong, f"not timed, because wrong: {wrong}; diffusers: {error['diffusers']}"


@pytest.mark.parametrize("case", CASES, ids=str)
# inductor's own, when it is first imported
@pytest.mark.filterwarnings(
    "ignore:.torch.jit.script_method:DeprecationWarning",
    "ignore:.torch._prims_common.check:FutureWarning",
)
def test_fused_step(case: Case, benchmark) -> None:
    if not FAST:
        pytest.skip(f"no fast backend: {registry.explain(DEVICE)}")
    torch._dynamo.reset()
    inputs = Inputs(case)
    runs = contenders(inputs)
    with torch.no_grad():
        verify(inputs, runs)
        timings = interleaved(runs, seconds=4.0, device=DEVICE)
        benchmark.pedantic(runs[FAST[0]], rounds=20, warmup_rounds=2)
        counts = {name: counted(run) for name, run in runs.items() if "compiled" not in name}
    moved = inputs.bytes_moved()
    shared = surroundings(DEVICE) | {
        "case": case.name,
        "shape": list(case.shape),
        "num_objectives": case.count,
        "dtype": "float32",
        "device": DEVICE,
        "bytes": moved,
    }
    append(
        "fused_step",
        [
            shared
            | {"contender": name, "gb_per_s": round(moved / timing["median_us"] / 1e3, 2)}
            | timing
            | counts.get(name, {})
            for name, timing in timings.items()
        ],
    )
    median = {name: timing["median_us"] for name, timing in timings.items()}
    for backend in FAST:
        benchmark.extra_info[f"diffusers / {backend}"] = round(
            median["diffusers"] / median[backend], 2
        )
        if "copy" in median:
            benchmark.extra_info[f"{backend} / copy"] = round(median[backend] / median["copy"], 2)


def counted(run: Callable[[], Tensor]) -> dict[str, int]:
    """Count what a call dispatches: kernels on a GPU, operators of torch on the CPU."""
    return {"kernels": launches(run)} if DEVICE == "cuda" else operators(run)
