# SPDX-License-Identifier: Apache-2.0
"""A fused scheduler against Algorithm 1 with M stock schedulers, each with its own history."""

import copy
import inspect

import diffusers
import pytest
import torch
from torch import Tensor

import msdda_fast as mf
from msdda_fast import InvalidSchedule, InvalidShape, InvalidWeights, ZeroVariance
from msdda_fast.pipelines.stock_schedulers import LINEAR
from msdda_fast.reference import fuse_posteriors
from tests.steps import flow_world

VP = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
FLOW = dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
WEIGHTS = torch.tensor([[0.3, 0.7], [0.6, 0.4]], dtype=torch.float64)
SHAPE = (2, 4, 8, 8)
T = 6
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def scheduler(name: str, **config: object) -> object:
    kind = getattr(diffusers, name)
    known = inspect.signature(kind.__init__).parameters
    usual = {**VP, "clip_sample": False, "skip_prk_steps": True, "noise_sampler_seed": 3}
    if "sigma_min" in known or "shift" in known or "flow_shift" in config:
        usual = {}
    if kind.__module__.startswith("diffusers.utils.dummy"):
        pytest.skip(f"{name} needs a package that is not installed")
    return kind(**{key: value for key, value in usual.items() if key in known} | config)


def set_timesteps(one: object) -> None:
    middle = {"intermediate_timesteps": None} if isinstance(one, diffusers.SCMScheduler) else {}
    one.set_timesteps(T, **middle)


def drawn(k: int) -> torch.Generator:
    return torch.Generator().manual_seed(100 + k)


def stock_step(one: object, k: int, output: Tensor, t: Tensor, x: Tensor, **arguments: object):
    if hasattr(one, "scale_model_input"):
        one.scale_model_input(x, t)
    takes = inspect.signature(one.step).parameters
    if "generator" in takes:
        arguments["generator"] = drawn(k)
    if "old_pred_original_sample" in takes:  # CogVideoX hands the last x_0 around
        arguments |= {"old_pred_original_sample": None, "timestep_back": None}
    torch.manual_seed(k)
    return one.step(output, timestep=t, sample=x, return_dict=False, **arguments)[0]


def in_lockstep(one: object, outputs: Tensor, **arguments: object):
    """Step M copies of the scheduler from the same state, and average: Eq. 7 at equal levels."""
    x = torch.randn(SHAPE, generator=drawn(0)) * float(getattr(one, "init_noise_sigma", 1.0))
    copies = [copy.deepcopy(one) for _ in WEIGHTS[0]]
    w = WEIGHTS.T[:, :, None, None, None]
    timesteps = one.timesteps[: -1 if "SCM" in type(one).__name__ else None]
    for k, t in enumerate(timesteps):
        yield k, t, x
        steps = [
            stock_step(each, k, output, t, x, **arguments)
            for each, output in zip(copies, outputs[k], strict=True)
        ]
        x = (w * torch.stack(steps).double()).sum(0).to(steps[0].dtype)
    yield None, None, x


