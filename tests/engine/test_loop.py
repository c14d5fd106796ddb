# SPDX-License-Identifier: Apache-2.0
"""`denoise`: what denoisers receive, when they are called, randomness, dtypes and refusals."""

from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from msdda_fast import (
    BackendUnavailable,
    InvalidSchedule,
    InvalidShape,
    InvalidWeights,
    NotFinite,
    denoise,
)
from tests.gaussian_world import sd15_scheduler

SHAPE = (2, 4, 3, 3)


def shrink(x_t: Tensor, t: Tensor) -> Tensor:
    return 0.9 * x_t


def bend(x_t: Tensor, t: Tensor) -> Tensor:
    return torch.sin(x_t)


def run(denoisers=(shrink, bend), x_T: Tensor | None = None, **changes: object) -> Tensor:
    settings = dict(scheduler=sd15_scheduler(), num_steps=4, etas=[0.8, 1.0]) | changes
    start = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) if x_T is None else x_T
    return denoise(denoisers, start, **settings)


class Recorder:
    """A denoiser that remembers its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor]] = []

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        self.calls.append((x_t, t))
        return 0.9 * x_t


@pytest.mark.parametrize(
    ("given", "state"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
    ],
    ids=str,
)
def test_state_dtype_and_what_denoisers_receive(given: torch.dtype, state: torch.dtype) -> None:
    recorder, scheduler = Recorder(), sd15_scheduler()
    x_T = torch.randn(SHAPE).to(given)
    x_0 = run([recorder], x_T, etas=[1.0], seeds=[1, 2])
    assert x_0.dtype == state and x_0.shape == SHAPE
    scheduler.set_timesteps(4)
    assert [int(t) for _, t in recorder.calls] == scheduler.timesteps.tolist()
    for x_t, t in recorder.calls:
        assert x_t.dtype == state and x_t.shape == SHAPE
        assert t.dtype == torch.int64 and t.ndim == 0 and t.device == x_t.device
    assert recorder.calls[0][0].equal(x_T.to(state))


def test_a_denoiser_may_keep_what_it_saw() -> None:
    recorder, x_T = Recorder(), torch.randn(SHAPE)
    kept = x_T.clone()
    run([recorder], x_T, etas=[1.0], seeds=[1, 2])
    assert x_T.equal(kept)
    seen = [x_t for x_t, _ in recorder.calls]
    assert all(not a.equal(b) for a, b in pairwise(seen))


def test_denoisers_are_called_only_where_some_sample_wants_them() -> None:
    first, second = Recorder(), Recorder()
    run([first, second], weights=lambda k: [[1.0, 0.0], [0.5, 0.5]] if k == 2 else [1.0, 0.0])
    assert (len(first.calls), len(second.calls)) == (4, 1)


def test_a_dominated_denoiser_is_not_called() -> None:
    first, second = Recorder(), Recorder()
    run([first, second], etas=[0.0, 1.0], zero_variance="dominate")
    assert (len(first.calls), len(second.calls)) == (4, 0)


def test_same_seed_same_bits_and_seeds_matter() -> None:
    assert run(seeds=[1, 2]).equal(run(seeds=torch.tensor([1, 2])))
    changed = run(seeds=[1, 3])
    assert changed[0].equal(run(seeds=[1, 2])[0]) and not changed[1].equal(run(seeds=[1, 2])[1])


def test_weights_none_is_uniform_and_rows_are_per_sample() -> None:
    uniform = run(seeds=[1, 2])
    assert uniform.equal(run(seeds=[1, 2], weights=[0.5, 0.5]))
    mixed = run(seeds=[1, 2], weights=[[0.5, 0.5], [0.2, 0.8]])
    assert mixed[0].equal(uniform[0]) and not mixed[1].equal(uniform[1])


def test_generator_gives_the_stock_diffusers_loop() -> None:
    """One model: the loop of DDIMScheduler.step with the same generator, draw by draw."""
    scheduler = DDIMScheduler.from_config(sd15_scheduler().config)
    x = x_T = torch.randn(SHAPE)
    generator = torch.Generator().manual_seed(5)
    scheduler.set_timesteps(4)
    for t in scheduler.timesteps:
        x = scheduler.step(bend(x, t), t, x, eta=0.7, generator=generator).prev_sample
    other = torch.Generator().manual_seed(5)
    fused = run([bend], x_T, scheduler=scheduler, etas=[0.7], generator=other)
    torch.testing.assert_close(fused, x, rtol=1e-5, atol=1e-5)  # float32 against float32
    assert generator.get_state().equal(other.get_state())


def test_at_eta_zero_generators_are_left_alone() -> None:
    generator = torch.Generator().manual_seed(5)
    state = generator.get_state()
    fused = run(etas=[0.0, 0.0], generator=generator)
    assert generator.get_state().equal(state)
    assert fused.equal(run(etas=[0.0, 0.0], seeds=[1, 2]))


def test_half_precision_denoisers_run_as_they_are() -> None:
    def half(x_t: Tensor, t: Tensor) -> Tensor:
        return bend(x_t, t).half()

    only_half = run([half, half], seeds=[1, 2])
    assert only_half.dtype == torch.float32
    exact = run([bend, bend], seeds=[1, 2])
    assert 0 < (only_half - exact).abs().max() < 0.01
    assert (run([half, bend], seeds=[1, 2]) - exact).abs().max() < 0.01
    wide = run([lambda x, t: bend(x, t).double()] * 2, seeds=[1, 2])
    assert wide.equal(exact)


def test_networks_with_parameters_leave_no_graph() -> None:
    network = torch.nn.Linear(3, 3)
    x_0 = run([lambda x, t: network(x)], etas=[1.0], seeds=[1, 2])
    assert not x_0.requires_grad


def test_eager_differentiates() -> None:
    x_T = torch.randn(SHAPE, requires_grad=True)
    run(x_T=x_T, seeds=[1, 2], backend="eager").sum().backward()
    assert x_T.grad is not None and x_T.grad.abs().sum() > 0


@pytest.mark.parametrize("fusion", ["posterior", "eps"])
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_an_empty_batch_is_drawn_without_a_denoiser(backend, fusion) -> None:
    def never(x: Tensor, t: Tensor) -> Tensor:
        raise AssertionError

    etas = dict(etas=[1.0, 0.8], scheduler=sd15_scheduler(), num_steps=3, backend=backend)
    for given, state in ((torch.float16, torch.float32), (torch.float64, torch.float64)):
        x_T = torch.zeros(0, 4, 8, 8, dtype=given)
        x_0 = denoise([never, never], x_T, fusion=fusion, seeds=[], **etas)
        assert (x_0.shape, x_0.dtype) == (x_T.shape, state)
    with pytest.raises(InvalidShape, match="seeds"):
        denoise([never, never], x_T, seeds=[1], **etas)


class TestRefusals:
    @pytest.fixture
    def forbidden(self):
        def denoiser(x_t: Tensor, t: Tensor) -> Tensor:
            raise AssertionError("evaluated before the input was refused")

        return [denoiser, denoiser]

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            (dict(x_T=torch.tensor(1.0)), InvalidShape, r"floating-point x_T \(B, \*S\)"),
            (dict(x_T=torch.ones(SHAPE, dtype=torch.int64)), InvalidShape, "int64"),
            (dict(etas=[0.8]), InvalidShape, r"etas have shape \(1,\), expected \(M,\) = \(2,\)"),
            (dict(etas=[0.8, 1.2]), InvalidSchedule, "eta must lie in"),
            (dict(weights=[0.2, 0.3, 0.5]), InvalidShape, "weights have shape"),
            (dict(weights=[[0.5, 0.5]] * 3), InvalidShape, "weights have shape"),
            (dict(weights=[0.2, 0.9]), InvalidWeights, "sum to 1.1"),
            (dict(weights=[-0.2, 1.2]), InvalidWeights, "extrapolate"),
            (dict(num_steps=1001), InvalidSchedule, "1 to 1000"),
            (dict(noise=torch.zeros(3, *SHAPE)), InvalidShape, "noise has shape"),
            (dict(seeds=[1]), InvalidShape, "seeds have shape"),
            (dict(generator=[torch.Generator()]), InvalidShape, "1 generators"),
            (dict(seeds=[1, 2], generator=torch.Generator()), ValueError, "at most one"),
            (dict(backend="abacus"), BackendUnavailable, "abacus"),
            (dict(x_T=torch.ones(SHAPE, requires_grad=True)), BackendUnavailable, "eager"),
        ],
        ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
    )
    def test_before_any_model_runs(self, forbidden, changes, error, message) -> None:
        with pytest.raises(error, match=message):
            run(forbidden, **changes)

    def test_no_denoisers(self) -> None:
        with pytest.raises(InvalidShape, match="got 0 denoisers"):
            run([], etas=[])

    def test_a_prediction_of_the_wrong_shape(self) -> None:
        with pytest.raises(InvalidShape, match=r"denoisers\[1\] returned shape \(4, 3, 3\)"):
            run([shrink, lambda x, t: x[0]])


class TestNotFinite:
    """A run that ends in NaN is an error, whoever asked for it; NaN that a zero masks is none."""

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_samples_are_counted_and_the_first_is_named(self, value: float, dtype) -> None:
        x_T = torch.zeros(4, 4, 3, 3, dtype=dtype)
        x_T[1, 0, 0, 0] = x_T[3, 2, 2, 2] = value
        with pytest.raises(NotFinite, match=r"2 of 4 samples \(first: number 1\)"):
            run(x_T=x_T)

    def test_a_masked_one_is_none(self) -> None:
        def broken(x_t: Tensor, t: Tensor) -> Tensor:
            return torch.full_like(x_t, torch.nan)

        weights = [[1.0, 0.0], [1.0, 0.0]]
        assert run([shrink, broken], weights=weights).isfinite().all()
        with pytest.raises(NotFinite, match=r"1 of 2 .*number 1"):
            run([shrink, broken], weights=[[1.0, 0.0], [0.5, 0.5]])
