# SPDX-License-Identifier: Apache-2.0
"""The coefficient table against diffusers' own step plus Eq. 7, and every setting it refuses."""

import copy
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler, UniPCMultistepScheduler
from torch import Tensor

from msdda_fast import (
    InvalidSchedule,
    InvalidShape,
    InvalidWeights,
    ZeroVariance,
    fused_ddim_step,
)
from msdda_fast.steps.coefficients import CoefficientTable
from msdda_fast.steps.shares import fusion_shares
from msdda_fast.steps.table import coefficient_table
from tests.gaussian_world import grid, sd15_scheduler, var_ddpm

ETAS = [0.8, 1.0, 0.3]
GUIDANCE = [3.0, 1.0, 7.5]
WEIGHTS = torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.4, 0.0]], dtype=torch.float64)


def apply(table: CoefficientTable, k: int, x: Tensor, uncond: Tensor, cond: Tensor, z: Tensor):
    """The documented meaning of both layouts, column by column, on (B, D) and (M, B, D)."""
    M = table.num_objectives
    row = iter(table[k].row.unsqueeze(-1).unbind(1))

    def columns(count: int) -> list[Tensor]:
        return [next(row) for _ in range(count)]

    [x_scale], u_scale, c_scale, [noise_scale] = columns(1), columns(M), columns(M), columns(1)
    out = x_scale * x + noise_scale * z
    out = out + sum(u_scale[m] * uncond[m] + c_scale[m] * cond[m] for m in range(M))
    if table.clip_range is not None:
        [x0_x], x0_uncond, x0_cond, x0_scale = columns(1), columns(M), columns(M), columns(M)
        for m in range(M):
            x0 = x0_x * x + x0_uncond[m] * uncond[m] + x0_cond[m] * cond[m]
            out = out + x0_scale[m] * x0.clamp(-table.clip_range, table.clip_range)
    assert next(row, None) is None
    return out


def diffusers_step(scheduler: DDIMScheduler, t: int, x, uncond, cond, z) -> Tensor:
    """One DDIMScheduler.step per objective and eta; precision weighting as Eq. 7 in the limit."""
    means = torch.stack([
        scheduler.step(
            u + g * (c - u), t, x, eta=eta, variance_noise=torch.zeros_like(x)
        ).prev_sample
        for u, c, g, eta in zip(uncond, cond, GUIDANCE, ETAS, strict=True)
    ])  # fmt: skip
    precision = WEIGHTS / torch.tensor(ETAS, dtype=torch.float64) ** 2
    total = precision.sum(1, keepdim=True)
    previous = t - 1000 // scheduler.num_inference_steps
    var = scheduler._get_variance(t, previous)
    return torch.einsum("bm,mbd->bd", precision / total, means) + (var / total).sqrt() * z


