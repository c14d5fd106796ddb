# SPDX-License-Identifier: Apache-2.0
"""What `doctor` says of the kernels is what they just did."""

from types import SimpleNamespace

import pytest
from torch import Tensor

from msdda_fast.kernels import registry, verify

OPERATORS = ("fused_step", "counter_noise", "grouped_lora", "group_norm", "rowwise")


def test_every_operator_and_backend_has_a_finding():
    found = verify.report("cpu")
    assert tuple(found) == OPERATORS
    for op, findings in found.items():
        assert set(findings) == {name for name in registry.NAMES if registry.has(op, name)}
        chosen = [name for name, text in findings.items() if text.startswith("selected by auto")]
        assert chosen == [registry.chosen(op, "cpu")]
        assert not [text for text in findings.values() if "WRONG" in text or "failed" in text]


def test_compiled_kernels_have_the_bits_of_eager(native):
    found = verify.report("cpu")
    for op in OPERATORS[:2]:
        assert found[op][native].endswith("bit-identical to eager")


def replace_native(monkeypatch: pytest.MonkeyPatch, run: object) -> None:
    real = registry.resolve

    def resolve(op: str, backend: str, device: str) -> object:
        return SimpleNamespace(run=run) if backend == "native" else real(op, backend, device)

    monkeypatch.setattr(registry, "resolve", resolve)


def test_a_kernel_that_is_wrong_is_called_wrong(monkeypatch):
    def run(out: Tensor, *_: object, **__: object) -> None:
        out.fill_(0.0)

    replace_native(monkeypatch, run)
    assert verify.report("cpu")["counter_noise"]["native"].startswith("WRONG: 1.0e+00 off")


def test_a_kernel_that_fails_is_a_finding(monkeypatch):
    def run(*_: object, **__: object) -> None:
        raise RuntimeError("no kernel image")

    replace_native(monkeypatch, run)
    finding = verify.report("cpu")["fused_step"]["native"]
    assert finding == "failed: RuntimeError: no kernel image"
