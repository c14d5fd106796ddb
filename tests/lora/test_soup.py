# SPDX-License-Identifier: Apache-2.0
"""Merging adapters by their products, which is exact, and by their factors, which is not."""

import math

import pytest
import torch
from torch import Tensor

from msdda_fast.errors import AdapterMismatch
from msdda_fast.lora.adapter import LoraAdapter, LoraFactors
from msdda_fast.lora.soup import merge_adapters
from msdda_fast.lora.stack import stack_adapters

RANK, SIZE = 4, 64


def random_factors(seed: int, rank: int = RANK) -> tuple[Tensor, Tensor]:
    """B (out, r) and A (r, in), float64."""
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(SIZE, rank, generator=generator, dtype=torch.float64)
    return up, torch.randn(rank, SIZE, generator=generator, dtype=torch.float64)


def stacked(up: Tensor, down: Tensor, scale: float = 1.0, path: str = "layer"):
    adapter = LoraAdapter("one", {path: LoraFactors(down, up)})
    return stack_adapters([adapter], scales=[scale], dtype=torch.float64)


def update(factors: LoraFactors) -> Tensor:
    return factors.up.flatten(1) @ factors.down.flatten(1)


def merged(adapters, weights, merge) -> Tensor:
    names = map(str, range(len(adapters)))
    return update(merge_adapters(dict(zip(names, adapters, strict=True)), weights, merge)["layer"])


@pytest.mark.parametrize("angle", [math.pi / 2, 2.0, math.pi])
def test_gauge(angle):
    """(B, A) and (B Q^T, Q A) are one model, with Q turning by an angle in planes.

    The product merge returns it. The factor merge makes (B + B Q^T)(A + Q A) / 4, in which
    (2 + Q + Q^T) / 4 = (1 + cos angle) / 2 is left of it: nothing at all at 180 degrees.
    """
    up, down = random_factors(0)
    turn = torch.tensor(
        [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]],
        dtype=torch.float64,
    )
    rotation = torch.block_diag(turn, turn)
    twins = [stacked(up, down), stacked(up @ rotation.T, rotation @ down)]
    assert torch.allclose(update(LoraFactors(down, up)), merged(twins, [0.5, 0.5], "product"))
    factor = merged(twins, [0.5, 0.5], "factor")
    torch.testing.assert_close(factor, (1 + math.cos(angle)) / 2 * up @ down)


def test_factors_drawn_apart_lose_norm():
    """Of independent factors sqrt(1/2) of the norm is left, and as much is wrong.

    (B1 + B2)(A1 + A2) / 4 has four terms of a quarter of the square of a term of
    (B1 A1 + B2 A2) / 2, which has two.
    """
    kept, missed = [], []
    for seed in range(50):
        adapters = [stacked(*random_factors(2 * seed + i)) for i in (0, 1)]
        product, factor = (merged(adapters, [0.5, 0.5], merge) for merge in ("product", "factor"))
        kept.append(factor.square().sum() / product.square().sum())
        missed.append((factor - product).square().sum() / product.square().sum())
    assert torch.stack(kept).mean().sqrt().item() == pytest.approx(0.5**0.5, abs=0.01)
    assert torch.stack(missed).mean().sqrt().item() == pytest.approx(0.5**0.5, abs=0.01)


def test_ranks_scales_and_modules_may_differ_in_the_product():
    one, two = random_factors(0, rank=2), random_factors(1, rank=3)
    first = stacked(*one, scale=3.0) | stacked(*one, path="first alone")
    second = stacked(*two, scale=0.5)
    found = merge_adapters(
        {"first": first, "second": second, "base": {}}, [0.2, 0.3, 0.5], "product"
    )
    torch.testing.assert_close(
        update(found["layer"]), 0.2 * 3.0 * one[0] @ one[1] + 0.3 * 0.5 * two[0] @ two[1]
    )
    torch.testing.assert_close(update(found["first alone"]), 0.2 * one[0] @ one[1])
    assert {len(factors.down) for factors in found.values()} == {5}


def test_scales_are_folded_into_one_factor_before_averaging():
    one, two = random_factors(0), random_factors(1)
    found = merged([stacked(*one, scale=3.0), stacked(*two)], [0.2, 0.8], "factor")
    expected = (0.2 * 3.0 * one[0] + 0.8 * two[0]) @ (0.2 * one[1] + 0.8 * two[1])
    torch.testing.assert_close(found, expected)


def test_convolutions():
    generator = torch.Generator().manual_seed(0)
    shapes = [((8, rank, 1, 1), (rank, 6, 3, 3)) for rank in (2, 4)]
    parts = [[torch.randn(shape, generator=generator) for shape in pair] for pair in shapes]
    found = merge_adapters(
        {str(i): stacked(*part) for i, part in enumerate(parts)}, [0.3, 0.7], "product"
    )["layer"]
    assert (found.down.shape, found.up.shape) == ((6, 6, 3, 3), (8, 6, 1, 1))
    expected = sum(
        w * up.double().flatten(1) @ down.double().flatten(1)
        for w, (up, down) in zip([0.3, 0.7], parts, strict=True)
    )
    torch.testing.assert_close(update(found), expected)


@pytest.mark.parametrize("second", [random_factors(1, rank=3), None])
def test_factors_of_other_ranks_are_refused(second):
    adapters = {"warm": stacked(*random_factors(0)), "cool": stacked(*second) if second else {}}
    rank = 3 if second else 0
    with pytest.raises(AdapterMismatch, match=rf"'layer' .*\{{'warm': 4, 'cool': {rank}\}}"):
        merge_adapters(adapters, [0.5, 0.5], "factor")


def test_other_words_are_refused():
    with pytest.raises(ValueError, match=r"'product' or 'factor', got 'mean'"):
        merge_adapters({}, [], "mean")


def test_the_factor_merge_over_rotations():
    """Mean (1 - w)^2 B_1 A_1 + w^2 B_2 A_2, and noise of the norm that the module states."""
    w, (up_1, down_1), (up_2, down_2) = 0.3, random_factors(0), random_factors(1)
    adapters = {"one": stacked(up_1, down_1), "two": stacked(up_2, down_2)}
    draws = torch.stack(
        [
            update(merge_adapters(adapters, [1 - w, w], "factor", seed)["layer"])
            for seed in range(400)
        ]
    )
    one, two = up_1 @ down_1, up_2 @ down_2
    expected = (1 - w) ** 2 * one + w**2 * two
    cross = (up_1.norm() * down_2.norm()) ** 2 + (up_2.norm() * down_1.norm()) ** 2
    noise = (w * (1 - w)) ** 2 * (cross + 2 * (one * two).sum()) / RANK
    found = (draws - expected).square().sum((1, 2))
    assert float(found.mean() / noise) == pytest.approx(1, abs=0.05)
    error = (draws.mean(0) - expected).square().sum() / noise
    assert 0.5 / 400 < float(error) < 1.5 / 400  # a mean of 400 has a 400th of the variance
    product = (1 - w) * one + w * two
    assert float((draws.mean(0) - product).square().sum() / noise) > 0.5


def test_a_rotation_changes_no_adapter():
    """At a weight of 1 nothing of it is seen, and the product merge has none."""
    adapters = {"one": stacked(*random_factors(0)), "two": stacked(*random_factors(1))}
    alone = update(merge_adapters(adapters, [0.0, 1.0], "factor", 7)["layer"])
    up, down = random_factors(1)
    torch.testing.assert_close(alone, up @ down)
    with pytest.raises(ValueError, match="depends on no rotation"):
        merge_adapters(adapters, [0.5, 0.5], "product", 7)
