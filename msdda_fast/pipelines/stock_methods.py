# SPDX-License-Identifier: Apache-2.0
"""What stock pipelines offer to do with adapters, on a pipeline whose objectives choose them."""

from __future__ import annotations

from typing import Any, NoReturn

from msdda_fast.errors import AdapterMismatch

__all__ = ["refuse_adapter_methods"]

_INSTEAD = {
    "load_lora_weights": "load it into the stock pipeline, pipe.detach(), and make objectives anew "
    "with MSDDAPipeline.from_pipe",
    "unload_lora_weights": "use the stock pipeline, pipe.detach()",
    "delete_adapters": "use the stock pipeline, pipe.detach()",
    "set_adapters": "give weights= in the call; an objective of several adapters is "
    "Objective([...], scale=[...])",
    "enable_lora": "objectives enable their adapters",
    "disable_lora": "give the base model as an objective, Objective.base(), or use pipe.detach()",
    "fuse_lora": "no objective could run without fused adapters; use the stock pipeline, "
    "pipe.detach()",
    "unfuse_lora": "use the stock pipeline, pipe.detach()",
}


def refuse_adapter_methods(stock: type) -> dict[str, Any]:
    """Return a method that raises for each of these that the stock class has."""
    return {name: _refusing(name) for name in _INSTEAD if hasattr(stock, name)}


def _refusing(name: str) -> Any:  # noqa: ANN401 - a method
    def refuse(self: Any, *args: Any, **kwargs: Any) -> NoReturn:  # noqa: ANN401
        raise AdapterMismatch(f"{name}() would change what objectives are: {_INSTEAD[name]}")

    refuse.__name__ = name
    return refuse
