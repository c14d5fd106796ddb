# SPDX-License-Identifier: Apache-2.0
"""Triton's launches go to the device of their tensors, and Triton is not chosen where it fails."""

from contextlib import contextmanager
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

from msdda_fast.errors import BackendUnavailable
from msdda_fast.kernels import registry
from msdda_fast.kernels.current_device import on_its_device


@pytest.fixture
def current(monkeypatch):
    """Two GPUs, of which the first is the current one."""
    state = SimpleNamespace(device=0)

    @contextmanager
    def device(index):
        before, state.device = state.device, index
        yield
        state.device = before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: state.device)
    monkeypatch.setattr(torch.cuda, "device", device)
    return state


@pytest.mark.parametrize("index", [0, 1])
def test_a_launch_is_on_the_device_of_its_tensor(index, current):
    launch = on_its_device(lambda tensor, add: current.device + add)
    tensor = SimpleNamespace(device=torch.device("cuda", index), is_cuda=True)
    assert launch(tensor, add=5) == index + 5
    assert current.device == 0


def test_nothing_is_asked_of_cuda_for_tensors_of_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: pytest.fail("initialises CUDA"))
    assert on_its_device(lambda tensor: tensor)(torch.ones(1)) == 1


def test_every_launch_of_triton_is_guarded():
    pytest.importorskip("triton")
    for module, name in (
        ("fused_step", "run"),
        ("fused_step", "run_moments"),
        ("counter_noise", "run"),
        ("grouped_lora", "launch"),
        ("group_norm", "launch"),
        ("rowwise", "launch_sum_of"),
        ("rowwise", "launch_sum_and_norm"),
        ("rowwise", "launch_geglu"),
    ):
        function = getattr(import_module(f"msdda_fast.kernels.{module}._triton"), name)
        assert function.__code__.co_name == "guarded", (module, name)


@pytest.fixture
def no_compiler(monkeypatch):
    probe = import_module("msdda_fast.kernels._triton_probe")

    def launch():
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable")

    monkeypatch.setattr(probe, "launch", launch)
    monkeypatch.setattr(registry, "_interpreted", lambda: False)
    monkeypatch.setattr(registry.native, "missing", lambda device_type: "")
    for cached in (registry._missing, registry._resolve):
        cached.cache_clear()
    yield
    monkeypatch.undo()
    for cached in (registry._missing, registry._resolve):
        cached.cache_clear()


def test_where_triton_cannot_launch_the_native_kernel_is_chosen(no_compiler):
    pytest.importorskip("triton")
    assert registry.chosen("fused_step", "cuda") == "native"
    assert "C compiler" in registry.explain("cuda")["triton"]
    with pytest.raises(BackendUnavailable, match="C compiler"):
        registry.resolve("fused_step", "triton", "cuda")
