# SPDX-License-Identifier: Apache-2.0
"""Generations on captured steps: one forward for all objectives, one graph for all steps.

A pipeline keeps one `CapturedSampler`. It builds a network per shape of request, and captures its
step where the device has graphs; on the CPU the same step runs eagerly. Approximate modes have a
graph per kind of step; see `modes`. Of several processes each has one, with its share of the rows.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import partial
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from msdda_fast.adapters.loaded import LoadedAdapters
from msdda_fast.adapters.variant import Variant
from msdda_fast.batched.exported import ExportedForward
from msdda_fast.batched.options import DEFAULTS, BatchedOptions
from msdda_fast.batched.support import check_supported
from msdda_fast.batched.unet import BatchedUNet
from msdda_fast.engine.buffers import ShapeKey, StepBuffers, padded_steps
from msdda_fast.engine.graph import Capture, StepCache
from msdda_fast.engine.noise import NoiseSource
from msdda_fast.engine.parallel import ObjectiveParallel
from msdda_fast.errors import UnsupportedNetwork
from msdda_fast.pipelines.stable_diffusion.captured_generation import (
    CapturedGeneration,
    CapturedNetwork,
)
from msdda_fast.pipelines.stable_diffusion.exact import ExactNetwork, step_kind
from msdda_fast.pipelines.stable_diffusion.fastest import fastest
from msdda_fast.pipelines.stable_diffusion.merged_network import MergedNetwork
from msdda_fast.pipelines.stable_diffusion.modes import StepPlan
from msdda_fast.pipelines.stable_diffusion.path_kl import Pilot
from msdda_fast.pipelines.stable_diffusion.rank_network import RankNetwork
from msdda_fast.steps.coefficients import CoefficientTable

__all__ = ["CapturedSampler", "Compile"]

#: True: `torch.compile`; "openvino": exact forwards through OpenVINO; "auto": through OpenVINO
#: where `CapturedSampler.keep_faster` has found that faster; False: neither.
Compile: TypeAlias = bool | Literal["auto", "openvino"]


class CapturedSampler:
    """The steps of M variants of one or more networks, for requests of any kind.

    Variants of one network share its forward; networks run side by side in the same step.

    Args:
        variants: One per objective.
        options: How the batched forward is built.
        capture: "auto", "required" or "off"; see `engine.graph.StepCache`.
        compile: How steps are compiled.
        capacity: Most shapes of requests kept.
        parallel: The processes that share the objectives; None: only this one.

    Attributes:
        device, dtype: Of the networks.
        parallel: As given.
        pilots: What pilots have measured of them; see `pilot`.

    Raises:
        AdapterMismatch, UnsupportedNetwork: A network cannot run as a batched forward.
        CaptureError: Capture is required on a device without graphs.
    """

    def __init__(
        self,
        variants: Sequence[Variant],
        *,
        options: BatchedOptions = DEFAULTS,
        capture: Capture = "auto",
        compile: Compile = "auto",
        capacity: int = 8,
        parallel: ObjectiveParallel | None = None,
    ) -> None:
        self._variants, self._options, self._compile = list(variants), options, compile
        self.parallel = parallel
        self.pilots: dict[Hashable, Pilot] = {}
        self._groups: list[tuple[LoadedAdapters, list[int]]] = []
        unet, nhwc = variants[0].network, options.channels_last
        # asked of the network, these walk all of its modules: milliseconds in each request
        self.device, self.dtype = unet.device, unet.dtype
        if self.dtype == torch.float64:
            raise UnsupportedNetwork("networks in float64 have no batched forward")
        self._channels_last = self.device.type == "cuda" if nhwc is None else nhwc
        for network in dict.fromkeys(variant.network for variant in variants):
            members = [m for m, variant in enumerate(variants) if variant.network is network]
            check_supported(network)  # the cheapest check first: it may be repeated in every call
            if self._channels_last:  # in place, once: every shape would hold a copy of its own
                network.to(memory_format=torch.channels_last)
            own = [variants[m] for m in members]
            self._groups.append((LoadedAdapters(own), members))
            BatchedUNet(self._groups[-1][0], options)  # what cannot be built is refused here
        self._cache = StepCache(
            self._build,
            device=self.device,
            capacity=capacity,
            capture=capture,
            compile=compile is True,
        )

    def __len__(self) -> int:
        return len(self._cache)

    def is_current(self, variants: Sequence[Variant]) -> bool:
        """Return whether these are the variants built, unchanged; one sync per objective."""
        same = list(variants) == self._variants
        return same and all(adapters.is_current() for adapters, _ in self._groups)

    def keep_faster(self) -> None:
        """With "auto", time the exact forwards built so far, and keep the faster way of each."""
        if self._compile != "auto" or self.device.type != "cpu":
            return
        for step in self._cache:
            if isinstance(step.network, (ExactNetwork, RankNetwork)):
                step.network.run_through(partial(fastest, x=step.buffers.next_input[0]))

    def begin(
        self,
        table: CoefficientTable,
        noise: NoiseSource,
        x_T: Tensor,
        prompt_embeds: Tensor,
        *,
        shares_text: bool,
        plan: StepPlan | None = None,
    ) -> CapturedGeneration:
        """Load a request into the step of its shape, which is built and captured the first time.

        Args:
            table: T steps, float32.
            noise: Source of z; generators draw all of z here.
            x_T: (B, C, h, w), latent units.
            prompt_embeds: (M, K, B, L, D).
            shares_text: Whether they are the same for all objectives.
            plan: Which steps are merged; None: none.

        Raises:
            InvalidShape: The step needs more memory than is free.
            CaptureError: It cannot be captured, and capture is required.
            UnsupportedNetwork: These networks cannot be merged.
            RankLost, RanksDiffer: See `ObjectiveParallel.generation`, here and in steps.
        """
        every = not self._options.sharing.inactive
        # one that no step reads, whatever the weights are, has no output: strength 0, for one
        reads = table.reads.any(0).tolist()
        active = tuple(on or (every and read) for on, read in zip(table.active, reads, strict=True))
        runs = [tuple(row) for row in (table.reads & torch.tensor(active)).tolist()]
        words = ["exact"] * len(table) if plan is None else plan.kinds
        kinds = [
            word if word == "merged" else step_kind(word, row)
            for word, row in zip(words, runs, strict=True)
        ]
        step = self._cache.prepare(
            ShapeKey(
                shape=tuple(x_T.shape),
                active=active,
                runs=tuple(sorted(set(runs))),
                branches=prompt_embeds.shape[1],
                clip_range=table.clip_range,
                dtype=self.dtype,
                channels_last=self._channels_last,
                max_steps=padded_steps(len(table)),
                noise_table=noise.seeds is None,
                context=tuple(prompt_embeds.shape),
                shared_context=shares_text,
                pixelwise=0 if table.pixels is None else len(table.pixels.own),
                mode="exact" if plan is None else "merged",
            )
        )
        z = None if noise.seeds is not None else _drawn(noise, table, x_T, self.dtype)
        conditioning = None
        if plan is not None and isinstance(step.network, MergedNetwork):
            conditioning = step.network.conditioning(table, plan)
        step.load(table, x_T, seeds=noise.seeds, noise=z, conditioning=conditioning, kinds=kinds)
        if self.parallel is not None and isinstance(step.network, RankNetwork):
            self.parallel.begin([step.network.exchanges[kind] for kind in kinds])
        shares = table.share if plan is None else plan.shares
        generation = CapturedGeneration(step, kinds, shares, shares_text=shares_text)
        generation.replace_prompt(prompt_embeds)
        return generation

    def _build(self, key: ShapeKey, buffers: StepBuffers) -> CapturedNetwork:
        network: CapturedNetwork
        if self.parallel is not None:
            network = RankNetwork(
                self.parallel,
                {
                    step_kind("exact", runs): self.parallel.exchange(
                        runs, key.branches, key.shape, key.dtype, buffers.x.device
                    )
                    for runs in key.runs
                },
                self._members,
                key.dtype,
            )
        elif key.mode == "exact":
            by_kind = {step_kind("exact", runs): self._members(runs) for runs in key.runs}
            network = ExactNetwork(by_kind, len(key.active), key.dtype)
        else:
            members = {runs: self._members(runs) for runs in key.runs}
            if len(self._members(key.active)) > 1:
                raise UnsupportedNetwork("approximate modes need objectives that share one network")
            exact = {runs: unet for runs, [(unet, _)] in members.items()}
            network = MergedNetwork(exact, key, buffers)
        nothing = torch.zeros(key.context[1:], dtype=key.dtype, device=buffers.x.device)
        embeds = {m: nothing for m, runs in enumerate(key.active) if runs}
        network.begin(embeds, buffers.timesteps, shared=key.shared_context, k=0)
        if self._compile == "openvino" and isinstance(network, (ExactNetwork, RankNetwork)):
            network.run_through(partial(ExportedForward, shape=key.shape))
        return network

    def _members(self, runs: Sequence[bool]) -> list[tuple[BatchedUNet, list[int]]]:
        """Batched forwards of the objectives that run, one per network."""
        members = []
        for adapters, objectives in self._groups:
            chosen = [i for i, m in enumerate(objectives) if m < len(runs) and runs[m]]
            if chosen:
                unet = BatchedUNet(adapters, self._options, chosen)
                members.append((unet, [objectives[i] for i in chosen]))
        return members


def _drawn(noise: NoiseSource, table: CoefficientTable, x_T: Tensor, dtype: torch.dtype) -> Tensor:
    """Draw z of all steps, (T, B, C, h, w), in the order and dtype of stock diffusers."""
    noise = noise.drawn_for(table)
    if noise.noise is not None:
        return noise.noise
    like = x_T.new_empty(x_T.shape, dtype=dtype)
    return torch.stack([noise.step(k, like)["noise"] for k in range(len(table))])
