# SPDX-License-Identifier: Apache-2.0
"""One forward of a UNet for all objectives, on rows (M, K, B) and the stock network's weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel

from msdda_fast.adapters.loaded import LoadedAdapters
from msdda_fast.adapters.variant import Variant
from msdda_fast.batched.attention import ATTENTION_BACKENDS, CrossAttention, choose_backend
from msdda_fast.batched.blocks import Body, Resnet, Step
from msdda_fast.batched.ops import choose_ops
from msdda_fast.batched.options import DEFAULTS, BatchedOptions, saves_launches
from msdda_fast.batched.rows import Rows, hold
from msdda_fast.batched.sites import SiteBuilder
from msdda_fast.batched.support import check_supported
from msdda_fast.batched.time import AddedConditions, TimeEmbedding
from msdda_fast.errors import InvalidShape
from msdda_fast.kernels.grouped_lora import DEFAULT_DESIGN
from msdda_fast.torch_private import held_by

__all__ = ["BatchedUNet"]


class BatchedUNet(nn.Module):
    """The network of M objectives as one module, for inference only.

    The stock network is not changed and stays usable; its weights are shared. Adapters are copied:
    call `adapters.is_current()` before each generation, and build again when it returns False. To
    move or cast, do so with the stock network before building.

        network = BatchedUNet.of(variants)
        network.begin(prompt_embeds, timesteps)
        eps = network(x_t, k)                       # (M, K, B, C, h, w), once per step

    `begin` writes in place if the shapes are the same as before, so that a captured graph of
    `forward` reads the new values. `forward` itself does not sync or branch on data.

    Args:
        adapters: The objectives' variants of one network.
        options: How to build the forward.
        objectives: Indices of the objectives that run; None: all.

    Attributes:
        adapters, options, objectives: As given.
        frontier: Path of the first module that treats objectives differently, or None.
        attention_backend: Name of the attention backend that runs where none was timed.

    Raises:
        AdapterMismatch: An adapter acts outside the layers of the forward.
        BackendUnavailable: `options` names a backend that cannot run here.
        UnsupportedNetwork: The network has a part that the forward does not support.
    """

    builder = SiteBuilder
    _shifts: Tensor | None  # (sum of channels,), biases that resnets leave to their times

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
        nhwc, few = options.channels_last, saves_launches(unet.dtype, unet.device)
        build = self.builder(
            adapters,
            self.objectives,
            design=options.design or (None if few else DEFAULT_DESIGN),
            channels_last=unet.device.type == "cuda" if nhwc is None else nhwc,
            ops=choose_ops(options.fused_ops, unet.dtype, unet.device),
            times_attention=options.attention == "auto",
        )
        self._nhwc = build.channels_last
        self.time = TimeEmbedding(build, unet)
        merges = few and options.design is None
        fuse = merges if options.fuse_qkv is None else options.fuse_qkv
        self.body = Body(build, unet, fuse=fuse)
        resnets = self.body.resnets()
        self._projections = [resnet.time_emb_proj for resnet in resnets]
        self.register_buffer("_shifts", _joined(resnets), persistent=False)
        build.check_complete()
        self.frontier = build.frontier
        self._cross = [m for m in self.modules() if isinstance(m, CrossAttention)]
        head_dims = {layer.to_out.weight.shape[1] // layer.heads for layer in self._cross}
        self.attention_backend = choose_backend(
            options.attention, head_dims, unet.dtype, unet.device
        )
        # asked of the network, these walk all of its modules: milliseconds in each step
        self.device, self.dtype = unet.device, unet.dtype
        self._begun = False
        self._batch = 0
        self._prompts: Rows | None = None
        self._timesteps: Rows | None = None  # (T,)
        self._table: Rows | None = None  # (T, m k b, sum of channels)
        self._added: AddedConditions | None = None
        self._holders: list[tuple[str, Mapping[str, Any], str]] = []

    def storages(self) -> dict[str, Tensor]:
        """Return every tensor that `forward` reads at a fixed address, by name."""
        if not self._holders:
            self._holders = list(_holders(self))
        named: dict[str, Tensor] = {}
        for path, holder, name in self._holders:
            value = holder[name]
            if isinstance(value, Rows):
                named[f"{path}.{name}"] = value.x
            elif isinstance(value, Tensor):
                named[f"{path}.{name}"] = value
            elif isinstance(value, tuple):
                named |= {f"{path}.{name}.{i}": rows.x for i, rows in enumerate(value)}
        return named

    def held_rows(self) -> list[tuple[dict[str, Any], str]]:
        """Return where the `Rows` are, or tuples of them, that `begin` has written."""
        return [
            (vars(self.get_submodule(path)), name)
            for path, holder, name in _holders(self)
            if isinstance(holder[name], (Rows, tuple))
        ]

    @classmethod
    def of(cls, variants: Sequence[Variant], options: BatchedOptions = DEFAULTS) -> BatchedUNet:
        """Build from M variants of one network; for what is refused, see `LoadedAdapters`."""
        return cls(LoadedAdapters(variants), options)

    @torch.no_grad()
    def begin(
        self, prompt_embeds: Tensor, timesteps: Tensor, added: AddedConditions | None = None
    ) -> None:
        """Start a generation: compute its prompts' keys and values and its steps' time embeddings.

        Everything is recomputed, so nothing of an earlier prompt, adapter or schedule remains, and
        is written in place if the shapes are the same as before.

        Args:
            prompt_embeds: (M, K, B, L, D), or (1, K, B, L, D) when all objectives share them.
            timesteps: (T,) int64, in the order of k.
            added: Stable Diffusion XL's conditions; None for other networks.

        Raises:
            InvalidShape: A wrong shape or dtype, or conditions that do not fit the network.
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
            times = self._added_by(self._timesteps.x)
            self._table = hold(self._table, times.holding(times.x.transpose(0, 1)))
        self._batch, self._begun = embeds.shape[2], True

    @torch.no_grad()
    def forward(self, x: Tensor, k: Tensor) -> Tensor:
        """Return the raw outputs of all objectives at step k.

        Args:
            x: (B, C, h, w) latents, any float dtype.
            k: Index into the timesteps of `begin`, 0-d int64 on the device of the network.

        Returns:
            (M, K, B, C, h, w) in the dtype of the network, a new tensor; its pixels are in the
            memory layout of the network.

        Raises:
            InvalidShape: A wrong shape, dtype or device, or `begin` was not called.
        """
        unet = self.adapters.unet
        if not self._begun:
            raise InvalidShape("no prompt: call begin() first")
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
        assert self._prompts is not None  # begin() has been called
        prompts, count = self._prompts, len(self.objectives)
        x = x.to(self.dtype)
        if self._nhwc:
            x = x.contiguous(memory_format=torch.channels_last)
        rows = Rows(x) if self.options.sharing.prefix else Rows(x).expand(count, prompts.branches)
        with sdpa_kernel(ATTENTION_BACKENDS[self.attention_backend]):
            out: Rows = self.body(rows, Step(self._times(k), prompts))
        return out.expand(count, prompts.branches).grid()  # the fused step reads either layout

    def _added_by(self, timesteps: Tensor) -> Rows:
        """What all resnets add at these timesteps, (m k b, T, sum of channels)."""
        times: Rows = self.time(timesteps, self._added, self._projections)
        return times if self._shifts is None else times.holding(times.x + self._shifts)

    def _times(self, k: Tensor) -> list[Rows]:
        """What each resnet adds at step k, (m k b, C, 1, 1)."""
        if self._table is not None:
            row = self._table.holding(self._table.x.index_select(0, k[None])[0])
        else:
            assert self._timesteps is not None  # begin() has been called
            t = self._timesteps.x.index_select(0, k[None])
            row = self._added_by(t)
            row = row.holding(row.x[:, 0])
        parts = torch.split(row.x, [len(layer.weight) for layer in self._projections], dim=1)
        return [row.holding(part[:, :, None, None]) for part in parts]


def _joined(resnets: Sequence[Resnet]) -> Tensor | None:
    """Concatenate the shifts of all resnets, zeros where there is none."""
    if all(resnet.shift is None for resnet in resnets):
        return None
    weights = (resnet.time_emb_proj.weight for resnet in resnets)
    shifts = (resnet.shift for resnet in resnets)
    zeros = (weight.new_zeros(len(weight)) for weight in weights)
    return torch.cat([z if s is None else s for z, s in zip(zeros, shifts, strict=True)])


def _holders(network: nn.Module) -> Iterator[tuple[str, Mapping[str, Any], str]]:
    """Yield path, dictionary and key of everything that may hold a tensor or `Rows`."""
    for path, module in network.named_modules():
        for held in held_by(module)[1:]:
            yield from ((path, held, name) for name in held)
        for name, value in vars(module).items():
            alone = isinstance(value, Rows) or not isinstance(value, tuple)
            if any(isinstance(entry, Rows) for entry in ([value] if alone else value)):
                yield path, vars(module), name
