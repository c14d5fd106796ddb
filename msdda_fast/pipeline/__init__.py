# SPDX-License-Identifier: Apache-2.0
"""diffusers pipelines with a `weights=` argument. The only room that knows diffusers."""

from msdda_fast.pipeline.stable_diffusion import MSDDAPipeline

__all__ = ["MSDDAPipeline"]
