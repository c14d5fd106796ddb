# SPDX-License-Identifier: Apache-2.0
"""Mixed predictions instead of fused means, and the weights that both have in the limit."""

import math

import pytest
import torch

from msdda_fast import (
    InvalidSchedule,
    InvalidShape,
    InvalidWeights,
    ZeroVariance,
    coefficient_table,
    denoise,
    fused_ddim_step,
)
from msdda_fast.steps.ddim import DDIMRule, ddim_grid
from msdda_fast.steps.shares import effective_weights, eps_mixture, fusion_shares
from tests.gaussian_world import (
    Chain,
    Gaussian,
    Moments,
    ddim_chain,
    ddim_step,
    fuse_chains,
    grid,
    measured_moments,
    moments,
    sd15_scheduler,
    var_ddpm,
)

EXPERTS = [Gaussian(1, 0.25), Gaussian(-1, 0.25)]
ETAS = [0.8, 1.0]


def shares(weights, etas):
    """Shares and eta_w of Eq. 7, in plain floats."""
    precision = [w / eta**2 for w, eta in zip(weights, etas, strict=True)]
    return [p / sum(precision) for p in precision], sum(precision) ** -0.5


def on_eps(a: float, b: float, eta: float) -> float:
    """B(eta): what the DDIM mean makes of a noise prediction."""
    return math.sqrt(1 - b - eta**2 * var_ddpm(a, b)) - math.sqrt(b * (1 - a) / a)


def mixed_chain(experts, weights, etas, mixture, num_steps=50) -> Chain:
    """One step at eta_w of the predictions, mixed by `mixture(a, b)`."""
    _, eta_w = shares(weights, etas)
    chain = []
    for _, a, b in grid(sd15_scheduler(), num_steps):
        lines = [expert.eps_affine(a) for expert in experts]
        mixed = tuple(
            sum(c * line[part] for c, line in zip(mixture(a, b), lines, strict=True))
            for part in (0, 1)
        )
        chain.append(ddim_step(mixed, a, b, eta_w))
    return chain


def by_contribution(weights, etas):
    """Mixture ~ share_i B(eta_i), sum 1."""
    share, _ = shares(weights, etas)

    def at(a: float, b: float) -> list[float]:
        parts = [s * on_eps(a, b, eta) for s, eta in zip(share, etas, strict=True)]
        return [part / sum(parts) for part in parts]

    return at


def found(experts, weights, etas, num_steps=50, **settings) -> Moments:
    scheduler = sd15_scheduler()
    return measured_moments(
        lambda x_T, z: denoise(
            [expert.denoiser(scheduler) for expert in experts],
            x_T,
            scheduler=scheduler,
            num_steps=num_steps,
            weights=weights,
            etas=etas,
            noise=z,
            **settings,
        ),
        num_steps,
    )


