# SPDX-License-Identifier: Apache-2.0
"""Steps of requests before the first request."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from msdda_fast.pipelines.exclusive import exclusively

__all__ = ["warm_up"]

#: Of up to so many objectives every set is warmed up, of more only each alone.
_ALL_SETS = 3


def warm_up(pipe: Any, batch_size: int, *size: Any, mode: str) -> None:  # noqa: ANN401
    """Run one step of a mode, and exact ones of fewer objectives, which run where weights are 0.

    Args:
        pipe: Of any kind that `exclusively` knows.
        batch_size: B, the number of images.
        size: Of the call, after the prompt.
        mode: Of the call.
    """
    _first_step(pipe, batch_size, *size, mode=mode)
    if pipe.forward_settings.forward != "sequential":
        for weights in _fewer(len(pipe.objectives)):
            _first_step(pipe, batch_size, *size, weights=weights)


def _fewer(count: int) -> Iterator[list[float]]:
    sizes = range(1, count) if count <= _ALL_SETS else [1]
    for size in sizes:
        for chosen in itertools.combinations(range(count), size):
            yield [float(m in chosen) / size for m in range(count)]


def _first_step(pipe: Any, batch_size: int, *size: Any, **options: Any) -> None:  # noqa: ANN401
    """Run the first step of a call, which checks it and captures its kinds of step."""

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
