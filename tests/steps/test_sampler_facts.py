# SPDX-License-Identifier: Apache-2.0
"""The sampler facts T1-T8, each through every entry point that can express it."""

import math

import pytest
import torch
from torch import Tensor

from msdda_fast import coefficient_table, denoise, fast_fuse_step, fused_ddim_step
from msdda_fast.errors import InvalidWeights, ZeroVariance
from msdda_fast.reference import ddim_posterior, fuse_posteriors, guide
from tests.entry_points import CHAIN_ENTRY_POINTS, ENTRY_POINTS, by_fast_fuse_step
from tests.gaussian_world import (
    Gaussian,
    Moments,
    Step,
    aligned_chain,
    ddim_chain,
    fuse_chains,
    grid,
    measured_moments,
    mixed_eps_chain,
    moments,
    sd15_scheduler,
    var_ddpm,
)

ALL = ("reference", "fast_fuse_step", "fused_ddim_step", "denoise")
FAST = ALL[1:]

#: Which entry points can express which fact ...
APPLIES = {
    "T1": ALL,
    "T2": ALL,
    "T3": ALL,
    "T4": ALL,
    "T5": ("reference", "fast_fuse_step"),
    "T6": FAST,
    "T7 permutation": ALL,
    "T7 eta scale": ALL,
    "T7 split": ALL,
    "T7 batch": FAST,
    "T7 guidance": ("reference", "fused_ddim_step"),
    "T8": ALL,
}
#: ... and why the others cannot.
WHY_NOT = {
    ("T5", "fused_ddim_step"): "its variances are eta_i^2 v_t, T5 has one per model and step",
    ("T5", "denoise"): "likewise",
    ("T6", "reference"): "Eq. 7 divides by zero there, and the reference says so by raising",
    ("T7 batch", "reference"): "takes noise, not seeds",
    ("T7 guidance", "fast_fuse_step"): "takes means, which are guided already",
    ("T7 guidance", "denoise"): "its denoisers guide themselves",
}

T = 50
ROUNDING = 1e-13  # float64, 50 steps of a contraction: some hundred ulp of order 1


def entry_points(fact: str):
    return pytest.mark.parametrize("entry", APPLIES[fact])


def test_every_entry_point_is_used_or_excused() -> None:
    for fact, used in APPLIES.items():
        for entry in ALL:
            assert (entry in used) != ((fact, entry) in WHY_NOT), (fact, entry)


def sample(entry: str, *args, **policy) -> Tensor:
    return ENTRY_POINTS[entry](*args, **policy)


def gaussian_moments(entry, experts, etas, weights, **policy) -> Moments:
    """Exact moments of x_0 under an entry point, for ideal denoisers of Gaussian data."""
    scheduler = sd15_scheduler()
    denoisers = [expert.denoiser(scheduler) for expert in experts]
    weights = torch.tensor(weights, dtype=torch.float64)
    return measured_moments(
        lambda x_T, noise: sample(entry, denoisers, etas, weights, x_T, noise, scheduler, **policy),
        T,
    )


def curved_denoisers(count: int):
    """Denoisers that are not affine, on latents (B, 4, 4, 4), one unlike the other.

    Near the ideal one of unit Gaussian data, so that samples stay of order 1 as real latents do.
    """
    alpha_bar = sd15_scheduler().alphas_cumprod

    def build(m: int):
        return lambda x, t: (1 - alpha_bar[t]).sqrt().to(x) * (0.9 * x + 0.2 * torch.sin(x + m))

    return [build(m) for m in range(count)]


def random_inputs(batch: int, num_steps: int, dtype: torch.dtype, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, 4, 4, 4)
    x_T = torch.randn(shape, generator=generator, dtype=torch.float64)
    noise = torch.randn(num_steps, *shape, generator=generator, dtype=torch.float64)
    return x_T.to(dtype), noise.to(dtype)


def db_mpa(denoisers, weights, eta, x_T, noise, scheduler) -> Tensor:
    """Mix the noise predictions by w, then one DDIM step at the common eta."""
    x = x_T
    for (t, a, b), z in zip(grid(scheduler, len(noise)), noise, strict=True):
        mixed = sum(
            w * denoiser(x, torch.tensor(t)) for w, denoiser in zip(weights, denoisers, strict=True)
        )
        mean, var = ddim_posterior(x, mixed, a, b, eta)
        x = mean + var.sqrt() * z
    return x


