# SPDX-License-Identifier: Apache-2.0
"""Each rule against the step of the diffusers scheduler that it stands for, noise included."""

import inspect

import diffusers
import pytest
import torch
from torch import Tensor

import msdda_fast as mf
from msdda_fast import InvalidSchedule, InvalidShape
from msdda_fast.reference import fuse_posteriors
from msdda_fast.steps.schedulers import RULES, levels_of, scheduler_rule

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning:diffusers"
)
T = 6
VP = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
FLOWS = ("FlowMatch", "LTX")
EXACT = ("DD", "LCM", "TCD")  # those that compute in the dtype of alpha_bar


def scheduler(name: str, **config: object) -> object:
    kind = getattr(diffusers, name)
    known = inspect.signature(kind.__init__).parameters
    usual = {} if name.startswith(FLOWS) else VP
    made = kind(**{key: value for key, value in usual.items() if key in known} | config)
    if name.startswith(EXACT):
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        made.alphas_cumprod = (1 - betas).cumprod(0)
        if hasattr(made, "final_alpha_cumprod"):
            made.final_alpha_cumprod = betas.new_ones(())
    return made


PREDICTIONS = ("epsilon", "v_prediction", "sample")
CASES = [
    *(("DDPMScheduler", {"prediction_type": kind}, None) for kind in PREDICTIONS),
    ("DDPMScheduler", {"clip_sample": True, "clip_sample_range": 0.7}, None),
    ("DDPMScheduler", {"timestep_spacing": "trailing"}, None),
    ("DDPMScheduler", {"variance_type": "fixed_small_log"}, None),
    ("DDPMParallelScheduler", {}, None),
    ("DDIMParallelScheduler", {}, 0.6),
    *(("EulerAncestralDiscreteScheduler", {"prediction_type": p}, None) for p in PREDICTIONS[:2]),
    *(("LCMScheduler", {"prediction_type": kind}, None) for kind in PREDICTIONS),
    ("LCMScheduler", {"clip_sample": True, "clip_sample_range": 0.7}, None),
    *(("TCDScheduler", {"prediction_type": kind}, 0.3) for kind in PREDICTIONS),
    *(("TCDScheduler", {}, gamma) for gamma in (0.0, 1.0)),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, None),
    ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, None),
    ("FlowMatchLCMScheduler", {"shift": 3.0}, None),
    *(("LTXEulerAncestralRFScheduler", {"eta": eta}, None) for eta in (0.0, 0.4, 1.0)),
    ("LTXEulerAncestralRFScheduler", {"s_noise": 0.9}, None),
]


@pytest.mark.parametrize(("name", "config", "level"), CASES)
def test_it_is_the_stock_step(name: str, config: dict, level: float | None) -> None:
    stock = scheduler(name, **config)
    etas = None if level is None else [level]
    table = mf.coefficient_table(stock, T, etas=etas, weights=[1.0], dtype=torch.float64)
    stock.set_timesteps(T)
    assert table.timesteps.double().equal(stock.timesteps.double()) and len(table) == T
    exact = name.startswith(EXACT)
    arguments = {} if level is None else {"eta": level}
    generator = torch.Generator().manual_seed(0)
    for k, t in enumerate(stock.timesteps):
        x, output = torch.randn(2, 2, 4, 5, generator=generator, dtype=torch.float64)
        x, output = (x, output) if exact else (x.float(), output.float())
        if table.input_scale is not None:
            scaled = stock.scale_model_input(x, t)
            assert (scaled - x * table.input_scale[k]).abs().max() <= 1e-6
        z = torch.randn(x.shape, generator=torch.Generator().manual_seed(k), dtype=x.dtype)
        drawn, t = torch.Generator().manual_seed(k), int(t) if exact else t
        expected = stock.step(output, t, x, generator=drawn, **arguments).prev_sample
        found = mf.fused_ddim_step(
            x.double(), output.double()[None, None], table[k], noise=z.double()
        )
        bound = 1e-13 if exact else 8e-6  # diffusers' float32 tables
        bound += 1e-9 * (k == T - 1)  # its variance is at least 1e-20
        assert (found - expected).abs().max() <= bound * max(1.0, float(expected.abs().max()))