CASES = {
    **{name: (name, {}, {}) for name in sorted(LINEAR)},
    "DDIM, eta 1": ("DDIMScheduler", {}, {"eta": 1.0}),
    "Euler, churn": ("EulerDiscreteScheduler", {}, {"s_churn": 4.0}),
    "Heun, churn": ("FlowMatchHeunDiscreteScheduler", {}, {"s_churn": 2.0}),
    "UniPC, flow": ("UniPCMultistepScheduler", FLOW, {}),
    "DPM++ 2M SDE": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, {}),
    "DPM++ 2M SDE, flow": (
        "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"} | FLOW, {}
    ),
    "FlowMatchEuler, shift": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, {}),
    "FlowMatchEuler, stochastic": (
        "FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, {}
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_equal_levels_are_the_stock_scheduler_on_the_mean(case: str) -> None:
    name, config, arguments = CASES[case]
    one = scheduler(name, **config)
    fused = mf.fused_scheduler(one, weights=WEIGHTS)
    assert isinstance(fused, type(one)) and type(fused).__name__ == name
    assert inspect.signature(type(fused).step) == inspect.signature(type(one).step)
    set_timesteps(one)
    set_timesteps(fused)
    outputs = torch.randn(len(one.timesteps), 2, *SHAPE, generator=drawn(1))
    y = None
    for k, t, x in in_lockstep(one, outputs, **arguments):
        assert y is None or (x - y).abs().max() <= 1e-5 * x.abs().max()
        if t is not None:
            y = stock_step(fused, k, outputs[k], t, x if y is None else y, **arguments)


def outputs_at(x: Tensor, t: Tensor) -> Tensor:
    """Two networks: (M, B, *S)."""
    return torch.stack([torch.sin(x) * 0.5, torch.cos(x + t / 500) * 0.5])


def draw(fused: object, x: Tensor, networks=outputs_at, **arguments: object) -> Tensor:
    """A loop that knows nothing of objectives, from `set_timesteps` to the end."""
    set_timesteps(fused)
    for t in fused.timesteps:
        x = fused.step(networks(x, t), t, x, return_dict=False, **arguments)[0]
    return x


def by_hand(one: object, levels: list, x: Tensor, z: Tensor) -> Tensor:
    """Algorithm 1 with the published Gaussian of each objective, in float64."""
    x = x.double()
    steps = {mf.FlowSDE: flow_world.flow_grpo, mf.FlowDDIM: flow_world.flow_ddim}
    extra = {mf.FlowSDE: [float(one.sigmas[1])]}.get(type(levels[0]), [])
    for k, (t, r) in enumerate(flow_world.times(one)):
        outputs = outputs_at(x, 1000 * torch.tensor(t))
        gaussians = [steps[type(level)](t, r, level.level, *extra) for level in levels]
        variances = torch.tensor([tau**2 for _, _, tau in gaussians], dtype=torch.float64)
        if not variances.any():
            variances = torch.tensor([level.level**2 for level in levels], dtype=torch.float64)
            z = z * 0
        means = torch.stack([
            a * x + b * output for (a, b, _), output in zip(gaussians, outputs, strict=True)
        ])  # fmt: skip
        mean, var = fuse_posteriors(means, variances, WEIGHTS.T)
        x = mean + var.sqrt().reshape(-1, 1, 1, 1) * z[k]
    return x


@pytest.mark.parametrize("kind", [mf.FlowSDE, mf.FlowDDIM], ids=lambda kind: kind.__name__)
def test_unequal_levels_are_algorithm_1(kind: type) -> None:
    one = scheduler("FlowMatchEulerDiscreteScheduler", shift=3.0)
    levels = [kind(0.9), kind(0.4)]
    fused = mf.fused_scheduler(one, levels=levels, weights=WEIGHTS, seeds=[5, 6])
    x = torch.randn(SHAPE, generator=drawn(0))
    found = draw(fused, x)
    z = torch.stack([mf.counter_noise([5, 6], SHAPE, step=k) for k in range(T)]).double()
    expected = by_hand(fused, levels, x, z)
    assert (found - expected).abs().max() <= 5e-6 * expected.abs().max()


def test_a_generator_draws_as_the_loop_does() -> None:
    """Unequal etas of DDIM: one z per step, of the loop's generator or the scheduler's own."""
    one = scheduler("DDIMScheduler")
    x = torch.randn(SHAPE, generator=drawn(0))
    settings = dict(levels=[1.0, 0.6], weights=WEIGHTS)
    own = draw(mf.fused_scheduler(one, **settings, generator=drawn(9)), x)
    loop = draw(mf.fused_scheduler(one, **settings), x, generator=drawn(9), eta=0.0)
    assert own.equal(loop)
    expected = mf.denoise(
        [lambda x, t, m=m: outputs_at(x, t)[m] for m in range(2)],
        x,
        scheduler=one,
        num_steps=T,
        weights=WEIGHTS,
        etas=[1.0, 0.6],
        generator=drawn(9),
    )
    assert own.equal(expected)


NOISY = [
    ("DDIMScheduler", {}, [1.0, 1.0]),
    ("DDIMScheduler", {}, [1.0, 0.6]),
    ("EulerAncestralDiscreteScheduler", {}, None),
    ("LCMScheduler", {}, None),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, None),
    ("FlowMatchEulerDiscreteScheduler", {}, [mf.CPS(0.9), mf.CPS(0.9)]),
]


