# SPDX-License-Identifier: Apache-2.0
"""diffusers pipelines with a `weights=` argument."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from msdda_fast.pipelines.stable_diffusion.pipeline import MSDDAPipeline

__all__ = ["MSDDAPipeline"]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - PEP 562
    # importing diffusers takes seconds and prints notices; `notices` needs neither
    if name == "MSDDAPipeline":
        from msdda_fast.pipelines.stable_diffusion.pipeline import MSDDAPipeline

        return MSDDAPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
