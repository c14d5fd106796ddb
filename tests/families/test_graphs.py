# SPDX-License-Identifier: Apache-2.0
"""Denoisers as graphs, with a recorder that needs no GPU: equal, captured once, and never stale."""

from unittest import mock

import diffusers
import pytest
import torch
from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.proxy_tensor import make_fx

import msdda_fast as mf
from msdda_fast.engine.network_graphs import ForwardBuffers, NetworkGraphs
from msdda_fast.errors import CaptureError
from msdda_fast.pipelines import forward_graphs
from tests.engine.small_world import TracedGraph, TracedGraphs
from tests.families import images, videos
from tests.families.lockstep import STEPS, draw, quiet
from tests.families.test_compiled import other_numbers
from tests.families.test_mechanisms import said  # noqa: F401 - a fixture
from tests.families.test_pipelines import W, assert_close, attached


class TracedForwards(TracedGraphs):
    """Records the operators of a forward on the CPU, and repeats them on the same storage."""

    def capture(self, advance, buffers):
        advance(buffers)
        count = len(buffers.inputs)

        def traced(*tensors):
            advance(ForwardBuffers(tensors[:count], tensors[count:], buffers.counter))

        tensors = [*buffers.inputs, *buffers.outputs]
        with mock.patch.object(proxy_tensor, "extract_val", lambda *values, **options: None):
            module = make_fx(traced)(*tensors)
        self.captures += 1
        self.alive += 1
        return TracedGraph(self, module, tensors)


@pytest.fixture
def graphs(monkeypatch):
    made = TracedForwards()
    monkeypatch.setattr(forward_graphs, "graphs_for", lambda device: made)
    return made


@pytest.fixture
def flux(graphs):
    return attached(images.flux)


def eager(pipe, call, **more):
    """The same without graphs, and without anything that was kept."""
    other = quiet(mf.MSDDAPipeline.from_pipe(pipe))
    other.set_forward(capture="off")
    return draw(other, call, **more)


def test_one_graph_serves_all_weights_prompts_seeds_and_adapters(graphs, flux, said):  # noqa: F811
    pipe, call = flux
    for change in range(3):
        assert_close(draw(pipe, call, weights=W), eager(pipe, call, weights=W))
        call["prompt_embeds"] = call["prompt_embeds"] + 0.1 * change
        weights = {"a": 0.6, "b": 0.4}
        got = draw(pipe, call, weights=weights, seed=change)
        assert_close(got, eager(pipe, call, weights=weights, seed=change))
        other_numbers(pipe.transformer)
    assert (graphs.captures, graphs.alive) == (1, 1)
    assert graphs.replays == 1 + 6 * STEPS - 1  # the recorder's first; the rows' check is eager
    assert not said()


@pytest.mark.full  # other loops
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(images.sd3, id="guidance in one batch"),
        pytest.param(images.flux_true_guidance, id="two calls, both held"),
        pytest.param(videos.wan_two_transformers, id="two denoisers"),
        pytest.param(images.z_image, id="lists of rows"),
    ],
)
def test_other_loops(make, graphs, said):  # noqa: F811
    pipe, call = attached(make)
    for weights in (W, {"a": 0.6, "b": 0.4}):
        assert_close(draw(pipe, call, weights=weights), eager(pipe, call, weights=weights))
    assert graphs.captures and not said()


@pytest.mark.full  # the kinds of arguments are told apart below
def test_shapes_have_graphs_of_their_own(graphs, flux):
    pipe, call = flux
    one = {name: v[:1] if torch.is_tensor(v) else v for name, v in call.items()}
    for _ in range(2):
        for given in (call, one):
            assert_close(draw(pipe, given, weights=W), eager(pipe, given, weights=W))
    assert (graphs.captures, graphs.alive) == (2, 2)


def moved(pipe):
    layer = pipe.transformer.norm_out.linear
    layer.weight = torch.nn.Parameter(2 * layer.weight)


def other_code(pipe):
    pipe.transformer.transformer_blocks[0].norm1_context.norm.eps = 0.5


def other_ranks(pipe):
    for layer in pipe.transformer.single_transformer_blocks[0].modules():
        if "a" in getattr(layer, "lora_A", ()):
            for part, axis in ((layer.lora_A["a"], 0), (layer.lora_B["a"], 1)):
                weight = part.weight.detach()
                part.weight = torch.nn.Parameter(torch.cat([weight, weight], axis))


@pytest.mark.parametrize(
    "change", [moved, pytest.param(other_code, marks=pytest.mark.full), other_ranks]
)
def test_a_stale_graph_is_dropped(change, graphs, flux):
    pipe, call = flux
    before = draw(pipe, call, weights=W)
    change(pipe)
    got = draw(pipe, call, weights=W)
    assert_close(got, eager(pipe, call, weights=W))
    assert not torch.allclose(got, before, rtol=1e-2)
    assert (graphs.captures, graphs.alive) == (2, 1)


