# SPDX-License-Identifier: Apache-2.0
"""One adapter: found, read, and checked against its network, in plain torch."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import msdda_fast as mf
from msdda_fast.lora.adapter import LoraAdapter, find_adapter_file

NAME = "pytorch_lora_weights.safetensors"


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q = nn.Linear(6, 10)
        self.proj = nn.Conv2d(3, 8, kernel_size=3)
        self.norm = nn.Identity()


def factors(module: str, down: tuple[int, ...], up: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {f"{module}.lora_A.weight": torch.ones(down), f"{module}.lora_B.weight": torch.ones(up)}


FITS = {**factors("to_q", (2, 6), (10, 2)), **factors("proj", (2, 3, 3, 3), (8, 2, 1, 1))}


def test_an_adapter_that_fits():
    adapter = LoraAdapter.from_state_dict("fits", FITS)
    assert {name: f.update_shape for name, f in adapter.factors.items()} == {
        "to_q": (10, 6),
        "proj": (8, 3, 3, 3),
    }
    adapter.check(Block())


@pytest.mark.parametrize(
    "state_dict, message",
    [
        (factors("to_q", (2, 5), (10, 2)), r"'x'.*'to_q'.*\(10, 5\).*Block.*\(10, 6\)"),
        (factors("to_q", (2, 6), (9, 2)), r"'to_q'.*\(9, 6\).*\(10, 6\)"),
        (factors("proj", (2, 3, 1, 1), (8, 2, 1, 1)), r"'proj'.*1, 1\).*3, 3\)"),
        (factors("to_k", (2, 6), (10, 2)), r"'to_k'.*\(10, 6\).*Block has no weight there"),
        (factors("norm", (2, 6), (10, 2)), "'norm'.*no weight there"),
        ({**FITS, **factors("to_z", (1, 1), (1, 1))}, "'to_z'"),
        ({**factors("to_y", (1, 1), (1, 1)), **factors("to_z", (1, 1), (1, 1))}, "'to_y'"),
    ],
)
def test_an_adapter_for_another_base_names_the_first_module(state_dict, message):
    with pytest.raises(mf.AdapterMismatch, match=message):
        LoraAdapter.from_state_dict("x", state_dict).check(Block())


@pytest.mark.parametrize(
    "state_dict, message",
    [
        ({"to_q.lora_A.weight": torch.ones(2, 6)}, "'to_q' has no lora_B"),
        ({"to_q.lora_B.weight": torch.ones(2, 6)}, "'to_q' has no lora_A"),
        (factors("to_q", (2, 6), (10, 3)), r"lora_A \(2, 6\), lora_B \(10, 3\)"),
        (factors("to_q", (6,), (10,)), r"lora_A \(6,\)"),
        (factors("to_q", (0, 6), (10, 0)), r"lora_A \(0, 6\)"),  # alpha / 0
        (factors("proj", (2, 3, 3, 3), (8, 2, 3, 3)), r"lora_B \(8, 2, 3, 3\)"),
        ({"to_q.lokr_w1": torch.ones(2, 6)}, "lokr_w1"),
    ],
)
def test_factors_that_make_no_update(state_dict, message):
    with pytest.raises(mf.InvalidAdapter, match=message):
        LoraAdapter.from_state_dict("x", state_dict)


class TestFiles:
    def test_the_default_name_wins_in_a_folder(self, tmp_path):
        (tmp_path / "a.safetensors").touch()
        assert find_adapter_file(tmp_path).name == "a.safetensors"
        (tmp_path / NAME).touch()
        assert find_adapter_file(tmp_path).name == NAME
        assert find_adapter_file(tmp_path, weight_name="a.safetensors").name == "a.safetensors"
        assert find_adapter_file(tmp_path / "a.safetensors").name == "a.safetensors"
        assert find_adapter_file(tmp_path.parent, subfolder=tmp_path.name).name == NAME

    def test_missing(self, tmp_path):
        for arguments in (
            {"source": tmp_path / "none"},
            {"source": tmp_path},
            {"source": tmp_path, "subfolder": "none"},
            {"source": tmp_path, "weight_name": "none.safetensors"},
        ):
            with pytest.raises(FileNotFoundError, match=str(tmp_path)):
                find_adapter_file(**arguments)

    def test_ambiguous(self, tmp_path):
        for name in ("a.safetensors", "b.safetensors"):
            (tmp_path / name).touch()
        with pytest.raises(ValueError, match=r"a\.safetensors, b\.safetensors.*weight_name"):
            find_adapter_file(tmp_path)

    def test_pickles_are_not_read(self, tmp_path):
        (tmp_path / "lora.bin").touch()
        with pytest.raises(ValueError, match=r"lora\.bin.*safetensors"):
            find_adapter_file(tmp_path / "lora.bin")


@pytest.mark.full  # a program; tests/test_layering.py reads the imports
def test_needs_torch_and_no_model_zoo():
    code = (
        "import sys, msdda_fast.lora.adapter;"
        "print([m for m in ('diffusers', 'transformers', 'peft') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
