# SPDX-License-Identifier: Apache-2.0
"""What a pipeline of any kind has once it holds objectives: load, save, place, prepare."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from msdda_fast.adapters.variant import Variant
from msdda_fast.batched.options import DEFAULTS, BatchedOptions
from msdda_fast.engine.graph import Capture
from msdda_fast.engine.parallel import ObjectiveParallel
from msdda_fast.errors import InvalidMode
from msdda_fast.objective import Objective
from msdda_fast.pipelines import loading, saving
from msdda_fast.pipelines.stable_diffusion.forward import Forward, ForwardSettings, Runner
from msdda_fast.pipelines.stable_diffusion.modes import Mode
from msdda_fast.pipelines.stable_diffusion.sampling import Networks

__all__ = ["MultiObjectivePipeline"]


class MultiObjectivePipeline(DiffusionPipeline):  # type: ignore[misc]  # diffusers ships no types
    """Mixed in before a diffusers pipeline: one UNet, and adapters or networks by objective."""

    _objectives: dict[str, Objective]
    _variants: dict[str, Variant]
    _parallel: ObjectiveParallel | None = None
    _runner: Runner = Runner(ForwardSettings())

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        objectives: Mapping[str, Objective] | None = None,
        dtype: torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
        **options: Any,  # noqa: ANN401 - diffusers' own: components, revision, cache_dir, ...
    ) -> Self:
        """Load a model and its objectives.

        Args:
            pretrained_model_name_or_path: Hub id, local folder in diffusers' layout, or the shipped
                model `msdda-fast/emoji`.
            objectives: Objectives by name, in order; None takes the model's own `objectives.json`,
                and the base model alone where there is none.
            dtype: Of all components; float32 by default. `torch_dtype` is its older name.
            options: Everything else that `DiffusionPipeline.from_pretrained` takes.

        Raises:
            FileNotFoundError: The model, an adapter or a network is not there.
            AdapterMismatch: An adapter was made for another base; names the first such module.
            ValueError: Objectives that are none, a file that is not safetensors, another dtype, or
                a pipeline of another kind.
        """
        plan = loading.plan(pretrained_model_name_or_path, objectives, dtype, torch_dtype, options)
        pipe: Self = super().from_pretrained(plan.model, **plan.options)
        return loading.attach(pipe, plan)

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
    ) -> None:
        """Write a `StableDiffusionPipeline` folder with the objectives beside it.

        The base is written without its adapters, so stock diffusers loads the folder too; adapters
        and full networks go to `objectives/<name>/`, and `objectives.json` lists them. Everything
        is written next to the folder first: a failed save leaves it as it was.

        Args:
            save_directory: Made if missing; files of an earlier save are replaced.
            safe_serialization, variant, max_shard_size: As in diffusers.
        """
        saving.save(
            self,
            Path(save_directory),
            safe_serialization=safe_serialization,
            variant=variant,
            max_shard_size=max_shard_size,
        )

    @property
    def objectives(self) -> dict[str, Objective]:
        """The objectives by name; their order is that of the columns of `weights`."""
        return dict(self._objectives)

    @property
    def variants(self) -> dict[str, Variant]:
        """By objective, the network that runs and the adapter active in it."""
        return dict(self._variants)

    def set_objectives(
        self, objectives: Mapping[str, Objective], variants: Mapping[str, Variant]
    ) -> None:
        """Replace the objectives by others whose networks and adapters are in memory already."""
        self._objectives, self._variants = dict(objectives), dict(variants)

    @property
    def parallel(self) -> ObjectiveParallel | None:
        """The processes that this one samples with, or None: alone."""
        return self._parallel

    def enable_parallel(self, parallel: ObjectiveParallel) -> None:
        """Share the objectives of every later call out over several processes.

        All of them must hold the same model, and make the same calls; each gets the images. More
        than one pipeline may use `parallel`, which belongs to the caller.
        """
        self._parallel = parallel

    def disable_parallel(self) -> None:
        """Sample alone again. Every process of the group must do so."""
        self._parallel = None

    def set_forward(
        self,
        forward: Forward = "auto",
        *,
        capture: Capture = "auto",
        compile: bool = False,
        options: BatchedOptions = DEFAULTS,
    ) -> None:
        """Choose how the objectives' networks run in later calls.

        Args:
            forward: See `Forward`. "batched" raises where "auto" would run one after another.
            capture: Of the batched step as a graph, where the device has them: "auto", "required"
                or "off".
            compile: Pass the batched step through `torch.compile`.
            options: How the batched forward is built.

        Raises:
            ValueError: Another word than those.
        """
        self._runner = Runner(
            ForwardSettings(forward=forward, capture=capture, compile=compile, options=options)
        )

    @property
    def forward_settings(self) -> ForwardSettings:
        """What `set_forward` was last called with."""
        return self._runner.settings

    def networks(self, mode: Mode = "exact", *, runner: Runner | None = None) -> Networks:
        """What evaluates a request now: the batched forward, or the networks one after another.

        Args:
            mode: Of the request; approximate ones have no other than the batched forward.
            runner: Keeps the batched forward; None: this pipeline's own.

        Raises:
            AdapterMismatch, UnsupportedNetwork: The objectives cannot share a forward, which the
                mode or `set_forward("batched")` asks for.
            InvalidMode: The mode is approximate, and the networks are in float64.
            CaptureError: Graphs are required on a device without them.
        """
        sampler = None
        if mode != "exact" and self.unet.dtype == torch.float64:
            raise InvalidMode(f'a float64 network samples with mode="exact" only, got {mode!r}')
        if self._parallel is None:
            variants = list(self._variants.values())
            sampler = (runner or self._runner).sampler(variants, required=mode != "exact")
        return Networks(
            variants=self._variants,
            text_encoder=self.text_encoder,
            encode_prompt=self.encode_prompt,
            device=self._execution_device if sampler is None else sampler.device,
            dtype=self.unet.dtype if sampler is None else sampler.dtype,
            sampler=sampler,
            parallel=self._parallel,
        )

    def to(self, *args: Any, **kwargs: Any) -> Self:  # noqa: ANN401 - diffusers' signature
        """Move or cast every component and every objective's own network."""
        super().to(*args, **kwargs)
        for variant in self._variants.values():
            if variant.network is not self.unet:
                kwargs.pop("silence_dtype_warnings", None)
                variant.network.to(*args, **kwargs)
        return self

    def prepare(
        self,
        batch_size: int = 1,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        mode: Mode = "exact",
    ) -> None:
        """Check a shape of requests, and run one step of it with every objective to warm it up.

        Where the device has graphs, all kinds of steps of the mode are captured.

        Args:
            batch_size: B, the number of images.
            height, width, num_inference_steps, mode: As in the call.

        Raises:
            InvalidShape, InvalidSchedule, InvalidMode: As the call.
        """

        def stop(pipe: Self, k: int, t: Tensor, tensors: dict[str, Any]) -> None:
            pipe._interrupt = True

        shown = getattr(self, "_progress_bar_config", {})
        self.set_progress_bar_config(disable=True)
        try:
            self(
                [""] * batch_size,
                height,
                width,
                num_inference_steps,
                mode=mode,
                seed=0,
                zero_variance="dominate",
                output_type="latent",
                callback_on_step_end=stop,
            )
        finally:
            self.set_progress_bar_config(**shown)