class TestEps:
    @pytest.mark.parametrize("w", [0.2, 0.5, 0.8])
    def test_closed_form(self, w: float) -> None:
        weights = [w, 1 - w]
        expected = moments(mixed_chain(EXPERTS, weights, ETAS, by_contribution(weights, ETAS)))
        assert found(EXPERTS, weights, ETAS, fusion="eps") == pytest.approx(expected, abs=1e-12)

    def test_mixing_by_shares_or_by_preferences_is_seen(self) -> None:
        weights = [0.2, 0.8]
        share, _ = shares(weights, ETAS)
        right = found(EXPERTS, weights, ETAS, fusion="eps")
        for mixture in (share, weights):
            wrong = moments(
                mixed_chain(EXPERTS, weights, ETAS, lambda a, b, mixture=mixture: mixture)
            )
            assert abs(right.mean - wrong.mean) > 0.02

    @pytest.mark.parametrize("w", [0.2, 0.5, 0.8])
    def test_a_model_fused_with_itself_stays_itself(self, w: float) -> None:
        """Of its etas only eta_w is left; Eq. 7 loses noise on the way, and variance with it."""
        model, weights = Gaussian(0.5, 0.25), [w, 1 - w]
        _, eta_w = shares(weights, ETAS)
        itself = moments(ddim_chain(model, eta_w, sd15_scheduler()))
        mixed = found([model, model], weights, ETAS, fusion="eps")
        assert mixed == pytest.approx(itself, abs=1e-12)

        chains = [ddim_chain(model, eta, sd15_scheduler()) for eta in ETAS]
        fused = found([model, model], weights, ETAS)
        assert fused == pytest.approx(moments(fuse_chains(chains, weights)), abs=1e-12)
        assert fused.var < itself.var - 4e-4

    @pytest.mark.parametrize("w", [0.2, 0.5])
    def test_what_eq_7_loses_of_the_noise_level_is_concavity(self, w: float) -> None:
        """The noise after a step is 1 - p for one DDIM step, and less for fused means.

        A step x = alpha x_0 + sqrt(1 - a) eps with eps known goes to sqrt(p) x_0 + c eps +
        sigma z. sum share_i eta_i^2 = eta_w^2, and c is concave in eta^2: Jensen.
        """
        weights = [w, 1 - w]
        share, eta_w = shares(weights, ETAS)
        assert sum(s * eta**2 for s, eta in zip(share, ETAS, strict=True)) == pytest.approx(
            eta_w**2
        )
        scheduler = sd15_scheduler()
        tables = {
            fusion: coefficient_table(
                scheduler, 50, etas=ETAS, weights=weights, fusion=fusion, dtype=torch.float64
            )
            for fusion in ("posterior", "eps")
        }
        lost = []
        for k, (_, a, b) in enumerate(grid(scheduler, 50)):
            level = {}
            for fusion, table in tables.items():
                x_scale, *scales, std = table[k].row[0].tolist()
                on_noise = x_scale * math.sqrt(1 - a) + sum(scales[2:])
                assert x_scale * math.sqrt(a) == pytest.approx(math.sqrt(b), abs=1e-14)
                level[fusion] = on_noise**2 + std**2
            assert level["eps"] == pytest.approx(1 - b, abs=1e-14)
            lost.append(1 - level["posterior"] / (1 - b))
        assert 0 < min(lost) and max(lost) < 0.03
        assert lost.index(max(lost)) == 48  # t = 21

    @pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
    def test_what_networks_predict_plays_no_part(self, prediction_type: str) -> None:
        generator = torch.Generator().manual_seed(0)
        x, z = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
        eps = torch.randn(2, 1, 3, 5, generator=generator, dtype=torch.float64)
        build = dict(etas=ETAS, weights=[0.3, 0.7], fusion="eps", dtype=torch.float64)
        expected = coefficient_table(sd15_scheduler(), 5, **build)
        table = coefficient_table(sd15_scheduler(prediction_type=prediction_type), 5, **build)
        for k, (_, a, _) in enumerate(grid(sd15_scheduler(), 5)):
            x_0 = (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
            outputs = {
                "epsilon": eps,
                "v_prediction": math.sqrt(a) * eps - math.sqrt(1 - a) * x_0,
                "sample": x_0,
            }[prediction_type]
            step = fused_ddim_step(x, outputs, table[k], noise=z)
            torch.testing.assert_close(step, fused_ddim_step(x, eps, expected[k], noise=z))

    @pytest.mark.parametrize("etas", [[0.8, 0.8, 0.8], [0.0, 0.0, 0.0]])
    @pytest.mark.parametrize("to_one", [False, True])
    def test_equal_etas_make_it_eq_7(self, etas, to_one: bool) -> None:
        build = dict(etas=etas, weights=[[0.2, 0.3, 0.5], [0, 1, 0]], guidance_scale=[3, 1, 7.5])
        scheduler = sd15_scheduler(set_alpha_to_one=to_one, steps_offset=0)
        eps, posterior = (
            coefficient_table(scheduler, 50, fusion=fusion, dtype=torch.float64, **build)
            for fusion in ("eps", "posterior")
        )
        torch.testing.assert_close(eps.rows, posterior.rows, rtol=1e-14, atol=1e-14)
        assert eps.active == posterior.active
        assert ((eps.rows == 0) == (posterior.rows == 0)).all()

    def test_zero_terminal_snr_and_a_step_that_goes_nowhere(self) -> None:
        """abar_t = 0 at the first step, and abar_prev = abar_t at the last."""
        from diffusers import DDIMScheduler

        scheduler = DDIMScheduler(
            rescale_betas_zero_snr=True, timestep_spacing="linspace", set_alpha_to_one=False,
            prediction_type="v_prediction", clip_sample=False,
        )  # fmt: skip
        steps = ddim_grid(scheduler, 5)
        assert steps.alpha_bar_t[0] < 1e-7
        assert steps.alpha_bar_t[-1] == steps.alpha_bar_prev[-1]
        build = dict(etas=ETAS, weights=[0.3, 0.7], fusion="eps", dtype=torch.float64)
        table = coefficient_table(scheduler, 5, **build)
        assert table.rows.isfinite().all()
        share, eta_w = shares([0.3, 0.7], ETAS)
        first, last = table.share[0, 0].tolist(), table.share[-1, 0].tolist()
        assert first == pytest.approx(share, abs=1e-3)  # x_t says nothing: B_i is the same for all
        assert last == pytest.approx(effective_weights([0.3, 0.7], ETAS)[0].tolist())
        assert table.std[0, 0].item() == pytest.approx(eta_w * steps.var[0].sqrt().item())

    def test_clipping_is_refused(self) -> None:
        with pytest.raises(InvalidSchedule, match=r"'eps' mixes predictions.*clip_sample=True"):
            coefficient_table(
                sd15_scheduler(clip_sample=True), 5, etas=ETAS, weights=[0.3, 0.7], fusion="eps"
            )

    def test_other_words_are_refused(self) -> None:
        with pytest.raises(InvalidSchedule, match=r"'mean', expected one of .*'eps'"):
            found(EXPERTS, [0.5, 0.5], ETAS, num_steps=2, fusion="mean")

    def test_extrapolation_beyond_ddpm_is_refused(self) -> None:
        """eta_w > 1 is no DDIM step; Eq. 7 needs none."""
        settings = dict(num_steps=2, extrapolate=True)
        weights = [-1.5, 2.5]
        assert shares(weights, ETAS)[1] > 1
        assert found(EXPERTS, weights, ETAS, **settings).var > 0
        with pytest.raises(InvalidWeights, match=r"eta_w, whose rate is 2\.5"):
            found(EXPERTS, weights, ETAS, fusion="eps", **settings)
        downwards = found(EXPERTS, [1.5, -0.5], ETAS, fusion="eps", **settings)
        expected = mixed_chain(EXPERTS, [1.5, -0.5], ETAS, by_contribution([1.5, -0.5], ETAS), 2)
        assert downwards == pytest.approx(moments(expected), abs=1e-12)


class TestEffectiveWeights:
    @pytest.mark.parametrize(("w", "expected"), [(0.2, 0.243), (0.5, 0.562), (0.8, 0.837)])
    def test_published_values(self, w: float, expected: float) -> None:
        what, eta_w = effective_weights([w, 1 - w], ETAS)
        assert what.tolist() == pytest.approx([expected, 1 - expected], abs=0.6e-3)
        assert eta_w.item() == pytest.approx(shares([w, 1 - w], ETAS)[1])

    def test_definition(self) -> None:
        """w_i (1 + eta_i^-2) / (1 + P), row by row."""
        rows, etas = [[0.2, 0.3, 0.5], [0.6, 0.4, 0.0]], [0.3, 0.7, 1.0]
        what, eta_w = effective_weights(rows, etas)
        for row, values, eta in zip(rows, what.tolist(), eta_w.tolist(), strict=True):
            total = sum(w / e**2 for w, e in zip(row, etas, strict=True))
            expected = [w * (1 + e**-2) / (1 + total) for w, e in zip(row, etas, strict=True)]
            assert values == pytest.approx(expected)
            assert sum(values) == pytest.approx(1)
            assert eta == pytest.approx(total**-0.5)

    def test_it_is_the_limit_of_the_mixture_of_a_step(self) -> None:
        """From both the exact drift of fused means and mixed predictions, at rate 1/T."""
        weights = torch.tensor([[[0.2, 0.8]]], dtype=torch.float64)
        eta = torch.tensor(ETAS, dtype=torch.float64)
        what, _ = effective_weights([0.2, 0.8], ETAS)
        share, _ = fusion_shares(weights, eta)
        errors = []
        for num_steps in (50, 500):
            rule = DDIMRule(ddim_grid(sd15_scheduler(), num_steps))
            middle = eps_mixture(share, rule.eps_scale(eta))
            errors.append(float((middle[num_steps // 2, 0] - what).abs().max()))
        assert errors[0] / errors[1] == pytest.approx(10, rel=0.15)

    def test_equal_etas_leave_weights_alone(self) -> None:
        for eta in (0.0, 0.5, 1.0):
            what, eta_w = effective_weights([0.2, 0.8], [eta, eta])
            assert what.tolist() == pytest.approx([0.2, 0.8])
            assert eta_w.item() == pytest.approx(eta)

    def test_low_etas_take_over(self) -> None:
        what, _ = effective_weights([0.01, 0.99], [1e-4, 1.0])
        assert what[0] > 0.99999

    @pytest.mark.parametrize(
        ("weights", "etas", "error", "message"),
        [
            ([0.2, 0.9], ETAS, InvalidWeights, "sum to 1.1"),
            ([-0.2, 1.2], ETAS, InvalidWeights, "not negative"),
            ([0.2, 0.8], [0.8], InvalidShape, r"\(2,\) and \(1,\)"),
            ([0.2, 0.8], [0.8, 1.1], InvalidSchedule, "objective 1: eta"),
            ([0.2, 0.8], [0.0, 1.0], ZeroVariance, "mix zero and positive"),
        ],
    )
    def test_bad_input(self, weights, etas, error, message) -> None:
        with pytest.raises(error, match=message):
            effective_weights(weights, etas)

    def test_extrapolation_on_request(self) -> None:
        what, _ = effective_weights([-0.2, 1.2], ETAS, extrapolate=True)
        assert what.sum().item() == pytest.approx(1) and what[0] < 0
