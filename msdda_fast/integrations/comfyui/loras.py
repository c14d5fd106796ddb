# SPDX-License-Identifier: Apache-2.0
"""LoRAs of an objective, added to the outputs of a network's layers and not to its weights.

Of ComfyUI's patchers of one network only the last that was loaded has its weights in it: to change
patches, ComfyUI moves the network off the device, restores it and patches it again. Objectives take
turns in every step, so theirs are hooks on layers, which change in no time and round no weight:

    out + strength (alpha / r) up(down(x)).

They are a patcher's injections, which ComfyUI puts in when it loads that patcher and takes out when
it loads another. What is no LoRA of a linear or convolutional layer is patched into weights, and so
is everything in a compiled network, which does not look for new hooks.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from msdda_fast.errors import AdapterMismatch
from msdda_fast.integrations.comfyui.inside import inside

__all__ = ["LoRAStack", "with_loras"]

#: Names of files, their strengths on the model, and on text encoders, as other node packs have it.
LoRAStack = Sequence[tuple[str, float, float]]
_KEY = "msdda_fast"
logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _LoRA:
    """A LoRA of one layer.

    Attributes:
        name: Of the layer's weight.
        down, up: (r, in) and (out, r), or kernels of convolutions.
        scale: Strength times alpha / r.
        inputs, outputs: (start, length) of the channels that it is about; None: all.
    """

    name: str
    down: Tensor
    up: Tensor
    scale: float
    inputs: tuple[int, int] | None = None
    outputs: tuple[int, int] | None = None
    _ready: tuple[Tensor, Tensor] | None = field(default=None, init=False)

    def added(self, layer: nn.Module, x: Tensor, out: Tensor) -> Tensor:
        """Return `out`, the layer's answer to `x`, with its own added."""
        down, up = self._factors(x)
        if isinstance(layer, nn.Conv2d):
            hidden = functional.conv2d(x, down, None, layer.stride, layer.padding, layer.dilation)
            return out + self.scale * functional.conv2d(hidden, up)
        if self.inputs is not None:
            x = x.narrow(-1, *self.inputs)
        own = self.scale * functional.linear(functional.linear(x, down), up)
        if self.outputs is None:
            return out + own
        out.narrow(-1, *self.outputs).add_(own)  # the layer made `out` just now
        return out

    def free(self) -> bool:
        """Let go of what is on a device; return whether the layer was called."""
        was_called, self._ready = self._ready is not None, None
        return was_called

    def _factors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        ready = self._ready
        if ready is None or ready[0].device != x.device or ready[0].dtype != x.dtype:
            ready = self._ready = (self.down.to(x), self.up.to(x))
        return ready


