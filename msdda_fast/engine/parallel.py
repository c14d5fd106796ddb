# SPDX-License-Identifier: Apache-2.0
"""Objectives and guidance halves over several processes, bit for bit as in one process.

Every rank holds the same x_t and evaluates its share of the networks. The raw outputs are
all-gathered in the order of the objectives, and every rank runs the same fused step on them with
the same coefficients and noise: no sum depends on the number of ranks, and the ranks stay in step.

Outputs are exchanged over the caller's group: NCCL between GPUs. Status messages between hosts, and
outputs on the CPU, use a gloo group of our own, whose timeout bounds every wait; a process that
dies closes its sockets, which ends the wait at once. The hosts synchronise before every exchange of
outputs, so a step that cannot be finished is never started on a GPU. That costs a copy of x_t to
the host.
"""

from __future__ import annotations

import hashlib
import logging
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from msdda_fast.engine.assignment import Work, assign
from msdda_fast.errors import BackendUnavailable, InvalidShape, RankLost, RanksDiffer

__all__ = ["ObjectiveParallel", "tensor_bytes"]

logger = logging.getLogger(__name__)

WORDS = 256  # bytes of a message between hosts
DIGEST = 16  # bytes


class ObjectiveParallel:
    """The ranks that sample together. Create it on every rank, and use it the same way on all.

        torch.distributed.init_process_group()  # under torchrun
        pipe.enable_parallel(ObjectiveParallel())
        images = pipe(prompt, weights=..., seed=0).images  # the same call and result on every rank

    With M ranks, rank i evaluates objective i; with strength, or outside of an objective's
    timesteps, the base is one more. With fewer, a rank evaluates several; with more, the
    unconditional and conditional halves of guidance are split too. Inactive ones cost nothing.

    Without `split_guidance` the networks see the same batches as in one process, so all bits are
    the same. A split changes the batch of a forward, whose sums may then round in another order;
    given the same outputs, the fused step has the same bits either way.

    Args:
        group: A `torch.distributed` group; None: the default one.
        split_guidance: Put the branches of an objective on different ranks where that leaves the
            busiest rank less to do.
        timeout: Seconds that a rank waits for the slowest other rank in any step, even for one that
            hangs. Outputs on GPUs wait for the timeout of `group` instead, in NCCL, whose watchdog
            (`TORCH_NCCL_ASYNC_ERROR_HANDLING`, on by default) then ends the process.

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
        self.rank = dist.get_rank(self._group)
        self.size = dist.get_world_size(self._group)
        if self.rank < 0:
            raise ValueError("this process is not in the group")
        self.split_guidance = split_guidance
        self._timeout = timeout
        self._place = "the first exchange"
        self._told_idle = False
        self._hosts: dist.ProcessGroup | None = None
        try:
            self._hosts = dist.new_group(
                dist.get_process_group_ranks(self._group),
                timeout=timedelta(seconds=timeout),
                backend="gloo",
                use_local_synchronization=True,
            )
        except RuntimeError as error:
            raise RankLost(
                f"rank {self.rank} of {self.size} did not reach all others within {timeout:g} s"
            ) from error

    def close(self) -> None:
        """Leave the group: the current or next exchange of the other ranks raises `RankLost`."""
        if self._hosts is not None:
            hosts, self._hosts = self._hosts, None
            if dist.is_initialized():
                dist.destroy_process_group(hosts)

    @contextmanager
    def generation(self, request: Mapping[str, bytes]) -> Iterator[None]:
        """Begin and end a generation together; inside, call `evaluate` once per step.

        An exception on one rank is raised on the others at their next exchange, and all ranks can
        then start another generation. An interrupt (not an `Exception`) closes this rank instead.

        Args:
            request: Everything that must be the same on every rank, as bytes by name.

        Raises:
            RanksDiffer: A rank has a different request, or is at a different point of it.
            RankLost: A rank failed, died, or was silent for longer than the timeout.
        """
        self._meet("the start of a generation")
        self._check_same({**request, "split_guidance": bytes([self.split_guidance])})
        try:
            yield
            self._meet("the end of a generation")
        except (RankLost, RanksDiffer):
            raise  # on every rank
        except Exception as error:
            with suppress(RankLost):
                self._meet(f"after {self._place}: {type(error).__name__}: {error}", failed=True)
            raise
        except BaseException:
            self.close()
            raise

    def evaluate(
        self,
        run: Callable[[Work], Sequence[Tensor]],
        x_t: Tensor,
        step: int,
        *,
        active: Sequence[bool],
        branches: int,
        dtype: torch.dtype,
    ) -> list[Tensor | None]:
        """Return the outputs of all active objectives, each evaluated on one or two ranks.

        Args:
            run: Evaluates a `Work` at x_t: one output (its branches, B, *S) per objective.
            x_t: (B, *S), the same on every rank.
            step: Index k.
            active: M flags, at least one set.
            branches: K.
            dtype: Dtype of the outputs.

        Returns: M outputs (K, B, *S); None for inactive objectives.

        Raises:
            InvalidShape: `run` returned outputs of the wrong shape or dtype.
            RanksDiffer: Another rank is at a different step, or has a different x_t.
            RankLost: See `generation`.
        """
        shares = assign(active, branches, self.size, split_guidance=self.split_guidance)
        self._tell_idle(shares)
        rows = [[row for work in share for row in work.rows] for share in shares]
        mine = x_t.new_zeros((max(map(len, rows)), *x_t.shape), dtype=dtype)
        everyone = mine.new_empty((self.size, *mine.shape))
        begin = 0
        for work in shares[self.rank]:
            outputs = torch.cat(list(run(work)))
            if outputs.shape != (len(work.rows), *x_t.shape) or outputs.dtype != dtype:
                raise InvalidShape(
                    f"{work} returned {outputs.dtype} {tuple(outputs.shape)}, expected {dtype} "
                    f"{(len(work.rows), *x_t.shape)}"
                )
            mine[begin : begin + len(work.rows)] = outputs
            begin += len(work.rows)
        # a callback or a kernel that differs would go unnoticed otherwise
        self._meet(f"step {step} with latents {zlib.crc32(tensor_bytes(x_t)):08x}")
        self._gather(everyone, mine)
        found = {
            row: everyone[rank, slot]
            for rank, owned in enumerate(rows)
            for slot, row in enumerate(owned)
        }
        return [
            torch.stack([found[m, k] for k in range(branches)]) if is_active else None
            for m, is_active in enumerate(active)
        ]

    def from_first(self, values: Tensor) -> Tensor:
        """Return rank 0's values; shape and dtype must be the same on every rank.

        Raises:
            RankLost: See `generation`.
        """
        host = values.cpu()
        everyone = host.new_empty((self.size, *host.shape))
        self._gather(everyone, host)
        return everyone[0].to(values.device)

    def _check_same(self, request: Mapping[str, bytes]) -> None:
        digests = [hashlib.blake2b(part, digest_size=DIGEST).digest() for part in request.values()]
        mine = torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.uint8).view(-1, DIGEST)
        everyone = mine.new_empty((self.size, *mine.shape))
        self._gather(everyone, mine)
        agree = (everyone == everyone[0]).all(2).tolist()  # [W][names]
        differing = []
        for rank, row in enumerate(agree):
            names = [name for name, same in zip(request, row, strict=True) if not same]
            if names:
                differing.append(f"rank {rank} in {', '.join(names)}")
        if differing:
            raise RanksDiffer(
                f"every rank must make the same request; these differ from rank 0: "
                f"{'; '.join(differing)}"
            )

    def _meet(self, words: str, *, failed: bool = False) -> None:
        """Exchange the position of every rank; one that `failed` sends why, and does not raise."""
        message = (bytes([failed]) + words.encode())[:WORDS].ljust(WORDS, b"\0")
        mine = torch.frombuffer(bytearray(message), dtype=torch.uint8)
        everyone = mine.new_empty((self.size, WORDS))
        if not failed:
            self._place = words
        self._gather(everyone, mine)
        if failed:
            return
        texts = [bytes(row[1:]).rstrip(b"\0").decode(errors="ignore") for row in everyone.tolist()]
        failures = [
            f"rank {rank} failed {text}" for rank, text in enumerate(texts) if everyone[rank, 0]
        ]
        if failures:
            raise RankLost(f"rank {self.rank} stopped at {words}: {'; '.join(failures)}")
        if len(set(texts)) > 1:
            places = "; ".join(f"rank {rank} is at {text}" for rank, text in enumerate(texts))
            raise RanksDiffer(f"the ranks are out of step: {places}")

    def _gather(self, everyone: Tensor, mine: Tensor) -> None:
        """All-gather `mine` (...) into `everyone` (W, ...)."""
        group = self._group if mine.is_cuda else self._hosts
        if self._hosts is None:
            raise RankLost(f"rank {self.rank} has left the group; restart all processes")
        start = time.monotonic()
        reason = None
        try:
            dist.all_gather(list(everyone.unbind()), mine, group=group)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
        if reason is not None:
            # Outside of `except`, whose traceback keeps the sockets open: closing them is what
            # tells ranks that do not talk to the lost one directly.
            group = None
            self.close()
            raise RankLost(
                f"rank {self.rank} of {self.size} lost another rank at {self._place}, after "
                f"waiting {time.monotonic() - start:.1f} s (timeout {self._timeout:g} s): {reason}"
            )

    def _tell_idle(self, shares: Sequence[Sequence[Work]]) -> None:
        idle = sum(not share for share in shares)
        if idle and self.rank == 0 and not self._told_idle:
            self._told_idle = True
            logger.warning("%d of %d ranks have nothing to evaluate", idle, self.size)


def tensor_bytes(tensor: Tensor | None) -> bytes:
    """Return shape, dtype and values as bytes, which are equal exactly for equal tensors."""
    if tensor is None:
        return b"none"
    values: bytes = tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes()
    return f"{tuple(tensor.shape)} {tensor.dtype} ".encode() + values