# T1: with equal etas the method is DB-MPA, and SD itself when all models are equal.


@pytest.mark.sweep
@entry_points("T1")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("weights", [(0.2, 0.3, 0.5), (0.0, 0.9, 0.1)], ids=str)
def test_t1_equal_etas_give_db_mpa(entry: str, dtype: torch.dtype, weights) -> None:
    scheduler, denoisers = sd15_scheduler(), curved_denoisers(3)
    x_T, noise = random_inputs(2, T, dtype)
    row = torch.tensor(weights, dtype=dtype)
    fused = sample(entry, denoisers, [0.9] * 3, row, x_T, noise, scheduler)
    wide = (x_T.double(), noise.double())
    expected = db_mpa(denoisers, row.double() / row.double().sum(), 0.9, *wide, scheduler)
    literal = db_mpa(denoisers, row, 0.9, x_T, noise, scheduler)
    error, error_of_literal = ((x - expected).abs().max() for x in (fused, literal))
    # float32: no worse than twice DB-MPA's own rounding, both judged in float64
    limit = ROUNDING if dtype == torch.float64 else 2 * error_of_literal + 1e-6
    assert error < limit < 1e-5
    uniform = db_mpa(denoisers, [1 / 3] * 3, 0.9, *wide, scheduler)
    assert (uniform - expected).abs().max() > 0.01  # w matters here


@entry_points("T1")
def test_t1_equal_models_and_etas_give_the_model_itself(entry: str) -> None:
    data = Gaussian(0.5, 0.25)
    fused = gaussian_moments(entry, [data, data], [1.0, 1.0], [0.3, 0.7])
    assert fused == pytest.approx((0.4990602, 0.2057384), abs=0.5e-7)


# T2: a one-hot w is the single model at its own eta, and the others have no influence at all.


@entry_points("T2")
@pytest.mark.parametrize("chosen", [0, 1])
def test_t2_one_hot_is_the_single_model(entry: str, chosen: int) -> None:
    scheduler, denoisers, etas = sd15_scheduler(), curved_denoisers(2), [0.8, 1.0]
    if entry != "reference":  # literal Eq. 7 multiplies by zero, and 0 * NaN is NaN
        denoisers[1 - chosen] = lambda x, t: torch.full_like(x, math.nan)
    x_T, noise = random_inputs(2, T, torch.float64)
    one_hot = torch.eye(2, dtype=torch.float64)[chosen]
    fused = sample(entry, denoisers, etas, one_hot, x_T, noise, scheduler)
    alone = sample(
        entry, [denoisers[chosen]], [etas[chosen]], one_hot[[chosen]], x_T, noise, scheduler
    )
    if entry == "reference":  # divides the precision out again: w / var * mean / (w / var)
        assert (fused - alone).abs().max() < ROUNDING
    else:
        assert torch.equal(fused, alone)


def test_t2_a_model_without_weight_is_never_called() -> None:
    def forbidden(x_t: Tensor, t: Tensor) -> Tensor:
        raise AssertionError("evaluated at weight 0")

    x_T, noise = random_inputs(2, 4, torch.float64)
    denoise(
        [forbidden, *curved_denoisers(1)],
        x_T,
        scheduler=sd15_scheduler(),
        num_steps=4,
        weights=[0.0, 1.0],
        etas=[0.8, 1.0],
        noise=noise,
    )


# T3: unequal etas; exact moments of x_0, and two plausible wrong ports told apart.

T3_EXPERTS, T3_ETAS = [Gaussian(1, 0.25), Gaussian(-1, 0.25)], [0.8, 1.0]


def eta_shares(w: float) -> tuple[list[float], float]:
    precision = [w / 0.8**2, (1 - w) / 1.0**2]
    return [p / sum(precision) for p in precision], sum(precision) ** -0.5


def t3_exact(w: float) -> Moments:
    scheduler = sd15_scheduler()
    pairs = zip(T3_EXPERTS, T3_ETAS, strict=True)
    return moments(fuse_chains([ddim_chain(p, eta, scheduler) for p, eta in pairs], [w, 1 - w]))


