# SPDX-License-Identifier: Apache-2.0
"""A captured step gives the bits of the plain loop, and nothing but a new shape captures again."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from msdda_fast import denoise
from msdda_fast.engine.graph import StepCache
from msdda_fast.errors import InvalidShape
from msdda_fast.kernels import registry
from msdda_fast.kernels.fused_step import fused_ddim_step
from msdda_fast.steps.table import coefficient_table
from tests.engine.small_world import (
    CHANNELS,
    KEY,
    SHAPE,
    Request,
    builder,
    cache,
    drawn,
    predict,
    small_weights,
)
from tests.gaussian_world import sd15_scheduler

BACKENDS = [name for name in registry.NAMES if registry.available(name)]
PROMPT = 0.1 * drawn(2, 2, 2, CHANNELS, seed=3)
GUIDED = replace(KEY, branches=2)


@pytest.mark.sweep(backend=2)  # Triton has the bits of eager
@pytest.mark.parametrize("backend", BACKENDS)
def test_replays_equal_the_loop_of_denoisers(backend: str) -> None:
    weights, request = small_weights(), Request()
    steps, graphs = cache(weights, backend=backend)
    step = steps.prepare(KEY)
    step.load(**request.arguments)
    x_0 = step.run()
    assert step.is_captured and graphs.replays == request.num_steps
    expected = denoise(
        [lambda x, t, weight=weight: predict(weight, x, t) for weight in weights],
        request.start,
        scheduler=sd15_scheduler(),
        num_steps=request.num_steps,
        weights=request.weights,
        etas=request.etas,
        seeds=request.seeds,
        backend=backend,
    )
    assert x_0.equal(expected)


CHANGES = {
    "weights": dict(weights=((0.9, 0.1), (0.5, 0.5))),
    "common-weights": dict(weights=(0.2, 0.8)),
    "weights-over-steps": dict(weights=[[[k / 8, 1 - k / 8]] * 2 for k in range(1, 6)]),
    "seeds": dict(seeds=(1, 2**64 - 1)),
    "guidance": dict(guidance=2.0),
    "etas": dict(etas=(1.0, 0.4)),
    "etas-zero": dict(etas=(0.0, 0.0)),
    "fewer-steps": dict(num_steps=3),
    "more-steps": dict(num_steps=64),
    "prompt": dict(prompt=2 * PROMPT),
    "latents": dict(x_T=drawn(*SHAPE, seed=9)),
}


def test_only_shapes_capture_again() -> None:
    weights = small_weights()
    steps, graphs = cache(weights)
    first = Request(guidance=7.5, prompt=PROMPT)
    results = {}
    for name, change in {"first": {}, **CHANGES, "again": {}}.items():
        request = replace(first, **change)
        step = steps.prepare(GUIDED)
        step.load(**request.arguments)
        results[name] = step.run()
        assert results[name].equal(request.expected(weights)), name
    assert graphs.captures == 1
    assert results["again"].equal(results["first"])
    for name in CHANGES:
        assert not results[name].equal(results["first"]), name


def pixels(seed: int, *, hard: bool = False) -> Tensor:
    """Weights of every pixel, (B, M, 1, h, w) float64."""
    first = drawn(2, 1, 1, *SHAPE[2:], seed=seed).double().sigmoid()
    first = first.round() if hard else first
    return torch.cat([first, 1 - first], 1)


REGIONAL = replace(KEY, pixelwise=2)


@pytest.mark.sweep(backend=2)
@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_of_pixels_are_one_more_buffer(backend: str) -> None:
    """Other masks, etas, numbers of steps and seeds replay the same graph, with its bits."""
    weights = small_weights()
    steps, graphs = cache(weights, backend=backend)
    noise = drawn(5, *SHAPE, seed=4)
    results = []
    for change in (
        {},
        dict(weights=pixels(2)),
        dict(weights=pixels(3, hard=True), etas=(1.0, 0.3)),
        dict(num_steps=9, seeds=(5, 6)),
        dict(etas=(0.0, 0.0)),
        {},
    ):
        request = Request(**{"weights": pixels(1), **change})
        step = steps.prepare(REGIONAL)
        step.load(**request.arguments)
        results.append(step.run())
        assert results[-1].equal(request.expected(weights, backend))
    assert graphs.captures == 1 and results[0].equal(results[-1])
    given = Request(weights=pixels(1), seeds=None, noise=noise)
    step = steps.prepare(replace(REGIONAL, noise_table=True))
    step.load(**given.arguments)
    assert step.run().equal(given.expected(weights, backend))


def test_tables_and_buffers_agree_on_weights_of_pixels() -> None:
    steps, _ = cache(small_weights())
    for key, weights in ((KEY, pixels(1)), (REGIONAL, (0.3, 0.7))):
        with pytest.raises(InvalidShape, match="a table with weights of every pixel for"):
            steps.prepare(key).load(**Request(weights=weights).arguments)
    by_channel = pixels(1).expand(2, 2, *SHAPE[1:])
    with pytest.raises(InvalidShape, match=r"expected \(B, M, 1, \*S\) = \(2, 2, 1, 6, 6\)"):
        steps.prepare(REGIONAL).load(**Request(weights=by_channel).arguments)


def test_adapters_swapped_in_place_keep_the_graph() -> None:
    weights, request = small_weights(), Request()
    steps, graphs = cache(weights)
    for scale in (1.0, 0.5):
        weights.copy_(scale * small_weights())
        step = steps.prepare(KEY)
        step.load(**request.arguments)
        assert step.run().equal(request.expected(weights))
    assert graphs.captures == 1


def test_noise_and_step_of_an_image_are_its_own_bit_for_bit() -> None:
    """With a silent network: matrix products round differently at another batch size."""
    weights = torch.zeros(2, CHANNELS, CHANNELS)
    steps, _ = cache(weights)
    x_T = drawn(*SHAPE)
    pair, alone = steps.prepare(KEY), steps.prepare(replace(KEY, shape=(1, *SHAPE[1:])))
    pair.load(**Request(x_T=x_T).arguments)
    together = pair.run()
    assert not together[0].equal(together[1])
    for b in range(2):
        one = Request(x_T=x_T[b : b + 1], seeds=((1, 2)[b],), weights=(Request().weights[b],))
        alone.load(**one.arguments)
        assert alone.run()[0].equal(together[b])


def test_a_noise_table_is_the_noise_of_denoise() -> None:
    """Where noise comes from generators, it is drawn beforehand."""
    weights, noise = small_weights(), drawn(5, *SHAPE, seed=4)
    request = Request(seeds=None, noise=noise)
    steps, graphs = cache(weights)
    step = steps.prepare(replace(KEY, noise_table=True))
    step.load(**request.arguments)
    assert step.run().equal(request.expected(weights))
    other = replace(request, noise=2 * noise)
    step.load(**other.arguments)
    assert step.run().equal(other.expected(weights))
    assert graphs.captures == 1


def test_generators_are_drawn_before_the_run() -> None:
    weights, settings = small_weights(), dict(num_steps=5, etas=(0.8, 1.0))
    generator = torch.Generator().manual_seed(6)
    noise = torch.stack([torch.randn(SHAPE, generator=generator) for _ in range(5)])
    step = cache(weights)[0].prepare(replace(KEY, noise_table=True))
    step.load(**Request(seeds=None, noise=noise, weights=None, **settings).arguments)
    expected = denoise(
        [lambda x, t, weight=weight: predict(weight, x, t) for weight in weights],
        drawn(*SHAPE),
        scheduler=sd15_scheduler(),
        generator=torch.Generator().manual_seed(6),
        **settings,
    )
    assert step.run().equal(expected)


def test_an_inactive_objective_is_left_out() -> None:
    weights = small_weights()
    weights[0] = torch.nan
    steps, _ = cache(weights)
    step = steps.prepare(replace(KEY, active=(False, True)))
    request = Request(weights=(0.0, 1.0))
    step.load(**request.arguments)
    x_0 = step.run()
    assert x_0.isfinite().all() and x_0.equal(request.expected(weights))


def test_clipping_is_part_of_the_key() -> None:
    weights = small_weights()
    scheduler = sd15_scheduler(clip_sample=True, clip_sample_range=1.0)
    table = coefficient_table(scheduler, 5, etas=(0.8, 1.0), weights=(0.5, 0.5))
    steps, _ = cache(weights)
    step = steps.prepare(replace(KEY, clip_range=1.0))
    step.load(table, drawn(*SHAPE), seeds=(1, 2))
    expected = denoise(
        [lambda x, t, weight=weight: predict(weight, x, t) for weight in weights],
        drawn(*SHAPE),
        scheduler=scheduler,
        num_steps=5,
        etas=(0.8, 1.0),
        seeds=(1, 2),
    )
    assert step.run().equal(expected)


@pytest.mark.parametrize("capture", ["auto", "off"])
def test_between_steps_the_state_may_be_read_and_replaced(capture: str) -> None:
    weights, request = small_weights(), Request()
    table, x, kept = request.table, request.start, []
    for k, t in enumerate(table.timesteps):
        outputs = [predict(weight, x, t)[None] for weight in weights]
        x = fused_ddim_step(x, outputs, table[k], seeds=request.seeds, step=k)
        x = 0.5 * x if k == 2 else x
        kept.append(x)
    steps, _ = cache(weights, capture=capture)
    step = steps.prepare(KEY)
    step.load(**request.arguments)
    for k in range(len(table)):
        step.step(k)
        if k == 2:
            step.buffers.replace_x(0.5 * step.buffers.x)
        assert step.buffers.x.equal(kept[k])


def test_a_run_may_stop_early_and_the_prompt_may_change_on_the_way() -> None:
    weights, first = small_weights(), Request(guidance=7.5, prompt=PROMPT)
    steps, _ = cache(weights)
    step = steps.prepare(GUIDED)
    step.load(**first.arguments)
    step.step(0)
    step.step(1)
    assert int(step.buffers.counter) == 2
    step.load(**first.arguments)
    for k in range(first.num_steps):
        step.step(k)
        step.buffers.replace_conditioning({"prompt": 2 * PROMPT})
    assert not step.buffers.x.equal(first.expected(weights))
    step.load(**first.arguments)
    assert step.run().equal(first.expected(weights))


def test_the_least_recently_used_step_goes_first() -> None:
    weights = small_weights()
    steps, graphs = cache(weights, capacity=2)
    a, b, c = (replace(KEY, mode=mode) for mode in ("one", "another", "third"))
    step_a = steps.prepare(a)
    step_b = steps.prepare(b)
    assert steps.prepare(a) is step_a
    steps.prepare(c)
    assert [key in steps for key in (a, b, c)] == [True, False, True]
    assert (len(steps), graphs.alive, graphs.captures) == (2, 2, 3)
    # whoever still holds an evicted step goes on without a graph
    request = Request()
    step_b.load(**request.arguments)
    assert not step_b.is_captured and step_b.run().equal(request.expected(weights))
    steps.clear()
    assert (len(steps), graphs.alive) == (0, 0)


def test_without_graphs_the_same_step_runs_eagerly(caplog: pytest.LogCaptureFixture) -> None:
    weights, request = small_weights(), Request()
    step = StepCache(builder(weights), device="cpu").prepare(KEY)
    step.load(**request.arguments)
    assert not step.is_captured and step.run().equal(request.expected(weights))
    assert not caplog.records


def test_capture_leaves_a_loaded_request_alone() -> None:
    """Building, warming up and recording run steps; the buffers do not show it."""
    steps, _ = cache(small_weights())
    buffers = steps.prepare(KEY).buffers
    for tensor in (buffers.x, buffers.next_input, buffers.counter):
        assert not tensor.any()


def test_rows_are_copied_in_the_networks_dtype_and_layout() -> None:
    seen: list[Tensor] = []

    def build(key, buffers):
        network = builder(small_weights())(key, buffers)

        class Half:
            @property
            def kinds(self):
                return {"exact": self}

            def __call__(self, next_input: Tensor, k: Tensor):
                seen.append(next_input)
                return network(next_input.float(), k)

            def storages(self):
                return network.storages()

        return Half()

    key = replace(KEY, dtype=torch.bfloat16, input_rows=4, channels_last=True)
    step = StepCache(build, device="cpu").prepare(key)
    step.load(**Request().arguments)
    for k in range(Request().num_steps):
        step.step(k)
        rows = step.buffers.next_input
        assert rows.shape == (4, *SHAPE) and rows.dtype == torch.bfloat16
        assert rows.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
        assert all(row.equal(step.buffers.x.bfloat16()) for row in rows)
    assert all(given is step.buffers.next_input for given in seen)
