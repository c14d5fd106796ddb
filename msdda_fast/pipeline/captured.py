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
from msdda_fast.errors import InvalidShape, UnsupportedNetwork
from msdda_fast.pipeline.batched_options import DEFAULTS, BatchedOptions
from msdda_fast.pipeline.batched_rows import Rows
from msdda_fast.pipeline.batched_unet import BatchedUNet
from msdda_fast.pipeline.loaded_adapters import LoadedAdapters
from msdda_fast.pipeline.prediction import Variant

__all__ = ["CapturedSampler", "Generation"]


class ActiveObjectives:
    """`engine.step.Network` over the batched UNet of the active objectives."""

    def __init__(self, network: BatchedUNet, active: Sequence[bool]) -> None:
        self.unet = network
        self._active = tuple(active)

    def __call__(self, next_input: Tensor, k: Tensor, /) -> list[Tensor | None]:
        """See `engine.step.Network`; the network makes its own rows, so R = 1."""
        outputs = iter(self.unet(next_input[0], k))
        return [next(outputs) if runs else None for runs in self._active]

    def storages(self) -> Mapping[str, Tensor]:
        """Weights, factors, keys and values of the prompt, time embeddings."""
        named: dict[str, Tensor] = {**dict(self.unet.named_parameters())}
        named |= dict(self.unet.named_buffers())
        for path, module in self.unet.named_modules():
            for name, value in vars(module).items():
                rows = (
                    value if isinstance(value, tuple) and not isinstance(value, Rows) else [value]
                )
                held = [entry.x for entry in rows if isinstance(entry, Rows)]
                named |= {f"{path}.{name}.{i}": tensor for i, tensor in enumerate(held)}
        return named


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
        rows = _of_active(prompt_embeds, key.active)
        if self._shared:
            if not bool((rows == rows[:1]).all()):
                raise InvalidShape(
                    "the callback gave each objective embeddings of its own, where all share one "
                    'text encoding; use set_forward("sequential")'
                )
            rows = rows[:1]
        if rows.shape != key.context:
            raise InvalidShape(
                f"embeddings have shape {tuple(rows.shape)} now, expected {key.context}"
            )
        self._network.unet.begin(rows, self._step.buffers.timesteps)


class CapturedSampler:
    """The steps of M variants of one network, for requests of any kind.

    Args:
        variants: All of one network.
        options: How its batched forward is built.
        capture: "auto", "required" or "off"; see `engine.graph`.
        compile: Pass steps through `torch.compile` before capture.
        capacity: Most shapes of requests kept.

    Raises:
        AdapterMismatch, UnsupportedNetwork: The variants cannot share a forward.
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
        self._adapters = LoadedAdapters(variants, rank_pad=options.rank_pad)
        self._options = options
        if getattr(self._adapters.unet, "_hf_hook", None) is not None:
            raise UnsupportedNetwork(
                "the network is moved between devices as it runs (offloading), so its weights have "
                "no fixed place"
            )
        BatchedUNet(self._adapters, options)  # what cannot be built is refused here
        self._cache = StepCache(
            self._build,
            device=self._adapters.unet.device,
            capacity=capacity,
            capture=capture,
            compile=compile,
        )

    def __len__(self) -> int:
        return len(self._cache)

    def is_current(self, variants: Sequence[Variant]) -> bool:
        """Whether these variants, as they are now, are what was built; one sync per objective."""
        return list(variants) == self._adapters.variants and self._adapters.is_current()

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
        unet, options = self._adapters.unet, self._options
        every = not options.sharing.inactive
        active = tuple(every or on for on in table.active)
        rows = _of_active(prompt_embeds, active)
        rows = rows[:1] if shared else rows
        nhwc = options.channels_last
        step = self._cache.prepare(
            ShapeKey(
                shape=tuple(x_T.shape),
                active=active,
                branches=rows.shape[1],
                clip_range=table.clip_range,
                dtype=unet.dtype,
                channels_last=unet.device.type == "cuda" if nhwc is None else nhwc,
                rank=max((s.down.shape[1] for s in self._adapters.stacks.values()), default=0),
                max_steps=padded_steps(len(table)),
                noise_table=noise.seeds is None,
                context=tuple(rows.shape),
            )
        )
        z = None if noise.seeds is not None else _drawn(noise, table, x_T, unet.dtype)
        step.load(table, x_T, seeds=noise.seeds, noise=z)
        generation = Generation(step, shared)
        generation.replace_prompt(prompt_embeds)
        return generation

    def _build(self, key: ShapeKey, buffers: StepBuffers) -> ActiveObjectives:
        unet = self._adapters.unet
        chosen = [m for m, runs in enumerate(key.active) if runs]
        network = BatchedUNet(self._adapters, self._options, chosen)
        prompt = torch.zeros(key.context, dtype=unet.dtype, device=unet.device)
        network.begin(prompt, buffers.timesteps)
        return ActiveObjectives(network, key.active)


def _of_active(prompt_embeds: Tensor, active: Sequence[bool]) -> Tensor:
    return prompt_embeds[[m for m, runs in enumerate(active) if runs]]


def _drawn(noise: NoiseSource, table: CoefficientTable, x_T: Tensor, dtype: torch.dtype) -> Tensor:
    """z of all steps (T, B, C, h, w), drawn in the order and dtype of stock diffusers."""
    if noise.noise is not None:
        return noise.noise
    like = x_T.new_empty(x_T.shape, dtype=dtype)
    return torch.stack([noise.step(k, like)["noise"] for k in range(len(table))])
