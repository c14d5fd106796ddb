# SPDX-License-Identifier: Apache-2.0
"""Theorem 1 as properties: the fused Gaussian is the normalised product of experts (Eq. 6, 7)."""

import math
from collections.abc import Callable
from typing import NamedTuple

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from msdda_fast import fast_fuse_step
from msdda_fast.reference import fuse_posteriors
from msdda_fast.steps.shares import fusion_shares


class Experts(NamedTuple):
    """M Gaussians over one scalar, and their preference weights."""

    means: list[float]
    stds: list[float]  # in (0, 1], as etas are
    weights: list[float]  # positive, sum 1


def by_reference(experts: Experts) -> tuple[float, float]:
    means, stds, weights = (torch.tensor(field, dtype=torch.float64) for field in experts)
    mean, var = fuse_posteriors(means[:, None], stds**2, weights)
    return float(mean), float(var)


def by_fast_fuse_step(experts: Experts) -> tuple[float, float]:
    means, stds, weights = (torch.tensor(field, dtype=torch.float64) for field in experts)
    step = fast_fuse_step(
        means[:, None], stds**2, weights, noise=means.new_zeros(1), return_moments=True
    )
    return float(step.mean), float(step.variance)


def by_shares(experts: Experts) -> tuple[float, float]:
    means, stds, weights = (torch.tensor(field, dtype=torch.float64) for field in experts)
    share, eta_w = fusion_shares(weights, stds)
    return float(share @ means), float(eta_w) ** 2


Fuse = Callable[[Experts], tuple[float, float]]
every_way = pytest.mark.parametrize(
    "fuse", [by_reference, by_fast_fuse_step, by_shares], ids=lambda fuse: fuse.__name__
)

means = st.floats(-4, 4)
stds = st.floats(0.05, 1)
raw_weights = st.floats(0.01, 1)


@st.composite
def experts(draw: st.DrawFn, min_size: int = 1) -> Experts:
    drawn = draw(st.lists(st.tuples(means, stds, raw_weights), min_size=min_size, max_size=5))
    mean, std, weight = (list(column) for column in zip(*drawn, strict=True))
    return Experts(mean, std, [w / sum(weight) for w in weight])


def log_density(x: Tensor, mean: float, std: float) -> Tensor:
    return -(((x - mean) / std) ** 2) / 2 - math.log(std)


@every_way
@settings(deadline=None, max_examples=50)  # a busy machine is not a failure
@given(experts=experts())
def test_fused_density_is_the_product_up_to_a_constant(fuse: Fuse, experts: Experts) -> None:
    mean, var = fuse(experts)
    x = torch.linspace(-6, 6, 25, dtype=torch.float64)
    columns = zip(*experts, strict=True)
    product = sum(w * log_density(x, mu, std) for mu, std, w in columns)
    ratio = log_density(x, mean, math.sqrt(var)) - product
    magnitude = product.abs().max()
    assert (ratio - ratio.mean()).abs().max() <= 1e-12 * magnitude


@every_way
@settings(deadline=None, max_examples=50)
@given(experts=experts(), data=st.data())
def test_one_hot_returns_that_expert(fuse: Fuse, experts: Experts, data: st.DataObject) -> None:
    chosen = data.draw(st.integers(0, len(experts.means) - 1))
    one_hot = [float(m == chosen) for m in range(len(experts.means))]
    mean, var = fuse(experts._replace(weights=one_hot))
    assert mean == pytest.approx(experts.means[chosen], rel=1e-15)
    assert var == pytest.approx(experts.stds[chosen] ** 2, rel=1e-15)


@every_way
@settings(deadline=None, max_examples=50)
@given(experts=experts(), data=st.data())
def test_order_does_not_matter(fuse: Fuse, experts: Experts, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(experts.means))))
    permuted = Experts(*([column[m] for m in order] for column in experts))
    assert fuse(permuted) == pytest.approx(fuse(experts), rel=1e-12, abs=1e-14)


@every_way
@settings(deadline=None, max_examples=50)
@given(experts=experts(), part=st.floats(0.1, 0.9), data=st.data())
def test_splitting_an_expert_in_two_changes_nothing(
    fuse: Fuse, experts: Experts, part: float, data: st.DataObject
) -> None:
    m = data.draw(st.integers(0, len(experts.means) - 1))
    split = Experts(*([*column, column[m]] for column in experts))
    split.weights[m], split.weights[-1] = part * split.weights[m], (1 - part) * split.weights[-1]
    assert fuse(split) == pytest.approx(fuse(experts), rel=1e-12, abs=1e-14)


@every_way
@settings(deadline=None, max_examples=50)
@given(experts=experts(), std=stds)
def test_equal_variances_give_db_mpa(fuse: Fuse, experts: Experts, std: float) -> None:
    mean, var = fuse(experts._replace(stds=[std] * len(experts.stds)))
    average = sum(w * mu for w, mu in zip(experts.weights, experts.means, strict=True))
    assert mean == pytest.approx(average, rel=1e-12, abs=1e-14)
    assert var == pytest.approx(std**2, rel=1e-12)


@every_way
@settings(deadline=None, max_examples=50)
@given(experts=experts())
def test_fused_std_lies_between_the_smallest_and_the_largest(fuse: Fuse, experts: Experts) -> None:
    _, var = fuse(experts)
    slack = 1 + 1e-14
    assert min(experts.stds) / slack <= math.sqrt(var) <= max(experts.stds) * slack


@every_way
@settings(deadline=None, max_examples=50)
@given(experts=experts(min_size=2), scale=st.floats(0.1, 1))
def test_scaling_all_stds_scales_the_fused_one_and_keeps_the_mean(
    fuse: Fuse, experts: Experts, scale: float
) -> None:
    mean, var = fuse(experts)
    scaled = fuse(experts._replace(stds=[scale * std for std in experts.stds]))
    assert scaled == pytest.approx((mean, scale**2 * var), rel=1e-12, abs=1e-14)
