# SPDX-License-Identifier: Apache-2.0
"""`auto` may fall back; a backend asked for by name runs or says what is missing."""

import pytest
import torch

from msdda_fast.errors import BackendUnavailable
from msdda_fast.kernels import registry
from msdda_fast.kernels.fused_step import fast_fuse_step


@pytest.fixture
def nothing_compiled(monkeypatch: pytest.MonkeyPatch):
    """A machine on which msdda_fast._C was not built."""
    real = registry.import_module

    def without_extension(name: str):
        if name == "msdda_fast._C":
            raise ImportError("No module named 'msdda_fast._C'")
        return real(name)

    caches = (registry._missing, registry._resolve)
    monkeypatch.setattr(registry, "import_module", without_extension)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def backend_of(op: str, backend: str = "auto", device_type: str = "cpu") -> str:
    return registry.resolve(op, backend, device_type).__name__.rpartition("._")[2]


@pytest.mark.parametrize("op", ["fused_step", "counter_noise"])
def test_auto_prefers_native_on_the_cpu_and_eager_elsewhere(op, native, monkeypatch):
    monkeypatch.delenv("MSDDA_BACKEND", raising=False)
    assert backend_of(op) == native
    assert backend_of(op, device_type="cuda") == "eager"


def test_the_environment_replaces_auto_and_nothing_else(native, monkeypatch):
    monkeypatch.setenv("MSDDA_BACKEND", "eager")
    assert backend_of("fused_step") == "eager"
    assert backend_of("fused_step", native) == native
    monkeypatch.setenv("MSDDA_BACKEND", "fast")
    with pytest.raises(BackendUnavailable, match=r"'fast'.*'auto', 'eager', 'native'"):
        backend_of("fused_step")


def test_native_does_not_run_on_other_devices(native):
    with pytest.raises(BackendUnavailable, match="'native' does not run on 'cuda'; there: eager"):
        backend_of("fused_step", native, "cuda")


@pytest.mark.usefixtures("nothing_compiled")
def test_without_the_extension_auto_is_eager_and_native_says_why(monkeypatch):
    monkeypatch.delenv("MSDDA_BACKEND", raising=False)
    assert backend_of("fused_step") == "eager"
    assert not registry.available("native")
    assert "compiler" in registry.explain()["native"]
    with pytest.raises(BackendUnavailable, match=r"msdda_fast._C is not there.*compiler"):
        backend_of("fused_step", "native")
    means = torch.zeros(2, 1, 4, 2, 2)
    assert fast_fuse_step(means, 1.0, [0.5, 0.5], seeds=[1]).shape == (1, 4, 2, 2)


def test_explain_names_every_backend():
    assert set(registry.explain()) == {"eager", "native"}
    assert registry.explain()["eager"] == "ok"
