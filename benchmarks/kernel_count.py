# SPDX-License-Identifier: Apache-2.0
"""Count the CUDA kernels of one step of Stable Diffusion 1.5, without a GPU.

    python benchmarks/kernel_count.py

The step runs on tensors without data, and each of its operators counts as the kernels that CUDA
launches for it (`KERNELS`). The network has the structure of Stable Diffusion 1.5 at a tenth of the
width: no operator of it is chosen by its width. Writes results/kernel_count.json.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # when run as a script

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from benchmarks.contenders.engine import Batched
from benchmarks.contenders.models import add_random_adapter
from benchmarks.tables.results import RESULTS
from msdda_fast.adapters.variant import Variant
from msdda_fast.batched import ops, unet
from msdda_fast.batched.options import BatchedOptions
from msdda_fast.engine.buffers import ShapeKey, StepBuffers
from msdda_fast.engine.step import Step
from msdda_fast.kernels import registry

SD15 = {
    "sample_size": 64,
    "block_out_channels": (32, 64, 128, 128),
    "cross_attention_dim": 64,
    # heads, by their old name; each has a multiple of 8 channels, as in the full network
    "attention_head_dim": 4,
}
#: Rank of the adapters, on all attention projections.
RANK = 4


class UnknownOperator(Exception):
    """The map does not say how many kernels this operator launches."""


def _with_bias(args: tuple[Any, ...]) -> int:
    """cuDNN's legacy interface, which torch calls, has no bias: torch adds it with a kernel."""
    return 1 if args[2] is None else 2


def _onto(args: tuple[Any, ...]) -> int:
    """Out of place, beta * C with C of the size of the result is copied into it first.

    A bias of one row is part of cuBLASLt's epilogue, but there is none for batched products.
    """
    return 1 if args[0].ndim == 1 and args[1].ndim == 2 else 2


#: What each operator launches in torch 2.11 on sm_90 in half precision, read in its sources.
#: Helpers that a library may add by itself (split-K sums, workspaces) are not counted.
KERNELS: dict[str, int | Callable[[tuple[Any, ...]], int]] = {
    # matrix products: cuBLAS
    "mm": 1,
    "bmm": 1,
    "addmm": _onto,
    "baddbmm": _onto,
    "baddbmm_": 1,  # C is read and written in place
    "addmm_": 1,
    # cuDNN reads and writes channels_last as it is
    "convolution": _with_bias,
    # moments, then scale and shift of each channel, then the elements
    "native_group_norm": 3,
    "native_layer_norm": 1,
    # flash attention; the CPU's operator of the same name stands for it
    "_scaled_dot_product_flash_attention": 1,
    "_scaled_dot_product_flash_attention_for_cpu": 1,
    # one pass over the elements each
    **dict.fromkeys(("add", "add_", "mul", "silu", "silu_", "gelu"), 1),
    **dict.fromkeys(("copy_", "_to_copy", "clone", "cat", "index_select"), 1),
    "upsample_nearest2d": 1,
    # allocation and questions about a tensor
    **dict.fromkeys(("empty", "empty_like", "new_empty", "empty_strided"), 0),
    # our own
    "fused_step_": 1,
    "grouped_lora": 1,
    "group_norm": 2,
    "sum_of": 1,
    "sum_and_norm": 1,
    "geglu": 1,
}
#: The rows of the table, by operator.
KINDS = {
    "matrix products": ("mm", "bmm", "addmm", "baddbmm", "baddbmm_", "addmm_", "grouped_lora"),
    "convolutions and their biases": ("convolution",),
    "group norms, with SiLU and layouts": (
        "native_group_norm",
        "group_norm",
        "silu",
        "silu_",
        "to NCHW",
        "clone",
    ),
    "layer norms, with sums before them": ("native_layer_norm", "sum_and_norm"),
    "attention": (
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
    ),
    "sums of residuals and times": ("add", "add_", "sum_of"),
    "GEGLU": ("gelu", "mul", "geglu"),
}


