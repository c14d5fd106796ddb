# SPDX-License-Identifier: Apache-2.0
"""DAS: weighted particles of a tilted distribution that is Gaussian, so that all of it is known."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

import msdda_fast as mf
from msdda_fast.methods import das
from msdda_fast.methods.das import DAS
from msdda_fast.methods.model import BASE, Cost
from msdda_fast.methods.sd import SD
from msdda_fast.steps.ddim import ddim_grid
from tests.gaussian_world import (
    Gaussian,
    Moments,
    Step,
    ddim_chain,
    grid,
    moments,
    sd15_scheduler,
)
from tests.methods.gaussian_model import GaussianModel, exact_moments
from tests.methods.search_world import (
    INDIFFERENT,
    PROMPTS,
    REWARDS,
    SEEDS,
    WEIGHTS,
    Redness,
    has_mean,
)

DATA = Gaussian(0.5, 0.25)
ALPHA, CENTRE, STEPS, P = 0.1, 1.5, 50, 2000
METHOD = DAS(num_particles=P, alpha=ALPHA, max_rows=10**6)


@dataclass
class Vectors(GaussianModel):
    """Independent scalars, `dimensions` to a latent; all particles drawn at once."""

    dimensions: int = 2

    def initial(self) -> Tensor:
        return self.noise(STEPS, purpose=7)

    def noise(self, k: int, particles: int = 1, *, purpose: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * (10 * self.seed + purpose) + k)
        shape = (particles * self.batch_size, self.dimensions)
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def uniform(self, k: int, *, purpose: int) -> Tensor:
        return torch.special.ndtr(self.noise(k, purpose=purpose)[:, 0])

    def rewards(self, images: Tensor, rows: Tensor | None = None) -> dict[str, Tensor]:
        self.cost.reward_calls += len(images)
        return {"near": -(images - CENTRE).square().sum(1) / 2}


def model_of(batch_size: int = 20, **options) -> Vectors:
    return Vectors({BASE: DATA}, {"near": 1.0}, batch_size=batch_size, **options)


def tilted(scheduler=None) -> tuple[Moments, float]:
    """The target in one dimension, N(m, V) exp(-(x - c)^2 / (2 alpha)) with the m and V of the
    sampler, and the logarithm of its normaliser."""
    base = moments(ddim_chain(DATA, 1.0, scheduler or sd15_scheduler()))
    var = 1 / (1 / base.var + 1 / ALPHA)
    mean = var * (base.mean / base.var + CENTRE / ALPHA)
    spread = base.var + ALPHA
    log_z = (math.log(ALPHA / spread) - (base.mean - CENTRE) ** 2 / spread) / 2
    return Moments(mean, var), log_z


def estimates(method: DAS, model: Vectors) -> dict[str, Tensor]:
    """What the particles of each sample say of the target, (B,) each."""
    with torch.no_grad():
        x, log_weights = method.particles(model)
    weights = log_weights.softmax(0)
    first = x[:, 0].view_as(log_weights)
    mean = (weights * first).sum(0)
    return {
        "mean": mean,
        "var": (weights * (first - mean).square()).sum(0),
        "log_z": log_weights.logsumexp(0) - math.log(len(log_weights)),
    }


def agree(method: DAS, model: Vectors, scheduler=None) -> dict[str, bool]:
    """Whether mean, variance and normaliser are the target's, within Monte-Carlo error."""
    target, log_z = tilted(scheduler)
    found = estimates(method, model)
    return {
        "mean": has_mean(found["mean"], target.mean),
        "var": has_mean(found["var"], target.var),
        # the estimate of Z is unbiased, that of log Z is off by half its variance
        "log_z": has_mean(found["log_z"] + found["log_z"].var() / 2, model.dimensions * log_z),
    }


ALL = {"mean": True, "var": True, "log_z": True}


@pytest.mark.sweep(changes=3)
@pytest.mark.parametrize(
    "changes",
    [
        {},  # lambda is 0.48 before the last step, and then 1
        {"gamma": 0.024},  # lambda is 1 from step 30 on
        {"gradient_scale": 0.0},
        {"gradient_scale": 0.5},  # the weights correct for any proposal
        {"threshold": 0.0},
        {"threshold": 1.0},
    ],
    ids=str,
)
def test_particles_are_of_the_tilted_distribution(changes):
    assert agree(replace(METHOD, **changes), model_of()) == ALL


