# SPDX-License-Identifier: Apache-2.0
"""A sampler is one class: the table builder makes coefficients of rules it has never seen."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from msdda_fast import InvalidSchedule, InvalidShape, InvalidWeights, ZeroVariance
from msdda_fast.levels import LevelRange
from msdda_fast.reference import fuse_posteriors
from msdda_fast.steps.rules import MixingRule, StepTerms
from msdda_fast.steps.table import rule_table

TIMES = torch.tensor([0.9, 0.6, 0.35, 0.1, 0.0], dtype=torch.float64)
WEIGHTS = torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.4, 0.0]], dtype=torch.float64)
LEVELS = [0.7, 0.3, 1.2]


class Flow:
    """What the rules below have in common: times in (0, 1), nothing clipped."""

    clip_range = input_scale = None
    levels = LevelRange(name="a", meaning="the noise of a flow's SDE", low=0.0, high=2.0)

    @property
    def timesteps(self) -> Tensor:
        return TIMES[:-1]

    @property
    def ends(self) -> tuple[Tensor, Tensor]:
        return TIMES[:-1, None, None], TIMES[1:, None, None]


class Sde(Flow):
    """Euler's step of a flow's SDE: no x0hat and epshat mean, and noise left in the last step."""

    def step(self, level: Tensor) -> StepTerms:
        t, r = self.ends
        unit = (t / (1 - t) * (t - r)).sqrt()
        drift = level**2 / (1 - t) / 2 * (r - t)
        return StepTerms(1 + drift, (r - t) + drift * (1 - t), level, unit)


class NoCommonFactor(Flow):
    """Rates that change with time, and a last step without noise where only their limit is left."""

    def step(self, level: Tensor) -> StepTerms:
        t, r = self.ends
        std = r * (1 - (1 - level / 2) * (r / t) ** level).clamp(min=0).sqrt()
        last = r == 0
        rate = torch.where(last, (level / 2).sqrt(), std)
        return StepTerms(r / t, 1 - r / t, rate, torch.where(last, 0.0, 1.0))


def posteriors(rule, k: int, x: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Means (M, D) and variances (M,) of step k, read off the rule."""
    terms = rule.step(torch.tensor(LEVELS, dtype=torch.float64))
    a, b, std = (
        scale.expand(4, 1, 3)[k, 0, :, None]
        for scale in (terms.x_scale, terms.output_scale, terms.std)
    )
    return a * x + b * outputs, std[:, 0] ** 2


@pytest.mark.parametrize("rule", [Sde(), NoCommonFactor()], ids=lambda rule: type(rule).__name__)
def test_the_table_of_any_rule_is_eq_7(rule: Flow) -> None:
    table = rule_table(rule, levels=LEVELS, weights=WEIGHTS, dtype=torch.float64)
    assert table.timesteps.equal(TIMES[:-1]) and table.rows.shape == (4, 2, 8)
    x, *outputs = torch.randn(4, 6, dtype=torch.float64).unbind()
    outputs = torch.stack(outputs)
    layout = table[0].layout
    noisy = 4 if isinstance(rule, Sde) else 3
    for k in range(noisy):
        means, variances = posteriors(rule, k, x, outputs)
        for b, weights in enumerate(WEIGHTS):
            mean, var = fuse_posteriors(means[:, None], variances[:, None, None], weights[:, None])
            row = table[k].row[b]
            found = row[layout.x_scale] * x + (row[layout.cond, None] * outputs).sum(0)
            torch.testing.assert_close(found, mean[0], rtol=1e-13, atol=1e-13)
            assert row[layout.noise_scale] ** 2 == pytest.approx(float(var.flatten()[0]))
    assert bool((table.std[-1] > 0).all()) == isinstance(rule, Sde)


def test_shares_follow_the_rates_of_their_step() -> None:
    table = rule_table(NoCommonFactor(), levels=LEVELS, weights=WEIGHTS)
    assert table.share[:, 0, 0].diff().abs().min() > 1e-3
    precision = WEIGHTS[0] / torch.tensor(LEVELS, dtype=torch.float64)  # the limit: c^2 ~ level
    torch.testing.assert_close(table.share[-1, 0], precision / precision.sum(), rtol=1e-12, atol=0)


