# SPDX-License-Identifier: Apache-2.0
"""One forward of a UNet for all objectives, on rows (M, K, B) and the stock network's weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel

from msdda_fast.adapters.loaded import LoadedAdapters
from msdda_fast.adapters.variant import Variant
from msdda_fast.batched.attention import ATTENTION_BACKENDS, CrossAttention, choose_backend
from msdda_fast.batched.blocks import Body, Step
from msdda_fast.batched.options import DEFAULTS, BatchedOptions
from msdda_fast.batched.rows import Rows, hold
from msdda_fast.batched.sites import SiteBuilder
from msdda_fast.batched.support import check_supported
from msdda_fast.batched.time import AddedConditions, TimeEmbedding
from msdda_fast.errors import AdapterMismatch, InvalidShape, UnsupportedNetwork

__all__ = ["BatchedUNet"]


class BatchedUNet(nn.Module):
    """The network of M objectives as one module, which only runs forward.

    The stock network stays as it is and usable; its weights are shared. Adapters are copied: ask
    `adapters.is_current()` before each generation, and `swap` or build again when it says no.
    Moving or casting is done to the stock network, before building.

        network = BatchedUNet.of(variants)
        network.begin(prompt_embeds, timesteps)
        eps = network(x_t, k)                       # (M, K, B, C, h, w), once per step

    `begin` and `swap` write in place where shapes are the same, so that a captured graph of
    `forward` keeps running on what they wrote. `forward` itself has no sync and no branch on data.

    Args:
        adapters: The objectives' variants of one network.
        options: How to build.
        objectives: Indices of those that run; None: all.

    Attributes:
        adapters, options, objectives: As given.
        frontier: Path of the first module that treats objectives differently, or None.
        generations: How often `begin` was called.
        diverges_before_prompt: Whether rows of objectives differ at the first cross-attention.
        attention_backend: Name of the attention backend that runs.

    Raises:
        AdapterMismatch: An adapter acts outside the layers of the forward.
        BackendUnavailable: `options` names a backend that cannot run here.
        UnsupportedNetwork: The network has a part that the forward does not know.
    """

    builder = SiteBuilder

    def __init__(
        self,
        adapters: LoadedAdapters,
        options: BatchedOptions = DEFAULTS,
        objectives: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        unet = adapters.unet
        check_supported(unet)
        self.adapters, self.options = adapters, options
        self.objectives = tuple(range(len(adapters.variants)) if objectives is None else objectives)
        self._subsets: dict[tuple[int, ...], BatchedUNet] = {}
        nhwc = options.channels_last
        build = self.builder(
            adapters,
            self.objectives,
            design=options.design,
            channels_last=unet.device.type == "cuda" if nhwc is None else nhwc,
        )
        self._nhwc = build.channels_last
        self.time = TimeEmbedding(build, unet)
        self.body = Body(build, unet, fuse=options.fuse_qkv)
        self._projections = [resnet.time_emb_proj for resnet in self.body.resnets()]
        build.check_complete()
        self.placements = build.placements
        differ = [place.paths[0] for place in self.placements if place.site.num_objectives > 1]
        self.frontier = differ[0] if differ else None
        self._cross = [m for m in self.modules() if isinstance(m, CrossAttention)]
        self.diverges_before_prompt = not self._cross or self._cross[0].diverged
        head_dims = {layer.to_out.weight.shape[1] // layer.heads for layer in self._cross}
        self.attention_backend = choose_backend(
            options.attention, head_dims, unet.dtype, unet.device
        )
        # asked of the network, these walk all of its modules: milliseconds in each step
        self.device, self.dtype = unet.device, unet.dtype
        self.generations = 0
        self._begun = False
        self._batch = 0
        self._prompts: Rows | None = None
        self._timesteps: Rows | None = None  # (T,)
        self._table: Rows | None = None  # (T, m k b, sum of channels)
        self._added: AddedConditions | None = None

    @classmethod
    def of(cls, variants: Sequence[Variant], options: BatchedOptions = DEFAULTS) -> BatchedUNet:
        """Build from M variants of one network; see `LoadedAdapters` for what is refused."""
        return cls(LoadedAdapters(variants, rank_pad=options.rank_pad), options)

    @torch.no_grad()
    def begin(
        self, prompt_embeds: Tensor, timesteps: Tensor, added: AddedConditions | None = None
    ) -> None:
        """Start a generation: keys and values of its prompts, time embeddings of its steps.

        Everything is recomputed, so nothing of an earlier prompt, adapter or schedule remains. Of
        the same shapes as before it is written in place.

        Args:
            prompt_embeds: (M, K, B, L, D), or (1, K, B, L, D) when all objectives share them.
            timesteps: (T,) int64, in the order of k.
            added: Stable Diffusion XL's conditions.

        Raises:
            InvalidShape: Another shape or dtype, or conditions that do not fit the network.
        """
        unet, count = self.adapters.unet, len(self.objectives)
        width = unet.config.cross_attention_dim
        if (
            prompt_embeds.ndim != 5
            or len(prompt_embeds) not in (1, count)
            or 0 in prompt_embeds.shape
            or prompt_embeds.shape[-1] != width
        ):
            raise InvalidShape(
                f"prompt_embeds has shape {tuple(prompt_embeds.shape)}, expected "
                f"({count} or 1, K, B, L, {width})"
            )
        if timesteps.ndim != 1 or timesteps.dtype != torch.int64 or len(timesteps) == 0:
            raise InvalidShape(
                f"timesteps is {timesteps.dtype} {tuple(timesteps.shape)}, expected int64 (T,)"
            )
        self.time.check(added, (count, *prompt_embeds.shape[1:3]))
        sharing = self.options.sharing
        embeds = prompt_embeds.to(self.device, self.dtype)
        prompts = Rows(embeds.flatten(0, 2), *embeds.shape[:2])
        if not sharing.prefix:
            prompts = prompts.expand(count)
        self._prompts = hold(self._prompts, prompts)
        self._timesteps = hold(self._timesteps, Rows(timesteps.to(self.device)))
        self._added = added
        if sharing.prompt_cache:
            for layer in self._cross:
                layer.keep(self._prompts, count)
        if sharing.time_table:
            times = self.time(self._timesteps.x, added, self._projections)
            self._table = hold(self._table, times.holding(times.x.transpose(0, 1)))
        self._batch, self._begun = embeds.shape[2], True
        self.generations += 1

    @torch.no_grad()
    def forward(self, x: Tensor, k: Tensor) -> Tensor:
        """The raw outputs of all objectives at step k.

        Args:
            x: (B, C, h, w) latents, any float dtype.
            k: Index into the timesteps of `begin`, 0-d int64 on the device of the network.

        Returns:
            (M, K, B, C, h, w) in the dtype of the network, new.

        Raises:
            InvalidShape: Another shape, dtype or device, or no `begin` since the last `swap`.
        """
        unet = self.adapters.unet
        if not self._begun:
            raise InvalidShape("no prompt: call begin(), again after each swap()")
        if x.ndim != 4 or x.shape[:2] != (self._batch, unet.config.in_channels):
            raise InvalidShape(
                f"x has shape {tuple(x.shape)}, expected ({self._batch}, "
                f"{unet.config.in_channels}, h, w)"
            )
        if k.ndim != 0 or k.dtype != torch.int64 or {k.device, x.device} != {self.device}:
            raise InvalidShape(
                f"k is {k.dtype} {tuple(k.shape)} on {k.device} and x is on {x.device}, expected "
                f"0-d int64 and both on {self.device}"
            )
        with sdpa_kernel(ATTENTION_BACKENDS[self.attention_backend]):
            return self.leave(self.body(*self.enter(x, k)))

    def enter(self, x: Tensor, k: Tensor) -> tuple[Rows, Step]:
        """What the body runs on, of latents (B, C, h, w) at step k, after `begin`."""
        x = x.to(self.dtype)
        if self._nhwc:
            x = x.contiguous(memory_format=torch.channels_last)
        step = self.step(k)
        if self.options.sharing.prefix:
            return Rows(x), step
        return Rows(x).expand(len(self.objectives), step.prompts.branches), step

    def step(self, k: Tensor) -> Step:
        """What all layers see at step k, after `begin`."""
        assert self._prompts is not None  # begin() has been called
        return Step(self._times(k), self._prompts)

    def leave(self, out: Rows) -> Tensor:
        """The body's output as (M, K, B, C, h, w), new."""
        assert self._prompts is not None  # begin() has been called
        return out.expand(len(self.objectives), self._prompts.branches).grid().contiguous()

    def _times(self, k: Tensor) -> list[Rows]:
        """What each resnet adds at step k, (m k b, C, 1, 1)."""
        if self._table is not None:
            row = self._table.holding(self._table.x.index_select(0, k[None])[0])
        else:
            assert self._timesteps is not None  # begin() has been called
            t = self._timesteps.x.index_select(0, k[None])
            row = self.time(t, self._added, self._projections)
            row = row.holding(row.x[:, 0])
        parts = torch.split(row.x, [len(layer.weight) for layer in self._projections], dim=1)
        return [row.holding(part[:, :, None, None]) for part in parts]

    def subset(self, active: Sequence[bool]) -> BatchedUNet:
        """The network of those objectives for which `active` (M flags) is true; kept for reuse.

        It shares the weights, has its own copies of the adapters, and follows `swap`.

        Raises:
            InvalidShape: Not M flags, or none is true.
        """
        if len(active) != len(self.objectives) or not any(active):
            raise InvalidShape(f"got active={list(active)}, expected {len(self.objectives)} flags")
        chosen = tuple(m for m, runs in zip(self.objectives, active, strict=True) if runs)
        if chosen == self.objectives:
            return self
        if chosen not in self._subsets:
            self._subsets[chosen] = BatchedUNet(self.adapters, self.options, chosen)
        return self._subsets[chosen]

    @torch.no_grad()
    def swap(self, m: int, variant: Variant) -> None:
        """Make objective m another variant, in place, here and in every subset; then `begin`.

        Raises:
            AdapterMismatch: The adapter needs a site that is not there, or one where objectives
                share their rows; nothing is changed, build again.
            InvalidShape: No such objective, or a rank above that of a site; nothing is changed.
            UnfaithfulMerge: "merged", and rounding spoils the adapter; nothing is changed.
            UnsupportedNetwork: The variant is of another network.
        """
        count = len(self.adapters.variants)
        if not 0 <= m < count or len(self.objectives) != count:
            raise InvalidShape(f"objective {m} of a network that runs {self.objectives}")
        if variant.network is not self.adapters.unet:
            raise UnsupportedNetwork("the variant is of another network")
        stacks = self.adapters.one(variant)
        sites = {path: place for place in self.placements for path in place.paths}
        for path in stacks:
            if path not in sites:
                raise AdapterMismatch(f"no site at {path!r}: no adapter acted there when built")
        new = {place.paths: place.factors(stacks) for place in self.placements}
        for place in self.placements:
            if place.site.num_objectives == count:
                place.check_swap(m, *new[place.paths])
            elif not all(self.adapters.unchanged(path, stacks) for path in place.paths):
                raise AdapterMismatch(
                    f"all objectives share their rows at {place.paths[0]!r}, where this adapter "
                    "differs from the others"
                )
        self.adapters.replace(m, variant, stacks)
        for network in (self, *self._subsets.values()):
            network._begun = False
            if m in network.objectives:
                for place in network.placements:
                    index = network.objectives.index(m) if place.site.num_objectives > 1 else 0
                    place.site.swap(index, *new[place.paths])