@pytest.mark.parametrize(("name", "config", "levels"), NOISY, ids=str)
def test_an_image_depends_on_its_own_seed_alone(name: str, config: dict, levels) -> None:
    def images(seeds: list[int], x: Tensor) -> Tensor:
        fused = mf.fused_scheduler(
            scheduler(name, **config), count=2, levels=levels, weights=[0.3, 0.7], seeds=seeds
        )
        fused.is_scale_input_called = True  # Euler ancestral warns of loops that do not scale
        first, again = draw(fused, x), draw(fused, x)
        assert first.equal(again)  # a run does not go on where the last one stopped
        return first

    x = torch.randn(SHAPE, generator=drawn(0))
    both = images([5, 6], x)
    assert images([5], x[:1]).equal(both[:1]) and images([6], x[1:]).equal(both[1:])
    assert not images([7, 6], x)[0].equal(both[0])


@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_a_deep_copy_draws_noise_of_its_own_and_the_same_in_each_run(name: str) -> None:
    """LTX-2 steps its sound by a copy of the scheduler."""
    config, levels = ({}, [1.0, 0.6]) if name.startswith("DDIM") else (
        {"algorithm_type": "sde-dpmsolver++"}, None
    )  # fmt: skip
    fused = mf.fused_scheduler(
        scheduler(name, **config), count=2, levels=levels, weights=[0.3, 0.7], seeds=[5, 6]
    )
    x = torch.randn(SHAPE, generator=drawn(0))
    draws = []
    for _ in range(2):
        sound = copy.deepcopy(fused)
        draws.append((draw(fused, x), draw(sound, x)))
    (image, sound), again = draws
    assert not sound.equal(image)
    assert again[0].equal(image) and again[1].equal(sound)


class Request:
    """What nobody should copy: weights as a method of something large."""

    def __deepcopy__(self, memo: dict) -> None:
        raise AssertionError("copied")

    def weights(self, k: int) -> list[float]:
        return [0.3, 0.7]


def test_a_deep_copy_takes_nothing_else_along() -> None:
    fused = mf.fused_scheduler(
        scheduler("DDIMScheduler"), levels=[1.0, 0.6], weights=Request().weights, seeds=[5, 6]
    )
    x = torch.randn(SHAPE, generator=drawn(0))
    assert draw(copy.deepcopy(fused), x).isfinite().all()


def test_one_objective_is_bitwise_stock() -> None:
    for dtype in (torch.float32, torch.float16):
        for name in ("FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler"):
            one = scheduler(name)
            fused = mf.fused_scheduler(one, count=1, state_dtype=None)
            x = torch.randn(SHAPE, generator=drawn(0)).to(dtype)
            stock, found = draw(one, x, lambda x, t: x * 0.5), draw(fused, x, lambda x, t: x * 0.5)
            assert found.dtype == stock.dtype and found.equal(stock)


def test_states_stay_wide_unless_stock_is_wanted() -> None:
    x = torch.randn(SHAPE, generator=drawn(0)).half()
    for levels in (None, [mf.FlowSDE(0.7), mf.FlowSDE(0.4)]):
        for wanted in (torch.float32, None):
            fused = mf.fused_scheduler(
                scheduler("FlowMatchEulerDiscreteScheduler"),
                levels=levels,
                weights=[0.3, 0.7],
                state_dtype=wanted,
            )
            state = draw(fused, x, lambda x, t: outputs_at(x, t).half())
            assert state.dtype == (wanted or torch.float16)


