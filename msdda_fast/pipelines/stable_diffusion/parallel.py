# SPDX-License-Identifier: Apache-2.0
"""A pipeline's objectives over several processes: what must agree, and each rank's share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from msdda_fast.adapters.variant import Variant
from msdda_fast.engine.assignment import Work
from msdda_fast.engine.noise import NoiseSource
from msdda_fast.engine.parallel import ObjectiveParallel, tensor_bytes
from msdda_fast.pipelines.in_parallel import agreed, generators_of
from msdda_fast.pipelines.prompts import Prompts
from msdda_fast.pipelines.stable_diffusion.sequential import SequentialNetwork
from msdda_fast.steps.coefficients import CoefficientTable

__all__ = ["ParallelNetwork", "together"]


class ParallelNetwork:
    """Returns the outputs of all ranks, each of which evaluates its share, one after another.

    Args:
        parallel: The ranks, inside a `generation`.
        local: Evaluates this rank's share.
        x: The state, (B, C, h, w).
        branches: K.
        dtype: Dtype of the outputs.
    """

    def __init__(
        self,
        parallel: ObjectiveParallel,
        local: SequentialNetwork,
        x: Tensor,
        branches: int,
        dtype: torch.dtype,
    ) -> None:
        self._parallel, self._local = parallel, local
        sets = [tuple(active) for active in local.active]
        exchanges = {
            active: parallel.exchange(active, branches, x.shape, dtype, x.device)
            for active in dict.fromkeys(sets)
        }
        parallel.begin([exchanges[active] for active in sets])

    def __call__(self, x: Tensor, k: int) -> list[Tensor | None]:
        """Return the raw outputs (K, B, C, h, w) of M objectives; None if not active at step k.

        Raises:
            RankLost, RanksDiffer: See `ObjectiveParallel.gather`.
        """

        def run(work: Work) -> list[Tensor]:
            branches = slice(work.start, work.stop)
            outputs = self._local.evaluate(x, k, work.objectives, branches)
            return [output for m in work.objectives if (output := outputs[m]) is not None]

        return self._parallel.evaluate(run, x)


@contextmanager
def together(
    parallel: ObjectiveParallel,
    variants: Mapping[str, Variant],
    prompts: Prompts,
    table: CoefficientTable,
    noise: NoiseSource,
    latents: Tensor | None,
    dtype: torch.dtype,
) -> Iterator[None]:
    """Begin and end a checked request together on all ranks.

    Seeds are not exchanged; generators, including torch's default one, are. The weights of the
    networks are not compared.

    Args:
        parallel: The ranks.
        variants: Variants by objective.
        prompts, table, noise, latents: The request.
        dtype: Dtype of the networks.

    Raises:
        RanksDiffer: A rank has a different request; the message says which and where.
        RankLost: See `ObjectiveParallel.generation`.
    """
    generators = []
    if noise.seeds is None:
        generators = generators_of(noise.generator, table.rows.device)
    texts = (prompts.prompt, prompts.negative_prompt, prompts.images_per_prompt)
    embeds = (prompts.prompt_embeds, prompts.negative_prompt_embeds)
    coefficients = tensor_bytes(table.rows) + tensor_bytes(table.timesteps)
    objectives = [(name, v.adapter, v.scale) for name, v in variants.items()]
    request = {
        "prompts": repr(texts).encode() + b"".join(tensor_bytes(e) for e in embeds),
        "objectives": repr(objectives).encode(),
        "weights, strength, etas, guidance or steps": coefficients,
        "size or dtype": repr((tuple(noise.shape), dtype, table.clip_range)).encode(),
        "seeds": tensor_bytes(noise.seeds),
        "latents": tensor_bytes(latents),
    }
    with agreed(parallel, request, generators):
        yield