@entry_points("T3")
@pytest.mark.parametrize("w", [0.2, 0.5, 0.8])
def test_t3_moments_with_unequal_etas(entry: str, w: float) -> None:
    fused = gaussian_moments(entry, T3_EXPERTS, T3_ETAS, [w, 1 - w])
    assert fused == pytest.approx(t3_exact(w), abs=ROUNDING)


@entry_points("T3")
@pytest.mark.parametrize("mixture", ["share", "w"])
def test_t3_wrong_ports_are_told_apart(entry: str, mixture: str) -> None:
    shares, eta_w = eta_shares(0.2)
    weights = shares if mixture == "share" else [0.2, 0.8]
    wrong = moments(mixed_eps_chain(T3_EXPERTS, weights, eta_w, sd15_scheduler()))
    fused = gaussian_moments(entry, T3_EXPERTS, T3_ETAS, [0.2, 0.8])
    assert abs(wrong.mean - fused.mean) > 0.07


# T4: the fused share and eta.


@entry_points("T4")
@pytest.mark.parametrize(
    ("w", "share", "eta_w"),
    [(0.2, 0.280899, 0.9480909), (0.5, 0.609756, 0.8834522), (0.8, 0.862069, 0.8304548)],
)
def test_t4_share_and_eta(entry: str, w: float, share: float, eta_w: float) -> None:
    """Read off one step (T = 1): the response to z is sigma_w, that to mu_1 is the share."""
    scheduler = sd15_scheduler()
    [(_, a, b)] = grid(scheduler, 1)
    x_T = torch.zeros(1, 1, dtype=torch.float64)
    weights = torch.tensor([w, 1 - w], dtype=torch.float64)

    def respond(outputs: tuple[float, float], z: float) -> float:
        denoisers = [lambda x, t, eps=eps: torch.full_like(x, eps) for eps in outputs]
        noise = torch.full((1, 1, 1), z, dtype=torch.float64)
        return float(sample(entry, denoisers, T3_ETAS, weights, x_T, noise, scheduler))

    assert respond((0, 0), 1.0) / math.sqrt(var_ddpm(a, b)) == pytest.approx(eta_w, abs=0.5e-7)
    unit = torch.ones(1, 1, dtype=torch.float64)
    alone = [float(ddim_posterior(x_T, unit, a, b, eta)[0]) for eta in T3_ETAS]
    measured = [respond((1, 0), 0.0) / alone[0], respond((0, 1), 0.0) / alone[1]]
    assert measured[0] == pytest.approx(share, abs=0.5e-6)
    assert sum(measured) == pytest.approx(1)
    assert sum(s * eta**2 for s, eta in zip(measured, T3_ETAS, strict=True)) == pytest.approx(
        eta_w**2, abs=1e-6
    )


# T5: exactness of Theorem 1 with truly different variances (linear-quadratic-Gaussian world).

T5_W, T5_KL = 0.3, 0.1


def t5_chains():
    base = ddim_chain(Gaussian(0.5, 0.25), 1.0, sd15_scheduler())
    experts = [aligned_chain(base, [(1, *reward)], T5_KL) for reward in ((40, 1), (0.5, -1))]
    optimum = aligned_chain(base, [(T5_W, 40, 1), (1 - T5_W, 0.5, -1)], T5_KL)
    return base, experts, optimum


@entry_points("T5")
def test_t5_fusing_optima_gives_the_optimum_of_the_weighted_reward(entry: str) -> None:
    _, experts, optimum = t5_chains()
    weights = torch.tensor([T5_W, 1 - T5_W], dtype=torch.float64)
    fused = measured_moments(
        lambda x_T, noise: CHAIN_ENTRY_POINTS[entry](experts, weights, x_T, noise), T
    )
    assert fused == pytest.approx(moments(optimum), rel=1e-13)


