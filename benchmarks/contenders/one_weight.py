# SPDX-License-Identifier: Apache-2.0
"""`msdda-fast serve` with batches of one weight vector each, and nothing else changed.

    python benchmarks/contenders/one_weight.py --port 8000 --max-batch 8

It behaves like an engine whose weights belong to the batch, such as one that merges adapters: a
batch has the oldest request and the next oldest with the same weights, first come, first served.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # when run as a script

import torch

from msdda_fast.batching import engine
from msdda_fast.batching.queue import TicketQueue
from msdda_fast.batching.ticket import Ticket
from msdda_fast.cli import app as cli


class OneWeightQueue(TicketQueue):
    """Hands out batches of equal shape and equal fusion weights."""

    def _may_share(self, first: Ticket, other: Ticket) -> bool:
        if not super()._may_share(first, other):
            return False
        assert first.table is not None and other.table is not None  # of the captured pipeline
        return torch.equal(other.table.share, first.table.share)


if __name__ == "__main__":
    engine.TicketQueue = OneWeightQueue
    sys.argv[1:1] = ["serve"]
    cli.main()
