# SPDX-License-Identifier: Apache-2.0
"""Algorithm 1 with the networks of a pipeline: a checked request in, latents out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from msdda_fast.adapters.switching import AdapterSwitch, adapter_names
from msdda_fast.adapters.variant import Variant
from msdda_fast.engine import loop
from msdda_fast.engine.noise import NoiseSource
from msdda_fast.engine.parallel import ObjectiveParallel
from msdda_fast.engine.step import Outputs
from msdda_fast.pipelines.exclusive import exclusively
from msdda_fast.pipelines.prompts import Prompts
from msdda_fast.pipelines.stable_diffusion.captured import CapturedSampler
from msdda_fast.pipelines.stable_diffusion.captured_generation import CapturedGeneration
from msdda_fast.pipelines.stable_diffusion.modes import StepPlan
from msdda_fast.pipelines.stable_diffusion.parallel import ParallelNetwork, together
from msdda_fast.pipelines.stable_diffusion.sequential import SequentialNetwork
from msdda_fast.steps.coefficients import CoefficientTable

__all__ = ["Networks", "PromptedGeneration", "Request", "Sampled", "Watch", "sample"]


@dataclass(frozen=True, slots=True)
class Request:
    """A checked request for B = P N images.

    Attributes:
        prompts: P prompts, each for N images.
        table: Coefficients of T steps, on the device and in the dtype of the state.
        noise: Source of x_T and z.
        latents: x_T in place of the drawn one, (B, C, h, w).
        plan: Which steps are merged; None: none.
    """

    prompts: Prompts
    table: CoefficientTable
    noise: NoiseSource
    latents: Tensor | None = None
    plan: StepPlan | None = None


@dataclass(frozen=True, slots=True)
class Networks:
    """The networks that evaluate requests.

    Attributes:
        variants: Network and adapter of each objective.
        text_encoder: May hold adapters of the objectives; None: prompts are given as embeddings.
        encode_prompt: The method of diffusers' pipeline.
        device, dtype: Where and in what the networks run.
        sampler: Runs all objectives in one forward; None: they run one after another.
        parallel: The processes that share the objectives, as `sampler` knows; None: only this one.
    """

    variants: Mapping[str, Variant]
    text_encoder: nn.Module | None
    encode_prompt: Callable[..., tuple[Tensor, Tensor]]
    device: torch.device
    dtype: torch.dtype
    sampler: CapturedSampler | None
    parallel: ObjectiveParallel | None = None


class PromptedGeneration(loop.Generation, Protocol):
    """A generation whose state, coefficients and prompts may be replaced between two steps.

    Attributes:
        forwards: How many networks have run on each image, guidance not counted twice.
    """

    forwards: int

    def replace_x(self, x: Tensor) -> None:
        """Continue from another state (B, C, h, w)."""

    def replace_table(self, table: CoefficientTable) -> None:
        """Continue with other coefficients of the same T steps."""

    def replace_prompt(self, prompt_embeds: Tensor) -> None:
        """Continue with other embeddings (M, K, B, L, D), in the order (uncond, cond)."""


#: `f(k, generation, embeddings)` after step k, with the embeddings (M, K, B, L, D) that sampling
#: began with; whether to go on.
Watch: TypeAlias = Callable[[int, PromptedGeneration, Tensor], bool]


class Sampled(NamedTuple):
    """What became of a request.

    Attributes:
        x: x_0, (B, C, h, w), in the dtype of the table, or the state when `watch` returned False.
        steps: How many steps were done.
        forwards: How many networks ran on each image, guidance not counted twice.
        step_kl: Estimated KL divergence of each step from the exact one, (T, B) nats.
        merged_kl: Measured KL divergence of merged steps from exact ones, (T, B) nats, where both
            ran.
    """

    x: Tensor
    steps: int
    forwards: int
    step_kl: Tensor
    merged_kl: Tensor


def sample(networks: Networks, request: Request, watch: Watch | None = None) -> Sampled:
    """Run Algorithm 1 with a checked request.

    Args:
        networks: The networks that evaluate it.
        request: What to sample.
        watch: Called after each step; returning False ends sampling.

    Raises:
        RankLost, RanksDiffer: Several processes share the objectives, and one is lost or differs.
    """
    table, x_T = request.table, request.latents
    used = [networks.text_encoder, *(v.network for v in networks.variants.values())]
    with exclusively(used), _switch(networks) as switch, _ranks(networks, request):
        embeds = _encode(networks, request, switch)
        if x_T is None:
            # generators draw in the dtype of stock diffusers
            dtype = networks.dtype if request.noise.seeds is None else table.rows.dtype
            x_T = request.noise.initial(table.rows.device, dtype)
        generation = _begin(networks, request, x_T.to(table.rows), embeds, switch)

        steps = 0

        def watched(k: int) -> bool:
            nonlocal steps
            steps = k + 1
            return watch is None or watch(k, generation, embeds)

        x = loop.run(generation, len(table), watched).clone()
        if networks.parallel is not None:
            networks.parallel.finish(x)
        if isinstance(generation, CapturedGeneration):
            kl = generation.step_kl, generation.merged_kl
        else:
            kl = (x.new_zeros(len(table), len(x)),) * 2
        return Sampled(x, steps, generation.forwards, *kl)


class _EagerGeneration(loop.EagerGeneration):
    """A generation that runs networks one after another, or over several processes."""

    def __init__(
        self, networks: Networks, request: Request, x_T: Tensor, switch: AdapterSwitch
    ) -> None:
        variants, dtype = list(networks.variants.values()), networks.dtype
        self.forwards = 0
        self._runs: list[int] = request.table.influence.sum(1).tolist()
        self._local = SequentialNetwork(variants, switch, request.table, dtype)
        network: Callable[[Tensor, int], Outputs] = self._local
        if networks.parallel is not None:
            branches = 2 if request.table.needs_uncond else 1
            network = ParallelNetwork(networks.parallel, self._local, x_T, branches, dtype)
        super().__init__(network, x_T, request.table, request.noise)

    def step(self, k: int) -> None:
        """Do step k."""
        super().step(k)
        self.forwards += self._runs[k]

    def replace_prompt(self, prompt_embeds: Tensor) -> None:
        """Continue with other embeddings (M, K, B, L, D), between two steps."""
        self._local.prompt_embeds = prompt_embeds


def _begin(
    networks: Networks, request: Request, x_T: Tensor, embeds: Tensor, switch: AdapterSwitch
) -> CapturedGeneration | _EagerGeneration:
    if networks.sampler is not None:
        shared = len(set(_text_encoders(networks))) == 1
        return networks.sampler.begin(
            request.table, request.noise, x_T, embeds, shares_text=shared, plan=request.plan
        )
    generation = _EagerGeneration(networks, request, x_T, switch)
    generation.replace_prompt(embeds)
    return generation


def _switch(networks: Networks) -> AdapterSwitch:
    """Switch of the networks called directly; the batched forward has its own adapters."""
    own = () if networks.sampler is not None else networks.variants.values()
    return AdapterSwitch.of(own, networks.text_encoder)


@contextmanager
def _ranks(networks: Networks, request: Request) -> Iterator[None]:
    """Begin and end with the other processes, if there are any."""
    if networks.parallel is None:
        yield
        return
    with together(
        networks.parallel,
        networks.variants,
        request.prompts,
        request.table,
        request.noise,
        request.latents,
        networks.dtype,
    ):
        yield


def _encode(networks: Networks, request: Request, switch: AdapterSwitch) -> Tensor:
    """Return embeddings (M, K, B, L, D), in the order (uncond, cond); K = 1 without guidance.

    Objectives share one encoding unless their adapters change the text encoder.
    """
    table, prompts = request.table, request.prompts
    encoded: dict[tuple[str | None, float], Tensor] = {}
    keys = _text_encoders(networks)
    for key, active in zip(keys, table.active, strict=True):
        if active and key not in encoded:
            switch.select(*key)
            cond, uncond = networks.encode_prompt(
                prompts.prompt,
                table.rows.device,
                prompts.images_per_prompt,
                table.needs_uncond,
                prompts.negative_prompt,
                prompt_embeds=prompts.prompt_embeds,
                negative_prompt_embeds=prompts.negative_prompt_embeds,
            )
            encoded[key] = torch.stack([uncond, cond] if table.needs_uncond else [cond])
    unread = next(iter(encoded.values()))  # stands in the rows of inactive objectives
    return torch.stack([encoded.get(key, unread) for key in keys])


def _text_encoders(networks: Networks) -> list[tuple[str | None, float]]:
    """Return the adapter and scale that the text encoder runs with for each objective."""
    in_text = adapter_names(networks.text_encoder)
    variants = networks.variants.values()
    return [(v.adapter, v.scale) if v.adapter in in_text else (None, 1.0) for v in variants]
