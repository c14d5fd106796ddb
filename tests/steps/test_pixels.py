# SPDX-License-Identifier: Apache-2.0
"""Theorem 1 with weights of every pixel: each is sampled as if all had its weights."""

import math

import diffusers
import pytest
import torch
from torch import Tensor

import msdda_fast as mf
from msdda_fast.kernels import registry
from msdda_fast.steps.pixels import PixelWeights
from msdda_fast.steps.side_by_side import side_by_side
from tests.gaussian_world import (
    Gaussian,
    ddim_chain,
    fuse_chains,
    grid,
    measured_moments,
    moments,
    sd15_scheduler,
)
from tests.steps.flow_world import flow_scheduler

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
BACKENDS = [name for name in registry.NAMES if registry.available(name) and name != "triton"]
EXPERTS = (Gaussian(0.5, 0.3), Gaussian(-0.4, 0.8))
ETAS = (1.0, 0.6)
#: What five pixels prefer.
PIXELS = ((1.0, 0.0), (0.0, 1.0), (0.3, 0.7), (0.5, 0.5), (0.9, 0.1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_pixel_has_the_moments_of_its_own_product(backend: str) -> None:
    scheduler, steps = sd15_scheduler(), 12
    chains = [
        ddim_chain(expert, eta, sd15_scheduler(), steps)
        for expert, eta in zip(EXPERTS, ETAS, strict=True)
    ]
    grid(scheduler, steps)
    for p, own in enumerate(PIXELS):

        def sample(x_T: Tensor, noise: Tensor, p: int = p) -> Tensor:
            weights = torch.tensor(PIXELS, dtype=torch.float64).T[None, :, None]  # (1, M, 1, P)
            x_0 = mf.denoise(
                [expert.denoiser(scheduler) for expert in EXPERTS],
                x_T[..., None].expand(-1, -1, len(PIXELS)).contiguous(),
                scheduler=scheduler,
                num_steps=steps,
                weights=weights.expand(len(x_T), -1, -1, -1),
                etas=ETAS,
                noise=noise[..., None].expand(-1, -1, -1, len(PIXELS)),
                backend=backend,
            )
            return x_0[..., p]

        got, exact = measured_moments(sample, steps), moments(fuse_chains(chains, own))
        assert math.isclose(got.mean, exact.mean, rel_tol=1e-10, abs_tol=1e-12)
        assert math.isclose(got.var, exact.var, rel_tol=1e-10)


SHAPE = (2, 3, 4, 5)
#: Makers, since diffusers warns of itself when it makes one of them.
CASES = {
    "DDIM": (lambda: diffusers.DDIMScheduler(clip_sample=False), (1.0, 0.5)),
    "DDIM, clipped": (lambda: diffusers.DDIMScheduler(clip_sample=True), (1.0, 0.5)),
    "DDIM, no noise": (lambda: diffusers.DDIMScheduler(clip_sample=False), (0.0, 0.0)),
    "Euler ancestral": (diffusers.EulerAncestralDiscreteScheduler, (1.0, 0.5)),
    "TCD": (diffusers.TCDScheduler, (0.8, 0.3)),
    "FlowSDE": (lambda: flow_scheduler(4), (mf.FlowSDE(0.7), mf.FlowSDE(0.4))),
    "CPS, by Eq. 7": (lambda: flow_scheduler(4), (mf.CPS(0.9), mf.CPS(0.4))),
}


def drawn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pixel_weights(seed: int = 1) -> Tensor:
    """(B, M, 1, h, w), in which a column has one objective alone."""
    first = drawn(SHAPE[0], 1, 1, *SHAPE[2:], seed=seed).sigmoid()
    first[..., 0], first[..., 1] = 0.0, 1.0
    return torch.cat([first, 1 - first], 1)


def networks() -> list:
    return [lambda x, t, a=a: torch.tanh(a * x) + 0.1 * a for a in (0.5, 0.8)]


def sample(case: str, weights, **more) -> Tensor:
    scheduler, levels = CASES[case]
    given = {
        "scheduler": scheduler(),
        "num_steps": None if isinstance(levels[0], mf.FlowSDE | mf.CPS) else 4,
        "weights": weights,
        "levels": list(levels),
        "noise": drawn(4, *SHAPE, seed=2),
        "fusion": "posterior",
    }
    return mf.denoise(networks(), drawn(*SHAPE), **{**given, **more})


@pytest.mark.parametrize("case", CASES)
def test_each_pixel_is_drawn_as_if_all_had_its_weights(case: str) -> None:
    """The last step included, where variances vanish and only their ratios are left."""
    weights = pixel_weights()
    together = sample(case, weights)
    for row in range(SHAPE[2]):
        for column in range(SHAPE[3]):
            alone = sample(case, weights[:, :, 0, row, column])
            error = (together - alone)[..., row, column].abs().max()
            assert error <= 1e-12 * alone.abs().max()


def test_the_same_weights_in_all_pixels_are_plain_weights() -> None:
    rows = torch.tensor([[0.3, 0.7], [0.6, 0.4]], dtype=torch.float64)
    plain = sample("DDIM", rows)
    everywhere = sample("DDIM", rows[..., None, None, None])
    assert (plain - everywhere).abs().max() <= 1e-13 * plain.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_step_of_hard_halves_is_each_objectives_own(backend: str) -> None:
    """A weight of 0 lets nothing through, NaN included."""
    left = torch.zeros(2, 1, 1, *SHAPE[2:], dtype=torch.float64)
    left[..., :2] = 1
    halves = torch.cat([left, 1 - left], 1)
    scheduler = CASES["DDIM"][0]()
    outputs = drawn(2, 1, *SHAPE, seed=5)
    outputs[0, ..., 2:] = torch.nan
    outputs[1, ..., :2] = torch.inf
    x = drawn(*SHAPE)

    def step(weights) -> Tensor:
        table = mf.coefficient_table(scheduler, 4, etas=ETAS, weights=weights, dtype=torch.float64)
        return mf.fused_ddim_step(x, outputs, table[1], seeds=[1, 2], step=1, backend=backend)

    got = step(halves)
    assert got.isfinite().all()
    for part, weights in ((slice(0, 2), [1, 0]), (slice(2, 5), [0, 1])):
        own = step(weights)[..., part]
        assert (got[..., part] - own).abs().max() <= 1e-14 * own.abs().max()


def test_strength_and_guidance_go_with_weights_of_pixels() -> None:
    """They are of outputs, not of pixels: the mean of each objective has them."""
    weights, strength = pixel_weights(), [0.5, 1.5]
    base = {"strength": strength, "base": lambda x, t: 0.3 * x}
    together = sample("DDIM", weights, **base)
    alone = sample("DDIM", weights[:, :, 0, 1, 3], **base)
    assert (together - alone)[..., 1, 3].abs().max() <= 1e-12
    x, outputs = drawn(*SHAPE), drawn(2, 2, *SHAPE, seed=6)
    given = {"etas": ETAS, "guidance_scale": [3.0, 5.0], "dtype": torch.float64}
    steps = [
        mf.fused_ddim_step(
            x,
            outputs,
            mf.coefficient_table(CASES["DDIM"][0](), 4, **given, weights=w)[0],
            seeds=[1, 2],
        )
        for w in (weights, weights[:, :, 0, 1, 3])
    ]
    assert (steps[0] - steps[1])[..., 1, 3].abs().max() <= 1e-13


def test_guidance_may_change_on_the_way() -> None:
    """As a callback of a pipeline may ask for."""

    def table(guidance: float):
        given = {"etas": ETAS, "guidance_scale": guidance, "dtype": torch.float64}
        return mf.coefficient_table(CASES["DDIM"][0](), 4, **given, weights=pixel_weights())

    assert torch.allclose(table(2.0).guided(5.0).pixels.means, table(5.0).pixels.means, rtol=1e-14)


def test_images_with_and_without_weights_of_pixels_share_a_batch() -> None:
    scheduler = CASES["DDIM"][0]()

    def table(weights):
        return mf.coefficient_table(scheduler, 4, etas=ETAS, weights=weights, dtype=torch.float64)

    own = pixel_weights()[:1]
    tables = [table(own), table([[0.3, 0.7]])]
    batch, x, outputs = side_by_side(tables), drawn(*SHAPE), drawn(2, 1, *SHAPE, seed=6)
    for k in range(4):
        together = mf.fused_ddim_step(x, outputs, batch[k], seeds=[1, 2], step=k)
        mixed = mf.fused_ddim_step(x, outputs, batch.mixture(k), noise=x)
        for b, one in enumerate(tables):
            image = slice(b, b + 1)
            given = (x[image], outputs[:, :, image])
            alone = mf.fused_ddim_step(*given, one[k], seeds=[1 + b], step=k)
            assert (together[image] - alone).abs().max() <= 1e-14 * alone.abs().max()
            alone = mf.fused_ddim_step(*given, one.mixture(k), noise=x[image])
            assert (mixed[image] - alone).abs().max() <= 1e-14 * alone.abs().max()
    assert torch.equal(batch.images(slice(0, 1)).pixels.own, tables[0].pixels.own)


def test_weights_of_the_rest_follow_the_step() -> None:
    """An objective with weights of its own, and two that share the rest by those of the step."""
    own = torch.zeros(1, 3, 1, 1, 2, dtype=torch.float64)
    own[:, 0, ..., 0] = 0.4
    pixels = PixelWeights(own, 1 - own.sum(1), torch.tensor([[False, True, True]]))
    step = torch.tensor([[0.5, 0.1, 0.4]], dtype=torch.float64)
    expected = torch.tensor([[0.4, 0.0], [0.6 * 0.2, 0.2], [0.6 * 0.8, 0.8]], dtype=torch.float64)
    assert torch.allclose(pixels.at(step).flatten(1), expected, rtol=1e-15)
    assert torch.allclose(pixels.mean(step[None]).flatten(), expected.mean(1), rtol=1e-15)


class TestRefusals:
    def test_pixels_whose_weights_do_not_sum_to_1(self) -> None:
        with pytest.raises(mf.InvalidWeights, match=r"weights at index \[0, 0, 2, 3\] are"):
            wrong = pixel_weights()
            wrong[0, 0, 0, 2, 3] += 0.1
            sample("DDIM", wrong)

    @pytest.mark.parametrize(
        "shape, message",
        [
            ((2, 2, 1, 4, 4), r"\(2, 2, 1, 4, 4\), expected \(B, M, \*S\) for x_t .* = \(2, 3, 4"),
            ((2, 2, 4, 5), r"expected \(B, M, \*S\) for x_t"),
            ((1, 2, 1, 4, 5), r"expected \(B, M, \*S\) with B = 2 and M = 2"),
            ((2, 3, 1, 4, 5), r"expected \(B, M, \*S\) with B = 2 and M = 2"),
        ],
    )
    def test_another_shape(self, shape: tuple[int, ...], message: str) -> None:
        with pytest.raises(mf.InvalidShape, match=message):
            sample("DDIM", torch.full(shape, 1 / shape[1]))

    def test_mixing_of_predictions_at_unequal_levels(self) -> None:
        with pytest.raises(mf.InvalidSchedule, match="fusion='posterior', or equal levels"):
            sample("CPS, by Eq. 7", pixel_weights(), fusion=None)
        equal = [mf.CPS(0.5)] * 2
        got = sample("CPS, by Eq. 7", pixel_weights(), fusion="eps", levels=equal)
        assert torch.equal(got, sample("CPS, by Eq. 7", pixel_weights(), levels=equal))

    @pytest.mark.parametrize(
        "policy, error", [("error", mf.ZeroVariance), ("dominate", mf.InvalidSchedule)]
    )
    def test_levels_of_0_and_others(self, policy: str, error: type[Exception]) -> None:
        with pytest.raises(error):
            sample("DDIM", pixel_weights(), levels=[0.0, 1.0], zero_variance=policy)

    def test_rates_where_all_levels_are_0(self) -> None:
        weights = pixel_weights()
        given = {"levels": [0.0, 0.0], "zero_variance": "ratio", "rates": [1.0, 2.0]}
        alone = sample("DDIM", weights[:, :, 0, 1, 3], **given)
        together = sample("DDIM", weights, **given)
        assert (together - alone)[..., 1, 3].abs().max() <= 1e-12
