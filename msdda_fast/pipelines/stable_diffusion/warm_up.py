# SPDX-License-Identifier: Apache-2.0
"""One step of a request before the first request."""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor

from msdda_fast.pipelines.exclusive import exclusively

__all__ = ["warm_up"]


def warm_up(pipe: Any, batch_size: int, *size: Any, **options: Any) -> None:  # noqa: ANN401
    """Run the first step of a call, which checks it and captures its kinds of step.

    Args:
        pipe: Of any kind that `exclusively` knows.
        batch_size: B, the number of images.
        size, options: Of the call, after the prompt.
    """

    def stop(pipe: Any, k: int, t: Tensor, tensors: dict[str, Any]) -> None:  # noqa: ANN401
        pipe._interrupt = True

    with exclusively(pipe.shared_networks()):
        shown = getattr(pipe, "_progress_bar_config", {})
        pipe.set_progress_bar_config(disable=True)
        try:
            pipe(
                [""] * operator.index(batch_size),
                *size,
                seed=0,
                zero_variance="dominate",
                output_type="latent",
                callback_on_step_end=stop,
                **options,
            )
        finally:
            pipe.set_progress_bar_config(**shown)