class Reading(diffusers.models.normalization.AdaLayerNormContinuous):
    """Reads a value on the host, harmlessly."""

    def forward(self, x, *args):
        assert x.sum().item() < 1e9
        return super().forward(x, *args)


def reads_on_the_host(pipe):
    pipe.transformer.norm_out.__class__ = Reading


def has_a_hook(pipe):
    pipe.transformer.x_embedder.register_forward_hook(lambda *given: None)


NAMES = {reads_on_the_host: "_local_scalar_dense", has_a_hook: "x_embedder has a forward hook"}


@pytest.mark.parametrize("change", NAMES)
def test_what_cannot_be_captured_is_said_once(change, graphs, flux, said):  # noqa: F811
    pipe, call = flux
    change(pipe)
    for _ in range(2):
        got = draw(pipe, call, weights=W)
    (message,) = said()
    assert "transformer (FluxTransformer2DModel) runs without graphs" in message
    assert NAMES[change] in message
    assert_close(got, eager(pipe, call, weights=W))
    assert not graphs.captures
    pipe.set_forward(capture="required")
    with pytest.raises(CaptureError, match=NAMES[change]):
        draw(pipe, call, weights=W)


def test_too_little_memory_for_a_graph(graphs, flux, said):  # noqa: F811
    graphs.free = 1000
    draw(*flux, weights=W)
    assert "GiB for activations" in said()[0] and not graphs.captures


class Wrong(TracedForwards):
    """A recorder that loses the last operators."""

    def capture(self, advance, buffers):
        graph = super().capture(advance, buffers)
        graph.module = lambda *tensors: [tensor.zero_() for tensor in tensors]
        return graph


def test_a_wrong_graph_is_not_used(monkeypatch, said):  # noqa: F811
    made = Wrong()
    monkeypatch.setattr(forward_graphs, "graphs_for", lambda device: made)
    pipe, call = attached(images.flux)
    assert_close(draw(pipe, call, weights=W), eager(pipe, call, weights=W))
    assert "does not compute what was captured" in said()[0] and not made.alive


def test_without_graphs_required_raises_and_auto_is_silent(said):  # noqa: F811
    pipe, call = attached(images.flux)
    draw(pipe, call, weights=W)
    assert not said()
    pipe.set_forward(capture="required")
    with pytest.raises(CaptureError, match="device cpu has no graphs"):
        draw(pipe, call, weights=W)
    draw(pipe, call, weights=[1, 0])  # the stock forward
    with pytest.raises(ValueError, match="capture must be one of"):
        pipe.set_forward(capture="always")


def test_the_least_recently_used_graph_is_freed():
    made = TracedForwards()
    graphs = NetworkGraphs(made, capacity=2)
    sizes = (1, 2, 1, 3, 1)
    for size in sizes:
        x = torch.arange(float(size))
        got = graphs.run(lambda x, scale: {"y": (x * scale, None)}, [x], {"scale": 3})
        assert torch.equal(got["y"][0], 3 * x) and got["y"][1] is None
    assert (made.captures, made.alive, len(graphs)) == (3, 2, 2)
    graphs.clear()
    assert not made.alive


def test_other_values_are_another_graph_and_odd_ones_none():
    made = TracedForwards()
    graphs = NetworkGraphs(made)
    x = torch.ones(2)
    for scale in (2, 2.0, 3, 2):
        assert torch.equal(graphs.run(torch.mul, [x, scale], {}), x * scale)
    assert made.captures == 3
    held = graphs.run(torch.mul, [x, 2], {})
    graphs.run(torch.mul, [5 * x, 2], {})
    assert torch.equal(held, 2 * x)
    with pytest.raises(CaptureError, match="an argument is a set"):
        graphs.run(lambda x, more: x, [x], {"more": {1}})
    graphs.run(torch.mul, [x, 4], {})
    with pytest.raises(CaptureError, match="changes from call to call"):
        graphs.run(torch.mul, [x, 5], {})
    with pytest.raises(CaptureError, match=r"arguments are on \['cpu', 'meta'\]"):
        graphs.run(torch.add, [x, torch.ones(2, device="meta")], {})


@pytest.mark.gpu
def test_on_a_gpu(said):  # noqa: F811
    pipe, call = attached(images.flux)
    pipe.to("cuda")
    pipe.set_forward(capture="required")
    call = {name: v.cuda() if torch.is_tensor(v) else v for name, v in call.items()}
    for weights in (W, {"a": 0.6, "b": 0.4}):
        for _ in range(2):
            got = draw(pipe, call, weights=weights, seed=1)
        assert_close(got, eager(pipe, call, weights=weights, seed=1))
        other_numbers(pipe.transformer)
    assert not said()
