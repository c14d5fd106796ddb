# SPDX-License-Identifier: Apache-2.0
"""Random but reproducible calls of the raw functions, for tests against eager."""

import math
import random

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.kernels.cases import DTYPES

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
SHAPES = (
    (1, 4, 8, 8), (3, 5, 17, 7), (2, 13), (3,), (2, 16, 3, 8, 2), (1, 4, 9, 11), (2, 8, 4, 6),
    (2, 4, 1, 1), (2, 6, 16), (2, 3, 8, 3), (0, 4, 8, 8),
)  # fmt: skip


def round_roots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives eager the root that IEEE 754 asks for; some CPU builds of torch are 1 ulp off."""
    monkeypatch.setattr(Tensor, "sqrt", lambda x: torch.from_numpy(np.sqrt(x.numpy())))


def assert_same_bits(got: Tensor | None, expected: Tensor | None) -> None:
    if got is None or expected is None:
        assert got is expected
        return
    bits = BITS[got.element_size()]
    assert torch.equal(got.contiguous().view(bits), expected.contiguous().view(bits))


def laid_out(x: Tensor, layout: str, lead: int = 0) -> Tensor:
    """The same values elsewhere; the sample axis is number `lead`."""
    if layout == "nhwc" and x.ndim > lead + 2:
        return x.movedim(lead + 1, -1).contiguous().movedim(-1, lead + 1)
    if layout == "sliced":
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), math.nan, dtype=x.dtype)
        wide[..., 1::2] = x
        return wide[..., 1::2]
    if layout == "unaligned":
        flat = torch.cat([x.new_zeros(1), x.flatten()])
        return flat[1:].view(x.shape)
    return x.contiguous().clone()


class Draw:
    """Random but reproducible cases: an odd number of axes is bound to meet in some of them."""

    def __init__(self, seed: int) -> None:
        self.pick = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.shape = self.pick.choice(SHAPES)
        self.count = self.pick.choice([0, 1, 2, 3, 9])
        self.wide = self.pick.random() < 0.3  # float64 arithmetic
        self.compute = torch.float64 if self.wide else torch.float32

    def normal(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(dtype)

    def dtype(self) -> torch.dtype:
        return self.pick.choice(DTYPES)

    def layout(self) -> str:
        return self.pick.choice(["nchw", "nchw", "nchw", "nhwc", "nhwc", "sliced", "unaligned"])

    def tensor(self, *lead: int, dtype: torch.dtype, layout: str) -> Tensor:
        return laid_out(self.normal(*lead, *self.shape, dtype=dtype), layout, len(lead))

    def seeds(self) -> Tensor:
        bounds = (-(2**63), 2**63 - 1)
        return torch.randint(*bounds, self.shape[:1], generator=self.generator)

    def noise(self, steps: int | None) -> dict[str, Tensor]:
        kind = self.pick.choice(["none", "noise", "seeds"])
        if kind == "seeds" and len(self.shape) > 1:
            return {"seeds": self.seeds()}
        if kind != "noise":
            return {}
        lead = () if steps is None else (steps,)
        return {"noise": self.tensor(*lead, dtype=self.dtype(), layout=self.layout())}

    def step(self, steps: int) -> int | Tensor:
        k = self.pick.randrange(steps)
        return k if self.pick.random() < 0.5 else torch.tensor(k)


def linear_case(draw: Draw) -> tuple[list[object], dict[str, object]]:
    """Positional arguments of `run` after out, and its options."""
    count, steps = draw.count, draw.pick.choice([None, 5])
    clipped = draw.pick.random() < 0.3
    x = draw.tensor(dtype=draw.dtype(), layout=draw.layout())
    x = None if draw.pick.random() < 0.1 and not clipped else x
    batch = draw.pick.choice([1, draw.shape[0]])
    lead = () if steps is None else (steps,)
    width = 5 * count + 3 if clipped else 2 * count + 2
    rows = draw.normal(*lead, batch, width, dtype=draw.compute)
    rows[torch.rand(rows.shape, generator=draw.generator) < 0.1] = 0
    outputs: list[Tensor | None] = []
    dtype, layout = draw.dtype(), draw.layout()
    for m in range(count):
        kind = draw.pick.choice([2, 2, 2, 1, 0])
        own = layout if draw.pick.random() < 0.9 else draw.layout()
        output = draw.tensor(kind, dtype=dtype, layout=own) if kind else None
        if output is not None and draw.pick.random() < 0.1:
            columns = [m + 1, count + m + 1]
            columns += [2 * count + 3 + m, 3 * count + 3 + m] if clipped else []
            rows[..., columns] = 0
            output.fill_(math.nan)
        outputs.append(output)
    options = {
        "step": draw.step(steps or 1000),
        "clip_range": 0.7 if clipped else None,
        **draw.noise(steps),
    }
    return [x, outputs, rows], options


def moments_case(
    draw: Draw,
) -> tuple[list[object], dict[str, object], dict[str, Tensor]]:
    """Positional arguments of `run_moments` after out, its options, and where moments go."""
    count, shape = max(draw.count, 1), draw.shape
    dtype, layout = draw.dtype(), draw.layout()
    means = [draw.tensor(dtype=dtype, layout=layout) for _ in range(count)]
    variances, weights = (
        draw.normal(count, *(n if draw.pick.random() < 0.7 else 1 for n in shape)).square() + 0.1
        for _ in range(2)
    )
    weights[torch.rand(weights.shape, generator=draw.generator) < 0.1] = 0
    weights[0] += 0.1  # somebody is active everywhere
    variances[torch.rand(variances.shape, generator=draw.generator) < 0.05] = 0
    numbers = [t.to(draw.compute) for t in (variances, weights)]
    options = {"step": draw.step(1000), **draw.noise(None)}
    results = {}
    for name in ("mean", "variance"):
        if draw.pick.random() < 0.5:
            results[name] = draw.tensor(dtype=draw.compute, layout=draw.layout())
    return [means, *numbers], options, results