@entry_points("T5")
def test_t5_every_step_is_the_optimum(entry: str) -> None:
    _, experts, optimum = t5_chains()
    weights = torch.tensor([T5_W, 1 - T5_W], dtype=torch.float64)
    inputs = torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64).T
    noise = torch.tensor([[[0.0], [0.0], [1.0]]], dtype=torch.float64)
    for first, second, best in zip(*experts, optimum, strict=True):
        step = CHAIN_ENTRY_POINTS[entry]([[first], [second]], weights, inputs, noise)[:, 0]
        measured = Step(float(step[1] - step[0]), float(step[0]), float(step[2] - step[0]) ** 2)
        assert measured == pytest.approx(best, rel=1e-14, abs=1e-15)


@entry_points("T5")
@pytest.mark.parametrize("port", ["mean average, base std", "mean average, fused std", "1 / std"])
def test_t5_wrong_ports_are_told_apart(entry: str, port: str) -> None:
    base, experts, _ = t5_chains()
    chain = []
    for step, *pair in zip(base, *experts, strict=True):
        fused = fuse_chains([[s] for s in pair], [T5_W, 1 - T5_W])[0]
        mixture = [T5_W, 1 - T5_W]
        if port == "1 / std":
            mixture = [w / math.sqrt(s.var) for w, s in zip(mixture, pair, strict=True)]
        mixture = [w / sum(mixture) for w in mixture]
        scale, shift = (
            sum(w * s[part] for w, s in zip(mixture, pair, strict=True)) for part in (0, 1)
        )
        chain.append(Step(scale, shift, step.var if port.endswith("base std") else fused.var))
    wrong = moments(chain)
    weights = torch.tensor([T5_W, 1 - T5_W], dtype=torch.float64)
    right = measured_moments(
        lambda x_T, noise: CHAIN_ENTRY_POINTS[entry](experts, weights, x_T, noise), T
    )
    misses = [abs(w / r - 1) for w, r in zip(wrong, right, strict=True)]
    assert max(misses) > 0.05


# T6: zero variance, judged by the analytic limit.


def policy_for(entry: str, name: str, rates=None) -> dict:
    """What the entry point must be told; DDIM entry points know the rates: their etas."""
    return {"zero_variance": name} | ({} if rates is None else {"rates": rates})


@entry_points("T6")
def test_t6_last_step_to_clean_data_fuses_the_x0_predictions(entry: str) -> None:
    scheduler, denoisers = sd15_scheduler(set_alpha_to_one=True), curved_denoisers(2)
    x_T, noise = random_inputs(2, 1, torch.float64)
    [(t, a, b)] = grid(scheduler, 1)
    assert b == 1.0
    weights = torch.tensor([0.2, 0.8], dtype=torch.float64)
    policy = policy_for(entry, "ratio", T3_ETAS) if entry == "fast_fuse_step" else {}
    fused = sample(entry, denoisers, T3_ETAS, weights, x_T, noise, scheduler, **policy)
    x0 = [(x_T - math.sqrt(1 - a) * eps(x_T, t)) / math.sqrt(a) for eps in denoisers]
    (share, other), _ = eta_shares(0.2)
    assert (fused - (share * x0[0] + other * x0[1])).abs().max() < ROUNDING


@entry_points("T6")
def test_t6_all_etas_zero_is_db_mpa_on_the_ode(entry: str) -> None:
    scheduler, denoisers = sd15_scheduler(), curved_denoisers(2)
    x_T, noise = random_inputs(2, T, torch.float64)
    policy = policy_for(entry, "dominate") if entry == "fast_fuse_step" else {}
    row = torch.tensor([0.2, 0.8], dtype=torch.float64)
    fused = sample(entry, denoisers, [0.0, 0.0], row, x_T, noise, scheduler, **policy)
    expected = db_mpa(denoisers, [0.2, 0.8], 0.0, x_T, noise, scheduler)
    assert (fused - expected).abs().max() < ROUNDING


@entry_points("T6")
def test_t6_one_zero_eta_needs_a_policy_and_then_decides(entry: str) -> None:
    scheduler, denoisers = sd15_scheduler(), curved_denoisers(2)
    x_T, noise = random_inputs(2, 5, torch.float64)
    row = torch.tensor([0.2, 0.8], dtype=torch.float64)
    args = (denoisers, [0.0, 1.0], row, x_T, noise, scheduler)
    with pytest.raises(ZeroVariance, match=r"dominate.*ratio"):
        sample(entry, *args)
    alone = db_mpa(denoisers[:1], [1.0], 0.0, x_T, noise, scheduler)
    dominated = sample(entry, *args, **policy_for(entry, "dominate"))
    assert (dominated - alone).abs().max() < ROUNDING
    ratio = sample(entry, *args, **policy_for(entry, "ratio", [0.5, 1.0]))
    assert (ratio - alone).abs().max() < ROUNDING  # the other's variance does not vanish


