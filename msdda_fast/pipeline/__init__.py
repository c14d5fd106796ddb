# SPDX-License-Identifier: Apache-2.0
"""diffusers pipelines with a `weights=` argument. The only room that knows diffusers."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from msdda_fast.pipeline.stable_diffusion import MSDDAPipeline

__all__ = ["MSDDAPipeline"]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - PEP 562
    # importing diffusers takes seconds and prints notices; `environment` and `notices` need neither
    if name == "MSDDAPipeline":
        from msdda_fast.pipeline.stable_diffusion import MSDDAPipeline

        return MSDDAPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
