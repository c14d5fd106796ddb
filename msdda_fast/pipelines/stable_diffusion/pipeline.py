# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion 1.x and 2.x with several objectives, balanced per request (Algorithm 1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DiffusionPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from diffusers.schedulers import KarrasDiffusionSchedulers
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from msdda_fast.adapters.variant import Variant
from msdda_fast.engine.noise import image_seeds, noise_source
from msdda_fast.objective import Objective
from msdda_fast.pipelines import request
from msdda_fast.pipelines.already_loaded import attach_loaded
from msdda_fast.pipelines.attach import attach_as_it_is
from msdda_fast.pipelines.carried_over import shared_components
from msdda_fast.pipelines.dtypes import Dtypes, cast, check_dtypes
from msdda_fast.pipelines.exclusive import one_at_a_time
from msdda_fast.pipelines.preferences import StrengthsLike
from msdda_fast.pipelines.prompts import Prompts
from msdda_fast.pipelines.regions import MasksLike
from msdda_fast.pipelines.schedulers import sampling_levels, sampling_scheduler
from msdda_fast.pipelines.stable_diffusion.callback import Callback, StepCallback
from msdda_fast.pipelines.stable_diffusion.modes import Mode, check_mode
from msdda_fast.pipelines.stable_diffusion.multi_objective import MultiObjectivePipeline
from msdda_fast.pipelines.stable_diffusion.output import answer, receipt
from msdda_fast.pipelines.stable_diffusion.pilot import planned
from msdda_fast.pipelines.stable_diffusion.sampling import PromptedGeneration, Request, sample
from msdda_fast.pipelines.stable_diffusion.tables import Tables
from msdda_fast.types import Fusion, GeneratorLike, SeedsLike, WeightSchedule, ZeroVariancePolicy

__all__ = ["MSDDAPipeline"]


