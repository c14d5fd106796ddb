# SPDX-License-Identifier: Apache-2.0
r"""A network as a policy under any sampler's rule, with the clean sample that each step predicts.

With the (guided) output m of step k and the rule's numbers at one noise level,

    x_prev ~ N(A_k x_t + B_k m, tau_k^2),        x0hat = a_k x_t + b_k m,

and a change of m by d costs KL(p || p_pre) = B_k^2 ||d||^2 / (2 tau_k^2) nats in this step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from msdda_fast.errors import InvalidSchedule, InvalidShape
from msdda_fast.steps.rules import PredictionTerms, Rule
from msdda_fast.training.adapter import base_model


class RulePolicy:
    """The policy of `network` under `rule` at one level; outside of a timestep range, the base's.

    Args:
        network: Called as `network(x_t, timestep=t, **conditions, return_dict=False)[0]`, which
            diffusers' UNets and transformers understand; prepared by `add_lora`.
        rule: A sampler's rule over a grid of diffusers' noise levels or of flow times; x0hat must
            not be clipped.
        level: Noise level, as the rule reads it.
        conditions: Keyword arguments of the network with one row per prompt, each (P, ...).
        null_conditions: Those of the empty prompt, without the rows; needed for guidance.
        guidance_scale: The policy *is* the guided model.
        timesteps: The adapter acts at low <= t <= high; None: in all steps.
        autocast: Returns the context in which the network runs; all else is float32.

    Raises:
        InvalidSchedule: The level is out of range, x0hat is clipped or not defined by the rule, or
            no step of the range has variance.
        InvalidShape: The conditions do not share a number of rows, or those of the empty prompt
            have other names or shapes.
        ValueError: Guidance needs `null_conditions`.
    """

    def __init__(
        self,
        network: nn.Module,
        rule: Rule,
        level: float,
        conditions: Mapping[str, Tensor],
        null_conditions: Mapping[str, Tensor] | None = None,
        *,
        guidance_scale: float = 1.0,
        timesteps: tuple[float, float] | None = None,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        rule.levels.check_one(level, "policy")
        terms = rule.step(torch.tensor([level], dtype=torch.float64))
        if terms.clean is not None:
            raise InvalidSchedule("clip_sample makes the step non-Gaussian; set clip_sample=False")
        self.timesteps = rule.timesteps
        clean = _prediction_terms(rule)

        def per_step(values: Tensor) -> Tensor:
            return values.expand(len(self.timesteps), 1, 1).flatten().float()

        self.x_scale, self.output_scale = per_step(terms.x_scale), per_step(terms.output_scale)
        self.std = per_step(terms.std)
        self.x0_x, self.x0_output = per_step(clean.x0_x), per_step(clean.x0_output)
        scale = rule.input_scale
        self.input_scale = torch.ones_like(self.std) if scale is None else scale.float()
        low, high = timesteps or (-torch.inf, torch.inf)
        self.acts = (self.timesteps >= low) & (self.timesteps <= high)  # (T,) bool
        self.trained = (self.acts & (self.std > 0)).nonzero().flatten()  # steps k with a gradient
        if len(self.trained) == 0:
            where = "" if timesteps is None else f" with a timestep in {timesteps}"
            raise InvalidSchedule(f"level {level}: no step{where} has variance to learn from")
        self._check_conditions(conditions, null_conditions, guidance_scale)
        self.network, self.autocast, self.guidance_scale = network, autocast, guidance_scale
        self.conditions = {name: rows.detach() for name, rows in conditions.items()}
        self.null_conditions = {name: row.detach() for name, row in (null_conditions or {}).items()}

    @staticmethod
    def _check_conditions(
        conditions: Mapping[str, Tensor],
        null_conditions: Mapping[str, Tensor] | None,
        guidance_scale: float,
    ) -> None:
        if len({len(rows) for rows in conditions.values()}) != 1:
            raise InvalidShape(
                "the conditions must have one row per prompt, got "
                f"{ {name: tuple(rows.shape) for name, rows in conditions.items()} }"
            )
        if guidance_scale != 1.0 and null_conditions is None:
            raise ValueError(f"guidance_scale {guidance_scale} needs null_conditions")
        wanted = {name: tuple(rows.shape[1:]) for name, rows in conditions.items()}
        found = {name: tuple(row.shape) for name, row in (null_conditions or {}).items()}
        if null_conditions is not None and found != wanted:
            raise InvalidShape(f"null_conditions must have shapes {wanted}, got {found}")

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.timesteps)

    def output(self, x_t: Tensor, k: int, prompt_index: Tensor) -> Tensor:
        """Return the guided output m of step k, (n, *S) float32; 2n rows of the network if guided.

        Args:
            x_t: (n, *S) float32, on the network's device.
            k: Step, in [0, T).
            prompt_index: (n,) int64 on the CPU.
        """
        rows = {name: table[prompt_index] for name, table in self.conditions.items()}
        if self.guidance_scale == 1.0:
            return self._network(x_t, k, rows)
        both = {
            name: torch.cat([self.null_conditions[name].expand_as(own), own])
            for name, own in rows.items()
        }
        uncond, cond = self._network(torch.cat([x_t, x_t]), k, both).chunk(2)
        return uncond + self.guidance_scale * (cond - uncond)

    def _network(self, x_t: Tensor, k: int, rows: Mapping[str, Tensor]) -> Tensor:
        weight = next(self.network.parameters())
        t = self.timesteps[k].to(weight.device).expand(len(x_t))
        t = t.float() if t.is_floating_point() else t
        given = {name: row.to(weight) for name, row in rows.items()}
        x = (float(self.input_scale[k]) * x_t).to(weight)
        with self.autocast():
            output: Tensor = self.network(x, timestep=t, **given, return_dict=False)[0]
        return output.float()

    @torch.no_grad()
    def base_output(self, x_t: Tensor, k: int, prompt_index: Tensor) -> Tensor:
        """As `output`, of the base model and without gradients."""
        with base_model(self.network):
            return self.output(x_t, k, prompt_index)

    @torch.no_grad()
    def acting_output(self, x_t: Tensor, k: int, prompt_index: Tensor) -> Tensor:
        """As `output`, without gradients, and the base's where the adapter does not act."""
        acts = bool(self.acts[k])
        return (self.output if acts else self.base_output)(x_t, k, prompt_index)

    def clean(self, x_t: Tensor, output: Tensor, k: int) -> Tensor:
        """Return x0hat of step k, (n, *S); gradients flow."""
        return float(self.x0_x[k]) * x_t + float(self.x0_output[k]) * output

    def kl(self, output: Tensor, base: Tensor, k: int) -> Tensor:
        """Return KL(p || p_pre) of step k, whose std is > 0, in nats, (n,); gradients flow."""
        ratio = float(self.output_scale[k] / self.std[k])
        return (output - base).flatten(1).square().sum(1) * (0.5 * ratio**2)

    def step(self, x_t: Tensor, output: Tensor, k: int, noise: Tensor) -> Tensor:
        """Return x_prev, (n, *S), for standard normal `noise`."""
        mean = float(self.x_scale[k]) * x_t + float(self.output_scale[k]) * output
        return mean + float(self.std[k]) * noise


def _prediction_terms(rule: Rule) -> PredictionTerms:
    """Return what the network's output says of x_0, from the rule's grid."""
    grid: Any = getattr(rule, "grid", None)
    if not hasattr(grid, "step_terms"):
        raise InvalidSchedule(f"{type(rule).__name__} has no grid that defines x0hat of an output")
    terms: PredictionTerms = grid.step_terms()
    return terms
