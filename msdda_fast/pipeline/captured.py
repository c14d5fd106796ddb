# SPDX-License-Identifier: Apache-2.0
"""Generations on captured steps: one forward for all objectives, one graph for all steps.

A pipeline keeps one `CapturedSampler`. It builds a network per shape of request, and captures its
step where the device has graphs; on the CPU the same step runs eagerly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from msdda_fast.coefficients import CoefficientTable
from msdda_fast.engine.buffers import ShapeKey, StepBuffers, padded_steps
from msdda_fast.engine.graph import Capture, CapturedStep, StepCache
from msdda_fast.engine.noise import NoiseSource
from msdda_fast.engine.side_by_side import SideBySide
from msdda_fast.errors import InvalidShape, UnsupportedNetwork
from msdda_fast.pipeline.batched_options import DEFAULTS, BatchedOptions
from msdda_fast.pipeline.batched_rows import Rows
from msdda_fast.pipeline.batched_unet import BatchedUNet
from msdda_fast.pipeline.loaded_adapters import LoadedAdapters
from msdda_fast.pipeline.prediction import Variant

__all__ = ["CapturedSampler", "Generation"]


class OneNetwork:
    """`engine.step.Network` over the batched forward of the objectives that share a network."""

    def __init__(self, unet: BatchedUNet, dtype: torch.dtype) -> None:
        self.unet = unet
        self._dtype = dtype

    def __call__(self, next_input: Tensor, k: Tensor, /) -> Tensor:
        """See `engine.step.Network`; the network makes its own rows, so R = 1."""
        outputs: Tensor = self.unet(next_input[0], k)
        return outputs.to(self._dtype)

    def storages(self) -> Mapping[str, Tensor]:
        """Weights, factors, keys and values of the prompt, time embeddings."""
        named = dict(self.unet.named_parameters()) | dict(self.unet.named_buffers())
        for path, module in self.unet.named_modules():
            for name, value in vars(module).items():
                alone = isinstance(value, Rows) or not isinstance(value, tuple)
                rows = [entry for entry in ([value] if alone else value) if isinstance(entry, Rows)]
                named |= {f"{path}.{name}.{i}": entry.x for i, entry in enumerate(rows)}
        return named


class ActiveObjectives:
    """`engine.step.Network` of all objectives: those of one network in one forward.

    Args:
        members: By network, its batched forward and the objectives that it runs.
        count: M; the others have no output.
        dtype: Of the outputs.
    """

    def __init__(
        self, members: Sequence[tuple[BatchedUNet, Sequence[int]]], count: int, dtype: torch.dtype
    ) -> None:
        self._members = members
        self._count = count
        self._side_by_side = SideBySide([OneNetwork(unet, dtype) for unet, _ in members])

    def begin(self, embeds: Mapping[int, Tensor], timesteps: Tensor, *, shared: bool) -> None:
        """Start a generation; see `BatchedUNet.begin`.

        Args:
            embeds: (K, B, L, D) by active objective.
            timesteps: (T,) int64.
            shared: Whether they are the same for all objectives.
        """
        for unet, objectives in self._members:
            rows = [embeds[m] for m in objectives]
            unet.begin(torch.stack(rows[:1] if shared else rows), timesteps)

    def __call__(self, next_input: Tensor, k: Tensor, /) -> list[Tensor | None]:
        """See `engine.step.Network`."""
        outputs: list[Tensor | None] = [None] * self._count
        order = [m for _, objectives in self._members for m in objectives]
        for m, output in zip(order, self._side_by_side(next_input, k), strict=True):
            outputs[m] = output
        return outputs

    def storages(self) -> Mapping[str, Tensor]:
        """See `engine.step.Network`."""
        return self._side_by_side.storages()


class Generation:
    """One loaded request: run its steps, looking in between."""

    def __init__(self, step: CapturedStep, shared: bool) -> None:
        assert isinstance(step.network, ActiveObjectives)
        self._step, self._network, self._shared = step, step.network, shared

    @property
    def x(self) -> Tensor:
        """The state, (B, C, h, w) float32; the next step overwrites it."""
        return self._step.buffers.x

    def steps(self) -> Iterator[int]:
        """See `CapturedStep.steps`."""
        return self._step.steps()

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
        self._network.begin(embeds, self._step.buffers.timesteps, shared=self._shared)


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
    ) -> Generation:
        """Write a request into the step of its shape, which is built and captured the first time.

        Args:
            table: T steps, float32.
            noise: Source of z; generators draw all of it here.
            x_T: (B, C, h, w), latent units.
            prompt_embeds: (M, K, B, L, D).
            shared: Whether they are the same for all objectives.

        Raises:
            InvalidShape: The step needs more memory than there is.
            CaptureError: It cannot be captured, and that is required.
        """
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
            )
        )
        z = None if noise.seeds is not None else _drawn(noise, table, x_T, unet.dtype)
        step.load(table, x_T, seeds=noise.seeds, noise=z)
        generation = Generation(step, shared)
        generation.replace_prompt(prompt_embeds)
        return generation

    def _build(self, key: ShapeKey, buffers: StepBuffers) -> ActiveObjectives:
        members = []
        for adapters, objectives in self._groups:
            chosen = [i for i, m in enumerate(objectives) if key.active[m]]
            if chosen:
                unet = BatchedUNet(adapters, self._options, chosen)
                members.append((unet, [objectives[i] for i in chosen]))
        network = ActiveObjectives(members, len(key.active), key.dtype)
        nothing = torch.zeros(key.context[1:], dtype=key.dtype, device=self._unet.device)
        embeds = {m: nothing for m, runs in enumerate(key.active) if runs}
        network.begin(embeds, buffers.timesteps, shared=key.shared_context)
        return network


def _drawn(noise: NoiseSource, table: CoefficientTable, x_T: Tensor, dtype: torch.dtype) -> Tensor:
    """z of all steps (T, B, C, h, w), drawn in the order and dtype of stock diffusers."""
    if noise.noise is not None:
        return noise.noise
    like = x_T.new_empty(x_T.shape, dtype=dtype)
    return torch.stack([noise.step(k, like)["noise"] for k in range(len(table))])