def test_what_a_step_returns_besides_the_state_is_that_of_the_mixed_prediction() -> None:
    one = scheduler("LCMScheduler")
    fused = mf.fused_scheduler(one, weights=WEIGHTS, seeds=[5, 6])
    x = torch.randn(SHAPE, generator=drawn(0))
    one.set_timesteps(T)
    fused.set_timesteps(T)
    for t in fused.timesteps:
        outputs = outputs_at(x, t)
        result = fused.step(outputs, t, x)
        mean = (WEIGHTS.T[:, :, None, None, None] * outputs).sum(0).float()
        stock = one.step(mean, t, x)
        assert type(result) is type(stock)
        torch.testing.assert_close(result.denoised, stock.denoised)
        x = result.prev_sample
    assert x.equal(result.prev_sample)
    torch.testing.assert_close(x, result.denoised)  # the pipeline decodes either


def test_weights_may_change_from_step_to_step_where_nothing_is_remembered() -> None:
    x = torch.randn(SHAPE, generator=drawn(0))
    first = [1.0, 0.0]

    def weights(k: int) -> list[float]:
        return first if k < 2 else [0.0, 1.0]

    def networks(x: Tensor, t: Tensor) -> list[Tensor | None]:
        one, other = outputs_at(x, t)
        return [one, None] if t >= fused.timesteps[1] else [None, other]  # not evaluated

    for levels in (None, [mf.FlowSDE(0.7), mf.FlowSDE(0.4)]):
        one = scheduler("FlowMatchEulerDiscreteScheduler")
        fused = mf.fused_scheduler(one, count=2, levels=levels, weights=weights, seeds=[5, 6])
        skipped = draw(fused, x, networks)
        assert skipped.equal(draw(fused, x))
    with pytest.raises(InvalidSchedule, match=r"UniPC\w+ remembers earlier predictions"):
        mf.fused_scheduler(scheduler("UniPCMultistepScheduler"), count=2, weights=weights)


def test_ltx_lists_the_end_of_its_last_step() -> None:
    fused = mf.fused_scheduler(
        scheduler("LTXEulerAncestralRFScheduler"), levels=[1.0, 0.4], weights=WEIGHTS, seeds=[5, 6]
    )
    fused.set_timesteps(sigmas=[1.0, 0.6, 0.3, 0.0])
    x = torch.randn(SHAPE, generator=drawn(0))
    for t in fused.timesteps:
        before, x = x, fused.step(outputs_at(x, t), t, x).prev_sample
    assert x.equal(before)


def test_the_stock_scheduler_is_left_alone_and_copies_are_fused() -> None:
    one = scheduler("DDIMScheduler")
    fused = mf.fused_scheduler(one, levels=[1.0, 0.6], weights=[0.3, 0.7], seeds=[5])
    fused.set_timesteps(T)
    assert one.num_inference_steps is None and type(one) is diffusers.DDIMScheduler
    table = mf.coefficient_table(fused, 4, etas=[1.0, 0.6], weights=[0.3, 0.7])
    assert len(table) == 4 and len(fused.timesteps) == T
    fused.fusing.weights, fused.fusing.noise.seeds = [1.0, 0.0], [6]
    x = torch.randn(1, *SHAPE[1:], generator=drawn(0))
    fresh = mf.fused_scheduler(one, levels=[1.0, 0.6], weights=[1.0, 0.0], seeds=[6])
    assert draw(fused, x).equal(draw(fresh, x))
    again = mf.fused_scheduler(fused, count=1)
    assert type(again) is type(fused) and again.fusing.count == 1 and fused.fusing.count == 2
    assert fused.from_config(fused.config).timesteps.equal(one.timesteps)


