# SPDX-License-Identifier: Apache-2.0
"""What a user would write with diffusers and peft: stock networks and scheduler, then Eq. 7."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial

import torch
from diffusers import UNet2DConditionModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from benchmarks.contenders.contender import Contender
from benchmarks.contenders.models import shared_copy
from benchmarks.contenders.request import Request

__all__ = ["adapters_in_turn", "merged_copies", "mixed_batch", "single", "soup", "with_adapters"]

#: (x, t) -> the raw outputs (K, B, C, h, w) of each objective.
Predict = Callable[[Tensor, Tensor], Sequence[Tensor]]


class StockLoop:
    """diffusers' denoising loop; as in diffusers, the state has the dtype of the network."""

    def __init__(self, request: Request, count: int, predict: Predict) -> None:
        self._request, self._count, self._predict = request, count, predict
        self._noise = request.noise.to(request.dtype)
        self._no_noise = torch.zeros_like(self._noise[0])
        self._x_T = request.x.to(request.dtype)

    def first_step(self) -> Tensor:
        return self._advance(self._x_T, 0)

    def loop(self) -> Tensor:
        x = self._x_T
        for k in range(self._request.num_steps):
            x = self._advance(x, k)
        return x

    def forward(self) -> Sequence[Tensor]:
        return self._predict(self._x_T, self._request.scheduler.timesteps[0])

    @torch.no_grad()
    def _advance(self, x: Tensor, k: int) -> Tensor:
        request, scheduler = self._request, self._request.scheduler
        t = scheduler.timesteps[k]
        guided = [self._guide(output) for output in self._predict(x, t)]
        if self._count == 1:
            return scheduler.step(
                guided[0], t, x, eta=request.model.etas[0], variance_noise=self._noise[k]
            ).prev_sample
        prev = t - scheduler.config.num_train_timesteps // request.num_steps
        variance = scheduler._get_variance(t, prev)
        precision, mean = 0.0, 0.0
        for w, eta, output in zip(
            request.weights(self._count), request.model.etas, guided, strict=False
        ):
            mu = scheduler.step(output, t, x, eta=eta, variance_noise=self._no_noise).prev_sample
            share = w / (eta**2 * variance)
            precision, mean = precision + share, mean + share * mu
        return mean / precision + precision**-0.5 * self._noise[k]

    def _guide(self, output: Tensor) -> Tensor:
        if len(output) == 1:
            return output[0]
        uncond, cond = output
        return uncond + self._request.model.guidance * (cond - uncond)


def _rows(request: Request, unet: nn.Module, repeats: int = 1) -> Callable[..., Tensor]:
    """Return (x, t) -> outputs (repeats K, B, C, h, w) of one forward on repeats K copies of x."""
    conditions = request.conditions(repeats)
    count = repeats * request.branches
    nhwc = next(p for p in unet.parameters() if p.ndim == 4 and p.shape[-1] > 1).is_contiguous(
        memory_format=torch.channels_last
    )

    def predict(x: Tensor, t: Tensor) -> Tensor:
        rows = torch.cat([x] * count) if count > 1 else x
        if nhwc:
            rows = rows.contiguous(memory_format=torch.channels_last)
        return unet(rows, t, return_dict=False, **conditions)[0].unflatten(0, (count, -1))

    return predict


def _accelerated(unet: UNet2DConditionModel, compile: bool) -> nn.Module:
    """Return the network, or the network compiled in channels-last layout."""
    if not compile:
        return unet
    unet = unet.to(memory_format=torch.channels_last)
    mode = "max-autotune-no-cudagraphs" if unet.device.type == "cuda" else None
    return torch.compile(unet, mode=mode, dynamic=False)


def _contender(
    request: Request,
    count: int,
    predict: Predict,
    systems: Sequence[dict[int, float] | None],
    parameters: Sequence[Tensor],
    compile: bool = False,
) -> Contender:
    loop = StockLoop(request, count, predict)
    return Contender(
        loop.first_step, loop.loop, systems, parameters,
        forward=None if compile else loop.forward, compiled=compile,
    )  # fmt: skip


def single(request: Request, *, compile: bool = False) -> Contender:
    """The base model alone."""
    plain = request.model.plain({} if compile else None)
    one = _rows(request, _accelerated(plain, compile))
    parameters = list(plain.parameters())
    return _contender(request, 1, lambda x, t: [one(x, t)], [None], parameters, compile)


def soup(request: Request, count: int, *, compile: bool = False) -> Contender:
    """Reward soup: one network whose weights are the objectives' mean, weighted by w."""
    shares = dict(enumerate(request.weights(count)))
    merged = request.model.plain(shares)
    one = _rows(request, _accelerated(merged, compile))
    parameters = list(merged.parameters())
    return _contender(request, 1, lambda x, t: [one(x, t)], [shares], parameters, compile)


def adapters_in_turn(request: Request, count: int, *, compile: bool = False) -> Contender:
    """The paper in diffusers: `set_adapter` and a forward for each objective."""
    names = [variant.adapter for variant in request.model.variants[:count]]
    # compiled, it gets another memory layout
    unet = copy.deepcopy(request.model.unet) if compile else shared_copy(request.model.unet)
    one = _rows(request, _accelerated(unet, compile))

    def predict(x: Tensor, t: Tensor) -> list[Tensor]:
        outputs = []
        for name in names:
            unet.set_adapter(name)
            outputs.append(one(x, t))
        return outputs

    return _contender(request, count, predict, _each(count), with_adapters(unet, names), compile)


def merged_copies(request: Request, count: int, *, compile: bool = False) -> Contender:
    """Every objective's own merged network, one forward each."""
    merged = [request.model.plain({m: 1.0}) for m in range(count)]
    each = [_rows(request, _accelerated(unet, compile)) for unet in merged]
    parameters = [p for unet in merged for p in unet.parameters()]
    return _contender(
        request, count, lambda x, t: [one(x, t) for one in each], _each(count), parameters, compile
    )


def mixed_batch(request: Request, count: int) -> Contender:
    """peft's `adapter_names`: one forward, a name for every row.

    diffusers does not pass the argument on; hooks hand it to the layers, as `PeftModel` does.
    """
    unet = shared_copy(request.model.unet)
    names = [variant.adapter for variant in request.model.variants[:count]]
    by_row = [name for name in names for _ in range(request.branches * request.batch)]
    for layer in unet.modules():
        if isinstance(layer, LoraLayer):
            layer.register_forward_pre_hook(partial(_name_rows, by_row), with_kwargs=True)
    one = _rows(request, unet, repeats=count)
    return _contender(
        request, count, lambda x, t: one(x, t).chunk(count), _each(count),
        with_adapters(unet, names),
    )  # fmt: skip


def _name_rows(names: list[str], layer: nn.Module, args: tuple, kwargs: dict) -> tuple:
    return args, kwargs | {"adapter_names": names}


def _each(count: int) -> list[dict[int, float] | None]:
    return [{m: 1.0} for m in range(count)]


def with_adapters(unet: UNet2DConditionModel, names: Sequence[str | None]) -> list[Tensor]:
    """Return the parameters of the base and of the named adapters."""
    return [
        parameter
        for path, parameter in unet.named_parameters()
        if ".lora_" not in path or any(f".{name}." in path for name in names)
    ]