@entry_points("T6")
def test_t6_several_zero_etas_share_at_their_rates(entry: str) -> None:
    scheduler, denoisers = sd15_scheduler(), curved_denoisers(3)
    x_T, noise = random_inputs(2, 5, torch.float64)
    row = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)
    args = (denoisers, [0.0, 1.0, 0.0], row, x_T, noise, scheduler)
    dominated = sample(entry, *args, **policy_for(entry, "dominate"))
    expected = db_mpa(denoisers[::2], [0.6, 0.4], 0.0, x_T, noise, scheduler)
    assert (dominated - expected).abs().max() < ROUNDING
    ratio = sample(entry, *args, **policy_for(entry, "ratio", [0.5, 1.0, 1.0]))
    precision = [0.3 / 0.5**2, 0.2]
    expected = db_mpa(
        denoisers[::2], [p / sum(precision) for p in precision], 0.0, x_T, noise, scheduler
    )
    assert (ratio - expected).abs().max() < ROUNDING


@entry_points("T6")
def test_t6_zero_eta_without_weight_is_no_conflict(entry: str) -> None:
    scheduler, denoisers = sd15_scheduler(), curved_denoisers(2)
    x_T, noise = random_inputs(2, 5, torch.float64)
    row = torch.tensor([0.0, 1.0], dtype=torch.float64)
    fused = sample(entry, denoisers, [0.0, 0.9], row, x_T, noise, scheduler)
    alone = db_mpa(denoisers[1:], [1.0], 0.9, x_T, noise, scheduler)
    assert (fused - alone).abs().max() < ROUNDING


@entry_points("T6")
def test_t6_tiny_etas_are_the_ratio_limit(entry: str) -> None:
    """eta = c (.8, 1) with c = 1e-4: sqrt(1 - b - sigma^2) differs from its limit by c^2."""
    scheduler, denoisers = sd15_scheduler(), curved_denoisers(2)
    x_T, noise = random_inputs(2, T, torch.float64)
    row = torch.tensor([0.2, 0.8], dtype=torch.float64)
    still = torch.zeros_like(noise)
    tiny = sample(entry, denoisers, [0.8e-4, 1e-4], row, x_T, still, scheduler)
    args = (denoisers, [0.0, 0.0], row, x_T, noise, scheduler)
    limit = sample(entry, *args, **policy_for(entry, "ratio", T3_ETAS))
    assert (tiny - limit).abs().max() < 1e-6


def test_t6_the_reference_raises_instead() -> None:
    x_T, noise = random_inputs(2, 1, torch.float64)
    row = torch.tensor([0.2, 0.8], dtype=torch.float64)
    with pytest.raises(ZeroVariance):
        sample("reference", curved_denoisers(2), [0.0, 1.0], row, x_T, noise, sd15_scheduler())


# T7: invariances.


@entry_points("T7 permutation")
def test_t7_permuting_models_changes_nothing(entry: str) -> None:
    scheduler, denoisers, etas = sd15_scheduler(), curved_denoisers(3), [0.5, 0.8, 1.0]
    x_T, noise = random_inputs(2, T, torch.float64)
    row = torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.4, 0.0]], dtype=torch.float64)
    order = [2, 0, 1]
    fused = sample(entry, denoisers, etas, row, x_T, noise, scheduler)
    permuted = sample(
        entry,
        [denoisers[m] for m in order],
        [etas[m] for m in order],
        row[:, order],
        x_T,
        noise,
        scheduler,
    )
    assert (fused - permuted).abs().max() < ROUNDING