def test_a_last_step_without_noise():
    """sigma is 0 there, and the weights stay finite."""
    scheduler = sd15_scheduler(set_alpha_to_one=True)
    model = model_of()
    model.grid = ddim_grid(scheduler, STEPS)
    assert float(model.grid.var[-1]) == 0
    assert agree(METHOD, model, scheduler) == ALL


@pytest.mark.full  # of other code
def test_the_published_code_misses_its_target():
    """Survivors carry on with the twist and the gradient of others."""
    published = replace(METHOD, reindex="published", gamma=0.024)
    target, log_z = tilted()
    found = estimates(published, model_of())
    assert not any(agree(published, model_of()).values())
    assert found["mean"].mean() > 1.2 * target.mean
    assert found["log_z"].mean() > 0 > log_z


@pytest.mark.full  # a wrong port told apart
def test_log_densities_that_are_means_are_seen(monkeypatch):
    monkeypatch.setattr(das, "_dot", lambda a, b: (a * b).flatten(1).mean(1))
    assert not any(agree(METHOD, model_of()).values())
    # in one dimension, mean and sum are one
    assert agree(METHOD, model_of(dimensions=1)) == ALL


def guided_chain(of_x0hat, num_steps: int = STEPS):
    """One particle: x_s = mu + v lambda_{k+1} h + sqrt(v) z, h = -(x0hat - c) d x0hat/dx / alpha.

    `of_x0hat(slope, a)` is the derivative of x0hat = slope x + offset that a port takes.
    """
    chain = []
    base = ddim_chain(DATA, 1.0, sd15_scheduler(), num_steps)
    for k, (step, (_, a, _)) in enumerate(
        zip(base, grid(sd15_scheduler(), num_steps), strict=True)
    ):
        slope = math.sqrt(a) * DATA.var / (a * DATA.var + 1 - a)
        offset = DATA.mean - slope * math.sqrt(a) * DATA.mean
        tempered = min(1.008 ** (k + 1) - 1, 1.0)
        push = -step.var * tempered * of_x0hat(slope, a) / ALPHA
        chain.append(
            Step(step.scale + push * slope, step.shift + push * (offset - CENTRE), step.var)
        )
    return moments(chain)


def test_one_particle_follows_the_gradient_through_the_network():
    found = exact_moments(
        DAS(num_particles=1, alpha=ALPHA),
        {BASE: DATA},
        preference={"near": 1.0},
        scalar_rewards={"near": lambda x: -(x - CENTRE).square() / 2},
    )
    assert found == pytest.approx(guided_chain(lambda slope, a: slope), abs=1e-12)
    around_the_network = guided_chain(lambda slope, a: 1 / math.sqrt(a))
    assert abs(found.mean - around_the_network.mean) > 0.02


def test_the_image_of_the_largest_weight_is_kept_per_sample():
    method, model = replace(METHOD, num_particles=30), model_of(dimensions=3)
    with torch.no_grad():
        images, log_weights = method.particles(model)
        chosen = method.sample(model)
    for row, winner in enumerate(log_weights.argmax(0).tolist()):
        assert torch.equal(chosen[row], images.view(30, -1, 3)[winner, row])


@pytest.mark.parametrize("reindex", ["all", "published"])
def test_what_belongs_to_a_particle_moves_with_it_where_weights_are_uneven(reindex):
    """Of two samples of four particles, the first has all its weight on the third."""
    log_weights = torch.tensor([[-99.0, 0.0], [-99.0, 0.5], [3.0, 1.0], [-99.0, 1.5]]).double()
    names = torch.arange(8.0).double()[:, None]  # row p * 2 + b
    here = das._Outlook(names, names.view(4, 2), names)
    u = torch.full((2,), 0.5).double()
    x, moved, log_psi, weights = replace(METHOD, num_particles=4, reindex=reindex)._resample(
        names, here, names.view(4, 2), log_weights, u
    )
    survivors = torch.tensor([[4.0, 1.0], [4.0, 3.0], [4.0, 5.0], [4.0, 7.0]]).double()
    assert torch.equal(x.view(4, 2), survivors)
    assert torch.equal(moved.eps.view(4, 2), survivors)
    kept = survivors if reindex == "all" else names.view(4, 2)
    assert torch.equal(moved.h.view(4, 2), kept)
    assert torch.equal(log_psi, kept)
    # the mean weight of a sample, which estimates the normaliser, stays
    assert torch.equal(weights[:, 1], log_weights[:, 1])
    assert weights[:, 0].tolist() == pytest.approx([3.0 - math.log(4)] * 4)