@pytest.mark.sweep
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("clip_range", [None, 0.7], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("to_one", [False, True], ids=["to alpha_0", "to one"])
def test_table_is_diffusers_step_per_objective_and_eq_7(
    prediction_type: str, clip_range: float | None, spacing: str, to_one: bool
) -> None:
    scheduler = sd15_scheduler(
        prediction_type=prediction_type,
        clip_sample=clip_range is not None,
        clip_sample_range=clip_range or 1.0,
        timestep_spacing=spacing,
        steps_offset=1 if spacing == "leading" else 0,
        set_alpha_to_one=to_one,
    )
    num_steps = 7
    table = coefficient_table(
        scheduler,
        num_steps,
        etas=ETAS,
        weights=WEIGHTS,
        guidance_scale=GUIDANCE,
        dtype=torch.float64,
    )
    assert table.rows.shape == (num_steps, 2, 8 if clip_range is None else 18)
    scheduler.set_timesteps(num_steps)
    assert table.timesteps.equal(scheduler.timesteps)
    generator = torch.Generator().manual_seed(0)
    for k, t in enumerate(scheduler.timesteps.tolist()):
        x, z = torch.randn(2, 2, 5, generator=generator, dtype=torch.float64)
        uncond, cond = torch.randn(2, 3, 2, 5, generator=generator, dtype=torch.float64)
        expected = diffusers_step(scheduler, t, x, uncond, cond, z)
        error = (apply(table, k, x, uncond, cond, z) - expected).abs().max()
        assert error < 1e-14 * max(1, expected.abs().max())


def test_published_coefficients() -> None:
    """Etas .8 and 1, w = .5, guidance 7.5, T = 50, as tabulated: x, cond, uncond, noise."""
    table = coefficient_table(
        sd15_scheduler(), 50, etas=[0.8, 1.0], weights=[0.5, 0.5], guidance_scale=7.5
    )
    published = {
        981: (1.1229, 0.761, 0.591, -0.878, -0.682, 0.4015),
        501: (1.0485, 0.362, 0.282, -0.418, -0.325, 0.2604),
        1: (1.0004, 0.069, 0.053, -0.079, -0.061, 0.0182),
    }
    for t, row in published.items():
        k = table.timesteps.tolist().index(t)
        assert table[k].row[0].tolist() == pytest.approx(row, abs=0.6e-3)


def test_share_and_std_are_float64_diagnostics() -> None:
    scheduler = sd15_scheduler()
    table = coefficient_table(scheduler, 50, etas=[0.8, 1.0], weights=[0.2, 0.8])
    assert table.rows.dtype == torch.float32
    assert table.share.dtype == table.std.dtype == torch.float64
    assert table.share[..., 0].unique().item() == pytest.approx(0.280899, abs=0.5e-6)
    for k, (_, a, b) in enumerate(grid(scheduler, 50)):
        assert table.std[k].item() == pytest.approx(0.9480909 * var_ddpm(a, b) ** 0.5, rel=1e-7)
    rounded = coefficient_table(
        scheduler, 50, etas=[0.8, 1.0], weights=[0.2, 0.8], dtype=torch.float64
    )
    assert rounded.rows.float().equal(table.rows)  # built in float64, cast once


def test_one_hot_share_is_exact_and_masks() -> None:
    table = coefficient_table(
        sd15_scheduler(), 5, etas=ETAS, weights=[0.0, 1.0, 0.0], guidance_scale=GUIDANCE
    )
    assert table.share.unique().tolist() == [0.0, 1.0]
    assert table.active == [False, True, False]
    assert not table.needs_uncond  # the only active objective has guidance 1
    assert (table.rows[:, :, [1, 2, 3, 4, 6]] == 0).all()


def test_masked_objective_is_masked_inside_the_clamp_too() -> None:
    scheduler = sd15_scheduler(clip_sample=True)
    table = coefficient_table(
        scheduler, 5, etas=[1, 1], weights=[[1, 0], [0.5, 0.5]], guidance_scale=2
    )
    second = [2, 4, 8, 10, 12]  # the columns of objective 1
    assert (table.rows[:, 0, second] == 0).all()
    assert (table.rows[:, 1, second] != 0).all()


def test_batch_axes_of_weights_and_guidance_combine() -> None:
    build = dict(etas=[0.8, 1.0], dtype=torch.float64)
    scheduler, w, g = sd15_scheduler(), [[0.2, 0.8], [0.5, 0.5]], [[1.0, 2.0], [3.0, 4.0]]
    both = coefficient_table(scheduler, 3, weights=w, guidance_scale=g, **build)
    for b in (0, 1):
        one = coefficient_table(scheduler, 3, weights=w[b], guidance_scale=g[b], **build)
        assert one.rows.shape[1] == 1
        assert both.rows[:, [b]].equal(one.rows)
    shared = coefficient_table(scheduler, 3, weights=w[0], guidance_scale=g, **build)
    assert shared.rows[:, 0].equal(both.rows[:, 0])


def test_weights_may_change_with_the_step() -> None:
    weights = torch.tensor([[[0.2, 0.8]], [[1.0, 0.0]]], dtype=torch.float64)
    table = coefficient_table(sd15_scheduler(), 2, etas=[0.8, 1.0], weights=weights)
    for k in (0, 1):
        constant = coefficient_table(sd15_scheduler(), 2, etas=[0.8, 1.0], weights=weights[k])
        assert table.rows[k].equal(constant.rows[k])
    assert table.active == [True, True]


def test_the_scheduler_is_left_alone() -> None:
    scheduler = sd15_scheduler()
    scheduler.set_timesteps(10)
    before = copy.deepcopy(scheduler.__dict__)
    coefficient_table(scheduler, 50, etas=[1.0], weights=[1.0])
    assert scheduler.timesteps.equal(before["timesteps"])
    assert scheduler.num_inference_steps == 10


def test_a_duck_typed_scheduler_is_enough() -> None:
    real = sd15_scheduler()
    duck = SimpleNamespace(config=SimpleNamespace(**real.config), timesteps=None)
    duck.alphas_cumprod = real.alphas_cumprod
    duck.set_timesteps = lambda n: None
    duck.timesteps = torch.tensor([501, 1])
    expected = coefficient_table(real, 2, etas=[1.0], weights=[1.0])
    assert coefficient_table(duck, 2, etas=[1.0], weights=[1.0]).rows.equal(expected.rows)


def test_table_indexing_and_moving() -> None:
    table = coefficient_table(sd15_scheduler(), 3, etas=[0.8, 1.0], weights=[0.2, 0.8])
    assert len(table) == 3
    assert table[-1].row.equal(table.rows[2])
    assert [step.num_objectives for step in table] == [2, 2, 2]
    with pytest.raises(IndexError, match="step 3 is outside the table of 3 steps"):
        table[3]
    moved = table.to("meta", torch.float16)
    assert (moved.rows.device.type, moved.rows.dtype) == ("meta", torch.float16)
    assert moved.timesteps.device.type == "meta" and moved.timesteps.dtype == torch.int64
    assert moved.share.device.type == "cpu"


class TestTrailingSpacing:
    """T of which 1000 training steps are no multiple: as diffusers does it, or not at all."""

    @pytest.mark.parametrize("num_steps", [61, 103, 499], ids=str)
    def test_a_surplus_timestep_of_diffusers_is_refused(self, num_steps: int) -> None:
        scheduler = sd15_scheduler(timestep_spacing="trailing", steps_offset=0)
        scheduler.set_timesteps(num_steps)
        assert scheduler.timesteps[-1] == -1 and len(scheduler.timesteps) == num_steps + 1
        with pytest.raises(InvalidSchedule, match=rf"'trailing'.*num_steps={num_steps}.*-1"):
            coefficient_table(scheduler, num_steps, etas=[1.0], weights=[1.0])

    @pytest.mark.parametrize("num_steps", [3, 7, 60, 62, 333], ids=str)
    def test_every_step_is_that_of_diffusers(self, num_steps: int) -> None:
        scheduler = sd15_scheduler(timestep_spacing="trailing", steps_offset=0)
        table = coefficient_table(scheduler, num_steps, etas=[0.8], weights=[1.0])
        scheduler.set_timesteps(num_steps)
        assert table.timesteps.equal(scheduler.timesteps) and len(table) == num_steps
        x, output, z = torch.randn(3, 1, 4, 2, generator=torch.manual_seed(0)).unbind()
        for k, t in enumerate(scheduler.timesteps):
            expected = scheduler.step(output, t, x, eta=0.8, variance_noise=z).prev_sample
            actual = fused_ddim_step(x, output[None, None], table[k], noise=z)
            assert torch.allclose(actual, expected, rtol=1e-4, atol=1e-4), k


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("fusion", ["posterior", "eps"])
@pytest.mark.parametrize("train", [1, 2, 1000], ids=str)
def test_one_step_of_a_cosine_schedule_is_that_of_diffusers(train, fusion, spacing) -> None:
    settings = dict(beta_schedule="squaredcos_cap_v2", timestep_spacing=spacing, clip_sample=False)
    scheduler = DDIMScheduler(num_train_timesteps=train, **settings)
    table = coefficient_table(scheduler, 1, etas=[1, 0.8], weights=[0.3, 0.7], fusion=fusion)
    scheduler.set_timesteps(1)
    x, output, z = torch.randn(3, 1, 4, 2, generator=torch.manual_seed(0)).unbind()
    expected = scheduler.step(output, scheduler.timesteps[0], x, eta=1.0, variance_noise=z)
    actual = fused_ddim_step(x, [output[None], output[None]], table[0], noise=z)
    # differences of numbers up to 1 / sqrt(alpha_bar), 2e4
    assert torch.allclose(actual, expected.prev_sample, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(
    "settings",
    [
        dict(num_train_timesteps=1, rescale_betas_zero_snr=True, prediction_type="v_prediction"),
        dict(beta_start=float("nan")),
        dict(beta_start=0.0, beta_end=0.0),
        dict(beta_start=-0.1, beta_end=-0.01),
        dict(beta_start=2.0, beta_end=3.0),
    ],
    ids=["one rescaled", "NaN", "zero", "negative", "above 1"],
)
@pytest.mark.parametrize("fusion", ["posterior", "eps"])
def test_a_noise_schedule_that_is_none_is_refused(settings, fusion) -> None:
    scheduler = DDIMScheduler(**{"clip_sample": False, **settings})
    with pytest.raises(InvalidSchedule, match=r"alphas_cumprod must lie in \[0, 1\)"):
        coefficient_table(scheduler, 1, etas=[1.0], weights=[1.0], fusion=fusion)


def test_coefficients_beyond_float32_are_refused() -> None:
    build = dict(etas=[1.0], weights=[1.0], guidance_scale=1e300)
    with pytest.raises(InvalidSchedule, match=r"do not fit torch.float32.*guidance_scale 1e\+300"):
        coefficient_table(sd15_scheduler(), 2, **build)


@pytest.mark.parametrize("spacing", ["leading", "linspace"])
def test_last_step_without_variance_is_finite_and_silent(spacing: str) -> None:
    scheduler = sd15_scheduler(timestep_spacing=spacing, steps_offset=0, set_alpha_to_one=True)
    table = coefficient_table(scheduler, 5, etas=[0.8, 1.0], weights=[0.2, 0.8])
    assert table.rows.isfinite().all()
    assert table.std[-1].item() == 0
    assert (table.rows[:-1, :, -1] > 0).all() and (table.rows[-1, :, -1] == 0).all()


def test_zero_terminal_snr_works_for_v_prediction() -> None:
    settings = dict(
        rescale_betas_zero_snr=True, timestep_spacing="trailing", beta_schedule="scaled_linear"
    )
    build = dict(etas=[0.8, 1.0], weights=[0.2, 0.8])
    table = coefficient_table(DDIMScheduler(prediction_type="v_prediction", **settings), 5, **build)
    assert table.rows.isfinite().all()
    with pytest.raises(InvalidSchedule, match=r"alpha_bar is 0.*v_prediction or sample"):
        coefficient_table(DDIMScheduler(**settings), 5, **build)


class TestZeroVariance:
    def test_tiny_etas_do_not_overflow(self) -> None:
        etas = torch.tensor([0.8e-200, 1e-200], dtype=torch.float64)
        weights = torch.tensor([0.2, 0.8], dtype=torch.float64)
        share, eta_w = fusion_shares(weights, etas)
        assert share[0].item() == pytest.approx(0.280899, abs=0.5e-6)
        assert eta_w.item() == pytest.approx(0.9480909e-200, rel=1e-7)

    def test_near_degenerate_is_one_sided_already(self) -> None:
        share, eta_w = fusion_shares(
            torch.tensor([0.5, 0.5], dtype=torch.float64),
            torch.tensor([0.1, 1.0], dtype=torch.float64),
        )
        assert share[0].item() == pytest.approx(0.990, abs=0.5e-3)
        assert eta_w.item() == pytest.approx(0.141, abs=0.5e-3)

    def test_rows_are_judged_one_by_one(self) -> None:
        """Only a sample that mixes eta = 0 with eta > 0 is a conflict."""
        etas = [0.0, 1.0, 0.0]
        fine = [[1, 0, 0], [0, 1, 0], [0.3, 0, 0.7]]
        table = coefficient_table(sd15_scheduler(), 2, etas=etas, weights=fine)
        assert table.share[0].tolist() == fine
        assert (table.std[0] > 0).tolist() == [False, True, False]
        with pytest.raises(ZeroVariance, match=r"\[0.5, 0.5, 0.0\].*'dominate'.*'ratio'"):
            coefficient_table(sd15_scheduler(), 2, etas=etas, weights=[*fine, [0.5, 0.5, 0]])

    def test_policies_and_rates_are_checked(self) -> None:
        def build(**policy: object) -> CoefficientTable:
            return coefficient_table(
                sd15_scheduler(), 2, etas=[0.0, 1.0], weights=[0.5, 0.5], **policy
            )

        with pytest.raises(InvalidSchedule, match=r"'win', expected one of .*dominate"):
            build(zero_variance="win")
        with pytest.raises(InvalidSchedule, match="'ratio' takes rates"):
            build(zero_variance="ratio")
        with pytest.raises(InvalidSchedule, match="'ratio' takes rates"):
            build(zero_variance="dominate", rates=[1, 1])
        with pytest.raises(InvalidSchedule, match=r"positive and finite, got \[1.0, 0.0\]"):
            build(zero_variance="ratio", rates=[1, 0])
        with pytest.raises(
            InvalidShape, match=r"rates have shape \(3,\), expected \(M,\) = \(2,\)"
        ):
            build(zero_variance="ratio", rates=[1, 1, 1])

    def test_extrapolation_cannot_leave_the_deciding_ones_negative(self) -> None:
        with pytest.raises(InvalidWeights, match="total precision"):
            coefficient_table(
                sd15_scheduler(),
                2,
                etas=[0.0, 1.0],
                weights=[-0.5, 1.5],
                extrapolate=True,
                zero_variance="dominate",
            )


class TestRefusals:
    """One wrong value or shape per argument, named, before anything is built."""

    def build(self, scheduler=None, num_steps=5, **changes: object) -> CoefficientTable:
        settings = dict(etas=[0.8, 1.0], weights=[0.2, 0.8]) | changes
        return coefficient_table(scheduler or sd15_scheduler(), num_steps, **settings)

    @pytest.mark.parametrize("num_steps", [0, -1, 1001])
    def test_num_steps(self, num_steps: int) -> None:
        with pytest.raises(InvalidSchedule, match=rf"num_steps is {num_steps}, expected 1 to 1000"):
            self.build(num_steps=num_steps)

    def test_steps_beyond_training_because_of_the_offset(self) -> None:
        with pytest.raises(InvalidSchedule, match=r"timestep is 1000.*999.*steps_offset=1"):
            self.build(num_steps=1000)
        no_offset = sd15_scheduler(steps_offset=0)
        assert len(self.build(no_offset, num_steps=1000)) == 1000

    @pytest.mark.parametrize("eta", [-0.1, 1.5, float("nan")])
    def test_eta(self, eta: float) -> None:
        with pytest.raises(InvalidSchedule, match=rf"objective 1: eta must lie in .* got {eta}"):
            self.build(etas=[0.8, eta])

    @pytest.mark.parametrize("etas", [[[0.8, 1.0]], [], 1.0], ids=["2-d", "empty", "0-d"])
    def test_etas_shape(self, etas: object) -> None:
        with pytest.raises(InvalidShape, match=r"etas have shape .* expected \(M,\)"):
            self.build(etas=etas)

    def test_weights_values(self) -> None:
        with pytest.raises(InvalidWeights):
            self.build(weights=[0.2, 0.9])
        with pytest.raises(InvalidWeights, match="total precision"):
            self.build(weights=[2.79, -1.79], etas=[1.0, 0.8], extrapolate=True)

    @pytest.mark.parametrize(
        "weights", [[0.2, 0.3, 0.5], [[1.0]], torch.ones(4, 1, 2) / 2], ids=["M", "B", "T"]
    )
    def test_weights_shape(self, weights: object) -> None:
        with pytest.raises(InvalidShape, match="weights have shape"):
            self.build(weights=weights)

    def test_guidance(self) -> None:
        with pytest.raises(InvalidSchedule, match=r"finite, got \[1.0, nan\]"):
            self.build(guidance_scale=[1.0, float("nan")])
        with pytest.raises(InvalidShape, match=r"guidance_scale has shape \(3,\).*M = 2"):
            self.build(guidance_scale=[1.0, 2.0, 3.0])
        with pytest.raises(InvalidShape, match="disagree on the batch size"):
            self.build(weights=[[0.2, 0.8]] * 2, guidance_scale=[[1.0, 1.0]] * 3)

    def test_guidance_beyond_float32(self) -> None:
        far = dict(etas=[1.0], weights=[1.0], guidance_scale=1e300)
        for dtype in (torch.float32, torch.float64):
            with pytest.raises(InvalidSchedule, match=r"do not fit .*guidance_scale 1e\+300"):
                coefficient_table(sd15_scheduler(), 5, dtype=dtype, **far)

    @pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.int8])
    def test_dtype(self, dtype: torch.dtype) -> None:
        with pytest.raises(InvalidShape, match=rf"floating-point dtype, got dtype={dtype}"):
            coefficient_table(sd15_scheduler(), 5, etas=[1.0], weights=[1.0], dtype=dtype)
        table = coefficient_table(sd15_scheduler(), 5, etas=[1.0], weights=[1.0])
        with pytest.raises(InvalidShape, match="floating-point"):
            table.to(dtype=dtype)

    @pytest.mark.parametrize("beta", [0.0, float("nan"), -0.1])
    def test_betas_that_leave_no_noise(self, beta: float) -> None:
        for scheduler in (
            DDIMScheduler(beta_start=beta, beta_end=beta),
            DDIMScheduler(trained_betas=[0.1] * 500 + [beta] * 500),
            DDIMScheduler(trained_betas=[beta] * 10 + [0.1] * 990),
        ):
            if beta == 0 and 0 < scheduler.alphas_cumprod[0] < 1:
                continue  # the steps in between stay where they are
            with pytest.raises(InvalidSchedule, match=r"alphas_cumprod must lie.*betas"):
                coefficient_table(scheduler, 100, etas=[1.0], weights=[1.0])

    def test_thresholding(self) -> None:
        with pytest.raises(InvalidSchedule, match="thresholding"):
            self.build(sd15_scheduler(thresholding=True))

    def test_prediction_type(self) -> None:
        scheduler = sd15_scheduler()
        scheduler.register_to_config(prediction_type="flow")
        with pytest.raises(InvalidSchedule, match="'flow', expected one of"):
            self.build(scheduler)

    @pytest.mark.parametrize(
        "kind", [EulerDiscreteScheduler, PNDMScheduler, UniPCMultistepScheduler]
    )
    def test_other_schedulers(self, kind: type) -> None:
        with pytest.raises(InvalidSchedule, match=rf"{kind.__name__} .*DDIMScheduler.from_config"):
            self.build(kind())

    @pytest.mark.parametrize(
        "timesteps",
        [torch.tensor([1, 501]), torch.tensor([501.0, 1.0]), torch.tensor([501])],
        ids=["increasing", "float", "too few"],
    )
    def test_timesteps_that_are_not_ddim(self, timesteps: Tensor) -> None:
        scheduler = SimpleNamespace(config=sd15_scheduler().config, timesteps=timesteps)
        scheduler.alphas_cumprod = sd15_scheduler().alphas_cumprod
        scheduler.set_timesteps = lambda num_steps: None
        with pytest.raises(InvalidSchedule, match=r"timesteps .* expected T decreasing integers"):
            self.build(scheduler, num_steps=2)
