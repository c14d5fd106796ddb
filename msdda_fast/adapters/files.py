# SPDX-License-Identifier: Apache-2.0
"""Adapter files in any format diffusers supports: read, checked against the base, added to it.

Every adapter is read and checked before the first one is added, so a bad one changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from msdda_fast.adapters.description import in_header, of_peft
from msdda_fast.adapters.formats import Format, is_peft
from msdda_fast.adapters.injection import inject
from msdda_fast.errors import AdapterMismatch, InvalidAdapter
from msdda_fast.lora.adapter import LoraAdapter, LoraFactors
from msdda_fast.lora.reading import read_adapter_file

__all__ = ["AdapterFile", "AdapterPart"]


@dataclass(frozen=True, slots=True)
class AdapterPart:
    """What an adapter does to one network.

    Attributes:
        adapter: Its factors by module path.
        alphas: By module path; a module without one has alpha equal to its rank.
    """

    adapter: LoraAdapter
    alphas: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """One adapter, with every module's own scale.

    Attributes:
        name: Whose it is, for messages.
        parts: By network: "unet", "text_encoder".
        file: Where it was read; None: it was made here.
    """

    name: str
    parts: Mapping[str, AdapterPart]
    file: Path | None = None

    @classmethod
    def read(cls, name: str, file: Path, kind: Format) -> AdapterFile:
        """Read the adapter called `name` from a safetensors file.

        Supported are the formats of diffusers, kohya and ComfyUI, and folders of peft's
        `save_pretrained` for one network. Without an alpha of its own, a module has the one that
        diffusers or peft wrote down, else its rank.

        Args:
            name: For messages.
            file: Of an adapter.
            kind: How the pipeline's networks are named.

        Raises:
            AdapterMismatch: The adapter is for another kind of pipeline.
            InvalidAdapter: The file is damaged or holds something other than plain LoRA.
        """
        with _named(name, file):
            state_dict, header = read_adapter_file(file)
            default = kind.default(state_dict)
            descriptions = in_header(header, kind.networks, default)
            if descriptions is None and is_peft(state_dict):
                descriptions = of_peft(file, default)
                if descriptions is None:
                    raise InvalidAdapter(
                        "it is an adapter of peft without the adapter_config.json that says how "
                        "much it counts (lora_alpha); put that file beside it"
                    )
            parts = {}
            for network, part in kind.parts(state_dict).items():
                adapter = LoraAdapter.from_state_dict(name, part.factors)
                alphas = {}
                if descriptions is not None:
                    if network not in descriptions:
                        described = ", ".join(descriptions)
                        raise InvalidAdapter(
                            f"it changes {network!r}, and its description is of {described!r} only"
                        )
                    ranks = {path: len(f.down) for path, f in adapter.factors.items()}
                    alphas = descriptions[network].alphas(ranks)
                parts[network] = AdapterPart(adapter, {**alphas, **part.alphas})
            return cls(name, parts, file)

    def check(self, networks: Mapping[str, nn.Module | None]) -> None:
        """Check the adapter against the networks it would change, by name.

        Raises:
            AdapterMismatch: A module is absent or has another shape; names the first.
        """
        with _named(self.name, self.file):
            for name, part in self.parts.items():
                network = networks.get(name)
                if network is None:
                    first = next(iter(part.adapter.factors))
                    kind = "text encoder" if name.startswith("text_encoder") else name
                    raise AdapterMismatch(
                        f"it changes the {kind} ({first!r}), but this pipeline has none"
                    )
                _fitted(part, network).adapter.check(network)

    def put_into(
        self, networks: Mapping[str, nn.Module | None], adapter_name: str | None = None
    ) -> None:
        """Add the adapter to peft's layers. Other adapters of the networks do not change.

        Args:
            networks: By name; it was checked against them.
            adapter_name: Its name there; see `peft_names`. None: its own.
        """
        for name, part in self.parts.items():
            if (network := networks.get(name)) is not None:
                part = _fitted(part, network)
                inject(network, adapter_name or self.name, part.adapter.factors, part.alphas)

    @classmethod
    def together(
        cls, name: str, files: Sequence[AdapterFile], scales: Sequence[float]
    ) -> AdapterFile:
        """Return one adapter with the updates of several, sum_i scale_i B_i A_i alpha_i / r_i.

        Args:
            name: For messages.
            files: Of one base, at least one.
            scales: One per file, no unit.
        """
        parts = {}
        for network in dict.fromkeys(network for file in files for network in file.parts):
            held = [
                (file.parts[network], scale)
                for file, scale in zip(files, scales, strict=True)
                if network in file.parts
            ]
            paths = dict.fromkeys(path for part, _ in held for path in part.adapter.factors)
            factors = {path: _concatenated(path, held) for path in paths}
            parts[network] = AdapterPart(LoraAdapter(name, factors), {})
        return cls(name, parts)


def _concatenated(path: str, held: Sequence[tuple[AdapterPart, float]]) -> LoraFactors:
    """The factors of a set in one module, scales and alphas folded into B; alpha is the rank."""
    downs, ups = [], []
    for part, scale in held:
        if (own := part.adapter.factors.get(path)) is not None:
            rank = len(own.down)
            downs.append(own.down.float())
            ups.append(own.up.float() * (scale * part.alphas.get(path, rank) / rank))
    return LoraFactors(torch.cat(downs), torch.cat(ups, dim=1))


def _fitted(part: AdapterPart, network: nn.Module) -> AdapterPart:
    """The part with the paths of this network: newer transformers flattened text encoders."""
    if hasattr(network, "text_model"):
        return part
    factors = {_flat(path): own for path, own in part.adapter.factors.items()}
    alphas = {_flat(path): alpha for path, alpha in part.alphas.items()}
    return AdapterPart(LoraAdapter(part.adapter.name, factors), alphas)


def _flat(path: str) -> str:
    return path.removeprefix("text_model.")


@contextmanager
def _named(name: str, file: Path | None) -> Iterator[None]:
    """Make every error one line that names the adapter and its file.

    Converters of formats meet anything in a stranger's file, and say so in any way.
    """
    where = f"adapter {name!r}" + (f" ({file})" if file else "")
    try:
        yield
    except (AdapterMismatch, InvalidAdapter) as error:
        text = str(error).removeprefix(f"adapter {name!r}: ").removeprefix(f"adapter {name!r} ")
        text = text.replace(f"{file} ", "it ", 1)
        raise type(error)(f"{where}: {text}") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        reason = " ".join(str(error).split())
        raise InvalidAdapter(
            f"{where}: it cannot be read as LoRA ({type(error).__name__}: {reason:.200})"
        ) from error
