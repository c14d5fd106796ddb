# SPDX-License-Identifier: Apache-2.0
"""The class of a stock pipeline with objectives: stock but for its call and for adapter methods."""

from __future__ import annotations

import functools
import inspect
from typing import Any, NoReturn

from msdda_fast.errors import AdapterMismatch

__all__ = ["attached_class"]

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


@functools.cache
def attached_class(mixin: Any, stock: Any) -> Any:  # noqa: ANN401 - classes
    """Return a class of both with the name of `stock`, which is what an index of it would give.

    Args:
        mixin: Its call takes the arguments of the stock call and keywords of its own.
        stock: Of a pipeline of diffusers.
    """
    own = inspect.signature(mixin.__call__).parameters.values()
    signature = inspect.signature(stock.__call__)
    together = [
        *signature.parameters.values(),
        *(parameter for parameter in own if parameter.kind is parameter.KEYWORD_ONLY),
    ]
    together.sort(key=lambda parameter: parameter.kind)  # **kwargs last, if stock has them

    @functools.wraps(mixin.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - as stock
        return mixin.__call__(self, *args, **kwargs)

    call.__dict__["__signature__"] = signature.replace(parameters=together)
    members = {
        "__module__": stock.__module__,
        "__qualname__": stock.__qualname__,
        "__doc__": stock.__doc__,
        "__call__": call,
        "stock_class": stock,
        **_refuse_adapter_methods(stock),
    }
    return type(stock.__name__, (mixin, stock), members)


def _refuse_adapter_methods(stock: type) -> dict[str, Any]:
    """Return a method that raises for each of these that the stock class has."""
    return {name: _refusing(name) for name in _INSTEAD if hasattr(stock, name)}


def _refusing(name: str) -> Any:  # noqa: ANN401 - a method
    def refuse(self: Any, *args: Any, **kwargs: Any) -> NoReturn:  # noqa: ANN401
        raise AdapterMismatch(f"{name}() would change what objectives are: {_INSTEAD[name]}")

    refuse.__name__ = name
    return refuse
