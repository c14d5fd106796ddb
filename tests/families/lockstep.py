# SPDX-License-Identifier: Apache-2.0
"""The judge of pipelines: Algorithm 1 run by unmodified stock pipelines, one per objective.

Each runs in a thread of its own, with its own network and adapter. They meet in `scheduler.step`,
where the last one to come fuses, and all go on with the same state.
"""

import copy
import functools
import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

import msdda_fast as mf
from msdda_fast.reference import fuse_posteriors

STEPS = 3
#: The adapters of one objective with their scales; none for the base.
Adapters = Mapping[str, float]
Fuse = Callable[[list["Met"]], Tensor]


@dataclass(frozen=True)
class Met:
    """One pipeline at its scheduler's step."""

    scheduler: Any
    stock_step: Callable[..., Any]
    arguments: dict[str, Any]

    def stock(self) -> Tensor:
        return self.stock_step(self.scheduler, **self.arguments)[0]


def generators(seeds: Sequence[int]):
    """As diffusers takes them: one, or a list."""
    made = [torch.Generator().manual_seed(seed) for seed in seeds]
    return made if len(made) > 1 else made[0]


def draw(pipe, call: dict, *, seeds: Sequence[int] = (7,), **more) -> Tensor:
    """The latents of a call, which begins with generators of `seeds` unless `more` says."""
    if "seed" not in more:
        more.setdefault("generator", generators(seeds))
    more = {"num_inference_steps": STEPS, "output_type": "latent", "return_dict": False, **more}
    torch.manual_seed(5)
    result = pipe(**copy.deepcopy(call), **more)
    return result[0]


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def use(pipe, adapters: Adapters) -> None:
    """As `pipe.set_adapters`, for pipelines that have no such method, too."""
    for part in pipe.components.values():
        if not isinstance(part, nn.Module) or not getattr(part, "peft_config", None):
            continue
        for layer in part.modules():
            if isinstance(layer, BaseTunerLayer):
                layer.enable_adapters(bool(adapters))
                if adapters:
                    layer.set_adapter(list(adapters))
                for name, scale in adapters.items():
                    layer.set_scale(name, scale)


Make = Callable[[], tuple[Any, dict]]


@functools.cache
def _made(make: Make, rank: int) -> tuple[Any, dict]:
    return make()


def made(make: Make, rank: int = 0) -> tuple[Any, dict]:
    """What `make()` gives, with networks that all of this rank share: calls do not change them."""
    pipe, call = _made(make, rank)
    pipe = copy.copy(quiet(pipe))
    pipe.scheduler = copy.deepcopy(pipe.scheduler)
    return pipe, call


def lockstep(make: Make, adapters: Sequence[Adapters], fuse: Fuse, **more) -> Tensor:
    """The latents that `make()`'s pipelines come to together, objective i with `adapters[i]`."""
    count = len(adapters)
    met: list[Met | None] = [None] * count
    state, latents, errors = [], [None] * count, []
    barrier = threading.Barrier(count, action=lambda: state.append(fuse(met)), timeout=120)

    def meeting(scheduler, rank: int):
        stock = type(scheduler)

        def step(self, *args, **kwargs):
            given = inspect.signature(stock.step).bind(self, *args, **kwargs).arguments
            del given["self"]
            met[rank] = Met(self, stock.step, given)
            barrier.wait()
            return (state[-1].clone(),)

        step.__signature__ = inspect.signature(stock.step)
        changed = copy.copy(scheduler)
        changed.__class__ = type(stock.__name__, (stock,), {"step": step})
        return changed

    pipes = []
    for rank, own in enumerate(adapters):
        pipe, call = made(make, rank)
        use(pipe, own)
        pipe.scheduler = meeting(pipe.scheduler, rank)
        pipes.append((pipe, call))

    def run(rank: int) -> None:
        try:
            latents[rank] = draw(*pipes[rank], **more)
        except threading.BrokenBarrierError:
            pass
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return latents[0]


def equal_levels(weights: Tensor) -> Fuse:
    """Eq. 7 at equal variances: the mean of the stock steps, all with the same noise.

    Args:
        weights: (B, M), or (B, M, *S), each axis of S that of the latents or 1.
    """

    def fuse(met: list[Met]) -> Tensor:
        states = [one.arguments["sample"] for one in met]
        assert all(torch.equal(states[0], other) for other in states)
        before = torch.get_rng_state()
        results = []
        for one in met:
            torch.set_rng_state(before)
            results.append(one.stock())
        shares = weights.transpose(0, 1)
        shares = shares.reshape(*shares.shape, *[1] * (results[0].ndim + 1 - shares.ndim))
        return (shares * torch.stack(results).double()).sum(0).to(results[0].dtype)

    return fuse


def ancestral(met: Met, k: int, eta: float) -> tuple[Tensor, float]:
    """Mean and deviation of k-diffusion's ancestral step (get_ancestral_step), noise prediction."""
    start, end = (float(met.scheduler.sigmas[k + i]) for i in (0, 1))
    up = eta * (end**2 * (start**2 - end**2) / start**2) ** 0.5
    down = (end**2 - up**2) ** 0.5
    x, eps = (met.arguments[name].double() for name in ("sample", "model_output"))
    return x + eps * (down - start), up


def flow_grpo(met: Met, k: int, a: float) -> tuple[Tensor, float]:
    """Mean and deviation of Flow-GRPO's SDE step (2505.05470, Eq. 9)."""
    sigmas = met.scheduler.sigmas.double()
    t, end = float(sigmas[k]), float(sigmas[k + 1])
    g = a * (t / (1 - (float(sigmas[1]) if t == 1 else t))) ** 0.5
    x, v = (met.arguments[name].double() for name in ("sample", "model_output"))
    dt = end - t
    drift = v + g**2 / (2 * t) * (x + (1 - t) * v)
    return x + drift * dt, g * (-dt) ** 0.5


def unequal_levels(weights: Tensor, seeds: Sequence[int], moments, levels) -> Fuse:
    """Eq. 7 of each pipeline's own mean and variance, in float64, with counter noise.

    Args:
        weights: (B, M), or (B, M, *S), each axis of S that of the latents or 1.
        seeds: (B,).
        moments: From a meeting, the step and a level to mean and deviation.
        levels: (M,).
    """
    first: list[torch.Size] = []

    def fuse(met: list[Met]) -> Tensor:
        sample = met[0].arguments["sample"]
        first.append(sample.shape)
        stream = 1 if sample.shape == first[0] else 16  # a second modality's deep copy
        for one in met:
            if one.scheduler.step_index is None:
                one.scheduler._init_step_index(one.arguments["timestep"])
        k = met[0].scheduler.step_index
        pairs = [moments(one, k, level) for one, level in zip(met, levels, strict=True)]
        means, stds = zip(*pairs, strict=True)
        last = max(stds) == 0  # Euler ancestral: the common factor cancels
        variances = torch.tensor(levels if last else stds).double() ** 2
        mean, variance = fuse_posteriors(torch.stack(means), variances, weights.transpose(0, 1))
        z = mf.counter_noise(torch.tensor(seeds), sample.shape, step=k, stream=stream)
        noise = 0 if last else variance.sqrt() * z.double()
        for one in met:
            one.scheduler._step_index += 1
        return (mean + noise).to(sample.dtype)

    return fuse