def test_every_rule_is_tried() -> None:
    assert {name for name, _, _ in CASES} | {"DDIMScheduler"} == RULES.keys()


class Subclass(diffusers.TCDScheduler):
    """Somebody's own."""


def test_a_subclass_is_its_base_and_a_class_from_elsewhere_is_ddim() -> None:
    named = {
        type(scheduler_rule(kind(), 4)).__name__ for kind in (Subclass, diffusers.TCDScheduler)
    }
    assert named == {"TCDRule"}
    elsewhere = type("Mine", (), dict(vars(diffusers.DDIMScheduler)) | {"__module__": __name__})
    stock = diffusers.DDIMScheduler()
    mine = elsewhere.__new__(elsewhere)
    mine.__dict__.update(stock.__dict__)
    mine.__class__.config = stock.config
    assert type(scheduler_rule(mine, 4)).__name__ == "DDIMRule"


def moments(name: str, level: float, k: int, **config: object) -> tuple[Tensor, Tensor, float]:
    """A, B and tau of the stock step alone, by impulses."""
    stock = scheduler(name, **({"eta": level} if name.startswith("LTX") else {}), **config)
    stock.set_timesteps(T)
    takes = inspect.signature(stock.step).parameters
    t = stock.timesteps[k]
    dtype = torch.float64 if name.startswith(EXACT) else torch.float32
    x, output = torch.eye(3, dtype=dtype)[:2, :, None, None]
    arguments = {"eta": level} if "eta" in takes else {}

    def step(x: Tensor, output: Tensor) -> Tensor:
        stock._step_index = None
        drawn = torch.Generator().manual_seed(3)
        return stock.step(output, t, x, generator=drawn, **arguments).prev_sample.double().flatten()

    nothing = torch.zeros_like(x)
    drawn = torch.randn(
        x.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype
    ).flatten()
    noise = step(nothing, nothing)
    tau = float((noise / drawn)[0])
    return (step(x, output) - noise)[0], (step(x, output) - noise)[1], tau


@pytest.mark.parametrize(
    ("name", "levels"),
    [("TCDScheduler", (0.3, 0.9)), ("LTXEulerAncestralRFScheduler", (1.0, 0.4)),
     ("DDIMScheduler", (0.8, 1.0))],
)  # fmt: skip
def test_unequal_levels_are_eq_7_of_the_stock_steps(name: str, levels: tuple) -> None:
    weights = torch.tensor([0.3, 0.7], dtype=torch.float64)
    table = mf.coefficient_table(
        scheduler(name), T, levels=levels, weights=weights, fusion="posterior", dtype=torch.float64
    )
    bound = 3e-6 if name.startswith(FLOWS) else 1e-13
    for k in range(T - 1):
        steps = [moments(name, level, k) for level in levels]
        row, layout = table[k].row[0], table[k].layout
        variances = torch.tensor([tau**2 for _, _, tau in steps], dtype=torch.float64)
        means = torch.stack([torch.stack(step[:2]) for step in steps])
        (a, b), var = fuse_posteriors(means, variances, weights)
        assert float(row[layout.x_scale] - a) == pytest.approx(0, abs=bound)
        assert float(row[layout.cond].sum() - b) == pytest.approx(0, abs=bound)
        assert float(row[layout.noise_scale]) == pytest.approx(float(var.sqrt()), rel=20 * bound)