@entry_points("T7 eta scale")
def test_t7_scaling_all_etas_scales_the_noise_and_not_the_shares(entry: str) -> None:
    """T = 1, read off impulses of z and of constant predictions as in T4."""
    scheduler, row = sd15_scheduler(), torch.tensor([0.2, 0.8], dtype=torch.float64)
    [(_, a, b)] = grid(scheduler, 1)
    x_T, unit = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)

    def std_and_share(c: float) -> tuple[float, float]:
        etas = [c * eta for eta in T3_ETAS]
        silent, loud = (lambda x, t: torch.zeros_like(x)), (lambda x, t: torch.ones_like(x))
        step = (etas, row, x_T)
        std = sample(entry, [silent, silent], *step, unit[None], scheduler)
        push = sample(entry, [loud, silent], *step, 0 * unit[None], scheduler)
        alone, _ = ddim_posterior(x_T, unit, a, b, etas[0])
        return float(std), float(push / alone)

    (std, share), (half_std, half_share) = std_and_share(1.0), std_and_share(0.5)
    assert half_std == pytest.approx(std / 2)
    assert half_share == pytest.approx(share)


@entry_points("T7 split")
def test_t7_a_model_split_in_two_halves_is_the_model(entry: str) -> None:
    scheduler, (first, second) = sd15_scheduler(), curved_denoisers(2)
    x_T, noise = random_inputs(2, T, torch.float64)
    whole = torch.tensor([0.4, 0.6], dtype=torch.float64)
    halves = torch.tensor([0.2, 0.6, 0.2], dtype=torch.float64)
    fused = sample(entry, [first, second], [0.8, 1.0], whole, x_T, noise, scheduler)
    split = sample(entry, [first, second, first], [0.8, 1.0, 0.8], halves, x_T, noise, scheduler)
    assert (fused - split).abs().max() < ROUNDING


@entry_points("T7 batch")
def test_t7_a_sample_depends_on_its_own_seed_alone(entry: str) -> None:
    scheduler, denoisers, num_steps = sd15_scheduler(), curved_denoisers(2), 4
    x_T, _ = random_inputs(3, num_steps, torch.float32)
    rows = torch.tensor([[0.2, 0.8], [0.5, 0.5], [1.0, 0.0]], dtype=torch.float64)
    table = coefficient_table(scheduler, num_steps, etas=T3_ETAS, weights=rows)
    table_of_last = coefficient_table(scheduler, num_steps, etas=T3_ETAS, weights=rows[2:])

    def run(x: Tensor, weights: Tensor, seeds: list[int]) -> Tensor:
        if entry == "denoise":
            return denoise(
                denoisers,
                x,
                scheduler=scheduler,
                num_steps=num_steps,
                weights=weights,
                etas=T3_ETAS,
                seeds=seeds,
            )
        steps = table if len(x) == 3 else table_of_last
        for k in range(num_steps):
            outputs = torch.stack([denoiser(x, steps.timesteps[k]) for denoiser in denoisers])
            if entry == "fused_ddim_step":
                x = fused_ddim_step(x, outputs[:, None], steps[k], seeds=seeds, step=k)
            else:
                x = fast_fuse_step(outputs, [0.64, 1.0], weights.T, seeds=seeds, step=k)
        return x

    together = run(x_T, rows, [7, 8, 2**63])
    alone = run(x_T[2:], rows[2:], [2**63])
    assert torch.equal(together[2:], alone)
    assert not torch.equal(together[2:], run(x_T[2:], rows[2:], [9]))


@entry_points("T7 guidance")
def test_t7_guidance_before_fusion_is_guidance_inside(entry: str) -> None:
    scheduler, etas, guidance = sd15_scheduler(), [0.8, 1.0], [7.5, 3.0]
    generator = torch.Generator().manual_seed(0)
    uncond, cond = torch.randn(2, 2, 2, 4, generator=generator, dtype=torch.float64)
    x, z = torch.randn(2, 2, 4, generator=generator, dtype=torch.float64)
    row = torch.tensor([0.2, 0.8], dtype=torch.float64)
    guided = [guide(u, c, g) for u, c, g in zip(uncond, cond, guidance, strict=True)]
    build = dict(etas=etas, weights=row, dtype=torch.float64)
    table = coefficient_table(scheduler, T, guidance_scale=guidance, **build)
    if entry == "reference":
        _, a, b = grid(scheduler, T)[10]
        steps = [ddim_posterior(x, m, a, b, eta) for m, eta in zip(guided, etas, strict=True)]
        mean, var = fuse_posteriors(
            torch.stack([mean for mean, _ in steps]), torch.stack([var for _, var in steps]), row
        )
        before = mean + var.sqrt() * z
    else:
        unguided = coefficient_table(scheduler, T, **build)
        assert not unguided.needs_uncond
        before = fused_ddim_step(x, torch.stack(guided)[:, None], unguided[10], noise=z)
    assert table.needs_uncond
    inside = fused_ddim_step(x, torch.stack([uncond, cond], dim=1), table[10], noise=z)
    assert (inside - before).abs().max() < 10 * ROUNDING  # outputs up to 7.5 times larger


