# SPDX-License-Identifier: Apache-2.0
"""Puts the factors of an adapter into peft's layers, each module with its own rank and alpha.

peft is told which modules to wrap, and nothing else: ranks and alphas per module would be regular
expressions to it, and most other fields of its configuration change the base or what a layer does.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from msdda_fast.errors import AdapterMismatch
from msdda_fast.lora.adapter import LoraFactors

__all__ = ["extract", "inject", "peft_names"]

#: Names that the containers of adapters' layers have for themselves.
_TAKEN = {*dir(nn.ModuleDict), *dir(nn.ParameterDict), "default"}


def peft_names(names: Iterable[str], *networks: nn.Module | None) -> dict[str, str]:
    """Return what each adapter is called inside peft: its own name wherever that is safe.

    There, a name is a module's: it has no dots, is no attribute of the module that holds it, and is
    looked for in paths of modules and parameters.
    """
    names = list(names)
    present = [network for network in networks if network is not None]
    segments = {part for n in present for path, _ in n.named_modules() for part in path.split(".")}
    taken = {*names, *segments, *_TAKEN}
    found, count = {}, 0
    for name in names:
        plain = name.isascii() and name.replace("-", "_").isidentifier()
        if plain and "lora_" not in name and name not in (segments | _TAKEN):
            found[name] = name
            continue
        while f"objective-{count}" in taken:
            count += 1
        found[name] = f"objective-{count}"
        count += 1
    return found


def inject(
    network: nn.Module,
    name: str,
    factors: Mapping[str, LoraFactors],
    alphas: Mapping[str, float],
) -> None:
    """Add an adapter to a network, whose own weights and other adapters stay as they are.

    Args:
        network: Has a layer of the right shape at each path.
        name: The adapter's name in peft's layers; see `peft_names`.
        factors: By module path, at least one.
        alphas: By module path: the update is B A alpha / rank; alpha is the rank without one.
    """
    ranks = {path: len(f.down) for path, f in factors.items()}
    alphas = {path: alphas.get(path, float(rank)) for path, rank in ranks.items()}
    config, patterns = _config(ranks, alphas)
    with warnings.catch_warnings():
        # peft warns of a second adapter in one network, which is the very purpose here
        warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)
        inject_adapter_in_model(
            config,
            network,
            adapter_name=name,
            low_cpu_mem_usage=True,
            state_dict={f"{path}.lora_A.weight": f.down for path, f in factors.items()},
        )
    network._hf_peft_config_loaded = True  # type: ignore[assignment]  # as diffusers' loader does
    for path, f in factors.items():
        _fill(network.get_submodule(path), name, f, alphas[path])
    vars(config).update(patterns)  # for whoever saves the network's adapters with peft


def extract(network: nn.Module, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return an adapter's factors in peft's naming, and its description as `inject` reads it.

    They are read from the layers themselves: peft's own function drops whatever has the name of
    another adapter in its path.

    Raises:
        AdapterMismatch: The adapter does something else than s B A, which would be lost.
    """
    state, ranks, alphas = {}, {}, {}
    for path, layer in network.named_modules():
        if isinstance(layer, AuxiliaryTrainingWrapper):
            raise AdapterMismatch(f"{path!r} is a trained copy of the layer, not a LoRA")
        if not isinstance(layer, BaseTunerLayer):
            continue
        if name in getattr(layer, "lora_A", ()):
            if name in layer.lora_variant or layer.lora_bias.get(name, False):
                raise AdapterMismatch(f"adapter {name!r} is not a plain LoRA in {path!r}")
            state[f"{path}.lora_A.weight"] = layer.lora_A[name].weight.detach().contiguous()
            state[f"{path}.lora_B.weight"] = layer.lora_B[name].weight.detach().contiguous()
            rank, alpha = layer.r[name], float(layer.lora_alpha[name])
            # peft's rsLoRA divides by the root of the rank
            ranks[path], alphas[path] = rank, alpha * rank**0.5 if layer.use_rslora[name] else alpha
        elif any(name in getattr(layer, held) for held in layer.adapter_layer_names):
            raise AdapterMismatch(f"adapter {name!r} is no LoRA of a weight in {path!r}")
    config, patterns = _config(ranks, alphas)
    vars(config).update(patterns)
    return state, config.to_dict()


def _config(
    ranks: Mapping[str, int], alphas: Mapping[str, float]
) -> tuple[LoraConfig, dict[str, dict[str, float]]]:
    """Return peft's configuration for the most frequent rank and alpha, and what differs.

    The patterns are what diffusers writes and reads; `^` makes a path a whole one.
    """
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=list(ranks),
        init_lora_weights=False,
        inference_mode=True,
    )
    return config, {
        "rank_pattern": {f"^{path}": r for path, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{path}": a for path, a in alphas.items() if a != alpha},
    }


def _fill(layer: LoraLayer, name: str, factors: LoraFactors, alpha: float) -> None:
    rank = len(factors.down)
    weight = layer.get_base_layer().weight
    down, up = layer.lora_A[name], layer.lora_B[name]
    down.weight, up.weight = _like(factors.down, weight), _like(factors.up, weight)
    axis = "channels" if isinstance(down, nn.Conv2d) else "features"
    setattr(down, f"out_{axis}", rank)
    setattr(up, f"in_{axis}", rank)
    layer.r[name], layer.lora_alpha[name] = rank, alpha
    layer.scaling[name] = alpha / rank


def _like(factor: Tensor, weight: Tensor) -> nn.Parameter:
    """A copy on the device and, where that is a floating one, in the dtype of the base's weight."""
    dtype = weight.dtype if weight.is_floating_point() else factor.dtype
    return nn.Parameter(factor.to(weight.device, dtype, copy=True), requires_grad=False)