@pytest.mark.parametrize(
    ("name", "levels"),
    [
        ("DDIMScheduler", [0.8, 1.0]),
        ("TCDScheduler", [0.3, 0.9]),
        ("LTXEulerAncestralRFScheduler", [1.0, 0.4]),
        ("EulerAncestralDiscreteScheduler", [1.0, 0.4]),
        ("FlowMatchEulerDiscreteScheduler", [0.9, 0.4]),
        *(
            ("FlowMatchEulerDiscreteScheduler", [kind(0.9), kind(0.4)])
            for kind in (mf.FlowSDE, mf.DanceSDE, mf.CPS, mf.FlowDDIM)
        ),
    ],
    ids=str,
)
def test_fast_fuse_step_of_its_gaussians_is_the_table(name: str, levels: list) -> None:
    stock, weights = scheduler(name), torch.tensor([0.3, 0.7], dtype=torch.float64)
    read = levels_of(stock, None, levels, 2)
    terms = scheduler_rule(stock, T, read.noise).step(read.values)
    table = mf.coefficient_table(
        stock, T, levels=levels, weights=weights, fusion="posterior", dtype=torch.float64
    )
    for k in range(T - 1):
        x, z, *outputs = torch.randn(4, 2, 4, 3, dtype=torch.float64)
        a, b, std = (
            scale.expand(T, 1, 2)[k, 0] for scale in (terms.x_scale, terms.output_scale, terms.std)
        )
        means = [a[m] * x + b[m] * output for m, output in enumerate(outputs)]
        found = mf.fast_fuse_step(means, std**2, weights, noise=z)
        step = mf.fused_ddim_step(x, torch.stack(outputs)[:, None], table[k], noise=z)
        torch.testing.assert_close(found, step, rtol=1e-11, atol=1e-11)


def test_where_no_noise_is_left_the_limit_of_the_ratios_weighs() -> None:
    weights = torch.tensor([0.3, 0.7], dtype=torch.float64)
    gammas = torch.tensor([0.3, 0.9], dtype=torch.float64)
    etas = torch.tensor([1.0, 0.4], dtype=torch.float64)
    for name, levels, square in (
        ("TCDScheduler", gammas, gammas),
        ("LTXEulerAncestralRFScheduler", etas, etas * (2 - etas)),
    ):
        table = mf.coefficient_table(scheduler(name), T, levels=levels, weights=weights)
        assert table.std[-1] == 0 and (table.std[:-1] > 0).all()
        expected = weights / square / (weights / square).sum()
        torch.testing.assert_close(table.share[-1, 0], expected, rtol=1e-12, atol=0)
        assert table.share[:, 0, 0].diff().abs().max() > 1e-3  # they depend on the step


RULED = [
    *(
        (name, None)
        for name in ("DDIMScheduler", "TCDScheduler", "EulerAncestralDiscreteScheduler",
                     "LTXEulerAncestralRFScheduler", "FlowMatchEulerDiscreteScheduler")
    ),
    *(("FlowMatchEulerDiscreteScheduler", kind(0.5))
      for kind in (mf.FlowSDE, mf.DanceSDE, mf.CPS, mf.FlowDDIM)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "noise"), RULED, ids=str)
def test_a_rule_says_what_predictions_count_and_which_step_has_a_rate(name: str, noise) -> None:
    """The outputs are eps, or a flow's v: at a given x the same, up to a factor per step."""
    rule = scheduler_rule(scheduler(name), T, noise)
    levels = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)
    terms, scale = rule.step(levels), rule.eps_scale(levels)
    quotient = (terms.output_scale / scale).expand(T, 1, 3)
    torch.testing.assert_close(quotient, quotient[..., :1].expand_as(quotient), rtol=1e-9, atol=0)
    assert (scale > 0).all() and scale.isfinite().all()
    again = rule.step_at(terms.rate)
    for one, other in zip(terms[:4], again[:4], strict=True):
        torch.testing.assert_close(
            other.expand(T, 1, 3), one.expand(T, 1, 3), rtol=1e-11, atol=1e-13
        )


