# SPDX-License-Identifier: Apache-2.0
"""The judge is judged: by diffusers, by hand-computed numbers, and by its refusals."""

import pytest
import torch

from msdda_fast.errors import ZeroVariance
from msdda_fast.reference import algorithm_1, ddim_posterior, fuse_posteriors, guide
from tests.gaussian_world import grid, sd15_scheduler


@pytest.mark.sweep
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 0.8, 1.0])
@pytest.mark.parametrize("clip_range", [None, 0.7])
def test_posterior_is_diffusers_step(
    prediction_type: str, eta: float, clip_range: float | None
) -> None:
    scheduler = sd15_scheduler(
        prediction_type=prediction_type,
        clip_sample=clip_range is not None,
        clip_sample_range=clip_range or 1.0,
    )
    generator = torch.Generator().manual_seed(0)
    x, output, z = torch.randn(3, 2, 4, generator=generator, dtype=torch.float64)
    for t, a, b in grid(scheduler, 50)[::7]:
        mean, var = ddim_posterior(x, output, a, b, eta, prediction_type, clip_range)
        step = scheduler.step(output, t, x, eta=eta, variance_noise=z).prev_sample
        assert (mean + var.sqrt() * z - step).abs().max() < 1e-14 * step.abs().max()


def test_posterior_refuses_an_unknown_prediction() -> None:
    x = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="flow"):
        ddim_posterior(x, x, 0.5, 0.6, 1.0, prediction_type="flow")


def test_fuse_by_hand() -> None:
    """Precisions .25/1 + .75/.25 = 3.25; mean (.25 * 2 + 3 * -1) / 3.25."""
    mean, var = fuse_posteriors(
        torch.tensor([[2.0], [-1.0]]), torch.tensor([1.0, 0.25]), torch.tensor([0.25, 0.75])
    )
    assert float(var) == pytest.approx(1 / 3.25)
    assert float(mean) == pytest.approx(-2.5 / 3.25)


def test_fuse_broadcasts_from_the_left() -> None:
    means = torch.arange(12.0).reshape(2, 3, 2)
    per_model = torch.tensor([1.0, 0.25]), torch.tensor([0.25, 0.75])
    per_sample = [values[:, None].expand(2, 3) for values in per_model]
    per_pixel = [values[:, None, None].expand(2, 3, 2) for values in per_model]
    expected = fuse_posteriors(means, *per_model)[0]
    for variances, weights in (per_sample, per_pixel):
        assert fuse_posteriors(means, variances, weights)[0].equal(expected)


@pytest.mark.parametrize("var", [0.0, -1.0])
def test_fuse_raises_at_zero_variance_even_without_weight(var: float) -> None:
    with pytest.raises(ZeroVariance, match="positive"):
        fuse_posteriors(torch.zeros(2, 1), torch.tensor([1.0, var]), torch.tensor([1.0, 0.0]))


def test_fuse_raises_without_positive_precision() -> None:
    with pytest.raises(ZeroVariance, match="total precision"):
        fuse_posteriors(torch.zeros(2, 1), torch.tensor([1.0, 0.25]), torch.tensor([1.5, -0.5]))


def test_guide_by_hand() -> None:
    assert float(guide(torch.tensor(1.0), torch.tensor(3.0), 7.5)) == 16.0


def test_algorithm_1_walks_the_steps_in_order() -> None:
    """Mean x + k + 1, variance 4, two steps: x_0 = 0 + 1 + 2 z_0 + 2 + 2 z_1."""
    x_0 = algorithm_1(
        [lambda x, k: (x + k + 1, torch.tensor(4.0))],
        torch.tensor([1.0]),
        torch.zeros(1, 1),
        torch.tensor([[[1.0]], [[10.0]]]),
    )
    assert float(x_0) == 25.0
