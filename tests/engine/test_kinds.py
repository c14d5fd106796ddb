# SPDX-License-Identifier: Apache-2.0
"""Steps of several kinds share buffers and storage; each is captured once, and requests choose."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from msdda_fast.engine.buffers import StepBuffers
from msdda_fast.engine.dry_run import dry_run
from msdda_fast.engine.graph import StepCache
from msdda_fast.engine.step import Step
from msdda_fast.errors import CaptureError
from msdda_fast.kernels.fused_step import fused_ddim_step
from tests.engine.small_world import KEY, SHAPE, Request, TracedGraphs, predict, small_weights

PLANS = [
    ["all", "all", "first", "first", "all"],
    ["all", "first", "first", "all", "first"],
    ["all", "all", "all"],
]


class Remembering:
    """Evaluates both objectives, or the first alone with what the second last said."""

    def __init__(self, timesteps: Tensor, weights: Tensor) -> None:
        self.weights, self.timesteps = weights, timesteps
        self.kept = torch.zeros(1, *SHAPE)
        self.kinds = {"all": self.all, "first": self.first}

    def all(self, next_input: Tensor, k: Tensor) -> list[Tensor]:
        self.kept.copy_(self._one(1, next_input, k))
        return self.first(next_input, k)

    def first(self, next_input: Tensor, k: Tensor) -> list[Tensor]:
        return [self._one(0, next_input, k), self.kept]

    def _one(self, m: int, next_input: Tensor, k: Tensor) -> Tensor:
        t = self.timesteps.index_select(0, k.view(1))[0]
        return predict(self.weights[m], next_input[0], t)[None]

    def storages(self) -> Mapping[str, Tensor]:
        return {"weights": self.weights, "kept": self.kept}


def remembering(**settings: object) -> tuple[StepCache, list[Remembering]]:
    made: list[Remembering] = []

    def build(key, buffers):
        made.append(Remembering(buffers.timesteps, small_weights()))
        return made[-1]

    return StepCache(build, device="cpu", **settings), made


def expected(request: Request, plan: list[str]) -> Tensor:
    x, table, weights, kept = request.start, request.table, small_weights(), None
    for k, (t, kind) in enumerate(zip(table.timesteps, plan, strict=True)):
        if kind == "all":
            kept = predict(weights[1], x, t)[None]
        outputs = [predict(weights[0], x, t)[None], kept]
        x = fused_ddim_step(x, outputs, table[k], seeds=request.seeds, step=k)
    return x


@pytest.mark.parametrize("captured", [True, False], ids=["captured", "eager"])
def test_every_kind_is_captured_once_and_each_plan_is_followed(captured: bool) -> None:
    graphs = TracedGraphs()
    steps, _ = remembering(**({"graphs": graphs} if captured else {}))
    for plan in PLANS:
        request = Request(num_steps=len(plan), seeds=(len(plan), 2))
        step = steps.prepare(KEY)
        step.load(**request.arguments, kinds=plan)
        assert step.run().equal(expected(request, plan))
        assert step.is_captured == captured
    assert graphs.captures == graphs.alive == 2 * captured
    assert graphs.replays == 13 * captured
    steps.clear()
    assert graphs.alive == 0
    step.load(**request.arguments, kinds=plan)  # a step that somebody kept runs on
    assert step.run().equal(expected(request, plan))


def test_no_kind_reads_a_value() -> None:
    buffers = StepBuffers.allocate(KEY, "cpu")
    for predicts in Remembering(buffers.timesteps, small_weights()).kinds.values():
        dry_run(Step(predicts, KEY, device="cpu").advance, buffers)


@pytest.mark.parametrize("kinds", [None, ["all"], ["all", "all", "fast"]], ids=str)
def test_a_plan_that_does_not_fit_is_refused(kinds: list[str] | None) -> None:
    step = remembering()[0].prepare(KEY)
    with pytest.raises(ValueError, match=r"\['all', 'first'\] for each of the 3 steps"):
        step.load(**Request(num_steps=3).arguments, kinds=kinds)


def test_storage_that_moved_after_capture_is_named() -> None:
    steps, made = remembering(graphs=TracedGraphs())
    step = steps.prepare(KEY)
    made[0].kept = made[0].kept.clone()
    step.load(**Request(num_steps=3).arguments, kinds=PLANS[2])
    with pytest.raises(CaptureError, match="kept"):
        step.run()


def test_a_kind_that_cannot_be_captured_runs_eagerly_among_those_that_can(caplog) -> None:
    class Fails(TracedGraphs):
        def capture(self, advance, buffers):
            if self.captures == 1:
                raise RuntimeError("no more graphs")
            return super().capture(advance, buffers)

    graphs = Fails()
    steps, _ = remembering(graphs=graphs)
    step = steps.prepare(KEY)
    assert not step.is_captured and "no more graphs" in caplog.text
    request = Request()
    step.load(**request.arguments, kinds=PLANS[0])
    assert step.run().equal(expected(request, PLANS[0]))
    assert graphs.replays == 3
