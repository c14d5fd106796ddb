# SPDX-License-Identifier: Apache-2.0
"""Decodes latents to images."""

from __future__ import annotations

from typing import Any

from torch import Tensor

__all__ = ["decode"]


def decode(vae: Any, x_0: Tensor) -> Tensor:  # noqa: ANN401 - AutoencoderKL or AutoencoderTiny
    """Return pictures (B, 3, H, W) in [-1, 1], in the dtype of the VAE, of latents (B, C, h, w).

    Gradients flow if enabled.
    """
    picture: Tensor = vae.decode(x_0.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[
        0
    ]
    return picture