def test_equal_levels_give_the_weights() -> None:
    for rule in (Sde(), NoCommonFactor()):
        table = rule_table(rule, levels=[0.7] * 3, weights=WEIGHTS)
        torch.testing.assert_close(table.share, WEIGHTS.expand(4, 2, 3), rtol=1e-14, atol=0)


def test_levels_without_noise_need_a_policy_as_etas_do() -> None:
    with pytest.raises(ZeroVariance, match=r"\[0.0, 0.3, 1.2\] with weights \[0.2"):
        rule_table(Sde(), levels=[0.0, 0.3, 1.2], weights=WEIGHTS)
    table = rule_table(Sde(), levels=[0.0] * 3, weights=WEIGHTS)
    assert table.share.equal(WEIGHTS.expand(4, 2, 3)) and not table.std.any()


def test_weights_may_be_a_function_of_the_step_where_the_batch_is_known() -> None:
    table = rule_table(
        Sde(), levels=[0.7] * 3, weights=lambda k: [1.0, 0.0, 0.0] if k else WEIGHTS, batch_size=2
    )
    assert table.share[1:, :, 0].eq(1).all() and table.share[0, 0, 1] > 0
    with pytest.raises(InvalidShape, match=r"guidance_scale has shape \(3, 3\), expected B = 2"):
        rule_table(Sde(), levels=LEVELS, weights=None, guidance_scale=[[1.0] * 3] * 3, batch_size=2)


@pytest.mark.parametrize("level", [-0.1, 2.1, math.inf, math.nan])
def test_a_level_of_another_kind_is_named(level: float) -> None:
    message = (
        rf"objective 1: a must lie in \[0, 2\], got {level}; a is the noise of a flow's SDE, and a "
        "level of another kind of sampler is another quantity"
    )
    with pytest.raises(InvalidSchedule, match=message):
        rule_table(Sde(), levels=[0.7, level, 0.3], weights=WEIGHTS)


@pytest.mark.parametrize("levels", [[[0.8, 1.0]], [], 1.0], ids=["2-d", "empty", "0-d"])
def test_levels_of_another_shape_are_refused(levels: object) -> None:
    with pytest.raises(InvalidShape, match=r"as have shape .* expected \(M,\)"):
        rule_table(Sde(), levels=levels, weights=None)


@dataclass
class Bounded(Sde):
    """With mixing, whose levels end at `high`."""

    high: float = 1.0
    mixes_unless_told: bool = False

    @property
    def levels(self) -> LevelRange:
        return LevelRange(name="a", meaning="a test", low=0.0, high=self.high)

    def eps_scale(self, level: Tensor) -> Tensor:
        t, r = self.ends
        return (t - r) + level**2 / 2 * (t - r)

    def step_at(self, rate: Tensor) -> StepTerms:
        return self.step(rate)


def test_predictions_are_mixed_only_by_rules_that_say_how() -> None:
    assert isinstance(Bounded(), MixingRule) and not isinstance(Sde(), MixingRule)
    with pytest.raises(InvalidSchedule, match="Sde does not say what they count"):
        rule_table(Sde(), levels=LEVELS, weights=WEIGHTS, fusion="eps")
    rule, levels = Bounded(high=2.0), torch.tensor(LEVELS, dtype=torch.float64)
    table = rule_table(rule, levels=LEVELS, weights=WEIGHTS, fusion="eps", dtype=torch.float64)
    precision = WEIGHTS / levels**2
    level_w = precision.sum(1).rsqrt()
    mixture = precision * (1 + levels**2 / 2)
    mixture = mixture / mixture.sum(1, keepdim=True)
    for b in range(2):
        terms = rule.step(level_w[b])
        row = table.rows[:, b]
        torch.testing.assert_close(row[:, 0], terms.x_scale.flatten())
        torch.testing.assert_close(row[:, 4:7], terms.output_scale[:, 0] * mixture[b])
        torch.testing.assert_close(row[:, 7], terms.std.flatten())


def test_a_mixture_may_not_step_beyond_the_levels() -> None:
    with pytest.raises(InvalidWeights, match=r"a_w, whose rate is 1\.\d+ here: .* at most 1,"):
        rule_table(
            Bounded(), levels=[1.0, 0.8, 0.8], weights=[1.8, -0.4, -0.4], extrapolate=True,
            fusion="eps",
        )  # fmt: skip
