# SPDX-License-Identifier: Apache-2.0
"""Fused sampling inside the samplers of others: k-diffusion and ComfyUI."""
