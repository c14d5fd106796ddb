# SPDX-License-Identifier: Apache-2.0
"""A pipeline's objectives over several processes: what must agree, and who predicts what."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from msdda_fast.engine.assignment import Work
from msdda_fast.engine.noise import NoiseSource
from msdda_fast.engine.parallel import ObjectiveParallel, tensor_bytes
from msdda_fast.pipelines.prompts import Prompts
from msdda_fast.pipelines.stable_diffusion.prediction import Predictor
from msdda_fast.steps.coefficients import CoefficientTable

if TYPE_CHECKING:
    from msdda_fast.pipelines.stable_diffusion.pipeline import MSDDAPipeline

__all__ = ["ParallelPredictor", "generation"]


class ParallelPredictor:
    """The predictions of all ranks, each evaluating its share with a predictor of its own.

    Args:
        parallel: The ranks, inside a `generation`, from its first step.
        local: Evaluates this rank's share.
        dtype: Of the outputs.
    """

    def __init__(self, parallel: ObjectiveParallel, local: Predictor, dtype: torch.dtype) -> None:
        self._parallel = parallel
        self._local = local
        self._dtype = dtype
        self._step = 0

    def predict(
        self, x_t: Tensor, t: Tensor, prompt_embeds: Tensor, active: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        """See `Predictor.predict`.

        Raises:
            RankLost, RanksDiffer: See `ObjectiveParallel.evaluate`.
        """

        def run(work: Work) -> list[Tensor]:
            mine = [m in work.objectives for m in range(len(active))]
            embeds = prompt_embeds[:, work.start : work.stop]
            outputs = self._local.predict(x_t, t, embeds, mine)
            return [output for m in work.objectives if (output := outputs[m]) is not None]

        step, self._step = self._step, self._step + 1
        return self._parallel.evaluate(
            run, x_t, step, active=active, branches=prompt_embeds.shape[1], dtype=self._dtype
        )


@contextmanager
def generation(
    parallel: ObjectiveParallel,
    pipe: MSDDAPipeline,
    prompts: Prompts,
    table: CoefficientTable,
    noise: NoiseSource,
    latents: Tensor | None,
) -> Iterator[None]:
    """Begin a checked request on all ranks, and end it together.

    Seeds need no traffic. Generators, torch's default one among them, take the state that rank 0's
    have, here and once: after the generation they are on every rank where one process leaves them.
    The weights of the networks are not compared.

    Raises:
        RanksDiffer: A rank has another request; says which, and in what.
        RankLost: See `ObjectiveParallel.generation`.
    """
    generators = [] if noise.seeds is not None else _generators(noise, table.rows.device)
    texts = (prompts.prompt, prompts.negative_prompt, prompts.images_per_prompt)
    embeds = (prompts.prompt_embeds, prompts.negative_prompt_embeds)
    coefficients = tensor_bytes(table.rows) + tensor_bytes(table.timesteps)
    variants = [(name, v.adapter, v.scale) for name, v in pipe.variants.items()]
    request = {
        "prompts": repr(texts).encode() + b"".join(tensor_bytes(e) for e in embeds),
        "objectives": repr(variants).encode(),
        "weights, etas, guidance or steps": coefficients,
        "size or dtype": repr((tuple(noise.shape), pipe.unet.dtype, table.clip_range)).encode(),
        "seeds": tensor_bytes(noise.seeds),
        "generators": repr([generator.device.type for generator in generators]).encode(),
        "latents": tensor_bytes(latents),
    }
    with parallel.generation(request):
        for generator in generators:
            generator.set_state(parallel.from_first(generator.get_state()))
        yield


def _generators(noise: NoiseSource, device: torch.device) -> list[torch.Generator]:
    if isinstance(noise.generator, torch.Generator):
        return [noise.generator]
    if noise.generator is not None:
        return list(noise.generator)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return [torch.cuda.default_generators[index]]
    return [torch.default_generator]
