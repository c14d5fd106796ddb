# SPDX-License-Identifier: Apache-2.0
"""Random tensors for the fuzz tests: decisions by hypothesis, numbers by a generator it seeds."""

import math
from collections.abc import Callable
from typing import NamedTuple

import hypothesis.strategies as st
import torch
from hypothesis import Phase, given, settings
from torch import Tensor

from msdda_fast.kernels.counter_noise import counter_noise

EXAMPLES = {"eager": 80, "native": 160}  # others, an interpreter say, are slow
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
POISON = (math.nan, math.inf, -math.inf)

PHASES = (Phase.generate, Phase.shrink)  # explaining a failure takes a minute

flags = st.booleans()
sizes = st.sampled_from([1, 2, 3, 5, 9, 0])
shapes = st.lists(sizes, min_size=1, max_size=5).map(tuple).filter(lambda s: math.prod(s) < 1000)


def fuzz(backend: str, strategy: st.SearchStrategy, check: Callable[[object], None]) -> None:
    """Run `check` on the same examples every time."""
    limits = settings(
        max_examples=EXAMPLES.get(backend, 12),
        derandomize=True,
        deadline=None,
        database=None,
        phases=PHASES,
    )
    limits(given(strategy)(check))()


def dtypes(backend: str) -> st.SearchStrategy:
    return st.sampled_from(DTYPES[:3] if backend == "triton" else DTYPES)  # its CPU has no bfloat16


class Placed(NamedTuple):
    """A tensor somewhere in memory, and that memory."""

    tensor: Tensor
    memory: Tensor

    def unchanged(self, before: Tensor) -> bool:
        return same_bits(self.memory, before)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, -0 and 0 apart; any NaN equals any other."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    word = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    a, b = (t.masked_fill(t.isnan(), 1.0).contiguous().view(word) for t in (a, b))
    return torch.equal(a, b)


class Draw:
    """Decisions by hypothesis, values by a generator that it seeds."""

    def __init__(self, data: st.DataObject) -> None:
        self.pick = data.draw
        self.generator = torch.Generator().manual_seed(self.pick(st.integers(0, 2**32)))

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
        """Standard normal numbers, sometimes the same along an axis."""
        x = torch.randn(shape, generator=self.generator, dtype=torch.float64).to(dtype)
        axis = self.pick(st.integers(0, 2 * x.ndim))
        return x if axis >= x.ndim or x.numel() == 0 else x.narrow(axis, 0, 1).expand(shape)

    def chance(self, shape: tuple[int, ...], p: float) -> Tensor:
        return torch.rand(shape, generator=self.generator) < p

    def poisoned(self, x: Tensor) -> Tensor:
        """With NaN and Inf here and there, if at all."""
        if self.pick(flags):
            return x
        return x.masked_fill(self.chance(x.shape, 0.1), self.pick(st.sampled_from(POISON)))

    def placed(self, x: Tensor, writable: bool = False) -> Placed:
        """`x` with its axes in any memory order, gaps, an offset, and stride 0 where it can be."""
        x = x.contiguous()
        if self.pick(flags):
            return Placed(x, x)
        order = self.pick(st.permutations(range(x.ndim)))
        gap, offset = self.pick(st.integers(1, 3)), self.pick(st.integers(0, 3))
        wide = [x.shape[axis] * gap for axis in order]
        memory = torch.full((offset + math.prod(wide),), 7.0, dtype=x.dtype)
        view = memory[offset:].view(wide)[(slice(None, None, gap),) * x.ndim]
        view = view.permute([order.index(axis) for axis in range(x.ndim)]).copy_(x)
        for axis in range(0 if writable or x.numel() == 0 else x.ndim):
            once = view.narrow(axis, 0, 1).expand(x.shape)
            view = once if same_bits(once, x) else view
        return Placed(view, memory)

    def source(self, like: Tensor, backend: str) -> tuple[dict[str, object], Tensor, list[Placed]]:
        """What asks for noise, the numbers that must come of it, and the tensors involved."""
        kind = self.pick(st.sampled_from(["noise", "seeds", "generator"]))
        if kind == "noise" or (kind == "seeds" and like.ndim < 2):
            given = self.placed(self.poisoned(self.normal(like.shape, self.pick(dtypes(backend)))))
            return {"noise": given.tensor}, given.tensor, [given]
        seed = self.pick(st.integers(-(2**63), 2**64 - 1 - len(like)))
        if kind == "generator":
            asked, drawn = (torch.Generator().manual_seed(seed % 2**63) for _ in range(2))
            z = torch.randn(like.shape, generator=drawn, dtype=like.dtype)
            return {"generator": asked}, z, []
        seeds, step = [seed + b for b in range(len(like))], self.pick(st.integers(0, 2**32 - 1))
        z = counter_noise(seeds, like.shape, step=step, backend="eager")
        return {"seeds": seeds, "step": torch.tensor(step) if self.pick(flags) else step}, z, []

    def out(self, like: Tensor, backend: str) -> Placed | None:
        if self.pick(flags):
            return None
        empty = torch.full(like.shape, 7.0, dtype=self.pick(dtypes(backend)))
        return self.placed(empty, writable=True)
