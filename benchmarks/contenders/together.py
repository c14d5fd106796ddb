# SPDX-License-Identifier: Apache-2.0
"""Ways to run the denoiser of one step for M adapters, checked against a wider dtype."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.contenders.contender import LIMITS, Impossible, Unverified
from benchmarks.contenders.families import Denoiser
from benchmarks.contenders.models import shared_copy
from msdda_fast.adapters.switching import AdapterSwitch
from msdda_fast.adapters.variant import AdapterSet
from msdda_fast.pipelines.row_arguments import row_arguments
from msdda_fast.pipelines.row_hook import RowHook
from msdda_fast.pipelines.rows import Call
from msdda_fast.torch_private import tree_leaves, tree_map_only

__all__ = ["WAYS", "Way", "exact", "verify"]


@dataclass(frozen=True, slots=True)
class Way:
    """One way, for a number of objectives that it is made for.

    Attributes:
        title: What it does.
        make: (denoiser, M, what to enter for as long as it is used) -> the forward.
        adapters: What the exact outputs are: "each" objective's, the "base" model's M times, or of
            all adapters "merged" with equal shares.
        rows: Whether the base model gets the rows of M objectives.
    """

    title: str
    make: Callable[[Denoiser, int, ExitStack], Callable[[], Tensor]]
    adapters: str = "each"
    rows: bool = True


def exact(denoiser: Denoiser, count: int) -> dict[str, Tensor]:
    """The outputs (M, R, ...) by `Way.adapters`, one forward after another in a wider dtype."""
    network, names = denoiser.network, denoiser.adapters[:count]
    own = {name: tensor.dtype for name, tensor in network.state_dict().items()}
    dtype = next(network.parameters()).dtype
    wide = torch.float64 if dtype == torch.float32 else torch.float32
    network.to(wide)
    arguments = tree_map_only(
        Tensor, lambda t: t.to(wide) if t.is_floating_point() else t, dict(denoiser.arguments)
    )

    def ran(adapters: AdapterSet) -> Tensor:
        with AdapterSwitch([network]) as switch:
            switch.select_set(adapters)
            return _first(network(**arguments))

    outputs = {
        "each": torch.stack([ran(((name, 1.0),)) for name in names]),
        "base": torch.stack([ran(())] * count),
        "merged": ran(tuple((name, 1 / count) for name in names))[None],
    }
    network.to(dtype)
    assert own == {name: tensor.dtype for name, tensor in network.state_dict().items()}
    return outputs


def verify(
    way: Way, run: Callable[[], Tensor], outputs: Mapping[str, Tensor], dtype: torch.dtype
) -> float:
    """Return the largest relative error of an objective.

    Raises:
        Unverified: It exceeds `LIMITS`, or adapters change less than that.
    """
    expected = outputs[way.adapters] if way.rows else outputs[way.adapters][:1]
    got = run().reshape(expected.shape)
    errors = [_relative(own, right) for own, right in zip(got, expected, strict=True)]
    error, limit = max(errors), LIMITS[dtype]
    effect = min(_relative(one, outputs["base"][0]) for one in outputs["each"])
    if not error <= limit < effect:
        raise Unverified(
            f"nothing was timed: {way.title} errs by {error:.2e}, at most {limit:.0e}; "
            f"adapters change outputs by {effect:.2e}"
        )
    return error


def _base(denoiser: Denoiser, count: int, stack: ExitStack, **how: bool) -> Callable[[], Tensor]:
    """The network without adapters."""
    network = _without_adapters(denoiser.network)
    return _called(network, denoiser.arguments, **how)


def _rows(denoiser: Denoiser, count: int, stack: ExitStack, **how: bool) -> Callable[[], Tensor]:
    network = _without_adapters(denoiser.network)
    return _called(network, _repeated(denoiser, count), **how)


def _soup(denoiser: Denoiser, count: int, stack: ExitStack) -> Callable[[], Tensor]:
    """One network of mean weights: another method, with the cost of one forward."""
    network = copy.deepcopy(denoiser.network)
    for layer in _layers(network):
        for name in denoiser.adapters[:count]:
            layer.base_layer.weight += layer.get_delta_weight(name) / count
    return _called(_without_adapters(network, copied=False), denoiser.arguments)


def _turns(denoiser: Denoiser, count: int, stack: ExitStack, **how: bool) -> Callable[[], Tensor]:
    """peft's `set_adapter`, and a forward for each."""
    network = shared_copy(denoiser.network)
    run, layers = _called(network, denoiser.arguments, **how), _layers(network)

    def turns() -> Tensor:
        outputs = []
        for name in denoiser.adapters[:count]:
            for layer in layers:
                layer.set_adapter(name)
            outputs.append(run())
        return torch.stack(outputs)

    return turns


