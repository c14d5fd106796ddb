# SPDX-License-Identifier: Apache-2.0
"""What an adapter's file may hold, in plain torch; every refusal is one line with its name."""

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

import msdda_fast as mf
from msdda_fast.lora import reading
from msdda_fast.lora.reading import read_adapter_file
from tests.lora.test_adapter import FITS, NAME

NAN, INF = float("nan"), float("inf")


def refused(file, message):
    with pytest.raises(mf.InvalidAdapter, match=message) as raised:
        read_adapter_file(file)
    assert str(file) in str(raised.value) and "\n" not in str(raised.value)


def with_header(header: bytes, size: int | None = None, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header) if size is None else size) + header + data


def test_tensors_and_the_headers_entries(tmp_path):
    file = tmp_path / NAME
    save_file(FITS, file, metadata={"a": "b"})
    state_dict, metadata = read_adapter_file(file)
    assert state_dict.keys() == FITS.keys() and metadata == {"a": "b"}


@pytest.mark.parametrize(
    "contents",
    [
        b"",
        b"not safetensors",
        with_header(b"{}", size=2**60),
        with_header(b"[1]"),
        with_header(b'{"a": '),
        with_header(b"\xff\xfe"),
        with_header(b"[" * 100_000),
        with_header(b'{"lora": 1}'),
        with_header(
            json.dumps({"lora": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode(),
            data=b"123",  # a download that broke off
        ),
    ],
    ids=range(9),
)
def test_damaged_files(tmp_path, contents):
    file = tmp_path / NAME
    file.write_bytes(contents)
    refused(file, "not a readable safetensors file")


def test_other_kinds(tmp_path):
    file = tmp_path / NAME
    save_file({"to_q.weight": torch.ones(1)}, file)
    refused(file, r"no LoRA.*to_q\.weight")
    for key, kind in (("x.dora_scale", "DoRA"), ("lora_unet_x.lokr_w1", "LoKr")):
        save_file({**FITS, key: torch.ones(1)}, file)
        refused(file, kind)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_numbers_that_are_none_name_the_first_tensor(tmp_path, value, dtype):
    bad = torch.ones(10, 2, dtype=dtype)
    bad[3, 1] = value
    save_file({**FITS, "to_q.lora_B.weight": bad}, tmp_path / NAME)
    refused(tmp_path / NAME, r"NaN or infinity.*'to_q\.lora_B\.weight'")
    save_file({**FITS, "to_q.alpha": torch.tensor(value)}, tmp_path / NAME)
    refused(tmp_path / NAME, r"NaN or infinity.*'to_q\.alpha'")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool])
def test_only_floating_point(tmp_path, dtype):
    save_file({**FITS, "to_q.lora_A.weight": torch.ones(2, 6, dtype=dtype)}, tmp_path / NAME)
    refused(tmp_path / NAME, rf"'to_q\.lora_A\.weight' is {str(dtype)[6:]}")


def test_an_integer_alpha_and_float8_are_fine(tmp_path):
    state = {**FITS, "to_q.alpha": torch.tensor(4)}
    state["to_q.lora_A.weight"] = torch.ones(2, 6).to(torch.float8_e4m3fn)
    save_file(state, tmp_path / NAME)
    assert read_adapter_file(tmp_path / NAME)[0]["to_q.alpha"] == 4
    state["to_q.lora_A.weight"] = torch.full((2, 6), NAN).to(torch.float8_e4m3fn)
    save_file(state, tmp_path / NAME)
    refused(tmp_path / NAME, "NaN")


def test_what_is_larger_than_adapters_are_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "load_file", None)
    file = tmp_path / NAME
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    header = json.dumps({f"lora.{i}": entry for i in range(20_001)}).encode()
    file.write_bytes(with_header(header, data=bytes(4)))
    refused(file, "names 20001 tensors")
    file.write_bytes(with_header(json.dumps({"lora" * 200: entry}).encode(), data=bytes(4)))
    refused(file, "name of 800 characters")
    with file.open("wb") as sparse:
        sparse.write(with_header(b"", size=2**26))
        sparse.truncate(2**27)
    refused(file, "claims 67108864 bytes")
