# SPDX-License-Identifier: Apache-2.0
"""`prepare` measures on a CPU and keeps the faster way; a first call measures nothing."""

import logging

import pytest
import torch

import msdda_fast as mf
from msdda_fast.errors import BackendUnavailable, UnsupportedNetwork
from msdda_fast.pipelines.stable_diffusion import captured, fastest
from tests.tiny_model import quiet

CALL = dict(num_inference_steps=3, seed=0, output_type="latent", weights={"warm": 0.2, "cool": 0.8})


@pytest.fixture
def pipe(tiny) -> mf.MSDDAPipeline:
    return quiet(mf.MSDDAPipeline.from_pipe(tiny.shared()))


class Exports:
    """Stands for OpenVINO: what it computes and how long it takes."""

    def __init__(self, monkeypatch, seconds):
        self.made, self.calls = [], 0
        monkeypatch.setattr(fastest, "check_exportable", lambda unet: None)
        monkeypatch.setattr(fastest, "ExportedForward", self.export)
        monkeypatch.setattr(captured, "ExportedForward", self.export)
        monkeypatch.setattr(fastest, "median_times", lambda forwards, x: [1.0, seconds])

    def export(self, unet, shape):
        self.made.append(unet.objectives)

        def run(x, k):
            self.calls += 1
            return unet(x, k)

        return run


def test_prepare_keeps_openvino_where_it_is_faster(pipe, monkeypatch):
    exports = Exports(monkeypatch, seconds=0.5)
    plain = pipe("a dog", **CALL).images
    assert exports.made == []  # the first call measures nothing
    pipe.prepare(num_inference_steps=3)
    made = len(exports.made)
    assert (0, 1) in exports.made and made == len(set(exports.made))
    assert torch.equal(pipe("a dog", **CALL).images, plain)
    assert exports.calls == 3
    pipe.prepare(num_inference_steps=3)
    assert len(exports.made) == made  # nothing is exported twice


def test_prepare_keeps_the_eager_forward_where_that_is_faster(pipe, monkeypatch):
    exports = Exports(monkeypatch, seconds=2.0)
    pipe.prepare(num_inference_steps=3)
    made = len(exports.made)
    assert made > 0
    pipe("a dog", **CALL)
    assert exports.calls == 0
    pipe.prepare(num_inference_steps=3)
    assert len(exports.made) == made  # nor is anything measured twice


def test_nothing_is_measured_without_auto(pipe, monkeypatch):
    exports = Exports(monkeypatch, seconds=0.5)
    pipe.set_forward(compile=False)
    pipe.prepare(num_inference_steps=3)
    assert exports.made == []


def test_by_name_it_runs_from_the_first_call_on(pipe, monkeypatch):
    exports = Exports(monkeypatch, seconds=2.0)
    pipe.set_forward(compile="openvino")
    pipe("a dog", **CALL)
    assert exports.calls == 3


def test_by_name_it_must_be_there(pipe, monkeypatch):
    monkeypatch.setattr("msdda_fast.batched.exported.find_spec", lambda name: None)
    pipe.set_forward(compile="openvino")
    with pytest.raises(BackendUnavailable, match="openvino is not installed"):
        pipe("a dog", **CALL)


def test_a_network_that_cannot_be_exported_runs_eagerly_and_says_so(pipe, monkeypatch, caplog):
    def refuse(unet, shape):
        raise UnsupportedNetwork("OpenVINO cannot run this network")

    Exports(monkeypatch, seconds=0.5)
    monkeypatch.setattr(fastest, "ExportedForward", refuse)
    with caplog.at_level(logging.WARNING):
        pipe.prepare(num_inference_steps=3)
    assert "runs eagerly instead" in caplog.text


def test_large_networks_are_not_copied_unasked(pipe, monkeypatch):
    exports = Exports(monkeypatch, seconds=0.5)
    monkeypatch.setattr(fastest, "MOST_BYTES", 1000)
    pipe.prepare(num_inference_steps=3)
    assert exports.made == []


def test_ways_take_turns_and_their_medians_count(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(fastest.time, "perf_counter", lambda: next(clock))
    seen = []
    slow = lambda x, k: (seen.append("slow"), next(clock))  # noqa: E731
    fast = lambda x, k: seen.append("fast")  # noqa: E731
    assert fastest.median_times([slow, fast], torch.zeros(1, 4, 8, 8)) == [2, 1]
    assert seen[:4] == ["slow", "fast", "slow", "fast"]
