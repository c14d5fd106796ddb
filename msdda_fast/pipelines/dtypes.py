# SPDX-License-Identifier: Apache-2.0
"""The dtype of each component of a pipeline, in the forms that diffusers takes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, Protocol, TypeAlias

import torch
from torch import nn

__all__ = ["Dtypes", "cast", "check_dtypes"]

#: One for all components, or by component; "default" is for those that are not named.
Dtypes: TypeAlias = torch.dtype | Mapping[str, torch.dtype]

_ACCEPTED = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class HasNetworks(Protocol):
    """A pipeline and the networks of its objectives."""

    @property
    def components(self) -> Mapping[str, Any]:
        """Modules by name."""

    @property
    def variants(self) -> Mapping[str, Any]:
        """What has a `network`, by objective."""


def check_dtypes(
    dtype: Dtypes | None, torch_dtype: Dtypes | None, components: Collection[str]
) -> Dtypes | None:
    """Return the one that is given; `torch_dtype` is the older name of `dtype`.

    Raises:
        ValueError: Both are given and differ; a dtype is not one of the four floating ones; or a
            mapping names a component that is not one of `components`.
    """
    if dtype is not None and torch_dtype is not None and dtype != torch_dtype:
        raise ValueError(f"dtype is {dtype} and torch_dtype is {torch_dtype}; give only one")
    dtype = torch_dtype if dtype is None else dtype
    if dtype is None:
        return None
    values: Iterable[object] = (dtype,)
    if isinstance(dtype, Mapping):
        values = dtype.values()
        if unknown := [name for name in dtype if name not in (*components, "default")]:
            raise ValueError(
                f"dtype names {unknown[0]!r}, which is no component; known: "
                f"{', '.join(components)}, and 'default'"
            )
    for value in values:
        if value not in _ACCEPTED:
            accepted = ", ".join(map(str, _ACCEPTED))
            raise ValueError(f"dtype must be one of {accepted}, got {value!r}")
    return dtype


def cast(pipe: HasNetworks, dtype: Dtypes) -> None:
    """Give every network its dtype, in place; those of objectives get that of the unet."""
    networks = [*pipe.components.items(), *(("unet", v.network) for v in pipe.variants.values())]
    for name, network in networks:
        own = dtype if isinstance(dtype, torch.dtype) else _of(dtype, name)
        # diffusers warns of every cast, also of those that change nothing
        if isinstance(network, nn.Module) and any(
            p.is_floating_point() and p.dtype != own for p in network.parameters()
        ):
            network.to(dtype=own)


def _of(dtypes: Mapping[str, torch.dtype], name: str) -> torch.dtype:
    return dtypes.get(name, dtypes.get("default", torch.float32))  # as diffusers reads them