class MSDDAPipeline(MultiObjectivePipeline, StableDiffusionPipeline):  # type: ignore[misc]
    r"""Text to image with M aligned objectives, fused exactly in every reverse step.

    Each step draws from the normalised product of the objectives' posteriors (Theorem 1, Eq. 7),

        p_w(x_{t-1} | x_t) ~ prod_i p_i(x_{t-1} | x_t)^{w_i},

    with preferences w chosen per call and per prompt. Components, loading, placement and the call
    follow `diffusers.StableDiffusionPipeline`; latents stay float32 between steps whatever the
    dtype of the networks (float64 when that is float64).

    A pipeline made by this constructor has the base model as its only objective. Use
    `from_pretrained` or `from_pipe` for more.

    Args:
        vae, text_encoder, tokenizer, unet: As in `StableDiffusionPipeline`; None leaves one out,
            and what needs it is refused: without unet or scheduler, prompts can be encoded.
        scheduler: DDIM, LCM or TCD; PNDM and DDPM are rebuilt as DDIM, others are refused.
        safety_checker, feature_extractor, image_encoder, requires_safety_checker: Optional, as in
            `StableDiffusionPipeline`.
    """

    def __init__(
        self,
        vae: AutoencoderKL | AutoencoderTiny,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        safety_checker: StableDiffusionSafetyChecker | None,
        feature_extractor: CLIPImageProcessor | None,
        image_encoder: CLIPVisionModelWithProjection = None,
        requires_safety_checker: bool = True,
    ) -> None:
        super().__init__(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=None if scheduler is None else sampling_scheduler(scheduler),
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
            requires_safety_checker=requires_safety_checker,
        )
        self.set_objectives({"base": Objective.base()}, {"base": Variant(unet, None)})

    @classmethod
    def from_pipe(
        cls,
        pipeline: DiffusionPipeline,
        *,
        objectives: Mapping[str, Objective] | None = None,
        dtype: Dtypes | None = None,
        torch_dtype: Dtypes | None = None,
        **components: Any,  # noqa: ANN401 - modules by name
    ) -> Self:
        """Share the modules of a loaded pipeline, which stays usable and is not changed.

        A `StableDiffusionPipeline` gives this class; any other pipeline (image to image, SDXL,
        flow models, video, ...) its own class with objectives (`pipelines.attach`).

        Args:
            pipeline: Any of diffusers, with adapters loaded by `load_lora_weights`.
            objectives: Objectives by name. `source` is the name of a loaded adapter, and may be
                left out when it is the objective's own name. None: the pipeline's objectives whose
                adapters it still holds and the adapters loaded into it since, else every loaded
                adapter, all at eta = 1, else the base model.
            dtype, torch_dtype: None: every module keeps its own. Else as in `from_pretrained`;
                modules are cast in place, so those of `pipeline` are too, as in diffusers.
            components: Modules to use in place of the pipeline's.

        Raises:
            UnknownObjective: A source is not the name of a loaded adapter.
            AdapterMismatch: An objective's adapter is fused into the weights or cannot be switched.
            UnsupportedNetwork: A network needs more than latents, a timestep and a text.
            ValueError: Invalid objectives, or a pipeline without Stable Diffusion's modules.
        """
        if type(pipeline) is not StableDiffusionPipeline and not isinstance(pipeline, cls):
            other: Self = attach_as_it_is(pipeline, objectives, components, dtype, torch_dtype)
            return other
        modules = shared_components(pipeline, components)
        dtype = check_dtypes(dtype, torch_dtype, list(modules))
        pipe = cls(**modules, requires_safety_checker=False)
        pipe.register_to_config(
            requires_safety_checker=pipeline.config.get("requires_safety_checker", True),
            _name_or_path=pipeline.config.get("_name_or_path"),
        )
        pipe._shares_networks = True
        if (settings := getattr(pipeline, "forward_settings", None)) is not None:
            pipe.set_forward(**vars(settings))
        attach_loaded(pipe, pipeline, objectives)
        if dtype is not None:
            cast(pipe, dtype)
        return pipe

    @torch.no_grad()
    @one_at_a_time
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        *,
        weights: WeightSchedule = None,
        masks: MasksLike | None = None,
        mask_softness: float | None = None,
        strength: StrengthsLike | None = None,
        kl_weights: Mapping[str, float] | Sequence[float] | None = None,
        mode: Mode = "exact",
        kl_budget: float | None = None,
        seed: int | SeedsLike | None = None,
        etas: Mapping[str, float] | Sequence[float] | None = None,
        guidance_scale: float | Mapping[str, float] | Sequence[float] | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: GeneratorLike | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        zero_variance: ZeroVariancePolicy = "error",
        rates: Sequence[float] | None = None,
        extrapolate: bool = False,
        fusion: Fusion = "posterior",
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **refused: Any,  # noqa: ANN401 - named in the error
    ) -> Any:  # noqa: ANN401 - as in diffusers, an output object or a tuple
        """Generate images: x_{t-1} ~ prod_i p_i(x_{t-1} | x_t)^{w_i}, from t = T to 0.

        Everything is checked before the first network runs. B = images = prompts x
        `num_images_per_prompt`, M = objectives, in the order of `objectives`. An image depends on
        its own seed, prompt and weights only: whatever shares the batch, the noise is the same to
        the bit and the image to the last rounding.

        Args:
            prompt: P texts, or one.
            height, width: Size of the images in pixels, multiples of 8; by default the model's own.
            num_inference_steps: T in [1, training steps]; None: 50, or what an accelerator takes.
            weights: Preferences w, no unit, on the simplex: a mapping from every objective's name
                to a number, a list of P mappings, one per prompt, (M,) or (B, M) numbers, or a
                callable from the step index 0..T-1 to any of these, or a mapping from ranges of
                timesteps, `(500, 999)`, both ends included, to them. None: uniform. An objective
                whose weight is 0 throughout is not evaluated.
            masks, mask_softness: Where objectives act: masks by name, or a list with a mapping, or
                None, per prompt; and the blur of edges. See `pipelines.regions.check_masks`.
            strength: s >= 0, how strongly objectives act: 1 as trained, 0 the base, 2 twice as far
                from it; a number, by name, a list of one per prompt, (M,) or (B, M).
            kl_weights: lambda_i, with which each was aligned: s_i is then strength lambda_i / sum_j
                w_j lambda_j.
            mode: "exact", or an approximation that reports an estimate of its error: "merged" runs
                one network with the adapters merged by precision, the limit of Rewarded Soups;
                "auto" does in as many steps as `kl_budget` allows, after a pilot where `prepare`
                made none: see `docs/exact.md`. It is exact where strengths differ between images.
            kl_budget: Most nats that an image's path may be from exact ones, with "auto"; None:
                what bfloat16 networks cost.
            seed: Counter-based noise: of `seed + i` for image i, or a list, each in [-2^63, 2^64).
            etas: eta in [0, 1] by objective, in place of its own; with TCD gamma, by default .3.
            guidance_scale: >= 1 (none), for all, by name or (M,). None: the objective's own or 7.5.
            negative_prompt: What guidance steers away from; one text, or one per prompt.
            num_images_per_prompt: Images of each prompt, consecutive in the output.
            generator: Instead of `seed`: one, or one per image, draws as in stock diffusers. With
                neither: torch's default generator.
            latents: x_T in place of the drawn one, (B, C, H, W), no unit.
            prompt_embeds, negative_prompt_embeds: (P, L, D) text embeddings in place of the texts.
            zero_variance, rates, extrapolate, fusion: See `msdda_fast.coefficient_table`.
            output_type: "pil", "np" (B, H, W, 3) or "pt" (B, 3, H, W) in [0, 1], or "latent": x_0.
            return_dict: As in diffusers.
            callback_on_step_end: Called after step k as `f(pipe, k, t, tensors)`; what it returns
                in its dict replaces those tensors, and a `pipe._guidance_scale` that it sets is
                that of all objectives from the next step on, as `SDCFGCutoffCallback` does.
            callback_on_step_end_tensor_inputs: Of "latents" (B, C, h, w), "prompt_embeds" and
                "negative_prompt_embeds", both (M, B, L, D), M with the base if it takes part.

        Returns: An `MSDDAPipelineOutput`, or (images, flags); see there.

        Raises:
            UnknownObjective: A name in `weights`, `etas`, ... is not an objective.
            InvalidWeights: Off the simplex, no positive precision, or a negative strength.
            InvalidSchedule, InvalidShape: A number outside its range; numbers of another shape.
            InvalidMode: An unknown mode, or an approximate one in several processes or float64.
            AdapterMismatch, UnsupportedNetwork: See `networks`.
            PipelineBusy: A callback called the pipeline that calls it.
            ZeroVariance: A prompt mixes eta = 0 with eta > 0 under `zero_variance="error"`.
            NotFinite: Sampling ended in NaN or infinity.
            ValueError: Prompts that contradict each other; seed and generator; a missing component;
                an argument of stock pipelines that means nothing here (`eta`).
        """
        request.check_call(self, refused, output_type)
        steps = self.checked_steps(num_inference_steps)
        check_mode(mode, kl_budget, in_parallel=self.parallel is not None, masks=masks)
        callback = Callback.check(callback_on_step_end, callback_on_step_end_tensor_inputs)
        prompts = Prompts.check(
            prompt,
            negative_prompt,
            prompt_embeds,
            negative_prompt_embeds,
            images_per_prompt=num_images_per_prompt,
            embed_width=self.unet.config.cross_attention_dim,
        )
        if (scheduler := sampling_scheduler(self.scheduler)) is not self.scheduler:
            self.register_modules(scheduler=scheduler)  # users assign others to a pipeline
        guidance = request.objective_guidance(self._objectives, guidance_scale)
        scale = self.vae_scale_factor
        shape = request.latent_shape(prompts.batch_size, self.unet.config, scale, height, width)
        tables = Tables(
            scheduler=scheduler,
            num_steps=steps,
            objectives=self._objectives,
            etas=sampling_levels(scheduler, self._objectives, etas),
            guidance_scale=guidance,
            strength=strength,
            kl_weights=kl_weights,
            zero_variance=zero_variance,
            rates=rates,
            extrapolate=extrapolate,
            fusion=fusion,
            masks=masks,
            mask_softness=mask_softness,
            latent_size=shape[2:],
            scale=scale,
        )
        table = tables.of(weights, prompts.batch_size, num_images_per_prompt)
        if prompts.needs_encoder(negative=table.needs_uncond) or mode == "auto":
            request.check_parts(self, "text_encoder", "tokenizer")
        request.check_latents(latents, shape)
        seeds = None if seed is None else image_seeds(seed, prompts.batch_size)
        networks = self.networks(mode, with_base=table.has_base)
        noise = noise_source(shape, len(table), networks.device, seeds=seeds, generator=generator)
        plan, forecast = planned(mode, networks, tables, table, shape[1:], kl_budget)
        table = table.to(networks.device, torch.promote_types(networks.dtype, torch.float32))
        self._interrupt, self._num_timesteps = False, len(table)
        self._guidance_scale = max(guidance)  # callbacks read it, and may set another
        with self.progress_bar(total=len(table)) as bar:

            def watch(k: int, generation: PromptedGeneration, embeds: Tensor) -> bool:
                if callback is not None:
                    callback(self, k, table, generation, embeds)
                bar.update()
                return not self._interrupt

            done = sample(networks, Request(prompts, table, noise, latents, plan), watch)
        images, flagged = self.to_images(done.x, output_type)
        self.maybe_free_model_hooks()
        return answer(images, flagged, receipt(mode, done, forecast), as_output=return_dict)
