# SPDX-License-Identifier: Apache-2.0
"""What every pipeline with objectives can do: load, save, move, prepare and decode."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from msdda_fast.adapters.layers import check_can_switch
from msdda_fast.adapters.switching import adapter_names
from msdda_fast.adapters.variant import Variant
from msdda_fast.batched.options import DEFAULTS, BatchedOptions
from msdda_fast.engine.graph import Capture
from msdda_fast.errors import InvalidMode
from msdda_fast.objective import Objective
from msdda_fast.pipelines import loading, saving
from msdda_fast.pipelines.accelerator import Accelerator
from msdda_fast.pipelines.attach_plan import attach_plan
from msdda_fast.pipelines.dtypes import Dtypes
from msdda_fast.pipelines.exclusive import exclusively
from msdda_fast.pipelines.in_parallel import ParallelMethods
from msdda_fast.pipelines.runnable import check_runnable
from msdda_fast.pipelines.stable_diffusion.accelerated import BASE
from msdda_fast.pipelines.stable_diffusion.adapter_methods import AdapterMethods
from msdda_fast.pipelines.stable_diffusion.captured import Compile
from msdda_fast.pipelines.stable_diffusion.decoding import decode
from msdda_fast.pipelines.stable_diffusion.forward import Forward, ForwardSettings, Runner
from msdda_fast.pipelines.stable_diffusion.held_adapters import HeldAdapters
from msdda_fast.pipelines.stable_diffusion.modes import Mode
from msdda_fast.pipelines.stable_diffusion.sampling import Networks
from msdda_fast.pipelines.stable_diffusion.warm_up import warm_up

__all__ = ["MultiObjectivePipeline"]


class MultiObjectivePipeline(AdapterMethods, ParallelMethods, DiffusionPipeline):  # type: ignore[misc]  # no types
    """Mixin before a diffusers pipeline, for a UNet and adapters or networks by objective."""

    _objectives: dict[str, Objective]
    _variants: dict[str, Variant]
    _follows: frozenset[str]  # objectives whose network is whatever `unet` is
    _shares_networks: bool = False  # with a pipeline that `from_pipe` was given
    _runner: Runner = Runner(ForwardSettings())

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        objectives: Mapping[str, Objective] | None = None,
        dtype: Dtypes | None = None,
        torch_dtype: Dtypes | None = None,
        accelerator: str | Path | None = None,
        **options: Any,  # noqa: ANN401 - diffusers' own: components, revision, cache_dir, ...
    ) -> Self:
        """Load a model and its objectives.

        Stable Diffusion 1 and 2 come back as this class; any other pipeline of diffusers as its own
        class with objectives (`pipelines.attach`).

        Args:
            pretrained_model_name_or_path: Hub id, local folder in diffusers' layout, or a shipped
                model: `msdda-fast/emoji` or `msdda-fast/emoji-flow`.
            objectives: Objectives by name, in order; None: those of the model's `objectives.json`,
                or only the base model if there is no such file.
            dtype: Dtype of all components, float32 by default, or a mapping from their names, in
                which "default" stands for the others. `torch_dtype` is its older name.
            accelerator: LoRA file, folder or hub id of an adapter for few steps, or "own" for the
                one that the model ships with. It joins every objective, and the base, and the
                scheduler becomes the one that it was made for: see `docs/guide/few-steps.md`.
            options: Everything else that `DiffusionPipeline.from_pretrained` takes. A component
                given as None is left out: without the unet, such a pipeline encodes prompts only.

        Raises:
            FileNotFoundError: The model, an adapter or a network is missing.
            AdapterMismatch: An adapter was made for another base; names the first such module.
            ValueError: Invalid objectives, a file that is not safetensors, an unsupported dtype, or
                another kind of pipeline.
        """
        plan = loading.plan(
            pretrained_model_name_or_path, objectives, dtype, torch_dtype, accelerator, options
        )
        if plan.kind not in loading.STABLE_DIFFUSION:
            stock = DiffusionPipeline.from_pretrained(plan.model, **plan.options)
            attached: Any = attach_plan(stock, plan)
            return attached  # type: ignore[no-any-return]
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
        and full networks go to `objectives/<name>/`, and `objectives.json` lists them. Weights are
        written in the dtype they have; whoever loads the folder gets float32 unless another dtype
        is asked for. Everything is written next to the folder first: a failed save does not change
        it.

        Args:
            save_directory: Created if missing; files of an earlier save are replaced.
            safe_serialization, variant, max_shard_size: As in diffusers.
        """
        self._held.check(self.all_variants, self.text_encoder)
        saving.save(
            self,
            Path(save_directory),
            safe_serialization=safe_serialization,
            variant=variant,
            max_shard_size=max_shard_size,
        )

    @property
    def objectives(self) -> dict[str, Objective]:
        """The objectives by name, in the order of the columns of `weights`."""
        return dict(self._objectives)

    @property
    def variants(self) -> dict[str, Variant]:
        """The network and the active adapter of each objective, as `unet` is now."""
        for name in self._follows:
            if self._variants[name].network is not self.unet:  # and the old one may be freed
                self._variants[name] = replace(self._variants[name], network=self.unet)
        return dict(self._variants)

    def set_objectives(
        self,
        objectives: Mapping[str, Objective],
        variants: Mapping[str, Variant],
        accelerator: Accelerator | None = None,
        base: Variant | None = None,
    ) -> None:
        """Replace the objectives with others whose networks and adapters are already loaded.

        A variant of the pipeline's UNet is one of whatever UNet is assigned to it later. With an
        accelerator, `base` is the base with it, and every variant includes it.

        Raises:
            UnsupportedNetwork: A network needs more than latents, a timestep and a text.
        """
        for variant in variants.values():
            if variant.network is not None:  # a pipeline without one can encode prompts
                check_runnable(variant.network)
        self._objectives, self._variants = dict(objectives), dict(variants)
        self._follows = frozenset(
            name
            for name, variant in variants.items()
            if variant.network is self.unet and objectives[name].unet is None
        )
        self._accelerator, self._base = accelerator, base or Variant(self.unet, None)
        spare = None if self._shares_networks else frozenset[str]()
        self._held = HeldAdapters.of(self.all_variants, self.text_encoder, spare)
        self.watch_adapters()

    def shared_networks(self) -> list[nn.Module | None]:
        """The networks that a call switches; threads that use one of them wait for each other."""
        return [self.unet, self.text_encoder, *(v.network for v in self.variants.values())]

    def set_forward(
        self,
        forward: Forward = "auto",
        *,
        capture: Capture = "auto",
        compile: Compile = "auto",
        options: BatchedOptions = DEFAULTS,
    ) -> None:
        """Choose how the objectives' networks run in later calls.

        Args:
            forward: "batched" runs all objectives in one forward, and raises if that is impossible;
                "sequential" runs one after another, as stock pipelines run them; "auto" is batched
                where possible, and logs a warning where it is not.
            capture: Whether to capture the batched step as a graph: "auto" where possible,
                "required" (raise otherwise) or "off".
            compile: "openvino" runs exact steps through OpenVINO (CPU, float32; needs the extra
                `openvino`), True through `torch.compile`, False neither; "auto" is OpenVINO where
                `prepare` has found that faster.
            options: How the batched forward is built.

        Raises:
            ValueError: `forward`, `capture` or `compile` is unknown.
        """
        self._runner = Runner(
            ForwardSettings(forward=forward, capture=capture, compile=compile, options=options)
        )

    @property
    def forward_settings(self) -> ForwardSettings:
        """The settings of the last `set_forward`."""
        return self._runner.settings

    def networks(
        self, mode: Mode = "exact", *, with_base: bool = False, runner: Runner | None = None
    ) -> Networks:
        """Return what evaluates a request: the batched forward, or one network after another.

        Args:
            mode: Mode of the request; approximate modes need the batched forward.
            with_base: Whether the base is one more objective, at the end.
            runner: Keeps the batched forward; None: this pipeline's own.

        Raises:
            AdapterMismatch: An objective's adapter is not in its network any more, or is fused into
                it, or another one was loaded or activated that is no objective.
            UnsupportedNetwork: A network needs more than latents, a timestep and a text.
            AdapterMismatch, UnsupportedNetwork: The objectives cannot share a forward, as required.
            InvalidMode: The mode is approximate, and the networks are in float64.
            CaptureError: Graphs are required on a device without them.
        """
        variants, base = self.variants, self.base_variant
        loaded = list(variants.values())
        if with_base:
            variants[BASE] = base
        if with_base or any(variant.network is self.unet for variant in loaded):
            loaded.append(base)  # always: a request that needs it shall not build anew
        for network in dict.fromkeys(variant.network for variant in variants.values()):
            check_runnable(network)
        self._held.check(self.all_variants, self.text_encoder)
        if mode != "exact" and self.unet.dtype == torch.float64:
            raise InvalidMode(f'a float64 network samples with mode="exact" only, got {mode!r}')
        with exclusively(self.shared_networks()):
            sampler = (runner or self._runner).sampler(
                loaded, required=mode != "exact", parallel=self._parallel
            )
            for variant in variants.values():
                if sampler is None:
                    check_can_switch(variant)
                if variant.adapter in adapter_names(self.text_encoder):
                    check_can_switch(variant, self.text_encoder)
        self._held.check_activation([self.unet, self.text_encoder])
        return Networks(
            variants=variants,
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
        for variant in self.variants.values():
            if variant.network is not self.unet:
                kwargs.pop("silence_dtype_warnings", None)
                variant.network.to(*args, **kwargs)
        return self

    def to_images(self, x_0: Tensor, output_type: str = "pil") -> tuple[Any, list[bool] | None]:
        """Turn latents into images and the safety checker's flags.

        Args:
            x_0: (B, C, h, w), as sampled.
            output_type: As in the call; "latent" returns `x_0` itself.

        Returns: The images, and for each whether it was blackened (None without a safety checker).
        """
        if output_type == "latent":
            return x_0, None
        image, flagged = self.run_safety_checker(decode(self.vae, x_0), x_0.device, self.vae.dtype)
        # a flagged image is black already; it must not be rescaled from [-1, 1]
        normalised = [True] * len(image) if flagged is None else [not flag for flag in flagged]
        images = self.image_processor.postprocess(image, output_type, do_denormalize=normalised)
        return images, flagged

    def prepare(
        self,
        batch_size: int = 1,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        mode: Mode = "exact",
    ) -> None:
        """Check a shape of requests, and run one step of it with every objective to warm up.

        So are batched forwards of fewer objectives (`warm_up`). On devices with graphs, all kinds
        of step are captured; on a CPU they are timed, and run through OpenVINO from then on where
        that is installed and faster. With mode "auto" the pilot is drawn that later calls use.

        Args:
            batch_size: B, the number of images.
            height, width, num_inference_steps, mode: As in the call, which says what it raises.
        """
        warm_up(self, batch_size, height, width, num_inference_steps, mode=mode)
        with exclusively(self.shared_networks()):
            self._runner.keep_faster()
