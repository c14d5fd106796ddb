# SPDX-License-Identifier: Apache-2.0
"""The modes of a generation: exact, or approximate with an estimate of what that changes.

    "exact"      every objective's network in every step; the default.
    "staggered"  the objectives' deep features are renewed in turn, one objective per step.
    "merged"     one network with the adapters merged by precision: the limit of Rewarded Soups.
    "hybrid"     merged, and exact in the last fifth of the steps.

Approximate modes are not captured into graphs. "staggered" would need one per objective and one for
the refresh; all of its shapes are constant.

The last steps are the sensitive ones. The error of an output counts |B| / sigma_w fold, squared:
over 25 steps of Stable Diffusion's schedule that is 0.55 to 0.76 up to the last fifth, and up to
5.1 in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from msdda_fast.coefficients import CoefficientTable
from msdda_fast.errors import UnsupportedNetwork
from msdda_fast.pipeline.approximations import Approximation, Merged, Staggered
from msdda_fast.pipeline.batched_options import DEFAULTS, BatchedOptions
from msdda_fast.pipeline.batched_unet import BatchedUNet
from msdda_fast.pipeline.loaded_adapters import LoadedAdapters
from msdda_fast.pipeline.merged_unet import MergedUNet
from msdda_fast.pipeline.prediction import Variant
from msdda_fast.pipeline.step_kl import step_kl

if TYPE_CHECKING:
    from msdda_fast.pipeline.stable_diffusion import MSDDAPipeline

__all__ = ["MODES", "Mode", "ModeNetworks", "ModePredictor", "exact_steps"]

Mode = Literal["exact", "staggered", "merged", "hybrid"]
MODES: tuple[Mode, ...] = get_args(Mode)

EXACT_FRACTION = 0.2


def exact_steps(mode: Mode, num_steps: int) -> int:
    """How many steps at the end are exact whatever happens before, of `num_steps`."""
    return {"exact": num_steps, "hybrid": ceil(EXACT_FRACTION * num_steps)}.get(mode, 0)


class ModeNetworks:
    """The networks that modes run on; a pipeline keeps one.

    Args:
        variants: M, of one network.
        options: How the batched forward is built.

    Raises:
        AdapterMismatch, UnsupportedNetwork: The variants cannot share a forward.
    """

    def __init__(self, variants: Sequence[Variant], options: BatchedOptions) -> None:
        self.adapters = LoadedAdapters(variants, rank_pad=options.rank_pad)
        if getattr(self.adapters.unet, "_hf_hook", None) is not None:
            raise UnsupportedNetwork("modes do not run networks that are moved as they run")
        self.options = options
        self.batched = BatchedUNet(self.adapters, options)
        self._merged: MergedUNet | None = None

    @classmethod
    def of(cls, pipe: MSDDAPipeline) -> ModeNetworks:
        """Those that `pipe` has, or new ones if its adapters or weights have changed since."""
        variants = list(pipe.variants.values())
        options = pipe._sampler_options.get("options", DEFAULTS)
        held: ModeNetworks | None = pipe._mode_networks
        if (
            held is None
            or held.options != options
            or held.adapters.variants != variants
            or not held.adapters.is_current()
        ):
            pipe._mode_networks = None  # free the old ones before building anew
            pipe._mode_networks = held = cls(variants, options)
        return held

    def approximation(self, mode: Mode, active: Sequence[bool]) -> Approximation:
        """The approximation of a mode, for those of M objectives that are active."""
        network = self.batched.subset(active)
        if mode == "staggered":
            return Staggered(network)
        self._merged = self._merged or MergedUNet(self.adapters)
        return Merged(network, self._merged)


class ModePredictor:
    """`Predictor` of one generation in an approximate mode. Call it once per step, in order.

    A step at which one objective alone has influence is exact too.

    Args:
        networks: Of the pipeline.
        mode: Not "exact".
        table: Of the generation.

    Attributes:
        step_kl: Estimated KL divergence of each step from the exact one, (T, B) nats on the device
            of the table; 0 where a step was exact. See `step_kl.step_kl`.
    """

    def __init__(self, networks: ModeNetworks, mode: Mode, table: CoefficientTable) -> None:
        self._network = networks.batched.subset(table.active)
        self._approximation = networks.approximation(mode, table.active)
        self._table = table
        self._exact_from = len(table) - exact_steps(mode, len(table))
        self._k = 0
        self._begun: tuple[Tensor | None, Tensor | None] = (None, None)
        self.step_kl = table.rows.new_zeros(table.share.shape[:2])

    @torch.no_grad()
    def predict(
        self, x_t: Tensor, t: Tensor, prompt_embeds: Tensor, active: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        """See `Predictor.predict`."""
        step, self._k = self._k, self._k + 1
        table, chosen = self._table, list(self._network.objectives)
        self._begin(prompt_embeds, table.share[step][:, chosen])
        k = torch.tensor(step, device=x_t.device)
        if step >= self._exact_from or sum(active) == 1:
            return self._spread(self._network(x_t, k))
        outputs, errors = self._approximation(x_t, k)
        self.step_kl[step] = step_kl(
            x_t,
            self._spread(outputs.to(x_t)),
            self._spread(outputs.to(x_t) + errors),
            table[step],
            table.std[step],
        )
        return self._spread(outputs)

    def _spread(self, outputs: Tensor) -> list[Tensor | None]:
        """The outputs of the active objectives, at their places among all."""
        found = dict(zip(self._network.objectives, outputs, strict=True))
        return [found.get(m) for m in range(self._table.num_objectives)]

    def _begin(self, prompt_embeds: Tensor, shares: Tensor) -> None:
        """Tell the networks of prompts or shares that are not those of the step before."""
        embeds, before = self._begun
        if embeds is prompt_embeds and before is not None and torch.equal(before, shares):
            return
        self._begun = prompt_embeds, shares
        rows = prompt_embeds[list(self._network.objectives)]
        if bool((rows == rows[:1]).all()):
            rows = rows[:1]  # objectives share their rows until an adapter parts them
        self._approximation.begin(rows, self._table.timesteps, shares)
