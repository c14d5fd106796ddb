# SPDX-License-Identifier: Apache-2.0
r"""One LoRA adapter: find its file, read it, and check it against the network it is meant for.

An adapter changes the weight `W` (out, in, *k) of some modules to `W + s B A` with `lora_down` A
(r, in, *k) and `lora_up` B (out, r, *1). All of this happens before a network runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from msdda_fast.errors import AdapterMismatch, InvalidAdapter

__all__ = ["LoraAdapter", "LoraFactors", "find_adapter_file"]

#: The name diffusers gives to the adapters that it saves.
DEFAULT_WEIGHT_NAME = "pytorch_lora_weights.safetensors"

_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True, slots=True)
class LoraFactors:
    """The two factors of one module: `down` (r, in, *k) and `up` (out, r, *1)."""

    down: Tensor
    up: Tensor

    @property
    def update_shape(self) -> tuple[int, ...]:
        """Shape (out, in, *k) of the weight update `up @ down`."""
        return (self.up.shape[0], *self.down.shape[1:])


@dataclass(frozen=True, slots=True)
class LoraAdapter:
    """The factors of one adapter by module path, and its `name` in error messages."""

    name: str
    factors: Mapping[str, LoraFactors]

    @classmethod
    def from_state_dict(cls, name: str, state_dict: Mapping[str, Tensor]) -> LoraAdapter:
        """Pair the factors of a state dict in peft's naming (`<module>.lora_A.weight`, `lora_B`).

        Raises:
            InvalidAdapter: A key is not a LoRA factor, a factor has no partner, or their ranks
                differ or are 0.
        """
        for key in state_dict:
            if not key.endswith((_DOWN, _UP)):
                raise InvalidAdapter(
                    f"adapter {name!r}: {key!r} is not a LoRA factor (<module>{_DOWN} or {_UP})"
                )
        modules = dict.fromkeys(key.removesuffix(_DOWN).removesuffix(_UP) for key in state_dict)
        factors = {}
        for module in modules:
            down, up = state_dict.get(module + _DOWN), state_dict.get(module + _UP)
            if down is None or up is None:
                missing = _DOWN if down is None else _UP
                raise InvalidAdapter(f"adapter {name!r}: {module!r} has no {missing[1:]}")
            if not _multiply(down, up):
                raise InvalidAdapter(
                    f"adapter {name!r}: the factors of {module!r} do not multiply: "
                    f"lora_A {tuple(down.shape)}, lora_B {tuple(up.shape)}"
                )
            factors[module] = LoraFactors(down, up)
        return cls(name, factors)

    def check(self, network: nn.Module) -> None:
        """Compare every update with the weight of its module in `network`.

        Raises:
            AdapterMismatch: A module is missing or its shape differs; the message names the first
                one, with the shapes of the adapter's update and of the network's weight.
        """
        modules = dict(network.named_modules())
        kind = type(network).__name__
        for path, factors in self.factors.items():
            update = factors.update_shape
            weight = getattr(modules.get(path), "weight", None)
            if not isinstance(weight, Tensor):
                raise AdapterMismatch(
                    f"adapter {self.name!r} was made for another base: it updates {path!r} with "
                    f"shape {update}, and this {kind} has no weight there"
                )
            if tuple(weight.shape) != update:
                raise AdapterMismatch(
                    f"adapter {self.name!r} was made for another base: its update of {path!r} has "
                    f"shape {update}, the weight in this {kind} has shape {tuple(weight.shape)}"
                )


def _multiply(down: Tensor, up: Tensor) -> bool:
    """Whether B A is a weight's update: of one rank > 0, B without a kernel of its own."""
    alike = down.ndim == up.ndim >= 2 and 0 < down.shape[0] == up.shape[1]
    return alike and all(size == 1 for size in up.shape[2:])


def find_adapter_file(
    source: Path, *, weight_name: str | None = None, subfolder: str | None = None
) -> Path:
    """Return the safetensors file of `source`, which is that file or its folder.

    Raises:
        FileNotFoundError: The file or folder does not exist, or the folder has no safetensors file.
        ValueError: The file is not safetensors, or the folder holds several and none has diffusers'
            default name.
    """
    if not source.exists():
        raise FileNotFoundError(f"no adapter file or folder at {source}")
    if source.is_dir():
        source = source / subfolder if subfolder else source
        source = source / weight_name if weight_name else _only_adapter(source)
    if not source.is_file():
        raise FileNotFoundError(f"no adapter file at {source}")
    if source.suffix != ".safetensors":
        raise ValueError(f"{source} is not a .safetensors file; pickled adapters are not supported")
    return source


def _only_adapter(folder: Path) -> Path:
    if not folder.is_dir():
        raise FileNotFoundError(f"no adapter folder at {folder}")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no .safetensors file in {folder}")
    default = folder / DEFAULT_WEIGHT_NAME
    if default in files:
        return default
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ValueError(f"{folder} holds several adapters ({names}); choose one with weight_name=")
    return files[0]