class TestRefusals:
    def test_schedulers_that_are_not_linear(self) -> None:
        with pytest.raises(InvalidSchedule, match=r"CMStochastic\w+ is not known"):
            mf.fused_scheduler(diffusers.CMStochasticIterativeScheduler(), count=2)

    @pytest.mark.parametrize("setting", ["clip_sample", "thresholding"])
    def test_settings_that_are_not_linear(self, setting: str) -> None:
        one = diffusers.DDIMScheduler(**{"clip_sample": False, setting: True})
        with pytest.raises(InvalidSchedule, match=rf"{setting}=True is not linear"):
            mf.fused_scheduler(one, count=2)

    @pytest.mark.parametrize("name", ["DDPMScheduler", "DPMSolverMultistepScheduler"])
    def test_learned_variances(self, name: str) -> None:
        with pytest.raises(InvalidSchedule, match="variance_type='learned_range'"):
            mf.fused_scheduler(scheduler(name, variance_type="learned_range"), count=2)

    def test_unequal_levels_of_a_scheduler_without_a_rule(self) -> None:
        with pytest.raises(InvalidSchedule, match="UniPCMultistepScheduler has no rule"):
            mf.fused_scheduler(scheduler("UniPCMultistepScheduler"), levels=[1.0, 0.6])

    @pytest.mark.parametrize("name", ["DDIMScheduler", "UniPCMultistepScheduler"])
    def test_noise_of_flow_models_elsewhere(self, name: str) -> None:
        for level in (0.7, 0.0):
            with pytest.raises(InvalidSchedule, match=r"FlowSDE is noise|has no rule"):
                mf.fused_scheduler(scheduler(name), levels=[mf.FlowSDE(level)] * 2)

    def test_levels_and_sigmas_before_the_first_step(self) -> None:
        fused = mf.fused_scheduler(scheduler("DDIMScheduler"), levels=[1.5, 1.5])
        with pytest.raises(InvalidSchedule, match=r"eta must lie in \[0, 1\], got 1.5"):
            fused.set_timesteps(T)
        one = scheduler("FlowMatchEulerDiscreteScheduler", invert_sigmas=True)
        fused = mf.fused_scheduler(one, levels=[mf.CPS(0.5), mf.CPS(0.7)])
        with pytest.raises(InvalidSchedule, match=r"decrease within \[0, 1\]"):
            fused.set_timesteps(T)
        fused = mf.fused_scheduler(scheduler("DDIMScheduler"), levels=[0.0, 0.7])
        with pytest.raises(ZeroVariance):
            fused.set_timesteps(T)
        with pytest.raises(InvalidWeights):
            mf.fused_scheduler(scheduler("DDIMScheduler"), weights=[0.5, 0.7])

    def test_an_eta_of_the_loop_that_is_not_the_objectives_(self) -> None:
        fused = mf.fused_scheduler(scheduler("DDIMScheduler"), levels=[1.0, 1.0])
        with pytest.raises(InvalidSchedule, match=r"eta=0.5, .* levels \[1.0, 1.0\]"):
            draw(fused, torch.zeros(SHAPE), eta=0.5)

    def test_arguments_of_the_loop_that_the_rule_does_not_know(self) -> None:
        """LTX gives each token its own time."""
        one, x = scheduler("FlowMatchEulerDiscreteScheduler"), torch.zeros(SHAPE)
        fused = mf.fused_scheduler(one, levels=[mf.CPS(0.5), mf.CPS(0.7)])
        with pytest.raises(InvalidSchedule, match="the loop gives step per_token_timesteps="):
            draw(fused, x, per_token_timesteps=torch.ones(2, 8))
        assert draw(fused, x, per_token_timesteps=None, s_churn=0.0).isfinite().all()

    @pytest.mark.parametrize(
        "outputs", [torch.zeros(3, *SHAPE), torch.zeros(SHAPE), [None, None], [torch.zeros(2)] * 2]
    )
    def test_predictions_that_do_not_fit(self, outputs) -> None:
        fused = mf.fused_scheduler(scheduler("DDIMScheduler"), levels=[1.0, 0.6])
        with pytest.raises(InvalidShape, match="model_output has"):
            draw(fused, torch.zeros(SHAPE), lambda x, t: outputs)

    def test_nobody_says_how_many_objectives_there_are(self) -> None:
        with pytest.raises(InvalidShape, match="count="):
            mf.fused_scheduler(scheduler("DDIMScheduler"))

    def test_two_sources_of_noise(self) -> None:
        with pytest.raises(ValueError, match="at most one"):
            mf.fused_scheduler(scheduler("DDIMScheduler"), count=2, seeds=[1], generator=drawn(0))