class _Injection:
    """The LoRAs of one patcher, by layer."""

    def __init__(self) -> None:
        self.layers: dict[nn.Module, list[_LoRA]] = {}
        self._hooks: list[Any] = []

    def inject(self, _: Any = None) -> None:  # noqa: ANN401 - comfy's ModelPatcher
        """Put hooks on the layers."""
        if not self._hooks:
            self._hooks = [
                layer.register_forward_hook(partial(_answer, loras))
                for layer, loras in self.layers.items()
            ]

    def eject(self, _: Any = None) -> None:  # noqa: ANN401 - comfy's ModelPatcher
        """Take them away."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def free(self, _: Any = None) -> None:  # noqa: ANN401 - comfy's ModelPatcher
        """Let go of what is on a device, after a run; warn of layers that the run did not call."""
        called: dict[str, bool] = {}
        for loras in self.layers.values():
            for lora in loras:
                called[lora.name] = lora.free()
        silent = [name for name, was_called in called.items() if not was_called]
        if silent and len(silent) < len(called):
            logger.warning(
                "LoRAs of %d layers had no effect, since the network does not call them: %s",
                len(silent),
                ", ".join(silent[:3]),
            )


def with_loras(model: Any, stack: LoRAStack) -> Any:  # noqa: ANN401 - comfy's ModelPatchers
    """Return a clone of `model` with LoRAs; all clones share one network.

    Args:
        model: comfy's ModelPatcher.
        stack: (file in the loras folder, strength, strength on text encoders), of which the last is
            not read: conditioning is made elsewhere.

    Raises:
        AdapterMismatch: A file has no weight of this model, or one of another size.
    """
    network, is_compiled = model.model, _is_compiled(model)
    keys = inside("comfy.lora").model_lora_keys_unet(network, {})
    injection, clone = _Injection(), model.clone()
    for name, strength, *_ in stack:
        path = inside("folder_paths").get_full_path_or_raise("loras", name)
        state = inside("comfy.utils").load_torch_file(path, safe_load=True)
        state = inside("comfy.lora_convert").convert_lora(state)
        found = inside("comfy.lora").load_lora(state, keys)
        if not found:
            raise AdapterMismatch(
                f"{name} has no weight of {type(network).__name__}: it was made for another kind "
                "of model"
            )
        rest = {}
        for key, adapter in found.items():
            layer, lora = (None, None) if is_compiled else _read(network, key, adapter, strength)
            if layer is None or lora is None:
                rest[key] = adapter
            else:
                _check_fits(name, key, layer, lora)
                injection.layers.setdefault(layer, []).append(lora)
        if rest:
            clone.add_patches(rest, strength)
    if injection.layers:
        extension = inside("comfy.patcher_extension")
        put = extension.PatcherInjection(injection.inject, injection.eject)
        clone.set_injections(_KEY, [*(clone.get_injections(_KEY) or ()), put])
        clone.add_callback(extension.CallbacksMP.ON_CLEANUP, injection.free)
        # a patcher that is forgotten while it is loaded is not asked to eject
        weakref.finalize(clone, injection.eject)
    return clone


def _answer(
    loras: Sequence[_LoRA], layer: nn.Module, inputs: tuple[Any, ...], out: Tensor
) -> Tensor:
    for lora in loras:
        out = lora.added(layer, inputs[0], out)
    return out


def _is_compiled(model: Any) -> bool:  # noqa: ANN401 - comfy's ModelPatcher
    wrapped = any("torch.compile" in keys for keys in model.wrappers.values())
    return wrapped or hasattr(model.get_model_object("diffusion_model"), "_orig_mod")


def _read(
    network: nn.Module,
    key: Any,  # noqa: ANN401 - a name, or a name, a part of the weight and a function of it
    adapter: Any,  # noqa: ANN401 - comfy's
    strength: float,
) -> tuple[nn.Module | None, _LoRA | None]:
    """Return a layer and a LoRA of it, or None where it is something else."""
    name, part, *function = (key, None) if isinstance(key, str) else key
    factors: Any = getattr(adapter, "weights", ())
    if getattr(adapter, "name", None) != "lora" or len(factors) != 6 or function:
        return None, None
    up, down, alpha, *others = factors
    if any(other is not None for other in others) or not name.endswith(".weight"):
        return None, None
    layer = network.get_submodule(name.removesuffix(".weight"))
    scale = strength * (1.0 if alpha is None else alpha / down.shape[0])
    if isinstance(layer, nn.Linear):
        lora = _LoRA(name, down.flatten(1), up.flatten(1), scale)
        if part is not None:
            axis, start, length = part
            setattr(lora, "inputs" if axis else "outputs", (start, length))
        return layer, lora
    if isinstance(layer, nn.Conv2d) and part is None and _is_plain(layer, up):
        kernel = (*down.shape[:1], -1, *layer.kernel_size)
        return layer, _LoRA(name, down.reshape(kernel), up.flatten(1)[..., None, None], scale)
    return None, None


def _is_plain(layer: nn.Conv2d, up: Tensor) -> bool:
    """Whether `up` after `down` is the convolution with their product."""
    return layer.groups == 1 and layer.padding_mode == "zeros" and up[0, 0].numel() == 1


def _check_fits(name: str, key: Any, layer: nn.Module, lora: _LoRA) -> None:  # noqa: ANN401
    """Raise `AdapterMismatch` unless the LoRA has the layer's channels."""
    sizes = [
        whole if part is None else part[1]
        for whole, part in zip(_channels(layer), (lora.inputs, lora.outputs), strict=True)
    ]
    if (given := [lora.down.shape[1], lora.up.shape[0]]) != sizes:
        raise AdapterMismatch(
            f"{name} has {given[0]} inputs and {given[1]} outputs for {key}, which has {sizes[0]} "
            f"and {sizes[1]}: it was made for another model"
        )


def _channels(layer: nn.Module) -> tuple[int, int]:
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    assert isinstance(layer, nn.Conv2d)
    return layer.in_channels, layer.out_channels
