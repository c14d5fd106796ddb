# SPDX-License-Identifier: Apache-2.0
"""Equal content makes equal files."""

import io

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from msdda_fast.training.storage import canonical, write_tensors

TENSORS = {"b": torch.arange(3.0), "a": torch.ones(2, 2).half(), "c": torch.zeros(())}
METADATA = {name: name.upper() for name in ("format", "z", "y", "x", "w", "v")}


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, METADATA])
def test_files_of_tensors(tmp_path, metadata):
    files = [tmp_path / f"{number}.safetensors" for number in range(8)]
    for number, file in enumerate(files):
        order = dict(sorted((metadata or {}).items(), reverse=number % 2 == 1))
        write_tensors(file, TENSORS, order)
    assert len({file.read_bytes() for file in files}) == 1
    found = load_file(files[0])
    assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)
    assert found.keys() == TENSORS.keys() and found["a"].dtype == torch.half
    with safe_open(files[0], framework="pt") as file:
        assert (file.metadata() or None) == metadata


def saved(state):
    file = io.BytesIO()
    torch.save(canonical(state), file)
    return file.getvalue()


def test_a_state_that_was_read_back_makes_the_file_it_was_read_from():
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(2)).sum().backward()
    optimizer.step()
    settings = {"names": ("".join(["ex", "p"]), "exp"), "betas": (0.9, 0.9), "n": None}
    state = {"optimizer": optimizer.state_dict(), "settings": settings, "average": []}
    first = saved(state)
    back = torch.load(io.BytesIO(first), weights_only=True)
    assert saved(back) == first
    optimizer.load_state_dict(back["optimizer"])
    assert saved(state | {"optimizer": optimizer.state_dict()}) == first
