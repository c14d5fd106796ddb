# SPDX-License-Identifier: Apache-2.0
"""A compiled step: one graph, no compilation after the first, artefacts found again on disk."""

import logging
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import _dynamo

from msdda_fast.engine import compiled
from msdda_fast.engine.graph import StepCache
from tests.engine.small_world import (
    CHANNELS,
    KEY,
    Request,
    SmallNetwork,
    TracedGraph,
    TracedGraphs,
    cache,
    drawn,
    small_weights,
)

PROMPT = 0.1 * drawn(2, 2, 2, CHANNELS, seed=3)


@pytest.fixture
def traced_only(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """torch.compile without code generation, which takes seconds; returns what it compiled."""
    graphs: list[object] = []

    def keep(module: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(module)
        return module.forward

    compile = torch.compile

    def traced(function, *, fullgraph, dynamic, options):
        return compile(function, fullgraph=fullgraph, dynamic=dynamic, backend=keep)

    monkeypatch.setattr(torch, "compile", traced)
    _dynamo.reset()
    return graphs


class Repeating(TracedGraphs):
    """Records what it is given as it is: make_fx does not look into compiled functions."""

    def __init__(self, compilations: list[object]) -> None:
        super().__init__()
        self.compilations = compilations

    def capture(self, advance, buffers) -> TracedGraph:
        assert len(self.compilations) == 1, "not compiled before capture"
        self.captures += 1
        return TracedGraph(self, lambda *_: advance(buffers), [])


@pytest.mark.parametrize("capture", ["off", "required"])
def test_requests_of_one_shape_share_one_compilation(traced_only, capture: str) -> None:
    weights = small_weights()
    steps, graphs = cache(weights, Repeating(traced_only), compile=True, capture=capture)
    first = Request(guidance=7.5, prompt=PROMPT)
    others = [
        dict(weights=(0.2, 0.8)),
        dict(seeds=(3, 4)),
        dict(guidance=2.0),
        dict(etas=(1.0, 0.4)),
        dict(num_steps=3),
        dict(prompt=2 * PROMPT),
    ]
    for change in ({}, *others):
        request = replace(first, **change)
        step = steps.prepare(replace(KEY, branches=2))
        step.load(**request.arguments)
        assert step.run().equal(request.expected(weights)), change
    assert len(traced_only) == 1
    assert graphs.captures == (0 if capture == "off" else 1)


@pytest.mark.full  # compiles a dozen times
def test_many_shapes_are_no_recompilations_too_many(traced_only) -> None:
    weights = small_weights()
    steps, _ = cache(weights, compile=True, capture="off", capacity=12)
    for size in range(1, 13):
        steps.prepare(replace(KEY, shape=(2, CHANNELS, size, size)))
    assert len(traced_only) == 12 > _dynamo.config.recompile_limit


def test_what_does_not_compile_runs_eagerly(traced_only, caplog: pytest.LogCaptureFixture) -> None:
    class Breaking(SmallNetwork):
        def __call__(self, next_input, k):
            _dynamo.graph_break()
            return super().__call__(next_input, k)

    weights, request = small_weights(), Request()
    steps = StepCache(
        lambda key, buffers: Breaking(key, buffers, weights), device="cpu", compile=True
    )
    with caplog.at_level(logging.WARNING, logger="msdda_fast"):
        step = steps.prepare(KEY)
    assert "cannot be compiled or captured: Unsupported" in caplog.text
    step.load(**request.arguments)
    assert step.run().equal(request.expected(weights))


SCRIPT = """
import torch
from torch._dynamo.utils import counters
from tests.engine.small_world import KEY, Request, cache, small_weights
steps, _ = cache(small_weights(), compile=True, capture="off")
step, request = steps.prepare(KEY), Request()
step.load(**request.arguments)
torch.testing.assert_close(step.run(), request.expected(small_weights()), rtol=1e-5, atol=1e-4)
found = counters["inductor"]
print(found["fxgraph_cache_hit"], found["fxgraph_cache_miss"], found["fxgraph_cache_bypass"])
"""


@pytest.mark.slow
def test_a_restart_finds_the_compiled_step_on_disk(tmp_path: Path) -> None:
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}

    def start() -> str:
        result = subprocess.run(
            [sys.executable, "-c", SCRIPT],
            env=environment,
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    assert start() == "0 1 0"
    assert start() == "1 0 0"


def test_the_disk_cache_is_asked_for_and_no_graphs_of_inductor(monkeypatch) -> None:
    calls: list[dict[str, object]] = []
    monkeypatch.setattr(torch, "compile", lambda f, **settings: calls.append(settings) or f)
    for device_type in ("cpu", "cuda"):
        compiled.compiled(lambda buffers: None, device_type)
    cpu, cuda = (call["options"] for call in calls)
    assert all(call["fullgraph"] for call in calls)
    assert cpu == {"fx_graph_cache": True}
    assert cuda == {"max_autotune": True, "coordinate_descent_tuning": True, "fx_graph_cache": True}


def test_advice_on_tensorfloat32_is_no_error() -> None:
    """Inductor gives it on GPUs only, where it would end the first test that compiles."""
    advice = "TensorFloat32 tensor cores for float32 matrix multiplication available"
    source = Path(torch.__file__).parent / "_inductor" / "compile_fx.py"  # importing it warns
    assert advice in source.read_text()
    warnings.warn(f"{advice} but not enabled.", UserWarning, stacklevel=1)
