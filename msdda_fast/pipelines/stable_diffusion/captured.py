# SPDX-License-Identifier: Apache-2.0
"""Generations on captured steps: one forward for all objectives, one graph for all steps.

A pipeline keeps one `CapturedSampler`. It builds a network per shape of request, and captures its
step where the device has graphs; on the CPU the same step runs eagerly. Approximate modes have a
graph per kind of step; see `modes`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from msdda_fast.adapters.loaded import LoadedAdapters
from msdda_fast.adapters.variant import Variant
from msdda_fast.batched.options import DEFAULTS, BatchedOptions
from msdda_fast.batched.unet import BatchedUNet
from msdda_fast.engine.buffers import ShapeKey, StepBuffers, padded_steps
from msdda_fast.engine.graph import Capture, CapturedStep, StepCache
from msdda_fast.engine.noise import NoiseSource
from msdda_fast.errors import InvalidShape, UnsupportedNetwork
from msdda_fast.pipelines.stable_diffusion.active_objectives import ActiveObjectives
from msdda_fast.pipelines.stable_diffusion.modes import Mode, ModeNetwork, plan
from msdda_fast.steps.coefficients import CoefficientTable

__all__ = ["CapturedSampler", "Generation"]


class Generation:
    """One loaded request: run its steps, looking in between."""

    def __init__(self, step: CapturedStep, table: CoefficientTable, shared: bool) -> None:
        network = step.network
        assert isinstance(network, (ActiveObjectives, ModeNetwork))
        self._step, self._network, self._shared = step, network, shared
        self._size = table.share.shape[:2]
        changes = (table.share[1:] != table.share[:-1]).flatten(1).any(1).tolist()
        self._reweighted = [False, *changes, False]  # whether shares change before step k
        self._next = 0

    @property
    def x(self) -> Tensor:
        """The state, (B, C, h, w) float32; the next step overwrites it."""
        return self._step.buffers.x

    @property
    def step_kl(self) -> Tensor:
        """Estimated KL divergence of each step so far from the exact one, (T, B) nats; a copy."""
        if isinstance(self._network, ModeNetwork):
            return self._network.step_kl[: self._size[0]].clone()
        return self.x.new_zeros(self._size)

    def steps(self) -> Iterator[int]:
        """See `CapturedStep.steps`."""
        for k in self._step.steps():
            self._next = k + 1
            yield k
            if self._reweighted[k + 1] and isinstance(self._network, ModeNetwork):
                self._network.mix(k + 1)

    def replace_x(self, x: Tensor) -> None:
        """Go on from another state, between two steps."""
        self._step.buffers.replace_x(x)

    def replace_prompt(self, prompt_embeds: Tensor) -> None:
        """Go on with other embeddings (M, K, B, L, D), between two steps.

        Raises:
            InvalidShape: Another shape; or they differ between objectives, and did not before.
        """
        key = self._step.buffers.key
        if prompt_embeds.shape != key.context:
            raise InvalidShape(
                f"embeddings have shape {tuple(prompt_embeds.shape)} now, expected {key.context}"
            )
        embeds = {m: prompt_embeds[m] for m, runs in enumerate(key.active) if runs}
        first = next(iter(embeds.values()))
        if self._shared and not all(bool((rows == first).all()) for rows in embeds.values()):
            raise InvalidShape(
                "the callback gave each objective embeddings of its own, where all share one text "
                'encoding; use set_forward("sequential")'
            )
        timesteps = self._step.buffers.timesteps
        if isinstance(self._network, ModeNetwork):
            self._network.begin(embeds, timesteps, shared=self._shared, k=self._next)
        else:
            self._network.begin(embeds, timesteps, shared=self._shared)


class CapturedSampler:
    """The steps of M variants of one or more networks, for requests of any kind.

    Variants of one network share its forward; networks run side by side in the same step.

    Args:
        variants: One per objective.
        options: How its batched forward is built.
        capture: "auto", "required" or "off"; see `engine.graph`.
        compile: Pass steps through `torch.compile` before capture.
        capacity: Most shapes of requests kept.

    Raises:
        AdapterMismatch, UnsupportedNetwork: A network that has no batched forward.
        CaptureError: Capture is required on a device without graphs.
    """

    def __init__(
        self,
        variants: Sequence[Variant],
        *,
        options: BatchedOptions = DEFAULTS,
        capture: Capture = "auto",
        compile: bool = False,
        capacity: int = 8,
    ) -> None:
        self._variants, self._options = list(variants), options
        self._groups: list[tuple[LoadedAdapters, list[int]]] = []
        for network in dict.fromkeys(variant.network for variant in variants):
            members = [m for m, variant in enumerate(variants) if variant.network is network]
            if getattr(network, "_hf_hook", None) is not None:
                raise UnsupportedNetwork(
                    "a network is moved between devices as it runs (offloading), so its weights "
                    "have no fixed place"
                )
            own = [variants[m] for m in members]
            self._groups.append((LoadedAdapters(own, rank_pad=options.rank_pad), members))
            BatchedUNet(self._groups[-1][0], options)  # what cannot be built is refused here
        self._unet = variants[0].network
        self._cache = StepCache(
            self._build,
            device=self._unet.device,
            capacity=capacity,
            capture=capture,
            compile=compile,
        )

    def __len__(self) -> int:
        return len(self._cache)

    def is_current(self, variants: Sequence[Variant]) -> bool:
        """Whether these variants, as they are now, are what was built; one sync per objective."""
        same = list(variants) == self._variants
        return same and all(adapters.is_current() for adapters, _ in self._groups)

    def begin(
        self,
        table: CoefficientTable,
        noise: NoiseSource,
        x_T: Tensor,
        prompt_embeds: Tensor,
        *,
        shared: bool,
        mode: Mode = "exact",
    ) -> Generation:
        """Write a request into the step of its shape, which is built and captured the first time.

        Args:
            table: T steps, float32.
            noise: Source of z; generators draw all of it here.
            x_T: (B, C, h, w), latent units.
            prompt_embeds: (M, K, B, L, D).
            shared: Whether they are the same for all objectives.
            mode: See `modes`.

        Raises:
            InvalidShape: The step needs more memory than there is.
            CaptureError: It cannot be captured, and that is required.
            UnsupportedNetwork: The mode is approximate, and cannot run these networks.
        """
        kinds = plan(mode, table)
        exact = all(kind == "exact" for kind in kinds)
        unet, options = self._unet, self._options
        every, nhwc = not options.sharing.inactive, options.channels_last
        ranks = [s.down.shape[1] for adapters, _ in self._groups for s in adapters.stacks.values()]
        step = self._cache.prepare(
            ShapeKey(
                shape=tuple(x_T.shape),
                active=tuple(every or on for on in table.active),
                branches=prompt_embeds.shape[1],
                clip_range=table.clip_range,
                dtype=unet.dtype,
                channels_last=unet.device.type == "cuda" if nhwc is None else nhwc,
                rank=max(ranks, default=0),
                max_steps=padded_steps(len(table)),
                noise_table=noise.seeds is None,
                context=tuple(prompt_embeds.shape),
                shared_context=shared,
                mode="exact" if exact else "staggered" if mode == "staggered" else "merged",
            )
        )
        z = None if noise.seeds is not None else _drawn(noise, table, x_T, unet.dtype)
        conditioning = {}
        if isinstance(step.network, ModeNetwork):
            conditioning = step.network.conditioning(table)
        step.load(table, x_T, seeds=noise.seeds, noise=z, conditioning=conditioning, kinds=kinds)
        generation = Generation(step, table, shared)
        generation.replace_prompt(prompt_embeds)
        return generation

    def _build(self, key: ShapeKey, buffers: StepBuffers) -> ActiveObjectives | ModeNetwork:
        members = []
        for adapters, objectives in self._groups:
            chosen = [i for i, m in enumerate(objectives) if key.active[m]]
            if chosen:
                unet = BatchedUNet(adapters, self._options, chosen)
                members.append((unet, [objectives[i] for i in chosen]))
        nothing = torch.zeros(key.context[1:], dtype=key.dtype, device=self._unet.device)
        embeds = {m: nothing for m, runs in enumerate(key.active) if runs}
        if key.mode == "exact":
            network = ActiveObjectives(members, len(key.active), key.dtype)
            network.begin(embeds, buffers.timesteps, shared=key.shared_context)
            return network
        if len(self._groups) > 1:
            raise UnsupportedNetwork("modes do not run objectives with networks of their own")
        approximate = ModeNetwork(members[0][0], key, buffers)
        approximate.begin(embeds, buffers.timesteps, shared=key.shared_context, k=0)
        return approximate


def _drawn(noise: NoiseSource, table: CoefficientTable, x_T: Tensor, dtype: torch.dtype) -> Tensor:
    """z of all steps (T, B, C, h, w), drawn in the order and dtype of stock diffusers."""
    if noise.noise is not None:
        return noise.noise
    like = x_T.new_empty(x_T.shape, dtype=dtype)
    return torch.stack([noise.step(k, like)["noise"] for k in range(len(table))])