# T8: a weight above 1 against a negative weight of the base: DeRaDiff and DB-KLA.


def extrapolating(entry: str) -> dict:
    return {} if entry == "reference" else {"extrapolate": True}


@entry_points("T8")
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, 1.5])
def test_t8_equal_etas_give_db_kla(entry: str, strength: float) -> None:
    scheduler, denoisers = sd15_scheduler(), curved_denoisers(2)
    x_T, noise = random_inputs(2, T, torch.float64)
    row = torch.tensor([1 - strength, strength], dtype=torch.float64)
    policy = extrapolating(entry)
    fused = sample(entry, denoisers, [1.0, 1.0], row, x_T, noise, scheduler, **policy)
    expected = db_mpa(denoisers, row.tolist(), 1.0, x_T, noise, scheduler)
    assert (fused - expected).abs().max() < ROUNDING


@entry_points("T8")
@pytest.mark.parametrize("strength", [0.0, 1.0, 1.5, 2.5])
def test_t8_unequal_etas_give_deradiff(entry: str, strength: float) -> None:
    base, aligned = Gaussian(0.5, 0.25), Gaussian(0.8, 0.2)
    weights = [1 - strength, strength]
    fused = gaussian_moments(entry, [base, aligned], T3_ETAS, weights, **extrapolating(entry))
    scheduler = sd15_scheduler()
    chains = [ddim_chain(base, 0.8, scheduler), ddim_chain(aligned, 1.0, scheduler)]
    assert fused == pytest.approx(moments(fuse_chains(chains, weights)), rel=1e-9)


@entry_points("T8")
def test_t8_precision_must_stay_positive(entry: str) -> None:
    """lambda < 1 / (1 - eta_base^2 / eta_aligned^2) = 2.78 for etas .8 and 1."""
    assert 1 / (1 - 0.8**2) == pytest.approx(2.78, abs=0.005)
    scheduler, denoisers = sd15_scheduler(), curved_denoisers(2)
    x_T, noise = random_inputs(1, 2, torch.float64)

    def run(strength: float) -> Tensor:
        row = torch.tensor([1 - strength, strength], dtype=torch.float64)
        policy = extrapolating(entry)
        return sample(entry, denoisers, T3_ETAS, row, x_T, noise, scheduler, **policy)

    assert run(2.77).isfinite().all()
    with pytest.raises(ZeroVariance if entry == "reference" else InvalidWeights, match="precision"):
        run(2.79)


def test_t8_negative_weights_are_refused_unless_asked_for() -> None:
    x_T, noise = random_inputs(1, 2, torch.float64)
    row = torch.tensor([-0.5, 1.5], dtype=torch.float64)
    for entry in FAST:
        with pytest.raises(InvalidWeights, match="extrapolate"):
            sample(entry, curved_denoisers(2), [1.0, 1.0], row, x_T, noise, sd15_scheduler())


def test_helpers_agree_on_the_fast_path_of_moments() -> None:
    """`by_fast_fuse_step` forwards its policy, or T6 would test nothing."""
    x_T, noise = random_inputs(1, 1, torch.float64)
    row = torch.tensor([0.5, 0.5], dtype=torch.float64)
    with pytest.raises(ValueError, match="zero_variance"):
        by_fast_fuse_step(
            curved_denoisers(2),
            [0.0, 1.0],
            row,
            x_T,
            noise,
            sd15_scheduler(),
            zero_variance="no such policy",
        )
