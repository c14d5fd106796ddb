# SPDX-License-Identifier: Apache-2.0
"""The judge of pipelines: Algorithm 1 run by unmodified stock pipelines, one per objective.

Each runs in a thread of its own, with its own network and adapter. They meet in `scheduler.step`,
where the last one to come fuses, and all go on with the same state.
"""

import copy
import inspect
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

STEPS = 4
Fuse = Callable[[list["Met"]], Tensor]


@dataclass(frozen=True)
class Met:
    """One pipeline at its scheduler's step."""

    scheduler: Any
    stock_step: Callable[..., Any]
    arguments: dict[str, Any]

    def stock(self) -> Tensor:
        return self.stock_step(self.scheduler, **self.arguments)[0]


def draw(pipe, call: dict, *, copies: int = 1, **more) -> Tensor:
    """The latents of a call."""
    names = inspect.signature(pipe.__call__).parameters
    for name in ("num_images_per_prompt", "num_videos_per_prompt"):
        if copies > 1 and name in names:
            more[name] = copies
    if not more.keys() & {"seed"}:
        more.setdefault("generator", torch.Generator().manual_seed(7))
    more = {"num_inference_steps": STEPS, "output_type": "latent", "return_dict": False, **more}
    torch.manual_seed(5)
    result = pipe(**copy.deepcopy(call), **more)
    return result[0]


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def use_adapter(pipe, adapter: str) -> None:
    """As `pipe.set_adapters`, for pipelines that have no such method, too."""
    for part in pipe.components.values():
        if isinstance(part, nn.Module) and getattr(part, "peft_config", None):
            part.set_adapter(adapter)


def lockstep(make: Callable[[], tuple[Any, dict]], adapters: Sequence[str], fuse: Fuse, **more):
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
    for rank, adapter in enumerate(adapters):
        pipe, call = make()
        use_adapter(quiet(pipe), adapter)
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
        weights: (B, M).
    """

    def fuse(met: list[Met]) -> Tensor:
        states = [one.arguments["sample"] for one in met]
        assert all(torch.equal(states[0], other) for other in states)
        before = torch.get_rng_state()
        results = []
        for one in met:
            torch.set_rng_state(before)
            results.append(one.stock())
        shares = weights.T.reshape(*weights.T.shape, *[1] * (results[0].ndim - 1))
        return (shares * torch.stack(results).double()).sum(0).to(results[0].dtype)

    return fuse
