# SPDX-License-Identifier: Apache-2.0
"""Objectives and guidance halves over several processes, bit for bit as in one process.

Every rank holds the same x_t and evaluates its share of the networks. The raw outputs are
all-gathered in the order of the objectives, and every rank runs the same fused step on them with
the same coefficients and noise: no sum depends on the number of ranks, and the ranks stay in step.

Outputs are exchanged over the caller's group: NCCL between GPUs, where nothing waits for the host.
Outputs on the CPU, and messages between hosts, use a gloo group of our own (`hosts`). The hosts
meet in every `MEET_EVERY`-th step and at the end, and compare a checksum of x_t there, made on its
device. A rank that fails or stops goes on taking part in exchanges up to the next meeting, where
the others learn of it: no exchange is left half done, and all can go on with another generation.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

import torch
import torch.distributed as dist
from torch import Tensor

from msdda_fast.engine.assignment import Work
from msdda_fast.engine.exchange import Exchange
from msdda_fast.engine.hosts import Hosts
from msdda_fast.errors import BackendUnavailable, RankLost, RanksDiffer

__all__ = ["MEET_EVERY", "ObjectiveParallel", "tensor_bytes"]

logger = logging.getLogger(__name__)

#: Hosts meet in steps 0, 10, 20, ... and at the end. A meeting waits for the device and for the
#: slowest host; that ranks differ need not be known sooner than in time to stop a long generation.
MEET_EVERY = 10


class ObjectiveParallel:
    """The ranks that sample together. Create it on every rank, and use it the same way on all.

        torch.distributed.init_process_group()  # under torchrun
        pipe.enable_parallel(ObjectiveParallel())
        images = pipe(prompt, weights=..., seed=0).images  # the same call and result on every rank

    With M ranks, rank i evaluates objective i; with strength, or outside of an objective's
    timesteps, the base is one more. With fewer, a rank evaluates several; with more, the
    unconditional and conditional halves of guidance are split too. Inactive ones cost nothing.

    Given the same outputs of the networks, all bits are those of one process. A forward of fewer
    rows may round its sums in another order; `set_forward("sequential")` without `split_guidance`
    has the same forwards in several processes as in one, and so the same images to the bit.

    Args:
        group: A `torch.distributed` group; None: the default one.
        split_guidance: Put the branches of an objective on different ranks where that leaves the
            busiest rank less to do.
        timeout: Seconds that a rank waits for the slowest other rank, even for one that hangs. In
            an exchange on GPUs the stream waits for the timeout of `group` instead, in NCCL, whose
            watchdog (`TORCH_NCCL_ASYNC_ERROR_HANDLING`, on by default) then ends the process.

    Attributes:
        rank, size: This rank in the group, and W.

    Raises:
        BackendUnavailable: `torch.distributed` was not initialised.
        ValueError: The timeout is not positive, or this process is not in `group`.
        RankLost: The other ranks did not create theirs in time.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        *,
        split_guidance: bool = True,
        timeout: float = 300.0,
    ) -> None:
        if not timeout > 0:
            raise ValueError(f"timeout must be a positive number of seconds, got {timeout!r}")
        if not (dist.is_available() and dist.is_initialized()):
            raise BackendUnavailable(
                "torch.distributed is not initialised: start the processes with torchrun and call "
                "torch.distributed.init_process_group() first"
            )
        self._group = dist.group.WORLD if group is None else group
        if dist.get_rank(self._group) < 0:
            raise ValueError("this process is not in the group")
        self._hosts = Hosts(self._group, timeout)
        self.rank, self.size = self._hosts.rank, self._hosts.size
        self.split_guidance = split_guidance
        self._told_idle = False
        self._steps: Sequence[Exchange] = ()
        self._next = 0

    def close(self) -> None:
        """Leave the group: the current or next exchange of the other ranks raises `RankLost`."""
        self._hosts.close()

    @contextmanager
    def generation(self, request: Mapping[str, bytes]) -> Iterator[None]:
        """Begin and end a generation together; inside, call `begin`, then `gather` once per step,
        or `share` once per forward.

        An exception on one rank is raised on the others at their next meeting, and all ranks can
        then start another generation; steps until there are done with its last outputs. A process
        that dies is noticed at the next exchange on the CPU, and at the next meeting on GPUs, whose
        streams NCCL then blocks until its own timeout: end such a process. An interrupt (not an
        `Exception`) closes this rank, as if it had died.

        Args:
            request: Everything that must be the same on every rank, as bytes by name.

        Raises:
            RanksDiffer: A rank has a different request, or is at a different point of it, or has
                other latents.
            RankLost: A rank failed, died, or was silent for longer than the timeout.
        """
        self._steps, self._next = (), 0
        self._hosts.meet("the start of a generation")
        split = bytes([self.split_guidance])
        self._hosts.check_same({**request, "split_guidance": split}, must="make the same request")
        try:
            yield
            self._attend()
            self._hosts.meet("the end of a generation")
        except (RankLost, RanksDiffer):
            raise  # on every rank
        except Exception as error:
            words = f"after {self._hosts.place}: {type(error).__name__}: {error}"
            with suppress(RankLost):
                self._attend()
                self._hosts.meet(words, failed=True)
            raise
        except BaseException:
            self.close()
            raise

    def exchange(
        self,
        active: Sequence[bool],
        branches: int,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> Exchange:
        """Return storage for the outputs of a kind of step; see `Exchange`."""
        made = Exchange(
            active,
            branches,
            shape,
            rank=self.rank,
            size=self.size,
            split_guidance=self.split_guidance,
            dtype=dtype,
            device=device,
        )
        if made.idle and self.rank == 0 and not self._told_idle:
            self._told_idle = True
            logger.warning("%d of %d ranks have nothing to evaluate", made.idle, self.size)
        return made

    def begin(self, steps: Sequence[Exchange]) -> None:
        """Say what every step of this generation exchanges; later steps may be left out."""
        self._steps, self._next = steps, 0

    def evaluate(self, run: Callable[[Work], Sequence[Tensor]], x_t: Tensor) -> list[Tensor | None]:
        """Evaluate this rank's share of the next step, and `gather` the outputs.

        Args:
            run: Evaluates a `Work` at x_t: one output (its branches, B, *S) per objective.
            x_t: (B, *S), the same on every rank.

        Raises:
            InvalidShape: `run` returned outputs of the wrong shape or dtype.
            RanksDiffer, RankLost: See `gather`.
        """
        exchange = self._steps[self._next]
        for work in exchange.works:
            exchange.put(work, run(work))
        return self.gather(x_t)

    def gather(self, x_t: Tensor) -> list[Tensor | None]:
        """Exchange the outputs of the next step, which lie in its `Exchange`.

        On a GPU this waits for nothing but where the hosts meet.

        Args:
            x_t: (B, *S), the same on every rank; compared where the hosts meet.

        Returns: M views (K, B, *S), valid until the next step; None for inactive objectives.

        Raises:
            RanksDiffer: Another rank is at a different step, or has a different x_t.
            RankLost: See `generation`.
        """
        k = self._next
        self._hosts.place = f"step {k}"
        if k % MEET_EVERY == 0:
            self._hosts.meet(f"step {k}")
            layouts = b"; ".join(step.layout for step in self._steps)
            self._compare(x_t, which_objectives_run=layouts)
        self._exchange()
        return self._steps[k].outputs()

    def share(self, exchanges: Sequence[Exchange], states: Sequence[Tensor]) -> None:
        """Exchange the outputs of one forward, where nobody knows which forwards will follow.

        So that a rank that fails leaves none half done, the hosts meet every time; they wait for
        the device in every `MEET_EVERY`-th time only.

        Args:
            exchanges: Where the outputs lie; each holds its gathered ones afterwards.
            states: Floating-point tensors that are the same on every rank, compared at times.

        Raises:
            RanksDiffer: Another rank is at a different forward, or has different states.
            RankLost: See `generation`.
        """
        k = self._next
        shapes = [tuple(exchange.everyone.shape) for exchange in exchanges]
        self._hosts.meet(f"forward {k} with outputs {shapes}")
        if k % MEET_EVERY == 0:
            self._compare(*states)
        for exchange in exchanges:
            self._gather(exchange)
        self._next += 1

    def finish(self, x_0: Tensor) -> None:
        """Compare the last state, (B, *S), when all steps are done that are to be.

        Raises:
            RanksDiffer, RankLost: See `gather`.
        """
        done = self._next
        self._attend()
        self._hosts.meet(f"the end, after {done} steps")
        self._compare(x_0)

    def from_first(self, values: Tensor) -> Tensor:
        """Return rank 0's values; shape and dtype must be the same on every rank.

        Raises:
            RankLost: See `generation`.
        """
        host = values.cpu().contiguous()
        everyone = host.new_empty((self.size, *host.shape))
        self._hosts.gather(everyone, host)
        return everyone[0].to(values.device)

    def _attend(self) -> None:
        """Take part in the exchanges up to the next meeting, for the others to get there."""
        while self._next < len(self._steps) and self._next % MEET_EVERY:
            self._exchange()

    def _exchange(self) -> None:
        self._gather(self._steps[self._next])
        self._next += 1

    def _gather(self, exchange: Exchange) -> None:
        group = self._group if exchange.mine.is_cuda else None
        self._hosts.gather(exchange.everyone, exchange.mine, group)

    def _compare(self, *states: Tensor, **others: bytes) -> None:
        # The hosts have met: all have launched the same exchanges, so that this wait will end.
        latents = b"; ".join(tensor_bytes(_checksum(state)) for state in states)
        parts = {"latents": latents, **{n.replace("_", " "): part for n, part in others.items()}}
        self._hosts.check_same(parts, must=f"have the same at {self._hosts.place}")


def _checksum(x: Tensor) -> Tensor:
    """A 0-d int64 sum of the bits of all values, each times an odd number of its place.

    Integers wrap and have no rounding, so that the order of the sum does not matter.
    """
    bits = _dense(x).view(torch.int16).to(torch.int64)
    places = torch.arange(len(bits), device=x.device) * 2 + 1
    return (bits * places * places * places).sum()


def tensor_bytes(tensor: Tensor | None) -> bytes:
    """Return shape, dtype and values as bytes, which are equal exactly for equal tensors."""
    if tensor is None:
        return b"none"
    values: bytes = _dense(tensor).cpu().view(torch.uint8).numpy().tobytes()
    return f"{tuple(tensor.shape)} {tensor.dtype} ".encode() + values


def _dense(tensor: Tensor) -> Tensor:
    """A flat copy; views of other dtypes need a stride of 1, also of a single value."""
    return tensor.detach().clone(memory_format=torch.contiguous_format).flatten()
