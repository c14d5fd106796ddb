# SPDX-License-Identifier: Apache-2.0
"""Fused sampling inside other projects' samplers: k-diffusion and ComfyUI."""
