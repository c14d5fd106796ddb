# SPDX-License-Identifier: Apache-2.0
"""Algorithm 1 inside a diffusers pipeline: text in, latents out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor

from msdda_fast.adapters.switching import AdapterSwitch, adapter_names
from msdda_fast.engine.noise import NoiseSource
from msdda_fast.kernels.fused_step import fused_ddim_step
from msdda_fast.pipelines.prompts import Prompts
from msdda_fast.pipelines.stable_diffusion.captured import CapturedSampler, Generation
from msdda_fast.pipelines.stable_diffusion.modes import Mode
from msdda_fast.pipelines.stable_diffusion.prediction import Predictor
from msdda_fast.pipelines.stable_diffusion.predictors import choose_predictor
from msdda_fast.steps.coefficients import CoefficientTable

if TYPE_CHECKING:
    from msdda_fast.pipelines.stable_diffusion.pipeline import MSDDAPipeline

__all__ = ["Callback", "StepCallback", "sample"]

#: `f(pipe, k, t, tensors)` after step k, returning the tensors that it replaces.
StepCallback: TypeAlias = Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any] | None]

CALLBACK_TENSORS = ("latents", "prompt_embeds", "negative_prompt_embeds")


@dataclass(frozen=True, slots=True)
class Callback:
    """What to call after each step, and the names of the tensors it gets."""

    function: StepCallback | None
    names: Sequence[str]

    @classmethod
    def of(cls, function: StepCallback | None, names: Sequence[str]) -> Callback:
        """Check the two arguments of diffusers; its callback objects bring their own names.

        Raises:
            ValueError: a name is not one of `CALLBACK_TENSORS`.
        """
        if isinstance(function, (PipelineCallback, MultiPipelineCallbacks)):
            names = function.tensor_inputs
        for name in names:
            if name not in CALLBACK_TENSORS:
                raise ValueError(
                    f"callback_on_step_end_tensor_inputs: {name!r} is not one of "
                    f"{', '.join(CALLBACK_TENSORS)}"
                )
        return cls(function, names)

    def __call__(self, pipe: MSDDAPipeline, k: int, t: Tensor, state: State) -> State:
        """Show the function the state after step k, and return what it makes of it."""
        if self.function is None:
            return state
        values: dict[str, Any] = dict(
            zip(CALLBACK_TENSORS, (state.x, state.cond, state.uncond), strict=True)
        )
        given = self.function(pipe, k, t, {name: values[name] for name in self.names}) or {}
        values.update(given)
        x, cond, uncond = (values[name] for name in CALLBACK_TENSORS)
        return State(x.to(state.x), cond, uncond)


@dataclass(frozen=True, slots=True)
class State:
    """Latents x (B, C, h, w), and embeddings (M, B, L, D); no `uncond` without guidance."""

    x: Tensor
    cond: Tensor
    uncond: Tensor | None

    def embeddings(self) -> Tensor:
        """(M, K, B, L, D), in the order (uncond, cond)."""
        branches = [self.cond] if self.uncond is None else [self.uncond, self.cond]
        return torch.stack(branches, dim=1)


def sample(
    pipe: MSDDAPipeline,
    prompts: Prompts,
    table: CoefficientTable,
    noise: NoiseSource,
    latents: Tensor | None,
    callback: Callback,
    mode: Mode = "exact",
) -> tuple[Tensor, Tensor | None]:
    """Run Algorithm 1 with a checked request.

    Args:
        pipe: Its components and variants.
        prompts: B = P N.
        table: Coefficients of T steps, on the device and in the dtype of the state.
        noise: Source of x_T and z.
        latents: x_T in place of the drawn one, (B, C, h, w).
        callback: Sees the state after each step.
        mode: How the networks run.

    Returns: x_0, (B, C, h, w), in the dtype of the table; and in approximate modes the estimated
        divergence of each step, see `Generation.step_kl`.
    """
    variants = list(pipe.variants.values())
    networks = {id(variant.network): variant.network for variant in variants}
    pipe._interrupt = False
    pipe._num_timesteps = len(table)
    with (
        AdapterSwitch([pipe.text_encoder, *networks.values()]) as switch,
        pipe.progress_bar(total=len(table)) as bar,
        choose_predictor(pipe, switch, prompts, table, noise, latents, mode) as chosen,
    ):
        cond, uncond = _encode(pipe, prompts, table, switch)
        if latents is None:
            # generators draw in the dtype of stock diffusers
            dtype = pipe.unet.dtype if noise.seeds is None else table.rows.dtype
            latents = noise.initial(table.rows.device, dtype)
        state = State(latents.to(table.rows), cond, uncond)
        if not table.std.any():
            # eta = 0 throughout: like diffusers, leave the generators alone
            none = state.x.new_zeros(()).expand(len(table), *state.x.shape)
            noise = replace(noise, noise=none)
        if isinstance(chosen, CapturedSampler):
            shared = _share_text(pipe)
            generation = chosen.begin(
                table, noise, state.x, state.embeddings(), shared=shared, mode=mode
            )
            x_0 = _captured(pipe, generation, table, state, callback, bar)
            return x_0, None if mode == "exact" else generation.step_kl
        return _predicted(pipe, chosen, table, noise, state, callback, bar), None


def _predicted(
    pipe: MSDDAPipeline,
    predictor: Predictor,
    table: CoefficientTable,
    noise: NoiseSource,
    state: State,
    callback: Callback,
    bar: Any,  # noqa: ANN401 - diffusers' tqdm
) -> Tensor:
    active = (table.share != 0).any(1).tolist()  # [T][M]
    embeds = state.embeddings()
    for k, t in enumerate(table.timesteps):
        if pipe.interrupt:
            break
        outputs = predictor.predict(state.x, t, embeds, active[k])
        like = next(output for output in outputs if output is not None)[0]
        x_prev = fused_ddim_step(state.x, outputs, table[k], **noise.step(k, like=like))
        state = callback(pipe, k, t, replace(state, x=x_prev))
        if callback.function is not None:
            embeds = state.embeddings()
        bar.update()
    return state.x


def _captured(
    pipe: MSDDAPipeline,
    generation: Generation,
    table: CoefficientTable,
    state: State,
    callback: Callback,
    bar: Any,  # noqa: ANN401 - diffusers' tqdm
) -> Tensor:
    looks = callback.function is not None
    for k in generation.steps():
        if looks:
            # the state is a buffer that the next step overwrites
            state = callback(pipe, k, table.timesteps[k], replace(state, x=generation.x.clone()))
            generation.replace_x(state.x)
            generation.replace_prompt(state.embeddings())
        bar.update()
        if pipe.interrupt:
            break
    return generation.x.clone()


def _encode(
    pipe: MSDDAPipeline,
    prompts: Prompts,
    table: CoefficientTable,
    switch: AdapterSwitch,
) -> tuple[Tensor, Tensor | None]:
    """Return cond and uncond embeddings, (M, B, L, D); uncond is None without guidance.

    Objectives share one encoding unless their adapters change the text encoder.
    """
    encoded: dict[tuple[str | None, float], tuple[Tensor, Tensor]] = {}
    keys = _text_encoders(pipe)
    for key, active in zip(keys, table.active, strict=True):
        if active and key not in encoded:
            switch.select(*key)
            encoded[key] = pipe.encode_prompt(
                prompts.prompt,
                table.rows.device,
                prompts.images_per_prompt,
                table.needs_uncond,
                prompts.negative_prompt,
                prompt_embeds=prompts.prompt_embeds,
                negative_prompt_embeds=prompts.negative_prompt_embeds,
            )
    unread = next(iter(encoded.values()))  # stands in the rows of inactive objectives
    rows = [encoded.get(key, unread) for key in keys]
    cond = torch.stack([row[0] for row in rows])
    if not table.needs_uncond:
        return cond, None
    return cond, torch.stack([row[1] for row in rows])


def _text_encoders(pipe: MSDDAPipeline) -> list[tuple[str | None, float]]:
    """By objective, the adapter and scale that its text encoder runs with."""
    in_text = adapter_names(pipe.text_encoder)
    variants = pipe.variants.values()
    return [(v.adapter, v.scale) if v.adapter in in_text else (None, 1.0) for v in variants]


def _share_text(pipe: MSDDAPipeline) -> bool:
    return len(set(_text_encoders(pipe))) == 1
