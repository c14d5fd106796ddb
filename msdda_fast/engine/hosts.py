# SPDX-License-Identifier: Apache-2.0
"""Short messages between the hosts of all ranks, over a gloo group with a timeout of its own."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from msdda_fast.errors import RankLost, RanksDiffer

__all__ = ["Hosts"]

WORDS = 256  # bytes of a message between hosts
DIGEST = 16  # bytes


class Hosts:
    """The processes of a group, which wait for each other at most `timeout` seconds.

    A process that dies closes its sockets, which ends the wait of the others at once.

    Args:
        group: Whose ranks they are.
        timeout: Seconds.

    Attributes:
        rank, size: In the group.
        place: Where this rank is, for messages.

    Raises:
        RankLost: Another rank did not come in time.
    """

    def __init__(self, group: dist.ProcessGroup | None, timeout: float) -> None:
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.place = "the first exchange"
        self._timeout = timeout
        self._group: dist.ProcessGroup | None = None
        try:
            self._group = dist.new_group(
                dist.get_process_group_ranks(group),
                timeout=timedelta(seconds=timeout),
                backend="gloo",
                use_local_synchronization=True,
            )
        except RuntimeError as error:
            raise RankLost(
                f"rank {self.rank} of {self.size} did not reach all others within {timeout:g} s"
            ) from error

    def close(self) -> None:
        """Leave: the current or next wait of the other ranks raises `RankLost`."""
        if self._group is not None:
            group, self._group = self._group, None
            if dist.is_initialized():
                dist.destroy_process_group(group)

    def meet(self, words: str, *, failed: bool = False) -> None:
        """Exchange the position of every rank; one that `failed` sends why, and does not raise.

        Raises:
            RankLost: Another rank failed, or is lost.
            RanksDiffer: Another rank is elsewhere.
        """
        message = (bytes([failed]) + words.encode())[:WORDS].ljust(WORDS, b"\0")
        mine = torch.frombuffer(bytearray(message), dtype=torch.uint8)
        everyone = mine.new_empty((self.size, WORDS))
        if not failed:
            self.place = words
        self.gather(everyone, mine)
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

    def check_same(self, parts: Mapping[str, bytes], *, must: str) -> None:
        """Compare what every rank has.

        Args:
            parts: Bytes by name; the same names on every rank.
            must: What every rank must do, for the message.

        Raises:
            RanksDiffer: The bytes differ; names them and the ranks.
            RankLost: See `meet`.
        """
        digests = [hashlib.blake2b(part, digest_size=DIGEST).digest() for part in parts.values()]
        mine = torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.uint8).view(-1, DIGEST)
        everyone = mine.new_empty((self.size, *mine.shape))
        self.gather(everyone, mine)
        agree = (everyone == everyone[0]).all(2).tolist()  # [W][names]
        differing = []
        for rank, row in enumerate(agree):
            names = [name for name, same in zip(parts, row, strict=True) if not same]
            if names:
                differing.append(f"rank {rank} in {', '.join(names)}")
        if differing:
            raise RanksDiffer(
                f"every rank must {must}; these differ from rank 0: {'; '.join(differing)}"
            )

    def gather(
        self, everyone: Tensor, mine: Tensor, group: dist.ProcessGroup | None = None
    ) -> None:
        """All-gather `mine` (...) into `everyone` (W, ...), over another group if one is given.

        Raises:
            RankLost: A rank has left, died, or was silent for longer than the timeout; or this one
                has left.
        """
        if self._group is None:
            raise RankLost(f"rank {self.rank} has left the group; restart all processes")
        # torch 2.13 has another name for it, and warns of the old one
        all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        start = time.monotonic()
        reason = None
        try:
            # flat: gloo knows no other shapes
            all_gather(everyone.view(-1), mine.view(-1), group=group or self._group)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
        if reason is not None:
            # Outside of `except`, whose traceback keeps the sockets open: closing them is what
            # tells ranks that do not talk to the lost one directly.
            group = None
            self.close()
            raise RankLost(
                f"rank {self.rank} of {self.size} lost another rank at {self.place}, after "
                f"waiting {time.monotonic() - start:.1f} s (timeout {self._timeout:g} s): {reason}"
            )
