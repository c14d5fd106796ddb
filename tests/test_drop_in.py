# SPDX-License-Identifier: Apache-2.0
"""`fast_fuse_step` dropped into samplers written by others equals the fusion written out by hand.

Shown on a k-diffusion style Euler ancestral sampler and inside the loop of an unmodified
`StableDiffusionPipeline`, on each backend: the sampler's own mean and variance per objective go in,
and what comes out is Eq. 7. Both include a last step that goes to sigma = 0, where Eq. 7 is 0 / 0.
Triton, slow in its interpreter, is tried in fewer cases.
"""
# ruff: noqa: F811 - fixtures are asked for by their name

from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor

import msdda_fast as mf
from tests.kernels.conftest import backend, quick_backend  # noqa: F401 - fixtures
from tests.tiny_model import WEIGHTS, one_thread, quiet, tiny  # noqa: F401 - fixtures

Fuse = Callable[[list[Tensor], list[float], int], Tensor]  # means, variances, the step k: x_prev


def equation_7(means, variances, weights: Tensor, noise: Tensor, etas: Sequence[float]) -> Tensor:
    """Eq. 7 in float64, literally; sigma_i = eta_i s for all i, so s -> 0 leaves w_i / eta_i^2."""
    mu, z = torch.stack(list(means)).double(), noise.double()
    var = torch.stack([torch.as_tensor(v, dtype=torch.float64) for v in variances])
    vanishing = bool((var == 0).all())
    spread = torch.tensor(etas, dtype=torch.float64) ** 2 if vanishing else var
    w = weights.double().reshape(*weights.shape, *(1,) * (mu.ndim - weights.ndim))
    precision = w / spread.reshape(-1, *(1,) * (mu.ndim - 1))
    var_w = 1 / precision.sum(0)
    mean_w = var_w * (precision * mu).sum(0)
    return mean_w if vanishing else mean_w + var_w.sqrt() * z


SHAPE = (3, 4, 5, 6)
ETAS = (1.0, 0.8, 0.5)
RAMP = torch.linspace(10 ** (1 / 7), 0.05 ** (1 / 7), 12, dtype=torch.float64)
SIGMAS = torch.cat([RAMP**7, torch.zeros(1)])  # Karras et al. (2022), rho = 7

# D_i(x, sigma) = E[x_0 | x]: two Gaussians N(c, s^2) in closed form, and one that is not linear.
# Each has a slope in [0, 1].
DENOISERS = (
    lambda x, sigma: (0.25 * x + sigma**2 * 1.5) / (0.25 + sigma**2),
    lambda x, sigma: (0.04 * x - sigma**2 * 0.7) / (0.04 + sigma**2),
    lambda x, sigma: torch.tanh(x / (1 + sigma**2)),
)