class KernelCounter(TorchDispatchMode):
    """Runs operators without data and counts the kernels they would launch on a GPU.

    Attributes:
        seen: Kernels by operator; "to NCHW" are copies before CUDA's group norm, which knows no
            other layout.

    Raises:
        UnknownOperator: An operator is not in `KERNELS`.
    """

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()
        self._fake = fake

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        args, kwargs = tree_map(self._given, (args, kwargs or {}))
        if func.namespace == "prim" or func.is_view or func is torch.ops.aten._unsafe_view.default:
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name not in KERNELS:
            raise UnknownOperator(f"{func}: say in KERNELS how many kernels it launches")
        if name == "native_group_norm" and not args[0].is_contiguous():
            self.seen["to NCHW"] += 1
            args = (args[0].contiguous(), *args[1:])
        number = KERNELS[name]
        self.seen[name] += number if isinstance(number, int) else number(args)
        return func(*args, **kwargs)

    def _given(self, value: object) -> object:
        if isinstance(value, Tensor) and not isinstance(value, FakeTensor):
            return self._fake.from_tensor(value)
        return value


def count(run: Callable[[], object]) -> Counter[str]:
    """Return the kernels of a call by operator; its tensors get no data."""
    with FakeTensorMode() as fake, KernelCounter(fake) as counter, torch.no_grad():
        run()
    return +counter.seen


def by_kind(seen: Mapping[str, int]) -> dict[str, int]:
    """Return the kernels by what they are for, as `KINDS` has it, and the rest as "other"."""
    kinds = {name: kind for kind, names in KINDS.items() for name in names}
    found = dict.fromkeys(KINDS, 0) | {"other": 0}
    for name, number in seen.items():
        found[kinds.get(name, "other")] += number
    return found


def network(count: int, config: Mapping[str, Any] | None = None) -> list[Variant]:
    """Return M variants of the network in half precision, in channels_last, with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        stock = UNet2DConditionModel(**(config or SD15)).eval().requires_grad_(False)
        for m in range(count):
            add_random_adapter(stock, f"objective {m}", RANK)
    stock.to(torch.float16).to(memory_format=torch.channels_last)
    return [Variant(stock, f"objective {m}") for m in range(count)]


def advance(variants: list[Variant], options: BatchedOptions) -> Callable[[], None]:
    """Return one step of one image with guidance, as the engine captures it."""
    stock = variants[0].network
    with on_cuda():
        batched = unet.BatchedUNet.of(variants, options)
    prompts = torch.zeros(1, 2, 1, 77, stock.config.cross_attention_dim, dtype=torch.float16)
    batched.begin(prompts, torch.tensor([801, 401, 1]))
    size = stock.config.sample_size
    key = ShapeKey(
        shape=(1, stock.config.in_channels, size, size),
        active=(True,) * len(variants),
        branches=2,
        dtype=torch.float16,
        channels_last=True,
    )
    buffers = StepBuffers.allocate(key, "cpu")
    step = Step(Batched(batched, batched).kinds["exact"], key, device="cpu")
    return lambda: step.advance(buffers)


@contextmanager
def on_cuda() -> Iterator[None]:
    """Choose as on a GPU: Triton's kernels where there are any, and what launches the fewest."""

    def backend(op: str, wanted: str, device_type: str) -> str:
        return "triton" if wanted == "auto" and registry.has(op, "triton") else wanted

    with (
        mock.patch.object(registry, "_resolve", backend),
        mock.patch.object(unet, "saves_launches", lambda dtype, device: True),
        mock.patch.object(ops, "saves_launches", lambda dtype, device: True),
    ):
        yield


GPU = {"channels_last": True, "attention": "flash"}
PLAIN = GPU | {"fused_ops": False, "fuse_qkv": False}
#: What is counted: title -> M and options; "M = 2" and "S" are what a GPU runs by default.
STEPS: dict[str, tuple[int, BatchedOptions]] = {
    "M = 2, separate": (2, BatchedOptions(**PLAIN, design="separate")),
    "M = 2, merged": (2, BatchedOptions(**PLAIN, design="merged")),
    "M = 2, separate, fused ops": (
        2,
        BatchedOptions(**PLAIN | {"fused_ops": True}, design="separate"),
    ),
    "M = 2, merged, fused ops": (
        2,
        BatchedOptions(**PLAIN | {"fused_ops": True}, design="merged"),
    ),
    "M = 2": (2, BatchedOptions(**GPU)),
    "S, merged": (1, BatchedOptions(**PLAIN, design="merged")),
    "S": (1, BatchedOptions(**GPU)),
}


def main() -> None:
    variants = network(2)
    found = {}
    for title, (number, options) in STEPS.items():
        seen = count(advance(variants[:number], options))
        found[title] = {"kernels": sum(seen.values()), "kinds": by_kind(seen)}
        print(title, sum(seen.values()), dict(seen))
    path = RESULTS / "kernel_count.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(results | {"steps": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
