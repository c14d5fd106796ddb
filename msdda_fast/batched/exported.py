# SPDX-License-Identifier: Apache-2.0
"""A batched forward as a model of OpenVINO, for CPUs: the same rows, fused and laid out for them.

Weights and factors become constants, and what `BatchedUNet.begin` writes becomes inputs, so that
prompts and schedules change without another export. The model is made by `torch.export` and
OpenVINO's frontend; `openvino.convert_model` would do the same, and report its use over a network.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from msdda_fast.batched.rows import Rows
from msdda_fast.batched.unet import BatchedUNet
from msdda_fast.errors import BackendUnavailable, UnsupportedNetwork
from msdda_fast.torch_private import tree_leaves

__all__ = ["ExportedForward", "check_exportable", "inference_request"]

#: Largest accepted ||exported - eager|| / ||eager|| of an objective, as between peers in
#: `benchmarks/latency.py`; rounding in another order gives 1e-6.
LIMIT = 1e-4


def check_exportable(unet: BatchedUNet) -> None:
    """Check that `ExportedForward` takes this network here.

    Raises:
        BackendUnavailable: OpenVINO is not installed.
        UnsupportedNetwork: The network is not in float32 on a CPU.
    """
    if find_spec("openvino") is None:
        raise BackendUnavailable("openvino is not installed: pip install 'msdda-fast[openvino]'")
    if unet.device.type != "cpu" or unet.dtype != torch.float32:
        raise UnsupportedNetwork(
            f"OpenVINO runs float32 networks on the CPU, got {unet.dtype} on {unet.device}"
        )


class ExportedForward:
    """`BatchedUNet.forward` for one shape through OpenVINO, equal to it up to rounding.

    It reads what `unet.begin` wrote last. The model holds a copy of the weights: make another one
    when `unet.adapters.is_current()` returns False.

    Args:
        unet: Its `begin` has been called; shapes of later calls are the same.
        shape: (B, C, h, w) of the latents.

    Raises:
        BackendUnavailable, UnsupportedNetwork: See `check_exportable`; or it cannot be exported, or
            the model computes something else.
    """

    def __init__(self, unet: BatchedUNet, shape: Sequence[int]) -> None:
        check_exportable(unet)
        self._held = _Held(unet)
        network = _Open(unet, self._held)
        generator = torch.Generator().manual_seed(0)

        def random(tensor: Tensor) -> Tensor:
            drawn = torch.randn(tensor.shape, generator=generator)
            return drawn if tensor.is_floating_point() else tensor

        example = (
            random(torch.empty(tuple(shape))),
            torch.zeros((), dtype=torch.int64),
            [random(tensor) for tensor in self._held.tensors()],
        )
        self._bound: dict[int, Tensor] = {}
        try:
            self._request = inference_request(network, example)
            got = self._run(example[0], example[1], example[2])
        except Exception as error:  # OpenVINO's own share no narrower class
            raise UnsupportedNetwork(f"OpenVINO cannot run this network: {error}") from error
        with torch.no_grad():
            right = network(*example)
        errors = (got - right).flatten(1).norm(dim=1) / right.flatten(1).norm(dim=1)
        if not bool((errors <= LIMIT).all()):
            raise UnsupportedNetwork(
                f"OpenVINO's outputs differ by {float(errors.max()):.1e}, at most {LIMIT:.0e}"
            )

    def __call__(self, x: Tensor, k: Tensor) -> Tensor:
        """As `BatchedUNet.forward`, for x of the shape that was exported, in float32."""
        return self._run(x, k, self._held.tensors())

    def _run(self, x: Tensor, k: Tensor, held: Sequence[Tensor]) -> Tensor:
        # handing an input over takes longer than many a layer; buffers stay where they are
        for i, tensor in enumerate((x.contiguous(), k, *held)):
            if i not in self._bound or self._bound[i].data_ptr() != tensor.data_ptr():
                self._request.set_input_tensor(i, _shared(tensor))
                self._bound[i] = tensor
        found = self._request.infer(share_outputs=True)[0]
        return torch.from_numpy(found).clone()  # the next call overwrites it


def _shared(tensor: Tensor) -> Any:  # noqa: ANN401 - openvino.Tensor
    import openvino

    return openvino.Tensor(tensor.numpy(), shared_memory=True)


class _Held:
    """What `begin` has written. No container that `torch.export` would look into, and copy."""

    def __init__(self, unet: BatchedUNet) -> None:
        self._places = unet.held_rows()

    def tensors(self) -> list[Tensor]:
        return [rows.x for holder, name in self._places for rows in _each(holder[name])]

    @contextmanager
    def replaced(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        own, given = [holder[name] for holder, name in self._places], iter(tensors)
        try:
            for (holder, name), value in zip(self._places, own, strict=True):
                rows = tuple(part.holding(next(given)) for part in _each(value))
                holder[name] = rows[0] if isinstance(value, Rows) else rows
            yield
        finally:
            for (holder, name), value in zip(self._places, own, strict=True):
                holder[name] = value


class _Open(nn.Module):
    """The forward as a function of its arguments and of what `begin` has written."""

    def __init__(self, unet: BatchedUNet, held: _Held) -> None:
        super().__init__()
        self.unet, self.held = unet, held

    def forward(self, x: Tensor, k: Tensor, tensors: list[Tensor]) -> Tensor:
        with self.held.replaced(tensors):
            output: Tensor = self.unet(x, k)
        return output


def _each(value: Rows | tuple[Rows, ...]) -> tuple[Rows, ...]:
    return (value,) if isinstance(value, Rows) else value


def inference_request(network: nn.Module, example: tuple[Tensor | list[Tensor], ...]) -> Any:  # noqa: ANN401 - openvino.InferRequest
    """Return the network as an OpenVINO inference request, for arguments of these shapes.

    It runs in float32 on as many threads as torch does now.
    """
    import openvino
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.fx_decoder import TorchFXPythonDecoder
    from openvino.frontend.pytorch.torchdynamo.export_decompositions import ops_to_not_decompose
    from torch.export.decomp_utils import CustomDecompTable

    table = CustomDecompTable()  # type: ignore[no-untyped-call]
    for kept in ops_to_not_decompose():
        with suppress(KeyError):
            table.pop(kept)  # type: ignore[no-untyped-call]
    table[torch.ops.aten.diagonal.default] = _diagonal  # OpenVINO has none
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations within torch.export
        program = torch.export.export(network, example).run_decompositions(table)
        decoder = TorchFXPythonDecoder(program.module(), dynamic_shapes=False)
        frontend = FrontEndManager().load_by_framework("pytorch")
        model = frontend.convert(frontend.load(decoder))
    shapes = [list(tensor.shape) for tensor in tree_leaves(example)]
    model.reshape(dict(enumerate(shapes)))
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",  # else bfloat16 where the processor has it
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "ENABLE_CPU_PINNING": False,  # all processes on a machine would pin the same cores
    }
    return openvino.Core().compile_model(model, "CPU", settings).create_infer_request()


def _diagonal(x: Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Tensor:
    """`torch.diagonal` without an offset, by operators that OpenVINO has."""
    assert offset == 0  # the only one in the forward
    low, high = sorted((dim1 % x.ndim, dim2 % x.ndim))
    entries = [x.select(high, i).select(low, i) for i in range(min(x.shape[low], x.shape[high]))]
    return torch.stack(entries, dim=-1)
