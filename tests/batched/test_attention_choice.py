# SPDX-License-Identifier: Apache-2.0
"""Each shape's attention runs on the fastest backend, timed before captures and never in one."""

from contextlib import nullcontext

import pytest
import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend

from msdda_fast.batched import attention_choice
from msdda_fast.batched.attention_choice import attention, chosen_backend
from msdda_fast.batched.options import BatchedOptions
from msdda_fast.batched.unet import BatchedUNet
from msdda_fast.torch_private import FakeTensorMode
from tests.batched.cases import inputs
from tests.batched.test_network import pair

FLASH, CUDNN, EFFICIENT = attention_choice.CANDIDATES


def enabled():
    """The one backend that a call now runs on, or None if several may."""
    flags = {
        FLASH: torch.backends.cuda.flash_sdp_enabled(),
        CUDNN: torch.backends.cuda.cudnn_sdp_enabled(),
        EFFICIENT: torch.backends.cuda.mem_efficient_sdp_enabled(),
        SDPBackend.MATH: torch.backends.cuda.math_sdp_enabled(),
    }
    found = [backend for backend, on in flags.items() if on]
    return found[0] if len(found) == 1 else None


class World:
    """A device on which backends take the milliseconds of `speeds`, or refuse."""

    def __init__(self):
        self.speeds = {FLASH: 2.0, CUDNN: 1.0, EFFICIENT: 3.0}
        self.capturing = False
        self.timed, self.ran = [], []

    def milliseconds(self, run, device):
        self.timed.append(enabled())
        if enabled() not in self.speeds:
            raise RuntimeError("No available kernel. Aborting execution.")
        return self.speeds[enabled()]

    def attend(self, query, key, value):
        self.ran.append(enabled())
        return query.clone()


@pytest.fixture
def world(monkeypatch):
    made = World()
    monkeypatch.setattr(attention_choice, "DEVICE", "cpu")
    monkeypatch.setattr(attention_choice, "_chosen", {})
    monkeypatch.setattr(attention_choice, "_milliseconds", made.milliseconds)
    monkeypatch.setattr(functional, "scaled_dot_product_attention", made.attend)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: made.capturing)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    return made


def tokens(rows=2, length=5, dtype=torch.float32):
    return [torch.zeros(rows, 3, length, 8, dtype=dtype) for _ in range(3)]


def test_the_fastest_backend_runs_and_is_timed_once(world):
    for _ in range(2):
        attention(*tokens())
    assert world.timed == [FLASH, CUDNN, EFFICIENT]
    assert world.ran == [CUDNN, CUDNN]
    assert enabled() is None  # as before


def test_each_shape_dtype_and_layout_has_a_choice_of_its_own(world):
    attention(*tokens())
    world.speeds = {FLASH: 1.0, CUDNN: 2.0}
    query, key, value = tokens()
    strided = query.transpose(1, 2).contiguous().transpose(1, 2)
    for call in (tokens(rows=3), tokens(dtype=torch.float16), (strided, key, value), tokens()):
        attention(*call)
    assert world.ran == [CUDNN, FLASH, FLASH, FLASH, CUDNN]


def test_a_backend_that_refuses_is_skipped(world):
    del world.speeds[CUDNN]
    attention(*tokens())
    world.speeds.clear()
    attention(*tokens(rows=3))
    attention(*tokens(rows=3))
    assert world.ran == [FLASH, None, None] and len(world.timed) == 6


def test_a_capture_only_reads_what_was_timed(world):
    attention(*tokens())
    world.capturing, world.timed = True, []
    attention(*tokens())
    attention(*tokens(rows=3))
    assert world.ran == [CUDNN, CUDNN, None] and not world.timed


def test_nothing_is_timed_unless_cudnn_times_too(world, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    attention(*tokens())
    assert world.ran == [None] and not world.timed


@pytest.mark.parametrize("switch", ["algorithms", "cudnn"])
def test_where_torch_is_deterministic_no_choice_is_made_or_used(world, monkeypatch, switch):
    attention(*tokens())
    if switch == "cudnn":
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    else:
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    attention(*tokens())
    attention(*tokens(rows=3))
    assert world.ran == [CUDNN, None, None] and len(world.timed) == 3


def test_tracers_and_fake_tensors_see_plain_attention(world, monkeypatch):
    attention(*tokens())
    with FakeTensorMode():
        assert chosen_backend(*tokens()) is None
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert chosen_backend(*tokens()) is None
    assert len(world.timed) == 3


def test_compiled_attention_is_whole_and_plain(monkeypatch):
    monkeypatch.setattr(attention_choice, "DEVICE", "cpu")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    call = [torch.randn_like(tensor) for tensor in tokens()]
    found = torch.compile(attention, fullgraph=True, backend="eager")(*call)
    assert torch.equal(found, functional.scaled_dot_product_attention(*call))
    assert not attention_choice._chosen


@pytest.mark.usefixtures("world")
def test_other_devices_have_plain_attention(monkeypatch):
    monkeypatch.setattr(attention_choice, "DEVICE", "cuda")
    assert chosen_backend(*tokens()) is None


def test_a_backend_that_is_named_is_not_timed(world):
    case = inputs(pair(dtype=torch.float32), dtype=torch.float32)
    case.batched(BatchedOptions(attention="math"))
    assert set(world.ran) == {SDPBackend.MATH} and not world.timed
    network = BatchedUNet.of(case.variants)
    world.ran.clear()
    case.run(network)
    assert set(world.ran) == {CUDNN} and network.attention_backend == "flash"


def test_only_the_gpu_is_timed_behind_a_kernel_that_hides_the_host(monkeypatch):
    log, times = [], iter([5.0, 1.0, 9.0, 2.0, 3.0])

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def synchronize(self):
            log.append("wait")

        def elapsed_time(self, end):
            return next(times)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(attention_choice, "keep_busy", lambda cycles: log.append("busy"))
    found = attention_choice._milliseconds(lambda: log.append("run"), torch.device("cuda"))
    assert found == 3.0
    assert log == ["run", *["busy", "event", *["run"] * 4, "event", "wait"] * 5]
