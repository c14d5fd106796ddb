# SPDX-License-Identifier: Apache-2.0
"""`auto` may fall back; a backend requested by name runs or says what is missing."""

import inspect
from collections.abc import Callable
from importlib import import_module

import pytest
import torch

from msdda_fast.errors import BackendUnavailable
from msdda_fast.kernels import native as native_kernels
from msdda_fast.kernels import raw, registry
from msdda_fast.kernels.fused_step import fast_fuse_step


@pytest.fixture(autouse=True)
def look_again(monkeypatch: pytest.MonkeyPatch):
    """What is there was looked up once: forget it before and after each test."""
    monkeypatch.delenv("MSDDA_BACKEND", raising=False)
    caches = (native_kernels.missing, registry._missing, registry._resolve)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.fixture
def nothing_compiled(monkeypatch: pytest.MonkeyPatch):
    """A machine on which msdda_fast._C was not built."""
    real = native_kernels.import_module

    def without_extension(name: str):
        if name == "msdda_fast._C":
            raise ImportError("No module named 'msdda_fast._C'")
        return real(name)

    monkeypatch.setattr(native_kernels, "import_module", without_extension)


def backend_of(op: str, backend: str = "auto", device_type: str = "cpu") -> str:
    return registry.resolve(op, backend, device_type).__name__.rpartition("._")[2]


@pytest.mark.parametrize("op", ["fused_step", "counter_noise"])
def test_auto_takes_the_first_of_its_device_that_can_run(op, native):
    assert backend_of(op) == native
    assert backend_of(op, device_type="xpu") == "eager"


@pytest.mark.parametrize(("interpret", "expected"), [("0", "triton"), ("1", "eager")])
@pytest.mark.usefixtures("nothing_compiled")
def test_on_gpus_auto_takes_triton_but_never_its_interpreter(interpret, expected, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    probe = import_module("msdda_fast.kernels._triton_probe")
    monkeypatch.setattr(probe, "launch", lambda: None)  # as on a GPU
    assert registry.chosen("fused_step", "cuda") == expected


def test_the_environment_replaces_auto_and_nothing_else(native, monkeypatch):
    monkeypatch.setenv("MSDDA_BACKEND", "eager")
    assert backend_of("fused_step") == "eager"
    assert backend_of("fused_step", native) == native
    monkeypatch.setenv("MSDDA_BACKEND", "fast")
    with pytest.raises(BackendUnavailable, match=r"'fast'.*'auto', 'eager', 'native', 'triton'"):
        backend_of("fused_step")


def test_native_does_not_run_on_other_devices(native):
    with pytest.raises(BackendUnavailable, match="no compiled kernels for 'xpu'"):
        backend_of("fused_step", native, "xpu")


def test_triton_runs_on_the_cpu_only_by_name_and_interpreted(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(BackendUnavailable, match="TRITON_INTERPRET=1"):
        backend_of("fused_step", "triton")
    registry._missing.cache_clear()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend_of("fused_step", "triton") == "triton"
    assert registry.chosen("fused_step", "cpu") != "triton"


@pytest.mark.usefixtures("nothing_compiled")
def test_without_the_extension_auto_is_eager_and_native_says_why():
    assert backend_of("fused_step") == "eager"
    assert not registry.available("native")
    assert "compiler" in registry.explain()["native"]
    with pytest.raises(BackendUnavailable, match=r"msdda_fast._C is missing.*compiler"):
        backend_of("fused_step", "native")
    means = torch.zeros(2, 1, 4, 2, 2)
    assert fast_fuse_step(means, 1.0, [0.5, 0.5], seeds=[1]).shape == (1, 4, 2, 2)


def test_explain_names_every_backend():
    assert set(registry.explain()) == {"eager", "native", "triton"}
    assert registry.explain()["eager"] == "ok"


@pytest.mark.parametrize("name", ["eager", "native", "triton"])
def test_every_backend_has_the_declared_signatures(name: str) -> None:
    if not registry.available(name):
        pytest.skip(registry.explain()[name])

    def parameters(function: Callable[..., object]) -> list[tuple[object, ...]]:
        given = inspect.signature(function).parameters.values()
        return [(p.name, p.kind, p.default) for p in given if p.name != "self"]

    fused = registry.resolve("fused_step", name, "cpu")
    assert parameters(fused.run) == parameters(raw.RunLinear.__call__)
    assert parameters(fused.run_moments) == parameters(raw.RunMoments.__call__)
    noise = registry.resolve("counter_noise", name, "cpu")
    assert parameters(noise.run) == parameters(raw.CounterNoiseBackend.run)
