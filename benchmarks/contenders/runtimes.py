# SPDX-License-Identifier: Apache-2.0
"""The stock UNet in the inference runtimes that a user of a CPU would pick: OpenVINO, ONNX Runtime.

One merged adapter, on as many equal rows as there are objectives: no runtime has an operator for
rows of different adapters, so this is the least that M objectives could cost there. The network
stands in our step, so that nothing but the network differs from ours.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from benchmarks.contenders.contender import Contender, Impossible
from benchmarks.contenders.engine import in_our_step, step_key
from benchmarks.contenders.request import Request
from msdda_fast.batched.exported import inference_request
from msdda_fast.engine.buffers import StepBuffers
from msdda_fast.engine.step import Predict

__all__ = ["onnx_runtime", "openvino"]

Arguments = tuple[Tensor, ...]


class _Stock(nn.Module):
    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, rows: Tensor, t: Tensor, prompts: Tensor) -> Tensor:
        return self.unet(rows, t, encoder_hidden_states=prompts, return_dict=False)[0]


class _Rows:
    """A function of (rows, t, prompts) as the network of a step."""

    def __init__(
        self, request: Request, buffers: StepBuffers, run: Callable[..., Tensor], prompts: Tensor
    ) -> None:
        self._branches, self._prompts = request.branches, prompts
        self._run, self._timesteps = run, buffers.timesteps

    @property
    def kinds(self) -> Mapping[str, Predict]:
        return {"exact": self._predict}

    def _predict(self, next_input: Tensor, k: Tensor) -> Sequence[Tensor]:
        t = self._timesteps.index_select(0, k[None])[0]
        output = self._run(next_input.flatten(0, 1), t, self._prompts)
        return output.unflatten(0, (-1, self._branches, next_input.shape[1])).unbind()

    def storages(self) -> Mapping[str, Tensor]:
        return {}


def openvino(request: Request, count: int) -> Contender:
    """OpenVINO, through `torch.export`."""
    return _contender(request, count, "openvino", _through_openvino)


def onnx_runtime(request: Request, count: int) -> Contender:
    """ONNX Runtime, through `torch.onnx.export`."""
    return _contender(request, count, "onnxruntime", _through_onnx_runtime)


def _contender(
    request: Request,
    count: int,
    package: str,
    make: Callable[[nn.Module, Arguments], Callable[..., Tensor]],
) -> Contender:
    if request.device.type != "cpu":
        raise Impossible("a peer for CPUs")
    if find_spec(package) is None:
        raise Impossible(f"{package} is not installed (the extra `peers`)")
    if request.pooled is not None:
        raise Impossible("not written for Stable Diffusion XL")
    unet = request.model.plain({0: 1.0})
    rows = count * request.branches
    prompts = request.conditions(count)["encoder_hidden_states"]
    example = (request.x.repeat(rows, 1, 1, 1), request.scheduler.timesteps[0], prompts)
    with torch.no_grad():
        run = make(_Stock(unet), example)
    key = step_key(request, count, channels_last=False, input_rows=rows)
    systems = [{0: 1.0}] * count
    return in_our_step(
        request,
        key,
        systems,
        lambda buffers: _Rows(request, buffers, run, prompts),
        list(unet.parameters()),
        compiled=True,
    )


def _through_openvino(network: nn.Module, example: Arguments) -> Callable[..., Tensor]:
    inference = inference_request(network, example)

    def run(*arguments: Tensor) -> Tensor:
        arrays = [tensor.numpy() for tensor in arguments]
        return torch.from_numpy(inference.infer(arrays, share_inputs=True, share_outputs=True)[0])

    return run


def _through_onnx_runtime(network: nn.Module, example: Arguments) -> Callable[..., Tensor]:
    import onnxruntime

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations within torch
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(network, example, dynamo=True, verbose=False)
    file = io.BytesIO()
    program.save(file)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # see harness._REST_S
    session = onnxruntime.InferenceSession(
        file.getvalue(), options, providers=["CPUExecutionProvider"]
    )
    names = [given.name for given in session.get_inputs()]

    def run(*arguments: Tensor) -> Tensor:
        feed = {name: tensor.numpy() for name, tensor in zip(names, arguments, strict=True)}
        return torch.from_numpy(session.run(None, feed)[0])

    return run