@pytest.mark.parametrize("name", ["TCDScheduler", "LTXEulerAncestralRFScheduler"])
def test_mixed_predictions_keep_the_noise_level(name: str) -> None:
    """One model fused with itself: the step at the fused rate, whatever the levels."""
    levels, weights = (0.3, 0.9), [0.3, 0.7]
    stock = scheduler(name)
    rule = scheduler_rule(stock, T)
    table = mf.coefficient_table(
        stock, T, levels=levels, weights=weights, fusion="eps", dtype=torch.float64
    )
    layout = table[0].layout
    terms = rule.step_at(
        (table.std / rule.step(torch.ones(1).double()).unit[..., 0]).nan_to_num(1.0)[..., None]
    )
    rows = table.rows[:-1, 0]
    flat = [scale.expand(T, 1, 1)[:-1].flatten() for scale in terms[:2]]
    torch.testing.assert_close(rows[:, layout.x_scale], flat[0], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(rows[:, layout.cond].sum(1), flat[1], rtol=1e-12, atol=1e-14)


def test_denoise_is_the_stock_loop_of_a_scaled_input() -> None:
    """Euler ancestral: the network takes x / sqrt(sigma^2 + 1), and x_T is not of unit size."""
    stock = scheduler("EulerAncestralDiscreteScheduler")
    stock.set_timesteps(T)
    x_T = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(1)) * stock.init_noise_sigma
    seen = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        return torch.sin(x) * (t / 1000)

    generator = torch.Generator().manual_seed(2)
    found = mf.denoise([network], x_T, scheduler=stock, num_steps=T, generator=generator)
    generator, x = torch.Generator().manual_seed(2), x_T
    for t in stock.timesteps:
        output = torch.sin(stock.scale_model_input(x, t)) * (t / 1000)
        x = stock.step(output, t, x, generator=generator).prev_sample
    assert (found - x).abs().max() <= 2e-5 * x.abs().max()
    assert torch.stack(seen).equal(stock.timesteps)


class TestRefusals:
    @pytest.mark.parametrize("variance", ["learned", "learned_range", "fixed_large"])
    def test_variances_that_are_not_known_before(self, variance: str) -> None:
        with pytest.raises(InvalidSchedule, match=f"variance_type is '{variance}'"):
            scheduler_rule(scheduler("DDPMScheduler", variance_type=variance), T)

    @pytest.mark.parametrize(
        ("name", "meaning"),
        [("DDPMScheduler", "eta is fixed by DDPM"), ("LCMScheduler", "level is fixed by LCM")],
    )
    def test_levels_where_there_are_none_to_choose(self, name: str, meaning: str) -> None:
        with pytest.raises(InvalidSchedule, match=f"objective 1: {meaning}, and got 0.8: leave"):
            mf.coefficient_table(scheduler(name), T, etas=[1.0, 0.8], weights=None)

    @pytest.mark.parametrize("name", ["DDIMScheduler", "TCDScheduler"])
    def test_no_levels_where_there_must_be_some(self, name: str) -> None:
        with pytest.raises(InvalidSchedule, match=f"{name} needs a level of each objective"):
            mf.coefficient_table(scheduler(name), T, weights=[0.3, 0.7])

    def test_nobody_says_how_many_objectives_there_are(self) -> None:
        with pytest.raises(InvalidShape, match="how many objectives are there"):
            mf.coefficient_table(scheduler("LCMScheduler"), T, weights=None)

    @pytest.mark.parametrize(
        ("name", "low"), [("TCDScheduler", 1.2), ("LTXEulerAncestralRFScheduler", -0.1)]
    )
    def test_a_level_outside_its_range(self, name: str, low: float) -> None:
        with pytest.raises(InvalidSchedule, match=rf"objective 1: \w+ must lie in .*got {low}"):
            mf.coefficient_table(scheduler(name), T, etas=[0.5, low], weights=None)

    def test_two_names_for_levels_and_too_few_of_them(self) -> None:
        stock = scheduler("DDIMScheduler")
        with pytest.raises(ValueError, match="etas or levels, not both"):
            mf.coefficient_table(stock, T, etas=[1.0], levels=[1.0], weights=None)
        with pytest.raises(InvalidShape, match=r"levels have shape \(1,\), expected .* \(2,\)"):
            levels_of(stock, None, [1.0], 2)

    def test_steps_that_change_size(self) -> None:
        stock = scheduler("FlowMatchLCMScheduler", scale_factors=[0.5] * 5, upscale_mode="nearest")
        with pytest.raises(InvalidSchedule, match="scale_factors"):
            mf.coefficient_table(stock, T, weights=[1.0])

    def test_too_many_steps_for_a_distilled_schedule(self) -> None:
        with pytest.raises(InvalidSchedule, match="LCMScheduler refuses 60 steps"):
            mf.coefficient_table(scheduler("LCMScheduler"), 60, weights=[1.0])