def ancestral_step(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    """k-diffusion's `get_ancestral_step`: sigma_down, sigma_up."""
    up = min(sigma_next, eta * (sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2) ** 0.5)
    return (sigma_next**2 - up**2) ** 0.5, up


def sample_euler_ancestral(x: Tensor, count: int, fuse: Fuse, etas=ETAS, sigmas=SIGMAS) -> Tensor:
    """k-diffusion's sampler with `fuse` where it adds noise; every state, (T, ...)."""
    states = []
    for k, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        means, variances = [], []
        for denoise, eta in zip(DENOISERS[:count], etas[:count], strict=True):
            sigma_down, sigma_up = ancestral_step(sigma, sigma_next, eta)
            d = (x - denoise(x, sigma)) / sigma
            means.append(x + d * (sigma_down - sigma))
            variances.append(sigma_up**2)
        x = fuse(means, variances, k)
        states.append(x)
    return torch.stack(states)


def x_start(dtype=torch.float64) -> Tensor:
    return (SIGMAS[0] * mf.counter_noise([1, 2, 3], SHAPE, stream=0)).to(dtype)


def assert_equal_up_to_rounding(fast: Tensor, exact: Tensor) -> None:
    """After each step, `fast` in its own dtype is within its roundings of `exact` in float64.

    A mean is (1 - r) D(x) + r x with r = sigma_down / sigma in [0, 1], and D has a slope in [0, 1]:
    a step does not enlarge errors, they add up. It rounds fewer than 24 times, each time a value
    of at most the largest state before or after it, or 1.5 (a prediction).
    """
    sizes = exact.flatten(1).abs().amax(1)
    before = torch.cat([x_start().abs().max()[None], sizes[:-1]])
    largest = torch.maximum(before, sizes).clamp(min=1.5)
    bounds = 24 * torch.finfo(fast.dtype).eps * largest.cumsum(0)
    errors = (fast.double() - exact).flatten(1).abs().amax(1)
    assert (errors <= bounds).all(), f"errors {errors.tolist()}, allowed {bounds.tolist()}"


def random_weights(count: int, *batch: int) -> Tensor:
    """(M,) or (M, B), float64."""
    generator = torch.Generator().manual_seed(9)
    raw = torch.rand((count, *batch), generator=generator, dtype=torch.float64) + 0.1
    return raw / raw.sum(0)


SEEDS = [5, -6, 2**63]


def all_noise(source: str, dtype: torch.dtype) -> list[Tensor]:
    """z of every step, drawn outside of the sampler."""
    steps, generator = range(len(SIGMAS) - 1), torch.Generator().manual_seed(3)
    if source == "seeds":
        return [mf.counter_noise(SEEDS, SHAPE, step=k, stream=1) for k in steps]
    return [torch.randn(SHAPE, generator=generator, dtype=dtype) for _ in steps]


@pytest.mark.sweep
@pytest.mark.parametrize("source", ["noise", "seeds", "generator"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("count", "batch"), [(2, ()), (3, (3,))], ids=["M=2", "M=3 per sample"])
def test_an_ancestral_sampler_draws_from_eq_7(count, batch, dtype, source, quick_backend):
    weights, etas, z = random_weights(count, *batch), ETAS[:count], all_noise(source, dtype)
    generator = torch.Generator().manual_seed(3)
    # no policy is needed before the last step; there sigma_up_i = eta_i sigma_next for all i
    options = {"backend": quick_backend, "zero_variance": "ratio", "rates": etas}

    def drop_in(means, variances, k):
        asked = {
            "noise": {"noise": z[k]},
            "seeds": {"seeds": SEEDS, "step": k},
            "generator": {"generator": generator},
        }
        return mf.fast_fuse_step(means, variances, weights, **asked[source], **options)

    def by_hand(means, variances, k):
        return equation_7(means, variances, weights, z[k], etas)

    fast = sample_euler_ancestral(x_start(dtype), count, drop_in)
    assert fast.dtype == dtype
    assert_equal_up_to_rounding(fast, sample_euler_ancestral(x_start(), count, by_hand))


@pytest.mark.sweep(backend=2)
def test_one_hot_weights_give_that_objective_s_own_sampler(backend):
    z = torch.zeros(SHAPE, dtype=torch.float64)

    def drop_in(means, variances, k):
        means[1] = torch.full_like(means[1], torch.nan)  # a network that need not run
        # nor is a policy needed at sigma = 0
        return mf.fast_fuse_step(means, variances, [1.0, 0.0], z + k, backend=backend)

    def alone(means, variances, k):
        return means[0] + variances[0] ** 0.5 * (z + k)

    fast, own = (sample_euler_ancestral(x_start(), n, f) for n, f in ((2, drop_in), (1, alone)))
    assert_equal_up_to_rounding(fast, own)


def last_step(backend: str, sigma_next: float, **policy: object) -> Tensor:
    """One step of two objectives from sigma = 1 with weights (0.3, 0.7), noise switched off."""

    def drop_in(means, variances, k):
        z, w = torch.zeros(SHAPE), [0.3, 0.7]
        return mf.fast_fuse_step(means, variances, w, z, backend=backend, **policy)

    sigmas = torch.tensor([1.0, sigma_next], dtype=torch.float64)
    return sample_euler_ancestral(x_start() / SIGMAS[0], 2, drop_in, sigmas=sigmas)[0]


def test_the_step_to_sigma_zero_is_undefined_until_a_policy_says_how_variances_vanish(backend):
    with pytest.raises(mf.ZeroVariance, match=r'"dominate" .* "ratio"'):
        last_step(backend, 0.0)
    by_rate = last_step(backend, 0.0, zero_variance="ratio", rates=ETAS[:2])
    # the limit of steps that are defined: first order in sigma_next, slopes of order 1
    for sigma_next in (1e-3, 1e-6):
        assert (last_step(backend, sigma_next) - by_rate).abs().max() < 10 * sigma_next
    x = x_start() / SIGMAS[0]  # sigma = 1
    first, second = (denoise(x, 1.0) for denoise in DENOISERS[:2])
    by_weight = last_step(backend, 0.0, zero_variance="dominate")
    torch.testing.assert_close(by_weight, 0.3 * first + 0.7 * second, rtol=0, atol=1e-14)
    share = 0.3 / (0.3 + 0.7 / ETAS[1] ** 2)
    torch.testing.assert_close(by_rate, share * first + (1 - share) * second, rtol=0, atol=1e-14)


@pytest.mark.sweep(backend=2)
def test_a_deterministic_objective_is_refused_among_others_or_decides(backend):
    options = {"noise": torch.ones(SHAPE, dtype=torch.float64), "backend": backend}

    def sample(policy: str) -> Tensor:
        def drop_in(means, variances, k):
            w = [0.3, 0.7]
            return mf.fast_fuse_step(means, variances, w, zero_variance=policy, **options)

        return sample_euler_ancestral(x_start(), 2, drop_in, etas=(0.0, 1.0))

    with pytest.raises(mf.ZeroVariance, match="meets other active objectives"):
        sample("error")
    # at sigma = 0 both variances vanish, and "dominate" shares by weight
    euler = sample_euler_ancestral(x_start(), 1, lambda means, *_: means[0], etas=(0.0,))
    assert_equal_up_to_rounding(sample("dominate")[:-1], euler[:-1])


PROMPTS = ["a red dog", "a blue cat"]
STEPS = 3


class FusedDDIM(DDIMScheduler):
    """As a user would write it: `step` gets M guided predictions, side by side in the channels."""

    etas, weights, how, backend = (1.0, 0.8), random_weights(2, len(PROMPTS)), "", "auto"

    def posteriors(self, outputs, t: int, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Means and variances of the stock steps."""
        previous, still = t - self.config.num_train_timesteps // STEPS, torch.zeros_like(x)
        step, pairs = super().step, zip(outputs, self.etas, strict=True)
        means = [step(output, t, x, eta, variance_noise=still)[0] for output, eta in pairs]
        return means, [eta**2 * self._get_variance(t, previous) for eta in self.etas]

    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        assert not return_dict  # as the pipeline calls it
        outputs = model_output.chunk(len(self.etas), dim=1)
        return (getattr(self, self.how)(outputs, int(timestep), sample, generator),)

    def by_hand(self, outputs, t, x, generator):
        means, variances = self.posteriors(outputs, t, x)
        z = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        return equation_7(means, variances, self.weights, z, self.etas).to(x.dtype)

    def from_moments(self, outputs, t, x, generator):
        means, variances = self.posteriors(outputs, t, x)
        options = {"generator": generator, "zero_variance": "ratio", "rates": self.etas}
        var = torch.stack(variances)
        return mf.fast_fuse_step(means, var, self.weights, **options, backend=self.backend)

    def from_outputs(self, outputs, t, x, generator):
        options = {"etas": self.etas, "weights": self.weights.T}  # no policy
        table = mf.coefficient_table(self, STEPS, **options, dtype=x.dtype)
        step = table[table.timesteps.tolist().index(t)]
        guided = torch.stack(outputs)[:, None]
        return mf.fused_ddim_step(x, guided, step, generator=generator, backend=self.backend)


@pytest.fixture(scope="module", params=[torch.float32, torch.float64], ids=str)
def stock(request, tiny) -> StableDiffusionPipeline:
    """A stock pipeline whose UNet answers with the predictions of both adapters."""
    pipe = quiet(StableDiffusionPipeline.from_pretrained(tiny.folder, dtype=request.param))
    pipe.load_lora_weights(tiny.warm, weight_name=WEIGHTS, adapter_name="warm")
    pipe.load_lora_weights(tiny.cool, weight_name=WEIGHTS, adapter_name="cool")
    one = pipe.unet.forward

    def forward(*args, **kwargs):
        outputs = []
        for name in ("warm", "cool"):
            pipe.set_adapters(name)
            outputs.append(one(*args, **kwargs)[0])
        return (torch.cat(outputs, dim=1),)

    pipe.unet.forward = forward
    return pipe


def trajectory(pipe, **options: object) -> Tensor:
    """Latents after every step, (T, B, C, h, w); x_T and the noise from one generator."""
    seen = []

    def keep(_, k, t, tensors):
        seen.append(tensors["latents"].clone())
        return tensors

    options |= {"generator": torch.Generator().manual_seed(3), "callback_on_step_end": keep}
    pipe(PROMPTS, num_inference_steps=STEPS, guidance_scale=3.0, output_type="latent", **options)
    return torch.stack(seen)


def fused(pipe: StableDiffusionPipeline, how: str, to_one: bool, backend: str = "auto") -> Tensor:
    """The trajectory of a stock pipeline with a `FusedDDIM` for its scheduler."""
    config = pipe.scheduler.config
    scheduler = FusedDDIM.from_config(config, clip_sample=False, set_alpha_to_one=to_one)
    for name in ("alphas_cumprod", "final_alpha_cumprod"):  # our tables start in float64
        setattr(scheduler, name, getattr(scheduler, name).double())
    scheduler.how, scheduler.backend = how, backend
    pipe.scheduler = scheduler
    return trajectory(pipe)


# A step rounds some 8 values; predicting x_0 amplifies that by up to 1 / sqrt(alpha_bar_T) = 13.
ROUNDINGS = 13 * 8
two_adapters = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # stock loading


@pytest.mark.sweep(backend=2)
@two_adapters
@pytest.mark.parametrize("to_one", [False, True], ids=["last variance > 0", "last variance 0"])
def test_a_stock_diffusers_loop_draws_from_eq_7(stock, to_one, backend):
    exact = fused(stock, "by_hand", to_one)
    for how in ("from_moments", "from_outputs"):
        state = fused(stock, how, to_one, backend)
        error = (state - exact).abs().max() / exact.abs().max()
        assert error < ROUNDINGS * torch.finfo(state.dtype).eps, how


@two_adapters
def test_our_pipeline_walks_the_same_path_as_that_loop(stock, tiny):
    exact = fused(stock, "by_hand", to_one=True)
    scheduler = DDIMScheduler.from_config(stock.scheduler.config)
    ours = quiet(mf.MSDDAPipeline.from_pipe(tiny.shared(exact.dtype), scheduler=scheduler))
    state = trajectory(ours, weights=FusedDDIM.weights.T)
    error = (state - exact).abs().max() / exact.abs().max()
    assert error < ROUNDINGS * torch.finfo(state.dtype).eps