SMALL = DAS(num_particles=3, alpha=0.02, threshold=0.9)
OPTIONS = {"num_inference_steps": 4, "guidance_scale": 3.0, "rewards": REWARDS}


def drawn(method, pipe, rows=slice(None), **options):
    return method(pipe, PROMPTS[rows], WEIGHTS, SEEDS[rows], **(OPTIONS | options))


def test_costs(pipe):
    """Of two images with guidance and two rewards; `P (T + 1)` of images, `P T` of evaluations."""
    cost = drawn(SMALL, pipe).cost
    assert cost == Cost(
        unet_forwards=2 * 2 * 3 * 4,
        unet_backwards=2 * 2 * 3 * 4,
        decodes=2 * 3 * 5,
        reward_calls=2 * 2 * 3 * 5,
    )
    assert drawn(replace(SMALL, gradient_scale=0.0), pipe).cost == replace(cost, unet_backwards=0)
    model = model_of()
    estimates(replace(METHOD, num_particles=5), model)
    assert model.cost == Cost(20 * 5 * 50, 20 * 5 * 50, 20 * 5 * 51, 20 * 5 * 51)


@pytest.mark.sweep(method=1)
@pytest.mark.parametrize("method", [SMALL, replace(SMALL, reindex="published")])
def test_an_image_depends_on_its_own_prompt_and_seed(pipe, method):
    together = drawn(method, pipe).images
    assert together.shape == (2, 3, 32, 32)
    assert torch.equal(together, drawn(method, pipe).images)
    for row in (0, 1):
        alone = drawn(method, pipe, slice(row, row + 1)).images
        torch.testing.assert_close(together[row], alone[0], rtol=0, atol=1e-4)


def test_few_rows_at_a_time_draw_the_same(pipe):
    expected = drawn(SMALL, pipe).images
    few = drawn(replace(SMALL, max_rows=4), pipe).images
    torch.testing.assert_close(few, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("changes", [{"gradient_scale": 0.0}, {"alpha": 1e9}], ids=str)
def test_one_unguided_particle_is_sd(pipe, changes):
    expected = drawn(SD(), pipe).images
    found = drawn(replace(SMALL, num_particles=1, **changes), pipe).images
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_the_first_particle_is_sd(pipe):
    """Among equals the first wins."""
    expected = drawn(SD(), pipe).images
    found = drawn(SMALL, pipe, rewards=INDIFFERENT).images
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_a_reward_without_a_gradient_is_named(pipe):
    class Counted(Redness):
        def __call__(self, images, prompts):
            return super().__call__(images, prompts).detach()

    rewards = REWARDS | {"cool": Counted("cool")}
    with pytest.raises(ValueError, match="reward 'cool' gives no gradient"):
        drawn(SMALL, pipe, rewards=rewards)
    drawn(replace(SMALL, gradient_scale=0.0), pipe, rewards=rewards)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"num_particles": 0}, ValueError, "num_particles must be a positive integer"),
        ({"max_rows": 0}, ValueError, "max_rows must be a positive integer"),
        ({"eta": 2.0}, mf.errors.InvalidSchedule, "eta must lie in"),
        ({"alpha": 0.0}, ValueError, "alpha must be > 0, got 0.0"),
        ({"gamma": 0.0}, ValueError, "gamma must be > 0 and finite"),
        ({"threshold": 1.1}, ValueError, "threshold must be in"),
        ({"gradient_scale": -1.0}, ValueError, "gradient_scale must be >= 0"),
        ({"reindex": "partial"}, ValueError, "reindex must be all or published, got 'partial'"),
    ],
)
def test_bad_settings_are_named(fields, error, message):
    with pytest.raises(error, match=message):
        DAS(**fields)


def test_a_reward_that_says_it_has_no_gradient_is_refused_before_any_work(pipe, calls):
    with pytest.raises(ValueError, match=r"DAS follows the gradients .* 'cool' has none"):
        drawn(
            SMALL, pipe, rewards={**REWARDS, "cool": replace(REWARDS["cool"], differentiable=False)}
        )
    assert calls == []