def _mixed(denoiser: Denoiser, count: int, stack: ExitStack) -> Callable[[], Tensor]:
    """peft's mixed batches: `adapter_names`, one per row."""
    network = shared_copy(denoiser.network)
    arguments = _repeated(denoiser, count)
    rows = len(_first(denoiser.network(**denoiser.arguments)))
    names = [name for name in denoiser.adapters[:count] for _ in range(rows)]

    def named(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return args, kwargs | {"adapter_names": names}

    for layer in _layers(network):
        layer.register_forward_pre_hook(named, with_kwargs=True)
    return _called(network, arguments)


def _ours(denoiser: Denoiser, count: int, stack: ExitStack, **how: bool) -> Callable[[], Tensor]:
    """This package: the hook of a pipeline, with the hidden axis that it hands back."""
    network = shared_copy(denoiser.network)
    captured = how.pop("captured", False)
    if captured and network.device.type == "cpu":
        raise Impossible("the CPU has no graphs")
    run = _called(network, denoiser.arguments, **how)
    hook = RowHook("denoiser", network, "required" if captured else "off")
    stack.enter_context(hook.hooked([((name, 1.0),) for name in denoiser.adapters[:count]]))
    return lambda: run().stacked


def _called(
    network: nn.Module,
    arguments: Mapping[str, Any],
    *,
    compiled: bool = False,
    captured: bool = False,
) -> Callable[[], Tensor]:
    if compiled:
        network.compile(fullgraph=True, dynamic=False)

    def run() -> Tensor:
        return _first(network(**arguments))

    if captured and network.device.type == "cpu":
        raise Impossible("the CPU has no graphs")
    return harness.captured(run, network.device.type) if captured else run


def _repeated(denoiser: Denoiser, count: int) -> dict[str, Any]:
    """The arguments for the rows of M objectives, as the hook makes them."""
    network = denoiser.network
    names = list(inspect.signature(network.forward).parameters)
    call = Call.of(names, (), denoiser.arguments, row_arguments(network))
    return call.repeated(count)[1]


def _without_adapters(network: nn.Module, *, copied: bool = True) -> nn.Module:
    """The base network, without peft's layers."""
    network = shared_copy(network) if copied else network
    for path, layer in list(network.named_modules()):
        if isinstance(layer, LoraLayer):
            network.set_submodule(path, layer.get_base_layer())
    return network


def _layers(network: nn.Module) -> Sequence[LoraLayer]:
    return [module for module in network.modules() if isinstance(module, LoraLayer)]


def _first(output: Any) -> Tensor:
    return next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))


def _relative(value: Tensor, right: Tensor) -> float:
    return float((value.double() - right.double()).norm() / right.double().norm())


COMPILED, CAPTURED = {"compiled": True}, {"captured": True}

WAYS = {
    "base": Way("base network, the rows of one", _base, "base", rows=False),
    "rows": Way("base network, the rows of M", _rows, "base"),
    "rows again": Way("the same again", _rows, "base"),
    "soup": Way("merged adapters, another method", _soup, "merged", rows=False),
    "turns": Way("`set_adapter`, one after another", _turns),
    "mixed": Way("peft `adapter_names`, one batch", _mixed),
    "ours": Way("ours", _ours),
    "rows/compiled": Way("the rows of M, compiled", partial(_rows, **COMPILED), "base"),
    "turns/compiled": Way("one after another, compiled", partial(_turns, **COMPILED)),
    "ours/compiled": Way("ours, compiled", partial(_ours, **COMPILED)),
    "rows/captured": Way("the rows of M, captured", partial(_rows, **CAPTURED), "base"),
    "ours/captured": Way("ours, captured", partial(_ours, **CAPTURED)),
}
