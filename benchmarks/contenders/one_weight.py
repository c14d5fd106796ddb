# SPDX-License-Identifier: Apache-2.0
"""`msdda-fast serve` with batches of one weight vector each, and nothing else changed.

    python benchmarks/contenders/one_weight.py --port 8000 --max-batch 8

What an engine does whose weights belong to the batch, such as one that merges adapters for them:
the oldest request, and the next oldest of the same weights. First come, first served, as ours.
"""

import sys
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # when run as a script

import torch

from msdda_fast.batching import engine
from msdda_fast.batching.queue import TicketQueue
from msdda_fast.batching.ticket import Ticket
from msdda_fast.cli import app as cli


class OneWeightQueue(TicketQueue):
    """Hands out batches of equal shape and equal fusion weights."""

    def _first_batch(self) -> list[Ticket]:
        first = self._tickets[0]
        alike = (
            ticket
            for ticket in self._tickets
            if ticket.shape == first.shape and torch.equal(ticket.table.share, first.table.share)
        )
        return [*islice(alike, self._max_batch)]


if __name__ == "__main__":
    engine.TicketQueue = OneWeightQueue
    sys.argv[1:1] = ["serve"]
    cli.main()
