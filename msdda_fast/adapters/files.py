# SPDX-License-Identifier: Apache-2.0
"""Adapter files in any format diffusers supports: read, checked against the base, added to it.

Every adapter is read and checked before the first one is added, so a bad one changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from diffusers import UNet2DConditionModel
from torch import nn

from msdda_fast.adapters.description import in_header, of_peft
from msdda_fast.adapters.formats import NETWORKS, is_peft, parts_of, prefixed
from msdda_fast.adapters.injection import inject
from msdda_fast.errors import AdapterMismatch, InvalidAdapter
from msdda_fast.lora.adapter import LoraAdapter
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
    def read(cls, name: str, file: Path, unet: UNet2DConditionModel) -> AdapterFile:
        """Read the adapter called `name` from a safetensors file.

        Supported are the formats of diffusers, kohya and ComfyUI, and folders of peft's
        `save_pretrained` for either network. Without an alpha of its own, a module has the one that
        diffusers or peft wrote down, else its rank.

        Raises:
            AdapterMismatch: The adapter is for another kind of pipeline.
            InvalidAdapter: The file is damaged or holds something other than plain LoRA.
        """
        with _named(name, file):
            state_dict, header = read_adapter_file(file)
            default = prefixed(state_dict)
            descriptions = in_header(header, default)
            if descriptions is None and is_peft(state_dict):
                descriptions = of_peft(file, default)
                if descriptions is None:
                    raise InvalidAdapter(
                        "it is an adapter of peft without the adapter_config.json that says how "
                        "much it counts (lora_alpha); put that file beside it"
                    )
            parts = {}
            for network, part in parts_of(state_dict, unet).items():
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

    def check(self, unet: nn.Module, text_encoder: nn.Module | None) -> None:
        """Check the adapter against the networks it would change.

        Raises:
            AdapterMismatch: A module is absent or has another shape; names the first.
        """
        with _named(self.name, self.file):
            for network, part in zip((unet, text_encoder), self._fitted(text_encoder), strict=True):
                if part is None:
                    continue
                if network is None:
                    first = next(iter(part.adapter.factors))
                    raise AdapterMismatch(
                        f"it changes the text encoder ({first!r}), but this pipeline has none"
                    )
                part.adapter.check(network)

    def put_into(
        self, unet: nn.Module, text_encoder: nn.Module | None, adapter_name: str | None = None
    ) -> None:
        """Add the adapter to peft's layers. Other adapters of the networks do not change.

        Args:
            unet, text_encoder: Networks that it was checked against.
            adapter_name: Its name there; see `peft_names`. None: its own.
        """
        for network, part in zip((unet, text_encoder), self._fitted(text_encoder), strict=True):
            if part is not None and network is not None:
                factors = part.adapter.factors
                inject(network, adapter_name or self.name, factors, part.alphas)

    def _fitted(self, text_encoder: nn.Module | None) -> list[AdapterPart | None]:
        """Return the parts in the order of `NETWORKS`, with the paths of this text encoder."""
        unet, text = (self.parts.get(network) for network in NETWORKS)
        if text is not None and not hasattr(text_encoder, "text_model"):
            # flattened by newer transformers
            text = AdapterPart(
                LoraAdapter(
                    text.adapter.name,
                    {_flat(path): factors for path, factors in text.adapter.factors.items()},
                ),
                {_flat(path): alpha for path, alpha in text.alphas.items()},
            )
        return [unet, text]


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
